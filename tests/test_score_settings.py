"""GROOD with other settings than the paper's: the source of highest energy, unit features, the mean of k distances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_grood import GROOD, GroodError, HighEnergy, Mixup, PrototypeMean
from torch_grood.outliers import PAPER, HighestEnergy, outlier_source


def training(n: int = 240, d: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features of three classes, labels, and logits that get most of them right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = 3 * torch.rand(3, d, generator=generator)
    features = (centres[labels] + torch.randn(n, d, generator=generator)).clamp(min=0)
    logits = -torch.cdist(features, centres)
    return features, labels, logits


def plain(
    features: Tensor, labels: Tensor, logits: Tensor, queries: Tensor, *, n: int, shrink: float, k: int
) -> Tensor:
    """The whole method again, line by line, in float64."""

    def unit(h: Tensor) -> Tensor:
        return h.double() / h.double().norm(dim=1, keepdim=True)

    h = unit(features)
    prototypes = torch.stack([h[labels == c].mean(0) for c in range(3)])
    energy = -torch.logsumexp(logits.double(), 1)
    p_ood = shrink * h[energy.argsort(descending=True)[:n]].mean(0)
    temperature = (h - prototypes[labels]).square().sum(1).mean().sqrt()

    def gradients(h: Tensor) -> Tensor:
        offset = h - p_ood
        distances = torch.cat([torch.cdist(h, prototypes), offset.norm(dim=1, keepdim=True)], dim=1)
        return (-distances / temperature).softmax(1)[:, -1:] * offset / offset.norm(dim=1, keepdim=True)

    stored = gradients(h[logits.argmax(1) == labels])
    distances = torch.cdist(gradients(unit(queries)), stored, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.topk(k, largest=False).values.mean(1)


@pytest.mark.parametrize(("n", "shrink", "k"), [(100, 0.5, 10), (7, 1.0, 1), (30, 0.0, 3)])
def test_scores_are_those_of_the_plain_formula(n: int, shrink: float, k: int) -> None:
    features, labels, logits = training()
    queries = training(50, seed=1)[0] + 0.1
    detector = GROOD(None, outliers=HighEnergy(n, shrink), k=k).fit_features(features, labels, logits=logits)
    expected = plain(features, labels, logits, queries, n=n, shrink=shrink, k=k)
    torch.testing.assert_close(detector.score_features(queries), expected, rtol=2e-6, atol=1e-12)


def test_the_source_brings_its_settings_and_the_paper_its_own() -> None:
    model = nn.Linear(4, 3)
    default = GROOD(model)
    assert default.outliers == HighEnergy()
    assert (default.settings.geometry, default.settings.k) == ("unit", 10)
    assert GROOD(model, outliers=Mixup()).settings == PAPER
    assert GROOD(None).outliers == PrototypeMean()
    paper = GROOD.paper(model, seed=3)
    assert (paper.outliers, paper.seed) == (Mixup(), 3)
    assert (paper.settings.geometry, paper.settings.temperature, paper.settings.k) == ("raw", 1.0, 1)
    mixed = GROOD(model, outliers=Mixup(), geometry="unit", temperature=0.2, k=4).settings
    assert (mixed.geometry, mixed.temperature, mixed.k) == ("unit", 0.2, 4)
    assert GROOD(model, geometry="raw").settings.temperature == 1.0


def test_the_same_through_a_model_and_through_features() -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    images = torch.randn(300, 5, generator=generator)
    labels = model(images).argmax(1)
    labels[::7] = (labels[::7] + 1) % 3
    batches = [(images[i : i + 32], labels[i : i + 32]) for i in range(0, 300, 32)]
    detector = GROOD(model).fit(batches)
    found = detector.extract(batches)
    alone = GROOD(None, outliers=HighEnergy()).fit_features(found.features, labels, logits=found.logits)
    torch.testing.assert_close(detector.ood_prototype_, alone.ood_prototype_, rtol=1e-12, atol=0)
    # T is a sum over batches, and the network's own rounding depends on them.
    torch.testing.assert_close(detector.score(images), alone.score_features(found.features), rtol=1e-4, atol=1e-6)
    again = GROOD(model).fit(batches[::-1])
    torch.testing.assert_close(again.score(images), detector.score(images), rtol=1e-4, atol=1e-6)


@settings(max_examples=20)
@given(st.floats(-4, 4))
def test_the_scale_of_the_features_does_not_matter(exponent: float) -> None:
    features, labels, logits = training()
    queries = training(20, seed=1)[0]
    scale = 10.0**exponent
    small = GROOD(None, outliers=HighEnergy()).fit_features(features.double(), labels, logits=logits)
    large = GROOD(None, outliers=HighEnergy()).fit_features(features.double() * scale, labels, logits=logits)
    torch.testing.assert_close(
        large.score_features(queries.double() * scale), small.score_features(queries.double()), rtol=1e-5, atol=1e-9
    )


def test_a_file_keeps_them(tmp_path: Path) -> None:
    features, labels, logits = training()
    detector = GROOD(None, outliers=HighEnergy(20, 0.7)).fit_features(features, labels, logits=logits)
    detector.calibrate_features(training(60, seed=2)[0] + 0.01, fpr=0.1)
    detector.save(tmp_path / "d.grood")
    loaded = GROOD.load(tmp_path / "d.grood")
    assert loaded.settings == detector.settings
    assert loaded.fit_info_ == detector.fit_info_
    assert loaded.outliers == HighEnergy(20, 0.7)
    queries = training(30, seed=3)[0]
    for mine, other in zip(detector.predict_features(queries), loaded.predict_features(queries), strict=True):
        assert (mine is None and other is None) or torch.equal(mine, other)


def test_fewer_gradients_than_k() -> None:
    features, labels, logits = training(12)
    detector = GROOD(None, outliers=HighEnergy(), k=10).fit_features(features, labels, logits=logits)
    stored = detector.fit_info_.n_indexed
    assert detector.fit_info_.k == min(10, stored)
    assert detector.score_features(features).isfinite().all()
    detector.remove(list(range(3, 12)))
    assert detector.fit_info_.k == detector.fit_info_.n_indexed
    assert detector.score_features(features).isfinite().all()


def test_adding_never_raises_a_score() -> None:
    features, labels, logits = training()
    queries = training(40, seed=1)[0]
    detector = GROOD(None, outliers=HighEnergy()).fit_features(features, labels, logits=logits)
    before = detector.score_features(queries)
    more, more_labels, _ = training(100, seed=5)
    detector.add_features(more, more_labels)
    assert (detector.score_features(queries) <= before * (1 + 1e-12)).all()


def test_training_samples_are_known_although_their_score_is_not_zero() -> None:
    features, labels, logits = training()
    detector = GROOD(None, outliers=HighEnergy()).fit_features(features, labels, logits=logits)
    assert (detector.score_features(features) > 0).any()
    with pytest.raises(GroodError, match="calibration samples are training samples"):
        detector.calibrate_features(features, fpr=0.1)


def test_explanations_have_the_score_and_its_neighbours() -> None:
    features, labels, logits = training()
    queries = training(20, seed=1)[0]
    detector = GROOD(None, outliers=HighEnergy()).fit_features(features, labels, logits=logits)
    for k in (1, 5, 10, 15):
        found = detector.explain_features(queries, k=k)
        assert torch.equal(found.log_score, detector.log_score_features(queries))
        assert torch.equal(found.neighbor[:, 0], detector.assess_features(queries).neighbor)
        assert found.neighbor.shape == (20, k)
    torch.testing.assert_close(found.neighbor_log_distance[:, :10].exp().mean(1), found.log_score.exp())
    # Distances are those between unit vectors.
    assert (found.prototype_distance < 2).all()
    assert (found.ood_distance < 2).all()


def test_highest_energy_is_a_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    features, logits = torch.randn(500, 3, generator=generator), torch.randn(500, 4, generator=generator)
    sample = HighestEnergy(25)
    for rows in torch.randperm(500, generator=generator).split(37):
        sample.offer(features[rows], logits[rows])
    order = (-logits.double().logsumexp(1)).argsort(descending=True)
    found = sample.features(20)
    assert found is not None
    assert torch.equal(found, features[order[:20]])
    assert HighestEnergy(0).features(5) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"geometry": "cosine"}, "geometry must be"),
        ({"temperature": 0}, "temperature is what distances are divided by"),
        ({"temperature": float("nan")}, "temperature is what distances are divided by"),
        ({"temperature": True}, "temperature is what distances are divided by"),
        ({"k": 0}, "k is a number of nearest gradients"),
        ({"k": 2.5}, "k is a number of nearest gradients"),
    ],
)
def test_settings_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(GroodError, match=message):
        GROOD(None, **arguments)


@pytest.mark.parametrize("shrink", [-0.1, 1.1, float("nan"), True, "half"])
def test_shrink_is_a_share(shrink: Any) -> None:
    with pytest.raises(GroodError, match="shrink is what the mean is multiplied by"):
        HighEnergy(shrink=shrink)


def test_without_logits_it_says_what_to_do() -> None:
    features, labels, _ = training()
    with pytest.raises(GroodError, match=r"needs the logits.*logits=…"):
        GROOD(None, outliers=HighEnergy()).fit_features(features, labels)


@pytest.mark.parametrize("logits", [torch.zeros(240, 2), torch.zeros(239, 3), torch.zeros(240), "x"])
def test_logits_of_another_shape(logits: Any) -> None:
    features, labels, _ = training()
    with pytest.raises(GroodError, match="expected"):
        GROOD(None, outliers=HighEnergy()).fit_features(features, labels, logits=logits)


def test_logits_that_are_not_finite() -> None:
    features, labels, logits = training()
    logits[3, 1] = torch.nan
    with pytest.raises(GroodError, match="a logit is NaN or infinite"):
        GROOD(None, outliers=HighEnergy()).fit_features(features, labels, logits=logits)


def test_the_source_is_made_again_from_its_description() -> None:
    assert outlier_source(HighEnergy(50, 0.3).config()) == HighEnergy(50, 0.3)
