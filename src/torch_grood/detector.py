"""GROOD: GRadient-aware Out-Of-Distribution detection, Algorithms 1 (fit) and 2 (score and decide).

Algorithm 1: class prototypes (eq. 7), an OOD prototype (eq. 8), and the gradients (eq. 5) of the correctly classified
training samples. Algorithm 2: S(x) = min over those x' of ‖∇(x) - ∇(x')‖₂; ID if S(x) ≤ τ, else OOD.

`GROOD.paper(model)` is that. `GROOD(model)` by itself takes the OOD prototype, the geometry and the mean over the k
nearest gradients of docs/research/ood-prototype.md, which says how they were chosen and what they gain.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Set, Sized
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from torch_grood._batches import as_loader, split_batch
from torch_grood._progress import Progress, track
from torch_grood.errors import GroodError, ModelMismatchError, NotFittedError
from torch_grood.explanation import Explanation, explain
from torch_grood.feature_store import FeatureStore
from torch_grood.features import Extraction, FeatureExtractor, ModelFingerprint, model_fingerprint, unwrap
from torch_grood.geometry import SquareSum, checked_geometry, placed
from torch_grood.gradients import PolarGradients
from torch_grood.neighbors import (
    GradientIndex,
    GradientSearcher,
    IndexQuality,
    StoreOptions,
    Subset,
    log_mean,
    make_index,
)
from torch_grood.neighbors.sharded import MergedSearcher, ShardFiles
from torch_grood.neighbors.store import as_store_options
from torch_grood.outliers import (
    HighEnergy,
    HighestEnergy,
    Mixup,
    OutlierContext,
    OutlierSource,
    PrototypeMean,
    ScoreSettings,
    content_keys,
)
from torch_grood.prototypes import ClassPrototypes, Labels, as_labels
from torch_grood.provenance import CalibrationRecord, Names, TrainingRecord, content_hashes, digest_of, names_of
from torch_grood.state import GRADIENT_ROWS, FitInfo, FittedState, build_state, with_added, with_removed
from torch_grood.stored_pass import stored_extractions
from torch_grood.threshold import ConformalThreshold, benjamini_hochberg
from torch_grood.training_pass import TrainingPass

__all__ = ["GROOD", "Assessment", "Prediction"]

_log = logging.getLogger("torch_grood")

# A score below this share of its own gradient's length is a training sample, up to the network's float32 rounding.
_SELF_MATCH = 1e-5

OnTraining = Literal["raise", "drop"]
_Decision = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


class Assessment(NamedTuple):
    """What is known of n samples without a threshold; fields as in `Prediction`."""

    score: Tensor
    label: Tensor | None
    prototype_label: Tensor
    neighbor: Tensor


class Prediction(NamedTuple):
    """Decisions for n samples; every field is a tensor (n,) on the CPU.

    Attributes:
        score: S(x), float64, higher = more OOD; in units of ‖∇‖₂ ≤ 1.
        p_value: conformal p-value: under ID, P(p ≤ α) ≤ α; None with a τ of the caller's on a detector that is not
            calibrated.
        is_ood: the decision, p ≤ fpr.
        label: the classifier's class, a position in `GROOD.classes_`; None in features-only use without predictions.
        prototype_label: class of the nearest prototype, a position in `GROOD.classes_`.
        neighbor: the training sample with the nearest gradient, by its position in the training set as it was read.
    """

    score: Tensor
    p_value: Tensor | None
    is_ood: Tensor
    label: Tensor | None
    prototype_label: Tensor
    neighbor: Tensor


class _Scores(NamedTuple):
    """What Algorithm 2 finds for n samples, before any decision.

    Attributes:
        log_score: log S(x), float64 (n,).
        log_nearest: log of the distance to the nearest stored gradient, float64 (n,).
        log_magnitude: log π, float64 (n,).
        neighbor: row of the nearest stored gradient, int64 (n,).
        prototype: row of the nearest class prototype, int64 (n,).
        label: the classifier's class, int64 (n,), if known.
        content: hashes of the samples, int64 (n,), if they are wanted.
    """

    log_score: Tensor
    log_nearest: Tensor
    log_magnitude: Tensor
    neighbor: Tensor
    prototype: Tensor
    label: Tensor | None = None
    content: Tensor | None = None


class _Learned(NamedTuple):
    """All that a detector learns, in one: who scores meanwhile sees the old or the new, not some of each."""

    state: FittedState | None = None
    threshold: ConformalThreshold | None = None
    calibration: CalibrationRecord | None = None


class GROOD:
    """GROOD on a trained classifier, or on features alone.

    >>> detector = GROOD(model).fit(train_loader).calibrate(held_out_loader, fpr=0.05)  # doctest: +SKIP
    >>> detector.predict(images).is_ood  # doctest: +SKIP
    tensor([False,  True])

    Args:
        model: maps images (n, ...) to logits (n, C); it is left bit for bit as it was. None: features only.
        outliers: where the OOD prototype comes from. None: `HighEnergy()`, and `PrototypeMean()` without a model.
        index: "exact", a faiss factory string such as "IVF1024,Flat", or an index object.
        head: name of the module whose input is the penultimate feature; found if None.
        early_layer: name of the module whose output is mixed; found if None.
        seed: of everything random; the same seed gives the same detector, with exact search in whatever order the
            samples come.
        store: how the gradients are kept: "float32", "float16", "int8", or `StoreOptions` with a memory budget.
        subset: which of them are kept: `ClassSample(…)` or `KCenterCoreset(…)`; None: all.
        geometry: where distances are taken: "raw", between the features as they are; "unit", divided by their length;
            "half", by its square root. None: what the source of outliers was studied with, else the paper's "raw".
        temperature: T of the softmax over distances; None: 1 for "raw", else the root mean square distance of the
            training features from the prototype of their class.
        k: the score is the mean distance to the k nearest stored gradients; None: 10 for `HighEnergy`, else the
            paper's 1.

    Attributes:
        classes_: names of the classifier's classes; labels are positions in it.
        class_ids_: positions in it of the classes that take part, int64 (C,).
        class_prototypes_: float64 (C, d).
        ood_prototype_: float64 (d,).
        fit_info_: see `FitInfo`.
        threshold_: see `ConformalThreshold`; None before `calibrate`.
        calibration_: see `CalibrationRecord`; None before `calibrate`.
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
        geometry: str | None = None,
        temperature: float | None = None,
        k: int | None = None,
    ) -> None:
        if model is None and (head is not None or early_layer is not None):
            raise GroodError("head and early_layer name modules of a model, and there is none")
        if outliers is None:
            outliers = HighEnergy() if model is not None else PrototypeMean()
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
        self.geometry = None if geometry is None else checked_geometry(geometry)
        self.temperature = temperature
        self.k = k
        _settings(outliers.settings, geometry, temperature, k)
        self.metadata: dict[str, Any] = {}
        self._learned = _Learned()
        # Checks the names now, and looks for what is not named at the first batch.
        self._extractor = None if model is None else FeatureExtractor(model, head, early_layer)

    @classmethod
    def paper(cls, model: nn.Module | None, **options: Any) -> Self:
        """GROOD as the paper has it: `Mixup`, features as they are, T = 1, the one nearest gradient.

        Args:
            model: see `GROOD`.
            options: of `GROOD`, which come before the paper's; `outliers=Mixup(lam=…)` for another λ.
        """
        if model is not None:
            options.setdefault("outliers", Mixup())
        paper: dict[str, Any] = {"geometry": "raw", "temperature": 1.0, "k": 1}
        return cls(model, **{**paper, **options})

    @property
    def settings(self) -> ScoreSettings:
        """How `fit` is to make scores: what the source of outliers was studied with, but for what the caller named."""
        return _settings(self.outliers.settings, self.geometry, self.temperature, self.k)

    def __repr__(self) -> str:
        model = None if self.model is None else type(self.model).__name__
        state = "not fitted"
        if self._learned.state is not None:
            info = self._learned.state.info
            state = f"fitted on {info.n_samples} samples of {info.n_classes} classes"
            state += ", uses OOD data" if info.uses_ood_data else ""
            state += f", calibrated at fpr={self.threshold_.fpr:g}" if self.threshold_ else ", not calibrated"
        return f"GROOD({model}, outliers={self.outliers!r}, index={self.index.spec!r}, seed={self.seed}; {state})"

    def fit(
        self,
        loader: Iterable[Any],
        *,
        classes: Sequence[int | str] | None = None,
        progress: Progress = None,
        cache: FeatureStore | None = None,
    ) -> Self:
        """Fit on the classifier's training set, in one pass; only the penultimate features are kept.

        Args:
            loader: batches (images, labels), with the transform that the classifier is used with, not augmented.
            classes: the classes that take part, by name or position; None: all. Others' samples are left out.
            progress: None: a bar on a terminal; False: silence; or a function that wraps an iterable.
            cache: where features are kept under way, a `torch_grood.data.FeatureCache`: a fit that was interrupted, or
                another one on the same images, computes only what is not there. The detector is the same with it.

        Raises:
            GroodError: for an empty loader, labels that are missing, out of range or no integers, a class without
                samples, features that are NaN or infinite, images that the model cannot take. The detector is
                unchanged then.
        """
        extractor = self._need_extractor("fit")
        with extractor.evaluation():
            passed = TrainingPass(
                extractor, self.outliers, self.seed, loader, classes, self.store, self.subset, self.settings.geometry
            )
            if isinstance(loader, Tensor):
                raise GroodError("fit needs labels; pass a loader of (images, labels) batches, not a tensor of images")
            passed.run(loader, progress, cache)
            if passed.n_samples == 0:
                raise GroodError("the loader gave no training sample; check the path and the loader")
            outlier_features = self.outliers.features(passed.outlier_context(passed.samples(), progress))
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
            settings=self.settings,
            squares=passed.squares,
        )
        self._adopt(passed.completed(state, loader))
        return self

    def fit_features(
        self,
        features: Tensor,
        labels: Labels,
        predictions: Labels | None = None,
        *,
        ood_features: Tensor | None = None,
        logits: Tensor | None = None,
        classes: Sequence[int | str] | None = None,
    ) -> Self:
        """Fit on penultimate features.

        Args:
            features: (n, d), any float dtype.
            labels: one a sample, integers 0 … C - 1, or names.
            predictions: the classifier's classes, as positions in the classes; the gradients of wrongly classified
                samples are not stored. None: all are stored.
            ood_features: (m, d); p_ood is their mean. None: as `outliers` says, which must then be PrototypeMean(), or
                HighEnergy() with logits.
            logits: (n, C), from which HighEnergy() takes the samples that the classifier knows least of; and
                predictions, where these are None.
            classes: names of the classes, in the order of the integer labels; None: 0 … the largest label, or the
                sorted names.

        Raises:
            GroodError: as `fit`; or if the outlier source needs a model and ood_features is None.
        """
        features = _as_features(features)
        if isinstance(labels, np.ndarray):
            labels = labels.tolist()
        if classes is None:
            classes = _classes_of(labels, predictions)
        prototypes = ClassPrototypes(classes)
        in_place, squares = placed(features, self.settings.geometry), SquareSum()
        prototypes.update(in_place, labels)
        squares.update(in_place)
        if prototypes.counts.sum() == 0:
            raise GroodError("there is no training sample: features has no row")
        rows = prototypes.rows(labels, len(features))
        uncertain, predicted = None, None
        if logits is not None:
            logits = _as_logits(logits, len(features), len(prototypes.classes))
            sample = HighestEnergy(self.outliers.n_uncertain(len(features)))
            sample.offer(features, logits)
            uncertain = sample.features(len(features))
            predictions = logits.argmax(1) if predictions is None else predictions
        if predictions is not None:
            predicted = _predictions(predictions, features, prototypes.classes)
        if ood_features is None:
            source: OutlierSource = self.outliers
            outlier_features = source.features(OutlierContext(prototypes.means, seed=self.seed, uncertain=uncertain))
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
            settings=self.settings,
            squares=squares,
        )
        self._adopt(replace(state, training=TrainingRecord(content_hashes(features))))
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
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        names, position = _named_classes(loader, state.classes)
        with extractor.evaluation():
            for batch in track(as_loader(loader), progress, "add"):
                images, labels = split_batch(batch)
                if len(images):
                    if state.info.image_shape and tuple(images.shape[1:]) != state.info.image_shape:
                        raise _wrong_shape("added", images.shape[1:], state.info.image_shape)
                    try:
                        ids = position[ClassPrototypes(names).rows(labels, len(images))]
                    except GroodError as error:
                        n_done = sum(len(part[1]) for part in parts)
                        raise GroodError(f"in the batch after sample {n_done}: {error}") from None
                    found = extractor(images)
                    parts.append((found.features.cpu(), ids, found.logits.argmax(1).cpu(), content_hashes(images)))
        if not parts:
            raise GroodError("the loader gave no training sample; check the path and the loader")
        features, ids, predictions, hashes = (torch.cat(field) for field in zip(*parts, strict=True))
        return self._add(features, ids, predictions, TrainingRecord(hashes, names_of(loader, len(hashes))))

    def add_features(self, features: Tensor, labels: Labels, predictions: Labels | None = None) -> Self:
        """As `add`, from penultimate features (n, d); labels and predictions as for `fit_features`."""
        state, features = self._need_state(), _as_features(features)
        ids = ClassPrototypes(state.classes).rows(labels, len(features))
        predicted = ids if predictions is None else _predictions(predictions, features, state.classes)
        return self._add(features, ids, predicted, TrainingRecord(content_hashes(features)))

    def _add(self, features: Tensor, ids: Tensor, predictions: Tensor, record: TrainingRecord) -> Self:
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
            record=record.without((~taking_part).nonzero().flatten()),
        )
        self._adopt(new, self.threshold_, self.calibration_)
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
        _check_ids(ids, state.info.n_read)
        new = with_removed(state, self.seed, ids, self.store)
        n_removed = state.info.n_indexed - new.info.n_indexed
        if n_removed:
            self._adopt(new)
        else:
            self._adopt(new, self.threshold_, self.calibration_)
        return n_removed

    def _adopt(
        self,
        state: FittedState,
        threshold: ConformalThreshold | None = None,
        calibration: CalibrationRecord | None = None,
    ) -> None:
        self._learned = _Learned(state, threshold, calibration)

    def calibrate(
        self,
        held_out: Tensor | Iterable[Any],
        fpr: float = 0.05,
        *,
        per_class: bool = False,
        on_training: OnTraining = "raise",
        progress: Progress = None,
        cache: FeatureStore | None = None,
    ) -> Self:
        """Choose τ so that at most `fpr` of exchangeable ID inputs are called OOD.

        Args:
            held_out: ID images that the model was not trained on and `fit` has not seen: a tensor, or batches. Images
                labelled with a class that was left out of the fit are not ID, and are passed over.
            fpr: false-alarm rate to promise, in (0, 1), at least 1 / (n + 1) for n held-out samples.
            per_class: keep the promise for the images nearest to each class prototype by themselves, by a threshold
                for each class; it needs as many images for each class as else for all.
            on_training: what to do with training samples among the held-out ones, which are known by their content
                and by a score of 0: "raise" an error, or "drop" them.
            progress: see `fit`.
            cache: see `fit`.

        Raises:
            GroodError: for an fpr that cannot be promised, images that cannot be scored, or training samples.
        """
        _check_on_training(on_training)
        state = self._need_state()
        images = held_out if cache is not None else _taking_part(as_loader(held_out), state)
        scores = self._scores(state, images, progress, "calibrate", hashed=True, cache=cache)
        names = None if isinstance(held_out, Tensor) else names_of(held_out, len(scores.log_score))
        self._calibrate(state, scores, fpr, per_class, on_training, names)
        return self

    def calibrate_features(
        self, features: Tensor, fpr: float = 0.05, *, per_class: bool = False, on_training: OnTraining = "raise"
    ) -> Self:
        """As `calibrate`, from penultimate features (n, d)."""
        _check_on_training(on_training)
        state, features = self._need_state(), _as_features(features)
        scores = _scores_of_features(state, features)._replace(content=content_hashes(features))
        self._calibrate(state, scores, fpr, per_class, on_training)
        return self

    def _calibrate(
        self,
        state: FittedState,
        scores: _Scores,
        fpr: float,
        per_class: bool,
        on_training: OnTraining,
        names: Names | None = None,
    ) -> None:
        content = scores.content
        assert content is not None
        # Exactly 0 for the same features; images in another batch come out of the network a rounding apart.
        seen = scores.log_nearest - scores.log_magnitude < math.log(_SELF_MATCH)
        if state.training is not None:
            seen |= state.training.contains(content)
        n_seen = int(seen.sum())
        if n_seen and on_training == "raise":
            first = seen.nonzero().flatten().tolist()[:5]
            shown = [(names and names[position]) or f"sample {position}" for position in first]
            raise GroodError(
                f"{n_seen} of {len(seen)} calibration samples are training samples ({', '.join(shown)}"
                f"{', …' if n_seen > len(shown) else ''}), and a threshold that rests on these promises nothing. "
                "Calibrate on held-out samples, or leave these out: on_training='drop' (--drop-training)."
            )
        if n_seen:
            _log.info("left out %d of %d calibration samples, which are training samples", n_seen, len(seen))
        kept = ~seen
        groups = None
        if per_class:
            groups = state.class_ids[scores.prototype[kept]]
            absent = [_class_name(state, group) for group in state.class_ids.tolist() if group not in groups]
            if absent:
                raise GroodError(
                    f"no calibration sample is taken for {', '.join(absent[:5])}{', …' if len(absent) > 5 else ''}, and"
                    " nothing can be promised for a class without any. Pass held-out samples of all classes, or use "
                    "one threshold for all classes."
                )
        threshold = ConformalThreshold.fit(scores.log_score[kept], fpr, groups, describe=partial(_class_name, state))
        if self._learned.state is not state:
            raise GroodError("the detector was fitted anew while it was calibrated; calibrate again")
        self._adopt(state, threshold, CalibrationRecord(int(kept.sum()), n_seen, digest_of(content[kept])))

    def score(self, images: Tensor | Iterable[Any], *, progress: Progress = None) -> Tensor:
        """S(x): how far the gradient of each image is from the nearest training gradients.

        Args:
            images: a tensor (n, ...), or batches; labels in them are ignored.
            progress: see `fit`.

        Returns:
            float64 (n,), higher = more OOD, in units of ‖∇‖₂ ≤ 1.
        """
        return self.log_score(images, progress=progress).exp()

    def log_score(self, images: Tensor | Iterable[Any], *, progress: Progress = None) -> Tensor:
        """Log S(x), float64 (n,): the same order, and no underflow for features of large scale."""
        return self._scores(self._need_state(), images, progress, "score").log_score

    def score_features(self, features: Tensor) -> Tensor:
        """As `score`, from penultimate features (n, d)."""
        return self.log_score_features(features).exp()

    def log_score_features(self, features: Tensor) -> Tensor:
        """As `log_score`, from penultimate features (n, d)."""
        return _scores_of_features(self._need_state(), _as_features(features)).log_score

    def assess(self, images: Tensor | Iterable[Any], *, progress: Progress = None) -> Assessment:
        """Score, labels and neighbour of each image, without a decision: it needs no calibration."""
        state = self._need_state()
        return _assessment(state, self._scores(state, images, progress, "assess"))

    def assess_features(self, features: Tensor, predictions: Tensor | Sequence[int] | None = None) -> Assessment:
        """As `assess`, from penultimate features (n, d) and, if known, the classifier's classes (n,)."""
        state, features = self._need_state(), _as_features(features)
        label = None if predictions is None else as_labels(predictions, len(features))
        return _assessment(state, _scores_of_features(state, features)._replace(label=label))

    def predict(
        self,
        images: Tensor | Iterable[Any],
        *,
        fpr: float | None = None,
        tau: float | None = None,
        fdr: float | None = None,
        progress: Progress = None,
    ) -> Prediction:
        """Score, p-value, decision and labels of each image.

        Args:
            images: a tensor (n, ...), or batches; labels in them are ignored.
            fpr: another false-alarm rate than that of `calibrate`, promised by the same calibration.
            tau: the caller's own τ instead, in the units of the score: is_ood is S(x) > τ, and nothing is promised.
            fdr: decide about all images together instead: of those flagged, at most this share are ID in expectation
                (`benjamini_hochberg`).
            progress: see `fit`.

        Raises:
            NotFittedError: before `calibrate`, unless τ is given.
            GroodError: if more than one of fpr, tau and fdr is given, or one is out of range or cannot be promised.
        """
        learned = self._learned
        state = self._need_state(learned)
        decide = _decision(state, learned.threshold, fpr, tau, fdr)
        return _prediction(state, learned.threshold, self._scores(state, images, progress, "predict"), decide)

    def predict_features(
        self,
        features: Tensor,
        predictions: Tensor | Sequence[int] | None = None,
        *,
        fpr: float | None = None,
        tau: float | None = None,
        fdr: float | None = None,
    ) -> Prediction:
        """As `predict`, from penultimate features (n, d) and, if known, the classifier's classes (n,)."""
        learned = self._learned
        state = self._need_state(learned)
        decide = _decision(state, learned.threshold, fpr, tau, fdr)
        features = _as_features(features)
        label = None if predictions is None else as_labels(predictions, len(features))
        scores = _scores_of_features(state, features)._replace(label=label)
        return _prediction(state, learned.threshold, scores, decide)

    def explain(
        self, images: Tensor | Iterable[Any], k: int = 5, n_prototypes: int = 5, *, progress: Progress = None
    ) -> Explanation:
        """Why each image scores as it does: see `Explanation`.

        Args:
            images: a tensor (n, ...), or batches; labels in them are ignored.
            k: training samples with the nearest gradients; fewer if fewer are stored.
            n_prototypes: nearest class prototypes; fewer if there are fewer classes.
            progress: see `fit`.
        """
        state = self._need_state()
        with closing(self._extracted(state, images, progress, "explain")) as batches:
            parts = [explain(state, found.features, k, n_prototypes) for found, _ in batches]
        return Explanation(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def explain_features(self, features: Tensor, k: int = 5, n_prototypes: int = 5) -> Explanation:
        """As `explain`, from penultimate features (n, d)."""
        return explain(self._need_state(), _as_features(features), k, n_prototypes)

    def sample_names(self, sample_ids: Tensor | Sequence[int]) -> list[str | None]:
        """Names of training samples, where the loader told them: paths as they were given, None for others.

        Args:
            sample_ids: positions in the training set, as in `Prediction.neighbor`.

        Raises:
            GroodError: for a position that does not exist.
        """
        state, ids = self._need_state(), _sample_ids(sample_ids)
        _check_ids(ids, state.info.n_read)
        names = None if state.training is None else state.training.names
        return [None if names is None else names[position] for position in ids.tolist()]

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

    def _scores(
        self,
        state: FittedState,
        images: Tensor | Iterable[Any],
        progress: Progress,
        description: str,
        *,
        hashed: bool = False,
        cache: FeatureStore | None = None,
    ) -> _Scores:
        """Algorithm 2 for all images of a tensor or loader; with a cache, without those of classes left out."""
        parts: list[_Scores] = []
        done = 0
        if cache is None:
            extracted = self._extracted(state, images, progress, description, hashed=hashed)
        else:
            extracted = self._stored(state, images, progress, description, cache)
        with closing(extracted) as batches:
            for found, content in batches:
                scores = _scores_of_features(state, found.features, first=done)
                parts.append(scores._replace(label=found.logits.argmax(1).cpu(), content=content))
                done += len(found.features)
        return _joined(parts)

    def _extracted(
        self,
        state: FittedState,
        images: Tensor | Iterable[Any],
        progress: Progress,
        description: str,
        *,
        hashed: bool = False,
    ) -> Generator[tuple[Extraction, Tensor | None]]:
        """Features and logits batch by batch, with the images' hashes if they are wanted; to be closed after use.

        Raises:
            GroodError: for images of another shape than the training images', or no image at all.
        """
        expected, extractor = state.info.image_shape, self._need_extractor(description)
        done = 0
        with extractor.evaluation():
            for batch in track(as_loader(images), progress, description):
                batch_images, _ = split_batch(batch)
                if len(batch_images) == 0:
                    continue
                if expected and tuple(batch_images.shape[1:]) != expected:
                    raise _wrong_shape("scored", batch_images.shape[1:], expected)
                done += len(batch_images)
                yield extractor(batch_images), content_hashes(batch_images) if hashed else None
        if done == 0:
            raise GroodError(f"there is no image to {description}; check the path and the loader")

    def _stored(
        self,
        state: FittedState,
        images: Tensor | Iterable[Any],
        progress: Progress,
        description: str,
        cache: FeatureStore,
    ) -> Generator[tuple[Extraction, Tensor | None]]:
        """As `_extracted`, from a cache as far as it has them; images of classes that were left out are passed over."""
        extractor = self._need_extractor(description)
        left_out = sorted(set(range(len(state.classes))) - set(state.class_ids.tolist()))
        parts = stored_extractions(
            extractor, images, cache, left_out=left_out, progress=progress, description=description
        )
        done = 0
        with extractor.evaluation(), closing(parts):
            for part in parts:
                if state.info.image_shape and part.shape != state.info.image_shape:
                    raise _wrong_shape("scored", part.shape, state.info.image_shape)
                done += len(part.hashes)
                yield part.found, part.hashes
        if done == 0:
            raise GroodError(f"there is no image to {description}; check the path and the loader")

    @property
    def state_(self) -> FittedState:
        """All that `fit` learned, at this moment: for whoever carries a detector elsewhere."""
        return self._need_state()

    @property
    def threshold_(self) -> ConformalThreshold | None:
        """See `ConformalThreshold`; None before `calibrate`."""
        return self._learned.threshold

    @property
    def calibration_(self) -> CalibrationRecord | None:
        """See `CalibrationRecord`; None before `calibrate`."""
        return self._learned.calibration

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
    def training_(self) -> TrainingRecord | None:
        """What is remembered of the training samples; None in a file of format 1 or 2."""
        return self._need_state().training

    @property
    def stored_bytes_(self) -> int:
        """Bytes that the stored gradients take, in memory or on disk."""
        return self._need_state().searcher.gradients.nbytes

    @property
    def index_quality_(self) -> IndexQuality | None:
        """Measured recall of an approximate index; None for exact search."""
        return self._need_state().searcher.quality

    @property
    def shards_(self) -> ShardFiles | None:
        """The files of the stored gradients, if these are not in the detector's own."""
        searcher = self._need_state().searcher
        return searcher.shards if isinstance(searcher, MergedSearcher) else None

    def save(self, path: str | os.PathLike[str], *, shards: int | None = None) -> None:
        """Write the fitted detector to one file, atomically: see `torch_grood.storage`.

        Args:
            path: of the file.
            shards: put the gradients into so many files beside it, which processes on several machines can search
                (docs/scale.md); of exact search only. None: all in one file; but a detector that was loaded in shards
                stays so in their folder.

        Raises:
            GroodError: if it cannot be written.
        """
        from torch_grood import storage

        storage.save(Path(path), self, self._need_state(), shards)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None, *, verify: bool = False) -> Self:
        """Read a detector; a large file is memory-mapped, and shared with other processes that read it.

        Args:
            path: a file that `save` wrote.
            model: the model that it was fitted on; None: for use on features alone.
            verify: check every byte of a large file now; else its gradients are checked when they are first used.

        Raises:
            FormatError: NewerFormatError, TruncatedFileError or AlteredFileError, or if it is no detector file.
            ModelMismatchError: if the model is not the one that the detector was fitted on.
        """
        from torch_grood import storage

        stored = storage.load(Path(path), verify=verify)
        detector = cls(
            None,
            outliers=stored.outliers,
            index=stored.index,
            seed=stored.seed,
            store=stored.store_dtype,
            subset=stored.subset,
            **asdict(stored.settings),
        )
        detector.metadata = stored.metadata
        detector._adopt(stored.state, stored.threshold, stored.calibration)
        if model is None:
            return detector
        try:
            return detector.bind(model)
        except ModelMismatchError as error:
            raise ModelMismatchError(f"{path}: {error}") from None

    def bind(self, model: nn.Module) -> Self:
        """Give a detector that was loaded without its model the model that it was fitted on.

        Raises:
            ModelMismatchError: if it is another one.
        """
        state = self._need_state()
        _check_model(model, state.fingerprint)
        known = dict(unwrap(model).named_modules())
        # A part of the model may be compiled now, and its modules named differently: these are found again.
        self.head = state.info.head if state.info.head in known else None
        self.early_layer = state.info.early_layer if state.info.early_layer in known else None
        self.model = model
        self._extractor = FeatureExtractor(model, self.head, self.early_layer)
        return self

    def adopt(self, state: FittedState) -> Self:
        """Take what a fit elsewhere has learned, of the same model and with the same settings; calibrate afterwards."""
        self._adopt(state)
        return self

    def search_with(self, searcher: GradientSearcher) -> Self:
        """Let another searcher over the same stored gradients answer from now on, wherever it searches."""
        self._adopt(replace(self._need_state(), searcher=searcher), self.threshold_, self.calibration_)
        return self

    def _need_state(self, learned: _Learned | None = None) -> FittedState:
        state = (learned or self._learned).state
        if state is None:
            raise NotFittedError(
                "this detector is not fitted; call fit(loader) or fit_features(features, labels) first"
            )
        return state

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


