"""The bootstrap against brute-force resampling, DeLong's formula, and simulated truth."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scored_methods import two_methods, values

from torch_grood.evaluation import (
    FIGURES,
    Bootstrap,
    ScoreSets,
    bootstrap,
    delong,
    delong_difference,
    detection_metrics,
    paired_bootstrap,
    resampling_counts,
)


def test_a_bootstrap_is_brute_force_resampling() -> None:
    """`np.repeat` and the metrics themselves on the same counts; only the sums of AUPR are rounded elsewhere."""
    for scores in two_methods(n=41, sizes=(20, 57)):
        found = bootstrap(scores, 60, seed=3)
        streams = {name: resampling_counts(m, seed=3, stream=name) for name, m in scores.sizes.items()}
        for draw, of_id in zip(range(60), resampling_counts(41, seed=3), strict=False):
            for name, ood in scores.ood_scores.items():
                drawn = np.repeat(ood, next(streams[name]))
                expected = detection_metrics(np.repeat(scores.id_scores, of_id), drawn).to_dict()
                got = dict(zip(FIGURES, found.replicates[name][draw], strict=True))
                assert all(got[figure] == expected[figure] for figure in FIGURES[:3])
                assert got == pytest.approx({figure: expected[figure] for figure in FIGURES}, abs=1e-13)


@settings(max_examples=60, deadline=None)
@given(st.lists(values, min_size=1, max_size=12), st.lists(values, min_size=1, max_size=12), st.integers(0, 5))
def test_a_bootstrap_of_few_and_tied_scores(id_scores: list[float], ood_scores: list[float], seed: int) -> None:
    scores = ScoreSets(id_scores, {"a": ood_scores})
    found = bootstrap(scores, 5, seed=seed).replicates["a"]
    of_id, of_ood = (
        resampling_counts(len(id_scores), seed=seed),
        resampling_counts(len(ood_scores), seed=seed, stream="a"),
    )
    for row in found:
        expected = detection_metrics(
            np.repeat(scores.id_scores, next(of_id)), np.repeat(scores.ood_scores["a"], next(of_ood))
        ).to_dict()
        assert tuple(row) == pytest.approx([expected[figure] for figure in FIGURES], abs=1e-13)


def test_counts_are_draws_with_replacement() -> None:
    """Counts sum to n; each is binomial(n, 1/n), and two of them have the covariance −1/n."""
    n, draws = 10, 4000
    counts = np.array(list(itertools.islice(resampling_counts(n, seed=1), draws)))
    assert (counts.sum(1) == n).all()
    assert counts.mean(0) == pytest.approx(np.ones(n), abs=0.08)
    covariance = np.cov(counts.T)
    assert np.diag(covariance) == pytest.approx(np.full(n, 1 - 1 / n), abs=0.12)
    assert covariance[np.triu_indices(n, 1)] == pytest.approx(np.full(n * (n - 1) // 2, -1 / n), abs=0.08)
    other = np.array(list(itertools.islice(resampling_counts(n, seed=1, stream="a"), draws)))
    assert abs(np.corrcoef(counts[:, 0], other[:, 0])[0, 1]) < 0.06


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    first, _ = two_methods()

    def drawn(seed: int) -> bytes:
        return b"".join(array.tobytes() for array in bootstrap(first, 20, seed=seed).replicates.values())

    assert drawn(7) == drawn(7) != drawn(8)


def test_a_set_is_drawn_alike_whatever_other_sets_there_are() -> None:
    first, _ = two_methods()
    alone = bootstrap(ScoreSets(first.id_scores, {"b": first.ood_scores["b"]}), 30)
    assert (alone.replicates["b"] == bootstrap(first, 30).replicates["b"]).all()
    again = ScoreSets(first.id_scores, {"a": first.ood_scores["a"], "x": first.ood_scores["a"]})
    twins = bootstrap(again, 30).replicates
    assert (twins["a"] != twins["x"]).any()


def test_estimates_of_the_bootstrap() -> None:
    found = bootstrap(two_methods()[0], 400)
    assert found.draws == 400
    for i, figure in enumerate(FIGURES):
        column = (found.replicates["a"][:, i] + found.replicates["b"][:, i]) / 2
        mean = found.estimate(figure, confidence=0.9)
        assert mean == found.estimate(figure, ("a", "b"), confidence=0.9)
        assert mean.value == pytest.approx(sum(m.to_dict()[figure] for m in found.observed.values()) / 2)
        assert mean.standard_error == pytest.approx(column.std(ddof=1))
        assert (mean.low, mean.high) == (
            pytest.approx(np.quantile(column, 0.05)),
            pytest.approx(np.quantile(column, 0.95)),
        )
        assert mean.low < mean.value < mean.high
        assert found.estimate(figure, "a").value == found.observed["a"].to_dict()[figure]
        assert set(mean.to_dict()) == {"value", "standard_error", "low", "high"}


def made(seed: int, **of_set: list[float]) -> Bootstrap:
    """As if these had been the AUROC of the draws; the observed one is the first."""
    observed = detection_metrics([0.0], [1.0])
    return Bootstrap(
        seed,
        1,
        dict.fromkeys(of_set, 1),
        {name: dataclasses.replace(observed, auroc=drawn[0]) for name, drawn in of_set.items()},
        {name: np.repeat(np.array(drawn)[:, None], len(FIGURES), 1) for name, drawn in of_set.items()},
    )


def test_p_value_of_the_paired_bootstrap_by_hand() -> None:
    """Of 19 differences two are not above 0, one of them 0: p = 2 · (1 + 2) / 20."""
    found = paired_bootstrap(made(0, a=[0.5] * 17 + [0.3, 0.1]), made(0, a=[0.3] * 19), "auroc", confidence=0.5)
    assert (found.value, found.p) == (pytest.approx(0.2), pytest.approx(0.3))
    assert found.z == pytest.approx(found.value / found.standard_error)
    always = paired_bootstrap(made(0, a=[0.5] * 19), made(0, a=[0.3] * 19), "auroc", confidence=0.5)
    assert (always.z, always.p) == (math.inf, pytest.approx(2 / 20))


def test_bootstrap_and_delong_agree() -> None:
    first, second = two_methods(n=800, sizes=(600, 900))
    drawn = bootstrap(first, 1500), bootstrap(second, 1500)
    for group in ("a", None):
        pairs = [
            (delong(first, group), drawn[0].estimate("auroc", group)),
            (delong_difference(first, second, group), paired_bootstrap(*drawn, "auroc", group)),
        ]
        for by_formula, by_draws in pairs:
            error = by_formula.standard_error
            assert by_draws.value == pytest.approx(by_formula.value, abs=1e-15)
            assert by_draws.standard_error == pytest.approx(error, rel=0.08)
            assert by_draws.low == pytest.approx(by_formula.low, abs=0.25 * error)
            assert by_draws.high == pytest.approx(by_formula.high, abs=0.25 * error)


@pytest.mark.slow
def test_the_bootstrap_covers_the_truth() -> None:
    """OOD above an ID threshold: for normal scores Φ(shift − 1.645) is caught when 95 % of ID is kept."""
    rng, experiments, shift = np.random.default_rng(0), 300, 2.0
    truth = {
        "auroc": stats.norm.cdf(shift / math.sqrt(2)),
        "ood_accepted_at_95_id_kept": stats.norm.cdf(stats.norm.ppf(0.95) - shift),
        "id_flagged_at_95_ood_caught": stats.norm.cdf(stats.norm.ppf(0.95) - shift),
    }
    hits = dict.fromkeys(truth, 0)
    for seed in range(experiments):
        scores = ScoreSets(rng.normal(0, 1, 300), {"a": rng.normal(shift, 1, 300)})
        found = bootstrap(scores, 300, seed=seed)
        for figure, value in truth.items():
            interval = found.estimate(figure)
            hits[figure] += interval.low <= value <= interval.high
    assert all(0.91 <= count / experiments <= 0.985 for count in hits.values()), hits
