"""Options that say which gradients are stored, how, and how they are searched."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from torch_grood.neighbors import GradientIndex, StoreOptions, Subset

SEARCH = "Search"


class Store(StrEnum):
    """How the gradients are stored."""

    float32 = "float32"
    float16 = "float16"
    int8 = "int8"


IndexOption = Annotated[
    str,
    typer.Option(
        "--index",
        metavar="exact|FACTORY",
        help="exact: the true nearest gradient; or a faiss factory string such as IVF1024,Flat.",
        rich_help_panel=SEARCH,
    ),
]
IndexParameterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--index-option",
        metavar="NAME=NUMBER",
        help="Of a faiss index: nprobe=16, efSearch=64, candidates=32. May be given several times.",
        rich_help_panel=SEARCH,
    ),
]
StoreOption = Annotated[
    Store, typer.Option("--store", help="Precision of the stored gradients.", rich_help_panel=SEARCH)
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Hold features or gradients up to this size in memory, such as 4GiB, and more on disk. Default: half of "
        "what the machine has.",
        rich_help_panel=SEARCH,
    ),
]
PerClassOption = Annotated[
    str | None,
    typer.Option(
        "--per-class", metavar="N|P%", help="Store a random sample of each class only.", rich_help_panel=SEARCH
    ),
]
CoresetOption = Annotated[
    str | None,
    typer.Option(
        "--coreset",
        metavar="N|P%",
        help="Store a k-centre coreset only; its covering radius bounds what changes in a score.",
        rich_help_panel=SEARCH,
    ),
]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def index_of(spec: str, options: list[str]) -> str | GradientIndex:
    """The index that --index and --index-option describe."""
    from torch_grood.neighbors import FaissIndex

    if spec == "exact":
        if options:
            raise GroodError(
                f"--index-option {options[0]} is for a faiss index, and exact search has none; leave it out"
            )
        return spec
    parameters: dict[str, float] = {}
    for option in options:
        name, _, value = option.partition("=")
        try:
            parameters[name.strip()] = float(value)
        except ValueError:
            raise GroodError(f"--index-option must be NAME=NUMBER, such as nprobe=16; got {option!r}") from None
    candidates = parameters.pop("candidates", None)
    arguments: dict[str, Any] = {} if candidates is None else {"candidates": int(candidates)}
    return FaissIndex(spec, {name: int(x) if x.is_integer() else x for name, x in parameters.items()}, **arguments)


def store_of(dtype: Store, memory: str | None) -> StoreOptions:
    """The store that --store and --memory describe."""
    from torch_grood.neighbors import StoreOptions

    return StoreOptions(dtype.value, None if memory is None else bytes_of(memory))


def bytes_of(text: str) -> int:
    """The bytes that --memory names.

    Raises:
        GroodError: if it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise GroodError(f"--memory must be a size such as 500MB or 4GiB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def subset_of(per_class: str | None, coreset: str | None) -> Subset | None:
    """The subset that --per-class or --coreset describes."""
    from torch_grood.neighbors import ClassSample, KCenterCoreset

    if per_class is not None and coreset is not None:
        raise GroodError("--per-class and --coreset exclude each other; choose one")
    if per_class is not None:
        return ClassSample(**_amount("--per-class", per_class))
    return None if coreset is None else KCenterCoreset(**_amount("--coreset", coreset))


def _amount(option: str, text: str) -> dict[str, Any]:
    try:
        if text.strip().endswith("%"):
            return {"ratio": float(text.strip()[:-1]) / 100}
        return {"n": int(text)}
    except ValueError:
        raise GroodError(f"{option} must be a number such as 500, or a share such as 10%; got {text!r}") from None
