"""From a classifier and image sets to outputs that every method runs on: each image passes the network once.

What the network says is kept in a store (`torch_grood.data.FeatureCache`), keyed by content: the weights, the
transform, the files. A second run, another method or another λ computes only what is not there.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from torch_grood._progress import Progress
from torch_grood.data import ImageLoader
from torch_grood.errors import GroodError
from torch_grood.evaluation.made_outliers import MadeOutliers
from torch_grood.evaluation.outputs import Head, Model, Outputs, World
from torch_grood.feature_store import FeatureStore
from torch_grood.features import FeatureExtractor
from torch_grood.provenance import digest_of
from torch_grood.stored_pass import stored_extractions, stored_scores

__all__ = ["ClassifierOutputs", "ExtractionCost", "NamedProgress", "Sets", "extract_sets"]

_log = logging.getLogger("torch_grood")

# Logits from stored features through the head: equal up to rounding, or the head is not one linear layer.
_SAME_LOGITS = 1e-3

NamedProgress = Callable[[str], Progress] | Literal[False] | None
"""Gives the progress (see `GROOD.fit`) of what has the given name; None: bars on a terminal, False: none."""


class Sets(NamedTuple):
    """The images of a benchmark, as loaders of known files; all with the transform of the classifier.

    Attributes:
        train, val, test: in-distribution; `val` may be None.
        val_ood: outliers to choose hyper-parameters on, or None.
        ood: the OOD test sets by key.
    """

    train: ImageLoader
    val: ImageLoader | None
    test: ImageLoader
    val_ood: ImageLoader | None
    ood: Mapping[str, ImageLoader]

    def all(self) -> dict[str, ImageLoader]:
        """All loaders that are there, by key: "train", "val", "test", "val_ood" and the OOD sets' own."""
        own = {"train": self.train, "val": self.val, "test": self.test, "val_ood": self.val_ood}
        return {key: loader for key, loader in {**own, **self.ood}.items() if loader is not None}


@dataclass
class ExtractionCost:
    """What the extraction took.

    Attributes:
        seconds: of wall time.
        images: in all sets.
        network_images: images that went through the network now, a few included that layers are looked for and the
            store is probed with; the others were in the store.
    """

    seconds: float = 0.0
    images: int = 0
    network_images: int = 0


@dataclass(frozen=True, eq=False)
class ClassifierOutputs:
    """What one classifier says of all sets.

    Attributes:
        world: what methods may be fitted on.
        test: outputs of the ID test images.
        ood: outputs of the OOD test sets, by key.
        digests: SHA-256 of the content of each set's images, whatever their order, by key.
        fingerprints: SHA-256 of all that scores depend on in each set, by key: features, images and labels, in order.
        prototypes: float64 (C, d), of the classes.
        head_name: of the last layer.
        early_layer: where early activations are mixed, if they are.
        n_test_in_train: test images, ID and OOD, that are training images, too.
        cost: what it took.
    """

    world: World
    test: Outputs
    ood: Mapping[str, Outputs]
    digests: Mapping[str, str]
    fingerprints: Mapping[str, str]
    prototypes: Tensor
    head_name: str
    early_layer: str | None
    n_test_in_train: int
    cost: ExtractionCost


def extract_sets(
    model: nn.Module,
    sets: Sets,
    store: FeatureStore,
    *,
    std: tuple[float, ...],
    seed: int = 0,
    head: str | None = None,
    early_layer: str | None = None,
    progress: NamedProgress = None,
) -> ClassifierOutputs:
    """Run the classifier over all sets, as far as the store does not have what it says.

    Args:
        model: from images to logits; to be used by nobody else until all methods are done.
        sets: the images.
        store: keeps features.
        std: of the transform's normalisation, for each channel.
        seed: of what is drawn from the training images.
        head: name of the last layer; found if None.
        early_layer: name of the layer whose output is mixed; found if None.
        progress: of each set, by its key.

    Raises:
        GroodError: for images that the model cannot take or gives no finite features for, labels out of range, an
            unreadable file, an empty set.
    """
    extractor = FeatureExtractor(model, head, early_layer)
    loaders = sets.all()
    cost = ExtractionCost(images=sum(len(loader.dataset) for loader in loaders.values()))
    started = time.monotonic()
    with extractor.evaluation(), _counting(extractor.model, cost):
        # Before hours of reading.
        n_classes = extractor(store.first_image(sets.train)).logits.shape[1]
        for key in ("train", "val", "test"):
            if key in loaders:
                _check_labels(loaders[key], key, n_classes)
        _check_classes(sets.train, n_classes)
        _say_set("train", sets.train)
        outliers = MadeOutliers.of(extractor, sets.train, store, seed, _of(progress, "train"))
        with _no_news():
            read = {"train": _read(extractor, sets.train, store, "train", progress)}
        for key, loader in loaders.items():
            if key not in read:
                _say_set(key, loader)
                read[key] = _read(extractor, loader, store, key, progress)
    cost.seconds = time.monotonic() - started
    outputs = {key: found.outputs for key, found in read.items()}
    assert extractor.head is not None
    world = World(
        train=outputs["train"],
        val=outputs.get("val"),
        head=_head_of(extractor, outputs["test"]),
        outliers=outliers,
        model=Model(extractor.model, std),
        val_ood=outputs.get("val_ood"),
        seed=seed,
    )
    tests = torch.cat([read[key].hashes for key in ("test", *sets.ood)])
    return ClassifierOutputs(
        world=world,
        test=outputs["test"],
        ood={key: outputs[key] for key in sets.ood},
        digests={key: digest_of(found.hashes) for key, found in read.items()},
        fingerprints={key: found.fingerprint for key, found in read.items()},
        prototypes=outliers.prototypes,
        head_name=extractor.head,
        early_layer=extractor.early_layer if outliers.mixes else None,
        n_test_in_train=int(torch.isin(tests, read["train"].hashes).sum()),
        cost=cost,
    )


