"""GROOD as a detector of pytorch-ood: for its benchmarks, its metrics and its grid search.

The outlier score is log S(x), which orders images as the paper's S does and does not underflow; S = 0 (an image whose
gradient is that of a training image) is −3.4e38, since pytorch-ood's search takes no infinity.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Self

from torch import Tensor, nn

from torch_grood._batches import as_loader, split_batch
from torch_grood._optional import require
from torch_grood.detector import GROOD
from torch_grood.integrations._settings import LAMBDAS, finite, make_source
from torch_grood.neighbors import GradientIndex, StoreOptions
from torch_grood.outliers import Mixup, OutlierSource
from torch_grood.prototypes import as_labels

require("pytorch_ood.api", extra="bench")

from pytorch_ood.api import (  # noqa: E402
    DetectorInfo,
    FeaturesDetector,
    ModelNotSetException,
    Paper,
    RequiresFittingException,
    Task,
)

__all__ = ["GROODDetector"]


class GROODDetector(FeaturesDetector):  # type: ignore[misc]
    """GROOD for `Benchmark.evaluate`, `GridSearch` and whatever else takes a detector of pytorch-ood.

    It needs the classifier, not an encoder: synthetic outliers are made inside of it. So a benchmark runs it on images,
    and cannot share another detector's features with it.

    Args:
        model: maps images (n, ...) to logits (n, C); it is run in eval mode, and left as it was. None: features only.
        outliers: where the OOD prototype comes from: "mixup", "noise" or "mean", or a source of torch-grood, such as
            `OutlierSamples(loader)`. None: "mixup" with a model, "mean" without one.
        lam: λ of "mixup".
        n: number of outliers; None: the source's own default.
        index: see `GROOD`, as are the others.
        head: see `GROOD`.
        early_layer: see `GROOD`.
        seed: see `GROOD`.
        store: see `GROOD`.

    Attributes:
        grood_: the fitted `GROOD`; None before `fit`.

    Raises:
        GroodError: for arguments that cannot work.
    """

    info = DetectorInfo(
        paper=Paper(
            title="GROOD: GRadient-Aware Out-of-Distribution Detection",
            venue="TMLR",
            year=2025,
            url="https://openreview.net/forum?id=2V7itvvMVJ",
        ),
        tasks={Task.CLASSIFICATION},
        ai_coded=True,
    )

    requires_fit = True
    hyperparameter_space = {"lam": list(LAMBDAS)}  # noqa: RUF012 (as the base class has it)

    # With an encoder, pytorch-ood would fit on its features alone, and λ would mean nothing.
    encoder = None

    def __init__(
        self,
        model: nn.Module | None,
        outliers: str | OutlierSource | None = None,
        lam: float = Mixup.lam,
        n: int | None = None,
        *,
        index: str | GradientIndex = "exact",
        head: str | None = None,
        early_layer: str | None = None,
        seed: int = 0,
        store: str | StoreOptions = "float32",
    ) -> None:
        self.model = model
        self.outliers: str | OutlierSource = outliers or ("mean" if model is None else "mixup")
        self.lam = lam
        self.n = n
        self.index = index
        self.head = head
        self.early_layer = early_layer
        self.seed = seed
        self.store = store
        self.grood_: GROOD | None = None
        self._fitted_with: tuple[Any, ...] = ()
        self._new()

    def fit(self, data_loader: Iterable[Any]) -> Self:
        """Fit on the classifier's training set, in one pass over batches (x, y); OOD samples, y < 0, are passed over.

        Raises:
            ModelNotSetException: without a model.
            GroodError: as `GROOD.fit`; the detector is unchanged then.
        """
        if self.model is None:
            raise ModelNotSetException("fit(loader) needs a model; without one use fit_features(x, y)")
        self._adopt(self._new().fit(_Known(as_loader(data_loader))))
        return self

    def fit_features(
        self,
        x: Tensor,
        y: Tensor,
        predictions: Tensor | None = None,
        *,
        ood_features: Tensor | None = None,
    ) -> Self:
        """Fit on penultimate features; OOD samples, y < 0, are passed over.

        Args:
            x: (n, d).
            y: classes (n,).
            predictions: the classifier's classes (n,); the gradients of wrongly classified samples are not stored.
            ood_features: (m, d), whose mean is the OOD prototype; None: the mean of the class prototypes, which
                `outliers` must then be.

        Raises:
            GroodError: as `GROOD.fit_features`; the detector is unchanged then.
        """
        y = as_labels(y, len(x))
        known = y >= 0
        if predictions is not None:
            predictions = as_labels(predictions, len(x))[known]
        grood = self._new().fit_features(x[known.to(x.device)], y[known], predictions, ood_features=ood_features)
        self._adopt(grood)
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Outlier scores of images: log S, float64 (n,), on the device of `x`.

        Raises:
            ModelNotSetException: without a model.
            RequiresFittingException: before `fit`, or if the settings were changed since.
            GroodError: for images that cannot be scored.
        """
        if self.model is None:
            raise ModelNotSetException("predict(x) needs a model; without one use predict_features(x)")
        return finite(self._need_fit().log_score(x, progress=False)).to(x.device)

    def predict_features(self, x: Tensor) -> Tensor:
        """As `predict`, from penultimate features (n, d)."""
        return finite(self._need_fit().log_score_features(x)).to(x.device)

    def _new(self) -> GROOD:
        return GROOD(
            self.model,
            outliers=make_source(self.outliers, self.lam, self.n),
            index=self.index,
            head=self.head,
            early_layer=self.early_layer,
            seed=self.seed,
            store=self.store,
        )

    def _adopt(self, grood: GROOD) -> None:
        self.grood_ = grood
        self._fitted_with = self._settings()

    def _settings(self) -> tuple[Any, ...]:
        # By identity: a source may hold a loader, which need not compare.
        objects = (value if isinstance(value, str) else id(value) for value in (self.outliers, self.index))
        return *objects, self.lam, self.n, self.head, self.early_layer, self.seed, self.store

    def _need_fit(self) -> GROOD:
        if self.grood_ is None:
            raise RequiresFittingException
        if self._fitted_with != self._settings():
            raise RequiresFittingException("the settings were changed after fit(); call fit() again before predict()")
        return self.grood_


class _Known:
    """A loader's batches without the samples that are labelled OOD."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._loader:
            images, labels = split_batch(batch)
            labels = as_labels(labels, len(images))
            known = labels >= 0
            if not bool(known.all()):
                images, labels = images[known.to(images.device)], labels[known]
            yield images, labels
