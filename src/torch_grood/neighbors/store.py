"""The stored gradients: in float32, float16 or int8, in memory or memory-mapped from a file.

A gradient is exp(log_magnitude) · direction, and only its direction is rounded. It is kept as codes c (float16 numbers,
or integers from -127 to 127) that stand for the direction c / ‖c‖₂: of unit length whatever was rounded, so that every
bound of exact search holds for the stored gradient ĝ as for g. Distances to ĝ and g differ by at most ‖g - ĝ‖₂; the
largest of these is kept as `log_rounding`, and bounds the error of every score.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import torch
from torch import Tensor

from torch_grood.errors import GroodError
from torch_grood.gradients import PolarGradients

__all__ = [
    "GradientStore",
    "JoinedStore",
    "RowGuard",
    "Spool",
    "StoreOptions",
    "StoreWriter",
    "as_store_options",
    "scratch_tensor",
]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
_CHUNK_BYTES = 64 * 2**20
_INT8_MAX = 127
_SELECT_ROWS = 16_384


@dataclass(frozen=True)
class StoreOptions:
    """How the gradients are kept.

    Args:
        dtype: "float32"; "float16", half the memory; or "int8", a quarter. `FitInfo.rounding_radius` tells what the
            rounding can change in a score.
        memory: bytes of features or gradients to hold in memory at most; beyond, they are in a memory-mapped file.
            None: half of the machine's memory.
        folder: of that file, which is gone with the process; None: the user's cache folder.
    """

    dtype: str = "float32"
    memory: int | None = None
    folder: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, str) or self.dtype not in _DTYPES:
            raise GroodError(f"gradients are stored as {', '.join(_DTYPES)}, not as {self.dtype!r}")
        if self.memory is not None and (type(self.memory) is not int or self.memory < 0):
            raise GroodError(f"memory must be a number of bytes, got {self.memory!r}")
        if self.folder is not None and not isinstance(self.folder, (str, os.PathLike)):
            raise GroodError(f"folder must be the path of a folder, got {self.folder!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the codes."""
        return _DTYPES[self.dtype]

    def budget(self) -> int:
        """Bytes to hold in memory at most."""
        if self.memory is not None:
            return self.memory
        if not hasattr(os, "sysconf"):
            return 2**63 - 1
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

    def nbytes(self, n: int, d: int) -> int:
        """Bytes that n gradients of dimension d take."""
        return n * (8 + d * self.torch_dtype.itemsize + 4 * (self.dtype != "float32"))


def as_store_options(store: str | StoreOptions) -> StoreOptions:
    """Options for "float32", "float16", "int8", or as given."""
    if isinstance(store, StoreOptions):
        return store
    if not isinstance(store, str):
        raise GroodError(f"store must be {', '.join(map(repr, _DTYPES))} or StoreOptions(…), got {store!r}")
    return StoreOptions(store)


class RowGuard(Protocol):
    """Checks rows of codes that lie in a file before they are first used."""

    def check(self, rows: Tensor | slice) -> None:
        """Check the given rows; an error if they are not what was written."""


