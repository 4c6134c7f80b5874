"""Methods on logits z alone, with p = softmax(z).

    MSP          −max p                                  Hendrycks and Gimpel, ICLR 2017
    MLS          −max z                                  Hendrycks et al., ICML 2022
    energy       −T log Σ exp(z / T)                     Liu et al., NeurIPS 2020
    entropy      −Σ p log p                              Chan et al., ICCV 2021
    GEN          Σ over the M largest of p^γ (1 − p)^γ   Liu et al., CVPR 2023
    KLM          min over k of KL(p ‖ mean p of k)       Hendrycks et al., ICML 2022
    TempScaling  MSP at the temperature that fits        Guo et al., ICML 2017

Defaults and grids are those of OpenOOD v1.5, configs/postprocessors/{msp,mls,ebo,gen,klm,temp_scaling}.yml; what is
said of OpenOOD here was read in its repository, Jingkang50/OpenOOD.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from torch_grood.evaluation.methods.base import Method, Scorer, by_rows, detectors, held_out, logits_of
from torch_grood.evaluation.methods.parameters import TEMPERATURE, Count, Number, OneOf, parameter
from torch_grood.evaluation.outputs import Outputs, World

__all__ = ["Energy", "Entropy", "Gen", "Klm", "Mls", "Msp", "TempScaling"]


def _on_logits(score: Callable[[Tensor], Tensor], world: World) -> Scorer:
    parted = by_rows(score, world.n_classes)
    return lambda outputs: parted(logits_of(outputs))


@dataclass(frozen=True)
class Msp(Method):
    """Maximum softmax probability.

    Args:
        precision: in float32, as pytorch-ood and OpenOOD compute, every probability above 1 − 6e-8 rounds to 1, and the
            surest predictions all tie; float64 tells them apart.
    """

    name: ClassVar[str] = "msp"
    title: ClassVar[str] = "MSP"
    reference: ClassVar[str] = "Hendrycks and Gimpel, ICLR 2017"

    precision: Literal["float32", "float64"] = parameter("float32", OneOf(("float32", "float64")))

    def _fit(self, world: World) -> Scorer:
        detector = detectors().MaxSoftmax(None)
        dtype = torch.float32 if self.precision == "float32" else torch.float64

        def score(outputs: Outputs) -> Tensor:
            scores: Tensor = detector.predict_logits(outputs.logits.detach().to("cpu", dtype))
            return scores

        return score


@dataclass(frozen=True)
class Mls(Method):
    """Maximum logit."""

    name: ClassVar[str] = "mls"
    title: ClassVar[str] = "MLS"
    reference: ClassVar[str] = "Hendrycks et al., ICML 2022"

    def _fit(self, world: World) -> Scorer:
        return _on_logits(detectors().MaxLogit(None).predict_logits, world)


@dataclass(frozen=True)
class Energy(Method):
    """Energy; OpenOOD calls it EBO.

    Args:
        temperature: T.
    """

    name: ClassVar[str] = "energy"
    title: ClassVar[str] = "energy"
    reference: ClassVar[str] = "Liu et al., NeurIPS 2020"
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"temperature": (1.0, 10.0, 100.0, 1000.0)}

    temperature: float = parameter(1.0, TEMPERATURE)

    def _fit(self, world: World) -> Scorer:
        return _on_logits(detectors().EnergyBased(None, t=self.temperature).predict_logits, world)


@dataclass(frozen=True)
class Entropy(Method):
    """Entropy of the softmax; pytorch-ood counts no probability below 1e-7. OpenOOD has no such method."""

    name: ClassVar[str] = "entropy"
    title: ClassVar[str] = "entropy"
    reference: ClassVar[str] = "Chan et al., ICCV 2021"

    def _fit(self, world: World) -> Scorer:
        return _on_logits(detectors().Entropy(None).predict_logits, world)


@dataclass(frozen=True)
class Gen(Method):
    """Generalised entropy.

    pytorch-ood takes probabilities as at least 1e-7 and at most 1 − 1e-7, OpenOOD takes them as they are: samples whose
    prediction is surer than that tie here and not there. The mean here and the sum there have the same order.

    Args:
        gamma: γ.
        M: number of largest probabilities that count; all if there are fewer classes.
    """

    name: ClassVar[str] = "gen"
    title: ClassVar[str] = "GEN"
    reference: ClassVar[str] = "Liu et al., CVPR 2023"
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "gamma": (0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0),
        "M": (10, 50, 100, 200, 500, 1000),
    }

    gamma: float = parameter(0.1, Number("an exponent, above 0", 0, above=True))
    M: int = parameter(100, Count())

    def _fit(self, world: World) -> Scorer:
        return _on_logits(detectors().GEN(None, gamma=self.gamma, M=self.M).predict_logits, world)


@dataclass(frozen=True)
class Klm(Method):
    """KL matching: the divergence from the nearest mean softmax of a predicted class, on validation images.

    A class that is predicted for no validation image has no mean; OpenOOD takes NaN for it. Without validation images
    the training images serve.
    """

    name: ClassVar[str] = "klm"
    title: ClassVar[str] = "KLM"
    reference: ClassVar[str] = "Hendrycks et al., ICML 2022"

    def _fit(self, world: World) -> Scorer:
        detector = detectors().KLMatching(None).fit_logits(logits_of(held_out(world)))
        return _on_logits(detector.predict_logits, world)


@dataclass(frozen=True)
class TempScaling(Method):
    """Temperature scaling: MSP at the temperature of the least loss on validation images.

    The temperature is searched by pytorch-ood, with other steps than OpenOOD's. Without validation images the training
    images serve.
    """

    name: ClassVar[str] = "temp_scaling"
    title: ClassVar[str] = "TempScaling"
    reference: ClassVar[str] = "Guo et al., ICML 2017"
    _needs: ClassVar[frozenset[str]] = frozenset({"labels"})

    def _fit(self, world: World) -> Scorer:
        fitted_on = held_out(world)
        if fitted_on.labels is None:
            self._unavailable("needs the labels of the validation samples")
        with torch.enable_grad():
            detector = detectors().TemperatureScaling(None)
            detector.fit_logits(logits_of(fitted_on), fitted_on.labels.detach().cpu().long())
        return _on_logits(detector.predict_logits, world)
