"""Results as tables for people (terminal, Markdown) and for programs (CSV). Figures are in per cent, in CSV shares.

    methods   near and far: AUROC, and FPR@95 by both conventions under names that say which
    sets      AUROC of each OOD set
    tests     paired tests of two methods

Marks: † a figure that may not stand beside other people's, * a method that saw real outliers, ≈ a method that a test
does not tell from the best. The best of a column is bold among the methods without *. A method that could not run is
listed with its reason. Titles, labels and reasons may come from files: they cannot steer a terminal, a Markdown
renderer or a spreadsheet.
"""

from __future__ import annotations

from torch_grood.evaluation.tables.documents import to_markdown, to_rich, write_tables
from torch_grood.evaluation.tables.grid import Cell, Grid, escape_markdown
from torch_grood.evaluation.tables.long_form import to_csv
from torch_grood.evaluation.tables.notes import footnotes
from torch_grood.evaluation.tables.parts import PARTS, grids

__all__ = [
    "PARTS",
    "Cell",
    "Grid",
    "escape_markdown",
    "footnotes",
    "grids",
    "to_csv",
    "to_markdown",
    "to_rich",
    "write_tables",
]
