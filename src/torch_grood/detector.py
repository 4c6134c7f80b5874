"""GROOD: GRadient-aware Out-Of-Distribution detection, Algorithms 1 (fit) and 2 (score and decide).

Algorithm 1: class prototypes (eq. 7), an OOD prototype (eq. 8), and the gradients (eq. 5) of the correctly classified
training samples. Algorithm 2: S(x) = min over those x' of ‖∇(x) - ∇(x')‖₂; ID if S(x) ≤ τ, else OOD.
"""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence, Set, Sized
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from torch_grood._batches import as_loader, split_batch
from torch_grood._progress import Progress, track
from torch_grood.errors import GroodError, ModelMismatchError, NotFittedError
from torch_grood.features import Extraction, FeatureExtractor, ModelFingerprint, model_fingerprint
from torch_grood.gradients import PolarGradients
from torch_grood.neighbors import GradientIndex, IndexQuality, StoreOptions, Subset, make_index
from torch_grood.neighbors.store import as_store_options
from torch_grood.outliers import Mixup, OutlierContext, OutlierSource, PrototypeMean, content_keys
from torch_grood.prototypes import ClassPrototypes, Labels, as_labels
from torch_grood.state import GRADIENT_ROWS, FitInfo, FittedState, build_state, with_added, with_removed
from torch_grood.threshold import ConformalThreshold
from torch_grood.training_pass import TrainingPass

__all__ = ["GROOD", "Prediction"]

_log = logging.getLogger("torch_grood")

# A score below this share of its own gradient's length is a training sample, up to the network's float32 rounding.
_SELF_MATCH = 1e-5


class Prediction(NamedTuple):
    """Decisions for n samples; every field is a tensor (n,) on the CPU.

    Attributes:
        score: S(x), float64, higher = more OOD; the paper's units.
        p_value: conformal p-value: under ID, P(p ≤ α) ≤ α.
        is_ood: the decision, p ≤ fpr.
        label: the classifier's class, a position in `GROOD.classes_`; None in features-only use without predictions.
        prototype_label: class of the nearest prototype, a position in `GROOD.classes_`.
        neighbor: the training sample with the nearest gradient, by its position in the training set as it was read.
    """

    score: Tensor
    p_value: Tensor
    is_ood: Tensor
    label: Tensor | None
    prototype_label: Tensor
    neighbor: Tensor


class _Scores(NamedTuple):
    """What Algorithm 2 finds for n samples, before any decision.

    Attributes:
        log_score: log S(x), float64 (n,).
        log_magnitude: log π, float64 (n,).
        neighbor: row of the nearest stored gradient, int64 (n,).
        prototype: row of the nearest class prototype, int64 (n,).
        label: the classifier's class, int64 (n,), if known.
    """

    log_score: Tensor
    log_magnitude: Tensor
    neighbor: Tensor
    prototype: Tensor
    label: Tensor | None


