"""Tiny classifiers, data that they can classify, and a guard that a model is left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
)


class MLP(nn.Module):
    """For tabular data (n, 6)."""

    def __init__(self, classes: int = 3, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.second = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(self.second(self.first(x).relu()).relu()))


def cnn(classes: int = 3, channels: int = 3, width: int = 8, inplace: bool = False) -> nn.Sequential:
    """For images (n, channels, ≥ 4, ≥ 4); with BatchNorm and dropout."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(width, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=inplace),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(4 * width, classes),
    )


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x))))))


class ResidualNet(nn.Module):
    """A residual network on images (n, 3, ≥ 2, ≥ 2)."""

    def __init__(self, classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.layer1 = nn.Sequential(Block(width), Block(width))
        self.layer2 = nn.Sequential(Block(width), Block(width))
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


class Wrapped(nn.Module):
    """A classifier whose output is changed by a function."""

    def __init__(self, body: nn.Module, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body = body
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.body(x))


def patterns(n: int, classes: int = 3, shape: Sequence[int] = (3, 8, 8), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (n, *shape) whose class shows, and labels (n,), in turn 0, 1, 2, 0, …; `seed` draws other samples."""
    means = torch.randn(classes, *shape, generator=torch.Generator().manual_seed(1234))
    labels = torch.arange(n) % classes
    return means[labels] + 0.5 * torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)), labels


def write_patterns(folder: Path, n: int, seed: int) -> Path:
    """`patterns` as DIR/{a,b,c}/NNN.png, which a mean of 128/255 and a std of 40/255 turn into its numbers again."""
    from PIL import Image

    images, labels = patterns(n, seed=seed)
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        target = folder / "abc"[label]
        target.mkdir(parents=True, exist_ok=True)
        pixels = (40 * image + 128).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(target / f"{i:03}.png")
    return folder


@torch.no_grad()
def teach(model: nn.Module, head: nn.Linear, inputs: Tensor, labels: Tensor) -> None:
    """Set the head's weights by least squares, so that the random network classifies `inputs` well."""
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    modes = [module.training for module in model.modules()]
    model.eval()
    model(inputs)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    handle.remove()
    features = torch.cat([seen[-1], torch.ones(len(inputs), 1)], 1).double()
    targets = 8 * nn.functional.one_hot(labels, head.out_features).double()
    ridge = features.T @ features + 1e-3 * torch.eye(features.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(ridge, features.T @ targets)
    head.weight.copy_(solution[:-1].T)
    head.bias.copy_(solution[-1])


def taught_cnn(classes: int = 3, seed: int = 0, **arguments: Any) -> nn.Sequential:
    """A `cnn` in eval mode that classifies `patterns` nearly without error."""
    torch.manual_seed(seed)
    model = cnn(classes, **arguments).eval()
    inputs, labels = patterns(40 * classes, classes, (arguments.get("channels", 3), 8, 8), seed=77)
    teach(model, model[-1], inputs, labels)
    return model


def taught_mlp(classes: int = 3, seed: int = 0) -> MLP:
    """An `MLP` in eval mode that classifies `patterns` nearly without error."""
    torch.manual_seed(seed)
    model = MLP(classes).eval()
    teach(model, model.out, *patterns(40 * classes, classes, (6,), seed=77))
    return model


def batches(inputs: Tensor, labels: Any, size: int) -> list[tuple[Tensor, Any]]:
    """A loader: a list of batches."""
    return [(inputs[i : i + size], labels[i : i + size]) for i in range(0, len(inputs), size)]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All of a model that a user could find changed, and the random state."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [(name, module.training) for name, module in model.named_modules()],
        "hooks": [
            (name, table, tuple(getattr(module, table, {}) or ()))
            for name, module in model.named_modules()
            for table in HOOK_TABLES
        ],
        "parameters": [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        "forward": [(name, "forward" in vars(module)) for name, module in model.named_modules()],
        "random": torch.get_rng_state(),
        "grad_enabled": torch.is_grad_enabled(),
    }


def assert_same_snapshot(before: dict[str, Any], after: dict[str, Any]) -> None:
    for part in ("modes", "hooks", "parameters", "forward", "grad_enabled"):
        assert before[part] == after[part], part
    assert before["state"].keys() == after["state"].keys()
    for name, value in before["state"].items():
        assert value.dtype == after["state"][name].dtype
        assert torch.equal(value.reshape(-1).view(torch.uint8), after["state"][name].reshape(-1).view(torch.uint8)), (
            name
        )
    assert torch.equal(before["random"], after["random"]), "the global random state was used"


@contextlib.contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Assert that the body, even if it raises, leaves the model and the random state bit for bit as they were."""
    before = snapshot(model)
    try:
        yield
    finally:
        assert_same_snapshot(before, snapshot(model))
