"""``grood export``: a detector with its model for other programs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from torch_grood.cli._common import (
    Device,
    ModelOption,
    NumClassesOption,
    QuietOption,
    StoredTransformOption,
    WeightsOption,
    check_output,
    open_detector,
    reporting,
)
from torch_grood.errors import GroodError

__all__ = ["export"]


class _Format(StrEnum):
    onnx = "onnx"
    torch = "torch"


_SUFFIX = {_Format.onnx: ".onnx", _Format.torch: ".pt2"}


def export(
    detector: Annotated[Path, typer.Argument(metavar="DETECTOR", help="A .grood file.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Default: DETECTOR with the ending of the format."),
    ] = None,
    format: Annotated[
        _Format | None,
        typer.Option("--format", help="onnx, or torch: a .pt2 of torch.export. Default: as --output ends, else onnx."),
    ] = None,
    fpr: Annotated[
        float | None,
        typer.Option("--fpr", metavar="RATE", help="Another false-alarm rate than the detector's, for its is_ood."),
    ] = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    num_classes: NumClassesOption = None,
    transform: StoredTransformOption = None,
    quiet: QuietOption = False,
) -> None:
    """Write the model, the gradients and the decision as one file that runs without this package.

    An .onnx file is also what grood score, grood serve and grood watch run without PyTorch.

    Examples:
        grood export flowers.grood
        grood export flowers.grood --model nets.py:resnet20 --weights r20.pt -o flowers.onnx --fpr 0.01
        grood export flowers.grood --format torch
    """
    chosen, target = _target(detector, output, format)
    check_output(target, detector, weights)
    with reporting(quiet) as reporter:
        opened, prepared = open_detector(detector, model, weights, num_classes, transform, Device.cpu, reporter)
        from torch_grood import export as exporting

        write = exporting.export_onnx if chosen is _Format.onnx else exporting.export_program
        write(opened, target, prepared, fpr=fpr)
        if opened.index_quality_ is not None:
            reporter.warn(
                f"the detector searches by the approximate index {opened.index.spec}, and the exported one exactly: no "
                "score is larger than before, so that the promised false-alarm rate still holds"
            )
        if opened.threshold_ is None:
            reporter.warn("this detector is not calibrated: what was exported gives scores and classes, no decisions")
        reporter.say(f"wrote {target}, {target.stat().st_size / 1e6:,.1f} MB; equal to the detector on random images")


def _target(detector: Path, output: Path | None, given: _Format | None) -> tuple[_Format, Path]:
    if output is None:
        chosen = given or _Format.onnx
        return chosen, detector.with_suffix(_SUFFIX[chosen])
    ends = next((name for name, suffix in _SUFFIX.items() if output.suffix.lower() == suffix), None)
    if ends is None or (given is not None and given is not ends):
        expected = " or ".join(_SUFFIX.values()) if given is None else _SUFFIX[given]
        raise GroodError(f"--output {output} does not end in {expected}, by which programs know what it is")
    return ends, output
