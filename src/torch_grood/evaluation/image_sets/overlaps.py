"""Images that stand in two sets of a benchmark, or twice in one, and which of them it must not be run with.

Contents are compared, not names: sizes first, and a hash (BLAKE2b) of those files only whose size occurs on both sides.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from torch_grood.errors import GroodError
from torch_grood.evaluation.image_sets.resolved import ResolvedSets

__all__ = ["Overlap", "find_overlaps"]

_SHOWN = 5
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Overlap:
    """An image that stands in two sets, or twice in one.

    Attributes:
        first: a file.
        second: the same file, or one of the same content.
        sets: keys of the sets that they stand in.
    """

    first: str
    second: str
    sets: tuple[str, str]

    def __str__(self) -> str:
        where = f"twice in {self.sets[0]}" if self.sets[0] == self.sets[1] else f"in {self.sets[0]} and {self.sets[1]}"
        return f"{self.first} {where}" + ("" if self.first == self.second else f", there as {self.second}")


def find_overlaps(resolved: ResolvedSets) -> tuple[Overlap, ...]:
    """Test images that are also validation images, byte for byte, and images that a list names twice.

    Raises:
        GroodError: if a file cannot be read.
    """
    found = [Overlap(path, path, (one.key, one.key)) for one in resolved for path in _named_twice(one.source.paths)]
    validation = [one for one in (resolved.val, resolved.val_ood) if one is not None]
    tests = [resolved.test, *resolved.near, *resolved.far]
    by_size: dict[int, list[tuple[str, str]]] = {}
    for one in validation:
        for path in dict.fromkeys(one.source.paths):
            by_size.setdefault(_size(path), []).append((path, one.key))
    # Hashes of validation images of a size, once a test image has it.
    hashes: dict[int, dict[bytes, tuple[str, str]]] = {}
    for one in tests:
        for path in dict.fromkeys(one.source.paths):
            size = _size(path)
            # Empty files are broken downloads, not images that leak.
            if size == 0 or size not in by_size:
                continue
            if size not in hashes:
                hashes[size] = {_hash(first): (first, key) for first, key in reversed(by_size[size])}
            match = hashes[size].get(_hash(path))
            if match is not None:
                found.append(Overlap(match[0], path, (match[1], one.key)))
    return tuple(found)


def _judge_overlaps(resolved: ResolvedSets) -> list[str]:
    """Raise on images that would leak from validation into testing; words for what need not stop a benchmark."""
    overlaps = find_overlaps(resolved)
    across = [overlap for overlap in overlaps if overlap.sets[0] != overlap.sets[1]]
    twice = [overlap for overlap in overlaps if overlap.sets[0] == overlap.sets[1]]
    # A published benchmark stays what it is: CIFAR-100's test images hold a few pairs of equal ones, and OpenOOD cuts
    # its validation images out of them. The same file in both lists is no such accident.
    leaks = [overlap for overlap in across if resolved.spec.home is not None or overlap.first == overlap.second]
    if leaks:
        listed = "".join(f"\n  {overlap}" for overlap in leaks[:_SHOWN])
        raise GroodError(
            f"{resolved.spec.name}: {len(leaks)} validation images are also test images:{listed}"
            f"{chr(10) + '  …' if len(leaks) > _SHOWN else ''}\n  "
            "what a method was chosen with must not measure it; take them out of one of the sets"
        )
    warnings = []
    if across:
        warnings.append(
            f"{len(across)} test images equal a validation image, as the benchmark has it: "
            f"{_shorten([str(one) for one in across], '; ')}"
        )
    for key in dict.fromkeys(overlap.sets[0] for overlap in twice):
        images = [overlap.first for overlap in twice if overlap.sets[0] == key]
        warnings.append(f"{key} lists {len(images)} images more than once: {_shorten(images)}")
    return warnings


def _named_twice(paths: Sequence[str]) -> list[str]:
    if len(set(paths)) == len(paths):
        return []
    seen: set[str] = set()
    twice = [path for path in paths if path in seen or seen.add(path)]  # type: ignore[func-returns-value]
    return list(dict.fromkeys(twice))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 - a million Paths
    except OSError as error:
        raise GroodError(f"{path} cannot be read: {error.strerror}") from None


def _hash(path: str) -> bytes:
    state = hashlib.blake2b(digest_size=32)
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - a million Paths
            while block := file.read(_BLOCK):
                state.update(block)
    except OSError as error:
        raise GroodError(f"{path} cannot be read: {error.strerror}") from None
    return state.digest()


def _shorten(items: Sequence[str], separator: str = ", ") -> str:
    return separator.join(items[:_SHOWN]) + (f"{separator}…" if len(items) > _SHOWN else "")
