"""JSON without duplicate keys: Python's reader would silently keep the last value."""

from __future__ import annotations

from collections import Counter
from typing import Any


class DuplicateKey(Exception):
    """A key occurs twice in one object."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key!r} occurs twice in the object")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dictionary; for ``json.loads``'s ``object_pairs_hook``. Raises :class:`DuplicateKey`."""
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if repeated:
        raise DuplicateKey(repeated[0])
    return dict(pairs)
