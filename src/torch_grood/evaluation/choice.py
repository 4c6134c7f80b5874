"""Choosing hyper-parameters without a look at the test sets.

Two ways, both with a new fit for every choice:

- *validation OOD*, as OpenOOD's search does: AUROC of the ID validation images against a benchmark's validation
  outliers. It needs outliers, and those of TinyImageNet say little about digits.
- *held-out classes*: ID data alone. Some classes at a time are left out of the training set, the last layer and the
  prototypes, as if they had never been known; AUROC of the other classes' validation images against theirs, averaged.

Which one was used belongs to the result, and so does a choice at the end of its grid: beyond it may be a better one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from torch_grood._progress import Progress, track
from torch_grood.errors import GroodError
from torch_grood.evaluation.methods import Method, MethodUnavailableError
from torch_grood.evaluation.metrics import auroc
from torch_grood.evaluation.outputs import Outputs, World, kept_classes

__all__ = ["Choice", "ChooseBy", "Trial", "choose", "held_out_groups"]

_MOST_GROUPS = 10


class ChooseBy(StrEnum):
    """What hyper-parameters are chosen on."""

    validation_ood = "validation OOD"
    held_out_classes = "held-out classes"


@dataclass(frozen=True)
class Trial:
    """One choice that was tried.

    Attributes:
        parameters: those of the grid.
        value: mean AUROC, or None if the method cannot be used so.
        reason: why not.
    """

    parameters: Mapping[str, Any]
    value: float | None
    reason: str | None = None


@dataclass(frozen=True)
class Choice:
    """The hyper-parameters that were chosen.

    Attributes:
        method: with them.
        by: what on; None if there was nothing to choose.
        trials: all that was tried, in the order of the grid.
        warnings: for the result.
    """

    method: Method
    by: ChooseBy | None = None
    trials: tuple[Trial, ...] = ()
    warnings: tuple[str, ...] = ()


def choose(method: Method, world: World, by: ChooseBy, *, progress: Progress = None) -> Choice:
    """Try each choice of a method's grid, and take the first of the best.

    Parameters that are not at their default were set by the user, and stay. A method that none can be tried of stays as
    it is, with a warning.

    Args:
        method: to choose for.
        world: training and validation outputs; see `ChooseBy` for what it must have.
        by: what on.
        progress: see `GROOD.fit`.

    Raises:
        GroodError: if the world has no validation images of the kind that is needed.
    """
    grid = _free_grid(method)
    if not grid:
        return Choice(method)
    tasks = _tasks(world, by)
    if not tasks:
        raise GroodError(
            f"choosing by {by} needs validation images of classes that are left out and of others at a time; name "
            "images of more classes in id.val, or choose on validation OOD instead"
        )
    combined = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    # A parameter of one choice may have no meaning beside another, as λ has none without mixing: these are the same.
    candidates = list(dict.fromkeys(method.replace(**parameters) for parameters in combined))
    found: dict[Method, list[float]] = {candidate: [] for candidate in candidates}
    reasons: dict[Method, str] = {}
    # Task by task, and the last one only is kept: a reduced world is a copy of nearly all training features.
    task_of = lru_cache(maxsize=1)(lambda make: make())
    for make, candidate in track(list(itertools.product(tasks, candidates)), progress, f"choose {method.name}"):
        if candidate not in reasons:
            try:
                found[candidate].append(_auroc(candidate, *task_of(make)))
            except MethodUnavailableError as error:
                reasons[candidate] = str(error)
    trials = []
    for candidate in candidates:
        parameters = {name: getattr(candidate, name) for name in grid}
        value = None if candidate in reasons else sum(found[candidate]) / len(tasks)
        trials.append(Trial(parameters, value, reasons.get(candidate)))
    done = [trial for trial in trials if trial.value is not None]
    if not done:
        # Such as ODIN, whose network cannot forget a class. What it cannot have at all shows when it is fitted.
        why = trials[0].reason
        return Choice(method, None, tuple(trials), (f"could not be chosen by {by}, so that it is as given: {why}",))
    best = max(done, key=lambda trial: trial.value or 0.0)
    return Choice(method.replace(**best.parameters), by, tuple(trials), tuple(_edges(grid, best, done)))


def held_out_groups(n_classes: int, seed: int) -> list[list[int]]:
    """The classes to be left out at a time: each alone, or ten groups drawn by seed.

    Raises:
        GroodError: for fewer than three classes.
    """
    if n_classes < 3:
        raise GroodError(
            f"held-out classes need three classes at least, and there are {n_classes}; choose on validation OOD instead"
        )
    order = torch.randperm(n_classes, generator=torch.Generator().manual_seed(seed)).tolist()
    n_groups = min(n_classes, _MOST_GROUPS)
    return sorted(sorted(order[start::n_groups]) for start in range(n_groups))


_Task = tuple[World, Outputs, Outputs]


def _tasks(world: World, by: ChooseBy) -> list[Callable[[], _Task]]:
    """What makes each task: what to fit on, ID images and outliers."""
    val, val_ood = world.val, world.val_ood
    if val is None:
        raise GroodError(f"choosing by {by} needs ID validation images; name them in the benchmark as id.val")
    if by is ChooseBy.validation_ood:
        if val_ood is None:
            raise GroodError(
                f"choosing by {by} needs validation outliers, which are not there; name them in the benchmark as "
                "val_ood, or choose by held-out classes"
            )
        return [lambda: (world, val, val_ood)]
    there = set() if val.labels is None else set(val.labels.tolist())
    groups = [set(group) for group in held_out_groups(world.n_classes, world.seed)]
    return [partial(_held_out, world, group) for group in groups if there & group and there - group]


def _held_out(world: World, group: Collection[int]) -> _Task:
    """A world without some classes, whose validation images play the outliers."""
    reduced, val = world.without(group), world.val
    assert reduced.val is not None
    assert val is not None
    seen = val.of_classes(kept_classes(world.n_classes, group))
    assert seen.labels is not None
    return reduced, reduced.val, seen.take(seen.labels < 0)


def _auroc(method: Method, world: World, inside: Outputs, outside: Outputs) -> float:
    scorer = method.fit(world)
    scores: tuple[Tensor, Tensor] = scorer(inside), scorer(outside)
    return auroc(*scores)


def _free_grid(method: Method) -> dict[str, Sequence[Any]]:
    default = type(method)()
    return {name: values for name, values in method.grid.items() if getattr(method, name) == getattr(default, name)}


def _edges(grid: Iterable[str], best: Trial, done: Sequence[Trial]) -> Iterator[str]:
    """Words for parameters at an end of their grid, where the values beside it, all else equal, are worse."""
    for name in grid:
        chosen = best.parameters[name]
        beside = [trial for trial in done if dict(trial.parameters) | {name: chosen} == dict(best.parameters)]
        tried = [trial.parameters[name] for trial in beside]
        # Of two values, each is at an end.
        if len(tried) < 3 or not all(isinstance(value, (int, float)) for value in tried):
            continue
        if chosen in (min(tried), max(tried)) and {trial.value for trial in beside} != {best.value}:
            ends = f"{min(tried):g} to {max(tried):g}"
            yield f"{name} = {chosen:g} is at the end of its grid ({ends}); beyond it may be better"
