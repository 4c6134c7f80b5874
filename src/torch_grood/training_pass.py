"""The first half of Algorithm 1: one pass over the training set.

It collects the class prototypes, the early prototypes and a sample of images if the outlier source needs them, the
range of the pixels, and the penultimate features, the only thing that grows with the training set.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_grood._batches import as_loader, split_batch
from torch_grood._progress import Progress, track
from torch_grood.errors import GroodError
from torch_grood.feature_store import FeatureStore
from torch_grood.features import Extraction, FeatureExtractor, model_fingerprint
from torch_grood.geometry import SquareSum, placed
from torch_grood.neighbors import StoreOptions, Subset
from torch_grood.neighbors.store import Spool
from torch_grood.outliers import (
    HighestEnergy,
    OutlierContext,
    OutlierSource,
    SampleReservoir,
    TrainingSamples,
    content_keys,
)
from torch_grood.prototypes import ClassPrototypes, as_labels
from torch_grood.provenance import TrainingRecord, content_hashes, names_of
from torch_grood.state import GRADIENT_ROWS, FittedState

__all__ = ["Collected", "Members", "TrainingPass", "shape_and_range"]

_log = logging.getLogger("torch_grood")


class Members(NamedTuple):
    """The images of a batch that take part.

    Attributes:
        taking_part: bool (b,), of the images of the batch.
        rows: rows of their classes among the prototypes, int64 (r,).
        sample_ids: their positions in the training set as it is read, int64 (r,).
    """

    taking_part: Tensor
    rows: Tensor
    sample_ids: Tensor

    def of(self, batch: Tensor) -> Tensor:
        """Their part of a batch, (b, ...)."""
        return batch if len(self.rows) == len(self.taking_part) else batch[self.taking_part.to(batch.device)]


class Collected(NamedTuple):
    """What a pass over a part of the training set tells of it beside features and sums.

    Attributes:
        hashes: see `content_hashes`, int64 (n,), of all samples that were read; 0 for those that were left out.
        n_samples: that take part.
        n_left_out: others.
        batch_size: the largest.
        uncertain: the samples that the classifier knows least of.
        image_shape, one_size, channel_range: see `TrainingPass.measure`.
    """

    hashes: Tensor
    n_samples: int
    n_left_out: int
    batch_size: int
    uncertain: HighestEnergy
    image_shape: tuple[int, ...]
    one_size: bool
    channel_range: tuple[Tensor, Tensor] | None


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
        geometry: str = "raw",
    ) -> None:
        self.extractor = extractor
        self.source = source
        self._dataset_classes = getattr(getattr(loader, "dataset", None), "classes", None)
        self._n_all = _length_of(loader)
        self._chosen = chosen
        self.reservoir = SampleReservoir(source.n_training_samples(self._n_all), seed)
        self.uncertain = HighestEnergy(source.n_uncertain(self._n_all))
        self._geometry = geometry
        self.squares = SquareSum()
        self._store = store
        self._subset = subset
        self._probe: Extraction | None = None
        self._said_memory = False
        self.read_again: Callable[[list[int]], list[Tensor]] | None = None
        self.seed = seed
        self.features = Spool(store)
        self.keys: list[Tensor] = []
        self.hashes: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.predictions: list[Tensor] = []
        self.sample_ids: list[Tensor] = []
        self.n_samples = self.n_read = self.n_left_out = self.batch_size = 0
        self.image_shape: tuple[int, ...] = ()
        self.one_size = True
        self.channel_range: tuple[Tensor, Tensor] | None = None
        self.early_prototypes: ClassPrototypes | None = None

    def run(self, loader: Iterable[Any], progress: Progress = None, store: FeatureStore | None = None) -> None:
        """Take all batches of the loader; with a store, only what it does not have is computed."""
        if store is not None:
            from torch_grood.stored_pass import run_stored

            run_stored(self, loader, store, progress)
            return
        for batch in track(as_loader(loader), progress, "fit"):
            self.add(*split_batch(batch))

    def add(self, images: Tensor, labels: Any) -> None:
        """Run the model on one batch and take what is needed from it."""
        if len(images) == 0:
            return
        if self._probe is None:
            self.start(images[:1])
        members = self.members(labels, len(images))
        if len(members.rows) == 0:
            return
        images = members.of(images)
        found = self.run_model(images, members, self.early_prototypes)
        self.collect(members, found, content_hashes(images))
        if self.reservoir.size:
            self.reservoir.offer(images, self.runner_up(found.logits))
        if self._subset is not None:
            self.keys.append(content_keys(images, self.seed))
        self.measure(*shape_and_range(images))
        self.say_memory()

    def start(self, sample: Tensor) -> Extraction:
        """Find the layers and the classes by the first image of the training set, (1, ...).

        Returns:
            what the model says of it.
        """
        self.extractor.resolve(sample, early=self.source.uses_early_layer)
        self._probe = self.extractor(sample)
        self._name_classes(self._probe.logits.shape[1])
        return self._probe

    def members(self, labels: Any, n: int) -> Members:
        """Who of the next n images takes part; each image is to be asked for once, in order."""
        ids = self._labels(labels, n)
        sample_ids = torch.arange(self.n_read, self.n_read + n)
        taking_part = self._row_of[ids] >= 0
        self.n_read += n
        self.n_left_out += int((~taking_part).sum())
        self.hashes.append(torch.zeros(n, dtype=torch.int64))
        return Members(taking_part, self._row_of[ids][taking_part], sample_ids[taking_part])

    def run_model(self, images: Tensor, members: Members, early_prototypes: ClassPrototypes | None) -> Extraction:
        """Features and logits of the images that take part, on the CPU; early activations go to the prototypes."""
        rows = members.rows
        observe = None if early_prototypes is None else (lambda early: early_prototypes.update(early, rows))
        with self._naming(members):
            found = self.extractor(images, observe)
        return Extraction(found.features.cpu(), found.logits.cpu())

    def collect(self, members: Members, found: Extraction, hashes: Tensor) -> None:
        """Take features, logits and content hashes of the images that take part in the batch of `members`."""
        with self._naming(members):
            self._sum_up(found.features, members.rows)
        self.uncertain.offer(found.features, found.logits[:, self.class_ids])
        self.n_features, self._feature_bytes = found.features.shape[1], found.features.element_size()
        self.hashes[-1][members.taking_part] = hashes
        self.features.append(found.features)
        self.rows.append(members.rows)
        self.predictions.append(found.logits.argmax(1))
        self.sample_ids.append(members.sample_ids)
        self.n_samples += len(members.rows)
        self.batch_size = max(self.batch_size, len(members.rows))

    def _sum_up(self, features: Tensor, rows: Tensor) -> None:
        in_place = placed(features, self._geometry)
        self.prototypes.update(in_place, rows)
        self.squares.update(in_place)

    def go_on(self, prototypes: ClassPrototypes, squares: SquareSum) -> None:
        """Add what was collected to sums over the samples before, as if this pass had gone on from there."""
        self.prototypes, self.squares = prototypes, squares
        for features, rows in zip(self.features, self.rows, strict=True):
            self._sum_up(features, rows)

    def collected(self) -> Collected:
        """What another pass needs to know of this one, to `join` it."""
        return Collected(
            torch.cat(self.hashes) if self.hashes else torch.empty(0, dtype=torch.int64),
            self.n_samples,
            self.n_left_out,
            self.batch_size,
            self.uncertain,
            self.image_shape,
            self.one_size,
            self.channel_range,
        )

    def join(self, later: Collected) -> None:
        """Take what another pass has collected of the samples that follow, but for features and sums."""
        self.hashes.append(later.hashes)
        self.n_read += len(later.hashes)
        self.n_samples += later.n_samples
        self.n_left_out += later.n_left_out
        self.batch_size = max(self.batch_size, later.batch_size)
        self.uncertain.merge(later.uncertain)
        if later.image_shape:
            self.one_size = self.one_size and later.one_size
            self.measure(later.image_shape, later.channel_range)

    @staticmethod
    @contextmanager
    def _naming(members: Members) -> Iterator[None]:
        """Errors tell which samples they are about."""
        try:
            yield
        except GroodError as error:
            first, last = int(members.sample_ids[0]), int(members.sample_ids[-1])
            raise GroodError(f"in training samples {first} to {last}: {error}") from None

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
        self.early_prototypes = ClassPrototypes(names_in_use) if self.source.uses_early_layer else None

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

    def runner_up(self, logits: Tensor) -> Tensor:
        """Row of the second most likely class among those that take part."""
        if len(self.class_ids) < 2:
            return torch.zeros(len(logits), dtype=torch.int64)
        return logits[:, self.class_ids].topk(2, dim=1).indices[:, 1]

    def measure(self, shape: tuple[int, ...], channel_range: tuple[Tensor, Tensor] | None) -> None:
        """Take the shape of a batch's images, and the range of their channels."""
        self.one_size = self.one_size and shape == (self.image_shape or shape)
        self.image_shape = self.image_shape or shape
        if channel_range is not None and self.one_size:
            low, high = channel_range
            if self.channel_range is not None:
                low, high = torch.minimum(low, self.channel_range[0]), torch.maximum(high, self.channel_range[1])
            self.channel_range = low, high

    @property
    def needs_content(self) -> bool:
        """Whether something depends on the content of the images: what is mixed, or what a subset keeps."""
        return self.reservoir.size > 0 or self._subset is not None

    def take_content(self, content: Mapping[str, Tensor], positions: Tensor, logits: Tensor) -> None:
        """Take the content numbers of images that take part, in place of the images, which `read_again` gives."""
        if self.reservoir.size:
            self.reservoir.offer_positions(content["priorities"], positions, self.runner_up(logits))
        if self._subset is not None:
            self.keys.append(content["keys"])

    def left_out(self) -> list[int]:
        """Labels of the classes that are left out."""
        return (self._row_of < 0).nonzero().flatten().tolist()

    def rows_of(self, labels: Tensor) -> Tensor:
        """Rows of labels among the prototypes.

        Raises:
            GroodError: if a label is none of the classes that take part.
        """
        known = (labels >= 0) & (labels < len(self._row_of))
        rows = self._row_of[labels.where(known, 0)].where(known, -1)
        if bool((rows < 0).any()):
            raise GroodError(f"label {int(labels[rows < 0][0])} is none of the {len(self.class_ids)} classes")
        return rows

    def samples(self) -> TrainingSamples | None:
        """The training samples that the source asks for."""
        return self.reservoir.samples(self.source.n_training_samples(self.n_samples), self.read_again)

    def outlier_context(
        self, samples: TrainingSamples | None, progress: Progress = None, *, early: bool = True
    ) -> OutlierContext:
        """What a source of outliers may draw on: the training samples to be mixed, and all that was collected.

        Without early prototypes, which may take gigabytes, for a source that uses none.
        """
        early_prototypes = self.early_prototypes if early else None
        return OutlierContext(
            class_prototypes=self.prototypes.means,
            extractor=self.extractor,
            early_prototypes=early_prototypes.means if early_prototypes else None,
            samples=samples,
            image_shape=self.image_shape,
            channel_range=self.channel_range,
            batch_size=self.batch_size,
            seed=self.seed,
            progress=progress,
            uncertain=self.uncertain.features(self.source.n_uncertain(self.n_samples)),
        )

    def completed(self, state: FittedState, loader: Iterable[Any]) -> FittedState:
        """The state that was made of this pass, with what the pass knows of the model and the images."""
        extractor = self.extractor
        info = replace(
            state.info,
            n_left_out=self.n_left_out,
            image_shape=self.image_shape if self.one_size else (),
            head=extractor.head,
            early_layer=extractor.early_layer if self.source.uses_early_layer else None,
        )
        training = TrainingRecord(torch.cat(self.hashes), names_of(loader, self.n_read))
        return replace(state, info=info, fingerprint=model_fingerprint(extractor.model), training=training)

    def say_memory(self) -> None:
        """Log once what will be kept."""
        if not self._said_memory:
            self._said_memory = True
            _log.info("%s", self.memory_statement())

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


def shape_and_range(images: Tensor) -> tuple[tuple[int, ...], tuple[Tensor, Tensor] | None]:
    """Shape of each of n ≥ 1 images; least and greatest value of each channel, if they are float images."""
    shape = tuple(images.shape[1:])
    if not images.is_floating_point():
        return shape, None
    flat = images.detach().flatten(2) if images.ndim > 2 else images.detach()[:, :, None]
    return shape, (flat.amin((0, 2)).float().cpu(), flat.amax((0, 2)).float().cpu())


def _megabytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _length_of(loader: Iterable[Any]) -> int | None:
    dataset = getattr(loader, "dataset", None)
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError:
        return None
