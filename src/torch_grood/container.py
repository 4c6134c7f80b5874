"""Tensors and JSON in one safetensors file, of which no byte is used before it was checked.

The metadata of the safetensors header have one key, "torch-grood": the SHA-256 of a JSON text in hexadecimal, a space,
and the JSON (one key, since safetensors writes several in any order). It lists every tensor with its type and shape
under "tensors". The tensor "checksums", uint8 (m, 32), holds the SHA-256 of every block of 65,536 bytes of each other
tensor (the last block of a tensor is shorter), tensors in the order of their names; its own SHA-256 is in the JSON
under "checksums". So a chain of hashes leads from one line of the header to every byte, and a block can be checked
alone: a large tensor that is used here and there is memory-mapped, and its blocks are checked when they are first used.

Checksums find accidents. They are no signature: whoever changes a file on purpose computes them anew, so that whoever
reads one still checks what it says.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_grood._files import replacing
from torch_grood.errors import AlteredFileError, FormatError, GroodError, NewerFormatError, TruncatedFileError

__all__ = ["BLOCK", "Container", "Guard", "read", "write"]

BLOCK = 65_536
_KEY, _CHECKSUMS = "torch-grood", "checksums"
# What a header takes to be read is a multiple of its length, and none of ours comes near this.
_LONGEST_HEADER = 2 * 2**20
# A detector has a few dozen tensors; each takes memory, however small it is.
_MOST_TENSORS = 256
_MOST_DIGITS, _DEEPEST = 20, 100
_DIGEST = 32
# The first version whose files are checked by hashes.
_FIRST_CHECKED = 3
# Blocks that one thread hashes at a time.
_PART = 64


class Guard:
    """The checksums of one tensor's blocks, of which each is checked once, when its bytes are first used.

    Args:
        path: of the file, for messages.
        name: of the tensor.
        tensor: contiguous, memory-mapped.
        digests: SHA-256 of its blocks, uint8 (m, 32).
    """

    def __init__(self, path: Path, name: str, tensor: Tensor, digests: Tensor) -> None:
        self._path, self._name = path, name
        self._bytes = _as_bytes(tensor).numpy().data
        self._digests = digests
        self._checked = torch.zeros(len(digests), dtype=torch.bool)

    def check(self, start: int, stop: int) -> None:
        """Check the blocks that hold the bytes from `start` to `stop`.

        Raises:
            AlteredFileError: if one differs from what was written.
        """
        self.check_blocks(range(start // BLOCK, -(-stop // BLOCK)))

    def check_blocks(self, blocks: Iterable[int]) -> None:
        """As `check`, for blocks by number."""
        for block in blocks:
            if self._checked[block]:
                continue
            found = hashlib.sha256(self._bytes[block * BLOCK : (block + 1) * BLOCK]).digest()
            if found != bytes(self._digests[block].tolist()):
                raise AlteredFileError(
                    f"{self._path}: the tensor {self._name!r} was altered near its byte {block * BLOCK:,}; copy the "
                    "file again, or fit again"
                )
            self._checked[block] = True

    def check_all(self) -> None:
        """Check every block, on all cores."""
        pending = (~self._checked).nonzero().flatten().tolist()
        list(_on_all_cores(self.check_blocks, [pending[at : at + _PART] for at in range(0, len(pending), _PART)]))


@dataclass(frozen=True)
class Container:
    """What a file holds.

    Attributes:
        header: the JSON.
        tensors: by name, memory-mapped; without "checksums".
        guards: of those tensors that have not been checked yet.
        digest: SHA-256 of the JSON, in hexadecimal, which every byte hangs on; "" in formats without checksums.
    """

    header: dict[str, Any]
    tensors: dict[str, Tensor]
    guards: dict[str, Guard]
    digest: str = ""


def write(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Write a file whole or not at all; the same content gives the same bytes.

    Returns:
        `Container.digest`.

    Raises:
        GroodError: if the folder cannot be written to, or the header is not JSON.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensors[name].cpu().contiguous() for name in sorted(tensors)}
    digests = [_digests(tensor) for tensor in tensors.values()]
    checksums = torch.empty(0, _DIGEST, dtype=torch.uint8)
    if any(digests):
        checksums = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, _DIGEST)
    header = header | {
        "tensors": {name: _kind(tensor) for name, tensor in tensors.items()},
        _CHECKSUMS: hashlib.sha256(b"".join(digests)).hexdigest(),
    }
    try:
        # ASCII: a file name that is no Unicode has a lone surrogate in Python, which UTF-8 cannot hold.
        text = json.dumps(header, allow_nan=False)
        # What cannot be read is not written.
        _parsed(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise GroodError(f"the detector's metadata cannot be written as JSON: {error}") from None
    # Quotes are written as two characters in the table, which has a line for each tensor, too.
    if len(text) + text.count('"') + text.count("\\") > _LONGEST_HEADER - 2**16:
        raise GroodError(
            f"the detector's metadata and names of classes take {len(text):,} bytes, and a file holds "
            f"{_LONGEST_HEADER - 2**16:,}; keep less in detector.metadata"
        )
    digest = hashlib.sha256(text.encode()).hexdigest()
    text = f"{digest} {text}"
    with replacing(path) as temporary:
        try:
            save_file(tensors | {_CHECKSUMS: checksums}, temporary, metadata={_KEY: text})
        except SafetensorError as error:
            raise GroodError(f"cannot write {path}: {error}") from error
    return digest


def read(path: Path, version: int, *, lazy: Iterable[str] = (), eager_bytes: int = 256 * 2**20) -> Container:
    """Open a file and check it: nothing in it is executed, and what is large is memory-mapped.

    Args:
        path: a file that `write` wrote, or one of an older format, which has no checksums.
        version: the newest format that the caller understands.
        lazy: tensors that are left to their guards if the file is larger than `eager_bytes`; all others are checked.
        eager_bytes: see `lazy`.

    Raises:
        NewerFormatError: for a newer format.
        TruncatedFileError: if the end is missing.
        AlteredFileError: if a byte differs from what was written.
        FormatError: if it is no such file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FormatError(f"{path} is no regular file" if path.exists() else f"there is no detector file {path}")
    size = _check_header_length(path)
    try:
        with safe_open(path, framework="pt") as file:
            if len(file.keys()) > _MOST_TENSORS:
                raise AlteredFileError(f"{path} has {len(file.keys()):,} tensors; it was altered")
            metadata = file.metadata() or {}
            header, digest = _header(path, metadata, version)
            tensors = _tensors(path, file)
    except SafetensorError as error:
        raise _diagnosis(path, error) from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from None
    if header["format_version"] < _FIRST_CHECKED:
        return Container(header, tensors, {})
    guards = _guards(path, header, tensors)
    left = set(lazy) if size > eager_bytes else set()
    for name, guard in guards.items():
        if name not in left:
            guard.check_all()
    return Container(header, tensors, {name: guard for name, guard in guards.items() if name in left}, digest)


