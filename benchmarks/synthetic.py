"""Features like those of a ResNet-50 on ImageNet-1k, of any number, from a generator.

They are synthetic, and every figure measured on them says so. A sample's latent is its class's (a tree of 30 groups,
200 subgroups, 1,000 classes, in 64 dimensions) plus variation within the class in 40 directions of decaying weight,
whose size varies from sample to sample; a random network of two layers bends it into 2,048 features; a ReLU makes them
sparse. Classes 1,000 to 1,099 come from the same tree and have no training samples: the near-OOD set.

What is matched, and to what (`python benchmarks/synthetic.py` prints it):

- accuracy of the nearest class prototype: about that of the network on test images, 76 %;
- mean activation about 0.4, its 90th percentile about 1, a norm near 29: known of torchvision's ResNet-50;
- intrinsic dimension (TwoNN; Facco et al. 2017) of 17 to 19, as measured on the penultimate features of the real
  CIFAR-10 networks; it decides how near the nearest of N neighbours is, and so how hard the search is;
- 90 % of the variance in some 350 principal directions: the features fill far more directions than their intrinsic
  dimension, as real ones do, because the manifold is bent.

`hard=True` drops the bent manifold: Gaussian variation in 512 directions, whose neighbours are all about equally far
(intrinsic dimension 45). No real network that was looked at is like this; it shows where bounds end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

N_CLASSES, N_UNSEEN, N_FEATURES = 1000, 100, 2048
_LATENT, _WITHIN, _HIDDEN = 64, 40, 512


class SyntheticImageNet:
    """The generator; the same seed gives the same classes.

    Args:
        hard: see the module's docstring.
        seed: of the classes and the network.
    """

    def __init__(self, *, hard: bool = False, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.hard = hard
        latent = 512 if hard else _LATENT
        n_classes = N_CLASSES + N_UNSEEN
        groups, subgroups, own = normal(30, latent), normal(200, latent), normal(n_classes, latent)
        group = torch.randint(30, (200,), generator=generator)
        subgroup = torch.randint(200, (n_classes,), generator=generator)
        self._centres = (
            math.sqrt(0.35) * groups[group[subgroup]] + math.sqrt(0.35) * subgroups[subgroup] + math.sqrt(0.3) * own
        )
        if hard:
            weight = torch.arange(1, latent + 1) ** -0.5
            self._centres *= (0.22 * weight / weight.sum()).sqrt()
            weight = 1 / torch.arange(1, latent + 1)
            self._within = torch.diag((0.68 * weight / weight.sum()).sqrt())
            self._out = normal(latent, N_FEATURES)
        else:
            within = normal(_WITHIN, latent) * torch.arange(1, _WITHIN + 1)[:, None] ** -0.5
            self._within = 1.2 * math.sqrt(latent) * within / within.norm()
            self._in, self._bias = normal(latent, _HIDDEN) / math.sqrt(latent), 0.3 * normal(_HIDDEN)
            self._out = 1.6 * normal(_HIDDEN, N_FEATURES) / math.sqrt(_HIDDEN)

    def features(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Features float32 (n, 2048) of samples of the given classes, int64 (n,), 0 … 1,099."""
        n = len(labels)
        size = (0.3 * torch.randn(n, 1, generator=generator)).exp()
        latent = self._centres[labels] + size * (torch.randn(n, len(self._within), generator=generator) @ self._within)
        if self.hard:
            values = latent @ self._out
            values += math.sqrt(0.1) * torch.randn(n, N_FEATURES, generator=generator)
            return 0.43 * torch.relu_(values.add_(0.6)) ** 1.5
        hidden = torch.relu_(latent @ self._in + self._bias)
        values = (hidden - 0.45) @ self._out
        values += 0.15 * torch.randn(n, N_FEATURES, generator=generator)
        return 0.47 * torch.relu_(values.add_(0.45))

    def training_set(self, n: int, seed: int = 1, chunk: int = 8192) -> Iterator[tuple[Tensor, Tensor]]:
        """(features, labels) in parts, classes equally frequent; the same seed gives the same parts again."""
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, n, chunk):
            labels = torch.arange(start, min(start + chunk, n)) % N_CLASSES
            yield self.features(labels, generator), labels

    def queries(self, n: int, seed: int = 2) -> tuple[Tensor, Tensor]:
        """n features of seen classes (ID) and n of unseen ones (near-OOD)."""
        generator = torch.Generator().manual_seed(seed)
        seen = torch.randint(0, N_CLASSES, (n,), generator=generator)
        unseen = torch.randint(N_CLASSES, N_CLASSES + N_UNSEEN, (n,), generator=generator)
        return self.features(seen, generator), self.features(unseen, generator)


def intrinsic_dimension(features: Tensor, n_queries: int = 2000) -> float:
    """TwoNN: the maximum-likelihood estimate from the ratios of the distances to the two nearest neighbours."""
    nearest = torch.cdist(features[:n_queries].double(), features.double()).topk(3, largest=False).values[:, 1:]
    ratio = (nearest[:, 1] / nearest[:, 0])[nearest[:, 0] > 0].log()
    # The largest tenth is cut off, as its authors do.
    kept = ratio.sort().values[: int(0.9 * len(ratio))]
    return float(len(kept) / (kept.sum() + (len(ratio) - len(kept)) * kept[-1]))


def describe(source: SyntheticImageNet, n: int = 32_000) -> dict[str, float]:
    """The properties that the module's docstring names, from n training samples and 2,000 others."""
    parts = list(source.training_set(n))
    features, labels = (torch.cat(field) for field in zip(*parts, strict=True))
    prototypes = torch.zeros(N_CLASSES, N_FEATURES).index_add_(0, labels, features)
    prototypes /= torch.bincount(labels)[:, None]
    generator = torch.Generator().manual_seed(3)
    truth = torch.randint(0, N_CLASSES, (2000,), generator=generator)
    other = source.features(truth, generator)
    spectrum = torch.linalg.svdvals(features[:6000] - features.mean(0)).square()
    return {
        "prototype accuracy": float((torch.cdist(other, prototypes).argmin(1) == truth).double().mean()),
        "mean activation": float(features.mean()),
        "90th percentile": float(features[:1000].flatten().kthvalue(int(0.9 * 1000 * N_FEATURES)).values),
        "norm": float(features.norm(dim=1).mean()),
        "distance within a class": float((features - prototypes[labels]).norm(dim=1).mean()),
        "distance of the prototypes from their mean": float((prototypes - prototypes.mean(0)).norm(dim=1).mean()),
        "intrinsic dimension": intrinsic_dimension(features),
        "directions with 90 % of the variance": int((spectrum.cumsum(0) < 0.9 * spectrum.sum()).sum()) + 1,
    }


if __name__ == "__main__":
    for hard in (False, True):
        print("hard:" if hard else "standard:")
        for name, value in describe(SyntheticImageNet(hard=hard)).items():
            print(f"  {name:45s} {value:.4g}")
