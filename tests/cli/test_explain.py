"""``grood score --explain`` and ``--grid``: what is shown is what the library says, whatever files are called."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Result, run
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from torch_grood import GROOD, GroodError
from torch_grood.cli import _grid
from torch_grood.cli._assessing import _Top
from torch_grood.cli._explain import FLAT_COLUMNS, power, print_blocks
from torch_grood.models import load_model

MODEL = ("--model", "nets.py:net")


def score(*arguments: object) -> Result:
    return run("score", "net.grood", *arguments, *MODEL)


def score_json(*arguments: object) -> list[dict[str, Any]]:
    result = score(*arguments, "--format", "json")
    assert result.code == 0, result.err
    rows: list[dict[str, Any]] = json.loads(result.raw)
    return rows


def blocks(raw: str) -> list[str]:
    return raw.rstrip("\n").split("\n\n")


# --- As data ------------------------------------------------------------------------------------------------------


def test_json_says_what_the_library_says(digits: Path) -> None:
    from torch_grood.data import ImageTransform, image_loader, read_source

    rows = score_json("ood", "--explain", "--neighbors", "3", "--batch-size", "7")
    detector = GROOD.load("net.grood", load_model("nets.py:net", "net.safetensors").model)
    transform = ImageTransform.from_dict(detector.metadata["transform"])
    found = detector.explain(image_loader(read_source("ood"), transform, batch_size=7), k=3)
    assert len(rows) == len(found.log_score)
    for i, row in enumerate(rows):
        why = row["explanation"]
        assert row["score"] == found.log_score[i].exp().item()
        assert why["log_score"] == found.log_score[i].item()
        assert why["log_magnitude"] == found.log_magnitude[i].item()
        assert why["direction_share"] == found.direction_share[i].item()
        assert why["ood_distance"] == found.ood_distance[i].item()
        assert [p["label"] for p in why["prototypes"]] == [detector.classes_[c] for c in found.prototype[i].tolist()]
        assert [p["distance"] for p in why["prototypes"]] == found.prototype_distance[i].tolist()
        assert why["prototypes"][0]["label"] == row["prototype_label"]
        neighbors = why["neighbors"]
        assert [x["sample"] for x in neighbors] == found.neighbor[i].tolist()
        assert [x["path"] for x in neighbors] == detector.sample_names(found.neighbor[i])
        assert [x["log_distance"] for x in neighbors] == found.neighbor_log_distance[i].tolist()
        assert [x["distance"] for x in neighbors] == [math.exp(x["log_distance"]) for x in neighbors]
        assert [x["log_magnitude"] for x in neighbors] == found.neighbor_log_magnitude[i].tolist()
        assert [x["angle_degrees"] for x in neighbors] == pytest.approx(found.neighbor_angle[i].rad2deg().tolist())
        assert Path(neighbors[0]["path"]).is_file()


def test_an_explanation_changes_no_decision(digits: Path) -> None:
    for options in ((), ("--fpr", "0.2"), ("--tau", "0.1"), ("--fdr", "0.2")):
        plain = score_json("test", "ood", *options, "--batch-size", "50")
        explained = score_json("test", "ood", *options, "--batch-size", "50", "--explain")
        for row in explained:
            del row["explanation"]
        assert plain == explained
        assert {row["is_ood"] for row in plain} == {True, False}
    table = score("test", "ood", "--explain", "--fdr", "0.2")
    worst = sorted(score_json("test", "ood", "--fdr", "0.2"), key=lambda row: -row["score"])[:20]
    shown = [block.splitlines()[1].split()[1].strip(",") for block in blocks(table.raw)]
    assert shown == ["OOD" if row["is_ood"] else "ID" for row in worst]


def test_without_a_threshold(digits: Path) -> None:
    expected = score_json("ood", "--explain")
    detector = GROOD.load("net.grood")
    detector._adopt(detector._need_state())
    detector.save("net.grood")
    assert score_json("ood", "--explain") == [row | {"p_value": None, "is_ood": None} for row in expected]
    tau = expected[0]["score"]
    assert [row["is_ood"] for row in score_json("ood", "--explain", "--tau", repr(tau))] == [
        row["score"] > tau for row in expected
    ]
    result = score("ood", "--explain", "--grid", "g.png")
    assert result.code == 0
    assert "decision no decision, score" in result.out
    assert "p-value" not in result.out


def test_csv_and_parquet_have_columns_of_the_nearest(digits: Path) -> None:
    expected = score_json("ood", "--explain")
    rows = list(csv.DictReader(score("ood", "--explain", "--format", "csv").raw.splitlines()))
    columns = ["path", "score", "p_value", "is_ood", "label", "prototype_label", *FLAT_COLUMNS]
    assert list(rows[0]) == columns
    parquet = pytest.importorskip("pyarrow.parquet")
    assert score("ood", "--explain", "--output", "s.parquet").code == 0
    table = parquet.read_table("s.parquet")
    assert table.column_names == columns
    assert len(rows) == len(table) == len(expected)
    for text, typed, full in zip(rows, table.to_pylist(), expected, strict=True):
        why, nearest = full["explanation"], full["explanation"]["neighbors"][0]
        assert [typed[name] for name in FLAT_COLUMNS] == [
            *(why["log_magnitude"], why["direction_share"], why["ood_distance"], why["prototypes"][0]["distance"]),
            *(nearest["sample"], nearest["path"], nearest["distance"], nearest["angle_degrees"]),
        ]
        assert text == {name: str(value).lower() if name == "is_ood" else str(value) for name, value in typed.items()}


def test_parquet_in_several_chunks(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_grood.cli import _formats

    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(_formats, "_PARQUET_ROWS", 7)
    assert score("ood", "--output", "s.parquet").code == 0
    assert parquet.read_table("s.parquet").to_pylist() == score_json("ood")


def test_a_score_of_zero_is_json() -> None:
    from torch_grood.cli._explain import explanation_of, flat_explanation_of
    from torch_grood.cli._results import Results

    features = torch.eye(3)
    detector = GROOD(None).fit_features(features, ["a", "b", "a"])
    one, label = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    explanation = detector.explain_features(features[:1])
    results = Results(
        classes=["a", "b"],
        paths=["x.png"],
        score=one.numpy(),
        p_value=None,
        is_ood=None,
        label=label.numpy(),
        prototype_label=label.numpy(),
        detector=detector,
        explained=[0],
        explanation=explanation,
    )
    why = json.loads(json.dumps(explanation_of(results, 0), allow_nan=False))
    assert (why["log_score"], why["direction_share"]) == (None, 0)
    first, second, third = why["neighbors"]
    assert (first["sample"], first["path"], first["distance"], first["log_distance"]) == (0, None, 0, None)
    assert second["log_distance"] == pytest.approx(math.log(second["distance"]))
    assert third["distance"] >= second["distance"] > 0
    assert flat_explanation_of(results, 0)["neighbor_distance"] == 0


# --- Once through the model, within bounds ------------------------------------------------------------------------


def test_the_model_sees_each_image_once(digits: Path) -> None:
    Path("nets.py").write_text(
        Path("nets.py").read_text() + "\ndef counted(num_classes: int = 10):\n"
        "    model = net(num_classes)\n"
        "    def count(module, inputs, output):\n"
        "        with open('seen', 'a') as file:\n            file.write(f'{len(inputs[0])}\\n')\n"
        "    model[0][0].register_forward_hook(count)\n    return model\n"
    )
    n = len(list(Path("ood").iterdir()))
    for options in ((), ("--explain",), ("--explain", "--format", "json"), ("--grid", "g.png")):
        Path("seen").unlink(missing_ok=True)
        result = run("score", "net.grood", "ood", "--model", "nets.py:counted", "--batch-size", "10", *options)
        assert result.code == 0, result.err
        seen = [int(line) for line in Path("seen").read_text().split()]
        # What comes first is a few images to find the head.
        assert sum(seen[2:]) == n
        assert seen[2] == max(seen) == 10


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        (("--explain",), [20]),
        (("--grid", "g.png"), [20]),
        (("--grid", "g.png", "--all"), [80]),
        (("--grid", "g.png", "--format", "csv"), [20]),
        (("--explain", "--all"), [50, 50, 50]),
        (("--explain", "--format", "csv"), [50, 50, 50]),
        (("--explain", "--format", "json", "--grid", "g.png"), [50, 50, 50]),
    ],
)
def test_only_what_is_shown_is_explained(
    digits: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], sizes: list[int]
) -> None:
    explained: list[int] = []
    explain_features = GROOD.explain_features

    def counted(self: GROOD, features: torch.Tensor, *rest: int) -> Any:
        explained.append(len(features))
        return explain_features(self, features, *rest)

    monkeypatch.setattr(GROOD, "explain_features", counted)
    images = sorted(Path("test").rglob("*.png"))[:130] + sorted(Path("ood").iterdir())[:20]
    assert score(*images, *options, "--batch-size", "50").code == 0
    assert explained == sizes


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=6), st.integers(1, 12))
def test_the_highest_scores_are_kept(batches: list[list[int]], most: int) -> None:
    top, everything = _Top(most), [score for batch in batches for score in batch]
    done = 0
    for batch in batches:
        # Each feature is the position of its image.
        top.add(torch.tensor(batch).double(), torch.arange(done, done + len(batch))[:, None].float())
        done += len(batch)
        assert len(top.features) <= most
    expected = sorted(range(len(everything)), key=lambda i: -everything[i])[:most]
    assert top.positions.tolist() == expected == top.features[:, 0].int().tolist()


def test_no_direction_is_kept(digits: Path) -> None:
    # They are as large as the features.
    assert _results(digits, most=None).explanation.direction.shape == (len(list(Path("ood").iterdir())), 0)


def test_images_of_another_shape(digits: Path) -> None:
    Image.new("RGB", (9, 9)).save("other.png")
    messages = [score("other.png", *options).err for options in ((), ("--explain",))]
    assert messages[0] == messages[1]
    assert "images of shape (3, 9, 9) cannot be scored" in messages[0]


def test_a_batch_without_sense_is_named(digits: Path) -> None:
    Path("nets.py").write_text(
        Path("nets.py").read_text() + "\ndef dark(num_classes: int = 10):\n"
        "    model = net(num_classes)\n"
        "    def spoil(module, inputs, output):\n        return output * float('nan') if len(output) == 6 else output\n"
        "    model[1].register_forward_hook(spoil)\n    return model\n"
    )
    paths = sorted(map(str, Path("ood").iterdir()))
    n = len(paths) - len(paths) % 10
    result = run(
        *("score", "net.grood", *paths[:n], *paths[1:7], "--model", "nets.py:dark", "--explain", "--batch-size", "10")
    )
    assert (result.code, result.out) == (1, "")
    assert f"in the batch that begins with {paths[1]}: feature 0 of sample 0 is nan (6 of 6 samples" in result.err


def test_bad_images(digits: Path) -> None:
    Path("ood/0.png").write_bytes(b"broken")
    assert (score("ood", "--explain").code, score("ood", "--explain").out) == (1, "")
    result = score("ood", "--explain", "--skip-bad", "--format", "json", "--batch-size", "1")
    assert "left out 1 unreadable" in result.err
    assert [row["path"] for row in json.loads(result.raw)] == sorted(map(str, Path("ood").iterdir()))[1:]
    nothing = score("ood/0.png", "--explain", "--skip-bad")
    assert (nothing.code, "there is no image to score" in nothing.err) == (1, True)


# --- As text ------------------------------------------------------------------------------------------------------


def test_a_block_for_each_image(digits: Path) -> None:
    result = score("test", "ood", "--explain", "--neighbors", "2")
    assert result.code == 0
    rows = sorted(score_json("test", "ood", "--explain", "--neighbors", "2"), key=lambda row: -row["score"])
    found = blocks(result.raw)
    assert len(found) == 20
    assert f"the 20 most OOD of {len(rows)} images; --all shows all" in result.err
    assert len(blocks(score("test", "ood", "--explain", "--all").raw)) == len(rows)
    for block, row in zip(found, rows, strict=False):
        why, text = row["explanation"], " ".join(block.split())
        share = round(100 * why["direction_share"])
        first, second = why["neighbors"]
        assert block.splitlines()[0] == row["path"]
        word = "OOD" if row["is_ood"] else "ID"
        assert f"decision {word}, score {row['score']:.4g}, p-value {row['p_value']:.4g} class {row['label']}" in text
        assert f"π = {math.exp(why['log_magnitude']):.4g}, the nearest gradient's " in text
        assert f"directions {first['angle_degrees']:.1f}° apart; {share} % of the score² is direction, " in text
        assert f" is direction, {100 - share} % magnitude prototypes " in text
        assert f"{row['prototype_label']} at {why['prototypes'][0]['distance']:.4g}, " in text
        assert f"OOD prototype at {why['ood_distance']:.4g} training number image distance angle" in text
        for neighbor in (first, second):
            assert (
                f"{neighbor['sample']} {neighbor['path']} {neighbor['distance']:.4g} {neighbor['angle_degrees']:.1f}°"
                in text
            )
    assert any("nearest prototype: " in block for block in found)
    # For a file or pipe: no colour, nothing wrapped, no blanks at the ends.
    assert "\x1b" not in result.raw
    assert not re.search(r" \n", result.raw)
    assert {len(block.splitlines()) for block in found} == {8}


def _results(digits: Path, path: str = "ood", most: int | None = 20) -> Any:
    from torch_grood.cli._assessing import explain_most
    from torch_grood.cli._decision import Decision
    from torch_grood.data import ImageTransform, image_loader, read_source

    detector = GROOD.load("net.grood", load_model("nets.py:net", "net.safetensors").model)
    transform = ImageTransform.from_dict(detector.metadata["transform"])
    return explain_most(detector, image_loader(read_source(path), transform), Decision(), False, 5, most)


@pytest.mark.parametrize("width", [30, 40, 80])
def test_a_narrow_terminal_loses_nothing(digits: Path, width: int) -> None:
    from rich.console import Console

    results = _results(digits)
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, markup=False, highlight=False, emoji=False)
    print_blocks(results, results.by_score[:3], console)
    text = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
    assert "\x1b[" in file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    squeezed = re.sub(r"\s", "", text)
    for position in results.by_score[:3]:
        name = results.detector.sample_names(results.explanation_at(position).neighbor)[0]
        # A path is folded beside other columns: its characters are there, in order.
        assert re.search(".*?".join(map(re.escape, Path(name).name)), squeezed)


def test_names_cannot_steer_a_terminal(digits: Path) -> None:
    name = os.fsdecode(b"ood/\xff\x1b[31m\n\xe2\x80\xae.png")
    next((digits / "ood").iterdir()).rename(name)
    _rename_training_images("\x1b]0;title\x07\u202e[bold]x.png")
    result = score("ood", "--explain", "--all")
    assert result.code == 0
    assert "\x1b" not in result.raw
    assert "\u202e" not in result.raw
    assert "\\x1b]0;title\\x07\\u202e[bold]x.png" in result.out
    rows = score_json("ood", "--explain")
    assert rows[0]["explanation"]["neighbors"][0]["path"] == "\x1b]0;title\x07\u202e[bold]x.png"
    _rename_training_images(os.fsdecode(b"\xff.png"))
    for format in ("csv", "json", "parquet"):
        assert score("ood", "--explain", "--output", f"s.{format}").code == 0
    assert "\\udcff.png" in Path("s.csv").read_text()


def _rename_training_images(name: str | None) -> None:
    """What an attacker can do: any names, in a well-formed file."""
    from dataclasses import replace

    from torch_grood.provenance import Names

    detector = GROOD.load("net.grood")
    state = detector._need_state()
    assert state.training is not None
    names = None if name is None else Names.of([name] * len(state.training.hashes))
    detector._adopt(
        replace(state, training=replace(state.training, names=names)), detector.threshold_, detector.calibration_
    )
    detector.save("net.grood")


def test_training_images_without_names(digits: Path) -> None:
    _rename_training_images(None)
    assert score_json("ood", "--explain")[0]["explanation"]["neighbors"][0]["path"] is None
    assert "(no name)" in score("ood", "--explain").out
    rows = list(csv.DictReader(score("ood", "--explain", "--format", "csv").raw.splitlines()))
    assert rows[0]["neighbor_path"] == ""
    assert score("ood", "--grid", "g.png").code == 0


def test_a_stdout_of_few_characters(digits: Path) -> None:
    import subprocess
    import sys

    code = "import sys; sys.argv = ['grood', *sys.argv[1:]]\nfrom torch_grood.cli import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", code, "score", "net.grood", "ood", *MODEL, "--explain"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert b"\\u03c0 = " in found.stdout


def test_numbers_beyond_float64() -> None:
    assert [power(x) for x in (None, 0.0, math.log(0.25), -700.5, -12345.6)] == ["0", "1", "0.25", "e^-700", "e^-12346"]


# --- As a picture -------------------------------------------------------------------------------------------------


def _grid_size(rows: int, columns: int) -> tuple[int, int]:
    tile, gap = _grid._TILE, _grid._GAP
    return 4 * gap + tile + _grid._CARD + columns * (tile + gap), _grid._HEADER + rows * _grid._ROW


def _tile_of(picture: Image.Image, row: int, column: int) -> NDArray[np.uint8]:
    """Column -1 is the image itself."""
    x = _grid._GAP if column < 0 else 3 * _grid._GAP + _grid._TILE + _grid._CARD + column * (_grid._TILE + _grid._GAP)
    y = _grid._HEADER + row * _grid._ROW + _grid._GAP
    return np.asarray(picture.crop((x, y, x + _grid._TILE, y + _grid._TILE)))


def _expected_tile(path: str) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        size = (_grid._TILE, _grid._TILE)
        return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0))


def test_the_picture_shows_the_images_and_their_neighbors(digits: Path) -> None:
    result = score("test", "ood", "--grid", "g.png", "--neighbors", "3")
    assert result.code == 0, result.err
    # The table is as it was.
    assert result.out == score("test", "ood").out
    rows = sorted(score_json("test", "ood", "--explain", "--neighbors", "3"), key=lambda row: -row["score"])
    with Image.open("g.png") as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", _grid_size(20, 3))
        for i, row in enumerate(rows[:20]):
            np.testing.assert_array_equal(_tile_of(picture, i, -1), _expected_tile(row["path"]))
            for j, neighbor in enumerate(row["explanation"]["neighbors"]):
                np.testing.assert_array_equal(_tile_of(picture, i, j), _expected_tile(neighbor["path"]))
        # The decision has the colour of its word.
        corner = (2 * _grid._GAP + _grid._TILE + 5, _grid._HEADER + _grid._GAP + 13)
        assert picture.getpixel(corner) == (0xD5, 0x5E, 0x00)
        assert rows[0]["is_ood"]


@pytest.mark.parametrize(
    ("name", "kind"), [("g.png", "PNG"), ("G.JPG", "JPEG"), ("g.jpeg", "JPEG"), ("g.webp", "WEBP")]
)
def test_formats_of_the_picture(digits: Path, name: str, kind: str) -> None:
    assert score("ood", "--grid", name).code == 0
    with Image.open(name) as picture:
        assert (picture.format, picture.size) == (kind, _grid_size(20, 5))


def test_the_picture_has_bounds(digits: Path) -> None:
    n = len(list(Path("ood").iterdir()))
    assert 20 < n < 80
    assert score("ood", "--grid", "all.webp", "--all", "--neighbors", "100").code == 0
    with Image.open("all.webp") as picture:
        assert picture.size == _grid_size(n, 12)
    assert score("test", "--grid", "all.png", "--all", "--neighbors", "1").code == 0
    with Image.open("all.png") as picture:
        assert picture.size == _grid_size(80, 1)
    # WebP's limit.
    assert max(_grid_size(_grid.GRID_ROWS_ALL, _grid.GRID_NEIGHBORS)) <= 16_383


def test_any_size_of_image(digits: Path) -> None:
    image = next(Path("ood").iterdir())
    results = _results(digits, str(image))
    noise = np.random.default_rng(0)
    for size in ((1, 1), (32, 32), (300, 200), (3000, 2), (2, 3000), (2000, 3000)):
        pixels = noise.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save("large.png")
        shown = _grid._fitted(Image.fromarray(pixels))
        assert shown.size == (_grid._TILE, _grid._TILE)
        inside = (np.asarray(shown) != 255).any(2)
        height, width = inside.any(1).sum(), inside.any(0).sum()
        assert max(height, width) == _grid._TILE
        assert width / height == pytest.approx(min(max(size[0] / size[1], 1 / 128), 128), rel=0.02)
    _grid.write_grid(Path("g.png"), results, [0], None)
    assert Path("g.png").exists()


def _grey(tile: NDArray[np.uint8]) -> bool:
    """The tile of a missing image: its corner and most of it."""
    missing = (tile == (0xEC, 0xEC, 0xEF)).all(2)
    return bool(missing[:30].all() and missing.mean() > 0.8 and not missing.all())


def test_training_images_that_are_not_there(digits: Path) -> None:
    why = score_json("ood", "--explain", "--neighbors", "2")
    worst = max(why, key=lambda row: row["score"])["explanation"]["neighbors"]
    # The fixture's detector knows the files by their absolute paths elsewhere; these are copies of them here.
    first, second = (Path("train", *Path(neighbor["path"]).parts[-2:]) for neighbor in worst)
    first.unlink()
    second.write_bytes(b"broken")
    assert score("ood", "--grid", "g.png", "--neighbors", "2", "--training-root", "train").code == 0
    with Image.open("g.png") as picture:
        assert [_grey(_tile_of(picture, 0, column)) for column in (-1, 0, 1)] == [False, True, True]
        # "not found" and "cannot be read" do not look the same.
        assert (_tile_of(picture, 0, 0)[:64] != _tile_of(picture, 0, 1)[:64]).any()
        assert not all(_grey(_tile_of(picture, row, 0)) for row in range(1, 20))


def test_an_image_that_has_gone_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def drawable(text: str) -> str:
        drawn.append(text)
        return text

    monkeypatch.setattr(_grid, "_drawable", drawable)
    (tmp_path / "g.png").touch()
    assert _grey(np.asarray(_grid._tile(tmp_path / "gone.png", "gone.png", tmp_path / "g.png")))
    assert drawn == ["not found:", "gone.png"]
    # Nor does a name of any length take long.
    _grid._tile(None, "x" * 10**7, tmp_path / "g.png")
    assert len(drawn[-1]) <= 200


def test_a_name_from_a_detector_opens_nothing_but_images(digits: Path) -> None:
    os.mkfifo("pipe.png")
    for name in ("pipe.png", "net.grood", "/dev/zero", "/etc/passwd", "\x1b[31m" * 1000, "\u05d0\u202e日本" * 50):
        _rename_training_images(name)
        assert score("ood", "--grid", "g.png").code == 0
        with Image.open("g.png") as picture:
            assert _grey(_tile_of(picture, 0, 0))


def test_text_that_the_font_lacks(recwarn: pytest.WarningsRecorder) -> None:
    drawable = _grid._drawable
    assert drawable("a photo (1).png") == "a photo (1).png"
    assert drawable("Blüte é Ａ") == "Blute e A"
    assert drawable("日Ω") == "\\u65e5\\u03a9"
    assert drawable("\x1b\u202e\udcff\U0001f600") == "\\x1b\\u202e\\udcff\\U0001f600"
    assert all(map(_grid._has_glyph, "°…·~ "))
    assert len(recwarn) == 0


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=300), st.integers(20, 300))
def test_no_text_is_wider_than_its_place(text: str, width: int) -> None:
    from PIL import ImageDraw

    picture = Image.new("RGB", (width + 200, 40), "white")
    _grid._text(ImageDraw.Draw(picture), (0, 5), text, width, size=15)
    dark = np.nonzero((np.asarray(picture) < 250).any((0, 2)))[0]
    assert len(dark) == 0 or dark.max() <= width + 1


def test_a_long_name_keeps_its_end() -> None:
    drawn: list[str] = []

    class Draw:
        def text(self, corner: object, text: str, **rest: object) -> None:
            drawn.append(text)

    _grid._text(Draw(), (0, 0), "training-images-of-the-second-campaign/0123.png", 200, size=15)
    _grid._text(Draw(), (0, 0), "x" * 10_000 + "/0123.png", 200, size=15)
    assert all(text.endswith("/0123.png") and "…" in text for text in drawn)
    assert drawn[0].startswith("traini")


def test_the_picture_is_written_whole_or_not_at_all(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert score("ood", "--grid", "g.png").code == 0
    before, files = Path("g.png").read_bytes(), sorted(Path().iterdir())

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    result = score("test", "--grid", "g.png")
    assert (result.code, "g.png: No space left on device" in result.err) == (1, True), result.err
    assert (Path("g.png").read_bytes(), sorted(Path().iterdir())) == (before, files)


def test_no_image_is_overwritten(digits: Path) -> None:
    ood = next(Path("ood").iterdir())
    neighbor = max(score_json("ood", "--explain"), key=lambda row: row["score"])["explanation"]["neighbors"][0]["path"]
    near = Path("train", *Path(neighbor).parts[-2:])
    os.link(ood, "link.png")
    for target, message, options in (
        (ood, "would overwrite an image that is scored", ()),
        (Path("link.png"), "would overwrite an image that is scored", ()),
        (near, "would overwrite an image that it shows", ("--training-root", "train")),
    ):
        before = target.read_bytes()
        result = score("ood", "--grid", target, *options)
        assert (result.code, message in result.err) == (1, True), result.err
        assert target.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--neighbors", "3"), "--neighbors is for --explain and --grid"),
        (("--training-root", "train"), "--training-root is for --grid"),
        (("--training-root", "train", "--explain"), "--training-root is for --grid"),
        (("--grid", "g.png", "--training-root", "absent"), "--training-root absent: no such folder"),
        (("--grid", "g.gif"), "--grid g.gif must end in .png, .jpg, .jpeg, .webp"),
        (("--grid", "g"), "--grid g must end in"),
        (("--grid", "absent/g.png"), "the folder absent does not exist"),
        (("--grid", "train"), "--grid train must end in"),
        (("--grid", "g.png", "--output", "./g.png", "--format", "csv"), "--output and --grid both name g.png"),
    ],
)
def test_mistakes(digits: Path, options: tuple[str, ...], message: str) -> None:
    files = sorted(Path().iterdir())
    result = score("ood", *options)
    assert (result.code, result.out) == (1, "")
    assert message in result.err
    assert sorted(Path().iterdir()) == files


@pytest.mark.parametrize("k", ["0", "-1", "101", "x", "2.5"])
def test_numbers_of_neighbors_that_are_none(digits: Path, k: str) -> None:
    assert score("ood", "--explain", "--neighbors", k).code == 2


def test_a_pillow_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFont

    def fail(size: int) -> None:
        raise ImportError("The _imagingft C module is not installed")

    monkeypatch.setattr(ImageFont, "load_default", fail)
    font: Callable[[int], Any] = _grid._font.__wrapped__
    with pytest.raises(GroodError, match="Pillow is built without FreeType here"):
        font(14)
