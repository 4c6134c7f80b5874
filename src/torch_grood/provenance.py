"""What a detector remembers of the images that it was made from: a hash of each one's content, and its name.

The hash tells whether a calibration image is a training image, which no threshold may rest on. Names lead from a
neighbour back to its file. Both are kept by the position of the image in the training set as it was read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from torch_grood.container import Guard
from torch_grood.errors import AlteredFileError

__all__ = ["CalibrationRecord", "Names", "TrainingRecord", "content_hashes", "digest_of", "names_of"]

# Of larger images, this many bytes at most are looked at, evenly spread: the rest would cost more than it tells.
_MOST_BYTES = 65_536


def content_hashes(samples: Tensor) -> Tensor:
    """A hash of each sample as the model takes it, int64 (n,), never 0; equal samples have equal hashes.

    Of samples of more than 65,536 bytes, every k-th number is looked at, with the least k that leaves no more.
    """
    if len(samples) == 0:
        return torch.empty(0, dtype=torch.int64)
    samples = samples.detach().flatten(1)
    step = max(1, -(-samples.shape[1] * samples.element_size() // _MOST_BYTES))
    content = samples[:, ::step].cpu().contiguous().view(torch.uint8).numpy()
    size = (samples.shape[1] * samples.element_size()).to_bytes(8, "little")
    hashes = [
        int.from_bytes(hashlib.blake2b(row.data, digest_size=8, salt=size).digest(), "little", signed=True) or 1
        for row in content
    ]
    return torch.tensor(hashes, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Names:
    """Names of n samples in two tensors, since a million strings take a hundred bytes each and cannot be mapped.

    Attributes:
        text: all names one after another, in UTF-8, uint8 (m,); bytes that are no UTF-8 stay as they are.
        ends: where each name ends in `text`, ascending int64 (n,); an empty name is none.
        guards: of `text` and `ends` in a file, if they have not been checked yet.
    """

    text: Tensor
    ends: Tensor
    guards: tuple[Guard, Guard] | None = None

    @classmethod
    def of(cls, names: Sequence[str | None]) -> Self:
        """Pack names; None becomes an empty name."""
        encoded = [_encoded(name or "") for name in names]
        ends = torch.tensor([len(name) for name in encoded], dtype=torch.int64).cumsum(0)
        return cls(torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8) if any(encoded) else _none(), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, position: int) -> str | None:
        if self.guards is not None:
            self.guards[1].check(8 * max(position - 1, 0), 8 * position + 8)
        start, end = int(self.ends[position - 1]) if position else 0, int(self.ends[position])
        if not 0 <= start <= end <= len(self.text):
            raise AlteredFileError("the names of the training samples were altered")
        if self.guards is not None:
            self.guards[0].check(start, end)
        return bytes(self.text[start:end].tolist()).decode("utf-8", "surrogateescape") or None

    def __add__(self, other: Names) -> Names:
        self.check()
        other.check()
        return Names(torch.cat([self.text, other.text]), torch.cat([self.ends, other.ends + len(self.text)]))

    def check(self) -> None:
        """Check all of what lies in a file."""
        for guard in self.guards or ():
            guard.check_all()

    def without(self, positions: Tensor) -> Names:
        """The same, with empty names at the given positions: no trace of those names is left."""
        gone = set(positions.tolist())
        return Names.of([None if position in gone else self[position] for position in range(len(self))])


@dataclass(frozen=True)
class CalibrationRecord:
    """The calibration set of a detector.

    Attributes:
        n: held-out samples that the threshold rests on.
        n_left_out: training samples that were found among them and left out.
        digest: SHA-256 of the sorted `content_hashes` of the n.
    """

    n: int
    n_left_out: int
    digest: str


@dataclass(frozen=True, eq=False)
class TrainingRecord:
    """The training set of a detector, by position 0 … n - 1 as it was read.

    Attributes:
        hashes: `content_hashes`, int64 (n,); 0 for a sample whose class was left out, or that was removed.
        names: of the samples, or None if the loader did not tell them.
        guard: of `hashes` in a file, if they have not been checked yet.
    """

    hashes: Tensor
    names: Names | None = None
    guard: Guard | None = None

    def check(self) -> None:
        """Check the hashes, if they lie in a file."""
        if self.guard is not None:
            self.guard.check_all()

    def contains(self, hashes: Tensor) -> Tensor:
        """Which of other samples are in the training set, bool (m,)."""
        self.check()
        return torch.isin(hashes, self.hashes[self.hashes != 0])

    def extended(self, other: TrainingRecord) -> TrainingRecord:
        """With more samples at the end."""
        self.check()
        other.check()
        names = self.names
        if names is not None or other.names is not None:
            names = (names or _unnamed(self)) + (other.names or _unnamed(other))
        return TrainingRecord(torch.cat([self.hashes, other.hashes]), names)

    def without(self, positions: Tensor) -> TrainingRecord:
        """With no trace of the samples at the given positions."""
        self.check()
        hashes = self.hashes.index_fill(0, positions, 0)
        return TrainingRecord(hashes, None if self.names is None else self.names.without(positions))

    def digest(self) -> str:
        """See `digest_of`: the same for the same samples in any order."""
        self.check()
        return digest_of(self.hashes)


def digest_of(hashes: Tensor) -> str:
    """SHA-256 of sorted content hashes."""
    return hashlib.sha256(hashes.sort().values.numpy().data).hexdigest()


def names_of(loader: Iterable[Any], n: int) -> Names | None:
    """Names of the n samples that a loader has just delivered, if it tells them.

    It does by a method `names()`, or as a `DataLoader` in order over a data set with `samples`, pairs (path, label) as
    torchvision's ImageFolder has them.
    """
    own = getattr(loader, "names", None)
    if callable(own):
        found = list(own())
    else:
        pairs = getattr(getattr(loader, "dataset", None), "samples", None)
        in_order = isinstance(loader, DataLoader) and _is_in_order(loader)
        if not in_order or not isinstance(pairs, Sequence):
            return None
        found = [pair[0] if isinstance(pair, tuple) and pair else None for pair in pairs]
    if len(found) != n or not all(isinstance(name, str) for name in found):
        return None
    return Names.of(found)


def _is_in_order(loader: DataLoader[Any]) -> bool:
    """Whether a loader goes through its data set from first to last: `sampler` says nothing of an own batch sampler."""
    batches = loader.batch_sampler
    sampler = loader.sampler if batches is None else getattr(batches, "sampler", None)
    return isinstance(sampler, SequentialSampler) and (batches is None or type(batches) is BatchSampler)


def _encoded(name: str) -> bytes:
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # A lone surrogate, as Windows allows in file names: there is no UTF-8 for it.
        return name.encode("utf-8", "backslashreplace")


def _unnamed(record: TrainingRecord) -> Names:
    return Names(_none(), torch.zeros(len(record.hashes), dtype=torch.int64))


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)
