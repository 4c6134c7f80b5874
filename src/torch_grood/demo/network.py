"""The demo's classifier, and its training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["DigitsCNN", "train_digits_cnn"]

EPOCHS = 40
BATCH_SIZE = 32
PEAK_LEARNING_RATE = 5e-3


class DigitsCNN(nn.Module):
    """A classifier of normalised RGB images (n, 3, 8, 8), for the digits 0 to 5 unless told otherwise.

    Three blocks of convolution, batch normalisation and ReLU, a hidden layer of 64 features, and the head.
    """

    def __init__(self, num_classes: int = 6) -> None:
        super().__init__()
        self.block1 = _block(3, 32)
        self.block2 = nn.Sequential(_block(32, 64), nn.MaxPool2d(2))
        self.block3 = nn.Sequential(_block(64, 64), nn.MaxPool2d(2))
        self.hidden = nn.Linear(64 * 2 * 2, 64)
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, num_classes) of images (n, 3, 8, 8)."""
        maps = self.block3(self.block2(self.block1(images)))
        logits: Tensor = self.head(functional.relu(self.hidden(maps.flatten(1))))
        return logits


def train_digits_cnn(images: Tensor, labels: Tensor, seed: int) -> DigitsCNN:
    """A `DigitsCNN` trained by Adam under a one-cycle schedule; the same seed gives the same weights.

    The caller's random state is left alone.

    Args:
        images: normalised, (n, 3, 8, 8).
        labels: int64 (n,), 0 to 5.
        seed: of the initial weights and the order of the batches.

    Returns:
        The network in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsCNN()
    batches_per_epoch = len(images) // BATCH_SIZE
    optimizer = torch.optim.Adam(model.parameters(), lr=PEAK_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=EPOCHS * batches_per_epoch
    )
    for _ in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        # The remainder is left out: batch normalisation over one or two images is noise.
        for batch in order[: batches_per_epoch * BATCH_SIZE].view(-1, BATCH_SIZE):
            optimizer.zero_grad()
            torch.autograd.backward(functional.cross_entropy(model(images[batch]), labels[batch]))
            optimizer.step()
            schedule.step()
    return model.eval()


def _block(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())
