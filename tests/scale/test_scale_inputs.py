"""Inputs by number: files, URLs and rows of Parquet."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("fsspec")

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st
from scaled_world import greys

from grey import png
from torch_grood.data.images import BadImageError
from torch_grood.errors import GroodError
from torch_grood.scale.inputs import FileInputs, Inputs, ParquetInputs, inputs_of


def contents(inputs: Inputs) -> list[tuple[str, bytes]]:
    return [(name, read()) for name, read in inputs.read()]


def table_file(path: Path, values: list[Any], rows: int, *, kind: str = "binary", names: bool = True) -> None:
    images = [None if value is None else png(value) for value in values]
    if kind == "struct":
        images = [{"bytes": image, "path": "x"} for image in images]
    columns = {"image": images, "label": list(range(len(values)))}
    if names:
        columns["id"] = [f"row {place}" for place in range(len(values))]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows)


def test_files_of_a_folder_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = greys(tmp_path / "images", [1, 2, 3, 4, 5])
    monkeypatch.chdir(tmp_path)
    inputs = inputs_of(["images"])
    assert inputs == FileInputs(tuple(paths))
    assert inputs.spans(2) == [(0, 2), (2, 4), (4, 5)]
    assert contents(inputs.slice((1, 3))) == [(paths[1], png(2)), (paths[2], png(3))]
    assert inputs.digest() != FileInputs(tuple(reversed(paths))).digest()


def test_files_of_a_url(tmp_path: Path) -> None:
    system, root = fsspec.filesystem("memory"), f"/bucket-{random.randrange(10**9)}"
    for name in ("b/2.png", "a/1.PNG", "a/notes.txt"):
        system.pipe_file(f"{root}/{name}", png(len(name)))
    inputs = inputs_of([f"memory:/{root}"])
    assert [name for name, _ in contents(inputs)] == [f"memory://{root}/a/1.PNG", f"memory://{root}/b/2.png"]
    with pytest.raises(GroodError, match="no such file or folder"):
        inputs_of([f"memory:/{root}/nowhere"])
    system.pipe_file(f"{root}/texts/a.txt", b"a")
    with pytest.raises(GroodError, match="holds no image"):
        inputs_of([f"memory:/{root}/texts"])
    with pytest.raises(GroodError, match="cannot be looked at"):
        inputs_of(["nosuchprotocol://bucket/images"])


def test_what_cannot_be_read_says_so_when_it_is_read(tmp_path: Path) -> None:
    inputs = FileInputs((str(tmp_path / "gone.png"), "memory://nowhere/gone.png"))
    for name, read in inputs.read():
        with pytest.raises(BadImageError, match="gone"):
            read()
        assert name.endswith("gone.png")


@pytest.mark.parametrize("kind", ["binary", "struct"])
def test_rows_of_parquet_files(kind: str, tmp_path: Path) -> None:
    table_file(tmp_path / "t" / "a.parquet", [1, 2, 3, 4, 5], rows=2, kind=kind)
    table_file(tmp_path / "t" / "sub" / "b.parquet", [6, 7], rows=2, kind=kind)
    inputs = inputs_of([str(tmp_path / "t")])
    assert isinstance(inputs, ParquetInputs)
    assert contents(inputs) == [
        *((f"row {place}", png(place + 1)) for place in range(5)),
        *((f"row {place}", png(place + 6)) for place in range(2)),
    ]
    assert inputs == inputs_of([str(tmp_path / "t" / "a.parquet"), str(tmp_path / "t" / "sub" / "b.parquet")])


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=3), st.integers(1, 5), st.data()
)
def test_slices_and_spans_of_parquet(groups: list[list[int]], size: int, data: st.DataObject) -> None:
    total = sum(map(sum, groups))
    rows = [(file, row) for file, of_file in enumerate(groups) for row in range(sum(of_file))]
    inputs = ParquetInputs(
        tuple(f"file{i}" for i in range(len(groups))), tuple(map(tuple, groups)), "image", None, 0, total
    )
    spans = inputs.spans(size)
    assert [number for start, stop in spans for number in range(start, stop)] == list(range(total))
    assert all(stop - start <= 8 * size for start, stop in spans)
    if total:
        start = data.draw(st.integers(0, total - 1))
        stop = data.draw(st.integers(start + 1, total))
        part = inputs.slice((start, stop))
        assert len(part) == stop - start
        # What it stands for: rows start … stop of the files that it still has.
        left = [(file, row) for file in part.files for row in range(sum(groups[int(file.removeprefix("file"))]))]
        meant = [(int(file.removeprefix("file")), row) for file, row in left][part.start : part.stop]
        assert meant == rows[start:stop]
        if stop - start > 1:
            again = part.slice((1, stop - start))
            left = [(file, row) for file in again.files for row in range(sum(groups[int(file.removeprefix("file"))]))]
            meant = [(int(file.removeprefix("file")), row) for file, row in left][again.start : again.stop]
            assert meant == rows[start + 1 : stop]


def test_a_slice_reads_its_rows(tmp_path: Path) -> None:
    table_file(tmp_path / "a.parquet", [1, 2, 3, 4, 5], rows=2, names=False)
    table_file(tmp_path / "b.parquet", [6, None, 8], rows=3, names=False)
    inputs = inputs_of([str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")])
    found = list(inputs.slice((3, 8)).read())
    assert [name for name, _ in found] == [
        *(f"{tmp_path}/a.parquet#{row}" for row in (3, 4)),
        *(f"{tmp_path}/b.parquet#{row}" for row in (0, 1, 2)),
    ]
    assert [read() for _, read in found if "b.parquet#1" not in _] == [png(value) for value in (4, 5, 6, 8)]
    with pytest.raises(BadImageError, match="holds no bytes"):
        found[3][1]()


def test_columns_by_name_and_what_is_no_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"photo": [png(1)], "thumb": [b""], "file_name": ["x.png"]}), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    with pytest.raises(GroodError, match=r"no column is called image, and 2 hold bytes.*--image-column"):
        inputs_of([path])
    with pytest.raises(GroodError, match="no column 'picture'"):
        inputs_of([path], image_column="picture")
    assert contents(inputs_of([path], image_column="photo")) == [("x.png", png(1))]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(GroodError, match="cannot be read as Parquet"):
        inputs_of([str(tmp_path / "b.parquet")])
    with pytest.raises(GroodError, match="no such file"):
        inputs_of([str(tmp_path / "c.parquet")])
    greys(tmp_path / "images", [1])
    with pytest.raises(GroodError, match="one after the other"):
        inputs_of([path, str(tmp_path / "images")], image_column="photo")
    with pytest.raises(GroodError, match="columns are for Parquet"):
        inputs_of([str(tmp_path / "images")], image_column="photo")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "d.parquet")
    with pytest.raises(GroodError, match="has no row"):
        inputs_of([str(tmp_path / "d.parquet")])