def _check_ids(ids: Tensor, n_read: int) -> None:
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < n_read:
        raise GroodError(
            f"sample ids are positions from 0 to {n_read - 1} in the training set, got "
            f"{int(ids.min())} to {int(ids.max())}"
        )


def _check_on_training(on_training: str) -> None:
    if on_training not in ("raise", "drop"):
        raise GroodError(f"on_training must be 'raise' or 'drop', got {on_training!r}")


def _present(p_values: Tensor | None) -> Tensor:
    assert p_values is not None
    return p_values


def _taking_part(loader: Iterable[Any], state: FittedState) -> Iterable[Any]:
    """The batches without the images whose label is a class that was left out."""
    left_out = torch.ones(len(state.classes), dtype=torch.bool)
    left_out[state.class_ids] = False
    if not bool(left_out.any()):
        return loader
    return _Filtered(loader, left_out)


def _class_name(state: FittedState, group: int) -> str:
    return f"class {state.classes[group]!r}"


def _scores_of_features(state: FittedState, features: Tensor, first: int = 0) -> _Scores:
    """Algorithm 2 for features (n, d), of which `first` others came before."""
    parts: list[_Scores] = []
    for start in range(0, max(len(features), 1), GRADIENT_ROWS):
        part = features[start : start + GRADIENT_ROWS].cpu()
        gradients, nearest = state.gradient_field(part, first=first + start)
        neighbors = state.searcher.search(gradients, state.info.k)
        log_distance, row = neighbors.log_distance.cpu(), neighbors.row[:, 0].cpu()
        scores = log_mean(log_distance)
        parts.append(_Scores(scores, log_distance[:, 0].clone(), gradients.log_magnitude.cpu(), row, nearest.cpu()))
    return _joined(parts)


