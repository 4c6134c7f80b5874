"""Fetching a benchmark's archives: whole or not at all, and never twice.

A ZIP file is downloaded to ``ROOT/.downloads`` (an interrupted download goes on where it stopped), checked, unpacked
beside the folder that it is for, and moved there in one step. A folder that is there already is left alone, whatever
it holds: it may be somebody's own work.

What comes from the network is not trusted: no member may lead out of its folder, be a link or a device, or blow up
beyond measure. An archive whose only top-level folder has the name of the target is taken for that folder's parent, so
that ``tin.zip`` may hold ``tin/…`` or its contents.
"""

from __future__ import annotations

import inspect
import lzma
import os
import secrets
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from torch_grood._files import alone, sha256_of
from torch_grood._optional import require
from torch_grood._progress import Progress, track
from torch_grood.errors import GroodError
from torch_grood.evaluation.image_sets import SetReport
from torch_grood.evaluation.spec import Archive, BenchmarkSpec

__all__ = ["archives_of", "fetch", "is_there"]

_DOWNLOADS = ".downloads"
_BLOCK = 1 << 20
_MAX_MEMBERS = 5_000_000
# Lists of paths shrink to a fifth and images hardly at all; a bomb shrinks to a thousandth.
_MAX_RATIO = 200
_CLUSTER = 4096
# Bytes that a name may have on every common file system.
_LONGEST_NAME = 255
_ENCRYPTED = 1
# Of silence, after which a server is taken to be gone.
_TIMEOUT = 60.0
_REFUSALS = ("DownloadError", "FileURLRetrievalError")
# What zipfile raises for files that are damaged, or made to be.
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,
    UnicodeError,
)


def archives_of(spec: BenchmarkSpec, reports: Iterable[SetReport]) -> tuple[Archive, ...]:
    """The archives that the sets which are not complete come from, in the order of the spec."""
    keys = {key for report in reports if report.status != "complete" for key in report.spec.archives}
    return tuple(archive for archive in spec.archives if archive.key in keys)


def is_there(archive: Archive, root: str | Path) -> bool:
    """Whether the archive's folder exists and holds something."""
    folder = Path(root) / archive.folder
    try:
        return folder.is_dir() and any(folder.iterdir())
    except OSError as error:
        raise GroodError(f"{folder} cannot be read: {error.strerror}") from None


def fetch(archive: Archive, root: str | Path, progress: Progress = None) -> bool:
    """Download and unpack one archive, unless its folder is there.

    Args:
        archive: one with a url.
        root: the data root; made if need be.
        progress: False for no bars; another callable sees the members that are unpacked.

    Returns:
        Whether something was fetched.

    Raises:
        GroodError: if the archive has no url, the download fails, the file is not what it should be, a member is not
            safe, the disk is full, or another process fetches into this root. What was there stays as it was.
    """
    root = Path(root)
    if is_there(archive, root):
        return False
    if archive.url is None:
        raise GroodError(f"{archive.title} cannot be fetched: {archive.manual}; it belongs to {root / archive.folder}")
    target = root / archive.folder
    try:
        downloads = root / _DOWNLOADS
        downloads.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Two downloads of the same file would write into each other's halves.
        with alone(downloads / "lock", f"fetching into {root}"):
            # Another process may have fetched it while this one waited to be alone.
            if is_there(archive, root):
                return False
            file = _download(archive, downloads, quiet=progress is False)
            try:
                _unpack(archive, file, target, progress)
            except _UnsafeArchiveError as error:
                # It would fail in the same way for ever.
                file.unlink()
                raise GroodError(
                    f"{archive.title}: what {archive.url} gave is not to be used: {error}; it was deleted. {_HINT}"
                    f"{target}"
                ) from None
            file.unlink()
    except OSError as error:
        raise GroodError(f"{archive.title} cannot be stored under {root}: {error.strerror or error}") from error
    return True


_HINT = "Try again later, or fetch it in a browser and unpack it to "


class _UnsafeArchiveError(Exception):
    """A downloaded file that is no ZIP file, or one that nobody should unpack."""


