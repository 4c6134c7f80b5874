"""Laws of refusal: what cannot be answered is refused in words, and leaves the detector as it was."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_grood.testing import world
from torch_grood.testing.clause import BrokenContractError, clause, refuses, require, require_same
from torch_grood.testing.uses import FPR, Samples, Use


@clause()
def score_needs_fit(use: Use) -> None:
    """`score`, and `calibrate`, before `fit` are refused with words.

    The first mistake that everybody makes: "'NoneType' object has no attribute …" does not say what to do.
    """
    refuses(lambda: use.score(use.new(), use.known), "score before fit")
    if use.decides(use.new()):
        refuses(lambda: use.calibrate(use.new(), use.held_out), "calibrate before fit")


@clause("calibrate", "predict")
def predict_needs_calibrate(use: Use) -> None:
    """`predict` before `calibrate` is refused with words.

    A threshold that nobody chose promises nothing.
    """
    refuses(lambda: use.predict(use.fitted(), use.known), "predict before calibrate")


@clause()
def failed_fit_changes_nothing(use: Use) -> None:
    """A fit that fails leaves the detector as it was before: fitted and calibrated, or not fitted.

    A refit at night that meets a broken file must not take the detector of the day with it. An error of the loader
    comes through: a fit on half of the training set is not what was asked for.
    """
    detector = use.ready()
    before = use.outcome(detector)
    if not _fails(lambda: use.fit_raw(detector, *use.failing_arguments())):
        # Features with NaN: the matter of another clause.
        require(use.name == "features", "fit went on when the loader had failed")
        return
    require_same(_outcome_after("a failed fit", use, detector), before, "after a failed fit")
    fresh = use.new()
    _fails(lambda: use.fit_raw(fresh, *use.failing_arguments()))
    refuses(lambda: use.score(fresh, use.known), "score after a first fit that failed")
    use.fit(fresh, use.train)
    if use.decides(fresh):
        use.calibrate(fresh, use.held_out)
    require_same(use.outcome(fresh), before, "with a failed fit before the fit, compared with the fit alone")


@clause("calibrate", "predict")
def failed_calibrate_changes_nothing(use: Use) -> None:
    """A calibration that fails leaves the threshold before it, or none.

    The old threshold keeps its promise, half a new one does not.
    """
    inputs, labels = use.other_held_out.inputs.clone(), use.other_held_out.labels
    inputs[-1] = torch.nan
    for what, held_out, fpr in (("NaN", Samples(inputs, labels), FPR), ("fpr=2", use.other_held_out, 2.0)):
        detector = use.ready()
        before = use.outcome(detector)
        # Whether it fails as it should is the matter of other clauses.
        if _fails(lambda: use.calibrate(detector, held_out, fpr=fpr)):  # noqa: B023 (called at once)
            after = f"after a calibration that failed for {what}"
            require_same(_outcome_after("a failed calibration", use, detector), before, after)


def _fails(act: Callable[[], object]) -> bool:
    try:
        act()
    except Exception:
        return True
    return False


def _outcome_after(what: str, use: Use, detector: Any) -> dict[str, Tensor]:
    try:
        return use.outcome(detector)
    except Exception as error:
        raise BrokenContractError(f"after {what} the detector is gone: {error!r}") from error


@clause()
def nan_and_infinity_are_refused(use: Use) -> None:
    """NaN or infinity in the inputs of fit, calibrate or score is refused with words.

    NaN compares as false with any threshold: the broken image would pass as known.
    """
    detector = use.ready()
    for name, value in {"NaN": torch.nan, "infinity": torch.inf}.items():
        inputs = use.train.inputs.clone()
        inputs[-1] = value
        broken = Samples(inputs, use.train.labels)
        refuses(lambda: use.fit(use.new(), broken), f"a training sample of {name}")  # noqa: B023 (called at once)
        refuses(lambda: use.score(detector, inputs), f"a sample of {name} to score")  # noqa: B023
        if use.decides(detector):
            refuses(lambda: use.calibrate(detector, broken), f"a calibration sample of {name}")  # noqa: B023
            refuses(lambda: use.predict(detector, inputs), f"a sample of {name} to predict")  # noqa: B023


@clause()
def wrong_shapes_are_refused(use: Use) -> None:
    """Inputs of another dimension than those of the fit, or without a batch dimension, are refused with words.

    Broadcasting makes a number out of them, which looks like a score.
    """
    detector = use.ready()
    known = use.known
    wrong = {
        "samples with one channel or feature too few": known[:, :-1],
        "samples with one channel or feature alone": known[:, :1],
        "a single sample without a batch dimension": known[0] if use.name == "features" else known[0, 0],
        "samples with an axis too many": known[:, None].expand(-1, 2, *[-1] * (known.ndim - 1)),
    }
    for given, inputs in wrong.items():
        refuses(lambda: use.score(detector, inputs), f"{given}, shape {tuple(inputs.shape)}, to score")  # noqa: B023
        if use.decides(detector):
            samples = Samples(inputs, torch.zeros(len(inputs), dtype=torch.int64))
            refuses(lambda: use.calibrate(detector, samples), f"{given} to calibrate on")  # noqa: B023


@clause()
def empty_input_is_refused(use: Use) -> None:
    """A fit or calibration on no sample is refused with words; no sample to score gives no score, or is refused.

    A path that is wrong gives an empty loader. The mean of nothing is NaN, and a threshold from nothing decides all.
    """
    empty = Samples(*(part[:0] for part in use.train))
    refuses(lambda: use.fit(use.new(), empty), "a fit on no sample")
    if use.name == "images":
        refuses(_fitting(use, [tuple(empty)]), "a fit on a loader whose only batch is empty")
    detector = use.ready()
    if use.decides(detector):
        refuses(lambda: use.calibrate(detector, empty), "a calibration on no sample")
    with contextlib.suppress(ValueError, RuntimeError):
        shape = tuple(use.score(detector, empty.inputs).shape)
        require(shape == (0,), f"no sample was scored with shape {shape}")


@clause()
def wrong_labels_are_refused(use: Use) -> None:
    """Training labels that are missing, negative, fractions, beyond the classes, or not one a sample, are refused.

    They are silent in arithmetic: -1 is the last class, a shorter list is broadcast, and the classes stay wrong.
    """
    inputs, labels = use.train
    beyond = {"a label beyond the classifier's classes": _with_last(labels, world.CLASSES)}
    wrong = {
        "a negative label": _with_last(labels, -1),
        "labels of which some are fractions": labels + 0.5,
        "one label too few": labels[:-1],
        "one label for all": labels[:1],
        **(beyond if use.name == "images" else {}),
    }
    for given, bad in wrong.items():
        arguments = (inputs, bad) if use.name == "features" else ([(inputs, bad)],)
        refuses(_fitting(use, *arguments), given, (TypeError,))
    missing = (inputs, None) if use.name == "features" else ([inputs],)
    refuses(_fitting(use, *missing), "a fit without labels", (TypeError,))


def _fitting(use: Use, *arguments: Any) -> Callable[[], object]:
    return lambda: use.fit_raw(use.new(), *arguments)


def _with_last(labels: Tensor, value: int) -> Tensor:
    labels = labels.clone()
    labels[-1] = value
    return labels


@clause("calibrate", "predict")
def impossible_rates_are_refused(use: Use) -> None:
    """A false-alarm rate that is not between 0 and 1, 0 and 1 excluded, is refused with words.

    5 is a percentage, NaN a bug: a threshold of either flags all or nothing.
    """
    detector = use.fitted()
    for fpr in (0.0, 1.0, -0.1, 5.0, math.nan):
        refuses(lambda: use.calibrate(detector, use.held_out, fpr=fpr), f"fpr={fpr}")  # noqa: B023
