"""A method is fitted, scores every set, and leaves a file that is taken only for the very same question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("pytorch_ood")

from test_choice import outliers, outputs

from torch_grood.errors import GroodError
from torch_grood.evaluation.choice import ChooseBy
from torch_grood.evaluation.extraction import ClassifierOutputs, ExtractionCost
from torch_grood.evaluation.methods import METHODS, Energy, Knn, Method, Odin
from torch_grood.evaluation.methods.base import Scorer
from torch_grood.evaluation.methods.parameters import Number, parameter
from torch_grood.evaluation.outputs import World
from torch_grood.evaluation.scoring import run_method, scores_path


@dataclass(frozen=True)
class Counting(Method):
    """−‖h‖, and how often it was fitted."""

    name: ClassVar[str] = "counting"
    title: ClassVar[str] = "Counting"
    reference: ClassVar[str] = ""
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"sign": (1.0, -1.0, 2.0)}
    fits: ClassVar[list[World]] = []

    sign: float = parameter(1.0, Number("any number"))

    def _fit(self, world: World) -> Scorer:
        self.fits.append(world)
        if self.sign == 13:
            raise RuntimeError("nothing works\nat all")
        return lambda found: self.sign * found.features.norm(dim=1)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    Counting.fits.clear()
    monkeypatch.setattr("torch_grood.evaluation.scoring.METHODS", {**METHODS, "counting": Counting})


@pytest.fixture
def found() -> ClassifierOutputs:
    world = World(outputs(120, 0), outputs(40, 1), val_ood=outliers(30, 2))
    ood = {"near": outliers(20, 3), "far": outliers(10, 4)}
    return ClassifierOutputs(world, outputs(32, 5), ood, {}, {}, torch.zeros(4, 6), "head", None, 0, ExtractionCost())


def test_scores_of_all_sets(found: ClassifierOutputs) -> None:
    scored = run_method(Energy(), found)
    assert scored.status == "done"
    assert scored.scores is not None
    assert {key: tuple(scores.shape) for key, scores in scored.scores.items()} == {
        "test": (32,),
        "near": (20,),
        "far": (10,),
    }
    torch.testing.assert_close(scored.scores["near"], -found.ood["near"].logits.logsumexp(1).double())


def test_a_file_spares_the_second_run(found: ClassifierOutputs, tmp_path: Path) -> None:
    path = scores_path(tmp_path, "run0", Counting())
    first = run_method(Counting(), found, by=ChooseBy.validation_ood, path=path, key={"images": "a"})
    n = len(Counting.fits)
    assert n == 4
    again = run_method(Counting(), found, by=ChooseBy.validation_ood, path=path, key={"images": "a"})
    assert len(Counting.fits) == n
    assert again.choice == first.choice
    assert again.choice is not None
    assert again.choice.method == Counting(sign=-1.0)
    assert (again.fit_seconds, again.choose_seconds) == (first.fit_seconds, first.choose_seconds)
    assert first.scores is not None
    assert again.scores is not None
    assert {key: scores.tolist() for key, scores in again.scores.items()} == {
        key: scores.tolist() for key, scores in first.scores.items()
    }


@pytest.mark.parametrize("change", ["images", "by", "parameter"])
def test_a_file_of_another_question_is_not_taken(found: ClassifierOutputs, tmp_path: Path, change: str) -> None:
    path = tmp_path / "one.safetensors"
    run_method(Counting(), found, path=path, key={"images": "a"})
    run_method(
        Counting(sign=3.0 if change == "parameter" else 1.0),
        found,
        by=ChooseBy.held_out_classes if change == "by" else None,
        path=path,
        key={"images": "b" if change == "images" else "a"},
    )
    assert len(Counting.fits) > 1


def test_a_damaged_file_is_made_again(
    found: ClassifierOutputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "one.safetensors"
    expected = run_method(Counting(), found, path=path).scores
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    scored = run_method(Counting(), found, path=path)
    assert "cannot be used and is made again" in caplog.text
    assert scored.scores is not None
    assert expected is not None
    assert torch.equal(scored.scores["near"], expected["near"])
    assert path.read_bytes()[-20:] == content[-20:]


def test_what_cannot_run_is_reported(found: ClassifierOutputs, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    scored = run_method(Odin(), found, path=path)
    assert (scored.status, scored.scores, path.exists()) == ("unavailable", None, False)
    assert scored.reason is not None
    assert "ODIN" in scored.reason
    few = run_method(Knn(k=121), found)
    assert few.status == "unavailable"
    broken = run_method(Counting(sign=13.0), found)
    assert (broken.status, broken.reason) == ("failed", "RuntimeError: nothing works at all")


def test_a_defect_of_ours_is_not_hidden(found: ClassifierOutputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "_fit", lambda self, world: undefined_name)  # type: ignore[name-defined]  # noqa: F821
    with pytest.raises(NameError):
        run_method(Counting(), found)


def test_one_image_that_is_a_column_of_a_matrix(
    found: ClassifierOutputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = replace(found, ood={"near": found.ood["near"].take(torch.tensor([3]))})
    monkeypatch.setattr(Counting, "_fit", lambda self, world: lambda outputs: outputs.features.double()[:, -1])
    path = tmp_path / "one.safetensors"
    first, again = (run_method(Counting(), one, path=path) for _ in range(2))
    assert first.scores is not None
    assert again.scores is not None
    assert first.scores["near"].tolist() == again.scores["near"].tolist()


def test_a_folder_that_cannot_be_made(found: ClassifierOutputs, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GroodError, match="cannot be made"):
        run_method(Counting(), found, path=tmp_path / "file" / "one.safetensors")


def test_parameters_have_files_of_their_own(tmp_path: Path) -> None:
    paths = {scores_path(tmp_path, "run0", method) for method in (Knn(), Knn(k=3), Energy())}
    assert len(paths) == 3
    assert {path.parent for path in paths} == {tmp_path / "run0"}
