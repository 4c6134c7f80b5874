"""The loop: every input of a source has one row, in whatever way reading and deciding go wrong."""

from __future__ import annotations

import os
import threading
import time
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from watch_world import put, rows_of, stop_after

from grey import REFUSED, Grey, png
from torch_grood.errors import GroodError
from torch_grood.watching import Counts, Folder, Pipe, Stream, opened_journal, watch
from torch_grood.watching.seen import Seen

BY = "some detector"


def watch_folder(folder: Path, output: Path, runtime: Grey | None = None, **options: Any) -> Counts:
    looking = {name: options.pop(name) for name in ("once", "stop", "settle", "interval", "warn") if name in options}
    with opened_journal(output, BY, "folder") as journal:
        source = Folder(folder, journal.done.seen, **{"once": True, "settle": 0, "interval": 0.02} | looking)
        waiting = {"retry_after": 0.05, "max_wait": 0.02, "stop": looking.get("stop", lambda: False)}
        return watch(source, runtime or Grey(), journal, BY, **waiting | options)


def test_one_row_for_each_image(tmp_path: Path) -> None:
    put(tmp_path / "in/a.png", 10)
    put(tmp_path / "in/deep/er/b.PNG", 200)
    (tmp_path / "in/notes.txt").write_text("no image")
    put(tmp_path / "in/.hidden.png", 1)
    warned: list[str] = []
    assert watch_folder(tmp_path / "in", tmp_path / "out", warn=warned.append) == Counts(images=2, ood=1)
    found = {row["path"]: row for row in rows_of(tmp_path / "out")}
    assert set(found) == {str(tmp_path / "in/a.png"), str(tmp_path / "in/deep/er/b.PNG")}
    light = found[str(tmp_path / "in/deep/er/b.PNG")]
    assert (light["score"], light["p_value"], light["is_ood"]) == (200.0, 56 / 256, True)
    assert (light["label"], light["error"], light["by"]) == ("light", None, BY)
    assert warned == [f"{tmp_path / 'in'}: 1 files without an image's ending are left out"]


def test_a_second_run_does_what_is_new_and_what_was_replaced(tmp_path: Path) -> None:
    put(tmp_path / "in/a.png", 10)
    put(tmp_path / "in/b.png", 20)
    watch_folder(tmp_path / "in", tmp_path / "out")
    assert watch_folder(tmp_path / "in", tmp_path / "out") == Counts()
    put(tmp_path / "in/c.png", 30)
    replaced = put(tmp_path / "in/b.png", 40)
    os.utime(replaced, ns=(1, 1))
    assert watch_folder(tmp_path / "in", tmp_path / "out") == Counts(images=2)
    assert sorted(row["score"] for row in rows_of(tmp_path / "out")) == [10, 20, 30, 40]


def test_batches_are_shared_and_sizes_kept_apart(tmp_path: Path) -> None:
    for i in range(10):
        put(tmp_path / f"in/{i}.png", i, (4, 4) if i % 2 else (5, 3))
    runtime = Grey()
    watch_folder(tmp_path / "in", tmp_path / "out", runtime, batch_size=4)
    assert runtime.sizes == [2, 2, 2, 2, 1, 1]
    assert {row["score"] for row in rows_of(tmp_path / "out")} == set(range(10))


def test_what_cannot_be_read_has_a_row_that_says_why(tmp_path: Path) -> None:
    put(tmp_path / "in/good.png", 10)
    (tmp_path / "in/cut.png").write_bytes(png(20)[:40])
    (tmp_path / "in/empty.png").touch()
    put(tmp_path / "in/refused.png", REFUSED)
    assert watch_folder(tmp_path / "in", tmp_path / "out") == Counts(images=1, errors=3)
    errors = {Path(row["path"]).name: row["error"] for row in rows_of(tmp_path / "out")}
    assert errors["good.png"] is None
    assert "damaged" in errors["cut.png"]
    assert "empty" in errors["empty.png"] or "not an image" in errors["empty.png"]
    assert "no finite score" in errors["refused.png"]
    # They are done: nothing is tried for ever.
    assert watch_folder(tmp_path / "in", tmp_path / "out") == Counts()


