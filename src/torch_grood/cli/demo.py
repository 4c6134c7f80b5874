"""``grood demo``: what it found, as tables for a terminal. The work is done in `torch_grood.demo`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from torch_grood.demo import DemoResult

__all__ = ["demo"]


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write to; made if need be.", show_default=True)
    ] = Path("grood-demo"),
    seed: Annotated[
        int, typer.Option(help="Of split, training and noise: the same seed, the same figures.", min=0)
    ] = 0,
) -> None:
    """See GROOD work on real images that need no download, in seconds on a CPU.

    Trains a small network on scikit-learn's handwritten digits 0-5, fits and
    calibrates GROOD on it, and shows it the digits 6-9, tiles of photographs
    and noise, beside the detectors MSP, energy and KNN of pytorch-ood.

    Writes a detector, weights, sample images, all figures (results.json) and
    a picture to learn from (scores.png).

    Examples:
        grood demo
        grood demo --output my-demo --seed 1
    """
    # The help's lines are short because rich keeps them as they are.
    from rich.console import Console

    from torch_grood.demo import run_demo

    errors, out = Console(stderr=True), Console(highlight=False)
    with errors.status("starting") as status:
        result = run_demo(output, seed, progress=status.update)
    out.print(_detection_table(result))
    out.print(_decision_table(result))
    out.print(
        f"Wrote {output}/ in {sum(result.seconds.values()):.0f} s; look at {output / 'scores.png'}", soft_wrap=True
    )
    out.print("Next, let the detector decide on single files:", soft_wrap=True)
    out.print(f"  {next_command(output)}", soft_wrap=True, markup=False)


def next_command(output: Path) -> str:
    """The shell command that scores the sample images with the detector just written."""
    from torch_grood.demo.run import DETECTOR_FILE, IMAGES_FOLDER, WEIGHTS_FILE

    detector, images, weights = (str(output / name) for name in (DETECTOR_FILE, IMAGES_FOLDER, WEIGHTS_FILE))
    return shlex.join(["grood", "score", detector, images, "--weights", weights])


def _detection_table(result: DemoResult) -> Table:
    """One row a detector; the best figure of each column is bold, whoever holds it."""
    from rich.table import Table

    from torch_grood.demo.run import FAR, NEAR

    table = Table(
        title=f"Unknown images told from {result.counts['test']} known ones, in %",
        caption=(
            f"near: {result.counts['near']} digits 6-9; far: mean over {result.counts['photos']} photograph tiles and "
            f"{result.counts['noise']} noise images.\nPapers differ in what they call FPR@95: most mean OOD accepted "
            "when 95 % of ID is kept, OpenOOD means ID flagged when 95 % of OOD is caught."
        ),
        caption_justify="left",
    )
    figures = (
        ("AUROC ↑", "auroc", max),
        ("OOD accepted,\n95 % ID kept ↓", "ood_accepted_at_95_id_kept", min),
        ("ID flagged,\n95 % OOD caught ↓", "id_flagged_at_95_ood_caught", min),
    )
    table.add_column("detector")
    columns = []
    for heading, figure, best in figures:
        for where, sets in (("near", NEAR), ("far", FAR)):
            table.add_column(f"{heading}\n{where}", justify="right", vertical="bottom")
            cells = [f"{100 * result.mean(name, figure, sets):.2f}" for name in result.metrics]
            winner = best(cells, key=float)
            columns.append([f"[bold]{cell}[/bold]" if cell == winner else cell for cell in cells])
    for name, *cells in zip(result.metrics, *columns, strict=True):
        table.add_row(name, *cells)
    return table


def _decision_table(result: DemoResult) -> Table:
    from rich.table import Table

    alarms = result.false_alarms
    table = Table(title="GROOD's decisions", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    n = f"of {alarms.n} known images"
    table.add_row("accuracy, classifier", f"{100 * result.classifier_accuracy:.1f} %", n)
    table.add_row("accuracy, nearest prototype", f"{100 * result.prototype_accuracy:.1f} %", n)
    table.add_row("false alarms, promised", f"≤ {100 * alarms.promised:.1f} %", f"calibrated on {alarms.n_calibration}")
    table.add_row(
        "false alarms, observed",
        f"{100 * alarms.observed:.1f} %",
        f"{alarms.count} of {alarms.n}; 95 % interval {100 * alarms.low:.1f} to {100 * alarms.high:.1f} %, "
        f"{'consistent' if alarms.is_consistent else 'not consistent'} with the promise",
    )
    for title, name in (("digits 6-9", "near"), ("photograph tiles", "photos"), ("noise", "noise")):
        table.add_row(f"flagged, {title}", f"{100 * result.flagged[name]:.1f} %", f"of {result.counts[name]}")
    return table
