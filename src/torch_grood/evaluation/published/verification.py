"""Each published figure beside ours, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch_grood.errors import GroodError
from torch_grood.evaluation.published.figures import Figure, Published, PublishedMethod
from torch_grood.evaluation.published.obstacles import group_obstacle, other_checkpoints, set_obstacle
from torch_grood.evaluation.results import GROUPS, BenchmarkResults, MethodSummary, Spread, summary
from torch_grood.evaluation.tables.grid import NONE, Cell, Grid

__all__ = ["Deviation", "Verdict", "deviations_grid", "verdict", "verify"]

Finding = Literal["agrees", "within tolerance", "within std", "off", "not comparable", "missing"]
_NOT_RUN = "not among the methods of the results"


@dataclass(frozen=True)
class Deviation:
    """One published figure beside ours.

    Attributes:
        method: label of our row; the published method's name if we have none.
        scope: "group" or "set".
        where: the group, or the key of the set.
        theirs: the figure as published, in per cent.
        ours: mean and population std over our runs, in per cent; None if there is none.
        finding: "agrees" (to the last printed digit), "within tolerance", "within std", "off", "not comparable" or
            "missing" (on our side).
        reason: why not comparable or missing; what was allowed otherwise.
        source: whose figure.
    """

    method: str
    scope: Literal["group", "set"]
    where: str
    theirs: Figure
    ours: Spread | None
    finding: Finding
    reason: str
    source: str

    @property
    def difference(self) -> float | None:
        """Ours − theirs in points, also where they are not comparable; None if ours is missing."""
        return None if self.ours is None else self.ours.mean - self.theirs.value


class Verdict(NamedTuple):
    """What comes of a verification.

    Attributes:
        is_confirmed: whether something was comparable, and nothing comparable is off.
        text: a line that says so.
    """

    is_confirmed: bool
    text: str


def verify(results: BenchmarkResults, published: Published) -> list[Deviation]:
    """Hold each published figure against ours.

    Ours is the mean over the runs, in per cent. The difference may be the largest of: what rounding makes; that and
    `tolerance`; `within_std` published standard deviations. Of several methods of ours that a published figure fits,
    the first as given is judged.

    Raises:
        GroodError: if the figures are of another benchmark.
    """
    if results.spec.name != published.benchmark:
        raise GroodError(
            f"{published.name} has figures of the benchmark {published.benchmark}, and the results are of "
            f"{results.spec.name}; give figures of the same benchmark"
        )
    rows = summary(results)
    found: list[Deviation] = []
    for method in published.methods.values():
        ours: list[MethodSummary | None] = [row for row in rows if _is_same(row, method)]
        for place, row in enumerate(ours or [None]):
            # Which of several variants a figure without hyper-parameters means is not known; the best may not choose.
            other = "" if place == 0 or row is None or ours[0] is None else ours[0].label
            found += _deviations(results, published, method, row, other)
    return found


def verdict(deviations: Sequence[Deviation]) -> Verdict:
    """Whether the published figures are confirmed: one at least was comparable, and none of these is off."""
    compared = [one for one in deviations if one.finding not in ("not comparable", "missing")]
    off = [one for one in compared if one.finding == "off"]
    not_run = sum(one.reason == _NOT_RUN for one in deviations)
    others = len(deviations) - len(compared) - not_run
    rest = f"; {others} could not be compared" if others else ""
    rest += f"; {not_run} are of methods that were not run" if not_run else ""
    if not compared:
        reason = next((f": {one.reason}" for one in deviations if one.finding == "not comparable"), "")
        return Verdict(False, f"nothing could be compared{reason}{rest}")
    if not off:
        return Verdict(True, f"all {len(compared)} comparable figures agree{rest}")
    worst = max(off, key=lambda one: abs(one.difference or 0.0))
    text = f"{len(off)} of {len(compared)} comparable figures are off, most of all {worst.method} {worst.where} by "
    return Verdict(False, f"{text}{worst.difference:+.2f}{rest}")


def deviations_grid(deviations: Sequence[Deviation], title: str = "Held against published AUROC, in %") -> Grid:
    """A table, to be printed (`Grid.to_rich`) or written (`Grid.to_markdown`); what is off is bold.

    Published methods that were not run have no row; `verdict` counts them.
    """
    rows = []
    for one in deviations:
        if one.reason == _NOT_RUN:
            continue
        ours, difference = NONE, NONE
        if one.ours is not None and one.difference is not None:
            std = "" if one.ours.std is None else f" ± {one.ours.std:.2f}"
            # Of a digit more than printed there, or a difference within rounding could not be seen.
            ours = f"{one.ours.mean:.{max(2, one.theirs.decimals)}f}{std}"
            difference = f"{one.difference:+.{max(2, one.theirs.decimals) + 1}f}"
        bold = one.finding == "off"
        finding = f"{one.finding}: {one.reason}" if one.reason else one.finding
        texts = (one.method, one.where, ours, str(one.theirs), difference, finding)
        rows.append(tuple(Cell(text, bold) for text in texts))
    return Grid(title, ("method", "OOD", "ours", "published", "difference", "finding"), tuple(rows), n_texts=1)


def _is_same(row: MethodSummary, method: PublishedMethod) -> bool:
    """Whether ours has that name and, in all runs, that configuration."""
    return all(
        one.name == method.method
        and all(key in one.config and one.config[key] == value for key, value in method.config.items())
        for one in row.results
    )


def _deviations(
    results: BenchmarkResults,
    published: Published,
    method: PublishedMethod,
    row: MethodSummary | None,
    judged: str,
) -> Iterator[Deviation]:
    other = other_checkpoints(results, published, method)
    if judged:
        other = f"{judged} is judged"
    label = method.key if row is None else row.label
    for group in GROUPS:
        if group in method.groups:
            ours = None if row is None else row.groups.get(group, {}).get("auroc")
            obstacle = group_obstacle(results, published, group) or other
            yield _deviation(published, method, label, row, "group", group, method.groups[group], ours, obstacle)
    for key, figure in method.sets.items():
        ours = None if row is None else row.sets.get(key, {}).get("auroc")
        obstacle = set_obstacle(results, published, key) or other
        yield _deviation(published, method, label, row, "set", key, figure, ours, obstacle)


def _deviation(
    published: Published,
    method: PublishedMethod,
    label: str,
    row: MethodSummary | None,
    scope: Literal["group", "set"],
    where: str,
    theirs: Figure,
    share: Spread | None,
    obstacle: str | None,
) -> Deviation:
    def found(ours: Spread | None, finding: Finding, reason: str) -> Deviation:
        return Deviation(label, scope, where, theirs, ours, finding, reason, method.source)

    if share is None:
        return found(None, "missing", _why_missing(row, obstacle))
    ours = Spread(100 * share.mean, None if share.std is None else 100 * share.std, share.n)
    if row is not None and obstacle is None and row.n_done < row.n_runs:
        obstacle = f"it is done in {row.n_done} of {row.n_runs} runs"
    if obstacle is not None:
        return found(ours, "not comparable", obstacle)
    distance = theirs.distance(ours.mean)
    if distance <= theirs.rounding:
        return found(ours, "agrees", "")
    if distance <= theirs.rounding + published.tolerance:
        return found(ours, "within tolerance", f"{published.tolerance:g} points")
    stds = distance / theirs.std if theirs.std else None
    if stds is not None and stds <= published.within_std:
        return found(ours, "within std", f"{stds:.1f} of {published.within_std:g} std")
    return found(ours, "off", f"by {ours.mean - theirs.value:+.2f}" + ("" if stds is None else f", {stds:.1f} std"))


def _why_missing(row: MethodSummary | None, obstacle: str | None) -> str:
    if row is None:
        return _NOT_RUN
    reasons = [f"{one.status}: {one.reason}" for one in row.results if one.status != "done"]
    return reasons[0] if reasons else obstacle or "there is no such figure"
