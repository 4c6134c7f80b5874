"""What is missing, whole files, and folders elsewhere."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("fsspec")

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from torch_grood.errors import GroodError
from torch_grood.scale.parts import SCORES, Folder, missing

SCHEMA = pa.schema([("number", pa.int64())])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.data())
def test_what_is_missing_is_what_no_part_has(sizes: list[int], data: st.DataObject) -> None:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    # Parts are spans, or pieces of one; they do not overlap.
    done: list[tuple[int, int]] = []
    for start, stop in spans:
        cuts = sorted({start, stop, *data.draw(st.lists(st.integers(start, stop), max_size=3))})
        done += [piece for piece in itertools.pairwise(cuts) if data.draw(st.booleans())]
    found = missing(spans, sorted(done))
    covered = {number for start, stop in done for number in range(start, stop)}
    left = [number for start, stop in found for number in range(start, stop)]
    assert left == [number for number in range(ends[-1]) if number not in covered]
    assert all(any(a <= start and stop <= b for a, b in spans) for start, stop in found)


def test_some_spans_of_all() -> None:
    assert missing([(0, 4), (8, 12)], [(0, 4), (4, 8), (9, 10)]) == [(8, 9), (10, 12)]


@pytest.mark.parametrize("where", ["here", "memory"])
def test_parts_in_a_folder_here_or_elsewhere(where: str, tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "out") if where == "here" else f"memory://test-{random.randrange(10**9)}/out")
    assert folder.done() == []
    assert folder.read("job.json") is None
    folder.write_json("job.json", {"a": 1})
    assert folder.read("job.json") == {"a": 1}
    for span in ((64, 128), (0, 64)):
        folder.write_part(SCORES, span, [{"number": span[0]}], SCHEMA)
    assert folder.done() == [(0, 64), (64, 128)]
    folder.write(f"{SCORES}/something-else.txt", b"x")
    assert folder.done() == [(0, 64), (64, 128)]
    folder.write("job.json", b"{")
    with pytest.raises(GroodError, match="no JSON"):
        folder.read("job.json")


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(GroodError, match="cannot be written"):
        Folder(str(tmp_path / "file")).write_json("job.json", {})
