"""The first half of Algorithm 1: one pass over the training set.

It collects the class prototypes, the early prototypes and a sample of images if the outlier source needs them, the
range of the pixels, and the penultimate features, the only thing that grows with the training set.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from torch_grood.errors import GroodError
from torch_grood.features import FeatureExtractor
from torch_grood.neighbors import StoreOptions, Subset
from torch_grood.neighbors.store import Spool
from torch_grood.outliers import OutlierSource, SampleReservoir, TrainingSamples, content_keys
from torch_grood.prototypes import ClassPrototypes, as_labels
from torch_grood.state import GRADIENT_ROWS

__all__ = ["TrainingPass"]

_log = logging.getLogger("torch_grood")


class TrainingPass:
    """What one pass over the training set collects; see `GROOD.fit`."""

    def __init__(
        self,
        extractor: FeatureExtractor,
        source: OutlierSource,
        seed: int,
        loader: Iterable[Any],
        chosen: Sequence[int | str] | None,
        store: StoreOptions = StoreOptions(),  # noqa: B008 (immutable)
        subset: Subset | None = None,
    ) -> None:
        self._extractor = extractor
        self._source = source
        self._dataset_classes = getattr(getattr(loader, "dataset", None), "classes", None)
        self._n_all = _length_of(loader)
        self._chosen = chosen
        self.reservoir = SampleReservoir(source.n_training_samples(self._n_all), seed)
        self._store = store
        self._subset = subset
        self._seed = seed
        self.features = Spool(store)
        self.keys: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.predictions: list[Tensor] = []
        self.sample_ids: list[Tensor] = []
        self.n_samples = self.n_read = self.n_left_out = self.batch_size = 0
        self.image_shape: tuple[int, ...] = ()
        self.one_size = True
        self.channel_range: tuple[Tensor, Tensor] | None = None
        self.early_prototypes: ClassPrototypes | None = None

    def add(self, images: Tensor, labels: Any) -> None:
        """Run the model on one batch and take what is needed from it."""
        if len(images) == 0:
            return
        if self.n_samples == 0:
            self._extractor.resolve(images, early=self._source.uses_early_layer)
            self._name_classes(self._extractor(images[:1]).logits.shape[1])
        ids = self._labels(labels, len(images))
        sample_ids = torch.arange(self.n_read, self.n_read + len(images))
        self.n_read += len(images)
        taking_part = self._row_of[ids] >= 0
        if not bool(taking_part.all()):
            self.n_left_out += int((~taking_part).sum())
            images, ids, sample_ids = images[taking_part.to(images.device)], ids[taking_part], sample_ids[taking_part]
            if len(images) == 0:
                return
        rows = self._row_of[ids]
        early_prototypes = self.early_prototypes
        observe = None if early_prototypes is None else (lambda early: early_prototypes.update(early, rows))
        try:
            found = self._extractor(images, observe)
            features = found.features.cpu()
            self.prototypes.update(features, rows)
        except GroodError as error:
            raise GroodError(f"in training samples {int(sample_ids[0])} to {int(sample_ids[-1])}: {error}") from None
        if self.reservoir.size:
            self.reservoir.offer(images, self._runner_up(found.logits))
        if self._subset is not None:
            self.keys.append(content_keys(images, self._seed))
        self._measure_images(images)
        self.n_features, self._feature_bytes = features.shape[1], features.element_size()
        self.features.append(features)
        self.rows.append(rows)
        self.predictions.append(found.logits.argmax(1).cpu())
        self.sample_ids.append(sample_ids)
        self.n_samples += len(rows)
        self.batch_size = max(self.batch_size, len(rows))

    def _name_classes(self, n_logits: int) -> None:
        names = self._dataset_classes
        self.classes: tuple[int | str, ...] = tuple(range(n_logits))
        if names is not None and all(isinstance(name, (int, str)) for name in names):
            if len(names) != n_logits:
                raise GroodError(
                    f"the data have {len(names)} classes ({', '.join(map(str, names[:5]))}, …), the model {n_logits} "
                    "outputs; a label must be the position of its class among the outputs. Class folders are numbered "
                    "in the order of their names: use those the model was trained on, or an image list with labels."
                )
            self.classes = tuple(names)
        if isinstance(self._chosen, str) or not isinstance(self._chosen, (Iterable, NoneType)):
            raise GroodError(f"classes must be a list of names or positions, got {self._chosen!r}")
        ids = range(n_logits) if self._chosen is None else sorted({self._class_id(name) for name in self._chosen})
        if len(ids) == 0:
            raise GroodError("classes=[] leaves no class; name those that take part, or leave it out for all")
        self.class_ids = torch.tensor(list(ids))
        self._row_of = torch.full((n_logits,), -1)
        self._row_of[self.class_ids] = torch.arange(len(self.class_ids))
        names_in_use = [self.classes[i] for i in ids]
        self.prototypes = ClassPrototypes(names_in_use)
        self.early_prototypes = ClassPrototypes(names_in_use) if self._source.uses_early_layer else None

    def _class_id(self, name: int | str) -> int:
        if name in self.classes:
            return self.classes.index(name)
        if isinstance(name, int) and 0 <= name < len(self.classes):
            return name
        raise GroodError(
            f"classes={name!r} is none of the classifier's {len(self.classes)} classes: {self.classes[:20]}"
        )

    def _labels(self, labels: Any, n: int) -> Tensor:
        try:
            return ClassPrototypes(self.classes).rows(labels, n) if labels is not None else as_labels(labels, n)
        except GroodError as error:
            raise GroodError(f"in the batch after training sample {self.n_read}: {error}") from None

    def _runner_up(self, logits: Tensor) -> Tensor:
        """Row of the second most likely class among those that take part."""
        if len(self.class_ids) < 2:
            return torch.zeros(len(logits), dtype=torch.int64)
        return logits[:, self.class_ids.to(logits.device)].topk(2, dim=1).indices[:, 1].cpu()

    def _measure_images(self, images: Tensor) -> None:
        shape = tuple(images.shape[1:])
        self.one_size = self.one_size and shape == (self.image_shape or shape)
        self.image_shape = self.image_shape or shape
        if images.is_floating_point() and self.one_size:
            flat = images.detach().flatten(2) if images.ndim > 2 else images.detach()[:, :, None]
            low, high = flat.amin((0, 2)).float().cpu(), flat.amax((0, 2)).float().cpu()
            if self.channel_range is not None:
                low, high = torch.minimum(low, self.channel_range[0]), torch.maximum(high, self.channel_range[1])
            self.channel_range = low, high

    def samples(self) -> TrainingSamples | None:
        """The training samples that the source asks for."""
        return self.reservoir.samples(self._source.n_training_samples(self.n_samples))

    def memory_statement(self) -> str:
        """What `fit` will keep, from its first batch."""
        n = self._n_all
        d, width = self.n_features, self._feature_bytes
        early = self.early_prototypes
        early_bytes = 0 if early is None else len(early.classes) * early.sample_size * 8
        image_bytes = self.reservoir.size * 4 * torch.Size(self.image_shape).numel()
        fixed = f"{_megabytes(early_bytes)} of early prototypes, {_megabytes(image_bytes)} of images to mix"
        if n is None:
            return f"fit keeps {width * d} bytes a sample ({d} features), {fixed}; the loader does not tell its length"
        # Each part of the features is let go when its gradients are stored: one copy, and what is under way. What
        # exceeds the budget is on disk.
        feature_bytes, gradient_bytes = width * d * n, self._store.nbytes(n, d)
        budget = self._store.budget()
        on_disk = max(0, feature_bytes - budget) + (gradient_bytes if gradient_bytes > budget else 0)
        held = max(min(feature_bytes, budget), gradient_bytes if gradient_bytes <= budget else 0)
        total = held + early_bytes + image_bytes + 24 * d * GRADIENT_ROWS
        statement = (
            f"fit keeps {n:,} x {d} features ({_megabytes(feature_bytes)}), then their gradients in "
            f"{self._store.dtype} ({_megabytes(gradient_bytes)}), {fixed}: about {_megabytes(total)} in all, beside "
            "the model"
        )
        if on_disk:
            statement += f", and {_megabytes(on_disk)} on disk"
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
        if installed is not None and total > installed:
            _log.warning("%s, but this machine has %s", statement, _megabytes(installed))
        return statement


def _megabytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _length_of(loader: Iterable[Any]) -> int | None:
    dataset = getattr(loader, "dataset", None)
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError:
        return None
