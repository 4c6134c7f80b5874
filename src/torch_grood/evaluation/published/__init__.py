"""Published figures, as TOML, and how far a benchmark's results are from them.

A file says whose figures they are and of which checkpoints, and has a table for each method, AUROC in per cent as it
was printed (the number of decimals counts):

    name = "openood-v1.5-cifar10"
    benchmark = "cifar10"                   # the spec's name
    source = "OpenOOD v1.5 leaderboard"
    checkpoints = "ResNet-18, 100 epochs, three seeds"
    id_accuracy = "95.06 ± 0.30"
    tolerance = 0.05                        # points, beyond rounding; 0 if left out
    within_std = 4.3                        # a difference of so many published std is none; 2 if left out

    [sets]
    near = { cifar100 = 9000, tin = 7793 }  # images; 0 if not known

    [figures.knn]
    near = "90.64 ± 0.20"
    far = 92.96
    sets = { tin = "91.56 ± 0.26" }

A method's table may also have `method` and `config`, where its key is not a method's name or only some hyper-parameters
are meant, and `source`, `checkpoints`, `id_accuracy` and `note` of its own. `weights_sha256` names the checkpoints
beyond doubt; without it the ID accuracy must agree, since figures of another network say nothing about an
implementation. What cannot be compared is never called off, and never called right.
"""

from __future__ import annotations

from torch_grood.evaluation.published.figures import Figure, Published, PublishedMethod
from torch_grood.evaluation.published.file import published_names, read_published
from torch_grood.evaluation.published.verification import Deviation, Verdict, deviations_grid, verdict, verify

__all__ = [
    "Deviation",
    "Figure",
    "Published",
    "PublishedMethod",
    "Verdict",
    "deviations_grid",
    "published_names",
    "read_published",
    "verdict",
    "verify",
]