class GROOD:
    """GROOD on a trained classifier, or on features alone.

    >>> detector = GROOD(model).fit(train_loader).calibrate(held_out_loader, fpr=0.05)  # doctest: +SKIP
    >>> detector.predict(images).is_ood  # doctest: +SKIP
    tensor([False,  True])

    Args:
        model: maps images (n, ...) to logits (n, C); it is left bit for bit as it was. None: features only.
        outliers: where the OOD prototype comes from.
        index: "exact", a faiss factory string such as "IVF1024,Flat", or an index object.
        head: name of the module whose input is the penultimate feature; found if None.
        early_layer: name of the module whose output is mixed; found if None.
        seed: of everything random; the same seed gives the same detector, in whatever order the samples come.
        store: how the gradients are kept: "float32", "float16", "int8", or `StoreOptions` with a memory budget.
        subset: which of them are kept: `ClassSample(…)` or `KCenterCoreset(…)`; None: all.

    Attributes:
        classes_: names of the classifier's classes; labels are positions in it.
        class_ids_: positions in it of the classes that take part, int64 (C,).
        class_prototypes_: float64 (C, d).
        ood_prototype_: float64 (d,).
        fit_info_: see `FitInfo`.
        threshold_: see `ConformalThreshold`; None before `calibrate`.
        index_quality_: measured recall of an approximate index; None for exact search.
        metadata: JSON-able, saved with the detector; free for whoever needs more to travel in the file.

    Raises:
        GroodError: for arguments that cannot work.
    """

    def __init__(
        self,
        model: nn.Module | None,
        outliers: OutlierSource | None = None,
        index: str | GradientIndex = "exact",
        head: str | None = None,
        early_layer: str | None = None,
        seed: int = 0,
        store: str | StoreOptions = "float32",
        subset: Subset | None = None,
    ) -> None:
        if model is None and (head is not None or early_layer is not None):
            raise GroodError("head and early_layer name modules of a model, and there is none")
        if outliers is None:
            outliers = Mixup() if model is not None else PrototypeMean()
        if not isinstance(outliers, OutlierSource):
            raise GroodError(f"outliers must be a source such as Mixup() or PrototypeMean(), got {outliers!r}")
        self.model = model
        self.outliers = outliers
        self.index = make_index(index)
        self.head = head
        self.early_layer = early_layer
        self.seed = _checked_seed(seed)
        if subset is not None and not isinstance(subset, Subset):
            raise GroodError(f"subset must be ClassSample(…), KCenterCoreset(…) or None, got {subset!r}")
        self.store = as_store_options(store)
        self.subset = subset
        self.metadata: dict[str, Any] = {}
        self.threshold_: ConformalThreshold | None = None
        self._state: FittedState | None = None
        # Checks the names now, and looks for what is not named at the first batch.
        self._extractor = None if model is None else FeatureExtractor(model, head, early_layer)

    def __repr__(self) -> str:
        model = None if self.model is None else type(self.model).__name__
        state = "not fitted"
        if self._state is not None:
            info = self._state.info
            state = f"fitted on {info.n_samples} samples of {info.n_classes} classes"
            state += ", uses OOD data" if info.uses_ood_data else ""
            state += f", calibrated at fpr={self.threshold_.fpr:g}" if self.threshold_ else ", not calibrated"
        return f"GROOD({model}, outliers={self.outliers!r}, index={self.index.spec!r}, seed={self.seed}; {state})"

    def fit(
        self, loader: Iterable[Any], *, classes: Sequence[int | str] | None = None, progress: Progress = None
    ) -> Self:
        """Fit on the classifier's training set, in one pass; only the penultimate features are kept.

        Args:
            loader: batches (images, labels), with the transform that the classifier is used with, not augmented.
            classes: the classes that take part, by name or position; None: all. Others' samples are left out.
            progress: None: a bar on a terminal; False: silence; or a function that wraps an iterable.

        Raises:
            GroodError: for an empty loader, labels that are missing, out of range or no integers, a class without
                samples, features that are NaN or infinite, images that the model cannot take. The detector is
                unchanged then.
        """
        extractor = self._need_extractor("fit")
        started = time.perf_counter()
        with extractor.evaluation():
            passed = TrainingPass(extractor, self.outliers, self.seed, loader, classes, self.store, self.subset)
            if isinstance(loader, Tensor):
                raise GroodError("fit needs labels; pass a loader of (images, labels) batches, not a tensor of images")
            for batch in track(as_loader(loader), progress, "fit"):
                first = passed.n_samples == 0
                passed.add(*split_batch(batch))
                if first and passed.n_samples:
                    _log.info("%s", passed.memory_statement())
            if passed.n_samples == 0:
                raise GroodError("the loader gave no training sample; check the path and the loader")
            context = OutlierContext(
                class_prototypes=passed.prototypes.means,
                extractor=extractor,
                early_prototypes=passed.early_prototypes.means if passed.early_prototypes else None,
                samples=passed.samples(),
                image_shape=passed.image_shape,
                channel_range=passed.channel_range,
                batch_size=passed.batch_size,
                seed=self.seed,
                progress=progress,
            )
            outlier_features = self.outliers.features(context)
        state = build_state(
            self.index,
            self.seed,
            features=passed.features.drain(),
            labels=torch.cat(passed.rows),
            predictions=torch.cat(passed.predictions),
            sample_ids=torch.cat(passed.sample_ids),
            prototypes=passed.prototypes,
            classes=passed.classes,
            class_ids=passed.class_ids,
            outlier_features=outlier_features,
            source=self.outliers,
            store=self.store,
            subset=self.subset,
            keys=torch.cat(passed.keys) if passed.keys else None,
            progress=progress,
        )
        info = replace(
            state.info,
            n_left_out=passed.n_left_out,
            image_shape=passed.image_shape if passed.one_size else (),
            head=extractor.head,
            early_layer=extractor.early_layer if self.outliers.uses_early_layer else None,
            seconds=time.perf_counter() - started,
        )
        self._adopt(replace(state, info=info, fingerprint=model_fingerprint(extractor.model)))
        return self

    def fit_features(
        self,
        features: Tensor,
        labels: Labels,
        predictions: Labels | None = None,
        *,
        ood_features: Tensor | None = None,
        classes: Sequence[int | str] | None = None,
    ) -> Self:
        """Fit on penultimate features.

        Args:
            features: (n, d), any float dtype.
            labels: one a sample, integers 0 … C - 1, or names.
            predictions: the classifier's classes, as positions in the classes; the gradients of wrongly classified
                samples are not stored. None: all are stored.
            ood_features: (m, d); p_ood is their mean. None: as `outliers` says, which must then be PrototypeMean().
            classes: names of the classes, in the order of the integer labels; None: 0 … the largest label, or the
                sorted names.

        Raises:
            GroodError: as `fit`; or if the outlier source needs a model and ood_features is None.
        """
        started = time.perf_counter()
        features = _as_features(features)
        if isinstance(labels, np.ndarray):
            labels = labels.tolist()
        if classes is None:
            classes = _classes_of(labels, predictions)
        prototypes = ClassPrototypes(classes)
        prototypes.update(features, labels)
        if prototypes.counts.sum() == 0:
            raise GroodError("there is no training sample: features has no row")
        rows = prototypes.rows(labels, len(features))
        predicted = None
        if predictions is not None:
            predicted = _predictions(predictions, features, prototypes.classes)
        if ood_features is None:
            source: OutlierSource = self.outliers
            outlier_features = source.features(OutlierContext(prototypes.means, seed=self.seed))
        else:
            source = _GivenFeatures()
            outlier_features = _as_features(ood_features)
            if len(outlier_features) == 0:
                raise GroodError("ood_features has no row")
            if outlier_features.shape[1] != features.shape[1]:
                raise GroodError(
                    f"ood_features have dimension {outlier_features.shape[1]}, the training features "
                    f"{features.shape[1]}"
                )
        state = build_state(
            self.index,
            self.seed,
            features=torch.split(features, GRADIENT_ROWS),
            labels=rows,
            predictions=predicted,
            sample_ids=torch.arange(len(features)),
            prototypes=prototypes,
            classes=prototypes.classes,
            class_ids=torch.arange(len(prototypes.classes)),
            outlier_features=outlier_features,
            source=source,
            store=self.store,
            subset=self.subset,
            keys=None if self.subset is None else content_keys(features, self.seed),
        )
        self._adopt(replace(state, info=replace(state.info, seconds=time.perf_counter() - started)))
        return self

    def add(self, loader: Iterable[Any], *, progress: Progress = None) -> Self:
        """Store the gradients of more training samples, without a refit: prototypes and classes stay as they are.

        The threshold stays, too: with more stored gradients no score is larger (as far as the index is exact), so that
        the promised false-alarm rate still holds; calibrate again to catch as many outliers as it allows.

        Args:
            loader: batches (images, labels) as for `fit`; their positions go on where those before ended.
            progress: see `fit`.

        Raises:
            GroodError: as `fit`; the detector is unchanged then.
        """
        state, extractor = self._need_state(), self._need_extractor("add")
        if isinstance(loader, Tensor):
            raise GroodError("add needs labels; pass a loader of (images, labels) batches, not a tensor of images")
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        names, position = _named_classes(loader, state.classes)
        with extractor.evaluation():
            for batch in track(as_loader(loader), progress, "add"):
                images, labels = split_batch(batch)
                if len(images):
                    if state.info.image_shape and tuple(images.shape[1:]) != state.info.image_shape:
                        raise _wrong_shape("added", images, state.info.image_shape)
                    try:
                        ids = position[ClassPrototypes(names).rows(labels, len(images))]
                    except GroodError as error:
                        n_done = sum(len(part[1]) for part in parts)
                        raise GroodError(f"in the batch after sample {n_done}: {error}") from None
                    found = extractor(images)
                    parts.append((found.features.cpu(), ids, found.logits.argmax(1).cpu()))
        if not parts:
            raise GroodError("the loader gave no training sample; check the path and the loader")
        return self._add(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def add_features(self, features: Tensor, labels: Labels, predictions: Labels | None = None) -> Self:
        """As `add`, from penultimate features (n, d); labels and predictions as for `fit_features`."""
        state, features = self._need_state(), _as_features(features)
        ids = ClassPrototypes(state.classes).rows(labels, len(features))
        return self._add(
            features, ids, ids if predictions is None else _predictions(predictions, features, state.classes)
        )

    def _add(self, features: Tensor, ids: Tensor, predictions: Tensor) -> Self:
        state = self._need_state()
        taking_part = torch.isin(ids, state.class_ids)
        correct = taking_part & (predictions == ids)
        parts = []
        for start in range(0, max(len(features), 1), GRADIENT_ROWS):
            rows = slice(start, start + GRADIENT_ROWS)
            parts.append(state.gradient_field(features[rows].cpu(), first=start).gradients.take(correct[rows]))
        gradients = PolarGradients(*(torch.cat(field) for field in zip(*parts, strict=True)))
        kept = correct.nonzero().flatten()
        new = with_added(
            state,
            self.seed,
            gradients,
            kept + state.info.n_read,
            n_used=int(taking_part.sum()),
            n_left_out=int((~taking_part).sum()),
            store=self.store,
        )
        self._adopt(new, self.threshold_)
        return self

    def remove(self, sample_ids: Tensor | Sequence[int] | Set[int] | int) -> int:
        """Delete the stored gradients of training samples, as a request for deletion asks; prototypes stay.

        Scores grow, so that a threshold loses its promise: the detector is not calibrated afterwards. The prototypes
        are means that the samples had a part in; to leave no trace of them at all, fit again without them.

        Args:
            sample_ids: positions in the training set as it was read, as `Prediction.neighbor` gives them.

        Returns:
            The number of gradients deleted; samples that were never stored have none.

        Raises:
            GroodError: for a position that does not exist, or if nothing would be left.
        """
        state = self._need_state()
        ids = _sample_ids(sample_ids)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < state.info.n_read:
            raise GroodError(
                f"sample ids are positions from 0 to {state.info.n_read - 1} in the training set, got "
                f"{int(ids.min())} to {int(ids.max())}"
            )
        new = with_removed(state, self.seed, ids, self.store)
        n_removed = state.info.n_indexed - new.info.n_indexed
        if n_removed:
            self._adopt(new)
        return n_removed

    def _adopt(self, state: FittedState, threshold: ConformalThreshold | None = None) -> None:
        self._state, self.threshold_ = state, threshold

    def calibrate(self, held_out: Tensor | Iterable[Any], fpr: float = 0.05, *, progress: Progress = None) -> Self:
        """Choose τ so that at most `fpr` of exchangeable ID inputs are called OOD.

        Args:
            held_out: ID images that the model was not trained on and `fit` has not seen: a tensor, or batches. Images
                labelled with a class that was left out of the fit are not ID, and are passed over.
            fpr: false-alarm rate to promise, in (0, 1), at least 1 / (n + 1) for n held-out samples.
            progress: see `fit`.

        Raises:
            GroodError: for an fpr that cannot be promised, or images that cannot be scored.
        """
        self._calibrate(self._scores(self._taking_part(as_loader(held_out)), progress, "calibrate"), fpr)
        return self

    def _taking_part(self, loader: Iterable[Any]) -> Iterable[Any]:
        """The batches without the images whose label is a class that was left out."""
        state = self._need_state()
        left_out = torch.ones(len(state.classes), dtype=torch.bool)
        left_out[state.class_ids] = False
        if not bool(left_out.any()):
            return loader
        return _Filtered(loader, left_out)

    def calibrate_features(self, features: Tensor, fpr: float = 0.05) -> Self:
        """As `calibrate`, from penultimate features (n, d)."""
        self._calibrate(self._scores_of_features(_as_features(features)), fpr)
        return self

    def _calibrate(self, scores: _Scores, fpr: float) -> None:
        # Exactly 0 for the same features; images in another batch come out of the network a rounding apart.
        n_seen = int((scores.log_score - scores.log_magnitude < math.log(_SELF_MATCH)).sum())
        if n_seen:
            warnings.warn(
                f"{n_seen} of {len(scores.log_score)} calibration samples score practically 0: `fit` has seen them. A "
                "threshold from training samples promises nothing; calibrate on held-out samples.",
                UserWarning,
                stacklevel=3,
            )
        self.threshold_ = ConformalThreshold.fit(scores.log_score, fpr)

    def score(self, images: Tensor | Iterable[Any], *, progress: Progress = None) -> Tensor:
        """S(x): how far the gradient of each image is from all training gradients.

        Args:
            images: a tensor (n, ...), or batches; labels in them are ignored.
            progress: see `fit`.

        Returns:
            float64 (n,), higher = more OOD, in the paper's units.
        """
        return self.log_score(images, progress=progress).exp()

    def log_score(self, images: Tensor | Iterable[Any], *, progress: Progress = None) -> Tensor:
        """Log S(x), float64 (n,): the same order, and no underflow for features of large scale."""
        return self._scores(images, progress, "score").log_score

    def score_features(self, features: Tensor) -> Tensor:
        """As `score`, from penultimate features (n, d)."""
        return self.log_score_features(features).exp()

    def log_score_features(self, features: Tensor) -> Tensor:
        """As `log_score`, from penultimate features (n, d)."""
        return self._scores_of_features(_as_features(features)).log_score

    def predict(self, images: Tensor | Iterable[Any], *, progress: Progress = None) -> Prediction:
        """Score, p-value, decision and labels of each image.

        Args:
            images: a tensor (n, ...), or batches; labels in them are ignored.
            progress: see `fit`.

        Raises:
            NotFittedError: before `calibrate`; `score` works without.
        """
        self._need_threshold()
        return self._prediction(self._scores(images, progress, "predict"))

    def predict_features(self, features: Tensor, predictions: Tensor | Sequence[int] | None = None) -> Prediction:
        """As `predict`, from penultimate features (n, d) and, if known, the classifier's classes (n,)."""
        self._need_threshold()
        features = _as_features(features)
        label = None if predictions is None else as_labels(predictions, len(features))
        return self._prediction(self._scores_of_features(features)._replace(label=label))

    def _prediction(self, scores: _Scores) -> Prediction:
        state, threshold = self._need_state(), self._need_threshold()
        return Prediction(
            score=scores.log_score.exp(),
            p_value=threshold.p_values(scores.log_score),
            is_ood=threshold.is_ood(scores.log_score),
            label=scores.label,
            prototype_label=state.class_ids[scores.prototype],
            neighbor=state.sample_ids[scores.neighbor],
        )

    def extract(self, images: Tensor | Iterable[Any], *, progress: Progress = None) -> Extraction:
        """Penultimate features, logits and labels (if the batches have them) of a whole data set, on the CPU.

        Args:
            images: a tensor (n, ...), or batches.
            progress: see `fit`.
        """
        extractor = self._need_extractor("extract")
        labels: list[Tensor | None] = []
        parts: list[Extraction] = []
        with extractor.evaluation():
            for batch in track(as_loader(images), progress, "extract"):
                batch_images, batch_labels = split_batch(batch)
                if len(batch_images):
                    found = extractor(batch_images)
                    parts.append(Extraction(found.features.cpu(), found.logits.cpu()))
                    labels.append(None if batch_labels is None else as_labels(batch_labels, len(batch_images)))
        if not parts:
            raise GroodError("the loader gave no image; check the path and the loader")
        known = [label for label in labels if label is not None]
        return Extraction(
            torch.cat([part.features for part in parts]),
            torch.cat([part.logits for part in parts]),
            torch.cat(known) if len(known) == len(parts) else None,
        )

    def _scores(self, images: Tensor | Iterable[Any], progress: Progress, description: str) -> _Scores:
        """Algorithm 2 for all images of a tensor or loader."""
        expected = self._need_state().info.image_shape
        extractor = self._need_extractor(description)
        parts: list[_Scores] = []
        done = 0
        with extractor.evaluation():
            for batch in track(as_loader(images), progress, description):
                batch_images, _ = split_batch(batch)
                if len(batch_images) == 0:
                    continue
                if expected and tuple(batch_images.shape[1:]) != expected:
                    raise _wrong_shape("scored", batch_images, expected)
                found = extractor(batch_images)
                scores = self._scores_of_features(found.features, first=done)
                parts.append(scores._replace(label=found.logits.argmax(1).cpu()))
                done += len(batch_images)
        if not parts:
            raise GroodError(f"there is no image to {description}; check the path and the loader")
        return _Scores(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def _scores_of_features(self, features: Tensor, first: int = 0) -> _Scores:
        """Algorithm 2 for features (n, d), of which `first` others came before."""
        state = self._need_state()
        parts: list[_Scores] = []
        for start in range(0, max(len(features), 1), GRADIENT_ROWS):
            part = features[start : start + GRADIENT_ROWS].cpu()
            gradients, nearest = state.gradient_field(part, first=first + start)
            neighbors = state.searcher.search(gradients)
            log_distance, row = neighbors.log_distance.flatten().cpu(), neighbors.row.flatten().cpu()
            parts.append(_Scores(log_distance, gradients.log_magnitude.cpu(), row, nearest.cpu(), None))
        log_score, log_magnitude, row, nearest = (torch.cat(field) for field in list(zip(*parts, strict=True))[:4])
        return _Scores(log_score, log_magnitude, row, nearest, None)

    @property
    def classes_(self) -> tuple[int | str, ...]:
        """Names of the classifier's classes; labels are positions in it."""
        return self._need_state().classes

    @property
    def class_ids_(self) -> Tensor:
        """Position in `classes_` of each class that takes part, int64 (C,)."""
        return self._need_state().class_ids

    @property
    def class_prototypes_(self) -> Tensor:
        """eq. 7, float64 (C, d)."""
        return self._need_state().class_prototypes

    @property
    def ood_prototype_(self) -> Tensor:
        """eq. 8, float64 (d,)."""
        return self._need_state().ood_prototype

    @property
    def fit_info_(self) -> FitInfo:
        """See `FitInfo`."""
        return self._need_state().info

    @property
    def stored_bytes_(self) -> int:
        """Bytes that the stored gradients take, in memory or on disk."""
        return self._need_state().searcher.gradients.nbytes

    @property
    def index_quality_(self) -> IndexQuality | None:
        """Measured recall of an approximate index; None for exact search."""
        return self._need_state().searcher.quality

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted detector to one file, atomically: see `torch_grood.storage`."""
        from torch_grood import storage

        storage.save(Path(path), self, self._need_state())

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> Self:
        """Read a detector.

        Args:
            path: a file that `save` wrote.
            model: the model that it was fitted on; None: for use on features alone.

        Raises:
            FormatError: if the file is truncated, altered, of a newer format, or no detector file.
            ModelMismatchError: if the model is not the one that the detector was fitted on.
        """
        from torch_grood import storage

        stored = storage.load(Path(path))
        info = stored.state.info
        detector = cls(
            model,
            outliers=stored.outliers,
            index=stored.index,
            head=None if model is None else _existing(model, info.head),
            early_layer=None if model is None else _existing(model, info.early_layer),
            seed=stored.seed,
            store=stored.state.searcher.gradients.dtype,
            subset=stored.subset,
        )
        if model is not None:
            _check_model(model, stored.state.fingerprint, path)
        detector.metadata = stored.metadata
        detector._adopt(stored.state, stored.threshold)
        return detector

    def _need_state(self) -> FittedState:
        if self._state is None:
            raise NotFittedError(
                "this detector is not fitted; call fit(loader) or fit_features(features, labels) first"
            )
        return self._state

    def _need_threshold(self) -> ConformalThreshold:
        self._need_state()
        if self.threshold_ is None:
            raise NotFittedError(
                "this detector is not calibrated, so it cannot decide; call calibrate(held_out, fpr=0.05) first, "
                "or use score(), which needs no threshold"
            )
        return self.threshold_

    def _need_extractor(self, what: str) -> FeatureExtractor:
        if self._extractor is None:
            raise GroodError(
                f"this detector has no model; use the method for features ({what}_features), or GROOD(model)"
            )
        return self._extractor


def _predictions(predictions: Labels, features: Tensor, classes: Sequence[int | str]) -> Tensor:
    """The classifier's classes of features, as positions in `classes`."""
    found = as_labels(predictions, len(features))
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < len(classes):
        raise GroodError(
            f"predictions must be positions among the {len(classes)} classes, got "
            f"{int(found.min())} to {int(found.max())}"
        )
    return found


def _sample_ids(given: Any) -> Tensor:
    try:
        ids = torch.as_tensor(sorted(given) if isinstance(given, (set, frozenset)) else given).flatten()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        ids = torch.empty(0, dtype=torch.bool)
    if ids.dtype == torch.bool or (ids.is_floating_point() and len(ids)) or ids.is_complex():
        raise GroodError(f"sample ids must be integers, positions in the training set; got {given!r}"[:300])
    return ids.long()


def _wrong_shape(what: str, images: Tensor, expected: tuple[int, ...]) -> GroodError:
    return GroodError(
        f"images of shape {tuple(images.shape[1:])} cannot be {what}: the detector was fitted on images of shape "
        f"{expected}. Apply the same transform to all."
    )


def _named_classes(loader: Iterable[Any], classes: tuple[int | str, ...]) -> tuple[Sequence[int | str], Tensor]:
    """The classes that the loader's data set names, else all, and their positions in `classes`.

    Raises:
        GroodError: if a name is none of the classes.
    """
    names = getattr(getattr(loader, "dataset", None), "classes", None)
    if not names or (classes == tuple(range(len(classes))) and len(names) == len(classes)):
        return classes, torch.arange(len(classes))
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise GroodError(
            f"the data have a class {unknown[0]!r}, which is none of the detector's {len(classes)} classes "
            f"({', '.join(map(str, classes[:5]))}, …)"
        )
    return names, torch.tensor([classes.index(name) for name in names])


class _Filtered:
    """A loader's batches without the images of some classes; batches without integer labels stay whole."""

    def __init__(self, loader: Iterable[Any], left_out: Tensor) -> None:
        self._loader = loader
        self._left_out = left_out

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._loader:
            images, labels = split_batch(batch)
            if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.shape == images.shape[:1]:
                known = (labels >= 0) & (labels < len(self._left_out))
                images = images[
                    ~(known & self._left_out[labels.clamp(0, len(self._left_out) - 1).cpu()].to(known.device))
                ]
            yield images


@dataclass(frozen=True)
class _GivenFeatures(OutlierSource):
    """Features that the caller passed as ood_features: whether real or synthetic, only the caller knows."""

    uses_ood_data = True

    def features(self, context: OutlierContext) -> Tensor:
        raise GroodError("pass ood_features=… again to fit another time")

    def config(self) -> dict[str, Any]:
        return {"name": "ood_features"}


def _checked_seed(seed: Any) -> int:
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= int(seed) < 2**63:
        raise GroodError(f"seed must be an integer from 0 to 2^63 - 1, got {seed!r}")
    return int(seed)


def _as_features(features: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(features).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise GroodError(f"expected features (n, d) of a float dtype, got {type(features).__name__}: {error}") from None
    if tensor.ndim != 2 or not tensor.is_floating_point():
        raise GroodError(f"expected features (n, d) of a float dtype, got {tuple(tensor.shape)} of {tensor.dtype}")
    return tensor


def _classes_of(labels: Any, predictions: Any) -> Sequence[int | str]:
    """Classes from the labels: the sorted names, or 0 … the largest integer in use."""
    if isinstance(labels, Sequence) and any(isinstance(label, str) for label in labels):
        return sorted({str(label) for label in labels})
    largest = -1
    for positions in (labels, predictions):
        if positions is not None and isinstance(positions, Sized) and len(positions):
            largest = max(largest, int(as_labels(positions, len(positions)).max()))
    return range(max(largest + 1, 1))


def _existing(model: nn.Module, name: str | None) -> str | None:
    """The stored name of a layer, if the model has it; a model that lacks it fails the comparison of fingerprints."""
    from torch_grood.features import unwrap

    return name if name in dict(unwrap(model).named_modules()) else None


def _check_model(model: nn.Module, expected: ModelFingerprint | None, path: str | os.PathLike[str]) -> None:
    if expected is None:
        raise ModelMismatchError(f"{path} was fitted on features, without a model; load it with GROOD.load(path)")
    actual = model_fingerprint(model)
    if actual.architecture != expected.architecture:
        raise ModelMismatchError(
            f"{path} was fitted on another model: the names, shapes or dtypes of the weights differ. "
            "Pass the model that it was fitted on, in the same precision."
        )
    if actual.weights != expected.weights:
        raise ModelMismatchError(
            f"{path} was fitted on the same architecture with other weights; load the weights that it was fitted on, "
            "or fit again"
        )
