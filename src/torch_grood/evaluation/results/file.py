"""``results.json``: written whole or not at all, and read strictly."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch_grood._files import read_at_most, replacing
from torch_grood.errors import GroodError
from torch_grood.evaluation.results._records import decoded, encoded, parsed
from torch_grood.evaluation.results.benchmark_results import SCHEMA_VERSION, BenchmarkResults

__all__ = ["read_results", "write_results"]

_LARGEST = 256 << 20


def write_results(path: str | os.PathLike[str], results: BenchmarkResults) -> None:
    """Write results as JSON: whole or not at all, every number at full precision.

    Raises:
        GroodError: if the file cannot be written, or the results hold what could not be read back.
    """
    try:
        text = json.dumps(encoded(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        # A file name that is no UTF-8 has lone surrogates; their backslash form is JSON's own escape.
        content = text.encode("utf-8", "backslashreplace")
        # Figures that nobody can read again are better missed now than later.
        _results(content.decode())
    except (TypeError, ValueError) as error:
        # A GroodError is a ValueError, too.
        raise GroodError(f"the results cannot be written: {error}") from None
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(content)


def read_results(path: str | os.PathLike[str]) -> BenchmarkResults:
    """Read what `write_results` wrote.

    Raises:
        GroodError: if the file cannot be read, or is anything else; the place in it is named.
    """
    content = read_at_most(path, _LARGEST, "results.json of `grood benchmark`")
    try:
        return _results(content.decode("utf-8"))
    except GroodError as error:
        raise GroodError(f"{path} is no results.json of `grood benchmark`, or was altered: {error}") from None
    except ValueError as error:
        raise GroodError(f"{path} is no JSON: {error}") from None


def _results(text: str) -> BenchmarkResults:
    data = parsed(text)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is int and version > SCHEMA_VERSION:
        raise GroodError(
            f"schema_version is {version}, and this version of torch-grood reads up to {SCHEMA_VERSION}; install a "
            "newer one"
        )
    return decoded(BenchmarkResults, data)
