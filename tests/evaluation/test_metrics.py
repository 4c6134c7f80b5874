"""Metrics against values worked out by hand, brute force over all pairs and thresholds, and their laws."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics as sklearn_metrics

from torch_grood.errors import GroodError
from torch_grood.evaluation import (
    aupr_id,
    aupr_ood,
    auroc,
    classifier_accuracy,
    clopper_pearson,
    detection_metrics,
    id_flagged_at_ood_caught,
    ood_accepted_at_id_kept,
    openood_metrics,
    prototype_accuracy,
)

Metric = Callable[..., float]
METRICS: list[Metric] = [auroc, aupr_ood, aupr_id, ood_accepted_at_id_kept, id_flagged_at_ood_caught]

# Few distinct values make ties common; the infinities are legal scores.
tied = st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.25, 0.5, 1.0, math.inf]), min_size=1, max_size=30)
free = st.lists(st.floats(allow_nan=False, width=64), min_size=1, max_size=30)
score_lists = st.one_of(tied, free)
levels = st.sampled_from([0.05, 0.5, 0.8, 0.9, 0.95, 1.0])


def brute_auroc(id_scores: list[float], ood_scores: list[float]) -> float:
    wins = sum((o > i) + 0.5 * (o == i) for i in id_scores for o in ood_scores)
    return wins / (len(id_scores) * len(ood_scores))


def brute_ood_accepted(id_scores: list[float], ood_scores: list[float], level: float) -> float:
    shares = [
        sum(o <= t for o in ood_scores) / len(ood_scores)
        for t in id_scores
        if sum(i <= t for i in id_scores) / len(id_scores) >= level
    ]
    return min(shares)


def brute_id_flagged(id_scores: list[float], ood_scores: list[float], level: float) -> float:
    shares = [
        sum(i >= t for i in id_scores) / len(id_scores)
        for t in ood_scores
        if sum(o >= t for o in ood_scores) / len(ood_scores) >= level
    ]
    return min(shares)


def brute_average_precision(positive: list[float], negative: list[float]) -> float:
    """Σ (R_t − R_{t−1}) P_t over the distinct thresholds, from high to low."""
    total, recall_before = 0.0, 0.0
    for t in sorted({*positive, *negative}, reverse=True):
        true, false = sum(p >= t for p in positive), sum(q >= t for q in negative)
        recall = true / len(positive)
        total += (recall - recall_before) * true / (true + false)
        recall_before = recall
    return total


@settings(max_examples=150, deadline=None)
@given(score_lists, score_lists, levels)
def test_equal_to_brute_force(id_scores: list[float], ood_scores: list[float], level: float) -> None:
    assert auroc(id_scores, ood_scores) == pytest.approx(brute_auroc(id_scores, ood_scores), abs=1e-12)
    assert ood_accepted_at_id_kept(id_scores, ood_scores, level) == brute_ood_accepted(id_scores, ood_scores, level)
    assert id_flagged_at_ood_caught(id_scores, ood_scores, level) == brute_id_flagged(id_scores, ood_scores, level)
    assert aupr_ood(id_scores, ood_scores) == pytest.approx(brute_average_precision(ood_scores, id_scores), abs=1e-12)
    mirrored = [-s for s in id_scores], [-s for s in ood_scores]
    assert aupr_id(id_scores, ood_scores) == pytest.approx(brute_average_precision(*mirrored), abs=1e-12)


def test_by_hand() -> None:
    id_scores, ood_scores = [1.0, 2.0, 3.0, 4.0], [3.5, 5.0]
    assert auroc(id_scores, ood_scores) == 7 / 8  # of 8 pairs only (4, 3.5) is the wrong way round
    assert ood_accepted_at_id_kept(id_scores, ood_scores, 0.75) == 0.0  # τ = 3 keeps three of four
    assert ood_accepted_at_id_kept(id_scores, ood_scores, 0.76) == 0.5  # τ = 4, and 3.5 passes
    assert id_flagged_at_ood_caught(id_scores, ood_scores, 0.5) == 0.0  # τ = 5
    assert id_flagged_at_ood_caught(id_scores, ood_scores, 0.51) == 0.25  # τ = 3.5 flags the 4
    assert aupr_ood(id_scores, ood_scores) == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)
    assert aupr_id(id_scores, ood_scores) == pytest.approx(3 / 4 * 1 + 1 / 4 * 4 / 5)


@settings(max_examples=150, deadline=None)
@given(score_lists, score_lists)
def test_the_whole_is_its_parts(id_scores: list[float], ood_scores: list[float]) -> None:
    metrics, openood = detection_metrics(id_scores, ood_scores), openood_metrics(id_scores, ood_scores)
    assert metrics.to_dict() == {
        "auroc": auroc(id_scores, ood_scores),
        "ood_accepted_at_95_id_kept": ood_accepted_at_id_kept(id_scores, ood_scores),
        "id_flagged_at_95_ood_caught": id_flagged_at_ood_caught(id_scores, ood_scores),
        "aupr_ood": aupr_ood(id_scores, ood_scores),
        "aupr_id": aupr_id(id_scores, ood_scores),
        "openood_fpr95": openood.fpr95,
        "openood_aupr_ood": openood.aupr_out,
        "openood_aupr_id": openood.aupr_in,
        "n_id": len(id_scores),
        "n_ood": len(ood_scores),
    }


def test_equal_to_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for values in (3, 50, 10**9):
        id_scores, ood_scores = rng.integers(0, values, 700) / 7, rng.integers(0, values, 400) / 6
        is_ood, scores = np.repeat([0, 1], [700, 400]), np.r_[id_scores, ood_scores]
        assert auroc(id_scores, ood_scores) == pytest.approx(sklearn_metrics.roc_auc_score(is_ood, scores), abs=1e-14)
        assert aupr_ood(id_scores, ood_scores) == pytest.approx(
            sklearn_metrics.average_precision_score(is_ood, scores), abs=1e-14
        )
        assert aupr_id(id_scores, ood_scores) == pytest.approx(
            sklearn_metrics.average_precision_score(1 - is_ood, -scores), abs=1e-14
        )


def openood_by_scikit_learn(id_scores: NDArray[Any], ood_scores: NDArray[Any]) -> tuple[float, float, float, float]:
    """OpenOOD's definitions: scikit-learn's curves of confidences, OOD positive; FPR, AUROC, AUPR in and out."""
    confidences, is_ood = -np.r_[id_scores, ood_scores], np.repeat([0, 1], [len(id_scores), len(ood_scores)])
    false, true, _ = sklearn_metrics.roc_curve(is_ood, -confidences)
    areas = []
    for positive, sign in ((1 - is_ood, 1), (is_ood, -1)):
        precision, recall, _ = sklearn_metrics.precision_recall_curve(positive, sign * confidences)
        areas.append(sklearn_metrics.auc(recall, precision))
    return float(false[np.argmax(true >= 0.95)]), sklearn_metrics.auc(false, true), areas[0], areas[1]


def brute_trapezoidal_aupr(positive: list[float], negative: list[float]) -> float:
    points = [(0.0, 1.0)]
    for t in sorted({*positive, *negative}, reverse=True):
        true, false = sum(p >= t for p in positive), sum(q >= t for q in negative)
        points.append((true / len(positive), true / (true + false)))
    return sum((r2 - r1) * (p1 + p2) / 2 for (r1, p1), (r2, p2) in itertools.pairwise(points))


@pytest.mark.parametrize("values", [1, 2, 5, 40, 10**12])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_openood_to_the_last_bit(values: int, dtype: type[np.floating[Any]]) -> None:
    rng = np.random.default_rng(values)
    for _ in range(40):
        n, m = rng.integers(1, 300, 2)
        id_scores = (rng.integers(0, values, n) / 7).astype(dtype)
        ood_scores = (rng.integers(0, values, m) / 7 + rng.integers(0, 2) * values / 20).astype(dtype)
        assert openood_metrics(id_scores, ood_scores) == openood_by_scikit_learn(id_scores, ood_scores)


@settings(max_examples=100, deadline=None)
@given(score_lists, score_lists)
def test_openood_by_brute_force(id_scores: list[float], ood_scores: list[float]) -> None:
    found = openood_metrics(id_scores, ood_scores)
    assert found.auroc == pytest.approx(brute_auroc(id_scores, ood_scores), abs=1e-12)
    assert found.aupr_out == pytest.approx(brute_trapezoidal_aupr(ood_scores, id_scores), abs=1e-12)
    mirrored = [-s for s in id_scores], [-s for s in ood_scores]
    assert found.aupr_in == pytest.approx(brute_trapezoidal_aupr(*mirrored), abs=1e-12)
    exact = id_flagged_at_ood_caught(id_scores, ood_scores)
    assert found.fpr95 >= exact
    if len({*id_scores, *ood_scores}) == len(id_scores) + len(ood_scores):
        assert found.fpr95 == exact


def test_openood_by_hand() -> None:
    """From the top: OOD 5, ID 4, OOD 3.5, and then ID 3, 2, 1."""
    found = openood_metrics([1.0, 2.0, 3.0, 4.0], [3.5, 5.0])
    assert (found.fpr95, found.auroc) == (0.25, 7 / 8)
    # (recall, precision): (0, 1), (1/2, 1), (1/2, 1/2), (1, 2/3), then recall stays.
    assert found.aupr_out == pytest.approx(1 / 2 * 1 + 1 / 2 * (1 / 2 + 2 / 3) / 2)
    # (3/4, 1), (3/4, 3/4), (1, 4/5), and average precision would be 3/4 + 1/4 · 4/5.
    assert found.aupr_in == pytest.approx(3 / 4 * 1 + 1 / 4 * (3 / 4 + 4 / 5) / 2)


def test_openood_passes_over_thresholds_where_scores_tie() -> None:
    """Scores 1 … 20, each of one ID and one OOD sample: the ROC curve is the diagonal, and only its ends are kept.

    At score 2, 19 of 20 OOD samples are caught and as many ID samples flagged: 0.95. OpenOOD sees the last point: 1.
    """
    scores = np.arange(1.0, 21.0)
    assert id_flagged_at_ood_caught(scores, scores) == 0.95
    assert openood_metrics(scores, scores).fpr95 == openood_by_scikit_learn(scores, scores)[0] == 1.0


def test_openood_of_constant_scores() -> None:
    """One point at recall 1 and precision m / (n + m), and the way to precision 1 at recall 0: no longer prevalence."""
    found = openood_metrics([2.0] * 6, [2.0] * 2)
    assert found == (1.0, 0.5, (6 / 8 + 1) / 2, (2 / 8 + 1) / 2)


def test_openood_stops_at_infinity_where_we_rank() -> None:
    id_scores, ood_scores = np.array([-np.inf, 0.0, 1.0]), np.array([0.5, np.inf])
    with pytest.raises(ValueError, match="infinity"), np.errstate(invalid="ignore"):
        openood_by_scikit_learn(id_scores, ood_scores)
    finite = openood_by_scikit_learn(np.array([-9.0, 0.0, 1.0]), np.array([0.5, 9.0]))
    assert openood_metrics(id_scores, ood_scores) == finite


def test_classifier_accuracy() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, -math.inf, 5.0], [1.0, 1.0, 0.0]])
    assert classifier_accuracy(logits, torch.tensor([0, 2, 1, 0])) == 0.75  # of equal logits the first counts
    assert classifier_accuracy(logits.half(), torch.tensor([1, 1, 1, 1], dtype=torch.int32)) == 0.0


def test_prototype_accuracy() -> None:
    # Their mean is (1, 1), so that the distances of (2, -7) to the first two are equal without rounding.
    prototypes = torch.tensor([[0.0, 0.0], [4.0, 0.0], [-1.0, 3.0]])
    features = torch.tensor([[1.0, 1.0], [3.0, 0.0], [1.9, 9.0], [2.1, 0.0], [2.0, -7.0]])
    assert prototype_accuracy(features, prototypes, torch.tensor([0, 1, 2, 0, 0])) == 0.8  # (2.1, 0) is nearer to 1


def test_prototype_accuracy_far_from_the_origin_and_in_blocks() -> None:
    """Of squares near 1e16 float64 keeps no difference of 1, unless they are taken from the prototypes' centre."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (9000,), generator=generator)
    prototypes = 1e8 + torch.randn(5, 3, generator=generator, dtype=torch.float64)
    features = prototypes[labels] + 0.4 * torch.randn(9000, 3, generator=generator, dtype=torch.float64)
    nearest = torch.cdist(features, prototypes, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    expected = float((nearest == labels).double().mean())
    assert 0.5 < expected < 1
    assert prototype_accuracy(features, prototypes, labels) == expected


@pytest.mark.parametrize(
    ("samples", "labels", "message"),
    [
        (torch.ones(3, 2), None, "no labels"),
        (torch.ones(0, 2), torch.empty(0, dtype=torch.int64), "no samples"),
        (torch.ones(3, 2), torch.zeros(2, dtype=torch.int64), r"\(3, 2\) and labels \(2,\)"),
        (torch.ones(3, 2), torch.zeros(3), "whole numbers, got torch.float32"),
        (torch.ones(3, 2), torch.tensor([0, 1, -1]), "1 of 3 labels are none of the 2 classes.*sample 2: -1"),
        (torch.ones(3, 2), torch.tensor([0, 2, 3]), "2 of 3 labels are none of the 2 classes.*sample 1: 2"),
        (torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), torch.tensor([0, 1]), "of 1 of 2 samples are N.*sample 1"),
    ],
)
def test_accuracies_of_bad_input(samples: torch.Tensor, labels: torch.Tensor | None, message: str) -> None:
    with pytest.raises(GroodError, match=message):
        classifier_accuracy(samples, labels)
    with pytest.raises(GroodError, match=message.replace("are N", "are not finite")):
        prototype_accuracy(samples, torch.eye(2), labels)


