"""GROOD as a postprocessor of OpenOOD v1.5: what its `Evaluator` takes.

OpenOOD asks a postprocessor for a class and a confidence of each image, higher = more ID:

    pred = argmax of the classifier's logits        conf = −log S(x)

The port of GROOD that is part of OpenOOD predicts the nearest class prototype instead, so that its "ACC" is another
accuracy than the classifier's. The logarithm keeps the order where S itself underflows; S = 0 (an image whose gradient
is that of a training image) has the largest float32 as its confidence, since OpenOOD's metrics take no infinity.

OpenOOD need not be installed to import this module, only to use its evaluator.
"""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from torch_grood._batches import as_loader, split_batch
from torch_grood._progress import track
from torch_grood.detector import GROOD
from torch_grood.errors import GroodError, NotFittedError
from torch_grood.features import FeatureExtractor, unwrap
from torch_grood.integrations._settings import LAMBDAS, finite, make_source
from torch_grood.neighbors import GradientIndex, StoreOptions
from torch_grood.neighbors.store import as_store_options
from torch_grood.outliers import Mixup, OutlierContext, OutlierSource
from torch_grood.prototypes import as_labels
from torch_grood.training_pass import TrainingPass

__all__ = ["SWEEP", "GROODPostprocessor"]

_log = logging.getLogger("torch_grood")

SWEEP: Mapping[str, Sequence[Any]] = {"lam": LAMBDAS}
"""The paper's search, over λ."""

_SETTINGS = ("outliers", "lam", "n")
_TRAIN_KEYS = ("train", "main_train_loader")


class _PlainPostprocessor:
    """Stands for OpenOOD's base class where OpenOOD is not installed."""

    def __init__(self, config: Any) -> None:
        self.config = config


def _base_postprocessor() -> Any:
    try:
        return importlib.import_module("openood.postprocessors").BasePostprocessor
    except Exception as error:  # It imports all of its methods' packages, and each may break in its own way.
        if not isinstance(error, ModuleNotFoundError) or error.name != "openood":
            _log.warning(
                "OpenOOD is installed but its postprocessors cannot be imported (%s: %s): its Evaluator will not take "
                "GROODPostprocessor",
                type(error).__name__,
                error,
            )
        return _PlainPostprocessor


_BasePostprocessor: Any = _base_postprocessor()


class _Task(NamedTuple):
    """What `setup` was given."""

    net: nn.Module
    train: Iterable[Any]
    val_ood: Iterable[Any] | None


