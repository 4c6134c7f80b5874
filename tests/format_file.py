"""Detector files read and written as docs/format.md says, with nothing of ours: the specification is enough."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, empty, frombuffer, uint8

KEY = "torch-grood"
BLOCK = 65_536


def parts(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors but the checksums, unchecked, of a file of any format."""
    with safe_open(path, framework="pt") as file:
        text = file.metadata()[KEY]
    header = json.loads(text if text.startswith("{") else text.partition(" ")[2])
    tensors = load_file(path)
    tensors.pop("checksums", None)
    return header, tensors


def seal(path: Path, header: Any, tensors: dict[str, Tensor], text: str | None = None) -> None:
    """Write a file whose hashes are right whatever it says; `text` is written in place of the header's JSON."""
    if isinstance(header, dict):
        header = header | lists_of(tensors)
    digests = _digests(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    tensors["checksums"] = (frombuffer(bytearray(digests), dtype=uint8) if digests else empty(0, dtype=uint8)).view(
        -1, 32
    )
    text = json.dumps(header) if text is None else text
    save_file(tensors, path, metadata={KEY: f"{hashlib.sha256(text.encode()).hexdigest()} {text}"})


def lists_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the description says of the tensors."""
    return {
        "tensors": {name: [str(x.dtype).removeprefix("torch."), *x.shape] for name, x in tensors.items()},
        "checksums": hashlib.sha256(_digests(tensors)).hexdigest(),
    }


def write_unchecked(path: Path, header: Any, tensors: dict[str, Tensor], text: str | None = None) -> None:
    """As `seal`, in the manner of formats 1 and 2, which have no hashes."""
    text = json.dumps(header) if text is None else text
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={KEY: text})


def place_of(path: Path, name: str) -> range:
    """Where in the file the bytes of a tensor are."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        begin, end = json.loads(file.read(length))[name]["data_offsets"]
    return range(8 + length + begin, 8 + length + end)


def alter(path: Path, place: int, mask: int = 0x01) -> None:
    """Change bits of one byte."""
    with path.open("rb+") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ mask]))


def raw(tensor: Tensor) -> bytes:
    # torch gives some empty tensors strides that it cannot view in.
    return bytes(tensor.contiguous().reshape(-1).view(uint8).numpy()) if tensor.numel() else b""


def _digests(tensors: dict[str, Tensor]) -> bytes:
    return b"".join(digest for name in sorted(tensors) for digest in digests_of(raw(tensors[name])))


def digests_of(content: bytes) -> list[bytes]:
    return [hashlib.sha256(content[start : start + BLOCK]).digest() for start in range(0, len(content), BLOCK)]


def read_by_hand(path: Path) -> tuple[dict[str, Any], dict[str, tuple[str, list[int], bytes]]]:
    """Header and tensors (type, shape, bytes), with all checks of docs/format.md, from the standard library alone."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    table = json.loads(content[8 : 8 + length])
    metadata = table.pop("__metadata__")
    digest, _, text = metadata[KEY].partition(" ")
    assert hashlib.sha256(text.encode()).hexdigest() == digest
    header = json.loads(text)
    found = {}
    for name, entry in table.items():
        start, stop = entry["data_offsets"]
        found[name] = (entry["dtype"], entry["shape"], content[8 + length + start : 8 + length + stop])
    checksums = found.pop("checksums")[2]
    assert hashlib.sha256(checksums).hexdigest() == header["checksums"]
    assert checksums == b"".join(digest for name in sorted(found) for digest in digests_of(found[name][2]))
    assert set(header["tensors"]) == set(found)
    assert all(math.prod(header["tensors"][name][1:]) == math.prod(found[name][1]) for name in found)
    return header, found
