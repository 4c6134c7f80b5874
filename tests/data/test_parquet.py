"""Images in Parquet files: which rows, labels and names, and how they are read."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grey import png
from torch_grood.data import BadImageError, ImageSource, ImageTransform, ParquetColumns, image_loader, read_source
from torch_grood.data import parquet_reader as reader_module
from torch_grood.data.parquet import open_rows
from torch_grood.data.pixels import PixelLoader
from torch_grood.errors import GroodError

AS_IT_IS = ImageTransform(None, 4, "bilinear", (0.0,) * 3, (1.0,) * 3)


def write(path: Path, columns: dict[str, Any], rows: int = 2, features: Any = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=rows, **options)
    return path


def greys(source: ImageSource) -> list[int]:
    return [source.image(position).getpixel((0, 0))[0] for position in range(len(source))]  # type: ignore[index]


def pngs(*values: int) -> list[bytes]:
    return [png(value) for value in values]


def of_class(names: Sequence[str]) -> dict[str, Any]:
    return {"_type": "ClassLabel", "names": list(names)}


def test_numbers_as_labels_and_rows_as_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("t/a.parquet"), {"image": pngs(1, 2, 3), "label": pa.array([2, 0, -1], pa.int16())})
    write(Path("t/sub/b.parquet"), {"image": pngs(4), "label": pa.array([1], pa.int16())})
    write(Path("t/.cache/c.parquet"), {"image": pngs(5), "label": pa.array([1], pa.int16())})
    source = read_source("t")
    assert source.paths == ("t/a.parquet#0", "t/a.parquet#1", "t/a.parquet#2", "t/sub/b.parquet#0")
    assert (source.labels, source.classes, source.origin) == ((2, 0, -1, 1), None, "t")
    assert greys(source) == [1, 2, 3, 4]
    assert pickle.loads(pickle.dumps(source)) == source
    assert list(source.places()) == [f"{tmp_path}/{path}" for path in source.paths]
    whole = source.absolute()
    assert whole.paths == source.paths
    monkeypatch.chdir("/")
    assert greys(whole) == [1, 2, 3, 4]
    with pytest.raises(GroodError, match=r"a\.parquet#2: label −1 stands for OOD"):
        read_source(tmp_path / "t", labels="required")
    assert read_source(tmp_path / "t", labels="none").labels is None
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    system.pipe_file("/of-parquet/a.parquet", (tmp_path / "t" / "a.parquet").read_bytes())
    for url in ("memory://of-parquet", "memory://of-parquet/a.parquet", "memory://of-parquet/*.parquet"):
        there = read_source(url)
        assert there.paths == tuple(f"memory:///of-parquet/a.parquet#{row}" for row in range(3)) or (
            there.paths == tuple(f"memory://of-parquet/a.parquet#{row}" for row in range(3))
        )
        assert (there.labels, greys(there)) == ((2, 0, -1), [1, 2, 3])
    with pytest.raises(GroodError, match="no file fits this pattern"):
        read_source("memory://of-parquet/b*.parquet")


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_names_of_classes_are_sorted_as_folders_are(kind: str, tmp_path: Path) -> None:
    def column(*names: str) -> Any:
        array = pa.array(names)
        return array.dictionary_encode() if kind == "dictionary" else array.cast(getattr(pa, kind)())

    write(tmp_path / "t" / "1.parquet", {"image": pngs(1, 2), "label": column("b", "a"), "path": ["x.png", None]})
    write(tmp_path / "t" / "2.parquet", {"image": pngs(3, 4), "label": column("C", "b"), "path": ["y.png", "x.png"]})
    source = read_source(tmp_path / "t", labels="required")
    assert (source.classes, source.labels) == (("C", "a", "b"), (2, 1, 0, 2))
    assert source.paths == ("x.png", f"{tmp_path}/t/1.parquet#1", "y.png", "x.png")
    assert len(set(source.places())) == 4


def test_hugging_faces_description_names_classes_and_columns(tmp_path: Path) -> None:
    images = [{"bytes": content, "path": "a.png"} for content in pngs(1, 2, 3)]
    features = {"img": {"_type": "Image"}, "fine": of_class(["cat", "dog", "emu"]), "n": {"_type": "Value"}}
    columns = {"img": images, "fine": [1, 0, 1], "n": [7, 8, 9]}
    source = read_source(write(tmp_path / "a.parquet", columns, features=features), labels="required")
    assert (source.labels, source.classes, greys(source)) == ((1, 0, 1), ("cat", "dog", "emu"), [1, 2, 3])
    # Two classes of one name are numbers; a description that is none is passed over.
    for other in ({**features, "fine": of_class(["x", "x"])}, {"fine": of_class([])}, {"fine": 3}, [1]):
        path = write(tmp_path / "b.parquet", columns, features=other)
        found = read_source(path, columns=ParquetColumns(label="fine"))
        assert (found.labels, found.classes) == ((1, 0, 1), None)
    path = write(tmp_path / "c.parquet", columns, features={**features, "fine": of_class(["cat"])})
    with pytest.raises(GroodError, match=r"c\.parquet#0: 1 is no class; expected 0 … 0, of which the file has the"):
        read_source(path)
    write(tmp_path / "b.parquet", columns, features=features)
    write(path, columns, features={**features, "fine": of_class(["cat", "dog", "fox"])})
    with pytest.raises(GroodError, match=r"the column 'fine' of .*a\.parquet and of the other files differ"):
        read_source(tmp_path)


@pytest.mark.parametrize(
    ("columns", "asked", "message"),
    [
        ({"image": pngs(1)}, {}, r"has no column called label; name the one with the classes: --label-column"),
        ({"image": pngs(1), "label": [0.5]}, {}, "'label' holds double, not integers or names of classes"),
        ({"image": pngs(1), "label": [True]}, {}, "'label' holds bool, not integers"),
        ({"image": pngs(1, 2), "label": [0, None]}, {}, r"a\.parquet#1: no label in the column 'label'"),
        ({"image": pngs(1, 2), "label": [0, -2]}, {}, r"a\.parquet#1: -2 is no class; expected 0, 1, 2, … or −1"),
        ({"image": pngs(1), "label": [2**40]}, {}, r"a\.parquet#0: 1099511627776 is no class"),
        ({"image": pngs(1), "label": pa.array([2**63], pa.uint64())}, {}, "holds numbers that are no classes"),
        ({"image": pngs(1), "label": [0]}, {"label": "kind"}, "no column 'kind'; it has image, label.*--label-column"),
        ({"image": pngs(1), "label": [0]}, {"name": "kind"}, "no column 'kind'; it has image, label.*--name-column"),
        ({"image": pngs(1), "label": [0]}, {"image": "kind"}, "no column 'kind'; it has image, label.*--image-column"),
        ({"image": pngs(1), "label": [0]}, {"image": "label"}, "'label' holds int64, not image files as bytes"),
        ({"a": pngs(1), "b": pngs(1), "label": [0]}, {}, "no column is called image, and 2 hold bytes"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, {}, "has no row"),
    ],
)
def test_bad_columns(columns: dict[str, Any], asked: dict[str, str], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(GroodError, match=message):
        read_source(path, labels="required", columns=ParquetColumns(**asked))


def test_which_sources_are_parquet(tmp_path: Path) -> None:
    data = {"image": pngs(1), "label": [0]}
    for name in ("data/train-0-of-2", "data/train-1-of-2", "data/test-0-of-1", "more/x"):
        write(tmp_path / f"{name}.parquet", data)
    with pytest.raises(GroodError, match=r"Parquet files of test, train; pass those of one: .*data/test\*\.parquet"):
        read_source(tmp_path / "data", labels="required")
    assert len(read_source(tmp_path / "data", labels="none")) == 3
    assert len(read_source(f"{tmp_path}/data/train-*.parquet", labels="required")) == 2
    several = read_source([tmp_path / "data" / "test-0-of-1.parquet", tmp_path / "more"])
    assert (len(several), several.labels) == (2, None)
    # Images win: class folders may have a table of theirs beside them.
    (tmp_path / "more" / "a").mkdir()
    (tmp_path / "more" / "a" / "1.png").write_bytes(png(1))
    assert read_source(tmp_path / "more", labels="required").classes == ("a",)
    with pytest.raises(GroodError, match=r"train-0-of-2\.parquet is Parquet, and .*more is not"):
        read_source([tmp_path / "data" / "train-0-of-2.parquet", tmp_path / "more"])
    for name, message in (("none.parquet", "no such file"), ("n*.parquet", "no file fits this pattern")):
        with pytest.raises(GroodError, match=message):
            read_source(tmp_path / name)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(GroodError, match="cannot be read as Parquet"):
        read_source(tmp_path / "bad.parquet")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(file, row group) each time that one is begun in this process, which holds nothing before."""
    monkeypatch.setattr(reader_module, "_current", None)
    begun: list[tuple[str, int]] = []
    begin = reader_module._Reader._batches

    def noted(self: Any, column: Any, group: int, groups: tuple[int, ...]) -> Any:
        begun.append((Path(column.file).name, group))
        return begin(self, column, group, groups)

    monkeypatch.setattr(reader_module._Reader, "_batches", noted)
    return begun