def _tensors(path: Path, file: Any) -> dict[str, Tensor]:
    try:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (RuntimeError, TypeError, ValueError, OverflowError, KeyError) as error:
        # safetensors takes every size whose product is right, and types that torch lacks.
        reason = str(error).splitlines()[0]
        raise AlteredFileError(f"{path}: a tensor cannot be read, it was altered: {reason}") from None


def _check_header_length(path: Path) -> int:
    """Refuse a long header before it is read; the size of the file.

    The file may be gone a moment later, where other processes delete.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LONGEST_HEADER and file.read(1) == b"{":
                raise AlteredFileError(f"{path}: the header has {length:,} bytes; the file was altered")
            if length > _LONGEST_HEADER:
                raise FormatError(f"{path} is no detector file: its header would have {length:,} bytes")
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from None


def _parsed(text: str) -> Any:
    """The JSON, strictly: numbers that other languages can read, and no more depth than a program can follow.

    Raises:
        ValueError: if it is no such JSON.
    """
    parsed = json.loads(text, parse_int=_integer, parse_float=_finite, parse_constant=_finite)
    level = [parsed]
    for _ in range(_DEEPEST):
        inside = [
            list(one.values()) if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))
        ]
        level = [value for values in inside for value in values]
        if not level:
            return parsed
    raise ValueError(f"it is nested more than {_DEEPEST} deep")


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number has {len(text):,} digits, more than {_MOST_DIGITS}")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number of JSON, or too large")
    return number


def _header(path: Path, metadata: dict[str, str], newest: int) -> tuple[dict[str, Any], str]:
    """The JSON, and its hash."""
    if _KEY not in metadata:
        raise FormatError(f"{path} is a safetensors file, but no detector of torch-grood")
    expected, space, text = metadata[_KEY].partition(" ")
    is_checked = bool(space) and not expected.startswith("{")
    if not is_checked:
        text = metadata[_KEY]
    elif hashlib.sha256(text.encode()).hexdigest() != expected:
        raise AlteredFileError(f"{path}: the header was altered; copy the file again, or fit again")
    try:
        header = _parsed(text)
    except (ValueError, RecursionError) as error:
        raise AlteredFileError(f"{path}: the header was altered: {error}") from None
    version = header.get("format_version") if isinstance(header, dict) else None
    if type(version) is not int or version < 1:
        raise AlteredFileError(f"{path} does not tell the version of its format; it was altered")
    if version > newest:
        raise NewerFormatError(
            f"{path} has format {version}, written by torch-grood {str(header.get('library_version'))[:20]}; this "
            f"version reads up to {newest}. Install a newer torch-grood."
        )
    if (version >= _FIRST_CHECKED) != is_checked:
        raise AlteredFileError(f"{path}: the checksum of the header is missing; copy the file again, or fit again")
    assert isinstance(header, dict)
    return header, expected if is_checked else ""


def _guards(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Guard]:
    """A guard for each tensor but the checksums, which are taken out and checked."""
    checksums = tensors.pop(_CHECKSUMS, None)
    if checksums is None or checksums.dtype != torch.uint8 or checksums.ndim != 2 or checksums.shape[1] != _DIGEST:
        raise AlteredFileError(f"{path}: the tensor {_CHECKSUMS!r} is missing or was altered")
    if hashlib.sha256(checksums.numpy().data).hexdigest() != header.get(_CHECKSUMS):
        raise AlteredFileError(f"{path}: the tensor {_CHECKSUMS!r} was altered; copy the file again, or fit again")
    if header.get("tensors") != {name: _kind(tensor) for name, tensor in tensors.items()}:
        raise AlteredFileError(f"{path}: the list of tensors was altered; copy the file again, or fit again")
    guards: dict[str, Guard] = {}
    first = 0
    for name in sorted(tensors):
        n_blocks = math.ceil(tensors[name].nbytes / BLOCK)
        guards[name] = Guard(path, name, tensors[name], checksums[first : first + n_blocks])
        first += n_blocks
    if first != len(checksums):
        raise AlteredFileError(f"{path}: there are {len(checksums):,} checksums for {first:,} blocks; it was altered")
    return guards


def _kind(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), *tensor.shape]


def _as_bytes(tensor: Tensor) -> Tensor:
    # One number counts as contiguous whatever its strides, and cannot be viewed with any but 1; nor can none.
    if tensor.numel() < 2:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def _digests(tensor: Tensor) -> bytes:
    content = _as_bytes(tensor).numpy().data

    def digests(first: int) -> bytes:
        part = content[first : first + _PART * BLOCK]
        return b"".join(hashlib.sha256(part[at : at + BLOCK]).digest() for at in range(0, len(part), BLOCK))

    return b"".join(_on_all_cores(digests, range(0, len(content), _PART * BLOCK)))


def _on_all_cores(work: Callable[[Any], Any], parts: Sequence[Any]) -> Iterable[Any]:
    """The results of work that hashes, which lets other threads run, in their order."""
    if len(parts) < 2:
        return map(work, parts)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, parts))


def _diagnosis(path: Path, error: Exception) -> FormatError:
    """Why safetensors cannot read a file: it says what is wrong with the bytes, not what happened to them."""
    try:
        return _found_wrong(path, error)
    except OSError as gone:
        return FormatError(f"{path} cannot be read: {gone.strerror or gone}")


def _found_wrong(path: Path, error: Exception) -> FormatError:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if 0 < length <= _LONGEST_HEADER and (text := file.read(length)).startswith(b"{"):
            end = 0
            if len(text) == length:
                try:
                    stored = json.loads(text)
                    end = max((entry["data_offsets"][1] for key, entry in stored.items() if key != "__metadata__"))
                except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
                    return AlteredFileError(f"{path} is no detector file, or was altered: {error}")
            if size < 8 + length + (end if type(end) is int else 0):
                return TruncatedFileError(
                    f"{path} is truncated: it has {size:,} bytes and should have more; copy it again, or fit again"
                )
            return AlteredFileError(f"{path} was altered: {error}; copy it again, or fit again")
    return FormatError(f"{path} is no detector file: {error}")