def test_accuracies_of_bad_shapes_and_prototypes() -> None:
    label = torch.tensor([0])
    for logits in (torch.tensor(1.0), torch.ones(1), torch.ones(1, 2, 1)):
        with pytest.raises(GroodError, match="expected logits"):
            classifier_accuracy(logits, label)
        with pytest.raises(GroodError, match=r"expected features \(n, d\)"):
            prototype_accuracy(logits, torch.eye(2), label)
    with pytest.raises(GroodError, match=r"\(1, 3\) and \(2, 2\)"):
        prototype_accuracy(torch.ones(1, 3), torch.eye(2), label)
    with pytest.raises(GroodError, match="prototype is not finite"):
        prototype_accuracy(torch.ones(1, 2), torch.tensor([[0.0, 1.0], [math.inf, 0.0]]), label)


def test_the_two_conventions_differ() -> None:
    """One OOD sample in ten looks perfectly ID: most papers see 0.1, OpenOOD sees the worst possible value."""
    id_scores, ood_scores = np.arange(1.0, 11.0), np.r_[0.0, np.arange(11.0, 20.0)]
    metrics = detection_metrics(id_scores, ood_scores)
    assert metrics.ood_accepted_at_95_id_kept == 0.1
    assert metrics.id_flagged_at_95_ood_caught == 1.0


