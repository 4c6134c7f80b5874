"""`grood fit` and `grood calibrate` on Parquet files and URLs: by one process, by ranks and by Ray, the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("fsspec")

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from command import PREPARED, Result, run

FIT = ("fit", "--model", "nets.py:net", "--weights", "net.safetensors", *PREPARED, "--batch-size", "16")
MODEL = ("--model", "nets.py:net", "--weights", "net.safetensors")
PARQUET = ("--train", "p/train-*.parquet", "--calibrate", "p/val-0.parquet", "--image-column", "img")


@pytest.fixture
def elsewhere(digits: Path) -> Path:
    """The images of the folders as p/{train,val}-N.parquet, too: the names of classes as Hugging Face's datasets do."""
    from torch_grood.data import read_source

    for split, parts in (("train", 2), ("val", 1)):
        source = read_source(split)
        features = {"img": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": source.classes}}
        images = [{"bytes": Path(path).read_bytes(), "path": path} for path in source.paths]
        table = pa.table({"img": images, "kind": source.labels, "thumb": [b""] * len(source)})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        (digits / "p").mkdir(exist_ok=True)
        size = -(-len(table) // parts)
        for part in range(parts):
            pq.write_table(table.slice(part * size, size), f"p/{split}-{part}.parquet", row_group_size=50)
    return digits


def sha256(name: str) -> str:
    return hashlib.sha256(Path(name).read_bytes()).hexdigest()


def assert_decides_as_the_folders(detector: str) -> None:
    def scores(name: str) -> list[tuple[float, float]]:
        found = run("score", name, "test", "ood", *MODEL, "--format", "json", "--batch-size", "16")
        assert found.code == 0, found.err
        return [(row["score"], row["p_value"]) for row in json.loads(found.raw)]

    assert scores(detector) == scores("of-folders.grood")


def fit(*arguments: object) -> Result:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = run(*FIT, *arguments)
    finally:
        torch.set_num_threads(before)
    assert found.code == 0, found.err
    return found


def sources(folder: Path) -> dict[str, tuple[str, ...]]:
    return {
        "parquet": PARQUET,
        "url": ("--train", f"file://{folder}/train", "--calibrate", f"file://{folder}/val"),
        "list": ("--train", "urls.txt", "--root", f"file://{folder}", "--calibrate", f"file://{folder}/val"),
    }


@pytest.mark.parametrize("kind", ["parquet", "url", "list"])
def test_one_process_and_ranks_write_the_same_file(kind: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_grood.data import read_source

    source = read_source("train")
    assert source.labels is not None
    Path("urls.txt").write_text("".join(f"{p} {y}\n" for p, y in zip(source.paths, source.labels, strict=True)))
    where = sources(elsewhere)[kind]
    fit("--train", "train", "--calibrate", "val", "--output", "of-folders.grood", "--quiet")
    said = fit(*where, "--output", "plain.grood")
    assert f"training images: {len(source):,} from {where[1]}" in said.err
    assert "warning" not in said.err
    assert_decides_as_the_folders("plain.grood")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        fit(*where, "--output", "ranks.grood", "--cache", "features", "--engine", "torchrun", "--quiet")
        assert Path("ranks.grood").exists() == (rank == "0")
    assert sha256("ranks.grood") == sha256("plain.grood")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "url"])
def test_ray_writes_the_same_file(kind: str, elsewhere: Path) -> None:
    pytest.importorskip("ray")
    where = sources(elsewhere)[kind]
    fit(*where, "--output", "plain.grood", "--quiet")
    scaled = (*where, "--output", "ray.grood", "--cache", "features", "--engine", "ray", "--parallel", "2")
    command = [sys.executable, "-m", "torch_grood", *FIT, *scaled]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert found.returncode == 0, found.stderr
    assert sha256("ray.grood") == sha256("plain.grood")


@pytest.mark.usefixtures("elsewhere")
def test_calibrate_takes_parquet_and_says_what_is_wrong() -> None:
    columns = ("--image-column", "img")
    found = run("calibrate", "net.grood", "p/val-0.parquet", *columns, *MODEL, "--output", "p.grood", "--fpr", "0.1")
    assert found.code == 0, found.err
    again = run("calibrate", "net.grood", "val", *MODEL, "--output", "f.grood", "--fpr", "0.1")
    assert found.out.replace("p.grood", "f.grood") == again.out
    for arguments, message in (
        (("p/val-0.parquet", "--image-column", "label"), "no column 'label'; it has img, kind, thumb"),
        (("p/val-0.parquet",), "no column is called image, and 2 hold bytes"),
        (("p/val-0.parquet", *columns, "--label-column", "x"), "no column 'x'; it has img, kind, thumb. Name another"),
        (("val", *columns), "--name-column are for Parquet files, and there are none; leave them out"),
        (("p/*.parquet", *columns), "of 540 calibration samples are training samples (p/train-0.parquet#0"),
    ):
        wrong = run("calibrate", "net.grood", *arguments, *MODEL)
        assert wrong.code == 1
        assert message in wrong.err


@pytest.mark.usefixtures("elsewhere")
def test_the_same_rows_may_not_calibrate_and_bad_ones_are_skipped() -> None:
    found = run(*FIT, "--train", "p/train-*.parquet", "--calibrate", "p/train-0.parquet", "--image-column", "img",
                "--output", "x.grood")  # fmt: skip
    assert found.code == 1
    assert "calibration images are training images" in found.err
    assert "p/train-0.parquet#0" in found.err
    table = pq.read_table("p/train-0.parquet")
    images = table.column("img").to_pylist()
    images[3] = {"bytes": b"no image", "path": ""}
    pq.write_table(table.set_column(0, "img", pa.array(images)).replace_schema_metadata(table.schema.metadata),
                   "p/train-0.parquet")  # fmt: skip
    refused = run(*FIT, *PARQUET, "--output", "x.grood")
    assert refused.code == 1
    assert "p/train-0.parquet#3: not an image, or damaged at its beginning; on_bad='skip' (--skip-bad)" in refused.err
    skipped = run(*FIT, *PARQUET, "--output", "x.grood", "--skip-bad")
    assert skipped.code == 0
    assert "left out 1 unreadable of" in skipped.err


@pytest.mark.usefixtures("elsewhere")
def test_score_takes_them_without_an_engine(elsewhere: Path) -> None:
    pq.write_table(pq.read_table("p/val-0.parquet").select(["img"]), "of-images.parquet")

    def scores(*arguments: object) -> list[float]:
        found = run("score", "net.grood", *arguments, *MODEL, "--format", "json", "--batch-size", "16")
        assert found.code == 0, found.err
        rows = json.loads(found.raw)
        assert str(rows[0]["path"]).startswith(str(arguments[0]))
        return [row["score"] for row in rows]

    assert scores("of-images.parquet") == scores(f"file://{elsewhere}/val") == scores("val")
    # What may be drawn are files here: a row, and what is at a URL, is a grey tile.
    for where in ("of-images.parquet", f"file://{elsewhere}/val"):
        for _ in range(2):
            found = run("score", "net.grood", where, *MODEL, "--grid", "why.png", "--format", "json")
            assert (found.code, Path("why.png").exists()) == (0, True)
