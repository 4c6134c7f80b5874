"""ODIN, which runs the network on altered images (Liang et al., ICLR 2018).

    x̂ = x − ε sign(∂ −log p_ŷ(x; T) / ∂x),    score = −max p(x̂; T),    p(x; T) = softmax(z(x) / T)

Defaults and grid are those of OpenOOD v1.5, configs/postprocessors/odin.yml, as read in Jingkang50/OpenOOD.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from torch_grood.evaluation.methods.base import Method, Scorer, detectors
from torch_grood.evaluation.methods.parameters import TEMPERATURE, Number, parameter
from torch_grood.evaluation.outputs import Outputs, World

__all__ = ["Odin"]


@dataclass(frozen=True)
class Odin(Method):
    """Softmax at a high temperature, of images that are moved a little towards the prediction.

    OpenOOD divides the step by the standard deviations of its normalisation, and so does this, by the classifier's own.
    Its scores are kept with the features, for a pass takes three times as long.

    Args:
        temperature: T.
        eps: ε, as a share of the range of a pixel.
    """

    name: ClassVar[str] = "odin"
    title: ClassVar[str] = "ODIN"
    reference: ClassVar[str] = "Liang et al., ICLR 2018"
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "temperature": (1.0, 10.0, 100.0, 1000.0),
        "eps": (0.0014, 0.0028),
    }
    _needs: ClassVar[frozenset[str]] = frozenset({"images"})

    temperature: float = parameter(1000.0, TEMPERATURE)
    eps: float = parameter(0.0014, Number("a step, at least 0", 0))

    def _fit(self, world: World) -> Scorer:
        model = world.model
        if model is None:
            self._unavailable("runs the network, which is not there (nor is it one without some of its classes)")
        std = [float(value) for value in model.std]
        detector = detectors().ODIN(model.module, eps=self.eps, temperature=self.temperature, norm_std=std)
        name = self._name(std)

        def predict(images: Tensor) -> Tensor:
            scores: Tensor = detector.predict(images)
            return scores

        def score(outputs: Outputs) -> Tensor:
            if outputs.images is None:
                self._unavailable("needs the images, and there are only features")
            return outputs.images.scores(name, predict)

        return score

    def _name(self, std: list[float]) -> str:
        """What the scores are kept under: all that they depend on beside weights and images."""
        key = {"method": "odin", "temperature": self.temperature, "eps": self.eps, "norm_std": std}
        return "odin-" + hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
