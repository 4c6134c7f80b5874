"""Outliers made from training images, as candidates for p_ood, and drawn images, as far-OOD of the split worlds.

All work on normalised images (n, 3, h, w), as a source of outliers meets them in `fit`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["DRAWN", "FROM_IMAGES"]


def mean_of(k: int) -> Callable[[Tensor, torch.Generator], Tensor]:
    """The mean of k images."""

    def make(images: Tensor, generator: torch.Generator) -> Tensor:
        parts = [images] + [_shuffled(images, generator) for _ in range(k - 1)]
        return torch.stack(parts).mean(0)

    return make


def halves(images: Tensor, generator: torch.Generator) -> Tensor:
    """The left half of an image beside the right half of another."""
    width = images.shape[-1] // 2
    return torch.cat([images[..., :width], _shuffled(images, generator)[..., width:]], dim=-1)


def jigsaw(grid: int) -> Callable[[Tensor, torch.Generator], Tensor]:
    """The patches of a grid in another order."""

    def make(images: Tensor, generator: torch.Generator) -> Tensor:
        return torch.stack([_permuted_patches(image[None], grid, generator)[0] for image in images])

    return make


def collage(grid: int) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Each patch of a grid from another image, in its place."""

    def make(images: Tensor, generator: torch.Generator) -> Tensor:
        size = images.shape[-1] // grid
        made = images.clone()
        for row in range(grid):
            for column in range(grid):
                where = (..., slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size))
                made[where] = _shuffled(images, generator)[where]
        return made

    return make


def amplitude_exchanged(images: Tensor, generator: torch.Generator) -> Tensor:
    """The phase of an image with the amplitude of another."""
    mine, other = torch.fft.fft2(images), torch.fft.fft2(_shuffled(images, generator))
    return torch.fft.ifft2(torch.polar(other.abs(), mine.angle())).real


def phase_random(images: Tensor, generator: torch.Generator) -> Tensor:
    """The amplitude of an image with the phase of white noise."""
    noise = torch.fft.fft2(torch.randn(len(images), 1, *images.shape[2:], generator=generator))
    return torch.fft.ifft2(torch.polar(torch.fft.fft2(images).abs(), noise.angle().expand(images.shape))).real


def noisy(sigma: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    """With white noise of σ standard deviations of the training pixels."""

    def make(images: Tensor, generator: torch.Generator) -> Tensor:
        return images + sigma * torch.randn(images.shape, generator=generator)

    return make


def blurred(images: Tensor, generator: torch.Generator) -> Tensor:
    """Reduced to 8×8 and enlarged."""
    small = functional.interpolate(images, size=images.shape[-1] // 4, mode="area")
    return functional.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False)


def inverted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Dark for bright."""
    return -images


def uniform(images: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform noise over the range of the images."""
    low, high = images.amin((0, 2, 3), keepdim=True), images.amax((0, 2, 3), keepdim=True)
    return low + (high - low) * torch.rand(images.shape, generator=generator)


FROM_IMAGES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "mean of 2": mean_of(2),
    "mean of 3": mean_of(3),
    "mean of 5": mean_of(5),
    "halves": halves,
    "jigsaw 2": jigsaw(2),
    "jigsaw 4": jigsaw(4),
    "jigsaw 8": jigsaw(8),
    "collage 2": collage(2),
    "collage 4": collage(4),
    "amplitude exchanged": amplitude_exchanged,
    "phase random": phase_random,
    "noisy 0.5": noisy(0.5),
    "noisy 1": noisy(1.0),
    "blurred": blurred,
    "inverted": inverted,
    "uniform noise": uniform,
}


def clouds(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Coloured noise of random coarseness."""
    made = []
    for _ in range(n):
        coarse = int(torch.randint(2, 17, (1,), generator=generator))
        noise = torch.rand(1, 3, coarse, coarse, generator=generator)
        made.append(functional.interpolate(noise, size=size, mode="bicubic", align_corners=False)[0])
    return torch.stack(made).clamp(0, 1)


def gratings(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Two crossed gratings in two colours."""
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    u = torch.rand(n, 8, generator=generator)
    waves = torch.zeros(n, size, size)
    for part in range(2):
        angle, frequency, phase, weight = (u[:, 4 * part + i, None, None] for i in range(4))
        along = x * torch.cos(math.pi * angle) + y * torch.sin(math.pi * angle)
        waves += (0.3 + weight) * torch.sin(2 * math.pi * ((1 + 9 * frequency) * along + phase))
    share = torch.sigmoid(3 * waves)[:, None]
    colours = torch.rand(2, n, 3, 1, 1, generator=generator)
    return share * colours[0] + (1 - share) * colours[1]


def shapes(n: int, size: int, generator: torch.Generator) -> Tensor:
    """A few filled boxes and discs on a plain ground."""
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    made = torch.rand(n, 3, 1, 1, generator=generator).expand(n, 3, size, size).clone()
    for _ in range(4):
        u = torch.rand(n, 8, generator=generator)
        centre_x, centre_y, radius, round_ = (u[:, i, None, None] for i in range(4))
        dx, dy = (x - centre_x).abs(), (y - centre_y).abs()
        distance = torch.where(round_ > 0.5, (dx**2 + dy**2).sqrt(), torch.maximum(dx, dy))
        inside = (distance < 0.05 + 0.3 * radius)[:, None]
        made = torch.where(inside, u[:, 4:7, None, None], made)
    return made


def strokes(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Thin bright lines on a dark ground, or dark ones on a bright ground."""
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    ink = torch.zeros(n, size, size)
    for _ in range(3):
        start, end = (torch.rand(n, 2, 1, 1, generator=generator) for _ in range(2))
        step = end - start
        along = ((x - start[:, 0]) * step[:, 0] + (y - start[:, 1]) * step[:, 1]) / (step**2).sum(1).clamp(min=1e-3)
        along = along.clamp(0, 1)
        off = ((x - start[:, 0] - along * step[:, 0]) ** 2 + (y - start[:, 1] - along * step[:, 1]) ** 2).sqrt()
        ink = torch.maximum(ink, (1.5 - off * size / 1.5).clamp(0, 1))
    dark = torch.rand(n, 3, 1, 1, generator=generator) * 0.2
    drawn = dark + (1 - dark) * ink[:, None]
    return torch.where(torch.rand(n, 1, 1, 1, generator=generator) > 0.5, drawn, 1 - drawn)


DRAWN: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "clouds": clouds,
    "gratings": gratings,
    "shapes": shapes,
    "strokes": strokes,
}


def _shuffled(images: Tensor, generator: torch.Generator) -> Tensor:
    return images[torch.randperm(len(images), generator=generator)]


def _permuted_patches(images: Tensor, grid: int, generator: torch.Generator) -> Tensor:
    n, channels, height, width = images.shape
    h, w = height // grid, width // grid
    patches = images[..., : h * grid, : w * grid].reshape(n, channels, grid, h, grid, w).permute(2, 4, 0, 1, 3, 5)
    patches = patches.reshape(grid * grid, n, channels, h, w)[torch.randperm(grid * grid, generator=generator)]
    patches = patches.reshape(grid, grid, n, channels, h, w).permute(2, 3, 0, 4, 1, 5)
    return patches.reshape(n, channels, h * grid, w * grid)
