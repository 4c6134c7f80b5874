"""The benchmark's image sets, and whether figures on them may stand beside other people's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch_grood.errors import GroodError

__all__ = ["GROUPS", "Comparability", "Group", "Role", "SetInfo", "comparability", "known_shortfalls"]

Group = Literal["near", "far"]
Role = Literal["train", "val", "test", "val_ood", "near", "far"]
GROUPS: tuple[Group, ...] = ("near", "far")


@dataclass(frozen=True)
class SetInfo:
    """One image set of the benchmark, also one that was not there.

    Attributes:
        key: its name in `MethodResult.figures`; near and far sets have different ones.
        title: for people.
        role: what it served for.
        n: images used.
        expected: images that the benchmark asks for, if it asks.
        status: "complete", "incomplete" (another number of images) or "absent".
        reason: why not complete, if there is more to say than the numbers.
        list_sha256: digest of the images' content; None if absent.
    """

    key: str
    title: str
    role: Role
    n: int
    expected: int | None = None
    status: Literal["complete", "incomplete", "absent"] = "complete"
    reason: str | None = None
    list_sha256: str | None = None

    def __post_init__(self) -> None:
        if not self.key:
            raise GroodError("an image set has an empty key; give it a name")
        if self.n < 0 or (self.n == 0) != (self.status == "absent"):
            raise GroodError(f"{self.key} is {self.status} with {self.n} images; only an absent set has none")
        if self.status == "complete" and self.expected not in (None, self.n):
            raise GroodError(f"{self.key} is called complete with {self.n} of {self.expected} images")

    def shortfall(self) -> str:
        """What there is of a set that is not complete, e.g. "MNIST: 10,000 of 70,000 images"."""
        found = f"{self.n:,} images" if self.expected is None else f"{self.n:,} of {self.expected:,} images"
        return f"{self.title}: {'absent' if self.status == 'absent' else found}" + (
            f" ({self.reason})" if self.reason else ""
        )


@dataclass(frozen=True)
class Comparability:
    """Whether a group's means may stand beside other people's.

    Attributes:
        comparable: if there is no reason against it.
        reasons: against it.
    """

    comparable: bool
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.comparable == bool(self.reasons):
            raise GroodError(f"comparable is {self.comparable} with {len(self.reasons)} reasons; give one if it is not")


def comparability(sets: Sequence[SetInfo]) -> dict[Group, Comparability]:
    """Whether each group that has a set is comparable: its sets, and the ID training and test sets, must be whole."""
    found: dict[Group, Comparability] = {}
    known = known_shortfalls(sets)
    for group in GROUPS:
        if members := [one for one in sets if one.role == group]:
            reasons = tuple(known + [one.shortfall() for one in members if one.status != "complete"])
            found[group] = Comparability(not reasons, reasons)
    return found


def known_shortfalls(sets: Sequence[SetInfo]) -> list[str]:
    """What the ID sets lack on which all figures depend."""
    return [f"ID {one.shortfall()}" for one in sets if one.role in ("train", "test") and one.status != "complete"]
