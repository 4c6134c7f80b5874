"""More images than one process should score, or fit: over many processes, on one machine or on a Ray cluster.

    Inputs ──▶ spans ──▶ workers (a `Runtime` each) ──▶ one Parquet part a span ──▶ done.json

A part that is there is done, and a part is written whole or not at all: so every image is scored exactly once, whatever
ends a worker, a node or the whole job, and the same command goes on where it was. The images of a batch are a function
of their places among the inputs, not of the workers: the scores are the same, bit for bit, for any number of them.

To fit, workers fill a cache with features (`filling`); then one process makes the detector of them, or each of many
makes its part of the gradients (`shards`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch_grood._lazy import importer
from torch_grood.scale.inputs import Inputs, inputs_of
from torch_grood.scale.job import Job, Summary
from torch_grood.scale.on_ray import score_on_ray
from torch_grood.scale.parts import Folder
from torch_grood.scale.ranks import score_as_rank

if TYPE_CHECKING:
    from torch_grood.scale.filling import Filler, fill_as_rank, fill_on_ray
    from torch_grood.scale.shards import fit_in_shards, searching

__all__ = [
    "Filler",
    "Folder",
    "Inputs",
    "Job",
    "Summary",
    "fill_as_rank",
    "fill_on_ray",
    "fit_in_shards",
    "inputs_of",
    "score_as_rank",
    "score_on_ray",
    "searching",
]

__getattr__ = importer(
    __name__,
    {
        **dict.fromkeys(("Filler", "fill_as_rank", "fill_on_ray"), "filling"),
        **dict.fromkeys(("fit_in_shards", "searching"), "shards"),
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
