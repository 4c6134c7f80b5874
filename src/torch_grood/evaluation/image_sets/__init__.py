"""The image sets of a benchmark on this disk: which are there, whether they are what the benchmark means, and no leaks.

`survey` looks at each set by itself and says what it found. `resolve` goes on only with a benchmark that can be run:
figures of another set than the one that everybody else measures with look just as good, so whatever is missing or has
another number of images is an error, or, where that was allowed, stays marked.

A validation image that is also a test image would be measured with after it was chosen with. `find_overlaps` compares
contents, not names: sizes first, and a hash (BLAKE2b) of those files only whose size occurs on both sides.
"""

from __future__ import annotations

from torch_grood.evaluation.image_sets.overlaps import Overlap, find_overlaps
from torch_grood.evaluation.image_sets.reports import Group, SetReport, data_root, survey
from torch_grood.evaluation.image_sets.resolution import resolve
from torch_grood.evaluation.image_sets.resolved import ImageSet, ResolvedSets

__all__ = [
    "Group",
    "ImageSet",
    "Overlap",
    "ResolvedSets",
    "SetReport",
    "data_root",
    "find_overlaps",
    "resolve",
    "survey",
]
