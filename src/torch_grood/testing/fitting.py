"""Laws of making and fitting: a detector is a function of its arguments and of the last data it was fitted on."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from torch_grood.testing.clause import clause, require, require_same, same_bits
from torch_grood.testing.uses import Samples, Use
from torch_grood.testing.world import Classifier, seed_process

# Sums of other orders differ by rounding: in float32, 1e-7 of the larger terms.
ORDER_TOLERANCE = 1e-5


@clause()
def constructor_only_stores(use: Use) -> None:
    """The constructor stores each argument as an attribute of its name, and does no work; `fit` leaves these alone.

    Then a detector can be described, copied and made again from its attributes, and making one costs nothing.
    """
    detector = use.new()
    if isinstance(use.model, Classifier):
        require(use.model.runs == 0, f"the constructor ran the classifier {use.model.runs} times; leave that to fit")
    require(use.new() is not detector, "`make` returned the same detector twice; it must make a new one")
    names = _argument_names(detector)
    for name in names:
        require(hasattr(detector, name), f"the constructor's argument {name!r} is not kept as an attribute")
    before = {name: getattr(detector, name) for name in names}
    use.fit(detector, use.train)
    for name, value in before.items():
        after = getattr(detector, name)
        same = after is value or repr(after) == repr(value)
        require(same, f"fit changed the argument {name!r} from {value!r} to {after!r}")


def _argument_names(detector: Any) -> list[str]:
    parameters = inspect.signature(type(detector)).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


@clause()
def fit_returns_self(use: Use) -> None:
    """`fit` and `calibrate` return the detector itself.

    So that `detector = Detector(model).fit(train).calibrate(held_out)` is one line, and never None.
    """
    detector = use.new()
    found = use.fit(detector, use.train)
    require(found is detector, f"{use.method_name('fit')} returned {type(found).__name__}")
    if use.decides(detector):
        found = use.calibrate(detector, use.held_out)
        require(found is detector, f"{use.method_name('calibrate')} returned {type(found).__name__}")


@clause()
def fit_is_idempotent(use: Use) -> None:
    """Fitting twice on the same samples is fitting once, bit for bit.

    A cell of a notebook that is run again must not count its samples twice.
    """
    detector = use.ready()
    once = use.outcome(detector)
    use.fit(detector, use.train)
    if use.decides(detector):
        use.calibrate(detector, use.held_out)
    require_same(use.outcome(detector), once, "after a second fit on the same samples")


@clause()
def fit_forgets_the_last_fit(use: Use) -> None:
    """A fit on A and then on B is a fit on B: nothing of A is left, neither in the scores nor in a threshold.

    A threshold that outlives the scores it was made from promises a false-alarm rate that nothing keeps.
    """
    fresh = use.new()
    use.fit(fresh, use.other_train)
    again = use.ready()
    use.fit(again, use.other_train)
    when = "after fit(A) and fit(B), compared with fit(B) alone"
    require_same(use.outcome(again, decide=False), use.outcome(fresh, decide=False), when)
    if use.decides(fresh):
        left = _decision_or_none(use, again)
        require(
            left is None or _decision_or_none(use, fresh) is not None,
            "after fit(A), calibrate and fit(B) it still decides, by the threshold of A; fit must drop it",
        )
        for detector in (fresh, again):
            use.calibrate(detector, use.held_out)
        require_same(use.outcome(again), use.outcome(fresh), when)


def _decision_or_none(use: Use, detector: Any) -> dict[str, Tensor] | None:
    try:
        return use.predict(detector, use.queries)
    except (ValueError, RuntimeError):
        return None


@clause("calibrate", "predict")
def calibrate_forgets_the_last(use: Use) -> None:
    """A calibration on A and then on B is a calibration on B, and calibrating leaves the scores as they are.

    Held-out sets are exchanged while a detector is in use; what was decided must then follow from the last one.
    """
    fresh, again = use.fitted(), use.fitted()
    scores = use.outcome(fresh, decide=False)
    use.calibrate(fresh, use.other_held_out)
    require_same(use.outcome(fresh, decide=False), scores, "after calibrate")
    use.calibrate(again, use.held_out)
    use.calibrate(again, use.other_held_out)
    require_same(use.outcome(again), use.outcome(fresh), "after calibrate(A) and calibrate(B), not calibrate(B) alone")


@clause()
def order_of_samples_does_not_matter(use: Use) -> None:
    """Fitting on the same samples in another order changes no score by more than 1e-5 of the largest.

    A training set has no order; a shuffled loader must not make another detector. Rounding may differ, since sums in
    another order do.
    """
    order = torch.randperm(len(use.train.labels), generator=torch.Generator().manual_seed(0))
    shuffled = use.new()
    use.fit(shuffled, Samples(*(part[order] for part in use.train)))
    expected, found = use.score(use.fitted(), use.queries), use.score(shuffled, use.queries)
    error = float((found - expected).abs().max() / expected.abs().max())
    require(error <= ORDER_TOLERANCE, f"the samples in another order changed a score by {error:.1e} of the largest")


@clause()
def same_seed_same_bits(use: Use) -> None:
    """Two detectors made and fitted alike give the same bits, whatever the global random state is.

    Randomness comes from a seed that the detector owns. Otherwise no result can be reproduced, and a line of code
    elsewhere that draws a number changes every score.
    """
    found = []
    for seed in (1, 2):
        seed_process(seed)
        found.append(use.outcome(use.ready()))
    require_same(found[1], found[0], "between two detectors made alike, under another global random state")


@clause()
def caller_keeps_the_arguments(use: Use) -> None:
    """Tensors, loaders and labels given to a detector are bit for bit what they were, and it keeps copies of its own.

    The caller may reuse a buffer, or normalise features in place, after the call; a detector that holds on to them
    changes silently. The same holds for the scores it returns.
    """
    detector = use.new()
    train, held_out = (Samples(*(part.clone() for part in given)) for given in (use.train, use.held_out))
    queries = use.queries.clone()
    _untouched(use, detector, "fit", train, use.train)
    if use.decides(detector):
        _untouched(use, detector, "calibrate", held_out, use.held_out)
    expected = use.outcome(detector, queries)
    require(same_bits(queries, use.queries), "score or predict changed the inputs that it was given")
    for tensor in (*train, *held_out):
        tensor.zero_()
    require_same(use.outcome(detector, queries), expected, "after the caller overwrote what fit and calibrate got")
    returned = use.outcome(detector, queries)
    for tensor in returned.values():
        tensor.zero_()
    require_same(use.outcome(detector, queries), expected, "after the caller overwrote what was returned")


def _untouched(use: Use, detector: Any, method: str, given: Samples, before: Samples) -> None:
    arguments = use.arguments(given) if method == "fit" else (use.held_out_argument(given),)
    lengths = [len(argument) for argument in arguments]
    if method == "fit":
        use.fit_raw(detector, *arguments)
    else:
        use.calibrate_raw(detector, *arguments)
    name = use.method_name(method)
    require([len(argument) for argument in arguments] == lengths, f"{name} changed the length of the loader")
    for what, now, then in zip(("inputs", "labels"), given, before, strict=True):
        require(same_bits(now, then), f"{name} changed the {what} that it was given")
        require(not now.requires_grad, f"{name} set requires_grad on the {what} that it was given")
