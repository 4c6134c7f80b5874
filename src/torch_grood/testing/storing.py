"""Laws of files: one that is read back is the detector that was saved, or it is refused; and it executes nothing."""

from __future__ import annotations

import contextlib
import io
import json
import pickletools
import random
import subprocess
import sys
import tempfile
import unittest
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from torch_grood.testing import world
from torch_grood.testing.clause import clause, refuses, require, require_same
from torch_grood.testing.uses import Use

_TIMEOUT = 120
_FRESH = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from torch_grood.testing.fresh import main; main()"
_FLIPS = 60


@contextlib.contextmanager
def _saved(use: Use, detector: Any) -> Iterator[Path]:
    """The detector's file, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.file"
        detector.save(path)
        require(path.is_file(), f"save({path.name!r}) wrote no file of that name")
        yield path


@clause("save", "load")
def loaded_is_what_was_saved(use: Use) -> None:
    """A loaded detector gives the same scores and decisions, bit for bit, and the file alone is all it needs.

    What was tested must be what is put to use. The file is moved before it is loaded; a detector without a threshold
    still has none.
    """
    for detector in (use.ready(), use.fitted()):
        calibrated = use.decides(detector) and _predicts(use, detector)
        expected = use.outcome(detector, decide=calibrated)
        with _saved(use, detector) as path, tempfile.TemporaryDirectory() as elsewhere:
            others = sorted(other.name for other in path.parent.iterdir() if other != path)
            require(not others, f"save wrote other files beside its own: {', '.join(others)}")
            moved = path.rename(Path(elsewhere) / "moved.file")
            loaded = use.load(detector, moved)
            require_same(use.outcome(loaded, decide=calibrated), expected, "after save and load")
            if use.decides(detector) and not calibrated:
                refuses(lambda: use.predict(loaded, use.known), "predict, loaded without a threshold,")  # noqa: B023


def _predicts(use: Use, detector: Any) -> bool:
    try:
        use.predict(detector, use.known)
    except (ValueError, RuntimeError):
        return False
    return True


@clause("save", "load")
def fresh_process_loads_the_same(use: Use) -> None:
    """A process that never saw the detector loads the same bits from its file, and unpickles nothing on the way.

    Registries, caches and random numbers of the process that saved it are not in the file.
    """
    detector = use.ready()
    kind = type(detector)
    unknown = f"another process cannot import {kind.__qualname__}; define it in a module"
    if kind.__module__ == "__main__" or "<locals>" in kind.__qualname__:
        raise unittest.SkipTest(unknown)
    with _saved(use, detector) as path:
        found = path.with_name("outcome.json")
        arguments = [use.name, kind.__module__, kind.__qualname__, str(path), str(found), str(torch.get_num_threads())]
        done = subprocess.run(
            [sys.executable, "-c", _FRESH, json.dumps(sys.path), *arguments],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        require(done.returncode == 0, f"a fresh process could not load the file: {last[0]}")
        answer = json.loads(found.read_text())
    if "not_importable" in answer:
        raise unittest.SkipTest(f"{unknown} ({answer['not_importable']})")
    require(not answer["unpickled"], f"loading unpickled {', '.join(answer['unpickled'])}; a pickle executes code")
    expected = {name: value.numpy().tobytes().hex() for name, value in use.outcome(detector).items()}
    differing = sorted(name for name, value in expected.items() if answer["outcome"].get(name) != value)
    require(not differing, f"a fresh process found other bits for {', '.join(differing)}")


@clause("save", "load")
def same_detector_same_bytes(use: Use) -> None:
    """Saving twice gives equal bytes, and so does saving what was loaded.

    Equal detectors can then be told by a hash, and a file store keeps one. No date, no address, no order of a set.
    """
    detector = use.ready()
    with _saved(use, detector) as first, _saved(use, detector) as second:
        expected = first.read_bytes()
        require(second.read_bytes() == expected, "two files of one detector differ")
        with _saved(use, use.load(detector, first)) as again:
            require(again.read_bytes() == expected, "the file of the loaded detector differs from the one it came from")


@clause("save", "load")
def damaged_file_is_refused(use: Use) -> None:
    """A file that was cut off is refused with words; one with a flipped bit too, or it loads as the same detector.

    Disks and networks damage files. A detector that is off by one bit of an exponent decides, and decides wrongly. A
    large file may be checked when it is first used, not when it is loaded.
    """
    detector = use.ready()
    expected = use.outcome(detector)
    with _saved(use, detector) as path:
        whole = path.read_bytes()
        for length in sorted({0, 1, 8, len(whole) // 4, len(whole) // 2, len(whole) - 8, len(whole) - 1}):
            path.write_bytes(whole[:length])
            refuses(lambda: use.load(detector, path), f"a file cut off at byte {length} of {len(whole)}", (OSError,))
        draw = random.Random(0)
        for _ in range(_FLIPS):
            position, bit = draw.randrange(len(whole)), draw.randrange(8)
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            # In place, a file that a loaded detector still maps would change under it.
            path.unlink()
            path.write_bytes(flipped)
            where = f"with bit {bit} of byte {position} flipped"
            try:
                found = use.outcome(use.load(detector, path))
            except Exception:
                refuses(lambda: use.outcome(use.load(detector, path)), f"a file {where}", (OSError,))
            else:
                require_same(found, expected, f"after loading a file {where}, which was not refused")


@clause("save", "load")
def file_is_no_pickle(use: Use) -> None:
    """The file is no pickle, and no zip archive, as torch.save writes with a pickle in it.

    A pickle executes what its author wrote: opening a detector must be safe whoever made it.
    """
    with _saved(use, use.ready()) as path:
        content = path.read_bytes()
    require(not zipfile.is_zipfile(io.BytesIO(content)), "the file is a zip archive, as torch.save writes")
    require(not _is_pickle(content), "the file is a pickle")


def _is_pickle(content: bytes) -> bool:
    """Is it read as one from the first byte to the last? Protocols 0 and 1 have no mark at the beginning."""
    try:
        *_, (_, _, end) = pickletools.genops(content)
    except (ValueError, UnicodeDecodeError, IndexError, OverflowError):
        return False
    return end == len(content) - 1


@clause("save", "load", uses=("images",))
def other_model_is_refused(use: Use) -> None:
    """A file is refused, with words, for a classifier with other weights than it was fitted on.

    Its scores would be about features that it has never seen, and look like any others.
    """
    detector = use.ready()
    with _saved(use, detector) as path:
        other = world.classifier(seed=1)
        refuses(lambda: type(detector).load(path, other), "a file with the classifier of another training")
