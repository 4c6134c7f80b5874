"""GROOD on stored features, in all the variants of the study, and AUROC with bootstrap intervals.

    H(h) = [π_m(h) · (h - p_m) / ‖h - p_m‖]_m        π = softmax(-distances / T) at the OOD prototypes p_m
    S(x) = mean over the k nearest stored gradients of ‖H(x) - H(x')‖

With one OOD prototype, T = 1 and k = 1 it is the paper's score. Distances to prototypes are in float64, products
between gradients in float32, in units of the greatest stored gradient.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy.stats import rankdata
from torch import Tensor

Scores = dict[str, Tensor]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class World:
    """What a classifier says of its images; features are float32 on the CPU.

    Attributes:
        name: of the classifier.
        train: features of the training samples.
        labels: their classes.
        correct: whether the classifier is right about them.
        norms: ‖features‖ of the training samples, before any map.
        known: features of held-out ID samples.
        unknown: features of OOD sets, by name.
        made: features of made outliers, by name; "real" are real ones.
        logits: of "train", "known", the unknown sets, and "made/NAME".
        prototypes: the class prototypes, float64.
    """

    name: str
    train: Tensor
    labels: Tensor
    correct: Tensor
    norms: Tensor
    known: Tensor
    unknown: Mapping[str, Tensor]
    made: Mapping[str, Tensor]
    logits: Mapping[str, Tensor]
    prototypes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        n = int(self.labels.max()) + 1
        means = [self.train[self.labels == label].double().mean(0) for label in range(n)]
        object.__setattr__(self, "prototypes", torch.stack(means))

    def own_distance(self) -> float:
        """Root mean square distance of the training features from the prototype of their class."""
        sums = [
            (self.train[self.labels == label].double() - prototype).square().sum()
            for label, prototype in enumerate(self.prototypes)
        ]
        return float((torch.stack(sums).sum() / len(self.train)).sqrt())


def load_world(path: Path, tests: Path | None = None, n_near: int | None = None) -> World:
    """A world from its file.

    Args:
        path: file of `extract.py`.
        tests: file of the same classifier's test sets, in place of held-out ID and split classes.
        n_near: how many images of the classes put aside, drawn by seed; all by default.
    """
    stored = load_file(path)
    features = {name.removesuffix(".features"): x for name, x in stored.items() if name.endswith(".features")}
    logits = {name.removesuffix(".logits"): x for name, x in stored.items() if name.endswith(".logits")}
    if n_near is not None and n_near < len(features["aside"]):
        chosen = torch.randperm(len(features["aside"]), generator=torch.Generator().manual_seed(0))[:n_near]
        features["aside"], logits["aside"] = features["aside"][chosen], logits["aside"][chosen]
    known, unknown = "val", [name for name in features if name == "aside" or name.startswith("far/")]
    if tests is not None:
        opened = load_file(tests)
        features |= {name.removesuffix(".features"): x for name, x in opened.items() if name.endswith(".features")}
        logits |= {name.removesuffix(".logits"): x for name, x in opened.items() if name.endswith(".logits")}
        known, unknown = "id", ["cifar100", "tin", "mnist", "texture"]
    made = {name.removeprefix("made/"): x for name, x in features.items() if name.startswith("made/")}
    logits["known"] = logits[known]
    # The first early layer is "layer1" in one network and "block1" in another.
    layers = sorted({name.rpartition(" ")[0] for name in made if name.startswith(("layer", "block"))})
    for position, layer in enumerate(layers, 1):
        for name in [name for name in made if name.startswith(f"{layer} ")]:
            new = f"mixup {position}, λ {name.rpartition(' ')[2]}"
            made[new], logits[f"made/{new}"] = made.pop(name), logits.pop(f"made/{name}")
    if "real" in features:
        made["real"] = features["real"]
    labels = stored["train.labels"]
    return World(
        name=path.stem,
        train=features["train"],
        labels=labels,
        correct=logits["train"].argmax(1) == labels,
        norms=features["train"].norm(dim=1),
        known=features[known],
        unknown={name: features[name] for name in unknown},
        made=made,
        logits=logits,
    )


@dataclass(frozen=True)
class Gradients:
    """log π (n, M) and directions (n, M, d)."""

    log_pi: Tensor
    direction: Tensor

    @classmethod
    def of(
        cls, features: Tensor, prototypes: Tensor, p_ood: Tensor, temperature: float, apart: bool = False
    ) -> Gradients:
        """Gradients with respect to each of the OOD prototypes (M, d); `apart`: each with a softmax of its own."""
        h = features.double()
        to_classes = (-torch.cdist(h, prototypes) / temperature).logsumexp(1, keepdim=True)
        offset = h[:, None] - p_ood
        norm = offset.norm(dim=2)
        to_ood = -norm / temperature
        total = torch.logaddexp(to_classes, to_ood if apart else to_ood.logsumexp(1, keepdim=True))
        return cls(to_ood - total, (offset / norm.clamp(min=1e-12)[:, :, None]).float())

    def vectors(self, log_unit: float) -> Tensor:
        """H in units of exp(log_unit), float32 (n, M·d)."""
        return (self.direction * (self.log_pi - log_unit).exp().float()[:, :, None]).flatten(1)


def nearest(queries: Tensor, stored: Tensor, k: int, rows: int = 1024) -> Tensor:
    """Distances of each query to its k nearest stored vectors, ascending, float64 (n, k)."""
    squares = stored.square().sum(1)
    found = []
    for part in torch.split(queries, rows):
        distance2 = torch.addmm(squares, part, stored.T, alpha=-2)
        best = distance2.amin(1, keepdim=True) if k == 1 else distance2.topk(k, largest=False).values
        found.append((best + part.square().sum(1, keepdim=True)).clamp(min=0).sqrt())
    return torch.cat(found).double()


def scores(
    world: World, p_ood: Tensor, temperature: float, train: Tensor, ks: tuple[int, ...], apart: bool = False
) -> dict[int, Scores]:
    """S(x) of "known" and all unknown sets, by k; `train` are the rows of the training samples to store."""

    def gradients(features: Tensor) -> Gradients:
        return Gradients.of(features, world.prototypes, p_ood, temperature, apart)

    stored = gradients(world.train[train])
    unit = float(stored.log_pi.max())
    vectors = stored.vectors(unit)
    found: dict[int, Scores] = {k: {} for k in ks}
    for name, features in {"known": world.known, **world.unknown}.items():
        pieces = torch.split(features, 4096)
        parts = [nearest(gradients(part).vectors(unit), vectors, max(ks)) for part in pieces]
        distances = torch.cat(parts)
        for k in ks:
            found[k][name] = distances[:, :k].mean(1)
    return found


def energy(logits: Tensor) -> Tensor:
    """-logsumexp of the logits, float64."""
    return -logits.double().logsumexp(1)


def confidence(logits: Tensor) -> Tensor:
    """Greatest softmax probability, float64."""
    return logits.double().softmax(1).amax(1)


def baselines(world: World, drawn: Tensor, k: int) -> dict[str, Scores]:
    """Energy, MSP, and KNN: distance to the k-th nearest of the drawn training samples, unit features."""
    unit = torch.nn.functional.normalize
    sets = {"known": world.known, **world.unknown}
    stored = unit(world.train[drawn])
    return {
        "energy": {name: energy(world.logits[name]) for name in sets},
        "MSP": {name: -confidence(world.logits[name]) for name in sets},
        f"KNN, k = {k}": {name: nearest(unit(features), stored, k)[:, -1] for name, features in sets.items()},
    }


def auroc(known: Tensor, unknown: Tensor) -> float:
    """Area under the ROC of scores, OOD positive, ties counted half."""
    ranks = rankdata(torch.cat([known, unknown]).numpy())
    n, m = len(known), len(unknown)
    return float((ranks[n:].sum() - m * (m + 1) / 2) / (n * m))


@lru_cache(maxsize=32)
def _times_drawn(name: str, n: int, replicates: int) -> Floats:
    """How often each of n images is drawn in each replicate: the same for all candidates, so that they are paired."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    drawn = rng.integers(n, size=(replicates, n))
    return np.stack([np.bincount(row, minlength=n) for row in drawn]).astype(np.float64)


def resampled_aurocs(world: str, found: Scores, unknown: str, replicates: int) -> Floats:
    """AUROC of one unknown set in each replicate of the bootstrap over images."""
    values = torch.cat([found["known"], found[unknown]]).numpy()
    n = len(found["known"])
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=-np.inf) != 0)
    counts = [_times_drawn(f"{world} known", n, replicates), np.zeros((replicates, len(values) - n))]
    known = np.concatenate(counts, axis=1)[:, order]
    counts = [np.zeros((replicates, n)), _times_drawn(f"{world} {unknown}", len(values) - n, replicates)]
    positive = np.concatenate(counts, axis=1)[:, order]
    if len(starts) < len(values):
        known, positive = (np.add.reduceat(part, starts, axis=1) for part in (known, positive))
    below = known.cumsum(1) - known / 2
    return np.asarray((positive * below).sum(1) / (n * (len(values) - n)))


def interval(values: Floats) -> list[float]:
    """2.5 and 97.5 % quantiles."""
    return [float(x) for x in np.quantile(values, [0.025, 0.975])]