def test_95_percent_of_20_is_19() -> None:
    """And not 20: at many n, ceil(0.95 · n) is one too high in floating point."""
    for n in range(20, 2001, 20):
        id_scores = np.arange(float(n))
        at_threshold = id_scores[n * 19 // 20 - 1]
        assert ood_accepted_at_id_kept(id_scores, [at_threshold, at_threshold + 0.5]) == 0.5
        assert id_flagged_at_ood_caught([-at_threshold, -at_threshold - 0.5], -id_scores) == 0.5


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 7), (40, 2)])
@pytest.mark.parametrize("value", [0.0, -3.0, 1e300, math.inf, -math.inf])
def test_constant_scores_tell_nothing(n: int, m: int, value: float) -> None:
    metrics = detection_metrics([value] * n, [value] * m)
    assert metrics.auroc == 0.5
    assert metrics.aupr_ood == pytest.approx(m / (n + m))
    assert metrics.aupr_id == pytest.approx(n / (n + m))
    assert metrics.ood_accepted_at_95_id_kept == 1.0
    assert metrics.id_flagged_at_95_ood_caught == 1.0


def test_perfect_and_reversed() -> None:
    low, high = [-math.inf, 0.0, 1.0], [2.0, math.inf]
    perfect, reversed_ = detection_metrics(low, high), detection_metrics(high, low)
    assert (perfect.auroc, perfect.ood_accepted_at_95_id_kept, perfect.id_flagged_at_95_ood_caught) == (1.0, 0.0, 0.0)
    assert (perfect.aupr_ood, perfect.aupr_id) == (1.0, 1.0)
    assert (reversed_.auroc, reversed_.ood_accepted_at_95_id_kept, reversed_.id_flagged_at_95_ood_caught) == (0, 1, 1)


