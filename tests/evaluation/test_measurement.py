"""What results say of a method is what its scores say."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")

from torch_grood.evaluation import results as r
from torch_grood.evaluation.choice import Choice, ChooseBy, Trial
from torch_grood.evaluation.inference import bootstrap, delong, delong_difference, holm
from torch_grood.evaluation.measurement import compare, method_result, score_sets
from torch_grood.evaluation.methods import Grood, Knn, Method, Msp
from torch_grood.evaluation.metrics import detection_metrics, openood_metrics
from torch_grood.evaluation.scoring import ScoredMethod

GROUPS: dict[r.Group, list[str]] = {"near": ["a", "b"], "far": ["c"]}
COMPARABLE = {"near": r.Comparability(True), "far": r.Comparability(False, ("c: 10 of 20 images",))}


def scored(method: Method, shift: float, seed: int = 0, by: ChooseBy | None = None) -> ScoredMethod:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"test": 80, "a": 60, "b": 40, "c": 10}
    scores = {
        key: torch.randn(n, generator=generator, dtype=torch.float64) + shift * (key != "test")
        for key, n in sizes.items()
    }
    trials = () if by is None else (Trial({"k": 50}, 0.7), Trial({"k": 900}, None, "too few"))
    return ScoredMethod(method, Choice(method, by, trials, ("beware",)), "done", None, scores, 1.5, 2.5, 0.5)


def result(found: ScoredMethod, draws: int = 40) -> r.MethodResult:
    return method_result(found, score_sets(found), GROUPS, COMPARABLE, draws=draws, seed=3)  # type: ignore[arg-type]


def test_figures_are_those_of_the_scores() -> None:
    found = scored(Knn(k=50), 1.0)
    assert found.scores is not None
    row = result(found)
    for key in ("a", "b", "c"):
        expected = detection_metrics(found.scores["test"], found.scores[key])
        figures = row.figures[key]
        assert {name: figures.value(name) for name in r.FIGURES} == {
            name: getattr(expected, name) for name in r.FIGURES
        }
        theirs = openood_metrics(found.scores["test"], found.scores[key])
        assert figures.openood == r.OpenOODFigures(**theirs._asdict())
        assert (figures.n_id, figures.n_ood) == (80, len(found.scores[key]))
    near = row.groups["near"]
    assert near.auroc == pytest.approx((row.figures["a"].auroc + row.figures["b"].auroc) / 2)
    assert (near.comparable, row.groups["far"].comparable) == (True, False)
    assert (near.sets, row.groups["far"].sets) == (("a", "b"), ("c",))
    assert (row.status, row.label, row.config["k"], row.warnings) == ("done", "KNN", 50, ("beware",))
    assert row.seconds == r.Seconds(1.5, 2.5, 0.5)


def test_intervals() -> None:
    found = scored(Msp(), 1.0)
    sets = score_sets(found)
    assert sets is not None
    row, bare = result(found), result(found, draws=0)
    drawn = bootstrap(sets, 40, seed=3).estimate("aupr_ood", ["a", "b"])
    assert row.groups["near"].intervals["aupr_ood"] == (drawn.low, drawn.high)
    normal = delong(sets, ["a", "b"])
    assert row.groups["near"].intervals["auroc"] == (normal.low, normal.high)
    assert set(row.figures["a"].intervals) == set(r.FIGURES)
    assert set(bare.figures["a"].intervals) == {"auroc"}
    assert bare.figures["a"].auroc == row.figures["a"].auroc


def test_a_choice_is_told() -> None:
    row = result(scored(Knn(), 1.0, by=ChooseBy.validation_ood))
    assert row.chosen_by == "validation OOD"
    assert row.uses_ood_data
    assert [(dict(point.config), point.value, point.reason) for point in row.search] == [
        ({"k": 50}, 0.7, None),
        ({"k": 900}, None, "too few"),
    ]
    assert not result(scored(Knn(), 1.0, by=ChooseBy.held_out_classes)).uses_ood_data
    assert result(scored(Grood(outliers="ood"), 1.0)).uses_ood_data
    assert not result(scored(Grood(), 1.0)).uses_ood_data


def test_a_method_without_scores() -> None:
    row = result(ScoredMethod(Knn(), None, "unavailable", "too few samples"))
    assert (row.status, row.reason, row.figures, row.groups) == ("unavailable", "too few samples", {}, {})


MIXED = Grood(outliers="mixup", lam=0.5)


def test_grood_is_tested_against_all_others() -> None:
    found = [scored(Msp(), 0.4, 1), scored(Grood(), 1.0, 0), scored(Knn(), 1.0, 2), scored(MIXED, 0.9, 3)]
    scores = {one.asked.label: sets for one in found if (sets := score_sets(one)) is not None}
    tests = compare(2, [result(one) for one in found], scores, GROUPS)
    assert [(test.group, test.method_a, test.method_b) for test in tests] == [
        (group, "GROOD", other) for group in ("near", "far") for other in ("MSP", "KNN", MIXED.label)
    ]
    near = [delong_difference(scores["GROOD"], scores[test.method_b], ["a", "b"]) for test in tests[:3]]
    assert [test.difference for test in tests[:3]] == [one.value for one in near]
    assert [test.p_holm for test in tests[:3]] == holm([one.p for one in near])
    assert {test.run for test in tests} == {2}
    assert compare(0, [result(found[0])], scores, GROUPS) == []


def test_figures_that_survive_shuffling_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_grood.evaluation.measurement as module

    assert result(scored(Msp(), 3.0)).warnings == ("beware",)
    # A gate that sees a broken shuffle, one that leaves everything in its place, must say so.
    plain = module.shuffled_auroc

    def broken(id_scores: object, ood_scores: object, *, seed: int) -> object:
        return plain(id_scores, ood_scores, seed=seed)._replace(auroc=0.99, z=9.0)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "shuffled_auroc", broken)
    warnings = result(scored(Msp(), 3.0)).warnings
    assert len(warnings) == 4
    assert warnings[1].startswith("a: AUROC is 0.9900 after ID and OOD were shuffled, 9.0 standard errors")
