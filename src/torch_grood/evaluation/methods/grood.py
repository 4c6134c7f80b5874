"""GROOD itself, as a method among the others (ElAraby et al., TMLR 2025): `torch_grood.GROOD` on extracted features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from torch_grood.detector import GROOD
from torch_grood.errors import GroodError
from torch_grood.evaluation.methods.base import Method, MethodUnavailableError, Scorer
from torch_grood.evaluation.methods.parameters import Count, Number, OneOf, Text, parameter
from torch_grood.evaluation.outputs import World
from torch_grood.neighbors import make_index
from torch_grood.outliers import HighEnergy, Mixup, OutlierSource, PrototypeMean, named_source

__all__ = ["Grood"]


@dataclass(frozen=True)
class Grood(Method):
    """GROOD.

    Args:
        outliers: where the OOD prototype comes from: "energy", the training images of highest energy, which also takes
            the settings of `HighEnergy`; "mixup", the paper's; "noise"; "mean", of the class prototypes;
            "ood", the benchmark's validation outliers, which makes OOD data part of the method.
        n: number of outliers. None: what the source takes by itself; with "ood" all.
        lam: λ, the weight of the sample in a mix. None: `Mixup`'s.
        index: see `GROOD`, as are the others.
        geometry: "raw", "half" or "unit"; None: the source's.
        k: None: the source's.
        shrink: of "energy".
    """

    name: ClassVar[str] = "grood"
    title: ClassVar[str] = "GROOD"
    reference: ClassVar[str] = "ElAraby et al., TMLR 2025"
    # "ood" is not in it: chosen on validation outliers, a prototype made of them would be judged by what it knows.
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "outliers": ("energy", "mixup", "noise", "mean"),
        "lam": (0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    }

    outliers: Literal["energy", "mixup", "noise", "mean", "ood"] = parameter(
        "energy", OneOf(("energy", "mixup", "noise", "mean", "ood"))
    )
    n: int | None = parameter(None, Count(optional=True))
    lam: float | None = parameter(None, Number("the weight of the sample in a mix, from 0 to 1", 0, 1, optional=True))
    index: str = parameter("exact", Text('"exact" or a faiss factory string'))
    geometry: Literal["raw", "half", "unit"] | None = parameter(None, OneOf(("raw", "half", "unit"), optional=True))
    k: int | None = parameter(None, Count(optional=True))
    shrink: float | None = parameter(None, Number("what p_ood is multiplied by, from 0 to 1", 0, 1, optional=True))

    def __post_init__(self) -> None:
        super().__post_init__()
        make_index(self.index)
        if self.lam is not None and self.outliers != "mixup":
            raise GroodError(f"grood: lam is of outliers=mixup, not of outliers={self.outliers}; leave it out")
        if self.shrink is not None and self.outliers != "energy":
            raise GroodError(f"grood: shrink is of outliers=energy, not of outliers={self.outliers}; leave it out")
        if self.n is not None and self.outliers == "mean":
            raise GroodError("grood: n is a number of outliers, and outliers=mean takes none; leave it out")

    @property
    def needs(self) -> frozenset[str]:
        """See `Method`."""
        by_itself = frozenset[str]()
        of_source = {"energy": by_itself, "mean": by_itself, "ood": frozenset({"ood"})}.get(
            self.outliers, frozenset({"outliers"})
        )
        return of_source | {"labels"}

    def replace(self, **parameters: Any) -> Self:
        """See `Method`; λ and n are dropped where the new source of outliers has none, as a walk over `grid` needs."""
        outliers = parameters.get("outliers", self.outliers)
        if outliers != "mixup" and (self.lam is not None or "lam" in parameters):
            parameters["lam"] = None
        if outliers != "energy" and (self.shrink is not None or "shrink" in parameters):
            parameters["shrink"] = None
        if outliers == "mean" and (self.n is not None or "n" in parameters):
            parameters["n"] = None
        return super().replace(**parameters)

    def _fit(self, world: World) -> Scorer:
        labels = self._labels(world)
        detector = GROOD(
            None, outliers=self._source(), index=self.index, seed=world.seed, geometry=self.geometry, k=self.k
        )
        detector.fit_features(
            world.train.features.detach().cpu(),
            labels,
            ood_features=self._outliers(world),
            logits=world.train.logits.detach().cpu(),
        )
        return lambda outputs: detector.log_score_features(outputs.features.detach().cpu())

    def _source(self) -> OutlierSource:
        """What the detector makes p_ood of by itself, from features and logits."""
        if self.outliers != "energy":
            return PrototypeMean()
        return HighEnergy(self.n, HighEnergy.shrink if self.shrink is None else self.shrink)

    def _outliers(self, world: World) -> Tensor | None:
        """(m, d); None: the detector's own source does without."""
        if self.outliers in ("energy", "mean"):
            return None
        if self.outliers == "ood":
            return self._real_outliers(world)
        if world.outliers is None:
            self._unavailable("needs the network to make outliers, and there are only features; use outliers=mean")
        source = named_source(self.outliers, self.n, Mixup.lam if self.lam is None else self.lam)
        try:
            return world.outliers.features(source, world.left_out)
        except GroodError as error:
            raise MethodUnavailableError(f"{self.label}: {error}") from error

    def _real_outliers(self, world: World) -> Tensor:
        if world.val_ood is None:
            self._unavailable("with outliers=ood needs validation outliers, and the benchmark has none")
        features, n = world.val_ood.features, self.n
        if n is None:
            return features
        if n > len(features):
            self._unavailable(f"is to take {n} validation outliers, and there are only {len(features)}")
        rows = torch.randperm(len(features), generator=torch.Generator().manual_seed(world.seed))[:n]
        return features[rows.sort().values]
