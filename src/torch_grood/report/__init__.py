"""One HTML page for people: what a detector was fitted on, how it decides, and what it says of images; or a benchmark.

    ReportSet ──▶ score_set ──▶ ScoredSet ─┬─▶ tables, figures ──▶ page
                                           └─▶ look_closer: pictures, gradients, neighbours

The page is one file without a reference to any other, and its size does not grow with the number of images.
"""

from __future__ import annotations

from torch_grood.report.on_benchmark import benchmark_report
from torch_grood.report.on_detector import POINTS, Options, detector_report
from torch_grood.report.page import write_page
from torch_grood.report.sets import ReportSet

__all__ = ["POINTS", "Options", "ReportSet", "benchmark_report", "detector_report", "write_page"]