def test_a_tie_moves_as_one_group() -> None:
    """Half of OOD ties with half of ID: keeping 95 % of ID keeps the whole tied group."""
    id_scores, ood_scores = [0.0] * 10 + [1.0] * 10, [1.0] * 10 + [2.0] * 10
    assert ood_accepted_at_id_kept(id_scores, ood_scores) == 0.5
    assert ood_accepted_at_id_kept(id_scores, ood_scores, 0.5) == 0.0
    assert id_flagged_at_ood_caught(id_scores, ood_scores) == 0.5
    assert id_flagged_at_ood_caught(id_scores, ood_scores, 0.5) == 0.0


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_the_last_bit_counts(scale: float) -> None:
    """GROOD scores span hundreds of orders of magnitude; neighbouring floats must not be taken for ties."""
    assert auroc([scale], [np.nextafter(scale, np.inf)]) == 1.0


@settings(max_examples=60, deadline=None)
@given(score_lists, score_lists, st.randoms(use_true_random=False))
def test_order_of_samples_changes_nothing(
    id_scores: list[float], ood_scores: list[float], shuffler: random.Random
) -> None:
    before = detection_metrics(id_scores, ood_scores)
    shuffler.shuffle(id_scores)
    shuffler.shuffle(ood_scores)
    assert detection_metrics(id_scores, ood_scores) == before


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-40, 40), min_size=1), st.lists(st.integers(-40, 40), min_size=1))
def test_monotone_maps_change_nothing(id_scores: list[int], ood_scores: list[int]) -> None:
    before = detection_metrics(id_scores, ood_scores)
    for transform in (np.exp, np.cbrt, lambda s: 1e6 * s - 3, lambda s: np.exp(s * 17.0)):
        assert detection_metrics(transform(np.array(id_scores)), transform(np.array(ood_scores))) == before


