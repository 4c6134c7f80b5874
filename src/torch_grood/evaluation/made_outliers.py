"""Synthetic outliers for methods on extracted features, as `GROOD.fit` makes them: eq. 8, also without some classes.

One pass over the training images collects what all sources need: early prototypes, images to mix, the range of pixels.
Without some classes, nothing of them is used: neither their early prototypes as partners, nor images that the
classifier takes for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torch_grood._progress import Progress
from torch_grood.data import ImageLoader
from torch_grood.errors import GroodError
from torch_grood.evaluation.outputs import kept_classes
from torch_grood.feature_store import FeatureStore
from torch_grood.features import FeatureExtractor
from torch_grood.outliers import Mixup, OutlierSource, TrainingSamples, UniformNoise
from torch_grood.training_pass import TrainingPass

__all__ = ["MadeOutliers"]

_MOST_MIXED = 1000


@dataclass(frozen=True)
class MadeOutliers:
    """Synthetic outliers as `GROOD.fit` makes them, from one training pass; see `OutlierFeatures`.

    Attributes:
        passed: the pass, done.
        why_not: why nothing can be mixed; None if it can.
    """

    passed: TrainingPass
    why_not: str | None
    _kept: dict[tuple[str, frozenset[int]], Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, extractor: FeatureExtractor, train: ImageLoader, store: FeatureStore, seed: int, progress: Progress
    ) -> MadeOutliers:
        """Pass over the training images, as far as the store does not have what is needed of them.

        Raises:
            GroodError: if there is no training image, or as `GROOD.fit`.
        """
        source: OutlierSource = Mixup(n=_MOST_MIXED)
        why_not = None
        try:
            extractor.resolve(store.first_image(train), early=True)
        except GroodError as error:
            # Other sources, and all other methods, need no early layer.
            source, why_not = UniformNoise(), str(error)
        passed = TrainingPass(extractor, source, seed, train, None)
        passed.run(train, progress, store)
        if passed.n_samples == 0:
            raise GroodError(f"there is no training image: {train.dataset.source.origin}")
        # They are read from the store again, with their logits.
        for _ in passed.features.drain():
            pass
        return cls(passed, why_not)

    @property
    def prototypes(self) -> Tensor:
        """Of the classes, float64 (C, d)."""
        return self.passed.prototypes.means

    @property
    def mixes(self) -> bool:
        """Whether there is an early layer."""
        return self.passed.early_prototypes is not None

    def features(self, source: OutlierSource, without: frozenset[int] = frozenset()) -> Tensor:
        """See `OutlierFeatures`; made once."""
        key = str(source.config()), without
        if key not in self._kept:
            self._kept[key] = self._features(source, without)
        return self._kept[key]

    def _features(self, source: OutlierSource, without: frozenset[int]) -> Tensor:
        passed = self.passed
        if source.uses_early_layer and self.why_not is not None:
            raise GroodError(self.why_not)
        kept = kept_classes(len(self.prototypes), without)
        with passed.extractor.evaluation():
            samples = self._samples(source, kept) if source.uses_early_layer else None
            context = passed.outlier_context(samples, progress=False, early=source.uses_early_layer)
            early = context.early_prototypes
            return source.features(
                replace(
                    context,
                    class_prototypes=context.class_prototypes[kept],
                    early_prototypes=None if early is None else early[kept.to(early.device)],
                )
            )

    def _samples(self, source: OutlierSource, kept: Tensor) -> TrainingSamples | None:
        """Training images to mix; without some classes, those that the classifier takes for one of the others."""
        passed = self.passed
        n = source.n_training_samples(passed.n_samples)
        if n > passed.reservoir.size:
            raise GroodError(f"at most {passed.reservoir.size} outliers can be mixed in a benchmark, got n={n}")
        samples = passed.reservoir.samples(n, passed.read_again)
        if samples is None or len(kept) == len(self.prototypes):
            return samples
        size = passed.batch_size
        batches = torch.split(samples.images, size)
        logits = torch.cat([passed.extractor(images).logits.cpu() for images in batches])
        known = torch.isin(logits.argmax(1), kept)
        runner_up = logits[known][:, kept].topk(2, dim=1).indices[:, 1]
        return replace(samples, images=samples.images[known], runner_up=runner_up)
