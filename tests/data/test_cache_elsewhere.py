"""The feature cache, and fits by many processes, of images at URLs and in Parquet files."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("pyarrow")
pytest.importorskip("fsspec")

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from grey import png
from models import taught_cnn, write_patterns
from torch_grood import GROOD
from torch_grood.data import FeatureCache, ImageLoader, ImageSource, ImageTransform, image_loader, read_source
from torch_grood.data.cache import _hash_of_files
from torch_grood.errors import GroodError
from torch_grood.features import FeatureExtractor
from torch_grood.scale.filling import Filler, fill_as_rank

pytestmark = pytest.mark.usefixtures("one_thread")

AS_PATTERNS = ImageTransform(None, 8, "bilinear", (128 / 255,) * 3, (40 / 255,) * 3)
N, BATCH = 66, 4
KINDS = ("file", "parquet")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """{train,held_out}/<class>/*.png, and the same in Parquet files below parquet/."""
    folder = tmp_path_factory.mktemp("photos")
    for split, n, seed in (("train", N, 1), ("held_out", 30, 2)):
        source = read_source(write_patterns(folder / split, n, seed))
        assert source.labels is not None
        assert source.classes is not None
        table = pa.table(
            {
                "image": [{"bytes": Path(path).read_bytes(), "path": None} for path in source.paths],
                "label": [source.classes[label] for label in source.labels],
            }
        )
        half = len(table) // 2
        for part, rows in enumerate((table.slice(0, half), table.slice(half))):
            path = folder / "parquet" / split / f"{part}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(rows, path, row_group_size=7)
    return folder


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return taught_cnn()


def source_of(kind: str, photos: Path, split: str) -> ImageSource:
    where = {"here": photos / split, "file": f"file://{photos}/{split}", "parquet": photos / "parquet" / split}
    return read_source(where[kind], labels="required")


def loader(source: ImageSource) -> ImageLoader:
    return image_loader(source, AS_PATTERNS, batch_size=BATCH, workers=0)


def detector_of(kind: str, photos: Path, model: nn.Module, cache: FeatureCache | None = None) -> GROOD:
    detector = GROOD(model).fit(loader(source_of(kind, photos, "train")), progress=False, cache=cache)
    return detector.calibrate(loader(source_of(kind, photos, "held_out")), fpr=0.2, progress=False, cache=cache)


def saved(detector: GROOD, path: Path) -> str:
    detector.save(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_the_detector_is_that_of_the_folder(kind: str, photos: Path, model: nn.Module, tmp_path: Path) -> None:
    here, there = (detector_of(where, photos, model) for where in ("here", kind))
    assert here.classes_ == there.classes_
    images = torch.stack([images[0] for images, _, _ in loader(source_of("here", photos, "held_out"))])
    assert torch.equal(here.score(images, progress=False), there.score(images, progress=False))
    names = there.sample_names([0, N - 1])
    if kind == "parquet":
        assert names == [f"{photos}/parquet/train/0.parquet#0", f"{photos}/parquet/train/1.parquet#{N // 2 - 1}"]
    else:
        assert names == [f"file://{name}" for name in here.sample_names([0, N - 1])]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_kills_end_with_the_same_bytes(
    kind: str, photos: Path, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = saved(detector_of(kind, photos, model), tmp_path / "plain.grood")
    cache = FeatureCache(tmp_path / "cache", shard_images=12)
    for split in ("train", "held_out"):
        for rank in (1, 0):
            filler = Filler(FeatureExtractor(model), loader(source_of(kind, photos, split)), cache)
            fill_as_rank(filler, rank, 2)
    sizes: list[int] = []
    run = FeatureExtractor._run

    def counted(self: FeatureExtractor, inputs: torch.Tensor, *more: object) -> object:
        sizes.append(len(inputs))
        return run(self, inputs, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(FeatureExtractor, "_run", counted)
    assert saved(detector_of(kind, photos, model, cache), tmp_path / "ranks.grood") == expected
    assert set(sizes) == {1}

    # Killed in the middle: what was kept is not run again.
    class Killed(BaseException):
        pass

    def kill(steps: Iterator[object]) -> Iterator[object]:
        for number, step in enumerate(steps):
            if number == 9:
                raise Killed
            yield step

    other = FeatureCache(tmp_path / "other", shard_images=12)
    with pytest.raises(Killed):
        GROOD(model).fit(loader(source_of(kind, photos, "train")), progress=kill, cache=other)
    sizes.clear()
    assert saved(detector_of(kind, photos, model, other), tmp_path / "continued.grood") == expected
    assert 30 < sum(size for size in sizes if size > 1) <= N + 30 - 24


@pytest.mark.parametrize("kind", ["file", "memory", "parquet", "parquet at a URL"])
def test_a_change_is_another_entry(kind: str, tmp_path: Path) -> None:
    system = fsspec.filesystem("memory" if kind == "memory" else "file")
    root = f"/cache-of-{tmp_path.name}" if kind == "memory" else str(tmp_path)

    def put(name: str, *values: int) -> None:
        # What has times must show another one.
        time.sleep(0.01)
        system.makedirs(f"{root}/t", exist_ok=True)
        if kind.startswith("parquet"):
            pq.write_table(pa.table({"image": [png(v) for v in values], "label": [0] * len(values)}),
                           f"{root}/t/{name}.parquet", row_group_size=2)  # fmt: skip
        else:
            for number, value in enumerate(values):
                system.makedirs(f"{root}/t/{name}", exist_ok=True)
                system.pipe_file(f"{root}/t/{name}/{number}.png", png(value))

    def key() -> str:
        where = f"{root}/t" if kind == "parquet" else f"{'memory' if kind == 'memory' else 'file'}://{root}/t"
        return _hash_of_files(read_source(where))

    put("a", 1, 2, 3)
    put("b", 4)
    first = key()
    assert key() == first
    put("a", 1, 2, 5)
    assert key() != first
    second = key()
    put("c", 6)
    assert key() not in (first, second)
    source = read_source(f"{root}/t" if kind != "memory" else f"memory://{root}/t")
    assert source.labels is not None
    relabelled = replace(source, labels=tuple(1 - label for label in source.labels))
    assert _hash_of_files(relabelled) != _hash_of_files(source)


def test_the_folder_of_parquet_files_may_move_and_its_columns_count(photos: Path, tmp_path: Path) -> None:
    import shutil

    moved = Path(shutil.copytree(photos / "parquet" / "train", tmp_path / "moved"))
    source, elsewhere = source_of("parquet", photos, "train"), read_source(moved)
    assert _hash_of_files(source) == _hash_of_files(elsewhere)
    assert source.rows is not None
    assert _hash_of_files(replace(source, rows=replace(source.rows, image="x"))) != _hash_of_files(source)
    assert _hash_of_files(replace(source, rows=replace(source.rows, name="label"))) == _hash_of_files(source)


def test_a_parquet_file_that_changes_during_a_fit_stops_it(photos: Path, model: nn.Module, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(photos / "parquet" / "train", tmp_path / "t")
    images = loader(read_source(tmp_path / "t", labels="required"))
    path = tmp_path / "t" / "1.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=7)
    cache = FeatureCache(tmp_path / "cache", shard_images=12)
    with pytest.raises(GroodError, match=r"1\.parquet has changed since it was first looked at; run again"):
        GROOD(model).fit(images, progress=False, cache=cache)
    (key,) = (tmp_path / "cache").glob("*/key.json")
    assert json.loads(key.read_text())["n_files"] == N
