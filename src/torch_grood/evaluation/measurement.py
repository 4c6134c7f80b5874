"""From the scores of a method to its part of the results: figures, intervals, sanity gates, tests against others.

Intervals are 95 %. Those of the AUROC are DeLong's, also where there is no bootstrap; those of the other figures are
the bootstrap's. Near and far are unweighted means over their sets, as OpenOOD takes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch_grood.evaluation import results as r
from torch_grood.evaluation.choice import ChooseBy
from torch_grood.evaluation.inference import (
    Bootstrap,
    ScoreSets,
    bootstrap,
    delong,
    delong_difference,
    holm,
    shuffled_auroc,
)
from torch_grood.evaluation.metrics import (
    FIGURES,
    DetectionMetrics,
    OpenOODMetrics,
    detection_metrics,
    openood_metrics,
)
from torch_grood.evaluation.scoring import ScoredMethod

__all__ = ["compare", "method_result", "score_sets"]

# In standard errors: beyond it, figures tell ID from OOD where there is nothing to tell; chance is 1 in two million.
_SHUFFLED_Z = 5.0


def score_sets(found: ScoredMethod) -> ScoreSets | None:
    """The scores of a method, as statistics take them; None if it has none."""
    if found.scores is None:
        return None
    return ScoreSets(found.scores["test"], {key: scores for key, scores in found.scores.items() if key != "test"})


def method_result(
    found: ScoredMethod,
    scores: ScoreSets | None,
    groups: Mapping[r.Group, Sequence[str]],
    comparable: Mapping[r.Group, r.Comparability],
    *,
    draws: int,
    seed: int,
) -> r.MethodResult:
    """What the results say of one method.

    Args:
        found: what became of it.
        scores: of `score_sets`.
        groups: keys of the near and the far sets that are there.
        comparable: of the groups.
        draws: of the bootstrap; 0: none.
        seed: of the bootstrap.
    """
    choice = found.choice
    method = found.asked if choice is None else choice.method
    by = None if choice is None else choice.by
    if scores is None:
        return r.MethodResult(
            found.asked.name, found.asked.label, method.config(), found.status, found.reason, by and str(by)
        )
    drawn = bootstrap(scores, draws, seed=seed) if draws else None
    observed = (
        {key: detection_metrics(scores.id_scores, ood) for key, ood in scores.ood_scores.items()}
        if drawn is None
        else drawn.observed
    )
    figures = {
        key: _set_figures(
            metrics, openood_metrics(scores.id_scores, scores.ood_scores[key]), _intervals(scores, drawn, [key])
        )
        for key, metrics in observed.items()
    }
    means = {
        group: r.GroupFigures.of(
            {key: figures[key] for key in keys}, comparable[group].comparable, _intervals(scores, drawn, keys)
        )
        for group, keys in groups.items()
        if keys
    }
    assert choice is not None
    return r.MethodResult(
        name=found.asked.name,
        label=found.asked.label,
        config=method.config(),
        status="done",
        chosen_by=by and str(by),
        search=tuple(r.SearchPoint(trial.parameters, trial.value, trial.reason) for trial in choice.trials),
        warnings=(*choice.warnings, *_gate(scores, seed)),
        uses_ood_data="ood" in method.needs or by is ChooseBy.validation_ood,
        seconds=r.Seconds(found.fit_seconds, found.score_seconds, found.choose_seconds),
        figures=figures,
        groups=means,
    )


def compare(
    run: int,
    methods: Sequence[r.MethodResult],
    scores: Mapping[str, ScoreSets],
    groups: Mapping[r.Group, Sequence[str]],
) -> list[r.Comparison]:
    """Paired tests of the first GROOD against every other method, corrected over the methods of a group.

    Args:
        run: position of the run.
        methods: of the run.
        scores: by label, of those that have some.
        groups: see `method_result`.
    """
    ours = next((method.label for method in methods if method.name == "grood" and method.label in scores), None)
    if ours is None:
        return []
    found = []
    for group, keys in groups.items():
        if not keys or min(len(scores[ours].ood_scores[key]) for key in keys) < 2:
            continue
        others = [label for label in scores if label != ours]
        tests = [delong_difference(scores[ours], scores[label], keys) for label in others]
        corrected = holm([test.p for test in tests])
        found += [
            r.Comparison(run, group, ours, label, test.value, (test.low, test.high), test.p, p_holm)
            for label, test, p_holm in zip(others, tests, corrected, strict=True)
        ]
    return found


def _intervals(scores: ScoreSets, drawn: Bootstrap | None, keys: Sequence[str]) -> dict[str, r.Interval]:
    found: dict[str, r.Interval] = {}
    if drawn is not None:
        for figure in FIGURES:
            estimate = drawn.estimate(figure, keys)
            found[figure] = (estimate.low, estimate.high)
    # A variance needs two samples.
    if min(len(scores.id_scores), *(len(scores.ood_scores[key]) for key in keys)) > 1:
        auroc = delong(scores, keys)
        found["auroc"] = (auroc.low, auroc.high)
    return found


def _set_figures(
    metrics: DetectionMetrics, theirs: OpenOODMetrics, intervals: Mapping[str, r.Interval]
) -> r.SetFigures:
    return r.SetFigures(
        **{figure: getattr(metrics, figure) for figure in FIGURES},
        openood=r.OpenOODFigures(**theirs._asdict()),
        n_id=metrics.n_id,
        n_ood=metrics.n_ood,
        intervals=intervals,
    )


def _gate(scores: ScoreSets, seed: int) -> list[str]:
    """Words for a set on which shuffled scores can be told apart."""
    found = []
    for key, ood in scores.ood_scores.items():
        shuffled = shuffled_auroc(scores.id_scores, ood, seed=seed)
        if abs(shuffled.z) > _SHUFFLED_Z:
            found.append(
                f"{key}: AUROC is {shuffled.auroc:.4f} after ID and OOD were shuffled, {shuffled.z:.1f} standard "
                "errors from 0.5; do not trust these figures"
            )
    return found
