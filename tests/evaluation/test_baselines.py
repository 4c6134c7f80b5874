"""The baselines against their formulas, written out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from torch_grood.errors import GroodError
from torch_grood.evaluation import BASELINES, auroc, baseline_scores, fit_baseline


@dataclass(frozen=True)
class Fixed:
    features: Tensor
    logits: Tensor
    labels: Tensor | None = None


def outputs(n: int, seed: int) -> Fixed:
    generator = torch.Generator().manual_seed(seed)
    return Fixed(torch.randn(n, 24, generator=generator), 5 * torch.randn(n, 7, generator=generator))


TRAIN, TEST = outputs(200, 0), outputs(33, 1)


def test_logit_baselines_are_their_formulas() -> None:
    z = TEST.logits.double()
    expected = {
        "MSP": -(z.exp() / z.exp().sum(1, keepdim=True)).max(1).values,
        "MLS": -z.max(1).values,
        "energy": -z.exp().sum(1).log(),
    }
    for name, scores in expected.items():
        torch.testing.assert_close(baseline_scores(name, TRAIN, TEST), scores, rtol=1e-12, atol=1e-12)


def test_knn_is_the_50th_distance_of_normalised_features() -> None:
    a, b = (f.double() / f.double().norm(dim=1, keepdim=True) for f in (TEST.features, TRAIN.features))
    distances = (a[:, None] - b[None]).norm(dim=2).sort(dim=1).values
    torch.testing.assert_close(baseline_scores("KNN", TRAIN, TEST), distances[:, 49], rtol=1e-5, atol=1e-6)


def test_knn_takes_every_training_row() -> None:
    """Also those that carry a negative label, which pytorch-ood would drop."""
    labelled = replace(TRAIN, labels=torch.full((200,), -1))
    torch.testing.assert_close(baseline_scores("KNN", labelled, TEST), baseline_scores("KNN", TRAIN, TEST))


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline(name: str) -> None:
    """The uniform contract: float64 (n,), one sample at a time as in one batch, no sample sees another."""
    score = fit_baseline(name, TRAIN)
    scores = score(TEST)
    assert scores.shape == (33,)
    assert scores.dtype == torch.float64
    alone = torch.cat([score(Fixed(f[None], z[None])) for f, z in zip(TEST.features, TEST.logits, strict=True)])
    torch.testing.assert_close(alone, scores, rtol=1e-6, atol=1e-6)
    attached = Fixed(TEST.features.clone().requires_grad_(), TEST.logits.clone().requires_grad_())
    assert not score(attached).requires_grad


@pytest.mark.parametrize("name", BASELINES)
def test_higher_is_more_ood(name: str) -> None:
    """A confident cluster against an uncertain one elsewhere: every detector must tell them apart."""
    generator = torch.Generator().manual_seed(3)

    def cluster(n: int, axis: int, confidence: float) -> Fixed:
        features = 0.1 * torch.randn(n, 24, generator=generator)
        logits = 0.1 * torch.randn(n, 7, generator=generator)
        features[:, axis] += 3
        logits[:, 0] += confidence
        return Fixed(features, logits)

    train, known, unknown = cluster(100, 0, 8), cluster(40, 0, 8), cluster(40, 5, 0)
    score = fit_baseline(name, train)
    assert auroc(score(known), score(unknown)) == 1.0


def test_msp_does_not_saturate() -> None:
    """Logit gaps of 20 and 30 are one and the same probability in float32."""
    sure = Fixed(torch.zeros(2, 24), torch.tensor([[20.0] + [0.0] * 6, [30.0] + [0.0] * 6]))
    scores = baseline_scores("MSP", TRAIN, sure)
    assert scores[1] < scores[0]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (outputs(49, 0), TEST, r"50th nearest training sample, but there are only 49"),
        (outputs(0, 0), TEST, r"no training samples"),
        (TRAIN, outputs(0, 0), r"no scored samples"),
        (TRAIN, Fixed(torch.zeros(2, 23), torch.zeros(2, 7)), r"24 features and 7 logits a sample, got 23 and 7"),
        (TRAIN, Fixed(torch.zeros(2, 24), torch.zeros(3, 7)), r"shapes \(2, 24\) and \(3, 7\)"),
        (TRAIN, Fixed(torch.zeros(2, 24, 1), torch.zeros(2, 7)), r"expected features \(n, d\)"),
        (TRAIN, Fixed(torch.zeros(2, 24), torch.tensor([[0.0] * 7, [torch.nan] * 7])), r"logits of 1 scored.*index 1"),
        (Fixed(torch.full((60, 24), torch.inf), torch.zeros(60, 7)), TEST, r"features of 60 training.*index 0"),
    ],
)
def test_bad_outputs(train: Fixed, test: Fixed, message: str) -> None:
    with pytest.raises(GroodError, match=message):
        baseline_scores("KNN", train, test)


def test_unknown_name() -> None:
    with pytest.raises(GroodError, match="no baseline 'msp'; there are: MSP, MLS, energy, KNN"):
        fit_baseline("msp", TRAIN)
