"""Running the clauses: all of them, one by one under pytest, or up to the first that is broken."""

from __future__ import annotations

import contextlib
import random
import sys
import unittest
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from torch_grood.errors import GroodError
from torch_grood.testing import deciding, fitting, leaving, refusing, scoring, storing
from torch_grood.testing.clause import BrokenContractError, Clause
from torch_grood.testing.uses import FeatureUse, ImageUse, Make, Use

__all__ = ["CLAUSES", "CheckResult", "check_detector", "detector_checks"]

CLAUSES = tuple(
    found
    for module in (fitting, leaving, scoring, deciding, refusing, storing)
    for found in vars(module).values()
    if isinstance(found, Clause)
)
_USES: tuple[type[Use], ...] = (FeatureUse, ImageUse)


@dataclass(frozen=True)
class CheckResult:
    """What came of one check.

    Attributes:
        name: the use and the clause, "features-fit_is_idempotent".
        clause: the law, in a sentence.
        status: "passed", "failed" or "skipped".
        message: what was seen, or why it was skipped; empty if it passed.
    """

    name: str
    clause: str
    status: Literal["passed", "failed", "skipped"]
    message: str


def check_detector(
    make: Make, *, uses: Collection[str] = ("features", "images"), raise_error: bool = True
) -> list[CheckResult]:
    """Check that a detector keeps the contract; it takes some seconds, and neither network nor data.

    >>> check_detector(lambda model: GROOD(model))  # doctest: +SKIP
    >>> check_detector(lambda _: NearestMean(), uses=["features"])  # doctest: +SKIP

    Args:
        make: given a classifier, or None for use on features, returns a new detector that is not fitted.
        uses: what the detector is for: "features", "images", or both. The clauses for others are skipped, and so are
            those about methods that it does not have.
        raise_error: raise at the first broken clause; False: check all and say what came of each.

    Returns:
        One result a clause and use.

    Raises:
        BrokenContractError: at the first broken clause; the message names it, what was seen and what is required.
        GroodError: for uses that are none, or a `make` that is no function.
    """
    results = []
    for name, check in detector_checks(make, uses=uses):
        law = check.keywords["clause"].law
        try:
            check()
        except unittest.SkipTest as reason:
            results.append(CheckResult(name, law, "skipped", str(reason)))
        except BrokenContractError as error:
            if raise_error:
                raise
            results.append(CheckResult(name, law, "failed", str(error)))
        else:
            results.append(CheckResult(name, law, "passed", ""))
    return results


def detector_checks(make: Make, *, uses: Collection[str] = ("features", "images")) -> list[tuple[str, partial[None]]]:
    """The name of each check, and the check, callable without arguments: for pytest.mark.parametrize.

    >>> @pytest.mark.parametrize(("name", "check"), detector_checks(make))  # doctest: +SKIP
    ... def test_contract(name, check):
    ...     check()

    A check raises BrokenContractError, or unittest.SkipTest, which pytest reports as skipped. Arguments and errors are
    those of `check_detector`.
    """
    known = [kind.name for kind in _USES]
    if isinstance(uses, str) or not uses or not set(uses) <= set(known):
        raise GroodError(f"uses must name some of {known}, got {uses!r}; for one of them pass uses=[{known[0]!r}]")
    if not callable(make):
        raise GroodError(
            f"make must be a function that takes a classifier, or None, and returns a new detector; got "
            f"{type(make).__name__}. Pass lambda model: Detector(model)."
        )
    return [
        (f"{kind.name}-{clause.name}", partial(_run, make=make, kind=kind, clause=clause, wanted=kind.name in uses))
        for kind in _USES
        for clause in CLAUSES
        if kind.name in clause.uses
    ]


def _run(make: Make, kind: type[Use], clause: Clause, wanted: bool) -> None:
    if not wanted:
        raise unittest.SkipTest(f"`uses` does not name {kind.name}")
    with _isolated():
        try:
            # Classifier and data are made anew each time: what is broken once must not show elsewhere, nor be missed.
            _require_methods(kind(make), clause)
            clause.check(kind(make))
        except unittest.SkipTest:
            raise
        except BrokenContractError as error:
            raise _broken(clause, kind.name, str(error)) from error.__cause__
        except Exception as error:
            raise _broken(clause, kind.name, f"raised {error!r}") from error


def _require_methods(use: Use, clause: Clause) -> None:
    try:
        detector = use.new()
    except Exception as error:
        raise BrokenContractError(
            f"make({'None' if use.model is None else 'classifier'}) raised {error!r}; if the detector is not for "
            f"{use.name}, say so by `uses`"
        ) from error
    for method in ("fit", "score"):
        if not use.has(detector, method):
            raise BrokenContractError(
                f"{type(detector).__name__} has no method {use.method_name(method)}; a detector for {use.name} has at "
                f"least that. If it is not for {use.name}, say so by `uses`"
            )
    for method in clause.needs:
        if not use.has(detector, method):
            raise unittest.SkipTest(f"{type(detector).__name__} has no method {use.method_name(method)}")


def _broken(clause: Clause, use: str, seen: str) -> BrokenContractError:
    return BrokenContractError(f"{clause.name}, on {use}. Seen: {seen}. Required: {clause.law} Why: {clause.why}")


class _NoTerminal:
    """A stream that does not show itself as a terminal, so that hundreds of short fits draw no progress bars."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def isatty(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Leave the caller's process as it is, whatever the detector does to its state; one thread for each operation."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    gradients, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    # The data are too small to share, and on a busy machine threads wait for each other longer than they work.
    torch.set_num_threads(1)
    with contextlib.redirect_stderr(_NoTerminal(sys.stderr)):
        try:
            yield
        finally:
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            random.setstate(states[2])
            torch.set_grad_enabled(gradients)
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
