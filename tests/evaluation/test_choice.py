"""Hyper-parameters are chosen on validation data alone, by a new fit each time; or by classes left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

pytest.importorskip("sklearn")
pytest.importorskip("pytorch_ood")

from torch_grood.errors import GroodError
from torch_grood.evaluation.choice import ChooseBy, choose, held_out_groups
from torch_grood.evaluation.methods import Grood, Knn, Method, Msp, Odin
from torch_grood.evaluation.methods.base import Scorer
from torch_grood.evaluation.methods.parameters import Count, Number, parameter
from torch_grood.evaluation.metrics import auroc
from torch_grood.evaluation.outputs import Head, Outputs, World

N_CLASSES = 4
CENTRES = 4 * torch.eye(N_CLASSES, 6)


def outputs(n: int, seed: int, spread: float = 1.0) -> Outputs:
    """n samples of four classes around their centres."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % N_CLASSES
    features = CENTRES[labels] + spread * torch.randn(n, 6, generator=generator)
    return Outputs(features, features @ CENTRES.T, labels)


def outliers(n: int, seed: int) -> Outputs:
    """n samples around the origin, without labels."""
    features = 0.5 * torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return Outputs(features, features @ CENTRES.T)


@pytest.fixture
def world() -> World:
    return World(outputs(400, 0), outputs(80, 1), Head(CENTRES, torch.zeros(4)), val_ood=outliers(40, 2))


@dataclass(frozen=True)
class Recorded(Method):
    """Scores by ‖h‖ or against it, and remembers what it was fitted on and asked for."""

    name: ClassVar[str] = "recorded"
    title: ClassVar[str] = "Recorded"
    reference: ClassVar[str] = ""
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"sign": (-1.0, 0.0, 1.0)}
    seen: ClassVar[list[tuple[World, Outputs]]] = []

    sign: float = parameter(1.0, Number("any number"))
    k: int = parameter(5, Count())

    def _fit(self, world: World) -> Scorer:
        def score(found: Outputs) -> Tensor:
            self.seen.append((world, found))
            return self.sign * found.features.norm(dim=1)

        return score


@pytest.fixture(autouse=True)
def forget() -> None:
    Recorded.seen.clear()


def test_the_best_of_the_grid_on_validation_outliers(world: World) -> None:
    choice = choose(Recorded(k=7), world, ChooseBy.validation_ood, progress=False)
    assert choice.method == Recorded(sign=-1.0, k=7)
    assert choice.by is ChooseBy.validation_ood
    values = [trial.value for trial in choice.trials]
    assert values[1] == 0.5
    assert values[0] is not None
    assert values[2] is not None
    assert values[0] > 0.9
    assert values[0] + values[2] == pytest.approx(1)
    # Nothing but the validation sets was scored, each choice after a fit on all of the training set.
    assert [found is world.val or found is world.val_ood for _, found in Recorded.seen] == [True] * 6
    assert all(fitted is world for fitted, _ in Recorded.seen)


def test_a_choice_at_the_end_of_the_grid_warns(world: World) -> None:
    choice = choose(Recorded(), world, ChooseBy.validation_ood, progress=False)
    assert choice.warnings == ("sign = -1 is at the end of its grid (-1 to 1); beyond it may be better",)


def test_validation_images_of_one_class_cannot_tell(world: World) -> None:
    val = outputs(40, 1)
    assert val.labels is not None
    with pytest.raises(GroodError, match=r"images of more classes in id\.val"):
        choose(Recorded(), replace(world, val=val.take(val.labels == 2)), ChooseBy.held_out_classes, progress=False)


def test_a_choice_within_the_grid_does_not_warn(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorded, "grid", {"sign": (-2.0, -1.0, 1.0)})
    even = replace(world, val=outliers(40, 3))
    # All scores of one sign are equivalent, so that the first is taken: at the end, but not because it is better.
    found = choose(Recorded(), world, ChooseBy.validation_ood, progress=False)
    assert found.method.sign == -2.0  # type: ignore[attr-defined]
    monkeypatch.setattr(Recorded, "grid", {"sign": (1.0, -1.0, 2.0)})
    found = choose(Recorded(), world, ChooseBy.validation_ood, progress=False)
    assert found.warnings[0].startswith("sign = -1 is at the end")
    monkeypatch.setattr(Recorded, "grid", {"sign": (-1.0, -2.0, -3.0)})
    assert choose(Recorded(), even, ChooseBy.validation_ood, progress=False).warnings == ()
    monkeypatch.setattr(Recorded, "grid", {"sign": (-1.0, 1.0)})
    assert choose(Recorded(), world, ChooseBy.validation_ood, progress=False).warnings == ()


