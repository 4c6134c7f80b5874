"""Reading an image file that somebody else may write, replace or delete meanwhile."""

from __future__ import annotations

import errno
import os
import stat

from torch_grood.data.images import BadImageError
from torch_grood.errors import GroodError
from torch_grood.watching.source import Gone

__all__ = ["MAX_FILE", "Rooted", "SystemLimitError", "read_found", "read_regular"]

MAX_FILE = 256 << 20
# Not the image's fault: every one would be found unreadable.
_OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class SystemLimitError(GroodError):
    """This process can read no file at all, now."""


def read_regular(path: str, expected: tuple[int, int] | None = None) -> bytes:
    """The content of a regular file, of which no more than `MAX_FILE` comes into memory; a link is not followed.

    Args:
        path: of the file.
        expected: its size and time of change in nanoseconds, before and after.

    Raises:
        Gone: if size or time are not those expected.
        OSError: if it cannot be read.
        BadImageError: if it is too large, or no regular file.
        SystemLimitError: if this process can open no more files.
    """
    try:
        handle = os.open(path, _FLAGS)
    except OSError as error:
        if error.errno in _OURS:
            raise SystemLimitError(
                f"no file can be read: {error.strerror}; what is decided is written, start again later"
            ) from None
        raise
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise BadImageError(path, "not a regular file")
    with os.fdopen(handle, "rb") as file:
        if expected is not None and _identity(status) != expected:
            raise Gone
        if status.st_size > MAX_FILE:
            raise BadImageError(path, f"it has {status.st_size:,} bytes, beyond the limit of {MAX_FILE >> 20} MiB")
        content = file.read(MAX_FILE + 1)
        if expected is not None and (_identity(os.fstat(handle)) != expected or len(content) != expected[0]):
            raise Gone
    return content


def read_found(path: str, size: int, mtime_ns: int) -> bytes:
    """The content of a file that a folder held.

    Raises:
        Gone: if it is not there, or another.
        OSError: as `read_regular`.
        GroodError: as `read_regular`.
    """
    try:
        return read_regular(path, (size, mtime_ns))
    except OSError as error:
        # ELOOP: a link has taken its place.
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise Gone from None
        raise


class Rooted:
    """Reads files by paths that come from anywhere, in one folder and nowhere else.

    Args:
        root: what paths are relative to.
    """

    def __init__(self, root: str) -> None:
        self._root = os.path.realpath(root)

    def read(self, path: str) -> bytes:
        """The content of a file; links are followed as long as they stay in the folder.

        Raises:
            OSError: as `read_regular`.
            GroodError: as `read_regular`; also for a path that leads out, or that no file can have.
        """
        try:
            real = os.path.realpath(os.path.join(self._root, path))  # noqa: PTH118 - a Path for each line is slow
            inside = os.path.commonpath([real, self._root]) == self._root
        except ValueError:
            raise BadImageError(path, "no file can have this path") from None
        if not inside:
            raise BadImageError(path, f"it lies outside {self._root}; --root names the folder that paths may lead to")
        try:
            return read_regular(real)
        except ValueError:
            raise BadImageError(path, "no file can have this path") from None


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
