"""Files of published figures: those of the package, and anybody's own."""

from __future__ import annotations

import difflib
import os
import tomllib
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Any

from torch_grood._files import read_at_most
from torch_grood.errors import GroodError
from torch_grood.evaluation.published._toml import Table
from torch_grood.evaluation.published.figures import Figure, Published, PublishedMethod
from torch_grood.evaluation.results import GROUPS, Group

__all__ = ["published_names", "read_published"]

_LARGEST = 1 << 20


def published_names() -> list[str]:
    """The files that come with the package."""
    return sorted(file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml"))


def read_published(path_or_name: str | os.PathLike[str]) -> Published:
    """Read published figures.

    Args:
        path_or_name: one of `published_names`, or a TOML file.

    Raises:
        GroodError: if there is no such file, or something in it is not as it should be; the place is named.
    """
    if isinstance(path_or_name, str) and path_or_name in published_names():
        content = (_folder() / f"{path_or_name}.toml").read_bytes()
    else:
        content = _content(path_or_name)
    try:
        data = tomllib.loads(content.decode("utf-8"), parse_float=Decimal)
    except (ValueError, RecursionError) as error:
        raise GroodError(f"{path_or_name} is no TOML file: {error or 'nested too deep'}") from None
    return _published(Table(data, str(path_or_name)))


def _folder() -> Any:
    return resources.files("torch_grood.evaluation") / "figures"


def _content(path: str | os.PathLike[str]) -> bytes:
    file = Path(path)
    if file.suffix != ".toml" and not file.exists():
        close = difflib.get_close_matches(str(path), published_names(), 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(published_names())}."
        raise GroodError(f"there are no published figures {str(path)!r:.100}; {hint} Or give a TOML file")
    return read_at_most(file, _LARGEST, "a TOML file of published figures")


def _published(top: Table) -> Published:
    top.only(
        "name", "benchmark", "source", "checkpoints", "tolerance", "within_std", "id_accuracy", "sets",
        "weights_sha256", "figures",
    )  # fmt: skip
    sets = top.table("sets")
    sets.only(*GROUPS)
    source, checkpoints = top.text("source"), top.text("checkpoints")
    id_accuracy = top.figure("id_accuracy")
    figures = top.table("figures")
    methods = {key: _method(figures.table(key), source, checkpoints, id_accuracy) for key in figures.data}
    if not methods:
        raise GroodError(f"{top.origin}: there are no figures; add a table such as [figures.msp]")
    return Published(
        name=top.text("name"),
        benchmark=top.text("benchmark"),
        source=source,
        checkpoints=checkpoints,
        methods=methods,
        tolerance=top.number("tolerance", 0.0),
        within_std=top.number("within_std", 2.0),
        id_accuracy=id_accuracy,
        sets={group: sets.table(group).counts() for group in GROUPS if group in sets.data},
        weights_sha256=top.hashes("weights_sha256"),
    )


def _method(table: Table, source: str, checkpoints: str, id_accuracy: Figure | None) -> PublishedMethod:
    table.only(
        "method", "config", *GROUPS, "sets", "source", "checkpoints", "id_accuracy", "note",
    )  # fmt: skip
    groups: dict[Group, Figure] = {}
    for group in GROUPS:
        if (figure := table.figure(group)) is not None:
            groups[group] = figure
    inner = table.table("sets")
    sets = {key: figure for key in inner.data if (figure := inner.figure(key)) is not None}
    if not groups and not sets:
        raise table.error("has no figure; expected near, far or sets")
    return PublishedMethod(
        key=table.key,
        method=table.text("method", table.key),
        config=table.table("config").plain(),
        groups=groups,
        sets=sets,
        source=table.text("source", source),
        checkpoints=table.text("checkpoints", checkpoints),
        id_accuracy=table.figure("id_accuracy") or id_accuracy,
        note=table.text("note", "") or None,
    )
