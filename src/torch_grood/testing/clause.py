"""A clause: a law in words, the check of it, and what a detector must have for the check to apply."""

from __future__ import annotations

import inspect
import unittest
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_grood.testing.uses import Use

__all__ = ["BrokenContractError", "Clause", "clause", "refuses", "require", "require_same", "same_bits"]

Check = Callable[[Use], None]


class BrokenContractError(AssertionError):
    """A detector broke a clause; the message names the clause, what was seen, and what is required."""


@dataclass(frozen=True)
class Clause:
    """One law that detectors keep.

    Attributes:
        name: of the check.
        law: what is required, in one sentence.
        why: what goes wrong for users of a detector that breaks it.
        needs: the methods without which it says nothing, beyond `fit` and `score`.
        uses: "images", "features", or both.
        check: raises BrokenContractError, or unittest.SkipTest with a reason.
    """

    name: str
    law: str
    why: str
    needs: tuple[str, ...]
    uses: tuple[str, ...]
    check: Check


def clause(*needs: str, uses: tuple[str, ...] = ("features", "images")) -> Callable[[Check], Clause]:
    """Make a clause of a check, whose docstring's first paragraph is the law and whose others are the reason."""

    def make(check: Check) -> Clause:
        law, _, why = inspect.cleandoc(check.__doc__ or "").partition("\n\n")
        return Clause(check.__name__, " ".join(law.split()), " ".join(why.split()), needs, uses, check)

    return make


def require(condition: bool, seen: str) -> None:
    """Raise unless the condition holds; `seen` says what the detector did."""
    if not condition:
        raise BrokenContractError(seen)


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor], when: str) -> None:
    """Raise unless every tensor has the bits of its namesake; `when` ends the sentence "the scores differ …"."""
    for name in {**expected, **found}:
        require(name in found and name in expected, f"{name} is there only once {when}")
    for name, value in expected.items():
        require(same_bits(found[name], value), f"{_difference(name, found[name], value)} {when}")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits; NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return False
    a, b = a.detach().contiguous().flatten(), b.detach().contiguous().flatten()
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _difference(name: str, found: Tensor, expected: Tensor) -> str:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return f"{name} is {found.dtype} {tuple(found.shape)}, not {expected.dtype} {tuple(expected.shape)},"
    differing = (found != expected).flatten().nonzero().flatten()
    if len(differing) == 0:
        return f"the bits of {name} differ (a NaN, or the sign of a zero)"
    first = int(differing[0])
    return (
        f"{name} of {len(differing)} of {len(found)} samples differs ({found.flatten()[first].item()!r}, not "
        f"{expected.flatten()[first].item()!r}, for sample {first})"
    )


def refuses(act: Callable[[], object], given: str, errors: tuple[type[Exception], ...] = ()) -> None:
    """Require that `act`, which is given `given`, raises an error made for the reader.

    That is a ValueError or RuntimeError, or one of `errors`, with a message of three words or more. An AttributeError,
    an IndexError or a KeyError is an accident: it names a line of the detector, not the mistake of its user.
    """
    accepted: tuple[type[Exception], ...] = (ValueError, RuntimeError, *errors)
    try:
        result = act()
    except accepted as error:
        require(len(str(error).split()) >= 3, f"{given} raised {error!r}, which explains nothing")
    except unittest.SkipTest:
        raise
    except Exception as error:
        names = ", ".join(kind.__name__ for kind in accepted)
        raise BrokenContractError(
            f"{given} raised {error!r}, which is an accident; raise one of {names} that says what was given and "
            "what to do"
        ) from error
    else:
        raise BrokenContractError(f"{given} was taken in silence, and gave {_short(result)}")


def _short(result: object) -> str:
    text = repr(result)
    return text if len(text) <= 80 else f"{text[:77]}…"
