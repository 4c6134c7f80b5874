"""Frozen dataclasses to JSON and back, strictly: what is read is what the types say, or an error that names the place.

The types are those of JSON: str, bool, int, float, None, literals, tuples, mappings with text keys, other records, and
`Any` for free JSON. Every field must be there and no other; NaN and infinity are no numbers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from torch_grood.errors import GroodError
from torch_grood.evaluation.results._checks import twice

__all__ = ["decoded", "encoded", "json_data", "parsed"]

_T = TypeVar("_T")
_DEEPEST = 32
_NAMES = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", types.NoneType: "null"}


def parsed(text: str) -> Any:
    """Data of a JSON text, in which no key may occur twice.

    Raises:
        ValueError: if it is no such JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def encoded(record: Any) -> Any:
    """JSON data of a record and all that it holds."""
    if dataclasses.is_dataclass(record):
        return {field.name: encoded(getattr(record, field.name)) for field in dataclasses.fields(record)}
    if isinstance(record, Mapping):
        return {key: encoded(value) for key, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [encoded(value) for value in record]
    return record


def decoded(kind: type[_T], data: Any, where: str = "") -> _T:
    """The record of type `kind` that JSON data stands for.

    Args:
        kind: a dataclass.
        data: as `parsed` gives it.
        where: place of the data, for messages.

    Raises:
        GroodError: if the data is anything else, or the record itself refuses it; the place is named.
    """
    return typing.cast(_T, _decoded(kind, data, where))


def json_data(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of free data as JSON gives it back: lists instead of tuples, plain texts and numbers.

    Raises:
        GroodError: if something in it has no place in JSON.
    """
    if depth > _DEEPEST:
        raise GroodError(f"{where} is nested more than {_DEEPEST} deep")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise GroodError(f"{where} is {value}, which JSON cannot say; expected a finite number")
        return float(value)
    if isinstance(value, Mapping):
        return {_text_key(key, where): json_data(one, f"{where}.{key}", depth + 1) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_data(one, f"{where}[{place}]", depth + 1) for place, one in enumerate(value)]
    raise GroodError(f"{where} is a {type(value).__name__}; expected what JSON can say, such as a text or a number")


def _text_key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise GroodError(f"{where} has the key {key!r:.80}; expected texts")
    return str(key)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (key := twice([key for key, _ in pairs])) is not None:
        raise ValueError(f"the key {key!r:.80} occurs twice")
    return dict(pairs)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.40} is no number of JSON, or too large")
    return number


def _decoded(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return json_data(data, where)
    if origin in (Union, types.UnionType):
        if data is None and types.NoneType in arguments:
            return None
        (kind,) = (one for one in arguments if one is not types.NoneType)
        return _decoded(kind, data, where)
    if origin is Literal:
        if not isinstance(data, str) or data not in arguments:
            raise _wrong(data, f"one of {', '.join(arguments)}", where)
        return data
    if origin is tuple:
        return _tuple(arguments, data, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(data, dict):
            raise _wrong(data, "an object", where)
        keys = {key: _decoded(arguments[0], key, f"a key of {where}") for key in data}
        return {keys[key]: _decoded(arguments[1], value, _inside(where, key)) for key, value in data.items()}
    if dataclasses.is_dataclass(kind):
        return _record(kind, data, where)
    if kind is float and type(data) is int:
        return float(data)
    if type(data) is not kind:
        raise _wrong(data, _NAMES[kind], where)
    return data


def _tuple(kinds: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise _wrong(data, "a list", where)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(data)
    if len(data) != len(kinds):
        raise _wrong(data, f"a list of {len(kinds)}", where)
    return tuple(
        _decoded(kind, value, f"{where}[{place}]") for place, (kind, value) in enumerate(zip(kinds, data, strict=True))
    )


def _record(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise _wrong(data, "an object", where)
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    if missing := [name for name in names if name not in data]:
        raise GroodError(f"{where or 'the file'} lacks {missing[0]}")
    if unknown := [name for name in data if name not in names]:
        raise GroodError(f"{where or 'the file'} has the unknown key {unknown[0]!r:.80}; expected {', '.join(names)}")
    values = {name: _decoded(hints[name], data[name], _inside(where, name)) for name in names}
    try:
        return kind(**values)
    except GroodError as error:
        raise GroodError(f"{where}: {error}" if where else str(error)) from None


def _inside(where: str, key: str) -> str:
    return f"{where}.{key:.80}" if where else f"{key:.80}"


def _wrong(data: object, expected: str, where: str) -> GroodError:
    return GroodError(f"{where or 'the file'} is {json.dumps(data, default=str)[:80]}; expected {expected}")
