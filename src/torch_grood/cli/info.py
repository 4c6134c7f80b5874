"""``grood info``: what a detector file holds, without its model."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["info"]


class _Format(StrEnum):
    text = "text"
    json = "json"


def info(
    detector: Annotated[Path, typer.Argument(metavar="DETECTOR", help="A .grood file.")],
    format: Annotated[_Format, typer.Option("--format", help="For people or for programs.")] = _Format.text,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every byte of a large file, too, against its checksums.")
    ] = False,
) -> None:
    """Show what a detector file holds; its model is not needed.

    Examples:
        grood info flowers.grood
        grood info flowers.grood --format json
        grood info imagenet.grood --verify
    """
    from torch_grood import GROOD
    from torch_grood.cli._summary import facts, operating_points, rows, stored_rows

    loaded = GROOD.load(detector, verify=verify)
    found = facts(loaded, detector)
    if format is _Format.json:
        typer.echo(json.dumps(found, indent=2))
        return
    if loaded.fit_info_.uses_ood_data:
        typer.secho("This detector was fitted with real OOD data.", fg="yellow", bold=True)
    for name, value in rows(found) + stored_rows(loaded.metadata):
        typer.echo(f"{name:<18} {value}")
    for line in operating_points(found):
        typer.echo(line)
    if verify:
        typer.echo("every byte is as it was written")
