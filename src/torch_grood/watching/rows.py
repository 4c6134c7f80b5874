"""A decision as a row: the columns of `grood score`, and what tells when, by what and about which input it was made.

    {"path": "inbox/a.png", "score": 0.25, "p_value": 0.04, "is_ood": true, "label": "cat", "prototype_label": "dog",
     "error": null, "time": "2025-11-24T08:30:00.123Z", "by": "3f2a9c… fpr=0.05", "key": "…"}

Where there is an error, there is no score, and the other way round.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_grood._files import sha256_of
from torch_grood._text import encodable, plain
from torch_grood.errors import GroodError
from torch_grood.watching.source import Item

if TYPE_CHECKING:
    from torch_grood.runtime import Decision, Runtime

__all__ = ["BEGINNING", "Row", "decision_row", "error_row", "made_by", "now"]

Row = dict[str, Any]

BEGINNING = b'{"path": '
"""Of every row."""

_LONGEST_ERROR = 500


def made_by(file: Path, runtime: Runtime, tau: float | None = None) -> str:
    """What decides, in one short text: the detector's file with its preprocessing, and the rule.

    Args:
        file: of the detector.
        runtime: made of it.
        tau: the user's own threshold.

    Raises:
        GroodError: if the file cannot be read.
    """
    try:
        content = sha256_of(file)
    except OSError as error:
        raise GroodError(f"{file} cannot be read: {error.strerror or error}") from None
    # A detector file may leave the preprocessing to the user.
    transform = json.dumps(runtime.transform.to_dict(), sort_keys=True)
    digest = sha256(f"{content} {transform}".encode()).hexdigest()[:16]
    if tau is not None:
        return f"{digest} tau={tau!r}"
    return f"{digest} uncalibrated" if runtime.fpr is None else f"{digest} fpr={runtime.fpr!r}"


def now() -> str:
    """The time, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def decision_row(item: Item, decision: Decision, classes: tuple[str, ...], by: str, time: str) -> Row:
    """The decision about an image."""
    if not math.isfinite(decision.score):
        return error_row(item, "the network gives it no finite score", by, time)
    return _row(
        item,
        score=decision.score,
        p_value=decision.p_value,
        is_ood=decision.is_ood,
        label=classes[decision.label],
        prototype_label=classes[decision.prototype_label],
        error=None,
        time=time,
        by=by,
    )


def error_row(item: Item, reason: str, by: str, time: str) -> Row:
    """That an image cannot be decided about, and why."""
    nothing = dict.fromkeys(("score", "p_value", "is_ood", "label", "prototype_label"))
    return _row(item, **nothing, error=plain(reason)[:_LONGEST_ERROR], time=time, by=by)


def _row(item: Item, **columns: Any) -> Row:
    path = None if item.path is None else encodable(item.path)
    return {"path": path, **columns, **item.more, "key": None if item.key is None else item.key.hex()}
