"""JSON lines: where they begin and end, what they ask for, and a file that is no longer the one that was read."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from watch_world import put, rows_of

from grey import Grey, png
from torch_grood.data.images import BadImageError
from torch_grood.errors import GroodError
from torch_grood.watching import Counts, Stream, opened_journal, watch
from torch_grood.watching.files import Rooted, read_regular
from torch_grood.watching.lines import Lines, parse_request
from torch_grood.watching.spans import Spans

BY = "some detector"


@contextmanager
def stream(folder: Path) -> Iterator[tuple[Stream, Counts]]:
    """What is in s.jsonl, decided into out."""
    with (
        opened_journal(folder / "out", BY, "stream") as journal,
        Stream(folder / "s.jsonl", journal.done.spans, journal.done.last, once=True) as source,
    ):
        yield source, watch(source, Grey(), journal, BY, retry_after=0.01)


@given(st.lists(st.sampled_from([b"", b"  ", b"ab", b"\r", b"long line"])), st.lists(st.integers(1, 9)), st.booleans())
def test_lines_are_those_of_the_whole(lines: list[bytes], cuts: list[int], ends: bool) -> None:
    whole = b"\n".join(lines) + b"\n" * ends
    found, splitter, place = [], Lines(longest=6), 0
    for size in [*cuts, len(whole) + 1]:
        splitter.feed(whole[place : place + size])
        place = min(place + size, len(whole))
        while line := splitter.pop():
            found.append(line)
    if line := splitter.rest():
        found.append(line)
    expected = [part.strip() if len(part) <= 6 else None for part in whole.split(b"\n") if part.strip()]
    # A line's end counts as one of its bytes.
    assert [None if line.content is None else line.content for line in found] == expected
    assert all(one.start + one.length == other.start for one, other in itertools.pairwise(found))
    assert not found or found[0].start == 0
    assert not found or found[-1].start + found[-1].length <= len(whole)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.randoms())
def test_spans_know_what_is_done(lengths: list[int], random: object) -> None:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    order = list(range(len(lengths)))
    random.shuffle(order)  # type: ignore[attr-defined]
    spans, done = Spans(), set()
    for i in order:
        spans.add(starts[i], lengths[i])
        spans.add(starts[i], lengths[i])
        done.add(i)
        assert [start in spans for start in starts] == [i in done for i in range(len(starts))]
    assert spans.end == sum(lengths)
    assert spans.islands == {}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "no JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "either a path or data"),
        (b'{"path": "a", "data": ""}', "either a path or data"),
        (b'{"path": 3}', "a path is a text"),
        (b'{"path": ""}', "a path is a text"),
        (b'{"data": "AAAA"}', "without an id"),
        (b'{"id": 1.5, "data": "AAAA"}', "an id is a text"),
        (b'{"id": true, "path": "a"}', "an id is a text"),
        (b'{"id": "a", "data": "A!!A"}', "no base64"),
        (b'{"id": "a", "data": 3}', "data are a text"),
        (None, "longer than 64 MiB"),
    ],
)
def test_lines_that_ask_for_nothing(line: bytes | None, message: str) -> None:
    with pytest.raises(GroodError, match=message):
        parse_request(line)


def test_every_line_has_one_row(tmp_path: Path) -> None:
    put(tmp_path / "a.png", 10)
    put(tmp_path / "below/b.png", 20)
    (tmp_path / "below/cut.png").write_bytes(png(9)[:30])
    (tmp_path / "link.png").symlink_to("/etc/hostname")
    lines = [{"path": path} for path in ("a.png", "below/b.png", "below/cut.png", "none.png", "../x.png", "link.png")]
    lines += [{"path": "a\0.png"}, {"path": "a.png", "id": "once more"}, {"path": "\ud800.png"}, {"path": "below"}]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with stream(tmp_path) as (source, counts):
        assert counts == Counts(images=3, errors=7)
        assert not source.left
    with stream(tmp_path) as (_, counts):
        assert counts == Counts()
    rows = {row["offset"]: row for row in rows_of(tmp_path / "out")}
    assert len(rows) == len(lines) == len(rows_of(tmp_path / "out"))
    outcomes = [rows[offset]["error"] or rows[offset]["score"] for offset in sorted(rows)]
    assert outcomes[:2] == [10, 20]
    assert "lies outside" in outcomes[4]
    assert "lies outside" in outcomes[5]
    assert rows[max(rows)]["path"] == "below"


def test_a_line_without_an_end_waits(tmp_path: Path) -> None:
    put(tmp_path / "a.png", 10)
    (tmp_path / "s.jsonl").write_text('{"path": "a.png"}\n{"path": "a.p')
    with stream(tmp_path) as (source, counts):
        assert counts == Counts(images=1)
        assert source.left
    (tmp_path / "s.jsonl").write_text('{"path": "a.png"}\n{"path": "a.png"}\n')
    with stream(tmp_path) as (source, counts):
        assert counts == Counts(images=1)
        assert not source.left


@pytest.mark.parametrize(
    ("now", "message"),
    [('{"path": "a.png"}\n', "truncated or replaced"), ('{"path": "b.png"}\n' * 3, "something else at byte 18")],
)
def test_another_file_is_refused(tmp_path: Path, now: str, message: str) -> None:
    put(tmp_path / "a.png", 10)
    (tmp_path / "s.jsonl").write_text('{"path": "a.png"}\n' * 2)
    with stream(tmp_path):
        pass
    (tmp_path / "s.jsonl").write_text(now)
    with pytest.raises(GroodError, match=message), stream(tmp_path):
        pass
    assert len(rows_of(tmp_path / "out")) == 2


@pytest.mark.parametrize(("how", "message"), [("truncate", "was truncated"), ("replace", "was replaced by another")])
def test_a_file_that_changes_while_it_is_watched(tmp_path: Path, how: str, message: str) -> None:
    put(tmp_path / "a.png", 10)
    file = tmp_path / "s.jsonl"
    file.write_text('{"path": "a.png"}\n')

    def change() -> None:
        if how == "truncate":
            file.write_text("")
        else:
            (tmp_path / "new").write_text("more than there was before")
            (tmp_path / "new").replace(file)

    with (
        opened_journal(tmp_path / "out", BY, "stream") as journal,
        Stream(file, journal.done.spans, interval=0.01) as source,
        pytest.raises(GroodError, match=message),
    ):
        watch(source, Grey(before=change), journal, BY, max_wait=0)
    assert len(rows_of(tmp_path / "out")) == 1


def test_paths_stay_in_their_folder(tmp_path: Path) -> None:
    put(tmp_path / "in/a.png", 3)
    put(tmp_path / "other/b.png", 3)
    rooted = Rooted(str(tmp_path / "in"))
    assert rooted.read("a.png") == rooted.read(str(tmp_path / "in/a.png")) == png(3)
    for path in ("../other/b.png", str(tmp_path / "other/b.png"), "", "..", "/", "a\0"):
        with pytest.raises(BadImageError):
            rooted.read(path)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
        with pytest.raises(BadImageError, match="not a regular file"):
            read_regular(str(path))