def _decision(
    state: FittedState, threshold: ConformalThreshold | None, fpr: float | None, tau: float | None, fdr: float | None
) -> _Decision:
    """From log scores, p-values and groups to is_ood."""
    given = [name for name, value in (("fpr", fpr), ("tau", tau), ("fdr", fdr)) if value is not None]
    if len(given) > 1:
        raise GroodError(f"{' and '.join(given)} are different ways to decide; give one of them")
    if tau is not None:
        if not isinstance(tau, Real) or not 0 <= tau < math.inf:
            raise GroodError(f"tau is a score, at least 0; got {tau!r}")
        log_tau = math.log(tau) if tau else -math.inf
        return lambda log_scores, p_values, groups: log_scores > log_tau
    if threshold is None:
        raise NotFittedError(
            "this detector is not calibrated, so it cannot decide; call calibrate(held_out, fpr=0.05) first, "
            "or use score(), which needs no threshold"
        )
    if fdr is not None:
        rate = fdr
        benjamini_hochberg(torch.empty(0), rate)
        return lambda log_scores, p_values, groups: benjamini_hochberg(_present(p_values), rate)
    chosen = threshold if fpr is None else threshold.at(fpr, describe=partial(_class_name, state))
    return lambda log_scores, p_values, groups: chosen.is_ood(log_scores, groups)