class GradientStore:
    """N gradients; see the module's docstring.

    Args:
        log_magnitude: log π, float64 (N,).
        codes: float32, float16 or int8 (N, d); float32 codes are the directions themselves.
        scale: 1 / ‖codes‖₂ of each row, float32 (N,), 0 for a zero row; None for float32.
        log_rounding: log of the largest ‖g - ĝ‖₂, -inf if nothing was rounded.
        zero_rows: int64, the rows that are the zero vector; None: looked for when they are needed.
        guard: of codes that have not been checked yet.
    """

    def __init__(
        self,
        log_magnitude: Tensor,
        codes: Tensor,
        scale: Tensor | None = None,
        log_rounding: float = -float("inf"),
        zero_rows: Tensor | None = None,
        guard: RowGuard | None = None,
    ) -> None:
        self.log_magnitude = log_magnitude
        self._codes = codes
        self.scale = scale
        self.log_rounding = log_rounding
        self._zero_rows = zero_rows
        self._guard = guard
        self._log_norm: Tensor | None = None
        self._smallest: dict[int, float] = {}

    @classmethod
    def of(cls, gradients: PolarGradients | GradientStore) -> GradientStore:
        """Gradients as float32 in memory, without a copy where they are."""
        if isinstance(gradients, GradientStore):
            return gradients
        return cls(gradients.log_magnitude, gradients.direction.float())

    def __len__(self) -> int:
        return len(self.log_magnitude)

    @property
    def codes(self) -> Tensor:
        """The codes, (N, d)."""
        return self.codes_with(slice(None))

    def codes_with(self, rows: Tensor | slice) -> Tensor:
        """The codes, (N, d), of which only the given rows may be used."""
        if self._guard is not None:
            self._guard.check(rows)
        return self._codes

    def codes_of(self, rows: Tensor | slice) -> Tensor:
        """The codes of the given rows, (n, d)."""
        return self.codes_with(rows)[rows]

    @property
    def dim(self) -> int:
        """Dimension d of a gradient."""
        return self._codes.shape[1]

    @property
    def dtype(self) -> str:
        """Of the codes, as `StoreOptions` names it."""
        return str(self._codes.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self._codes.device

    @property
    def nbytes(self) -> int:
        """Bytes that the gradients take, in memory or on disk."""
        return sum(tensor.nbytes for tensor in (self.log_magnitude, self._codes, self.scale) if tensor is not None)

    def directions(self, rows: Tensor | slice) -> Tensor:
        """Unit vectors, float32 (n, d); the zero vector where h = p_ood."""
        codes = self.codes_of(rows)
        return codes if self.scale is None else codes.float().mul_(self.scale[rows][:, None])

    def take(self, rows: Tensor | slice) -> PolarGradients:
        """The gradients of the given rows, directions in float32."""
        return PolarGradients(self.log_magnitude[rows], self.directions(rows))

    def log_norm(self) -> Tensor:
        """Log ‖ĝ‖₂, float64 (N,): log π, but -inf for a zero vector."""
        if self._log_norm is None:
            self._log_norm = self.log_magnitude.index_fill(0, self.zero_rows(), -torch.inf)
        return self._log_norm

    def zero_rows(self) -> Tensor:
        """The rows that are the zero vector, int64: samples at the OOD prototype."""
        if self._zero_rows is None:
            zero = torch.cat([~self.codes_of(rows).any(1) for rows in self.chunks()])
            self._zero_rows = zero.nonzero().flatten()
        return self._zero_rows

    def smallest_log_norm(self, k: int) -> float:
        """The k-th smallest of `log_norm`; it takes a pass over all rows, once for each k."""
        if k not in self._smallest:
            norms = self.log_norm()
            self._smallest[k] = float(norms.min() if k == 1 else norms.kthvalue(k).values)
        return self._smallest[k]

    def chunks(self) -> Iterator[slice]:
        """Slices that cover all rows, each of moderate size in float32."""
        rows = max(1, _CHUNK_BYTES // (4 * max(1, self.dim)))
        return (slice(start, start + rows) for start in range(0, len(self), rows))

    def select(self, rows: Tensor, options: StoreOptions) -> GradientStore:
        """A copy of the given rows, int64 (n,)."""
        codes = scratch_tensor((len(rows), self.dim), self._codes.dtype, options)
        for start in range(0, len(rows), _SELECT_ROWS):
            part = slice(start, start + _SELECT_ROWS)
            codes[part] = self.codes_of(rows[part])
        scale = None if self.scale is None else self.scale[rows]
        return GradientStore(self.log_magnitude[rows], codes, scale, self.log_rounding)

    def extended(self, gradients: PolarGradients, options: StoreOptions) -> GradientStore:
        """A copy with more gradients at its end, rounded as its own are."""
        added = StoreWriter(len(gradients.log_magnitude), self.dim, replace(options, dtype=self.dtype))
        added.append(gradients)
        new = added.finish()
        codes = scratch_tensor((len(self) + len(new), self.dim), self._codes.dtype, options)
        codes[: len(self)], codes[len(self) :] = self.codes, new.codes
        scale = None if self.scale is None or new.scale is None else torch.cat([self.scale, new.scale])
        log_magnitude = torch.cat([self.log_magnitude, new.log_magnitude])
        return GradientStore(log_magnitude, codes, scale, max(self.log_rounding, new.log_rounding))

    def to(self, device: str | torch.device) -> GradientStore:
        """The same gradients on a device."""
        if torch.device(device) == self.device:
            return self
        scale = None if self.scale is None else self.scale.to(device)
        return GradientStore(self.log_magnitude.to(device), self.codes.to(device), scale, self.log_rounding)


class JoinedStore(GradientStore):
    """Stores one after the other as if they were one; whoever asks for all codes gets a copy of them.

    Args:
        parts: at least one, of one dtype and dimension.
    """

    def __init__(self, parts: Sequence[GradientStore]) -> None:
        self._parts = parts
        self._ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        starts = [0, *self._ends.tolist()]
        scales = [part.scale for part in parts if part.scale is not None]
        super().__init__(
            torch.cat([part.log_magnitude for part in parts]),
            parts[0]._codes,
            torch.cat(scales) if scales else None,
            max(part.log_rounding for part in parts),
            torch.cat([part.zero_rows() + start for part, start in zip(parts, starts, strict=False)]),
        )

    @property
    def nbytes(self) -> int:
        """See `GradientStore.nbytes`."""
        return sum(part.nbytes for part in self._parts)

    def codes_with(self, rows: Tensor | slice) -> Tensor:
        """See `GradientStore.codes_with`."""
        codes = scratch_tensor((len(self), self.dim), self._codes.dtype, StoreOptions())
        for part in self.chunks():
            codes[part] = self.codes_of(part)
        return codes

    def codes_of(self, rows: Tensor | slice) -> Tensor:
        """See `GradientStore.codes_of`."""
        wanted = torch.arange(len(self))[rows] if isinstance(rows, slice) else rows
        part_of = torch.bucketize(wanted, self._ends, right=True)
        found = torch.empty(len(wanted), self.dim, dtype=self._codes.dtype)
        for number in torch.unique(part_of).tolist():
            here = (part_of == number).nonzero().flatten()
            part = self._parts[number]
            found[here] = part.codes_of(wanted[here] - (int(self._ends[number]) - len(part)))
        return found


class StoreWriter:
    """Fills a store of known size batch by batch.

    Args:
        n: gradients to come.
        d: their dimension.
        options: dtype, and when to use a file.

    Raises:
        GroodError: if a file is needed and its folder has too little room.
    """

    def __init__(self, n: int, d: int, options: StoreOptions) -> None:
        codes = scratch_tensor((n, d), options.torch_dtype, options)
        scale = None if options.dtype == "float32" else torch.empty(n, dtype=torch.float32)
        self._store = GradientStore(torch.empty(n, dtype=torch.float64), codes, scale)
        self._written = 0

    def append(self, gradients: PolarGradients) -> None:
        """Write the next gradients, directions of any float dtype."""
        store, rows = self._store, slice(self._written, self._written + len(gradients.log_magnitude))
        store.log_magnitude[rows] = gradients.log_magnitude
        self._written += len(gradients.log_magnitude)
        if store.scale is None:
            store._codes[rows] = gradients.direction
            return
        direction = gradients.direction.double()
        codes = direction
        if store._codes.dtype == torch.int8:
            largest = direction.abs().amax(1, keepdim=True)
            codes = (direction * torch.where(largest > 0, _INT8_MAX / largest, 0.0)).round_()
        store._codes[rows] = codes.to(store._codes.dtype)
        length = torch.linalg.vector_norm(store._codes[rows].double(), dim=1)
        store.scale[rows] = torch.where(length > 0, 1 / length, 0.0).float()
        if len(direction):
            error = torch.linalg.vector_norm(store.directions(rows).double() - direction, dim=1)
            store.log_rounding = max(store.log_rounding, float((gradients.log_magnitude + error.log()).max()))

    def finish(self) -> GradientStore:
        """The store, once all gradients are written."""
        assert self._written == len(self._store)
        return self._store


class Spool:
    """Features under way, first in first out: in memory, and beyond the budget in a file that is gone with it."""

    def __init__(self, options: StoreOptions) -> None:
        self._options = options
        self._parts: list[Tensor | _Spilled] = []
        self._in_memory = 0
        self._file: BinaryIO | None = None

    def append(self, part: Tensor) -> None:
        """Add a part (n, d) on the CPU.

        Raises:
            GroodError: if the file cannot be written.
        """
        if self._in_memory + part.nbytes <= self._options.budget():
            self._in_memory += part.nbytes
            self._parts.append(part)
            return
        with _room(self._options, part.nbytes) as folder:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="spool-", dir=folder)  # noqa: SIM115 (as long as the spool)
                weakref.finalize(self, self._file.close)
            offset = self._file.seek(0, os.SEEK_END)
            self._file.write(part.contiguous().view(torch.uint8).numpy().data)
        self._parts.append(_Spilled(offset, part.shape, part.dtype))

    def __iter__(self) -> Iterator[Tensor]:
        """The parts in their order; they stay."""
        return (part if isinstance(part, Tensor) else self._read(part) for part in self._parts)

    def drain(self) -> Iterator[Tensor]:
        """The parts in their order, each let go of as it is given."""
        self._parts.reverse()
        while self._parts:
            part = self._parts.pop()
            yield part if isinstance(part, Tensor) else self._read(part)
        self._in_memory = 0
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, part: _Spilled) -> Tensor:
        assert self._file is not None
        values = torch.empty(part.shape, dtype=part.dtype)
        self._file.seek(part.offset)
        self._file.readinto(values.view(torch.uint8).numpy().data)  # type: ignore[attr-defined]
        return values


