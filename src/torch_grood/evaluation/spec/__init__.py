"""Benchmarks as data: which image sets belong to one, in TOML.

A spec names in-distribution sets (train, test, perhaps val), near- and far-OOD test sets, perhaps real outliers for
validation, the preprocessing, and the archives that the images come from. OpenOOD v1.5's four benchmarks are built
in; anybody's own needs no more than

    name = "flowers"

    [id.train]
    folder = "flowers/train"

    [id.test]
    folder = "flowers/test"

    [near.weeds]
    folder = "weeds"

Paths are relative to a data root that the caller chooses. What a spec says wrongly is an error that names file, table
and key, before anything is read or fetched.
"""

from __future__ import annotations

from torch_grood.evaluation.spec.file import read_spec, spec_names
from torch_grood.evaluation.spec.records import Archive, BenchmarkSpec, SetSpec

__all__ = ["Archive", "BenchmarkSpec", "SetSpec", "read_spec", "spec_names"]
