"""``grood info``: what a detector file holds, without its model."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from torch_grood._text import plain
from torch_grood.cli._runtime import is_onnx
from torch_grood.errors import FormatError, GroodError

__all__ = ["info"]


class _Format(StrEnum):
    text = "text"
    json = "json"


def info(
    detector: Annotated[Path, typer.Argument(metavar="DETECTOR", help="A .grood file, or an .onnx of grood export.")],
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
        grood info flowers.onnx
    """
    if is_onnx(detector):
        _show_exported(detector, format, verify)
        return
    from torch_grood import GROOD
    from torch_grood.summary import facts, operating_points, rows, stored_rows

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


def _show_exported(path: Path, format: _Format, verify: bool) -> None:
    from torch_grood.runtime.onnx import OnnxRuntime
    from torch_grood.summary import operating_points, rows

    if verify:
        raise GroodError(f"--verify is for .grood files; {path} has no checksums")
    manifest = OnnxRuntime(path).manifest
    found = {"file": str(path), "bytes": path.stat().st_size, "transform": manifest.transform.to_dict()}
    found |= {name: value for name, value in manifest.facts.items() if name not in found}
    if format is _Format.json:
        typer.echo(json.dumps(found, indent=2))
        return
    try:
        lines, points = rows(found), operating_points(found)
    # What another program has written there.
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FormatError(f"{path} does not describe its detector: {type(error).__name__} {error}"[:300]) from None
    lines += [("model", f"in the file, which torch-grood {manifest.version} exported")]
    lines += [("transform", str(manifest.transform))]
    for name, value in lines:
        typer.echo(f"{name:<18} {plain(value):.2000}")
    for line in points:
        typer.echo(line)
