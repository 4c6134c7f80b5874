"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from torch_grood.errors import MissingDependencyError


def require(module: str, *, extra: str) -> Any:
    """Import and return `module`, or say which extra of torch-grood brings it.

    Args:
        module: dotted name, e.g. ``"PIL.Image"``.
        extra: name of the extra in pyproject.toml, e.g. ``"vision"``.

    Raises:
        MissingDependencyError: if the package is not installed. An installed package that fails to import
            (a broken build) raises its own error, because installing it again would not help.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != missing:
            raise
        package = {"PIL": "pillow", "sklearn": "scikit-learn", "faiss": "faiss-cpu"}.get(
            missing, missing.replace("_", "-")
        )
        raise MissingDependencyError(
            f"this needs the package {package}, which is not installed; run: pip install 'torch-grood[{extra}]'",
            name=error.name,
        ) from None
