"""The demo's figure: how GROOD's scores of known and unknown images lie, and where τ parts them."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from torch_grood._optional import require

if TYPE_CHECKING:
    from torch_grood.demo.run import FalseAlarms

__all__ = ["scores_figure"]

# Okabe and Ito's colours, which the colour-blind can tell apart.
_ROWS = {
    "test": ("new images of the digits 0–5", "known (ID)", "#0072B2"),
    "near": ("digits 6–9", "unknown (near-OOD)", "#D55E00"),
    "photos": ("tiles of photographs", "unknown (far-OOD)", "#009E73"),
    "noise": ("uniform noise", "unknown (far-OOD)", "#CC79A7"),
}
_INK, _FAINT = "#222222", "#8a8a8a"


def scores_figure(
    scores: dict[str, NDArray[np.float64]],
    samples: dict[str, NDArray[np.uint8]],
    tau: float,
    flagged: dict[str, float],
    false_alarms: FalseAlarms,
) -> bytes:
    """A PNG, 1600 × 1000: a histogram for each set on a common logarithmic axis, with four of its images, and τ.

    Args:
        scores: set name → GROOD scores (n,), for the sets test, near, photos, noise.
        samples: set name → grey images (4, 8, 8).
        tau: the threshold.
        flagged: set name → share of images above τ.
        false_alarms: of the set "test", for the caption.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    matplotlib = require("matplotlib", extra="bench")
    figure_module = require("matplotlib.figure", extra="bench")
    boxes = require("matplotlib.offsetbox", extra="bench")
    with matplotlib.rc_context({"font.size": 12, "axes.edgecolor": _FAINT, "text.color": _INK}):
        figure = figure_module.Figure(figsize=(10, 6.25), dpi=160, facecolor="white")
        everything = np.concatenate([*scores.values(), [tau]])
        # A score of 0 (a copy of a training image) has no place on a logarithmic axis; it goes into the lowest bin.
        low, high = np.log10(everything[everything > 0].min()), np.log10(everything.max())
        margin = 0.02 * (high - low)
        bins = np.logspace(low - margin, high + margin, 61)
        layout = {"left": 0.025, "right": 0.865, "top": 0.80, "bottom": 0.115, "hspace": 0.62, "wspace": 0.08}
        grid = figure.add_gridspec(len(_ROWS), 5, width_ratios=[1, 1, 1, 1, 12], **layout)
        for row, (name, (title, kind, colour)) in enumerate(_ROWS.items()):
            for column, pixels in enumerate(samples[name]):
                thumbnail = figure.add_subplot(grid[row, column])
                thumbnail.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                thumbnail.set_axis_off()
            axes = figure.add_subplot(grid[row, 4])
            values = np.clip(scores[name], bins[0], bins[-1])
            axes.axvspan(tau, bins[-1], color="#eeeeee", linewidth=0)
            axes.hist(values, bins, weights=np.full(len(values), 1 / len(values)), color=colour)
            axes.axvline(tau, color=_INK, linewidth=1.6, linestyle=(0, (4, 2)))
            axes.set(xscale="log", xlim=(bins[0], bins[-1]), yticks=[])
            axes.minorticks_off()
            axes.tick_params(labelbottom=row == len(_ROWS) - 1)
            axes.spines[["top", "left", "right"]].set_visible(False)
            heading = boxes.HPacker(
                pad=0,
                sep=9,
                align="baseline",
                children=[
                    boxes.TextArea(title, textprops={"color": colour, "weight": "bold"}),
                    boxes.TextArea(f"{kind}, n = {len(values)}"),
                ],
            )
            place = {"xycoords": "axes fraction", "xybox": (0, 3), "boxcoords": "offset points"}
            axes.add_artist(boxes.AnnotationBbox(heading, (0, 1), box_alignment=(0, 0), pad=0, frameon=False, **place))
            share = f"{100 * flagged[name]:.1f} %\nflagged"
            axes.annotate(share, (1.02, 0.5), xycoords="axes fraction", va="center", color=colour, weight="bold")
            if row == 0:
                axes.text(tau * 1.03, 0.74, "τ", transform=axes.get_xaxis_transform(), ha="left", fontsize=16)
        axes.set_xlabel("GROOD score, logarithmic: further right = less like the training data")
        figure.text(0.025, 0.945, "A network learned the digits 0–5. What does GROOD say of other images?", fontsize=15)
        figure.text(0.025, 0.89, _caption(false_alarms), fontsize=11.5)
        figure.text(0.025, 0.03, "bars: share of a set's images,\neach row on its own scale", fontsize=10)
        buffer = io.BytesIO()
        # Without the software's version, the same figure is the same bytes.
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _caption(alarms: FalseAlarms) -> str:
    return (
        f"Right of τ (grey): flagged. The promise: on average at most {100 * alarms.promised:g} % of known images. "
        f"Observed: {alarms.count} of {alarms.n} ({100 * alarms.observed:.1f} %)."
    )