def test_a_file_that_becomes_readable_is_tried_again(tmp_path: Path) -> None:
    path = put(tmp_path / "in/a.png", 10)
    whole, status = path.read_bytes(), path.stat()
    path.write_bytes(whole[:30] + bytes(len(whole) - 30))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    tries: list[int] = []

    def mend() -> None:
        tries.append(1)
        path.write_bytes(whole)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    threading.Timer(0.1, mend).start()
    assert watch_folder(tmp_path / "in", tmp_path / "out", retry_after=0.5) == Counts(images=1)
    assert tries == [1]


def test_a_file_that_grows_waits_until_it_stands_still(tmp_path: Path) -> None:
    content = png(10, (50, 50))
    path = tmp_path / "in/a.png"
    path.parent.mkdir()
    path.write_bytes(content[:10])
    writing = threading.Event()

    def write() -> None:
        for end in range(10, len(content) + 1):
            path.write_bytes(content[:end])
            time.sleep(0.005)
        writing.set()

    thread = threading.Thread(target=write)
    thread.start()
    counts = watch_folder(tmp_path / "in", tmp_path / "out", once=False, settle=0.3, stop=stop_after(2.5))
    thread.join()
    assert writing.is_set()
    assert counts == Counts(images=1)


def test_a_file_that_goes_between_being_found_and_read(tmp_path: Path) -> None:
    for i in range(3):
        put(tmp_path / f"in/{i}.png", i)
    runtime = Grey(before=lambda: (tmp_path / "in/2.png").unlink(missing_ok=True))
    with opened_journal(tmp_path / "out", BY, "folder") as journal:
        source = Folder(tmp_path / "in", journal.done.seen, once=True, settle=0)
        found = source.take(3, 1)
        assert len(found) == 3
        (tmp_path / "in/2.png").unlink()
        source._ready.extend(item.key for item in found if item.key)
        counts = watch(source, runtime, journal, BY, max_wait=0)
    assert counts == Counts(images=2, gone=1)


def test_links_are_left_out(tmp_path: Path) -> None:
    secret = put(tmp_path / "secret.png", 5)
    put(tmp_path / "in/a.png")
    (tmp_path / "in/link.png").symlink_to(secret)
    (tmp_path / "in/folder").symlink_to(tmp_path)
    warned: list[str] = []
    assert watch_folder(tmp_path / "in", tmp_path / "out", warn=warned.append) == Counts(images=1)
    assert warned == [f"{tmp_path / 'in'}: 2 symbolic links are left out"]


