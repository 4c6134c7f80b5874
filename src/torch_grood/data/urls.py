"""Files at URLs: whatever fsspec knows, s3://, gs://, abfs://, http://, file://, memory://.

What a file is, is told by its stamp, a hash of what the file system says of it: size, times, checksums. Nothing here
is asked for by a name that a detector's file brings along.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch_grood._optional import require
from torch_grood.data.images import BadImageError
from torch_grood.errors import GroodError

__all__ = [
    "MAX_BYTES",
    "content_of",
    "files_below",
    "glob_urls",
    "is_url",
    "joined",
    "kind_of",
    "opened",
    "parent_of",
    "stamp_of_file",
    "stamps_of",
]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z0-9+.:-]*)?://")
# An image file may be so long; what is longer is no image.
MAX_BYTES = 256 * 2**20

# What file systems call size, time and checksum. Not the inode: a copy on another machine has another one.
_TOLD = (
    *("size", "mtime", "LastModified", "last_modified", "updated", "modified", "date_time"),
    *("ETag", "etag", "md5Hash", "Content-MD5", "crc32c", "CRC", "checksum", "content_hash", "blob_id"),
    *("generation", "VersionId", "version_id"),
)
# Asked for one by one; of more in one folder, the folder is listed.
_FEW = 4
_THREADS = 16


def is_url(path: object) -> bool:
    """Whether a path is a URL. A `Path` never is: it has lost one of the slashes."""
    return isinstance(path, str) and _URL.match(path) is not None


def kind_of(url: str) -> Literal["file", "folder"] | None:
    """What is there now; None if nothing is.

    Raises:
        GroodError: if the file system cannot be asked.
    """
    with _asking(url):
        system, path = _system(url, anew=True)
        if system.isfile(path):
            return "file"
        return "folder" if system.isdir(path) else None


def files_below(url: str) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """All files below a URL: (URL, stamp) by name relative to it; and the relative names of all folders.

    Raises:
        GroodError: if the file system cannot be asked.
    """
    with _asking(url):
        system, path = _system(url, anew=True)
        found: Mapping[str, Mapping[str, Any]] = system.find(path, withdirs=True, detail=True)
    start = len(path.rstrip("/"))
    files: dict[str, tuple[str, str]] = {}
    folders: list[str] = []
    for name, info in found.items():
        relative = name[start:].strip("/")
        if info.get("type") == "directory":
            folders.append(relative)
        elif relative:
            files[relative] = str(system.unstrip_protocol(name)), _stamp(info)
    return files, [name for name in folders if name]


def glob_urls(url: str) -> list[str]:
    """The URLs that fit a pattern with * and ?, sorted.

    Raises:
        GroodError: if the file system cannot be asked.
    """
    with _asking(url):
        system, path = _system(url, anew=True)
        return sorted(str(system.unstrip_protocol(name)) for name in system.glob(path))


def stamps_of(urls: Sequence[str]) -> list[str | None]:
    """A stamp for each file; None for what is no file.

    Raises:
        GroodError: if a file system cannot be asked.
    """
    by_folder: dict[str, list[int]] = {}
    for position, url in enumerate(urls):
        by_folder.setdefault(parent_of(url), []).append(position)
    tasks: list[list[int]] = []
    for folder, positions in by_folder.items():
        step = len(positions) if len(positions) > _FEW and _can_be_listed(folder) else 1
        tasks += [positions[at : at + step] for at in range(0, len(positions), step)]
    found: list[str | None] = [None] * len(urls)
    with ThreadPoolExecutor(min(_THREADS, max(1, len(tasks)))) as pool:
        for task, stamps in zip(tasks, pool.map(lambda task: _looked_at([urls[i] for i in task]), tasks), strict=True):
            for position, stamp in zip(task, stamps, strict=True):
                found[position] = stamp
    return found


def stamp_of_file(path: str) -> str:
    """Of a file here or at a URL; "absent" where there is none, which to read it will find out.

    Raises:
        GroodError: if a file system cannot be asked.
    """
    if is_url(path):
        return _looked_at([path], anew=True)[0] or "absent"
    try:
        status = Path(path).stat()
    except OSError:
        return "absent"
    return f"{status.st_size} {status.st_mtime_ns}"


def opened(path: str) -> Any:
    """A stream of a file here or at a URL.

    Raises:
        GroodError: if it cannot be opened.
    """
    with _asking(path):
        if not is_url(path):
            return Path(path).open("rb")
        system, inside = _system(path)
        return system.open(inside, "rb")


def content_of(path: str) -> bytes:
    """The bytes of an image file here or at a URL, `MAX_BYTES` at most.

    Raises:
        BadImageError: if there is no such file, it may not be read, or is longer.
        GroodError: if the file system fails: another time it may not, so that nothing is said of the image.
    """
    try:
        with _asking(path), opened(path) as stream:
            content: bytes = stream.read(MAX_BYTES + 1)
    except _AbsentError as error:
        raise BadImageError(path, error.reason) from None
    if len(content) > MAX_BYTES:
        raise BadImageError(path, f"the file is larger than {MAX_BYTES >> 20} MiB")
    return content


def joined(folder: str, name: str) -> str:
    """A URL below another one."""
    return folder + ("" if folder.endswith("/") else "/") + name


def parent_of(url: str) -> str:
    """The folder of a URL; that of a root is the root."""
    protocol, _, path = url.partition("://")
    return f"{protocol}://{path.rstrip('/').rpartition('/')[0]}"


def _system(url: str, *, anew: bool = False) -> tuple[Any, str]:
    """The file system and the path there; `anew` forgets what it was told before."""
    if "::" in url:
        # Some run code that a file holds, and archives read their contents anew for each file.
        raise GroodError(f"{url} is a chain of URLs (::); name the file or folder itself")
    system, path = require("fsspec.core", extra="scale").url_to_fs(url)
    if anew:
        system.invalidate_cache()
    return system, path


def _can_be_listed(folder: str) -> bool:
    return not folder.startswith("http")


def _looked_at(urls: Sequence[str], *, anew: bool = False) -> list[str | None]:
    """Stamps of one file, or of several in one folder."""
    try:
        with _asking(urls[0]):
            if len(urls) == 1:
                system, path = _system(urls[0], anew=anew)
                infos = {urls[0]: system.info(path)}
            else:
                system, path = _system(parent_of(urls[0]))
                names = {info["name"].rstrip("/").rpartition("/")[2]: info for info in system.ls(path, detail=True)}
                infos = {url: info for url in urls if (info := names.get(url.rpartition("/")[2])) is not None}
    except _AbsentError:
        return [None] * len(urls)
    return [_stamp(infos[url]) if url in infos and infos[url].get("type") == "file" else None for url in urls]


def _stamp(info: Mapping[str, Any]) -> str:
    known = {key: value for key, value in info.items() if value is not None}
    names = [key for key in _TOLD if key in known]
    # A system that tells of no change may make a file anew; elsewhere, more than the content changes it.
    names += ["created"] if len(names) < 2 and "created" in known else []
    # Of one time, to list and to ask may give the number or the date.
    times = {key: known[key].timestamp() for key in names if hasattr(known[key], "timestamp")}
    told = [f"{key}={times.get(key, known[key])}" for key in names]
    return hashlib.blake2b("\0".join(told).encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


class _AbsentError(GroodError):
    """A URL where no file is that may be read."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url}: {reason}")
        self.reason = reason


@contextmanager
def _asking(url: str) -> Iterator[None]:
    try:
        yield
    except GroodError:
        raise
    except FileNotFoundError:
        raise _AbsentError(url, "no such file") from None
    except (IsADirectoryError, NotADirectoryError):
        raise _AbsentError(url, "not a regular file") from None
    except PermissionError as error:
        raise _AbsentError(url, f"it may not be read ({error.strerror or error})") from None
    # Each file system has errors of its own: of botocore, of aiohttp, …
    except Exception as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise GroodError(
            f"{url} cannot be looked at ({reason:.500}); check the URL and its access, and run again"
        ) from None