class GROODPostprocessor(_BasePostprocessor):  # type: ignore[misc]
    """GROOD for `openood.evaluation_api.Evaluator(net, …, postprocessor=GROODPostprocessor())`; one for each network.

    The network is run as it is, in eval mode, without OpenOOD's `return_feature`; it may be on any device.

    Args:
        config: of OpenOOD, which hands it to postprocessors that it makes itself; it is kept, and not read.
        outliers: where the OOD prototype comes from: "mixup", "noise", "mean" or "val_ood", which uses OpenOOD's
            validation outliers (results that rest on real outliers should say so), or a source of torch-grood.
        lam: λ of "mixup".
        n: number of outliers; None: the source's own default.
        sweep: values to try for `lam`, `outliers` or `n`; `SWEEP` is the paper's. OpenOOD then chooses those with the
            best AUROC between ID and OOD validation images: OOD data choose the detector. The training features stay
            in memory, so that the network runs over the training set only once.
        index: see `GROOD`, as are the others.
        head: see `GROOD`.
        early_layer: see `GROOD`.
        seed: see `GROOD`.
        store: see `GROOD`.

    Attributes:
        detector_: the fitted `GROOD`; None before `setup`.
        APS_mode: OpenOOD is to search; True with a sweep.
        hyperparam_search_done: set by OpenOOD.
        args_dict: the sweep, in the order of `set_hyperparam`.

    Raises:
        GroodError: for arguments that cannot work.
    """

    def __init__(
        self,
        config: Any = None,
        *,
        outliers: str | OutlierSource = "mixup",
        lam: float = Mixup.lam,
        n: int | None = None,
        sweep: Mapping[str, Sequence[Any]] | None = None,
        index: str | GradientIndex = "exact",
        head: str | None = None,
        early_layer: str | None = None,
        seed: int = 0,
        store: str | StoreOptions = "float32",
    ) -> None:
        super().__init__(config)
        self.outliers = outliers
        self.lam = lam
        self.n = n
        self.args_dict = _checked_sweep(SWEEP if sweep is None else sweep)
        self.APS_mode = sweep is not None
        self.hyperparam_search_done = False
        self.detector_: GROOD | None = None
        self._options: dict[str, Any] = {"index": index, "seed": seed, "store": as_store_options(store)}
        self._layers: dict[str, Any] = {"head": head, "early_layer": early_layer}
        self._task: _Task | None = None
        self._kept: _KeptPass | None = None
        # Without a model or outliers yet, all that can be wrong of the arguments is found now.
        GROOD(None, **self._options)
        for settings in self._candidates():
            make_source(**settings, val_ood=())

    def setup(
        self,
        net: nn.Module,
        id_loader_dict: Mapping[str, Iterable[Any]],
        ood_loader_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Fit on every batch of the ID training set; earlier set-ups leave no trace, hyper-parameters stay.

        Args:
            net: maps images to logits.
            id_loader_dict: has the training set under "train", in batches {"data": …, "label": …}.
            ood_loader_dict: has the OOD validation set under "val", if that is to be used.

        Raises:
            GroodError: for loaders that are missing or empty, and as `GROOD.fit`. The postprocessor is unchanged then.
        """
        key = next((key for key in _TRAIN_KEYS if key in id_loader_dict), None)
        if key is None:
            raise GroodError(
                f"setup needs the training set, id_loader_dict['train']; got {', '.join(map(repr, id_loader_dict))}"
            )
        task = _Task(net, id_loader_dict[key], (ood_loader_dict or {}).get("val"))
        self.detector_, self._kept = self._fitted(task, None)
        self._task = task

    def set_hyperparam(self, hyperparam: Sequence[Any]) -> None:
        """Set the values of `args_dict`'s names, in its order, and fit again if `setup` ran.

        Raises:
            GroodError: for another number of values, or one that cannot be. The postprocessor is unchanged then.
        """
        names = list(self.args_dict)
        if not isinstance(hyperparam, Sequence) or isinstance(hyperparam, str) or len(hyperparam) != len(names):
            raise GroodError(f"set_hyperparam takes a list of values for {', '.join(names)}; got {hyperparam!r}")
        before = self._settings()
        for name, value in zip(names, hyperparam, strict=True):
            setattr(self, name, value)
        try:
            if self._task is None:
                make_source(**self._settings(), val_ood=())
            else:
                self.detector_, self._kept = self._fitted(self._task, self._kept)
        except BaseException:
            for name, value in before.items():
                setattr(self, name, value)
            raise

    def get_hyperparam(self) -> list[Any]:
        """The values of `args_dict`'s names, in its order."""
        return [getattr(self, name) for name in self.args_dict]

    def postprocess(self, net: nn.Module, data: Any) -> tuple[Tensor, Tensor]:
        """The classifier's class, int64 (n,), and −log S, float64 (n,), of images (n, ...); both on the CPU.

        Raises:
            NotFittedError: before `setup`.
            GroodError: if `setup` ran on another network, and for images that it cannot take.
        """
        if self.detector_ is None or self._task is None:
            raise NotFittedError("this postprocessor is not set up; call setup(net, id_loader_dict, ood_loader_dict)")
        if unwrap(net) is not unwrap(self._task.net):
            raise GroodError("setup ran on another network than this one; call setup(net, …) with it first")
        images, _ = split_batch(data)
        shape = self.detector_.fit_info_.image_shape if self._kept is None else self._kept.image_shape
        if shape and tuple(images.shape[1:]) != shape:
            raise GroodError(
                f"images of shape {tuple(images.shape[1:])} cannot be scored: the training images have shape {shape}. "
                "Give all sets the same preprocessor."
            )
        found = self.detector_.extract(images, progress=False)
        return found.logits.argmax(1), finite(-self.detector_.log_score_features(found.features))

    def inference(
        self, net: nn.Module, data_loader: Iterable[Any], progress: bool = True
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        """Classes, confidences and labels (n,) of all images of a loader, in its order; labels are −1 for OOD.

        Raises:
            GroodError: as `postprocess`; for a loader without images, or without labels.
        """
        predictions: list[Tensor] = []
        confidences: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in track(as_loader(data_loader), None if progress else False, "GROOD"):
            images, batch_labels = split_batch(batch)
            if len(images):
                prediction, confidence = self.postprocess(net, images)
                predictions.append(prediction)
                confidences.append(confidence)
                labels.append(as_labels(batch_labels, len(images)))
        if not predictions:
            raise GroodError("the loader gave no image; check the image list and the path")
        return torch.cat(predictions).numpy(), torch.cat(confidences).numpy(), torch.cat(labels).numpy()

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SETTINGS}

    def _candidates(self) -> list[dict[str, Any]]:
        """The settings in use, and all that the search may set."""
        found = [self._settings()]
        if self.APS_mode:
            values = itertools.product(*self.args_dict.values())
            found += [found[0] | dict(zip(self.args_dict, chosen, strict=True)) for chosen in values]
        return found

    def _fitted(self, task: _Task, kept: _KeptPass | None) -> tuple[GROOD, _KeptPass | None]:
        source = make_source(**self._settings(), val_ood=task.val_ood)
        if not self.APS_mode:
            detector = GROOD(task.net, outliers=source, **self._layers, **self._options)
            return detector.fit(task.train), None
        if kept is None or not kept.serves(source):
            sources = [source]
            sources += [make_source(**settings, val_ood=task.val_ood) for settings in self._candidates()]
            extractor = FeatureExtractor(task.net, **self._layers)
            kept = _KeptPass(extractor, task.train, sources, self._options["seed"], self._options["store"])
        detector = GROOD(task.net, outliers=kept.outliers(source), **self._layers, **self._options)
        detector.fit_features(kept.features, kept.labels, kept.predictions, classes=kept.classes)
        return detector, kept


class _KeptPass:
    """One pass over the training set, kept so that detectors with other outliers need no other.

    Attributes:
        features: (n, d), penultimate.
        labels: int64 (n,), positions in `classes`.
        predictions: int64 (n,), the classifier's classes.
        classes: names of the classes.
        image_shape: of each image; empty if they have several.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        loader: Iterable[Any],
        sources: Sequence[OutlierSource],
        seed: int,
        store: StoreOptions,
    ) -> None:
        passed = TrainingPass(extractor, _Neediest(sources), seed, loader, None, store)
        with extractor.evaluation():
            passed.run(loader)
        if passed.n_samples == 0:
            raise GroodError("the loader gave no training sample; check the path and the loader")
        self.features = torch.cat(list(passed.features.drain()))
        self.labels = torch.cat(passed.rows)
        self.predictions = torch.cat(passed.predictions)
        self.classes = passed.classes
        self.image_shape = passed.image_shape if passed.one_size else ()
        self._context = passed.outlier_context(passed.samples())

    def serves(self, source: OutlierSource) -> bool:
        """Whether what the source asks for was kept."""
        samples = self._context.samples
        n_kept = 0 if samples is None else len(samples.images)
        n_wanted = min(source.n_training_samples(len(self.features)), len(self.features))
        uncertain = self._context.uncertain
        n_uncertain = 0 if uncertain is None else len(uncertain)
        if n_uncertain < min(source.n_uncertain(len(self.features)), len(self.features)):
            return False
        return n_kept >= n_wanted and (self._context.early_prototypes is not None or not source.uses_early_layer)

    def outliers(self, source: OutlierSource) -> OutlierSource:
        """The source, with its outliers made already."""
        context = self._context
        if context.uncertain is not None:
            context = replace(context, uncertain=context.uncertain[: source.n_uncertain(len(self.features))])
        if context.samples is not None:
            # They are in an order of their own, of which a source that asks for fewer gets the first.
            n = source.n_training_samples(len(self.features))
            first = type(context.samples)(context.samples.images[:n], context.samples.runner_up[:n])
            context = replace(context, samples=first if n else None)
        return _Made(source, source.features(context))


class _Neediest(OutlierSource):
    """Asks for all that one of several sources needs."""

    def __init__(self, sources: Sequence[OutlierSource]) -> None:
        self._sources = sources
        self.uses_early_layer = any(source.uses_early_layer for source in sources)  # type: ignore[misc]

    def n_training_samples(self, n_all: int | None) -> int:
        return max(source.n_training_samples(n_all) for source in self._sources)

    def n_uncertain(self, n_all: int | None) -> int:
        return max(source.n_uncertain(n_all) for source in self._sources)

    def features(self, context: OutlierContext) -> Tensor:
        raise NotImplementedError("it is asked for what to keep only")


class _Made(OutlierSource):
    """A source whose outliers are made already."""

    def __init__(self, source: OutlierSource, features: Tensor) -> None:
        self._source = source
        self._features = features
        self.uses_ood_data = source.uses_ood_data  # type: ignore[misc]
        self.settings = source.settings  # type: ignore[misc]

    def prototype(self, outliers: Tensor, place: Callable[[Tensor], Tensor]) -> Tensor:
        return self._source.prototype(outliers, place)

    def __repr__(self) -> str:
        return repr(self._source)

    def features(self, context: OutlierContext) -> Tensor:
        return self._features

    def config(self) -> dict[str, Any]:
        return self._source.config()


def _checked_sweep(sweep: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    if not isinstance(sweep, Mapping) or not sweep or not set(sweep) <= set(_SETTINGS):
        raise GroodError(
            f"sweep names values to try for {', '.join(_SETTINGS)}, as in {{'lam': [0.5, 0.9]}}; got {sweep!r}"
        )
    for name, values in sweep.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise GroodError(f"sweep[{name!r}] must be a list of values to try, got {values!r}")
    return {name: list(values) for name, values in sweep.items()}
