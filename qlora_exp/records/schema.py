"""Converts records to plain JSON types and back, with a type check of each key."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeVar

from qlora_exp.errors import RecordError

T = TypeVar("T")


def to_dict(value: Any) -> Any:
    """Return ``value`` as plain JSON types. Non-finite floats become ``None``, because JSON has no NaN."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_dict(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_dict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(entry) for entry in value]
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def from_dict(kind: type[T], raw: Any, where: str = "record") -> T:
    """Return an instance of ``kind`` from plain JSON types. Unknown keys are ignored: newer versions may write more.

    Raises:
        RecordError: a key is missing or has a wrong type; the error names it.
    """
    return typing.cast(T, _build(kind, raw, where))


def _build(kind: Any, raw: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if raw is None and type(None) in options:
            return None
        return _build(next(option for option in options if option is not type(None)), raw, where)
    if kind is Any:
        return raw
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, raw, where)
    if origin is tuple:
        _expect(raw, list, where)
        return tuple(_build(typing.get_args(kind)[0], entry, f"{where}[{i}]") for i, entry in enumerate(raw))
    if origin is dict:
        _expect(raw, dict, where)
        return {str(key): _build(typing.get_args(kind)[1], entry, f"{where}.{key}") for key, entry in raw.items()}
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        try:
            return kind(raw)
        except ValueError:
            raise RecordError(f"{raw!r} is not a {kind.__name__}", where, f"one of {', '.join(kind)}") from None
    if kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    _expect(raw, kind, where)
    return raw


def _build_dataclass(kind: Any, raw: Any, where: str) -> Any:
    _expect(raw, dict, where)
    values = {}
    for name, hint, needed in _fields(kind):
        if name in raw:
            values[name] = _build(hint, raw[name], f"{where}.{name}")
        elif needed:
            raise RecordError(f"{name} is missing", where, "the file was written by another version or is damaged")
    return kind(**values)


@functools.cache
def _fields(kind: Any) -> list[tuple[str, Any, bool]]:
    """Return (name, type, whether it is required) of each field. Cached, because evaluating the types takes 3 ms."""
    hints = typing.get_type_hints(kind)
    missing = dataclasses.MISSING
    return [
        (item.name, hints[item.name], item.default is missing and item.default_factory is missing)
        for item in dataclasses.fields(kind)
    ]


def _expect(raw: Any, kind: type, where: str) -> None:
    wrong_bool = kind in (int, float) and isinstance(raw, bool)
    if not isinstance(raw, kind) or wrong_bool:
        raise RecordError(f"expected {kind.__name__}, found {type(raw).__name__} {raw!r:.80}", where)
