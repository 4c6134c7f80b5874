"""Methods on penultimate features h, some with the last layer (W, b) and its logits z = W h + b.

    MDS       ½ min over k of d_k, d_k = (h − μ_k)ᵀ Σ⁻¹ (h − μ_k)      Lee et al., NeurIPS 2018
    RMDS      min over k of d_k − d_0, d_0 under one Gaussian of all    Ren et al., 2021
    KNN       ‖h/‖h‖ − its K-th neighbour‖₂                             Sun et al., ICML 2022
    ViM       α ‖residual of h‖ − log Σ exp(z)                          Wang et al., CVPR 2022
    SHE       −h · mean of the predicted class                          Zhang et al., ICLR 2023
    NNGuide   −log Σ exp(z) · mean of the K largest guidances           Park et al., ICCV 2023
    fDBD      −mean distance to the boundaries / ‖h − μ‖                Liu and Qin, ICML 2024
    NCI       −w · (h − μ) / ‖h − μ‖ − α ‖h‖₁                           Liu and Qin, CVPR 2025
    GradNorm  −‖∂ KL(u ‖ p) / ∂W‖₁ = −‖p − u‖₁ ‖h‖₁, u uniform            Huang et al., NeurIPS 2021

Defaults and grids are those of OpenOOD v1.5 where nothing else is said, in configs/postprocessors/<name>.yml of its
repository, Jingkang50/OpenOOD; what is said of its code was read there, too. Of knn.yml, the revision that was read has
K = 50 alone in its grid; the one here is the one that pytorch-ood gives as OpenOOD's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torch_grood.evaluation.methods.base import (
    Method,
    Scorer,
    all_known,
    by_rows,
    detectors,
    features_of,
    logits_of,
)
from torch_grood.evaluation.methods.parameters import Count, Number, parameter
from torch_grood.evaluation.outputs import World

__all__ = ["Fdbd", "GradNorm", "Knn", "Mds", "Nci", "NnGuide", "Rmds", "She", "Vim"]

_VIM_DIM = 256


def _on_features(score: Callable[[Tensor], Tensor], numbers_a_row: int) -> Scorer:
    parted = by_rows(score, numbers_a_row)
    return lambda outputs: parted(features_of(outputs))


@dataclass(frozen=True)
class Mds(Method):
    """Mahalanobis distance to the nearest class mean, one covariance for all classes.

    On penultimate features alone, as OpenOOD's mds.yml has it, without the input noise and the other layers of the
    paper. pytorch-ood's covariance is a sum, not a mean, plus 1e-6 on the diagonal: the same order of scores, and
    features that never vary get a large weight where OpenOOD's pseudo-inverse leaves them out.
    """

    name: ClassVar[str] = "mds"
    title: ClassVar[str] = "MDS"
    reference: ClassVar[str] = "Lee et al., NeurIPS 2018"
    _needs: ClassVar[frozenset[str]] = frozenset({"labels"})

    def _fit(self, world: World) -> Scorer:
        detector = detectors().Mahalanobis(None).fit_features(features_of(world.train), self._labels(world))
        distances = _distances(detector.precision, detector.mu)
        return _on_features(lambda h: distances(h).min(1).values / 2, 2 * sum(world.train.features.shape[1:]))


@dataclass(frozen=True)
class Rmds(Method):
    """Mahalanobis distance to the nearest class mean, less that under one Gaussian of all classes; see `Mds`."""

    name: ClassVar[str] = "rmds"
    title: ClassVar[str] = "RMDS"
    reference: ClassVar[str] = "Ren et al., 2021 (arXiv 2106.09022)"
    _needs: ClassVar[frozenset[str]] = frozenset({"labels"})

    def _fit(self, world: World) -> Scorer:
        detector = detectors().RMD(None).fit_features(features_of(world.train), self._labels(world))
        classes = _distances(detector.precision, detector.mu)
        background = _distances(detector.background_precision, detector.background_mu[None])
        return _on_features(
            lambda h: classes(h).min(1).values - background(h)[:, 0], 2 * sum(world.train.features.shape[1:])
        )


def _distances(precision: Tensor, means: Tensor) -> Callable[[Tensor], Tensor]:
    """Squared Mahalanobis distances (n, C) of features (n, d) to means (C, d).

    pytorch-ood multiplies with the precision once for each class, which takes C times as long (days on ImageNet-1k).
    Multiplied out, it takes once; in float64 and around the centre of the means, so that nothing cancels.
    """
    precision = (precision.double() + precision.double().T) / 2
    centre = means.double().mean(0)
    means = means.double() - centre
    projected = means @ precision
    constant = (projected * means).sum(1)

    def distances(features: Tensor) -> Tensor:
        centred = features.double() - centre
        own = ((centred @ precision) * centred).sum(1, keepdim=True)
        return own - 2 * centred @ projected.T + constant

    return distances


@dataclass(frozen=True)
class Knn(Method):
    """Distance to the K-th nearest training sample, features scaled to unit length.

    OpenOOD searches squared distances in float32 (faiss), pytorch-ood distances in float64 (scikit-learn): the same
    order up to rounding.

    Args:
        k: K.
    """

    name: ClassVar[str] = "knn"
    title: ClassVar[str] = "KNN"
    reference: ClassVar[str] = "Sun et al., ICML 2022"
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"k": (50, 100, 200, 500, 1000)}

    k: int = parameter(50, Count())

    def _fit(self, world: World) -> Scorer:
        n = len(world.train)
        if n < self.k:
            self._unavailable(f"takes the distance to the {self.k}th nearest training sample, but there are only {n}")
        features = features_of(world.train)
        # Brute force is what scikit-learn takes by itself for more than 15 features; for fewer it is as exact.
        detector = detectors().KNN(None, k=self.k, normalize=True, algorithm="brute")
        detector.fit_features(features, all_known(features))
        return lambda outputs: detector.predict_features(features_of(outputs))


@dataclass(frozen=True)
class Vim(Method):
    """Virtual-logit matching: the norm outside the principal subspace, set against the energy.

    Args:
        dim: dimension of the principal subspace. None: 256, OpenOOD's; half the width for features that are not wider,
            as pytorch-ood has it. OpenOOD searches 256 and 1000, which suit wide features only; here smaller ones are
            in the grid, too.
    """

    name: ClassVar[str] = "vim"
    title: ClassVar[str] = "ViM"
    reference: ClassVar[str] = "Wang et al., CVPR 2022"
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"dim": (16, 32, 64, 128, 256, 512, 1000)}
    _needs: ClassVar[frozenset[str]] = frozenset({"head"})

    dim: int | None = parameter(None, Count("a dimension, at least 1", optional=True))

    def _fit(self, world: World) -> Scorer:
        head = self._head(world)
        d = head.in_features
        if d < 2:
            self._unavailable("needs two features at least, for a subspace and what lies outside")
        dim = self.dim or (_VIM_DIM if d > _VIM_DIM else d // 2)
        if dim >= d:
            self._unavailable(f"with dim = {dim} leaves nothing outside the subspace: there are {d} features")
        features = features_of(world.train)
        detector = detectors().ViM(None, d=dim, w=head.weight, b=head.bias)
        detector.fit_features(features, all_known(features))
        return _on_features(detector.predict_features, d + head.out_features)


@dataclass(frozen=True)
class She(Method):
    """Simplified Hopfield energy: the inner product with the mean of the predicted class's correct training samples.

    That is metric "inner_product" of OpenOOD's she.yml.
    """

    name: ClassVar[str] = "she"
    title: ClassVar[str] = "SHE"
    reference: ClassVar[str] = "Zhang et al., ICLR 2023"
    _needs: ClassVar[frozenset[str]] = frozenset({"labels", "head"})

    def _fit(self, world: World) -> Scorer:
        head, labels = self._head(world), self._labels(world)
        correct = labels[logits_of(world.train).argmax(1) == labels]
        self._need_each_class(correct, world.n_classes, "has no training sample that is classified correctly")
        detector = detectors().SHE(None, head).fit_features(features_of(world.train), labels)
        return _on_features(detector.predict_features, 2 * head.in_features + head.out_features)


@dataclass(frozen=True)
class NnGuide(Method):
    """Energy times the mean of the K largest inner products with a bank of training features, scaled by their energy.

    OpenOOD's bank is the head of the training loader, which for lists that are sorted by class holds one class only
    (CIFAR-10's first 500 of 50,000); here it is drawn by seed, and never smaller than K. Its search, too, knows no
    values but the defaults.

    Args:
        k: K.
        alpha: share of the training samples in the bank.
    """

    name: ClassVar[str] = "nnguide"
    title: ClassVar[str] = "NNGuide"
    reference: ClassVar[str] = "Park et al., ICCV 2023"
    _needs: ClassVar[frozenset[str]] = frozenset({"head"})

    k: int = parameter(100, Count())
    alpha: float = parameter(0.01, Number("a share, above 0 and at most 1", 0, 1, above=True))

    def _fit(self, world: World) -> Scorer:
        head, n = self._head(world), len(world.train)
        if n < self.k:
            self._unavailable(f"takes the {self.k} nearest training samples, but there are only {n}")
        size = max(self.k, round(self.alpha * n))
        rows = torch.randperm(n, generator=torch.Generator().manual_seed(world.seed))[:size].sort().values
        bank = features_of(world.train.take(rows))
        detector = detectors().NNGuide(None, head, k=self.k).fit_features(bank, all_known(bank))
        return _on_features(detector.predict_features, 2 * size + head.out_features)


@dataclass(frozen=True)
class Fdbd(Method):
    """Mean distance to the decision boundaries, over the distance to the training mean.

    OpenOOD's search may put ‖h‖ in place of the distance to the mean (distance_as_normalizer: False); pytorch-ood, and
    the paper, do not.
    """

    name: ClassVar[str] = "fdbd"
    title: ClassVar[str] = "fDBD"
    reference: ClassVar[str] = "Liu and Qin, ICML 2024"
    _needs: ClassVar[frozenset[str]] = frozenset({"head"})

    def _fit(self, world: World) -> Scorer:
        head = self._head(world)
        if head.out_features < 2:
            self._unavailable("needs two classes at least")
        detector = detectors().fDBD(None, head)
        weight = head.weight

        def pairwise() -> None:
            # As pytorch-ood's, which takes C² d numbers at once: 8 GB on ImageNet-1k.
            norms = torch.stack([(weight - row).norm(dim=1) for row in weight])
            detector._denom_matrix = norms.fill_diagonal_(1.0)

        detector._precompute_denom_matrix = pairwise
        detector.fit_features(features_of(world.train))
        return _on_features(detector.predict_features, 2 * head.in_features + 4 * head.out_features)


@dataclass(frozen=True)
class Nci(Method):
    """How well the feature, seen from the training mean, lies along the predicted class's weight, and its length.

    Args:
        alpha: weight of the length.
    """

    name: ClassVar[str] = "nci"
    title: ClassVar[str] = "NCI"
    reference: ClassVar[str] = "Liu and Qin, CVPR 2025"
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"alpha": (0.0001, 0.001, 0.01, 0.1)}
    _needs: ClassVar[frozenset[str]] = frozenset({"head"})

    alpha: float = parameter(0.0001, Number("a weight, at least 0", 0))

    def _fit(self, world: World) -> Scorer:
        head = self._head(world)
        detector = detectors().NCI(None, head, alpha=self.alpha).fit_features(features_of(world.train))
        return _on_features(detector.predict_features, 3 * head.in_features + head.out_features)


@dataclass(frozen=True)
class GradNorm(Method):
    """Norm of the gradient, with respect to the last weight, of the divergence from the uniform distribution.

    That gradient is (p − 1/C) hᵀ, a product of two vectors, and its norm that of their norms. pytorch-ood forms it for
    each sample (17 minutes for the test sets of ImageNet-1k), OpenOOD likewise and C times as large: the same order.
    """

    name: ClassVar[str] = "gradnorm"
    title: ClassVar[str] = "GradNorm"
    reference: ClassVar[str] = "Huang et al., NeurIPS 2021"
    _needs: ClassVar[frozenset[str]] = frozenset({"head"})

    def _fit(self, world: World) -> Scorer:
        head = self._head(world)

        def negative_norm(features: Tensor) -> Tensor:
            of_logits = head(features).softmax(1) - 1 / head.out_features
            norms: Tensor = of_logits.abs().sum(1) * features.abs().sum(1)
            return -norms

        return _on_features(negative_norm, head.in_features + 2 * head.out_features)
