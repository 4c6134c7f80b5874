"""The output as the journal: what is cut off, what is refused, and what happens when it cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from watch_world import put, rows_of

from grey import Grey
from torch_grood.errors import GroodError
from torch_grood.watching import Counts, Folder, Item, made_by, opened_journal, watch
from torch_grood.watching.rows import error_row

BY = "some detector"


def row(name: str = "a.png", key: bytes = b"k" * 16) -> dict[str, object]:
    return error_row(Item(name, key, bytes), "no reason", BY, "now")


def written(path: Path, *names: str) -> bytes:
    with opened_journal(path, BY, "folder") as journal:
        journal.append([row(name, name.encode().ljust(16)) for name in names])
    return path.read_bytes()


def test_a_torn_row_is_cut_off_at_every_byte(tmp_path: Path) -> None:
    whole = written(tmp_path / "out", "a", "b")
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        (tmp_path / "out").write_bytes(whole[:end])
        with opened_journal(tmp_path / "out", BY, "folder") as journal:
            assert (journal.done.rows, journal.cut) == (1, end - first)
            assert b"a".ljust(16) in journal.done.seen
            assert b"b".ljust(16) not in journal.done.seen
            journal.append([row("b", b"b".ljust(16))])
        assert (tmp_path / "out").read_bytes() == whole


@pytest.mark.parametrize("zeros", [1, 4096])
def test_zeros_of_a_power_failure_are_cut_off(tmp_path: Path, zeros: int) -> None:
    whole = written(tmp_path / "out", "a", "b")
    first = whole.index(b"\n") + 1
    (tmp_path / "out").write_bytes(whole[: first + 20] + bytes(zeros) + whole[first + 20 + zeros :])
    with opened_journal(tmp_path / "out", BY, "folder") as journal:
        assert journal.done.rows == 1
    assert (tmp_path / "out").read_bytes() == whole[:first]


@pytest.mark.parametrize(
    "content",
    [
        b"My notes\n",
        b"no line end",
        b'{"path": 3}\n',
        b'{"path": "a", "key": "zz", "by": "some detector"}\n',
        b'{"path": "a", "key": null, "by": 3}\n',
        b'{"path": "a", "key": null, "by": "some detector", "offset": -1, "length": 2}\n',
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b'{"path": "a"' + b"x" * 300_000,
        b"[" * 100_000 + b"\n",
    ],
)
def test_a_file_that_is_not_ours_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "out").write_bytes(content)
    with (
        pytest.raises(GroodError, match=r"line 1: not a row|holds decisions about"),
        opened_journal(tmp_path / "out", BY, "folder"),
    ):
        raise AssertionError
    assert (tmp_path / "out").read_bytes() == content


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    whole = written(tmp_path / "out", "a", "b", "c")
    second = whole.index(b"\n") + 1
    damaged = whole[: second + 5] + b"\n" + whole[second + 5 :]
    (tmp_path / "out").write_bytes(damaged)
    with pytest.raises(GroodError, match="line 2: not a row"), opened_journal(tmp_path / "out", BY, "folder"):
        raise AssertionError
    assert (tmp_path / "out").read_bytes() == damaged


def test_another_detector_or_source_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "out", "a")
    with (
        pytest.raises(GroodError, match="made by some detector, and this is another"),
        opened_journal(tmp_path / "out", "another", "folder"),
    ):
        raise AssertionError
    with (
        pytest.raises(GroodError, match="decisions about a folder, and this is the standard input"),
        opened_journal(tmp_path / "out", BY, "pipe"),
    ):
        raise AssertionError
    with opened_journal(tmp_path / "new", "another", "folder", [tmp_path / "out"]) as journal:
        assert b"a".ljust(16) in journal.done.seen
    with (
        pytest.raises(GroodError, match="cannot be read"),
        opened_journal(tmp_path / "new", "another", "folder", [tmp_path / "none"]),
    ):
        raise AssertionError


def test_two_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from torch_grood.watching import opened_journal\n"
        f"with opened_journal(pathlib.Path(sys.argv[1]), {BY!r}, 'folder'):\n"
        "    print('open', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with (
            pytest.raises(GroodError, match="another process is writing decisions"),
            opened_journal(tmp_path / "out", BY, "folder"),
        ):
            raise AssertionError
        other.communicate()
    with opened_journal(tmp_path / "out", BY, "folder"):
        pass


@pytest.mark.parametrize("how", ["grown", "moved", "replaced"])
def test_somebody_else_changes_the_output(tmp_path: Path, how: str) -> None:
    out = tmp_path / "out"
    with opened_journal(out, BY, "folder") as journal:
        journal.append([row()])
        if how == "grown":
            with out.open("ab") as file:
                file.write(b"note\n")
        else:
            out.rename(tmp_path / "old")
            if how == "replaced":
                out.touch()
        with pytest.raises(GroodError, match=r"was (changed|moved, removed or replaced) by somebody else"):
            journal.append([row()])


def test_a_full_disk_leaves_whole_rows(tmp_path: Path) -> None:
    """A limit on the size of files is the disk that is full: the write stops in the middle of a row."""
    for i in range(30):
        put(tmp_path / f"in/{i}.png", i)
    code = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from grey import Grey
from torch_grood.errors import GroodError
from torch_grood.watching import Folder, opened_journal, watch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
with opened_journal(folder / "out", "some detector", "folder") as journal:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
    try:
        watch(Folder(folder / "in", journal.done.seen, once=True, settle=0), Grey(), journal, "some detector",
              batch_size=8)
    except GroodError as error:
        print(error)
"""
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent.parent)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "cannot write" in found.stdout
    assert "nothing is lost" in found.stdout
    before = len(rows_of(tmp_path / "out"))
    assert 0 < before < 30
    with opened_journal(tmp_path / "out", BY, "folder") as journal:
        source = Folder(tmp_path / "in", journal.done.seen, once=True, settle=0)
        assert watch(source, Grey(), journal, BY) == Counts(images=30 - before)
    assert sorted(row["score"] for row in rows_of(tmp_path / "out")) == list(range(30))


def test_made_by_tells_detectors_and_rules_apart(tmp_path: Path) -> None:
    file = tmp_path / "d"
    file.write_bytes(b"one")
    names = {made_by(file, Grey()), made_by(file, Grey(), tau=0.5)}
    other_rate = Grey()
    other_rate.fpr = None
    names.add(made_by(file, other_rate))
    file.write_bytes(b"two")
    names.add(made_by(file, Grey()))
    assert len(names) == 4
    with pytest.raises(GroodError, match="cannot be read"):
        made_by(tmp_path / "none", Grey())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(GroodError, match="cannot write"), opened_journal(tmp_path / "out", BY, "folder"):
        raise AssertionError


def test_rows_are_json_of_one_line(tmp_path: Path) -> None:
    (line,) = written(tmp_path / "out", "a\n\u2028ü").splitlines()
    assert json.loads(line)["path"] == "a\n\u2028ü"
    assert line.isascii()
