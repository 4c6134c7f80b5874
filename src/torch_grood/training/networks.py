"""Networks that no package brings: the ResNet-18 for 32×32 images of the OOD literature.

He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), with a stem of one 3×3 convolution and no
max-pooling, which would leave a map of 1×1 of a CIFAR image. The names in its state dict are those of OpenOOD's
``ResNet18_32x32``, so that checkpoints published for OpenOOD load; a test holds the list.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ResNet18", "resnet18_32x32"]

_WIDTH = 64
_BLOCKS = 2


class _BasicBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, inputs: Tensor) -> Tensor:
        branch = functional.relu(self.bn1(self.conv1(inputs)), inplace=True)
        return functional.relu(self.bn2(self.conv2(branch)) + self.shortcut(inputs), inplace=True)


class ResNet18(nn.Module):
    """A classifier of normalised RGB images (n, 3, 32, 32); by default 512 features, 11.2 million parameters.

    Args:
        num_classes: outputs.
        width: channels of the first stage; the features are eight times as many.
    """

    def __init__(self, num_classes: int = 10, width: int = _WIDTH) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, stride=1)
        self.layer2 = _stage(width, 2 * width, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, stride=2)
        self.layer4 = _stage(4 * width, 8 * width, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, num_classes) of images (n, 3, 32, 32)."""
        maps = functional.relu(self.bn1(self.conv1(images)), inplace=True)
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(maps), 1))
        return logits


def resnet18_32x32(num_classes: int = 10) -> ResNet18:
    """The network of OpenOOD's CIFAR benchmarks, with PyTorch's random initial weights."""
    return ResNet18(num_classes)


def _stage(n_in: int, n_out: int, stride: int) -> nn.Sequential:
    blocks = [
        _BasicBlock(n_in if number == 0 else n_out, n_out, stride if number == 0 else 1) for number in range(_BLOCKS)
    ]
    return nn.Sequential(*blocks)