@given(score_lists, score_lists)
@settings(max_examples=60, deadline=None)
def test_exchanging_id_and_ood_mirrors(id_scores: list[float], ood_scores: list[float]) -> None:
    there = detection_metrics(id_scores, ood_scores)
    back = detection_metrics([-s for s in ood_scores], [-s for s in id_scores])
    assert there.auroc == pytest.approx(back.auroc, abs=1e-12)
    assert there.ood_accepted_at_95_id_kept == back.id_flagged_at_95_ood_caught
    assert there.aupr_id == pytest.approx(back.aupr_ood, abs=1e-12)


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a.tolist(),
        lambda a: a.astype(np.float32),
        lambda a: a.astype(np.int64),
        lambda a: torch.tensor(a),
        lambda a: torch.tensor(a, dtype=torch.bfloat16),
        lambda a: torch.tensor(a, requires_grad=True),
    ],
    ids=["list", "float32", "int64", "torch", "bfloat16", "requires_grad"],
)
def test_any_container(convert: Callable[[NDArray[np.float64]], Any]) -> None:
    id_scores, ood_scores = np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0])
    assert detection_metrics(convert(id_scores), convert(ood_scores)) == detection_metrics(id_scores, ood_scores)


def test_to_dict_is_json() -> None:
    metrics = detection_metrics([0.0, 1.0], [2.0])
    assert json.loads(json.dumps(metrics.to_dict())) == {
        "auroc": 1.0,
        "ood_accepted_at_95_id_kept": 0.0,
        "id_flagged_at_95_ood_caught": 0.0,
        "aupr_ood": 1.0,
        "aupr_id": 1.0,
        "openood_fpr95": 0.0,
        "openood_aupr_ood": 1.0,
        "openood_aupr_id": 1.0,
        "n_id": 2,
        "n_ood": 1,
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        metrics.auroc = 0.0  # type: ignore[misc]


@pytest.mark.parametrize("metric", [*METRICS, detection_metrics, openood_metrics])
@pytest.mark.parametrize(
    ("id_scores", "ood_scores", "message"),
    [
        ([], [1.0], r"no ID scores"),
        ([1.0], torch.empty(0), r"no OOD scores"),
        ([1.0, math.nan, 2.0], [1.0], r"1 of 3 ID scores are NaN, the first at index 1"),
        ([1.0], torch.tensor([math.nan, math.nan]), r"2 of 2 OOD scores are NaN, the first at index 0"),
        (np.zeros((2, 1)), [1.0], r"ID scores must be 1-D.*\(2, 1\)"),
        (1.0, [1.0], r"ID scores must be 1-D"),
        ([1.0], ["high"], r"OOD scores must be real numbers"),
        ([1.0], torch.tensor([1j]), r"OOD scores must be real numbers.*complex"),
        ([1.0], [None], r"OOD scores must be real numbers"),
    ],
)
def test_bad_scores(metric: Metric, id_scores: object, ood_scores: object, message: str) -> None:
    with pytest.raises(GroodError, match=message):
        metric(id_scores, ood_scores)


@pytest.mark.parametrize("metric", [ood_accepted_at_id_kept, id_flagged_at_ood_caught])
@pytest.mark.parametrize("level", [0.0, -0.1, 1.01, 95, math.nan])
def test_bad_level(metric: Metric, level: float) -> None:
    with pytest.raises(GroodError, match=r"level must be a share in \(0, 1\]"):
        metric([0.0], [1.0], level)


def test_clopper_pearson_by_hand() -> None:
    """With no event in n the upper end solves (1 − p)ⁿ = α/2; with n in n it is the mirror image."""
    low, high = clopper_pearson(0, 20)
    assert low == 0.0
    assert high == pytest.approx(1 - 0.025 ** (1 / 20))
    assert clopper_pearson(20, 20) == pytest.approx((0.025 ** (1 / 20), 1.0))
    low, high = clopper_pearson(9, 180, confidence=0.9)
    tail = sum(math.comb(180, k) * low**k * (1 - low) ** (180 - k) for k in range(9, 181))
    assert tail == pytest.approx(0.05)
    tail = sum(math.comb(180, k) * high**k * (1 - high) ** (180 - k) for k in range(10))
    assert tail == pytest.approx(0.05)


@pytest.mark.parametrize("arguments", [(1, 0), (-1, 5), (6, 5), (1, 5, 0.0), (1, 5, 1.0), (1, 5, 95)])
def test_clopper_pearson_bad_input(arguments: tuple[int, int]) -> None:
    with pytest.raises(GroodError):
        clopper_pearson(*arguments)