def _download(archive: Archive, downloads: Path, quiet: bool) -> Path:
    gdown = require("gdown", extra="data")
    file = downloads / f"{archive.key}.zip"
    if archive.size is not None and not file.exists():
        # The file and its contents, which are images and hardly shrink.
        _check_space(downloads, 2 * archive.size, archive)
    # The second is a kind of the first since gdown 6, which gdown 5 has not got.
    refused = tuple(vars(gdown.exceptions)[name] for name in _REFUSALS if name in vars(gdown.exceptions))
    try:
        # gdown 5 waits for ever.
        patience = {"timeout": _TIMEOUT} if "timeout" in inspect.signature(gdown.download).parameters else {}
        gdown.download(url=archive.url, output=str(file), resume=True, quiet=quiet, **patience)
    except (OSError, *refused) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise GroodError(
            f"{archive.title}: {archive.url} could not be fetched: {reason:.500}. What has come so far is kept. {_HINT}"
            f"{downloads.parent / archive.folder}"
        ) from None
    if archive.sha256 is not None:
        found = sha256_of(file)
        if found != archive.sha256:
            file.unlink()
            raise GroodError(
                f"{archive.title}: what {archive.url} gave has the SHA-256 {found}, expected {archive.sha256}; it was "
                "deleted. Try again; if it stays so, the file has changed at its source"
            )
    return file


def _check_space(folder: Path, needed: int, archive: Archive) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise GroodError(
            f"{archive.title} needs about {needed / 1e9:.1f} GB under {folder.parent}, where {free / 1e9:.1f} GB are "
            "free; make room, or choose another --root"
        )


def _unpack(archive: Archive, file: Path, target: Path, progress: Progress) -> None:
    # Under the lock nobody else unpacks, so that these are what a killed process left.
    for old in target.parent.glob(f".{target.name}.unpacking-*"):
        shutil.rmtree(old)
    temporary = target.parent / f".{target.name}.unpacking-{secrets.token_hex(4)}"
    try:
        with zipfile.ZipFile(file) as archived:
            members = _members(archived, file.stat().st_size)
            room = sum(info.file_size + _CLUSTER for _, info in members)
            _check_space(target.parent, room, archive)
            temporary.mkdir()
            for path, info in track(members, progress, f"unpack {archive.key}"):
                _write(archived, info, temporary / path)
        os.sync()  # Without it a power cut may leave empty files in a folder that looks whole.
        inner = temporary / target.name
        only = inner.is_dir() and len(list(temporary.iterdir())) == 1
        (inner if only else temporary).replace(target)
    except _UNREADABLE as error:
        raise _UnsafeArchiveError(f"it is no ZIP file that can be read ({error})") from None
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def _members(archived: zipfile.ZipFile, size: int) -> list[tuple[PurePosixPath, zipfile.ZipInfo]]:
    """The files in an archive, each with its safe path."""
    infos = archived.infolist()
    if len(infos) > _MAX_MEMBERS:
        raise _UnsafeArchiveError(f"it has {len(infos):,} members, more than {_MAX_MEMBERS:,}")
    total = sum(info.file_size for info in infos)
    if total > _MAX_RATIO * size:
        raise _UnsafeArchiveError(f"its {size:,} bytes would unpack to {total:,}")
    members = []
    seen: set[PurePosixPath] = set()
    for info in infos:
        path = _safe_path(info)
        if info.is_dir() or path.parts[0] == "__MACOSX" or path.name == ".DS_Store":
            continue
        if path in seen:
            raise _UnsafeArchiveError(f"it holds {info.filename!r:.100} twice")
        seen.add(path)
        members.append((path, info))
    if not members:
        raise _UnsafeArchiveError("it is empty")
    if both := seen & {folder for path in seen for folder in path.parents}:
        raise _UnsafeArchiveError(f"its member {str(min(both))!r:.100} is a file and a folder")
    return members


def _safe_path(info: zipfile.ZipInfo) -> PurePosixPath:
    name = info.filename
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name or ":" in path.parts[0]:
        raise _UnsafeArchiveError(f"its member {name!r:.100} would lie outside the folder")
    if max(len(part.encode(errors="surrogatepass")) for part in path.parts) > _LONGEST_NAME:
        raise _UnsafeArchiveError(f"its member {name!r:.100} has a name of more than {_LONGEST_NAME} bytes")
    # The upper half of the attributes is the Unix mode; 0 where the archive was made elsewhere.
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _UnsafeArchiveError(f"its member {name!r:.100} is a link or a device")
    if info.flag_bits & _ENCRYPTED:
        raise _UnsafeArchiveError(f"its member {name!r:.100} is encrypted")
    return path


def _write(archived: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # zipfile stops at the size that the directory states, and checks the checksum at the end.
    with archived.open(info) as source, path.open("xb") as file:
        shutil.copyfileobj(source, file, _BLOCK)
