"""Post-hoc OOD detectors, one interface: GROOD and those of pytorch-ood that it is held against (extra ``bench``).

    grood, grood:outliers=noise:n=100, knn:k=200, msp

One forward pass over the images serves all of them: they are fitted on a `World` and score `Outputs`. To add one,
write a subclass of `Method` and enter it in `METHODS`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch_grood.errors import GroodError
from torch_grood.evaluation.methods.base import Method, MethodUnavailableError, Scorer
from torch_grood.evaluation.methods.features import Fdbd, GradNorm, Knn, Mds, Nci, NnGuide, Rmds, She, Vim
from torch_grood.evaluation.methods.grood import Grood
from torch_grood.evaluation.methods.images import Odin
from torch_grood.evaluation.methods.logits import Energy, Entropy, Gen, Klm, Mls, Msp, TempScaling
from torch_grood.evaluation.methods.shaping import Ash, Dice, React, Scale, Vra

__all__ = [
    "METHODS",
    "Ash",
    "Dice",
    "Energy",
    "Entropy",
    "Fdbd",
    "Gen",
    "GradNorm",
    "Grood",
    "Klm",
    "Knn",
    "Mds",
    "Method",
    "MethodUnavailableError",
    "Mls",
    "Msp",
    "Nci",
    "NnGuide",
    "Odin",
    "React",
    "Rmds",
    "Scale",
    "Scorer",
    "She",
    "TempScaling",
    "Vim",
    "Vra",
    "method_of",
    "methods_of",
]

_ALL: tuple[type[Method], ...] = (
    Grood, Msp, Mls, Energy, Odin, Mds, Rmds, Knn, Vim, React, Dice, Ash, She, Gen, Scale, NnGuide, Fdbd, Nci, GradNorm,
    Entropy, Klm, TempScaling, Vra,
)  # fmt: skip

METHODS: Mapping[str, type[Method]] = MappingProxyType({method.name: method for method in _ALL})

# What others call them; only to be helpful with.
_ALSO_CALLED = {
    "ebo": "energy", "energybased": "energy", "maxlogit": "mls", "maxsoftmax": "msp", "softmax": "msp",
    "mahalanobis": "mds", "rmd": "rmds", "rel_mds": "rmds", "klmatching": "klm", "kl_matching": "klm",
    "temperature_scaling": "temp_scaling", "ash_b": "ash", "ash-b": "ash",
}  # fmt: skip


def method_of(text: str) -> Method:
    """The method that "name:key=value:key=value" describes; what is not given has its default.

    Raises:
        GroodError: for a name, a key or a value that is none.
    """
    name, *pairs = (part.strip() for part in text.split(":"))
    if name not in METHODS:
        raise GroodError(f"there is no method {name!r}{_meant(name)}; there are {', '.join(METHODS)}")
    method = METHODS[name]
    kinds = {item.name: item.metadata["kind"] for item in dataclasses.fields(method)}
    parameters: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise GroodError(f"{text!r}: expected {name}:key=value, got {pair!r} for a key and its value")
        method._check_key(key)
        if key in parameters:
            raise GroodError(f"{text!r}: {key} is given twice")
        try:
            parameters[key] = kinds[key].read(value)
        except ValueError:
            raise GroodError(f"{name}: {key} is {kinds[key].meaning}; got {value!r}") from None
    return method(**parameters)


def methods_of(text: str) -> list[Method]:
    """The methods that a comma-separated list describes; "all" stands for each method with its defaults.

    Raises:
        GroodError: as `method_of`, and for an empty list or a method that is in it twice.
    """
    methods: list[Method] = []
    for part in _split(text):
        methods += [method() for method in _ALL] if part == "all" else [method_of(part)]
    for i, method in enumerate(methods):
        if method in methods[:i]:
            raise GroodError(f"{text!r}: {method.label} is in the list twice")
    return methods


def _split(text: str) -> list[str]:
    parts: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        is_method = part == "all" or part.partition(":")[0].strip() in METHODS
        # A faiss factory string has commas of its own: grood:index=IVF1024,Flat
        if not is_method and parts and parts[-1].rpartition(":")[2].startswith("index="):
            parts[-1] += f",{part}"
        elif part:
            parts.append(part)
        else:
            raise GroodError(f"{text!r}: expected methods, separated by commas, such as grood,knn:k=200,msp; or all")
    return parts


def _meant(name: str) -> str:
    asked = name.lower()
    found = [_ALSO_CALLED[asked]] if asked in _ALSO_CALLED else difflib.get_close_matches(asked, METHODS, 1)
    return f"; did you mean {found[0]!r}?" if found else ""