@pytest.mark.skipif(os.name != "posix", reason="names are bytes there")
def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    put(Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/\xff\n.png")), 7)
    assert watch_folder(tmp_path / "in", tmp_path / "out") == Counts(images=1)
    assert watch_folder(tmp_path / "in", tmp_path / "out") == Counts()
    (row,) = rows_of(tmp_path / "out")
    assert row["path"].endswith("\\udcff\n.png")


def test_a_folder_that_disappears(tmp_path: Path) -> None:
    put(tmp_path / "in/a.png")

    def move() -> None:
        if (tmp_path / "in").exists():
            (tmp_path / "in").rename(tmp_path / "elsewhere")

    with pytest.raises(GroodError, match="cannot be read any more"):
        watch_folder(tmp_path / "in", tmp_path / "out", Grey(before=move), once=False, stop=stop_after(20))
    assert len(rows_of(tmp_path / "out")) == 1


def test_stopping_leaves_the_rest_to_the_next_run(tmp_path: Path) -> None:
    for i in range(20):
        put(tmp_path / f"in/{i:02}.png", i)
    runtime = Grey()
    counts = watch_folder(
        tmp_path / "in", tmp_path / "out", runtime, batch_size=4, stop=lambda: len(runtime.sizes) >= 2
    )
    assert 8 <= counts.images < 20
    rest = watch_folder(tmp_path / "in", tmp_path / "out")
    assert counts.images + rest.images == 20
    assert sorted(row["score"] for row in rows_of(tmp_path / "out")) == list(range(20))


def test_a_window_smaller_than_the_folder(tmp_path: Path) -> None:
    for i in range(25):
        put(tmp_path / f"in/{i}.png", i)
    with opened_journal(tmp_path / "out", BY, "folder") as journal:
        source = Folder(tmp_path / "in", journal.done.seen, once=True, settle=0, window=4)
        assert watch(source, Grey(), journal, BY, batch_size=3, max_wait=0) == Counts(images=25)


def test_lines_from_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.png", 10)
    monkeypatch.chdir(tmp_path)
    data = b64encode(png(200)).decode()
    lines = ['{"path": "a.png"}', "", f'{{"id": "x", "data": "{data}"}}', f'{{"id": "x", "data": "{data}"}}', "{"]
    first = pipe_run(tmp_path, "\n".join(lines))
    assert first == (Counts(images=2, ood=1, errors=1), 1)
    again = pipe_run(tmp_path, "\n".join(lines))
    # What has an id is not scored again; a line without one cannot be told from another.
    assert again == (Counts(images=1, errors=1), 2)
    assert [row["id"] for row in rows_of(tmp_path / "out")].count("x") == 1


def pipe_run(folder: Path, text: str) -> tuple[Counts, int]:
    reading, writing = os.pipe()
    thread = threading.Thread(target=lambda: (os.write(writing, text.encode()), os.close(writing)))
    thread.start()
    try:
        with opened_journal(folder / "out", BY, "pipe") as journal:
            source = Pipe(reading, journal.done.seen)
            counts = watch(source, Grey(), journal, BY, max_wait=0.01, retry_after=0.01)
    finally:
        thread.join()
        os.close(reading)
    return counts, source.repeated


def test_uncalibrated(tmp_path: Path) -> None:
    class Uncalibrated(Grey):
        fpr = None

        def decide(self, pixels: Any) -> Any:
            return super().decide(pixels)._replace(p_value=None, is_ood=None)

    put(tmp_path / "in/a.png", 200)
    assert watch_folder(tmp_path / "in", tmp_path / "out", Uncalibrated()) == Counts(images=1)
    (row,) = rows_of(tmp_path / "out")
    assert (row["p_value"], row["is_ood"], row["score"]) == (None, None, 200.0)


def test_a_stream_that_grows(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    for i in range(4):
        put(tmp_path / f"{i}.png", i)
    file.write_text('{"path": "0.png"}\n{"path": "1.p')

    def grow() -> None:
        with file.open("a") as more:
            more.write('ng"}\n{"path": "2.png"}\n{"path": "3.png"}')

    threading.Timer(0.2, grow).start()
    with opened_journal(tmp_path / "out", BY, "stream") as journal:
        stop = stop_after(1)
        with Stream(file, journal.done.spans, journal.done.last, interval=0.02, stop=stop) as source:
            assert watch(source, Grey(), journal, BY, max_wait=0, stop=stop) == Counts(images=3)
    # The last line has no end; with `once`, it is taken for one since it is a request.
    with (
        opened_journal(tmp_path / "out", BY, "stream") as journal,
        Stream(file, journal.done.spans, journal.done.last, once=True) as source,
    ):
        assert watch(source, Grey(), journal, BY) == Counts(images=1)
    assert [row["score"] for row in rows_of(tmp_path / "out")] == [0, 1, 2, 3]


def test_seen_holds_many_keys() -> None:
    keys = [i.to_bytes(16, "big") for i in range(200_000)]
    seen = Seen(keys[::2])
    assert len(seen) == 100_000
    assert seen.among(keys[:4]) == [True, False, True, False]
    assert sum(seen.among(keys)) == 100_000
    seen.add(keys[0])
    assert len(seen) == 100_000