class _Read(NamedTuple):
    outputs: Outputs
    hashes: Tensor
    fingerprint: str


def _read(
    extractor: FeatureExtractor, loader: ImageLoader, store: FeatureStore, key: str, progress: NamedProgress
) -> _Read:
    features: list[Tensor] = []
    logits, hashes, state = [], [], hashlib.sha256()
    for part in stored_extractions(extractor, loader, store, progress=_of(progress, key), description=key):
        bad = ~(part.found.features.isfinite().all(1) & part.found.logits.isfinite().all(1))
        if bool(bad.any()):
            row = sum(map(len, features)) + int(bad.nonzero()[0])
            raise GroodError(
                f"the model's outputs for {loader.dataset.source.paths[loader.kept[row]]} ({key}) are NaN or infinite, "
                "of which no method makes a score; check the image and the weights (half precision may overflow)"
            )
        state.update(part.found.features.contiguous().view(torch.uint8).numpy().data)
        state.update(part.hashes.numpy().data)
        features.append(part.found.features)
        logits.append(part.found.logits)
        hashes.append(part.hashes)
    if not features:
        raise GroodError(f"no image of the set {key!r} can be read; {loader.dataset.source.origin}")
    labels = loader.dataset.source.labels
    kept = None if labels is None else torch.tensor([labels[position] for position in loader.kept])
    if kept is not None:
        state.update(kept.numpy().data)
    images = _Images(extractor, loader, store, key, progress)
    outputs = Outputs(torch.cat(features), torch.cat(logits), kept, images)
    return _Read(outputs, torch.cat(hashes), state.hexdigest())


def _of(progress: NamedProgress, name: str) -> Progress:
    return progress(name) if callable(progress) else progress


def _say_set(key: str, loader: ImageLoader) -> None:
    _log.info("%s: %s images", key, f"{len(loader.dataset):,}")


@contextmanager
def _no_news() -> Iterator[None]:
    """Silence what a second look at the same images would say again."""

    def matters(record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO

    _log.addFilter(matters)
    try:
        yield
    finally:
        _log.removeFilter(matters)


@dataclass(frozen=True)
class _Images:
    """The images of one set; see `ImageAccess`."""

    extractor: FeatureExtractor
    loader: ImageLoader
    store: FeatureStore
    key: str
    progress: NamedProgress

    def scores(self, name: str, score: Callable[[Tensor], Tensor]) -> Tensor:
        """See `ImageAccess`."""
        description = f"{name.partition('-')[0]}: {self.key}"
        with self.extractor.evaluation():
            return stored_scores(
                self.extractor,
                self.loader,
                self.store,
                name,
                score,
                progress=_of(self.progress, description),
                description=description,
            )


def _head_of(extractor: FeatureExtractor, outputs: Outputs) -> Head | None:
    """The last layer, if it gives the logits from the features."""
    assert extractor.head is not None
    module = extractor.model.get_submodule(extractor.head)
    if not isinstance(module, nn.Linear):
        return None
    weight = module.weight.detach().float().cpu()
    bias = torch.zeros(len(weight)) if module.bias is None else module.bias.detach().float().cpu()
    some = outputs.take(torch.arange(min(len(outputs), 256)))
    if weight.shape != (some.logits.shape[1], some.features.shape[1]):
        return None
    logits = some.logits.float()
    difference = (some.features.float() @ weight.T + bias - logits).abs().max()
    return Head(weight, bias) if difference <= _SAME_LOGITS * logits.abs().max().clamp(min=1) else None


def _check_labels(loader: ImageLoader, key: str, n_classes: int) -> None:
    source = loader.dataset.source
    labels = source.labels
    wrong = None
    if labels is None:
        wrong = "no labels"
    elif not 0 <= min(labels) <= max(labels) < n_classes:
        first = next(i for i, label in enumerate(labels) if not 0 <= label < n_classes)
        wrong = f"{labels[first]} for {source.paths[first]}"
    if wrong is not None:
        raise GroodError(
            f"{source.origin}: each image of the ID set {key!r} must have one of the classifier's classes, 0 to "
            f"{n_classes - 1}; got {wrong}. Take a model that was trained on these classes; class folders are numbered "
            "in the order of their names"
        )


def _check_classes(train: ImageLoader, n_classes: int) -> None:
    source = train.dataset.source
    missing = sorted(set(range(n_classes)) - set(source.labels or ()))
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        raise GroodError(
            f"{source.origin}: no training image has label {shown}, and the classifier's classes are 0 to "
            f"{n_classes - 1}. Methods need images of each; add some, or take a classifier of the classes there are"
        )


@contextmanager
def _counting(model: nn.Module, cost: ExtractionCost) -> Iterator[None]:
    """Count the images that the network takes."""

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        cost.network_images += len(inputs[0]) if inputs else 0

    handle = model.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()
