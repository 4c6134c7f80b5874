"""The tables of a report on a detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from torch_grood._conformal import exceedance_p_value
from torch_grood.errors import GroodError
from torch_grood.evaluation.inference import Bootstrap, ScoreSets, bootstrap, delong
from torch_grood.evaluation.metrics import clopper_pearson, detection_metrics
from torch_grood.evaluation.tables import Cell, Grid

if TYPE_CHECKING:
    from torch_grood import ConformalThreshold
    from torch_grood.report.sets import Role, ScoredSet

__all__ = ["class_grid", "detection_grid", "exceedance", "flagged_share", "promise_grid", "share"]

NONE = "–"
_RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
_FPR = ("ood_accepted_at_95_id_kept", "id_flagged_at_95_ood_caught")
# What follows needs a variance.
_LEAST = 2


def detection_grid(known: ScoredSet, unknown: Sequence[ScoredSet], draws: int, seed: int) -> Grid:
    """How well each unknown set, and the near and the far ones together, are told from the known images.

    Args:
        known: images of the classifier's classes.
        unknown: at least one set of others.
        draws: of the bootstrap; 0: no intervals of the two FPR.
        seed: of it.
    """
    names = {str(place): one for place, one in enumerate(unknown)}
    scores = ScoreSets(known.score, {name: one.score for name, one in names.items()})
    drawn = bootstrap(scores, draws, seed=seed) if draws else None
    rows = []
    roles: tuple[tuple[Role, str], ...] = (("near", "near"), ("far", "far"), ("unknown", "unknown"))
    for role, title in roles:
        of_role = [name for name, one in names.items() if one.role == role]
        rows += [
            _figures_row(names[name].name, [names[name]], [name], scores, drawn, known, bold=False) for name in of_role
        ]
        if len(of_role) > 1:
            sets = [names[name] for name in of_role]
            rows.append(_figures_row(f"mean of {title}", sets, of_role, scores, drawn, known, bold=True))
    headings = (
        "unknown images",
        "number",
        "AUROC ↑",
        "OOD accepted, 95 % ID kept ↓",
        "ID flagged, 95 % OOD caught ↓",
        "flagged at τ ↑",
    )
    return Grid(f"Unknown images told from {known.name}, in % (95 % intervals)", headings, tuple(rows))


def _figures_row(
    title: str,
    sets: Sequence[ScoredSet],
    names: Sequence[str],
    scores: ScoreSets,
    drawn: Bootstrap | None,
    known: ScoredSet,
    *,
    bold: bool,
) -> tuple[Cell, ...]:
    metrics = [detection_metrics(known.score, one.score) for one in sets]
    auroc = sum(one.auroc for one in metrics) / len(metrics)
    large = min(len(known), *(len(one) for one in sets)) >= _LEAST
    found = delong(scores, names) if large else None
    cells = [_interval(auroc, None if found is None else (found.low, found.high))]
    for figure in _FPR:
        value = sum(getattr(one, figure) for one in metrics) / len(metrics)
        estimate = None if drawn is None else drawn.estimate(figure, names)
        cells.append(_interval(value, None if estimate is None else (estimate.low, estimate.high)))
    flagged = [one.is_ood.mean() for one in sets if one.is_ood is not None]
    if len(sets) == 1:
        cells.append(flagged_share(sets[0]))
    else:
        cells.append(share(float(np.mean(flagged))) if flagged else NONE)
    texts = [title, f"{sum(len(one) for one in sets):,}", *cells]
    return tuple(Cell(text, bold) for text in texts)


def promise_grid(known: ScoredSet, threshold: ConformalThreshold) -> Grid | None:
    """What the calibration promises at several rates, and what the known images show."""
    if known.p_value is None:
        return None
    rows = []
    for rate in sorted({*_RATES, threshold.fpr}):
        try:
            point = threshold.at(rate)
        except GroodError:
            # More images are needed to promise so little.
            continue
        count = int((known.p_value <= rate).sum())
        low, high = clopper_pearson(count, len(known))
        band = NONE
        if point.groups is None:
            band = f"{share(point.band()[0])} to {share(point.band()[1])}"
        texts = [f"{100 * rate:g}", band, f"{count:,}", share(count / len(known)), f"{share(low)} to {share(high)}"]
        rows.append(tuple(Cell(text, rate == threshold.fpr) for text in texts))
    headings = (
        "promised on average, at most",
        "with this calibration, 95 %",
        "flagged",
        "observed share",
        "95 % interval",
    )
    return Grid(f"False alarms among the {len(known):,} images of {known.name}, in %", headings, tuple(rows))


def exceedance(known: ScoredSet, threshold: ConformalThreshold) -> float:
    """Chance of as many flagged images as these, or more, if they are like those of the calibration."""
    assert known.is_ood is not None
    counts = {0: len(known)}
    if threshold.groups is not None:
        ids, seen = np.unique(known.prototype_label, return_counts=True)
        counts = dict(zip(ids.tolist(), seen.tolist(), strict=True))
    return exceedance_p_value(threshold.fpr, threshold.group_sizes, counts, int(known.is_ood.sum()))


def class_grid(known: ScoredSet, unknown: Sequence[ScoredSet], classes: Sequence[str]) -> Grid:
    """Each class by itself: the known images of it, and the unknown ones that pass for it; most false alarms first."""
    of_class = known.label if known.truth is None else known.truth
    accepted = np.zeros(len(classes), dtype=np.int64)
    for one in unknown:
        if one.is_ood is not None:
            accepted += np.bincount(one.label[~one.is_ood], minlength=len(classes))
    rows = []
    for place, name in enumerate(classes):
        here = of_class == place
        count = int(here.sum())
        if count == 0 and accepted[place] == 0:
            continue
        texts = [name, f"{count:,}"]
        if known.truth is not None:
            texts.append(share(float((known.label[here] == place).mean())) if count else NONE)
        flagged = None if known.is_ood is None or not count else int(known.is_ood[here].sum())
        if flagged is None:
            texts += [NONE, NONE]
        else:
            low, high = clopper_pearson(flagged, count)
            texts += [share(flagged / count), f"{share(low)} to {share(high)}"]
        texts.append(f"{np.median(known.score[here]):.4g}" if count else NONE)
        if unknown:
            texts.append(f"{accepted[place]:,}" if known.is_ood is not None else NONE)
        rows.append((-1.0 if flagged is None else flagged / count, texts))
    rows.sort(key=lambda row: -row[0])
    headings = ["class" if known.truth is not None else "class, by the classifier", "known images"]
    if known.truth is not None:
        headings.append("accuracy")
    headings += ["flagged, %", "95 % interval", "median score"]
    if unknown:
        headings.append("unknown images that pass for it")
    return Grid(
        f"Each class by itself, on {known.name}",
        tuple(headings),
        tuple(tuple(Cell(text) for text in texts) for _, texts in rows),
    )


def flagged_share(one: ScoredSet) -> str:
    """Of a set, with its interval."""
    if one.is_ood is None:
        return NONE
    count = int(one.is_ood.sum())
    return _interval(count / len(one), clopper_pearson(count, len(one)))


def share(value: float) -> str:
    """In per cent."""
    return f"{100 * value:.1f}"


def _interval(value: float, interval: tuple[float, float] | None) -> str:
    return share(value) + ("" if interval is None else f" ({share(interval[0])} to {share(interval[1])})")
