"""Which of very many inputs are done: a set of 16-byte keys that takes 16 bytes for each, not a hundred."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

__all__ = ["KEY_BYTES", "Seen", "key_of"]

# Among ten million inputs, two have one key with a probability below 1e-24.
KEY_BYTES = 16
_KIND = f"S{KEY_BYTES}"
_FEW = 65_536


def key_of(*parts: bytes | int) -> bytes:
    """The key of an input, from all that tells it from others; parts that are split otherwise give another key."""
    digest = blake2b(digest_size=KEY_BYTES)
    for part in parts:
        content = part if isinstance(part, bytes) else b"%d" % part
        digest.update(b"%d:" % len(content))
        digest.update(content)
    return digest.digest()


class Seen:
    """A set of keys that only grows."""

    def __init__(self, keys: Iterable[bytes] = ()) -> None:
        # Most of them lie sorted in an array; a share that shrinks with their number waits to be sorted in.
        self._sorted = np.empty(0, _KIND)
        self._new: set[bytes] = set()
        for key in keys:
            self.add(key)

    def __len__(self) -> int:
        return len(self._sorted) + len(self._new)

    def add(self, key: bytes) -> None:
        """Take a key in."""
        if key in self:
            return
        self._new.add(key)
        if len(self._new) > max(_FEW, len(self._sorted) // 32):
            merged = np.concatenate([self._sorted, np.array(list(self._new), _KIND)])
            self._sorted = np.sort(merged, kind="stable")
            self._new.clear()

    def __contains__(self, key: bytes) -> bool:
        return self.among([key])[0]

    def among(self, keys: Sequence[bytes]) -> list[bool]:
        """For each key whether it is in; many at a time cost little more than one."""
        found = [key in self._new for key in keys]
        if not len(self._sorted):
            return found
        wanted = np.array(keys, _KIND)
        places = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        both: list[bool] = (np.array(found, bool) | (self._sorted[places] == wanted)).tolist()
        return both