class _Spilled(NamedTuple):
    offset: int
    shape: torch.Size
    dtype: torch.dtype


def scratch_tensor(shape: tuple[int, ...], dtype: torch.dtype, options: StoreOptions) -> Tensor:
    """An uninitialised tensor in memory, or beyond the budget in a file that is gone with the tensor.

    Raises:
        GroodError: if the file's folder has too little room or cannot be written to.
    """
    size = torch.Size(shape).numel()
    if size * dtype.itemsize <= options.budget():
        return torch.empty(shape, dtype=dtype)
    with _room(options, size * dtype.itemsize) as folder:
        handle, name = tempfile.mkstemp(prefix="store-", suffix=".tmp", dir=folder)
        try:
            if hasattr(os, "posix_fallocate"):
                # A file with holes would end the process when the disk is full.
                os.posix_fallocate(handle, 0, size * dtype.itemsize)
            tensor = torch.from_file(name, shared=True, size=size, dtype=dtype).view(shape)
        except BaseException:
            _unlink(name)
            raise
        finally:
            os.close(handle)
    # A file without a name stays as long as it is mapped, and is gone even if the process is killed. Windows does not
    # allow this.
    _unlink(name)
    weakref.finalize(tensor, _unlink, name)
    return tensor


@contextmanager
def _room(options: StoreOptions, nbytes: int) -> Iterator[Path]:
    """The folder for files, if it has room."""
    base: Any = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base, "torch-grood", "stores") if options.folder is None else Path(options.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < nbytes:
            raise GroodError(
                f"{nbytes / 2**30:.1f} GiB more are needed in {folder}, which has {free / 2**30:.1f} GiB left; choose "
                "another folder, a smaller dtype, or store fewer gradients"
            )
        yield folder
    except (OSError, RuntimeError) as error:
        raise GroodError(
            f"{folder} cannot hold what does not fit into memory: {error}; choose another folder"
        ) from None


def _unlink(name: str) -> None:
    with suppress(OSError):
        Path(name).unlink()
