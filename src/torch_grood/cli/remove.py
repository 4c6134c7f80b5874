"""``grood remove``: delete training images from a fitted detector."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from torch_grood.cli._common import QuietOption, check_output
from torch_grood.errors import GroodError

__all__ = ["remove"]


def remove(
    detector: Annotated[Path, typer.Argument(metavar="DETECTOR", help="A .grood file.")],
    positions: Annotated[
        list[int] | None,
        typer.Argument(
            metavar="POSITIONS", help="Training images, by their position 0, 1, … in the training set as it was read."
        ),
    ] = None,
    from_file: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="A text file with a position in each line.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write here; else DETECTOR is replaced.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Delete what is stored of training images; the model is not needed.

    Scores grow, so that the detector must be calibrated again. The class
    prototypes stay: means that the images had a part in. To leave no trace
    of them at all, fit again.

    Examples:
        grood remove flowers.grood 17 204
        grood remove flowers.grood --from requests.txt --output flowers.grood
    """
    target = output or detector
    check_output(target)
    from torch_grood import GROOD

    wanted = [*(positions or []), *([] if from_file is None else _read(from_file))]
    if not wanted:
        raise GroodError("name the training images to delete, by position or with --from FILE")
    loaded = GROOD.load(detector)
    was_calibrated = loaded.threshold_ is not None
    removed = loaded.remove(wanted)
    loaded.save(target)
    if quiet:
        return
    typer.echo(f"wrote {target}: {removed:,} stored gradients deleted, {loaded.fit_info_.n_indexed:,} left")
    if removed < len(set(wanted)):
        typer.echo(f"{len(set(wanted)) - removed:,} of the images had none: wrongly classified, or not in the subset")
    if was_calibrated and loaded.threshold_ is None:
        typer.echo("its threshold is gone; run: grood calibrate FILE HELD_OUT_IMAGES")


def _read(path: Path) -> list[int]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise GroodError(f"--from {path} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            if not line.strip().isascii() or not line.strip().isdigit():
                raise GroodError(f"{path}, line {number}: expected the position of a training image, got {line!r}")
            found.append(int(line))
    return found
