"""Where the training images are now that a detector names by the paths they once had."""

from __future__ import annotations

from pathlib import Path

__all__ = ["training_file"]

# Of a stored path: what systems allow, and folders to look for it from.
_LONGEST_PATH, _DEEPEST = 4096, 32


def training_file(name: str | None, root: Path | None) -> Path | None:
    """The file that a stored path stands for: below `root`, the longest end of the path that is there.

    Args:
        name: as `GROOD.sample_names` gives it: from a detector's file, so that it may be anything.
        root: a folder, beyond which nothing is looked at; None: the path itself, from the current folder.

    Returns:
        None if there is no such file.
    """
    if name is None or len(name) > _LONGEST_PATH:
        return None
    parts = Path(name).parts
    if root is None:
        candidates = [Path(name)]
    elif ".." in parts:
        candidates = []
    else:
        ends = range(max(0, len(parts) - _DEEPEST), len(parts))
        candidates = [path for start in ends if (path := root.joinpath(*parts[start:])).is_relative_to(root)]
    try:
        return next((path for path in candidates if path.is_file()), None)
    except (OSError, ValueError):
        # A name that no file can have.
        return None
