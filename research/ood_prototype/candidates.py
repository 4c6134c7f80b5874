"""The candidates of the study: where p_ood comes from, in which geometry, how far it is shrunk, T and k.

`DIRECTIONS` are tried on the split worlds. `TEST` are those registered for the one look at the test sets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from scoring import World, confidence, energy
from torch import Tensor

Source = Callable[[World], Tensor]
Map = Callable[[str, Tensor], Tensor]
unit = torch.nn.functional.normalize


@dataclass(frozen=True)
class Candidate:
    """A way to GROOD's score.

    Attributes:
        group: the direction that it belongs to.
        source: of p_ood, by its name in `SOURCES`.
        share: p_ood is this times the source.
        geometry: of the features, by its name in `GEOMETRIES`.
        temperature: T in root mean square distances of training features from their own prototype; 0 for the paper's
            T = 1.
        k: neighbours.
        apart: several OOD prototypes have a softmax each.
        uses: "OOD" where the source is no ID data.
    """

    group: str
    source: str
    share: float = 1.0
    geometry: str = "raw"
    temperature: float = 0.0
    k: int = 1
    apart: bool = False
    uses: str = "ID"

    @property
    def name(self) -> str:
        parts = [self.source if self.share == 1 else f"{self.share:g} × {self.source}", self.geometry]
        parts += [f"T = {self.temperature:g} rms" if self.temperature else "T = 1", f"k = {self.k}"]
        return "; ".join(parts + ["softmax each"] * self.apart)


# ---- sources: (M, d), in the world's geometry


def selected(world: World, values: Tensor, share: float) -> Tensor:
    """The training samples of the least values: at least 100; and at most 1,000 of a share of 2 % or less."""
    n = max(100, int(share * len(values)))
    return values.argsort()[: min(n, 1000) if share <= 0.02 else n]


def balanced(features: Tensor, predicted: Tensor) -> Tensor:
    """The mean of the means by predicted class, of classes with three samples or more."""
    classes = [label for label in torch.unique(predicted) if (predicted == label).sum() > 2]
    return torch.stack([features[predicted == label].double().mean(0) for label in classes]).mean(0)


CRITERIA: dict[str, Callable[[World], Tensor]] = {
    "highest energy": lambda world: -energy(world.logits["train"]),
    "least confident": lambda world: confidence(world.logits["train"]),
    "least max logit": lambda world: world.logits["train"].amax(1),
    "least norm": lambda world: world.norms,
}
SHARES = (0.005, 0.02, 0.05, 0.2)


def _of_training(criterion: str, share: float, by_class: str = "") -> Source:
    def source(world: World) -> Tensor:
        rows = selected(world, CRITERIA[criterion](world), share)
        predicted = world.logits["train"][rows].argmax(1)
        features = world.train[rows].double()
        if by_class == "balanced":
            return balanced(features, predicted)[None]
        if by_class == "apart":
            enough = [label for label in torch.unique(predicted) if (predicted == label).sum() > 2]
            return torch.stack([features[predicted == label].mean(0) for label in enough])
        return features.mean(0)[None]

    return source


def _of_made(name: str, how: str = "") -> Source:
    def source(world: World) -> Tensor:
        names = [name] if name else [key for key in world.made if not key.startswith(("mixup", "uniform", "real"))]
        features = torch.cat([world.made[key] for key in names]).double()
        logits = torch.cat([world.logits["real" if key == "real" else f"made/{key}"] for key in names])
        if how == "balanced":
            return balanced(features, logits.argmax(1))[None]
        if how == "high energy":
            return features[(-energy(logits)).argsort()[: len(features) // 5]].mean(0)[None]
        return features.mean(0)[None]

    return source


def _midpoints(world: World) -> Tensor:
    """Between each class prototype and the nearest other."""
    distances = torch.cdist(world.prototypes, world.prototypes).fill_diagonal_(torch.inf)
    return (world.prototypes + world.prototypes[distances.argmin(1)]) / 2


MADE = [
    "mean of 2", "mean of 3", "mean of 5", "halves", "jigsaw 2", "jigsaw 4", "jigsaw 8", "collage 2", "collage 4",
    "amplitude exchanged", "phase random", "noisy 0.5", "noisy 1", "blurred", "inverted", "uniform noise",
]  # fmt: skip
MIXES = [f"mixup {layer}, λ {lam}" for layer in (1, 2, 3) for lam in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)]

SOURCES: dict[str, Source] = {
    "mean of prototypes": lambda world: world.prototypes.mean(0)[None],
    "origin": lambda world: torch.zeros_like(world.prototypes[:1]),
    "wrongly classified": lambda world: world.train[~world.correct].double().mean(0)[None],
}
for _name in [*MADE, *MIXES, "all made"]:
    for _how in ("", "balanced", "high energy"):
        SOURCES[", ".join(filter(None, [_name, _how]))] = _of_made("" if _name == "all made" else _name, _how)
for _criterion in CRITERIA:
    for _share in SHARES:
        SOURCES[f"{_criterion} {100 * _share:g} %"] = _of_training(_criterion, _share)
for _share in SHARES:
    SOURCES[f"highest energy {100 * _share:g} %, balanced"] = _of_training("highest energy", _share, "balanced")
SINGLE = list(SOURCES)
SOURCES |= {
    "class prototypes": lambda world: world.prototypes,
    "class midpoints": _midpoints,
    "highest energy 5 %, by class": _of_training("highest energy", 0.05, "apart"),
    "highest energy 2 % and origin": lambda world: torch.cat(
        [SOURCES["highest energy 2 %"](world), SOURCES["origin"](world)]
    ),
    "ORACLE: classes put aside": lambda world: world.unknown["aside"].double().mean(0)[None],
    "real outliers": _of_made("real"),
}


# ---- geometries


def _whitened(shrinkage: float) -> Callable[[World], Map]:
    def geometry(world: World) -> Map:
        residual = world.train.double() - world.prototypes[world.labels]
        covariance = residual.T @ residual / len(residual)
        d = len(covariance)
        covariance = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / d * torch.eye(d)
        values, axes = torch.linalg.eigh(covariance)
        root = (axes * values.clamp(min=1e-12 * float(values.max())).rsqrt()) @ axes.T
        return lambda _, x: (x.double() @ root).float()

    return geometry


def _span(world: World) -> Map:
    axes = torch.linalg.svd(world.prototypes - world.prototypes.mean(0), full_matrices=False).Vh[:-1]
    return lambda _, x: (x.double() @ axes.T).float()


def _centred(world: World) -> Map:
    centre = world.prototypes.mean(0).float()
    return lambda _, x: unit(x - centre)


GEOMETRIES: dict[str, Callable[[World], Map]] = {
    "raw": lambda world: lambda _, x: x,
    "half power": lambda world: lambda _, x: x / x.norm(dim=1, keepdim=True).clamp(min=1e-12).sqrt(),
    "unit": lambda world: lambda _, x: unit(x),
    "centred unit": _centred,
    "square root": lambda world: lambda _, x: unit(x.clamp(min=0).sqrt()),
    "span of prototypes": _span,
    "whitened, shrinkage 0.1": _whitened(0.1),
    "whitened, shrinkage 0.5": _whitened(0.5),
    "logits": lambda world: lambda name, _: world.logits[name],
}


def mapped(world: World, geometry: str) -> World:
    """The world with its features in another geometry."""
    if geometry == "raw":
        return world
    f = GEOMETRIES[geometry](world)
    return replace(
        world,
        train=f("train", world.train),
        known=f("known", world.known),
        unknown={name: f(name, x) for name, x in world.unknown.items()},
        made={name: f(name if name == "real" else f"made/{name}", x) for name, x in world.made.items()},
    )


# ---- the directions, on the split worlds

E2 = "highest energy 2 %"
CHOSEN = Candidate("shrinkage", E2, 0.5, "unit", 1.0, 10)
_UNIT = Candidate("", E2, 1.0, "unit", 1.0, 10)


def _directions() -> list[Candidate]:
    mu, oracle = "mean of prototypes", "ORACLE: classes put aside"
    found = [Candidate("source, as the paper", source) for source in SINGLE]
    found += [Candidate("source, as the paper", mu, share) for share in (0.8, 0.6, 0.3)]
    found += [replace(_UNIT, group="source, unit features", source=source) for source in SINGLE]
    found += [Candidate("bound", oracle, uses="OOD")]
    found += [replace(_UNIT, group="bound", source=oracle, uses="OOD", share=share) for share in (1.0, 0.5)]
    several = {"class prototypes": (0.8, 0.5), "class midpoints": (1.0, 0.5)}
    several |= {"highest energy 5 %, by class": (1.0, 0.5)}
    for source, shares in several.items():
        found += [replace(_UNIT, group="several OOD prototypes", source=source, share=share) for share in shares]
    both = replace(_UNIT, group="several OOD prototypes", source="highest energy 2 % and origin")
    found += [both, replace(both, apart=True)]
    for source in (E2, mu):
        for share in (0.9, 0.8, 0.65, 0.5, 0.35, 0.2):
            found.append(replace(_UNIT, group="shrinkage", source=source, share=share))
    found += [replace(_UNIT, group="shrinkage", source="highest energy 0.5 %", share=f) for f in (0.8, 0.65, 0.5, 0.35)]
    for geometry in GEOMETRIES:
        for source, share in ((mu, 1.0), (E2, 1.0), (E2, 0.5)):
            found.append(Candidate("geometry", source, share, geometry, 1.0, 10))
    found += [replace(_UNIT, group="geometry", geometry="half power", share=f) for f in (0.8, 0.65, 0.35, 0.0)]
    for t in (0.1, 0.3, 0.5, 2.0, 5.0):
        found += [replace(CHOSEN, group="temperature", temperature=t)]
        found += [Candidate("temperature", E2, 1.0, "raw", t, 10)]
    for k in (1, 5, 20, 50, 200):
        found += [replace(CHOSEN, group="k", k=k), Candidate("k", E2, 1.0, "raw", 1.0, k)]
    for k in (1, 50):
        found += [replace(c, group="k", k=k) for c in (_UNIT, replace(_UNIT, share=0.65), replace(_UNIT, share=0.35))]
    first: dict[str, Candidate] = {}
    for candidate in found:
        first.setdefault(candidate.name, candidate)
    return list(first.values())


DIRECTIONS = _directions()

# ---- registered for the test sets, each looked at once

TEST: dict[str, Candidate] = {
    "Mixup, λ 0.5, first layer (paper)": Candidate("test", "mixup 1, λ 0.5"),
    "Mixup, λ 0.9, first layer": Candidate("test", "mixup 1, λ 0.9"),
    "mean of prototypes": Candidate("test", "mean of prototypes"),
    "0.8 × mean of prototypes": Candidate("test", "mean of prototypes", 0.8),
    "least confident 2 %": Candidate("test", "least confident 2 %"),
    "highest energy 2 %": Candidate("test", E2),
    "highest energy 2 %, k = 50": Candidate("test", E2, k=50),
    "unit, highest energy 2 %": replace(_UNIT, group="test"),
    "unit, 0.65 × highest energy 2 %": replace(_UNIT, group="test", share=0.65),
    "unit, 0.5 × highest energy 2 % (fixed beforehand)": replace(CHOSEN, group="test"),
    "unit, 0.5 × highest energy 2 %, k = 50": replace(CHOSEN, group="test", k=50),
    "unit, origin": replace(_UNIT, group="test", source="origin"),
    "half power, 0.5 × highest energy 2 %": replace(CHOSEN, group="test", geometry="half power"),
    "unit, 0.5 × mean of prototypes": replace(CHOSEN, group="test", source="mean of prototypes"),
    "real outliers *": Candidate("test", "real outliers", uses="OOD"),
    # Added after `choose` and before the look: what the rule chose. The list above was made after the exploration.
    "unit, inverted (by the rule)": replace(_UNIT, group="test", source="inverted"),
    "unit, real outliers *": replace(_UNIT, group="test", source="real outliers", uses="OOD"),
}
