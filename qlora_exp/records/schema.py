"""Converts records to plain JSON types and back, with a strict type check of each key."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar, cast

from qlora_exp.errors import RecordError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

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
    from pydantic import ValidationError

    # As JSON, because only there are lists tuples, texts enums, and objects dataclasses, in spite of the strict check.
    text = json.dumps(raw, ensure_ascii=False).encode("utf-8", "replace")
    try:
        return cast(T, _adapter(cast(Any, kind)).validate_json(text, strict=True))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        keys = [f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"]]
        if first["type"] == "missing":
            hint = "the file was written by another version or is damaged"
            raise RecordError(f"{first['loc'][-1]} is missing", where + "".join(keys[:-1]), hint) from None
        raise RecordError(f"{first['msg']}, not {first['input']!r:.80}", where + "".join(keys)) from None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Built once a type, because that takes up to 35 ms; pydantic is imported at the first use."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
