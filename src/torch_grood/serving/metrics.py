"""What Prometheus reads: requests, latency, batches, scores, decisions and drift. No metric names an image.

The numbers are plain ones, turned into Prometheus' families when they are asked for: they belong to one thread, and
counting must cost nothing beside the rest of a request.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from torch_grood.runtime import Decision
    from torch_grood.serving.drift import DriftMonitor

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCHES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
# Around the threshold; scores of another scale than it would all be in one bucket.
_AROUND = tuple(2.0 ** (power / 2) for power in range(-8, 9))
_OUTCOMES = {None: "undecided", True: "ood", False: "known"}
_UNREADABLE = "unreadable"


class _Histogram:
    """How many values are at most each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str] = ()) -> None:
        total, buckets = 0, []
        for bound, count in zip([*map(repr, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(labels, buckets, self._sum)


class Metrics(Collector):
    """The metrics of one service, apart from those of the process it runs in.

    Args:
        log_tau: log of the threshold, around which the buckets of the scores lie; None: around 1.
        drift: monitor; None if there is none.
        waiting: tells how many images wait.
    """

    def __init__(self, log_tau: float | None, drift: DriftMonitor | None, waiting: Callable[[], int]) -> None:
        tau = 1.0 if log_tau is None or not math.isfinite(log_tau) else math.exp(log_tau)
        self._drift, self._waiting = drift, waiting
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: dict[str, _Histogram] = {}
        self._outcomes = Counter(dict.fromkeys([*_OUTCOMES.values(), _UNREADABLE], 0))
        self._batches = _Histogram(_BATCHES)
        self._scores = _Histogram([tau * factor for factor in _AROUND])
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that is over."""
        self._requests[route, status] += 1
        timer = self._seconds.get(route)
        if timer is None:
            timer = self._seconds[route] = _Histogram(_SECONDS)
        timer.observe(seconds)

    def count_batch(self, images: int) -> None:
        """Count images that were scored together."""
        self._batches.observe(images)

    def count_scored(self, decision: Decision) -> None:
        """Count a scored image."""
        self._scores.observe(decision.score)
        self._outcomes[_OUTCOMES[decision.is_ood]] += 1

    def count_unreadable(self) -> None:
        """Count an image that has no score."""
        self._outcomes[_UNREADABLE] += 1

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """The families; called by the registry."""
        requests = CounterMetricFamily("grood_requests", "Requests by route and status.", labels=["route", "status"])
        for (route, status), count in self._requests.items():
            requests.add_metric([route, str(status)], count)
        seconds = HistogramMetricFamily("grood_request_seconds", "From head to answer.", labels=["route"])
        for route, timer in self._seconds.items():
            timer.add_to(seconds, [route])
        images = CounterMetricFamily("grood_images", "Images by what became of them.", labels=["outcome"])
        for outcome, count in self._outcomes.items():
            images.add_metric([outcome], count)
        batches = HistogramMetricFamily("grood_batch_images", "Images that were scored together.")
        self._batches.add_to(batches)
        scores = HistogramMetricFamily("grood_score", "Higher is more OOD; the middle bucket ends at the threshold.")
        self._scores.add_to(scores)
        flagged = self._outcomes["ood"]
        decided = flagged + self._outcomes["known"]
        yield from (requests, seconds, images, batches, scores)
        yield GaugeMetricFamily("grood_images_waiting", "Images that wait to be scored.", self._waiting())
        yield GaugeMetricFamily(
            "grood_flagged_rate", "Share of the decisions that were OOD.", flagged / decided if decided else 0.0
        )
        if self._drift is not None:
            yield from _of(self._drift)


def _of(drift: DriftMonitor) -> Iterable[Metric]:
    last = drift.last
    yield GaugeMetricFamily("grood_drift_alarm", "1 if the last window was one.", bool(last and last.alarm))
    yield GaugeMetricFamily("grood_drift_p_value", "Of the last window.", last.p_value if last else math.nan)
    yield CounterMetricFamily("grood_drift_windows", "Windows that were tested.", drift.tests)
    yield CounterMetricFamily("grood_drift_alarms", "Windows that were an alarm.", drift.alarms)
