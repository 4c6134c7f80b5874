"""What a batch holds: (images, labels, …), images alone, or a dict as Hugging Face's and OpenOOD's loaders give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from torch_grood.errors import GroodError

__all__ = ["as_loader", "split_batch"]

_IMAGE_KEYS = ("pixel_values", "images", "image", "data", "x", "inputs")
_LABEL_KEYS = ("labels", "label", "targets", "target", "y")


def split_batch(batch: Any) -> tuple[Tensor, Any]:
    """Images (n, ...) and labels, None if there are none, of one batch.

    Raises:
        GroodError: if there are no images in it.
    """
    labels: Any = None
    images: Any = batch
    if isinstance(batch, Mapping):
        images = next((batch[key] for key in _IMAGE_KEYS if key in batch), None)
        labels = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
        if images is None:
            raise GroodError(
                f"found no images in a batch with the keys {', '.join(map(str, batch))}; expected one of "
                f"{', '.join(_IMAGE_KEYS)}"
            )
    elif isinstance(batch, (tuple, list)):
        if len(batch) == 0:
            raise GroodError("a batch of the loader is an empty tuple; expected (images, labels)")
        images = batch[0]
        labels = batch[1] if len(batch) > 1 else None
    if not isinstance(images, Tensor):
        raise GroodError(
            f"expected a tensor of images (n, ...) in each batch, got {type(images).__name__}; "
            "use a DataLoader over samples (image tensor, label)"
        )
    if images.ndim < 2:
        raise GroodError(f"expected a batch of images (n, ...), got shape {tuple(images.shape)}; add a batch dimension")
    return images, labels


def as_loader(images: Tensor | Iterable[Any], batch_size: int = 256) -> Iterable[Any]:
    """Batches of a tensor of images, or the loader itself.

    Raises:
        GroodError: for something that cannot be iterated over.
    """
    if isinstance(images, Tensor):
        return [images] if len(images) <= batch_size else torch.split(images, batch_size)
    if isinstance(images, Dataset):
        raise GroodError(
            f"got a data set ({type(images).__name__}), which gives single samples; "
            "wrap it: DataLoader(dataset, batch_size=64)"
        )
    if isinstance(images, (str, Mapping)) or not isinstance(images, Iterable):
        raise GroodError(f"expected a tensor of images or a loader of batches, got {type(images).__name__}")
    return images
