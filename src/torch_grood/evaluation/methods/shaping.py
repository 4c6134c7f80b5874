"""Methods that alter pooled features, or the last layer, and then take the energy −log Σ exp(z).

    ReAct  min(h, c), c a percentile of all features             Sun et al., NeurIPS 2021
    VRA    h between two percentiles of each feature             Xu et al., NeurIPS 2023
    ASH    all but the largest of a sample's features zero       Djurisic et al., ICLR 2023
    SCALE  h · exp(sum of all / sum of the largest)              Xu et al., ICLR 2024
    DICE   weights that contribute little to a class zero        Sun and Li, ECCV 2022

Features are shaped after pooling, as OpenOOD does. Percentiles are in per cent, as there. Defaults and grids are those
of OpenOOD v1.5, configs/postprocessors/{react,vra,ash,scale,dice}.yml; what is said of OpenOOD here was read in its
repository, Jingkang50/OpenOOD.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional

from torch_grood.errors import GroodError
from torch_grood.evaluation.methods.base import Method, Scorer, all_known, by_rows, detectors, features_of, held_out
from torch_grood.evaluation.methods.parameters import PERCENTILE, Number, OneOf, parameter
from torch_grood.evaluation.outputs import World

__all__ = ["Ash", "Dice", "React", "Scale", "Vra"]

_SWEEP = (65.0, 70.0, 75.0, 80.0, 85.0, 90.0, 95.0)


def _maps(features: Tensor) -> Tensor:
    """Pooled features as feature maps of one pixel, (n, d, 1, 1)."""
    return features[:, :, None, None]


def _on_maps(detector: Any, head: nn.Linear) -> Scorer:
    parted = by_rows(
        lambda features: detector.predict_feature_maps(_maps(features)), 3 * head.in_features + head.out_features
    )
    return lambda outputs: parted(features_of(outputs))


def _flat(head: nn.Linear) -> nn.Module:
    return nn.Sequential(nn.Flatten(), head)


@dataclass(frozen=True)
class React(Method):
    """Rectified activations: features are cut off at a percentile of the validation images' features.

    OpenOOD, too, takes it over validation images; without them the training images serve.

    Args:
        percentile: in per cent.
    """

    name: ClassVar[str] = "react"
    title: ClassVar[str] = "ReAct"
    reference: ClassVar[str] = "Sun et al., NeurIPS 2021"
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"percentile": (85.0, 90.0, 95.0, 99.0)}
    _needs: ClassVar[frozenset[str]] = frozenset({"head"})

    percentile: float = parameter(90.0, Number("a percentile, from 0 to 100", 0, 100))

    def _fit(self, world: World) -> Scorer:
        head, features = self._head(world), features_of(held_out(world))
        detector = detectors().ReAct(None, _flat(head), percentile=self.percentile / 100)
        detector.fit_feature_maps(_maps(features), all_known(features))
        return _on_maps(detector, head)


@dataclass(frozen=True)
class Vra(Method):
    """Variational rectified activations: features are cut off below and above.

    pytorch-ood takes the percentiles of each feature, OpenOOD those of all features together: other scores than there.
    Validation images as with `React`.

    Args:
        low, high: the percentiles, in per cent.
    """

    name: ClassVar[str] = "vra"
    title: ClassVar[str] = "VRA"
    reference: ClassVar[str] = "Xu et al., NeurIPS 2023"
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"low": (1.0, 5.0, 10.0, 15.0), "high": (85.0, 90.0, 95.0, 99.0)}
    _needs: ClassVar[frozenset[str]] = frozenset({"head"})

    low: float = parameter(10.0, Number("a percentile, from 0 to 100", 0, 100))
    high: float = parameter(90.0, Number("a percentile, from 0 to 100", 0, 100))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise GroodError(f"vra: low must not exceed high, got {self.low:g} and {self.high:g}")

    def _fit(self, world: World) -> Scorer:
        head, features = self._head(world), features_of(held_out(world))
        detector = detectors().VRA(None, _flat(head), lower_percentile=self.low / 100, upper_percentile=self.high / 100)
        detector.fit_feature_maps(_maps(features), all_known(features))
        return _on_maps(detector, head)


@dataclass(frozen=True)
class Ash(Method):
    """Activation shaping: of each sample's features only the largest are kept.

    Args:
        variant: "b": those kept all get the sum of all over their number, which is OpenOOD's; "p": they stay as they
            are; "s": they are scaled.
        percentile: of a sample's features set to zero, in per cent.
    """

    name: ClassVar[str] = "ash"
    title: ClassVar[str] = "ASH"
    reference: ClassVar[str] = "Djurisic et al., ICLR 2023"
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"percentile": _SWEEP}
    _needs: ClassVar[frozenset[str]] = frozenset({"head"})

    variant: Literal["b", "p", "s"] = parameter("b", OneOf(("b", "p", "s")))
    percentile: float = parameter(90.0, PERCENTILE)

    def _fit(self, world: World) -> Scorer:
        head = self._head(world)
        _need_some_kept(self, head.in_features, self.percentile)
        detector = detectors().ASH(None, _flat(head), variant=f"ash-{self.variant}", percentile=self.percentile / 100)
        return _on_maps(detector, head)


@dataclass(frozen=True)
class Scale(Method):
    """Features scaled by how much of their sum is in the largest of them; none is set to zero.

    Args:
        percentile: of a sample's features that are not among the largest, in per cent.
    """

    name: ClassVar[str] = "scale"
    title: ClassVar[str] = "SCALE"
    reference: ClassVar[str] = "Xu et al., ICLR 2024"
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"percentile": _SWEEP}
    _needs: ClassVar[frozenset[str]] = frozenset({"head"})

    percentile: float = parameter(85.0, PERCENTILE)

    def _fit(self, world: World) -> Scorer:
        head = self._head(world)
        _need_some_kept(self, head.in_features, self.percentile)
        return _on_maps(detectors().SCALE(None, _flat(head), percentile=self.percentile / 100), head)


@dataclass(frozen=True)
class Dice(Method):
    """Sparse last layer: only weights that contribute most to a logit, on average over the training samples, stay.

    Args:
        p: percentage of the weights that are set to zero.
    """

    name: ClassVar[str] = "dice"
    title: ClassVar[str] = "DICE"
    reference: ClassVar[str] = "Sun and Li, ECCV 2022"
    # The revision of dice.yml that was read has 90 alone; pytorch-ood gives this as OpenOOD's and the paper's.
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"p": (10.0, 30.0, 50.0, 70.0, 90.0)}
    _needs: ClassVar[frozenset[str]] = frozenset({"head"})

    p: float = parameter(90.0, PERCENTILE)

    def _fit(self, world: World) -> Scorer:
        head, features = self._head(world), features_of(world.train)
        detector = detectors().DICE(None, head.weight, head.bias, p=self.p / 100)
        detector.fit_features(features, all_known(features))

        def energy(part: Tensor) -> Tensor:
            # As pytorch-ood's sum over (n, C, d), which on ImageNet-1k has 8 MB a sample.
            logits = functional.linear(part, detector.masked_w, detector.bias)
            scores: Tensor = detector.detector(logits)
            return scores

        parted = by_rows(energy, head.out_features)
        return lambda outputs: parted(features_of(outputs))


def _need_some_kept(method: Ash | Scale, d: int, percentile: float) -> None:
    if d - round(d * percentile / 100) < 1:
        method._unavailable(f"with percentile = {percentile:g} keeps none of {d} features")
