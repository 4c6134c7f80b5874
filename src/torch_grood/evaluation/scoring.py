"""One method on one classifier's outputs: choose, fit, score every test set, and keep the scores in a file.

A file of scores is found again by what it depends on: the content of all images, the weights, the method, the seed, the
versions. A benchmark that was interrupted goes on with the first method that has no such file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_grood import container
from torch_grood._optional import require
from torch_grood._progress import Progress
from torch_grood.errors import FormatError, GroodError
from torch_grood.evaluation.choice import Choice, ChooseBy, Trial, choose
from torch_grood.evaluation.extraction import ClassifierOutputs
from torch_grood.evaluation.methods import METHODS, Method, MethodUnavailableError

__all__ = ["KeptScores", "ScoredMethod", "kept_scores", "run_method", "scores_path"]

_log = logging.getLogger("torch_grood")

# Of the files; to be raised when the same method comes to have other scores.
_VERSION = 3
_SCORES_VERSION = 1
# What a method's own library raises where it cannot work, such as on a network that returns more than logits;
# anything else is a defect, and is not hidden.
_METHOD_ERRORS = (
    GroodError, RuntimeError, TypeError, ValueError, AssertionError, ArithmeticError, IndexError, MemoryError
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class ScoredMethod:
    """What became of one method.

    Attributes:
        asked: the method as it was asked for.
        choice: what was chosen for it; None if it could not be used.
        status: "done", "unavailable" (the classifier or the data lack what it needs) or "failed".
        reason: why not done.
        scores: float64 (n,) of each test set, by key; "test" are the ID images.
        fit_seconds, score_seconds, choose_seconds: of wall time.
    """

    asked: Method
    choice: Choice | None
    status: Literal["done", "unavailable", "failed"]
    reason: str | None = None
    scores: Mapping[str, Tensor] | None = None
    fit_seconds: float = 0.0
    score_seconds: float = 0.0
    choose_seconds: float = 0.0


def run_method(
    method: Method,
    outputs: ClassifierOutputs,
    *,
    by: ChooseBy | None = None,
    path: Path | None = None,
    key: Mapping[str, Any] | None = None,
    progress: Progress = None,
) -> ScoredMethod:
    """Fit a method and score all test sets; one that cannot is reported, not skipped.

    Args:
        method: as asked for.
        outputs: of the classifier.
        by: how hyper-parameters are chosen; None: they are as given.
        path: a file that keeps the scores; they are taken from it if it has the same key.
        key: all that the scores depend on beside method and choice.
        progress: see `GROOD.fit`.

    Raises:
        GroodError: if the file cannot be written, or there are no validation images to choose on.
    """
    full_key = _digest({**(key or {}), "method": method.config(), "by": by, "version": _SCORES_VERSION})
    if path is not None and (found := _restored(method, path, full_key)) is not None:
        return found
    scored = _run(method, outputs, by, progress)
    if path is not None and scored.scores is not None:
        _keep(scored, path, full_key)
    return scored


def scores_path(folder: Path, run: str, method: Method) -> Path:
    """Where the scores of a method lie: a name for people, made unique by its parameters."""
    return folder / run / f"{method.name}-{_digest(method.config())[:8]}.safetensors"


KeptScores = Mapping[str, NDArray[np.float64]]
"""Scores (n,) of each test set, by key; "test" are the ID images."""


def kept_scores(folder: Path, run: str) -> dict[str, KeptScores]:
    """The scores that files of a run keep, by the label of the method; what is no such file is left out.

    Args:
        folder: that `scores_path` was given.
        run: likewise.
    """
    found: dict[str, KeptScores] = {}
    for path in sorted((folder / run).glob("*.safetensors")):
        try:
            kept = container.read(path, _VERSION)
            label = _method_of(kept.header["method"]).label
        except (GroodError, KeyError, TypeError, ValueError) as error:
            _log.warning("%s cannot be used: %s", path, error)
            continue
        found[label] = {key: scores.numpy() for key, scores in kept.tensors.items() if scores.dtype == torch.float64}
    return found


def _run(method: Method, outputs: ClassifierOutputs, by: ChooseBy | None, progress: Progress) -> ScoredMethod:
    # Its import takes seconds, which would count as those of the first method.
    require("pytorch_ood.detector", extra="bench")
    started = time.monotonic()
    choice = None
    try:
        choice = Choice(method) if by is None else choose(method, outputs.world, by, progress=progress)
        chosen = time.monotonic()
        scorer = choice.method.fit(outputs.world)
        fitted = time.monotonic()
        scores = {"test": scorer(outputs.test)} | {name: scorer(found) for name, found in outputs.ood.items()}
    except MethodUnavailableError as error:
        return ScoredMethod(method, choice, "unavailable", str(error))
    except _METHOD_ERRORS as error:
        _log.debug("%s failed", method.label, exc_info=True)
        return ScoredMethod(method, choice, "failed", _one_line(error))
    ended = time.monotonic()
    return ScoredMethod(method, choice, "done", None, scores, fitted - chosen, ended - fitted, chosen - started)


def _keep(scored: ScoredMethod, path: Path, key: str) -> None:
    assert scored.choice is not None
    assert scored.scores is not None
    choice = scored.choice
    header = {
        "format_version": _VERSION,
        "key": key,
        "method": scored.asked.config(),
        "chosen": choice.method.config(),
        "by": choice.by,
        "trials": [[dict(trial.parameters), trial.value, trial.reason] for trial in choice.trials],
        "warnings": list(choice.warnings),
        "seconds": [scored.fit_seconds, scored.score_seconds, scored.choose_seconds],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GroodError(f"the folder {path.parent} cannot be made: {error.strerror or error}") from None
    container.write(path, header, dict(scored.scores))


def _restored(method: Method, path: Path, key: str) -> ScoredMethod | None:
    """What a file keeps, if it has the same key."""
    if not path.exists():
        return None
    try:
        found = container.read(path, _VERSION)
        header = found.header
        if header.get("key") != key:
            return None
        choice = Choice(
            _method_of(header["chosen"]),
            None if header["by"] is None else ChooseBy(header["by"]),
            tuple(Trial(parameters, value, reason) for parameters, value, reason in header["trials"]),
            tuple(header["warnings"]),
        )
        fit, score, choosing = header["seconds"]
    except (FormatError, KeyError, TypeError, ValueError) as error:
        _log.warning("%s cannot be used and is made again: %s", path, error)
        return None
    scores = {name: tensor.clone() for name, tensor in found.tensors.items() if tensor.dtype == torch.float64}
    _log.info("%s: scores taken from %s", method.label, path)
    return ScoredMethod(method, choice, "done", None, scores, fit, score, choosing)


def _method_of(config: Mapping[str, Any]) -> Method:
    return METHODS[config["name"]](**{name: value for name, value in config.items() if name != "name"})


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, GroodError) else f"{type(error).__name__}: {text}"[:300]
