"""Progress bars: tqdm by default, silence, or the caller's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["Progress", "track"]

Progress = Callable[[Iterable[Any]], Iterable[Any]] | bool | None
"""None: a tqdm bar when stderr is a terminal. True, False: always, never. A callable: wraps the iterable itself."""


def track(batches: Iterable[Any], progress: Progress, description: str) -> Iterable[Any]:
    """Wrap `batches` so that its consumption is shown."""
    if progress is False:
        return batches
    if callable(progress):
        return progress(batches)
    # Not tqdm.auto: its bars call iter() once more when they are made, which starts a DataLoader's workers twice.
    from tqdm import tqdm

    # disable=None: tqdm shows itself on a terminal only.
    bar: Iterable[Any] = tqdm(batches, desc=description, unit="batch", disable=None if progress is None else False)
    return bar
