"""The text that names a model: its parts, and whether a file may say it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from torch_grood.errors import GroodError

__all__ = [
    "NAME",
    "OWN_FACTORY",
    "described",
    "is_builtin_spec",
    "one_line",
    "split_spec",
    "unknown_name",
    "unknown_spec",
]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")
# No part may begin with an underscore: torch_grood.__main__ would start the command line. "torch_grood.py:…" is a file.
OWN_FACTORY = re.compile(r"torch_grood(\.(?!py:)[A-Za-z][A-Za-z0-9_]*)+:[A-Za-z][A-Za-z0-9_]*")

_PACKAGES = ("torchvision", "timm")
_FORMS = (
    "torchvision:NAME, timm:NAME, package.module:factory, path/to/file.py:factory or the folder of a training (with a "
    "run.json)"
)


def is_builtin_spec(spec: str) -> bool:
    """Whether a spec may be loaded because a file names it: it runs nothing but torchvision, timm or torch_grood."""
    kind, _, name = spec.partition(":")
    return bool(OWN_FACTORY.fullmatch(spec) or (kind in _PACKAGES and NAME.fullmatch(name)))


def split_spec(spec: str) -> tuple[str, str]:
    """What makes the network (torchvision, timm, a module or a file), and the name that it goes by there.

    Raises:
        GroodError: if there are no two parts.
    """
    kind, _, name = spec.partition(":")
    if kind not in _PACKAGES:
        # A path may contain a colon itself.
        kind, _, name = spec.rpartition(":")
    if not kind or not name:
        raise unknown_spec(spec)
    return kind, name


def unknown_spec(spec: str) -> GroodError:
    """The error for a text that has none of the forms."""
    return GroodError(f"unknown model {spec!r}; expected {_FORMS}")


def unknown_name(spec: str, name: str, known: Sequence[str], where: str) -> GroodError:
    """The error for a name that is none of the known ones."""
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return GroodError(f"{spec}: {name!r} is not one of {where}{hint}")


def one_line(error: BaseException) -> str:
    """An error of somebody else's, for one of ours."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def described(value: object) -> str:
    """What a value is, for a message."""
    return f"an object of type {type(value).__name__}"
