"""Writing a file whole or not at all, and reading none that is too large."""

from __future__ import annotations

import glob
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch_grood.errors import GroodError

__all__ = ["alone", "read_at_most", "replacing", "sha256_of", "target_of"]

_DAY = 86_400


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which takes its place, synced to disk, if the block succeeds.

    A kill at any moment leaves the old file or the new one. A link is followed: what it names is replaced.

    Raises:
        GroodError: if the folder cannot be written to, or `path` is a device, a pipe or a folder.
    """
    path = target_of(path)
    temporary: Path | None = None
    try:
        _remove_litter(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        os.close(handle)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files for the owner alone; a file that the user asked for has the user's own mode.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise GroodError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def alone(lock: Path, doing: str) -> Iterator[None]:
    """Keep other processes out of the block, by a lock file that stays; the lock ends with the process.

    Args:
        lock: the file, made if it is not there.
        doing: what the other process would be doing, for the message.

    Raises:
        GroodError: if another process is in it.
    """
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GroodError(f"another process is {doing}; wait until it is done, then try again") from None
        yield


def read_at_most(path: str | os.PathLike[str], size: int, expected: str) -> bytes:
    """A file's content, of which no more than is allowed comes into memory.

    Args:
        path: of the file.
        size: bytes allowed, a whole number of MiB.
        expected: what the file should be, for the message.

    Raises:
        GroodError: if the file cannot be read, or is larger.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(size + 1)
    except OSError as error:
        raise GroodError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(content) > size:
        raise GroodError(f"{path} is larger than {size >> 20} MiB; expected {expected}")
    return content


def sha256_of(path: Path) -> str:
    """The hash of a file's content, in hexadecimal.

    Raises:
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_litter(path: Path) -> None:
    """Delete temporary files of `path` that a killed process left; one that still writes has a younger one."""
    for old in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > _DAY:
                old.unlink()


def target_of(path: Path) -> Path:
    """The file that writing to `path` replaces.

    Raises:
        GroodError: if that is something else than a file, which renaming would destroy.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        kind = "a folder; give the name of a file in it" if target.is_dir() else "not a regular file; give another name"
        raise GroodError(f"{path} is {kind}")
    return target


def _umask() -> int:
    # There is no call that only reads it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
