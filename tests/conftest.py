"""Fixtures that several test modules share. They are of session scope, so that hypothesis may use them too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_grood.gradients import PolarGradients

# Clusters of several tests begin at the same time, and each would make the token that all of them read.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

MakeGradients = Callable[..., PolarGradients]
BruteForce = Callable[[PolarGradients, PolarGradients], NDArray[np.float64]]


def _make_gradients(n: int, d: int, seed: int = 0, low: float = -3.0, high: float = 0.0) -> PolarGradients:
    generator = torch.Generator().manual_seed(seed)
    log_magnitude = low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)
    direction = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return PolarGradients(log_magnitude, (direction / direction.norm(dim=1, keepdim=True)).float())


def _brute_force(queries: PolarGradients, stored: PolarGradients) -> NDArray[np.float64]:
    """Log distances of all pairs, (n, N), in numpy: float64 differences in units of the larger vector of each pair.

    The zero vector has log norm -inf, so that the unit is that of the other; two zero vectors are equal.
    """

    def parts(gradients: PolarGradients) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        direction = gradients.direction.numpy().astype(np.float64)
        norm = np.where(direction.any(1), gradients.log_magnitude.numpy(), -np.inf)
        return norm, direction

    (a, u), (b, v) = parts(queries), parts(stored)
    found = np.empty((len(a), len(b)))
    for i in range(len(a)):
        unit = np.maximum(a[i], b)
        safe = np.where(np.isinf(unit), 0.0, unit)
        difference = np.exp(a[i] - safe)[:, None] * u[i] - np.exp(b - safe)[:, None] * v
        with np.errstate(divide="ignore"):
            found[i] = unit + np.log(np.sqrt((difference**2).sum(1)))
    return found


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Of processes that share work, and of equal bits in all of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_gradients() -> MakeGradients:
    """Make n random gradients of dimension d, with log π uniform in (low, high)."""
    return _make_gradients


@pytest.fixture(scope="session")
def brute_force() -> BruteForce:
    """Log distances of all pairs of queries and stored gradients, float64 (n, N), without torch."""
    return _brute_force


@pytest.fixture(scope="session")
def features() -> tuple[Tensor, Tensor]:
    """240 features (n, 8) of 4 classes, and their labels."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(240) % 4
    centres = 3 * torch.randn(4, 8, generator=generator)
    return centres[labels] + torch.randn(240, 8, generator=generator), labels
