"""Whether the images of late are like those of the calibration.

A conformal p-value of an image like the n calibration images is at most the rate α = m/(n + 1) with a probability V
that this calibration has fixed once: over calibrations, V is Beta(m, n + 1 - m) (see `torch_grood.threshold`). Of W
such images, the number K with p ≤ α is therefore beta-binomial, and

    P(K ≥ k) = Σ_{j ≥ k} C(W, j) B(m + j, n + 1 - m + W - j) / B(m, n + 1 - m)

is a p-value that takes into account that the calibration is a sample, too. A test of each W images in turn raises a
false alarm in at most the stated share of them: on average over calibrations, for images that are exchangeable with the
calibration images, and for ties on the safe side. Where each class has its own threshold, K is a sum of independent
beta-binomial numbers, one for each class, given how many of the images belong to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch_grood._conformal import checked_rate, exceedance_p_value, rank_of
from torch_grood.errors import GroodError

__all__ = ["DriftMonitor", "DriftTest"]

_ALL = -1


@dataclass(frozen=True)
class DriftTest:
    """The outcome of one window.

    Attributes:
        images: in it.
        flagged: of them.
        expected: number of flagged images without drift, at most.
        p_value: of this many flagged images without drift.
        alarm: whether it is at most the level.
    """

    images: int
    flagged: int
    expected: float
    p_value: float
    alarm: bool


class DriftMonitor:
    """Counts decisions, and tests the flagged ones of each full window.

    Args:
        rate: that the decisions promise.
        sizes: number of calibration images of each class by its position, or one number for all.
        window: images in a test.
        level: chance of a false alarm in a test.

    Attributes:
        seen: images in the window under way.
        flagged: of these.
        tests: windows that are over.
        alarms: of these.
        last: outcome of the last one.

    Raises:
        GroodError: for a window below 1, a level that is no rate, or one that no number of flagged images reaches.
    """

    def __init__(self, rate: float, sizes: Mapping[int, int] | int, window: int = 1000, level: float = 0.001) -> None:
        if window < 1:
            raise GroodError(f"a window for drift has at least one image; got {window}")
        self.rate, self.window = rate, window
        self.level = checked_rate(level, "the level for drift is the chance of a false alarm")
        self._sizes = sizes if isinstance(sizes, Mapping) else {_ALL: sizes}
        largest = max(self._sizes, key=lambda group: self._sizes[group])
        least = exceedance_p_value(rate, self._sizes, {largest: window}, window)
        if least > level:
            raise GroodError(
                f"{window} images, all of them flagged, happen without drift with a probability of {least:.2g}, above "
                f"the level {level:g}; take more images for a window, or calibrate on more"
            )
        self._counts: Counter[int] = Counter()
        self.seen = self.flagged = self.tests = self.alarms = 0
        self.last: DriftTest | None = None

    def add(self, prototype_label: int, is_ood: bool) -> None:
        """Count a decision; the last one of a window tests it."""
        self._counts[prototype_label if _ALL not in self._sizes else _ALL] += 1
        self.seen += 1
        self.flagged += is_ood
        if self.seen < self.window:
            return
        p_value = exceedance_p_value(self.rate, self._sizes, self._counts, self.flagged)
        expected = sum(count * _share(self.rate, self._sizes[group]) for group, count in self._known())
        self.last = DriftTest(self.seen, self.flagged, expected, p_value, p_value <= self.level)
        self.tests += 1
        self.alarms += self.last.alarm
        self._counts.clear()
        self.seen = self.flagged = 0

    def described(self) -> dict[str, Any]:
        """What is known, JSON-able."""
        return {
            "alarm": self.last is not None and self.last.alarm,
            "statement": (
                f"Each window of {self.window:,} images is tested by itself. While images are like those of the "
                f"calibration, at most {self.level:g} of the windows raise an alarm, on average over calibrations."
            ),
            "rate": self.rate,
            "level": self.level,
            "window": self.window,
            "calibration_images": sum(self._sizes.values()),
            "last": None if self.last is None else asdict(self.last),
            "current": {"images": self.seen, "flagged": self.flagged},
            "tests": self.tests,
            "alarms": self.alarms,
        }

    def _known(self) -> list[tuple[int, int]]:
        return [(group, count) for group, count in self._counts.items() if group in self._sizes]


def _share(rate: float, n: int) -> float:
    return rank_of(rate, n) / (n + 1)
