"""Which runtime a file of a detector calls for: PyTorch for .grood, ONNX Runtime for .onnx."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch_grood.cli._common import Device, Reporter, open_detector
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from torch_grood.runtime import Runtime

__all__ = ["is_onnx", "open_runtime", "refuse_model_options", "warn_uncalibrated"]


def is_onnx(path: Path) -> bool:
    """Whether the file's name says that it is an ONNX graph."""
    return path.suffix.lower() == ".onnx"


def open_runtime(
    path: Path,
    spec: str | None,
    weights: Path | None,
    num_classes: int | None,
    transform: str | None,
    device: Device,
    reporter: Reporter,
    *,
    fpr: float | None = None,
    tau: float | None = None,
    threads: int | None = None,
) -> Runtime:
    """A runtime from a detector's file and its model, or from an ONNX file, which has all in it.

    Args:
        path: .grood or .onnx.
        spec: see `open_detector`; as weights, num_classes and transform for a .grood file only.
        weights: see `open_detector`.
        num_classes: see `open_detector`.
        transform: see `open_detector`.
        device: where the model runs.
        reporter: where messages go.
        fpr: another false-alarm rate than the file's.
        tau: the user's own threshold.
        threads: that the model uses; None: one a CPU.

    Raises:
        GroodError: if the file cannot be used, an option does not belong to it, or the rate cannot be promised.
    """
    if not is_onnx(path):
        detector, prepared = open_detector(path, spec, weights, num_classes, transform, device, reporter)
        from torch_grood.runtime import DetectorRuntime

        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        return DetectorRuntime(detector, prepared, fpr=fpr, tau=tau)
    refuse_model_options(path, spec, weights, num_classes, transform, device)
    from torch_grood.runtime import OnnxRuntime

    return OnnxRuntime(path, fpr=fpr, tau=tau, threads=threads, shared=True)


def warn_uncalibrated(runtime: Runtime, tau: float | None, reporter: Reporter) -> None:
    """Say so where there will be no decisions."""
    if runtime.fpr is None and tau is None:
        reporter.warn(
            "this detector is not calibrated: there will be scores and classes, but no p-values and decisions; run "
            "grood calibrate, or give a threshold of your own: --tau"
        )


def refuse_model_options(
    path: Path, spec: str | None, weights: Path | None, num_classes: int | None, transform: str | None, device: Device
) -> None:
    """Fail for options that an ONNX file, which has all in it, leaves nothing for.

    Raises:
        GroodError: if one is given.
    """
    given = {"--model": spec, "--weights": weights, "--num-classes": num_classes, "--transform": transform}
    superfluous = [name for name, value in given.items() if value is not None]
    if superfluous:
        raise GroodError(f"{path} has its model and preprocessing in it; leave {', '.join(superfluous)} out")
    if device not in (Device.auto, Device.cpu):
        raise GroodError(f"{path} runs on the CPU; leave --device out")
