"""A run's folder holds what was run, takes no other run, and reads back to the digit."""

from __future__ import annotations

import csv
import json
import math
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from torch_grood import GroodError
from torch_grood.data import ImageSource, read_source
from torch_grood.data.transforms import PRESETS
from torch_grood.training.folder import EpochFigures, RunFolder

IDENTITY: dict[str, Any] = {"recipe": {"lr": 0.1, "title": "ä", "benchmark": None}, "data": "abc", "start": None}
RECORD = {"title": "A run", **IDENTITY, "transform": PRESETS["cifar10"].to_dict(), "status": "running"}


def figures(n: int, scale: float = 1.0) -> list[EpochFigures]:
    """Numbers that need all of their digits."""
    return [
        EpochFigures(
            epoch=i + 1,
            steps=391 * (i + 1),
            lr=0.1 * math.cos(i / n) ** 2,
            loss=scale * (2.3 * math.exp(-i / 3) + 0.01),
            accuracy=1 - 0.9 * math.exp(-i / 3),
            val_loss=scale * (2.3 * math.exp(-i / 4) + 0.1),
            val_accuracy=1 - 0.9 * math.exp(-i / 4),
            seconds=12.345,
            images_per_second=1e5 / 3,
        )
        for i in range(n)
    ]


@pytest.fixture
def sources(tmp_path: Path) -> tuple[ImageSource, ImageSource]:
    folder = tmp_path / "some images"
    for name in ("train/a/1.png", "train/b/x 2 .png", "val/a/3.png", "val/b/4.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(folder / name)
    return read_source(folder / "train"), read_source(folder / "val")


@pytest.fixture
def folder(tmp_path: Path, sources: tuple[ImageSource, ImageSource]) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.path.mkdir()
    made.begin(RECORD, *sources)
    return made


def read_table(folder: RunFolder) -> list[EpochFigures]:
    kinds = {field.name: int if field.type == "int" else float for field in fields(EpochFigures)}
    with (folder.path / "log.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [EpochFigures(**{name: kinds[name](value) for name, value in row.items()}) for row in rows]


def test_a_new_run_begins_with_its_record_and_lists(folder: RunFolder, sources: tuple[ImageSource, ...]) -> None:
    names = {path.name for path in folder.path.iterdir()}
    assert names == {"run.json", "log.csv", "train.txt", "val.txt", "transform.json"}
    assert json.loads((folder.path / "transform.json").read_text()) == PRESETS["cifar10"].to_dict()
    assert folder.read() == {"format": 1, **RECORD, "history": []}
    assert read_table(folder) == []
    for name, source in zip(("train.txt", "val.txt"), sources, strict=True):
        listed = read_source(folder.path / name, labels="required")
        assert (listed.paths, listed.labels) == (source.paths, source.labels)


@pytest.mark.parametrize("n", [1, 2, 31])
def test_figures_come_back_to_the_digit(folder: RunFolder, n: int) -> None:
    pytest.importorskip("matplotlib")
    folder.write(RECORD, figures(n))
    assert [EpochFigures(**one) for one in folder.read()["history"]] == figures(n)
    assert read_table(folder) == figures(n)
    with Image.open(folder.path / "curve.png") as curve:
        assert curve.format == "PNG"
        assert 800 < curve.width < 2000
        assert 300 < curve.height < 1000
        pixels = np.array(curve.convert("RGB")).reshape(-1, 3).astype(int)
    # Both lines are there: blue and orange.
    for colour in ((0x4C, 0x72, 0xB0), (0xDD, 0x84, 0x52)):
        assert (abs(pixels - colour).sum(1) < 12).sum() > 50


@pytest.mark.parametrize(
    ("title", "scale"),
    [
        ("5 $ and $x_{$ more", 1.0),
        (r"$\frac{1}{$ % _ ^ {}", 0.0),
        ("訓練 🦀", 1e30),
        ("a" * 2000, 1e-30),
    ],
)
def test_no_title_or_loss_stops_the_curve(folder: RunFolder, title: str, scale: float) -> None:
    pytest.importorskip("matplotlib")
    own = [replace(one, loss=one.loss * scale, val_loss=one.val_loss * scale) for one in figures(3)]
    folder.write({**RECORD, "title": title}, own)
    assert (folder.path / "curve.png").stat().st_size > 5000


def test_without_matplotlib_there_is_all_but_the_curve(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules]:
        if name.partition(".")[0] == "matplotlib":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder.write(RECORD, figures(2))
    assert not (folder.path / "curve.png").exists()
    assert not list(folder.path.glob(".*"))
    assert read_table(folder) == figures(2)
    assert len(folder.read()["history"]) == 2


def test_the_callers_figures_are_left_alone(folder: RunFolder) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    own = pyplot.figure()
    try:
        before = pyplot.get_fignums()
        folder.write(RECORD, figures(2))
        assert pyplot.get_fignums() == before
        assert pyplot.gcf() is own
        assert not own.axes
    finally:
        pyplot.close(own)


def test_the_same_run_is_found_again(folder: RunFolder) -> None:
    assert folder.earlier(IDENTITY) == folder.read()
    # Whatever else is recorded may differ.
    folder.write({**RECORD, "status": "complete", "machine": 7}, figures(1))
    earlier = RunFolder(str(folder.path)).earlier(IDENTITY)
    assert earlier is not None
    assert earlier["status"] == "complete"


def test_a_new_or_empty_folder_holds_no_run(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "new").earlier(IDENTITY) is None
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    assert RunFolder(tmp_path / "empty").earlier(IDENTITY) is None


@pytest.mark.parametrize("n_writes", range(5))
def test_a_kill_at_the_beginning_costs_nothing(
    tmp_path: Path, sources: tuple[ImageSource, ImageSource], n_writes: int
) -> None:
    """Wherever the first files stop being written, the same command goes on."""
    folder = RunFolder(tmp_path / "killed")
    folder.path.mkdir()
    replace_file, calls = Path.replace, 0

    def killed(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls > n_writes:
            # What a kill leaves behind beside the file that was to be.
            (target.parent / f".{target.name}.abcdefgh").touch()
            raise KeyboardInterrupt
        return replace_file(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.begin(RECORD, *sources)
    assert len([path for path in folder.path.iterdir() if not path.name.startswith(".")]) == n_writes
    earlier = folder.earlier(IDENTITY)
    assert (earlier is None) == (n_writes == 0)
    folder.begin(RECORD, *sources)
    assert folder.earlier(IDENTITY) is not None


def test_another_run_is_refused_with_what_differs(folder: RunFolder) -> None:
    other = {"recipe": {"lr": 0.2, "title": "ä", "seed": 1}, "data": "abd", "start": "w.pt"}
    with pytest.raises(GroodError) as caught:
        folder.earlier(other)
    assert str(caught.value).splitlines() == [
        f"{folder.path} holds another training run; give a new folder. What differs:",
        "  recipe.lr: 0.1 there, 0.2 now",
        "  recipe.seed: None there, 1 now",
        "  data: 'abc' there, 'abd' now",
        "  start: None there, 'w.pt' now",
    ]
    with pytest.raises(GroodError) as caught:
        folder.earlier({"recipe": {str(i): "x" * 10_000 for i in range(1000)}})
    assert len(str(caught.value)) < 4000


def test_other_things_are_no_run_folders(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(GroodError) as caught:
            RunFolder(path).earlier(IDENTITY)
        return str(caught.value)

    (tmp_path / "file").touch()
    assert "is a file; give a new folder" in message(tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    assert "is not empty and holds no training run; give a new folder" in message(tmp_path / "other")
    assert (tmp_path / "other" / "thesis.tex").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"null", b'{"format": 2}', b"{}", b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b'"\\ud800"'],
)
def test_a_record_of_anything_else_is_refused(folder: RunFolder, content: bytes) -> None:
    (folder.path / "run.json").write_bytes(content)
    with pytest.raises(GroodError, match="is no record of a training"):
        folder.earlier(IDENTITY)


@pytest.mark.parametrize("name", ["run.json", "log.csv"])
def test_a_full_disk_leaves_what_was_there(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pytest.importorskip("matplotlib")
    folder.write(RECORD, figures(1))
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    replace_file = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.name == name:
            raise OSError(28, "No space left on device")
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(GroodError, match=rf"cannot write .*{name}: No space left on device"):
        folder.write(RECORD, figures(2))
    assert {path.name for path in folder.path.iterdir()} == set(before)
    assert (folder.path / name).read_bytes() == before[name]


def test_a_record_is_json_that_people_can_read(folder: RunFolder) -> None:
    folder.write(RECORD, figures(1))
    text = (folder.path / "run.json").read_text(encoding="utf-8")
    assert "ä" in text
    assert text.endswith("}\n")
    assert json.loads(text)["history"] == [asdict(figures(1)[0])]


def test_a_curve_that_cannot_be_written_ends_no_training(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch_grood.training.curve.draw_curve", fail)
    folder.write(RECORD, figures(2))
    assert "the learning curve could not be drawn: GroodError: cannot write" in caplog.text
    assert read_table(folder) == figures(2)


def test_two_trainings_keep_apart(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new" / "run")
    with folder.alone():
        with pytest.raises(GroodError, match=r"another process is training in .*run; wait"), folder.alone():
            pass
        assert folder.earlier(IDENTITY) is None
    with folder.alone():
        pass
