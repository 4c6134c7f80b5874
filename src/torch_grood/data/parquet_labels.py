"""Labels in a column of Parquet files: class numbers, or names of classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from torch_grood._optional import require
from torch_grood.data.image_lists import MAX_LABEL
from torch_grood.data.parquet_reader import check_column, opened_parquet, whole_column
from torch_grood.errors import GroodError

__all__ = ["ParquetLabels", "read_labels"]

_LABEL_COLUMN = "label"


class ParquetLabels(NamedTuple):
    """Labels of all rows.

    Attributes:
        numbers: n class numbers, −1 for OOD.
        classes: their names, or None if only numbers are known.
    """

    numbers: tuple[int, ...]
    classes: tuple[str, ...] | None


def read_labels(files: Sequence[str], column: str | None) -> ParquetLabels | None:
    """Labels of all rows.

    Integers are class numbers; where the files' description of Hugging Face's names the classes, these are the names.
    Strings are names of classes, which sorted are 0, 1, …, as those of folders.

    Args:
        files: paths or URLs.
        column: its name; None: see `ParquetColumns`.

    Returns:
        None if there is no such column and none was named.

    Raises:
        GroodError: if the column is missing in some file, or a row has no label, or none that can be one.
    """
    parts: list[tuple[Any, Any]] = []
    described: list[tuple[str, ...] | None] = []
    for file in files:
        with opened_parquet(file) as reader:
            schema = reader.schema_arrow
        features = _features(schema)
        column = column or _label_column(schema, features)
        if column is None:
            return None
        check_column(file, schema, column, "--label-column")
        described.append(_class_names(features.get(column)))
        parts.append(_encoded(file, column, whole_column(file, column)))
    if len({names is None for names, _ in parts}) > 1 or len(set(described)) > 1:
        raise GroodError(
            f"the column {column!r} of {files[0]} and of the other files differ: in their type, or in the names of the "
            "classes; pass files of one data set"
        )
    if parts[0][0] is None:
        return _numbered(files, [codes for _, codes in parts], described[0])
    classes = sorted({name for names, _ in parts for name in names})
    place = {name: number for number, name in enumerate(classes)}
    numbers = [np.array([place[name] for name in names], np.int64)[codes] for names, codes in parts]
    return ParquetLabels(tuple(np.concatenate(numbers).tolist()), tuple(classes))


def _numbered(files: Sequence[str], parts: Sequence[Any], names: tuple[str, ...] | None) -> ParquetLabels:
    most = MAX_LABEL if names is None else len(names) - 1
    for file, numbers in zip(files, parts, strict=True):
        wrong = np.nonzero((numbers < -1) | (numbers > most))[0]
        if len(wrong):
            known = f"0 … {most}, of which the file has the names," if names else "0, 1, 2, …"
            raise GroodError(f"{file}#{wrong[0]}: {numbers[wrong[0]]} is no class; expected {known} or −1 for OOD")
    # Two classes of one name could not be told apart by it.
    unique = names if names and len(set(names)) == len(names) else None
    return ParquetLabels(tuple(np.concatenate(parts).tolist()), unique)


def _encoded(file: str, column: str, values: Any) -> tuple[list[str] | None, Any]:
    """A column of labels as (distinct names, number of each row among them), or (None, class numbers)."""
    arrow = require("pyarrow", extra="cli")
    if arrow.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if values.null_count:
        row = next(row for row, value in enumerate(values) if not value.is_valid)
        raise GroodError(f"{file}#{row}: no label in the column {column!r}; leave such rows out, or label them")
    if arrow.types.is_string(values.type) or arrow.types.is_large_string(values.type):
        encoded = values.combine_chunks().dictionary_encode()
        return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    if not arrow.types.is_integer(values.type):
        raise GroodError(
            f"{file}: the column {column!r} holds {values.type}, not integers or names of classes; name another one: "
            "--label-column"
        )
    try:
        return None, values.cast(arrow.int64()).to_numpy()
    except arrow.ArrowException as error:
        raise GroodError(f"{file}: the column {column!r} holds numbers that are no classes ({error})") from None


def _label_column(schema: Any, features: Mapping[str, Any]) -> str | None:
    if _LABEL_COLUMN in schema.names:
        return _LABEL_COLUMN
    found = [name for name, feature in features.items() if name in schema.names and _class_names(feature) is not None]
    return found[0] if len(found) == 1 else None


def _features(schema: Any) -> dict[str, Any]:
    """What Hugging Face's datasets say of the columns in the schema's metadata; nothing where that is not as usual."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _class_names(feature: Any) -> tuple[str, ...] | None:
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    names = feature.get("names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)
