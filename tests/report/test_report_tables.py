"""The tables of a report, against the figures that they show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from report_world import scored
from scipy.stats import beta, betabinom

from torch_grood import ConformalThreshold, GroodError
from torch_grood._conformal import exceedance_p_value, rank_of
from torch_grood.evaluation.inference import ScoreSets, bootstrap, delong
from torch_grood.evaluation.metrics import clopper_pearson, detection_metrics
from torch_grood.evaluation.tables import Grid
from torch_grood.report.sets import ScoredSet
from torch_grood.report.tables import class_grid, detection_grid, exceedance, flagged_share, promise_grid, share

RANDOM = np.random.default_rng(0)
KNOWN = scored("known", "known", RANDOM.uniform(0, 0.7, 200))
NEAR = [scored(f"near {i}", "near", RANDOM.uniform(0.2, 1, 60 + i)) for i in range(2)]
FAR = scored("far", "far", RANDOM.uniform(0.6, 1, 30))


def texts(grid: Grid) -> list[list[str]]:
    return [[cell.text for cell in row] for row in grid.rows]


def interval(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} ({100 * low:.1f} to {100 * high:.1f})"


# --- Unknown from known -------------------------------------------------------------------------------------------


def test_detection_figures_are_those_of_the_metrics() -> None:
    grid = detection_grid(KNOWN, [NEAR[0], FAR, NEAR[1]], 60, 3)
    rows = texts(grid)
    assert [row[0] for row in rows] == ["near 0", "near 1", "mean of near", "far"]
    assert [row[1] for row in rows] == ["60", "61", "121", "30"]
    assert [cells[0].bold for cells in grid.rows] == [False, False, True, False]
    assert all(len(row) == len(grid.headings) for row in rows)
    scores = ScoreSets(KNOWN.score, {"0": NEAR[0].score, "1": FAR.score, "2": NEAR[1].score})
    drawn = bootstrap(scores, 60, seed=3)
    for row, names, sets in (
        (rows[0], ["0"], [NEAR[0]]),
        (rows[2], ["0", "2"], NEAR),
        (rows[3], ["1"], [FAR]),
    ):
        metrics = [detection_metrics(KNOWN.score, one.score) for one in sets]
        found = delong(scores, names)
        assert row[2] == interval(np.mean([one.auroc for one in metrics]), found.low, found.high)
        for column, figure in ((3, "ood_accepted_at_95_id_kept"), (4, "id_flagged_at_95_ood_caught")):
            estimate = drawn.estimate(figure, names)
            assert row[column] == interval(
                float(np.mean([getattr(one, figure) for one in metrics])), estimate.low, estimate.high
            )
    assert rows[3][5] == interval(1.0, *clopper_pearson(30, 30))
    assert rows[2][5] == share(float(np.mean([(one.score > 0.5).mean() for one in NEAR])))


def test_both_conventions_are_told_apart() -> None:
    # 10 known at 0.1, … 1.0; of the unknown ones 95 % lie above 0.5: half of the known ones are above, too.
    known = scored("known", "known", np.linspace(0.1, 1, 10))
    unknown = scored("u", "unknown", [0.5] * 99 + [0.05])
    row = texts(detection_grid(known, [unknown], 0, 0))[0]
    metrics = detection_metrics(known.score, unknown.score)
    assert row[3] == share(metrics.ood_accepted_at_95_id_kept) == "100.0"
    assert row[4] == share(metrics.id_flagged_at_95_ood_caught) == "60.0"


def test_without_draws_or_decisions() -> None:
    undecided = scored("u", "far", FAR.score, is_ood=None)
    rows = texts(detection_grid(KNOWN, [undecided, scored("v", "far", FAR.score, is_ood=None)], 0, 0))
    assert all("(" not in row[3] and "(" not in row[4] for row in rows)
    assert [row[5] for row in rows] == ["–", "–", "–"]


@pytest.mark.parametrize("sizes", [(1, 5), (5, 1), (1, 1)])
def test_one_image_has_no_variance_and_no_interval(sizes: tuple[int, int]) -> None:
    known, unknown = scored("k", "known", np.linspace(0.1, 0.2, sizes[0])), scored("u", "near", [0.9] * sizes[1])
    assert texts(detection_grid(known, [unknown], 50, 0))[0][2] == "100.0"


def test_sets_of_one_name_do_not_mix() -> None:
    # A caller of the library may do that; the command may not.
    rows = texts(detection_grid(KNOWN, [scored("x", "near", [0.0] * 5), scored("x", "near", [1.0] * 5)], 0, 0))
    assert [row[2].split()[0] for row in rows] == ["0.0", "100.0", "50.0"]


# --- False alarms -------------------------------------------------------------------------------------------------


def threshold(n: int = 99, fpr: float = 0.1, groups: torch.Tensor | None = None) -> ConformalThreshold:
    log_scores = torch.log(torch.arange(1, n + 1, dtype=torch.float64))
    return ConformalThreshold.fit(log_scores, fpr, groups)


def decided(limit: ConformalThreshold, score: np.ndarray, label: np.ndarray | None = None) -> ScoredSet:
    groups = None if label is None else torch.from_numpy(label)
    logs = torch.from_numpy(np.log(score))
    changes = {} if label is None else {"prototype_label": label}
    return scored(
        "k",
        "known",
        score,
        p_value=limit.p_values(logs, groups).numpy(),
        is_ood=limit.is_ood(logs, groups).numpy(),
        **changes,
    )


def test_promises_are_those_of_the_threshold() -> None:
    limit = threshold(fpr=0.07)
    known = decided(limit, RANDOM.uniform(1, 110, 500))
    grid = promise_grid(known, limit)
    assert grid is not None
    assert known.p_value is not None
    rows = texts(grid)
    assert [row[0] for row in rows] == ["1", "2", "5", "7", "10", "20"]
    assert [row[0].bold for row in grid.rows] == [False, False, False, True, False, False]
    for row in rows:
        rate = float(row[0]) / 100
        low, high = limit.at(rate).band()
        rank = rank_of(rate, 99)
        assert (low, high) == pytest.approx(tuple(beta.ppf([0.025, 0.975], rank, 100 - rank)), abs=1e-9)
        assert row[1] == f"{share(low)} to {share(high)}"
        # The same count by the threshold itself, not by p-values.
        count = int(limit.at(rate).is_ood(torch.from_numpy(np.log(known.score))).sum())
        assert row[2] == f"{count:,}"
        assert row[3] == share(count / 500)
        assert row[4] == " to ".join(map(share, clopper_pearson(count, 500)))


def test_rates_that_the_calibration_cannot_promise_are_left_out() -> None:
    limit = threshold(n=15)
    grid = promise_grid(decided(limit, np.arange(1.0, 20.0)), limit)
    assert grid is not None
    assert [row[0] for row in texts(grid)] == ["10", "20"]
    with pytest.raises(GroodError):
        limit.at(0.05)


def test_thresholds_of_classes_have_no_common_band() -> None:
    groups = torch.arange(99) % 3
    limit = threshold(groups=groups)
    known = decided(limit, RANDOM.uniform(1, 110, 90), np.arange(90) % 3)
    grid = promise_grid(known, limit)
    assert grid is not None
    assert {row[1] for row in texts(grid)} == {"–"}


def test_no_promise_without_p_values() -> None:
    assert promise_grid(KNOWN, threshold()) is None


# --- Is the promise kept? -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 19, 99, 1000])
@pytest.mark.parametrize("images", [1, 7, 300])
def test_exceedance_is_scipy_s_law(n: int, images: int) -> None:
    rate = 0.5 if n == 1 else 0.1
    rank = rank_of(rate, n)
    law = betabinom(images, rank, n + 1 - rank)
    for flagged in range(0, images + 1, max(1, images // 7)):
        found = exceedance_p_value(rate, {0: n}, {0: images}, flagged)
        assert found == pytest.approx(law.sf(flagged - 1), rel=1e-9, abs=1e-12)
    assert exceedance_p_value(rate, {0: n}, {0: images}, 0) == pytest.approx(1)
    assert 0 < exceedance_p_value(rate, {0: n}, {0: images}, images) < 1


def test_exceedance_of_groups_is_that_of_their_sum() -> None:
    sizes, counts = {0: 19, 1: 40, 2: 9}, {0: 3, 1: 2, 5: 4}
    first, second = (
        betabinom.pmf(
            np.arange(count + 1), count, rank_of(0.1, sizes[group]), sizes[group] + 1 - rank_of(0.1, sizes[group])
        )
        for group, count in ((0, 3), (1, 2))
    )
    joint = np.outer(first, second)
    for flagged in range(7):
        # Group 5 has no calibration and flags nothing; group 2 has no image.
        expected = sum(joint[i, j] for i in range(4) for j in range(3) if i + j >= flagged)
        assert exceedance_p_value(0.1, sizes, counts, flagged) == pytest.approx(expected, abs=1e-12)


def test_nothing_seen_is_no_surprise() -> None:
    assert exceedance_p_value(0.1, {0: 19}, {}, 0) == 1
    assert exceedance_p_value(0.1, {0: 19}, {}, 1) == 0


def test_large_sets_neither_overflow_nor_vanish() -> None:
    law = betabinom(50_000, 500, 9501)
    found = exceedance_p_value(0.05, {0: 10_000}, {0: 50_000}, 2700)
    assert found == pytest.approx(law.sf(2699), rel=1e-6)
    assert 0 < found < 0.5


@pytest.mark.parametrize("groups", [1, 3])
def test_exceedance_is_the_chance_over_calibrations(groups: int) -> None:
    """Simulated: new calibrations and new images of one law; so many flagged are as rare as told."""
    random = np.random.default_rng(groups)
    label = np.arange(30) % groups
    held_out = torch.arange(19 * groups) % groups
    values = []
    for _ in range(1500):
        limit = ConformalThreshold.fit(
            torch.from_numpy(random.normal(size=19 * groups)), 0.1, None if groups == 1 else held_out
        )
        known = decided(limit, np.exp(random.normal(size=30)), None if groups == 1 else label)
        values.append(exceedance(known, limit))
    found = np.array(values)
    for level in (0.02, 0.1, 0.3, 0.6):
        # A p-value: at most so often below; and not idle: its law has steps, so that the largest step below counts.
        assert (found <= level).mean() <= level + 3 * np.sqrt(level * (1 - level) / 1500)
        reached = found[found <= level].max()
        assert (found <= reached).mean() == pytest.approx(reached, abs=4 * np.sqrt(reached / 1500))


# --- Classes ------------------------------------------------------------------------------------------------------


def test_classes_add_up() -> None:
    random = np.random.default_rng(1)
    truth, label = random.integers(0, 4, 300), random.integers(0, 4, 300)
    known = scored("known", "known", random.uniform(0, 0.7, 300), label=label, truth=truth)
    unknown = [scored(f"u{i}", "near", random.uniform(0, 1, 50), label=random.integers(0, 4, 50)) for i in range(2)]
    grid = class_grid(known, unknown, ["a", "b", "c", "d"])
    rows = {row[0]: row[1:] for row in texts(grid)}
    assert all(len(row) == len(grid.headings) for row in grid.rows)
    assert known.is_ood is not None
    for place, name in enumerate("abcd"):
        here = truth == place
        count, accuracy, flagged, interval, median, accepted = rows[name]
        assert int(count) == here.sum()
        assert accuracy == share((label[here] == place).mean())
        assert flagged == share(known.is_ood[here].mean())
        assert interval == " to ".join(map(share, clopper_pearson(int(known.is_ood[here].sum()), int(here.sum()))))
        assert float(median) == pytest.approx(np.median(known.score[here]), rel=1e-3)
        assert int(accepted) == sum(int(((one.label == place) & (one.score <= 0.5)).sum()) for one in unknown)
    assert sum(int(row[0]) for row in rows.values()) == 300
    shares = [float(row[3]) for row in texts(grid)]
    assert shares == sorted(shares, reverse=True)


def test_classes_that_nobody_has_seen_are_left_out() -> None:
    known = scored("known", "known", [0.1, 0.9], label=np.array([0, 0]), truth=np.array([0, 0]))
    unknown = scored("u", "far", [0.1, 0.9], label=np.array([2, 3]))
    rows = texts(class_grid(known, [unknown], list("abcd")))
    assert [row[0] for row in rows] == ["a", "c"]
    # Nothing is known of c but that an unknown image passes for it.
    assert rows[1][1:] == ["0", "–", "–", "–", "–", "1"]


def test_without_labels_the_classifier_s_word_counts() -> None:
    known = scored("known", "known", [0.1, 0.2, 0.9], label=np.array([0, 1, 1]), truth=None, is_ood=None)
    grid = class_grid(known, [], ["a", "b"])
    assert grid.headings[0] == "class, by the classifier"
    assert "accuracy" not in grid.headings
    assert texts(grid) == [["a", "1", "–", "–", "0.1"], ["b", "2", "–", "–", "0.55"]]
    assert class_grid(known, [FAR], ["a", "b", "c"]).headings[-1] == "unknown images that pass for it"


def test_flagged_share_has_its_interval() -> None:
    assert flagged_share(scored("u", "far", [0.9, 0.9, 0.1, 0.1])) == interval(0.5, *clopper_pearson(2, 4))
    assert flagged_share(scored("u", "far", [0.9], is_ood=None)) == "–"
