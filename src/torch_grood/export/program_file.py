"""A graph of `torch.export` in a .pt2 file, for whoever runs PyTorch but not this package."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from torch_grood import GROOD
from torch_grood._files import replacing
from torch_grood.data.transforms import ImageTransform
from torch_grood.errors import GroodError
from torch_grood.export.prepared import prepare, reason_of
from torch_grood.runtime.manifest import MANIFEST_KEY

__all__ = ["export_program"]


def export_program(
    detector: GROOD, path: str | os.PathLike[str], transform: ImageTransform, *, fpr: float | None = None
) -> None:
    """Write a detector, its model and its decision as a program of `torch.export`.

    ``torch.export.load(path).module()(images)`` gives the outputs that `export_onnx` names, as a tuple in that order;
    the manifest is the extra file ``torch_grood.json``.

    Args:
        detector: see `export_onnx`.
        path: see `export_onnx`.
        transform: see `export_onnx`.
        fpr: see `export_onnx`.

    Raises:
        GroodError: as `export_onnx`, but for the size.
    """
    prepared = prepare(detector, transform, fpr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.no_grad():
                program = torch.export.export(prepared.module, (prepared.example,), dynamic_shapes=(prepared.dynamic,))
            for node in program.graph_module.graph.nodes:
                # Where it came from in the source code, with the paths of this machine.
                node.meta.pop("stack_trace", None)
        # The model's own code under a trace may raise anything.
        except Exception as error:
            raise GroodError(f"the model cannot be exported: {reason_of(error)}") from error
        with replacing(Path(path)) as temporary:
            # torch wants the ending.
            written = temporary.with_name(f"{temporary.name}.pt2")
            try:
                extra = {f"{MANIFEST_KEY}.json": prepared.manifest.to_json()}
                torch.export.save(program, written, extra_files=extra)
                module = torch.export.load(written).module()

                def run(images: Tensor) -> Sequence[Tensor]:
                    with torch.no_grad():
                        found: tuple[Tensor, ...] = module(images)
                    return found

                prepared.compare(run)
                written.replace(temporary)
            finally:
                written.unlink(missing_ok=True)
