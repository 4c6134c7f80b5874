"""How sure a figure is, and whether two methods differ: intervals and paired tests on one benchmark's scores.

All OOD sets of a benchmark are held against the same ID images, and all methods score the same images. Both matter:
a mean over sets is less sure than if each set had ID images of its own, and a difference of methods that err alike is
surer than either of them.

    samples     one method's scores, and how those of an ID and an OOD set lie to each other
    estimates   a figure with its interval; Holm's correction
    auroc       by DeLong's formula, for the AUROC alone; and the AUROC of shuffled scores
    resampling  by the bootstrap, for every figure
"""

from __future__ import annotations

from torch_grood.evaluation.inference.auroc import ShuffledAuroc, delong, delong_difference, shuffled_auroc
from torch_grood.evaluation.inference.estimates import Estimate, EstimateWithTest, holm
from torch_grood.evaluation.inference.resampling import Bootstrap, bootstrap, paired_bootstrap, resampling_counts
from torch_grood.evaluation.inference.samples import ScoreSets

__all__ = [
    "Bootstrap",
    "Estimate",
    "EstimateWithTest",
    "ScoreSets",
    "ShuffledAuroc",
    "bootstrap",
    "delong",
    "delong_difference",
    "holm",
    "paired_bootstrap",
    "resampling_counts",
    "shuffled_auroc",
]