def test_what_the_user_set_stays(world: World) -> None:
    choice = choose(Recorded(sign=0.25), world, ChooseBy.validation_ood, progress=False)
    assert choice.method == Recorded(sign=0.25)
    assert choice.by is None
    assert choice.trials == ()


def test_nothing_to_choose(world: World) -> None:
    assert choose(Msp(), world, ChooseBy.held_out_classes, progress=False).by is None


def test_held_out_classes_are_unknown_to_the_fit(world: World) -> None:
    choice = choose(Recorded(), world, ChooseBy.held_out_classes, progress=False)
    assert choice.by is ChooseBy.held_out_classes
    assert len(Recorded.seen) == 3 * N_CLASSES * 2
    assert world.val is not None
    for fitted, found in Recorded.seen:
        (left_out,) = fitted.left_out
        assert fitted.n_classes == 3
        assert fitted.val_ood is None
        assert len(fitted.train) == 300
        is_left_out = world.val.labels == left_out
        inside = world.val.features[~is_left_out]  # type: ignore[operator]
        outside = world.val.features[is_left_out]  # type: ignore[index]
        assert torch.equal(found.features, inside) or torch.equal(found.features, outside)
        assert found.logits.shape[1] == 3


def test_held_out_classes_give_the_mean_auroc(world: World) -> None:
    """KNN by brute force."""
    choice = choose(Knn(), world, ChooseBy.held_out_classes, progress=False)
    train, val = world.train, world.val
    assert train.labels is not None
    assert val is not None
    assert val.labels is not None
    for trial in choice.trials[:3]:
        expected = []
        for left_out in range(N_CLASSES):
            known = normalize(train.features[train.labels != left_out])
            distances = torch.cdist(normalize(val.features), known).sort(dim=1).values[:, trial.parameters["k"] - 1]
            inside = val.labels != left_out
            expected.append(auroc(distances[inside], distances[~inside]))
        assert trial.value == pytest.approx(sum(expected) / N_CLASSES, abs=1e-3)
    # 300 training samples are left: what needs more is no choice, and says why.
    unusable = [trial for trial in choice.trials if trial.value is None]
    assert [trial.parameters["k"] for trial in unusable] == [500, 1000]
    assert unusable[0].reason is not None
    assert "300" in unusable[0].reason


def test_a_method_that_fits_no_choice_stays_as_it_is(world: World) -> None:
    small = replace(world, train=outputs(40, 0))
    choice = choose(Knn(), small, ChooseBy.validation_ood, progress=False)
    assert (choice.method, choice.by) == (Knn(), None)
    assert choice.warnings[0].startswith("could not be chosen by validation OOD, so that it is as given: KNN")
    # The network of ODIN knows all classes, whatever is left out elsewhere.
    odin = choose(Odin(), world, ChooseBy.held_out_classes, progress=False)
    assert (odin.method, odin.by, len(odin.trials)) == (Odin(), None, 8)


def test_equal_choices_are_tried_once(world: World) -> None:
    """Without mixing there is no λ: GROOD's other sources are one choice each."""
    choice = choose(Grood(), world, ChooseBy.validation_ood, progress=False)
    usable = [trial for trial in choice.trials if trial.value is not None]
    assert [dict(trial.parameters) for trial in usable] == [
        {"outliers": "energy", "lam": None}, {"outliers": "mean", "lam": None},
    ]  # fmt: skip
    assert choice.method in (Grood(), Grood(outliers="mean"))
    assert len(choice.trials) == len({str(trial.parameters) for trial in choice.trials})


@pytest.mark.parametrize(
    ("change", "by", "message"),
    [
        ({"val": None}, ChooseBy.validation_ood, "needs ID validation images"),
        ({"val": None}, ChooseBy.held_out_classes, "needs ID validation images"),
        ({"val_ood": None}, ChooseBy.validation_ood, "needs validation outliers"),
    ],
)
def test_without_what_it_needs(world: World, change: dict[str, None], by: ChooseBy, message: str) -> None:
    with pytest.raises(GroodError, match=message):
        choose(Recorded(), replace(world, **change), by, progress=False)


def test_groups_of_classes() -> None:
    assert held_out_groups(4, 0) == [[0], [1], [2], [3]]
    groups = held_out_groups(100, 0)
    assert [len(group) for group in groups] == [10] * 10
    assert sorted(c for group in groups for c in group) == list(range(100))
    assert groups != held_out_groups(100, 1)
    assert [len(group) for group in held_out_groups(15, 0)].count(2) == 5
    with pytest.raises(GroodError, match="three classes at least, and there are 2"):
        held_out_groups(2, 0)
