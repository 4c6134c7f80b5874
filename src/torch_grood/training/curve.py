"""The learning curve: loss and accuracy by epoch."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch_grood._optional import require

if TYPE_CHECKING:
    from torch_grood.training.folder import EpochFigures

__all__ = ["draw_curve"]

_TRAINING, _VALIDATION = "#4c72b0", "#dd8452"


def draw_curve(path: Path, title: str, figures: Sequence[EpochFigures]) -> None:
    """Draw the figures of a run into a PNG file.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
    """
    figure_module = require("matplotlib.figure", extra="train")
    ticker = require("matplotlib.ticker", extra="train")
    # A figure of its own: pyplot's would belong to whoever draws in this process.
    figure = figure_module.Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [one.epoch for one in figures]
    marker = "o" if len(figures) <= 30 else None
    for axis, name, train, val in (
        (left, "cross entropy", [one.loss for one in figures], [one.val_loss for one in figures]),
        (right, "accuracy, %", [100 * one.accuracy for one in figures], [100 * one.val_accuracy for one in figures]),
    ):
        axis.plot(epochs, train, color=_TRAINING, marker=marker, markersize=3, label="training, as met")
        axis.plot(epochs, val, color=_VALIDATION, marker=marker, markersize=3, label="validation")
        axis.set_xlabel("epoch")
        axis.set_ylabel(name)
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    right.set_title(f"{figures[-1].val_accuracy:.2%} after epoch {figures[-1].epoch}", fontsize="medium", loc="right")
    # Any text is a title: "$" would begin a formula.
    figure.suptitle(textwrap.fill(title, 110, max_lines=3), fontsize="medium", parse_math=False)
    with warnings.catch_warnings():
        # Losses of 0 on a logarithmic axis, and letters that the font lacks, are no reason to disturb a training.
        warnings.simplefilter("ignore", UserWarning)
        left.set_yscale("log")
        figure.savefig(path, format="png", dpi=120)