def test_a_loader_reads_each_row_group_once_and_keeps_little(
    decoded: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_PIECE_BYTES", 2000)
    values = [i % 200 for i in range(300)]
    write(tmp_path / "a.parquet", {"image": pngs(*values[:200])}, rows=200)
    write(tmp_path / "b.parquet", {"image": pngs(*values[200:])}, rows=30)
    once = [("a.parquet", 0), *(("b.parquet", group) for group in range(4))]
    source = read_source(tmp_path)
    loader = image_loader(source, AS_IT_IS, batch_size=7, workers=0)
    seen = [round(float(value) * 255) for images, _, _ in loader for value in images[:, 0, 0, 0]]
    assert (seen, decoded) == (values, once)
    kept = reader_module._reader()._pieces
    assert len(kept) <= 4
    assert all(len(piece) <= 2000 // 70 for _, _, piece in kept)
    assert len(reader_module._reader()._files) <= 2
    # Threads are a little out of order, and the last pieces are there for them.
    decoded.clear()
    reader_module._current = None
    pixels = np.concatenate(list(PixelLoader(source, AS_IT_IS, batch_size=7, threads=4)))
    assert pixels[:, 0, 0, 0].tolist() == values
    assert sorted(set(decoded)) == once
    assert len(decoded) <= len(once) + 2
    # Any order gives the same.
    generator = np.random.default_rng(0)
    assert all(source.image(i).getpixel((0, 0)) == (values[i],) * 3 for i in generator.permutation(300).tolist()[:60])


def test_workers_read_what_one_process_reads(tmp_path: Path, decoded: list[tuple[str, int]]) -> None:
    values = [i % 200 for i in range(120)]
    write(tmp_path / "a.parquet", {"image": pngs(*values)}, rows=50)
    source = read_source(tmp_path / "a.parquet")
    # Something is open here when they begin.
    assert source.image(3).getpixel((0, 0)) == (3, 3, 3)
    loader = image_loader(source, AS_IT_IS, batch_size=8, workers=2)
    assert [round(float(v) * 255) for images, _, _ in loader for v in images[:, 0, 0, 0]] == values
    assert decoded == [("a.parquet", 0)]


def test_bad_rows_are_named_and_left_out(tmp_path: Path) -> None:
    images = [*pngs(1, 2), None, b"no image", b"", png(6)]
    path = write(tmp_path / "a.parquet", {"image": images, "id": [10, 11, 12, 13, 14, 15]}, rows=4)
    source = read_source(path)
    loader = image_loader(source, AS_IT_IS, batch_size=4, workers=0, on_bad="skip")
    assert [positions.tolist() for _, _, positions in loader] == [[0, 1], [5]]
    assert loader.bad == [
        ("12", f"the row holds no bytes of an image file ({path}#2)"),
        ("13", f"not an image, or damaged at its beginning ({path}#3)"),
        ("14", f"the file is empty ({path}#4)"),
    ]
    assert loader.names() == ["10", "11", "15"]
    with pytest.raises(BadImageError, match=r"12: the row holds no bytes .*a\.parquet#2\); on_bad='skip'"):
        list(image_loader(source, AS_IT_IS, workers=0))


def test_an_image_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", {"image": [png(1), png(2) + bytes(5000)]})
    monkeypatch.setattr("torch_grood.data.parquet.MAX_BYTES", 5000)
    source = read_source(path)
    assert source.image(0).size == (4, 4)
    with pytest.raises(BadImageError, match=r"a\.parquet#1: the image is larger than"):
        source.image(1)


def test_a_damaged_row_group_is_read_once(tmp_path: Path, decoded: list[tuple[str, int]]) -> None:
    images = [os.urandom(2000) for _ in range(60)]
    path = write(tmp_path / "a.parquet", {"image": images}, rows=20, compression="zstd", use_dictionary=False)
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start + 5 : start + 3000] = bytes(2995)
    path.write_bytes(content)
    rows = open_rows([str(path)])
    assert rows.content(3) == images[3]
    for row in (25, 30, 22):
        with pytest.raises(BadImageError, match=rf"a\.parquet#{row}: the Parquet file is damaged here"):
            rows.content(row)
    assert rows.content(45) == images[45]
    assert decoded == [("a.parquet", 0), ("a.parquet", 1), ("a.parquet", 2)]


def test_a_file_that_changes_is_noticed(tmp_path: Path, decoded: list[tuple[str, int]]) -> None:
    path = write(tmp_path / "a.parquet", {"image": pngs(1, 2, 3)})
    source = read_source(path)
    write(path, {"image": pngs(4, 5, 6, 7)})
    with pytest.raises(GroodError, match=r"a\.parquet has changed since it was first looked at; run again") as caught:
        source.image(0)
    assert not isinstance(caught.value, BadImageError)
    # Where nobody looked before, other row groups tell.
    old = open_rows([str(path)], stamped=False)
    write(path, {"image": pngs(4, 5, 6)})
    with pytest.raises(GroodError, match="has changed"):
        old.value(0)
    # A new look, in a process that had the old file open, finds the new one.
    assert greys(read_source(path)) == [4, 5, 6]
    write(path, {"image": pngs(8, 9, 10)})
    assert greys(read_source(path)) == [8, 9, 10]


def test_slices_know_their_names(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 50)):
        ids = [f"{first + i}" if i % 3 else None for i in range(10)]
        write(tmp_path / f"{name}.parquet", {"image": pngs(*range(first, first + 10)), "id": ids}, rows=3)
    rows = open_rows([f"{tmp_path}/a.parquet", f"{tmp_path}/b.parquet"])
    names, contents = rows.names(), [rows.content(i) for i in range(20)]
    assert names[:3] == [f"{tmp_path}/a.parquet#0", "1", "2"]
    for start in range(20):
        for stop in range(start + 1, 21):
            part = rows.slice((start, stop))
            assert part.names() == names[start:stop]
            assert [part.content(i) for i in (0, stop - start - 1)] == [contents[start], contents[stop - 1]]
            assert part.place(0) == rows.place(start)
