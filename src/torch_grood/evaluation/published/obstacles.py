"""Why a published figure says nothing about ours: other images, other sets, other checkpoints."""

from __future__ import annotations

from torch_grood.evaluation.published.figures import Published, PublishedMethod
from torch_grood.evaluation.results import BenchmarkResults, Group, accuracy_summary

__all__ = ["group_obstacle", "other_checkpoints", "set_obstacle"]


def group_obstacle(results: BenchmarkResults, published: Published, group: Group) -> str | None:
    """Why the means of a group cannot be compared."""
    found = results.comparable.get(group)
    if found is None:
        return f"the results have no {group} sets"
    if not found.comparable:
        return "; ".join(found.reasons)
    expected = published.sets.get(group)
    if expected is None:
        return None
    ours = {one.key: one.n for one in results.of_role(group)}
    if set(ours) != set(expected):
        return f"the {group} sets are {', '.join(sorted(ours))} here, {', '.join(sorted(expected))} there"
    return next((text for key in ours if (text := _other_count(key, ours[key], expected[key]))), None)


def set_obstacle(results: BenchmarkResults, published: Published, key: str) -> str | None:
    """Why the figures of a set cannot be compared."""
    one = next((one for one in results.of_role("near", "far") if one.key == key), None)
    if one is None:
        return f"the results have no set {key}"
    if not results.is_comparable(one):
        reasons = [reason for found in results.comparable.values() for reason in found.reasons]
        return one.shortfall() if one.status != "complete" else next(iter(reasons), "the ID sets are not complete")
    expected = next((sets[key] for sets in published.sets.values() if key in sets), 0)
    return _other_count(key, one.n, expected)


def other_checkpoints(results: BenchmarkResults, published: Published, method: PublishedMethod) -> str | None:
    """Words for networks that are not theirs."""
    if published.weights_sha256:
        strangers = [run for run in results.runs if run.weights_sha256 not in published.weights_sha256]
        return f"other checkpoints: theirs are {method.checkpoints}" if strangers else None
    theirs = method.id_accuracy
    if theirs is None:
        return None
    ours = 100 * accuracy_summary(results)["classifier"].mean
    allowed = max(theirs.rounding + published.tolerance, published.within_std * (theirs.std or 0.0))
    if theirs.distance(ours) <= allowed:
        return None
    return f"other checkpoints: ID accuracy is {ours:.2f} % here, {theirs} % there ({method.checkpoints})"


def _other_count(key: str, ours: int, expected: int) -> str | None:
    return f"{key} has {ours:,} images here, {expected:,} there" if expected not in (0, ours) else None