def _prediction(
    state: FittedState, threshold: ConformalThreshold | None, scores: _Scores, decide: _Decision
) -> Prediction:
    found = _assessment(state, scores)
    groups = None if threshold is None or threshold.groups is None else found.prototype_label
    p_value = None if threshold is None else threshold.p_values(scores.log_score, groups)
    return Prediction(
        score=found.score,
        p_value=p_value,
        is_ood=decide(scores.log_score, p_value, groups),
        label=found.label,
        prototype_label=found.prototype_label,
        neighbor=found.neighbor,
    )


def _assessment(state: FittedState, scores: _Scores) -> Assessment:
    return Assessment(
        score=scores.log_score.exp(),
        label=scores.label,
        prototype_label=state.class_ids[scores.prototype],
        neighbor=state.sample_ids[scores.neighbor],
    )


def _joined(parts: Sequence[_Scores]) -> _Scores:
    fields: list[Any] = [None if field[0] is None else torch.cat(field) for field in zip(*parts, strict=True)]
    return _Scores(*fields)


def _wrong_shape(what: str, shape: Sequence[int], expected: tuple[int, ...]) -> GroodError:
    return GroodError(
        f"images of shape {tuple(shape)} cannot be {what}: the detector was fitted on images of shape "
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


def _settings(own: ScoreSettings, geometry: str | None, temperature: float | None, k: int | None) -> ScoreSettings:
    """The settings of a source, but for what the caller names; another geometry has a temperature of its own."""
    if geometry is not None and checked_geometry(geometry) != own.geometry:
        own = replace(own, geometry=geometry, temperature=1.0 if geometry == "raw" else None)
    if temperature is not None:
        if not isinstance(temperature, Real) or isinstance(temperature, bool) or not 0 < temperature < math.inf:
            raise GroodError(f"temperature is what distances are divided by, greater than 0; got {temperature!r}")
        own = replace(own, temperature=float(temperature))
    if k is not None:
        if not isinstance(k, Integral) or isinstance(k, bool) or k < 1:
            raise GroodError(f"k is a number of nearest gradients, at least 1; got {k!r}")
        own = replace(own, k=int(k))
    return own


def _as_logits(logits: Any, n: int, n_classes: int) -> Tensor:
    found = _as_features(logits)
    if found.shape != (n, n_classes):
        raise GroodError(f"expected logits ({n}, {n_classes}), of each sample and class, got {tuple(found.shape)}")
    if not bool(found.isfinite().all()):
        raise GroodError("a logit is NaN or infinite; check the model (half precision may overflow)")
    return found


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


def _check_model(model: nn.Module, expected: ModelFingerprint | None) -> None:
    if expected is None:
        raise ModelMismatchError(
            "the detector was fitted on features, without a model; use it without one: GROOD.load(path)"
        )
    actual = model_fingerprint(model)
    if actual.architecture != expected.architecture:
        raise ModelMismatchError(
            "the detector was fitted on another model: the names, shapes or dtypes of the weights differ. "
            "Pass the model that it was fitted on, in the same precision."
        )
    if actual.weights != expected.weights:
        raise ModelMismatchError(
            "the detector was fitted on the same architecture with other weights; load the weights that it was fitted "
            "on, or fit again"
        )
