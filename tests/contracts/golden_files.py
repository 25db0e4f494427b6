"""The golden files: how they are written, read and compared.

A contract is a JSON value that today's program gives. It is flattened to ``key.key[index]`` → leaf, and each leaf of
the stored value must be there again. A mismatch prints file, key, old and new value and the command that rewrites.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).resolve().parent / "golden"
REWRITE = "python -m tests.contracts.write"
RELATIVE_TOLERANCE = 1e-4
"""For floats: another machine's BLAS adds in another order."""
SHOWN = 40
"""Differences that are printed; the rest is counted."""

Tolerance = Callable[[str], tuple[float, float]]
"""Key → (relative, absolute) tolerance of a float."""


def text_of(value: Any) -> str:
    """A golden file's text: sorted keys, one line a leaf, so that a change is readable in ``git diff``."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def write(name: str, value: Any) -> Path:
    file = GOLDEN / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text_of(value), encoding="utf-8")
    return file


def read(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def plain(value: Any) -> Any:
    """``value`` as it comes back from a JSON file."""
    return json.loads(json.dumps(value, default=str))


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """``(key, leaf)`` of a nested value; an empty list or object is a leaf."""
    if isinstance(value, Mapping) and value:
        for name in sorted(value):
            yield from leaves(value[name], f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from leaves(item, f"{key}[{index}]")
    else:
        yield key, value


def equal(old: Any, new: Any, tolerance: tuple[float, float]) -> bool:
    """Whether two leaves count as equal: an int and a float are different types, a float has a tolerance."""
    if isinstance(old, float) and isinstance(new, float):
        relative, absolute = tolerance
        return math.isclose(old, new, rel_tol=relative, abs_tol=absolute)
    return type(old) is type(new) and old == new


def default_tolerance(_key: str) -> tuple[float, float]:
    return RELATIVE_TOLERANCE, 1e-12


def differences(old: Any, new: Any, tolerance: Tolerance = default_tolerance) -> list[str]:
    """One line for each leaf that is gone, is new or has another value."""
    olds, news = dict(leaves(plain(old))), dict(leaves(plain(new)))
    lines = []
    for key in sorted({**olds, **news}):
        if key not in news:
            lines.append(f"  gone     {key}\n           old {shown(olds[key])}")
        elif key not in olds:
            lines.append(f"  new      {key}\n           new {shown(news[key])}")
        elif not equal(olds[key], news[key], tolerance(key)):
            lines.append(f"  changed  {key}\n           old {shown(olds[key])}\n           new {shown(news[key])}")
    return lines


def shown(leaf: Any, width: int = 300) -> str:
    text = json.dumps(leaf, ensure_ascii=False)
    return text if len(text) <= width else f"{text[:width]}…"


def check(name: str, new: Any, tolerance: Tolerance = default_tolerance, key: str | None = None) -> None:
    """Compare ``new`` with the golden file ``name``, or with its entry ``key``.

    Raises:
        AssertionError: they differ; the message has every difference and what to do.
    """
    stored = read(name)
    old = stored if key is None else stored.get(key)
    lines = differences(old, new, tolerance)
    if lines:
        raise AssertionError(report(name, lines, key))


def report(name: str, lines: list[str], key: str | None = None) -> str:
    of = f" [{key}]" if key is not None else ""
    more = [f"  … and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join(
        [
            f"the program no longer gives what tests/contracts/golden/{name}{of} has:",
            *lines[:SHOWN],
            *more,
            f"If the change is meant: {REWRITE} {name.split('/')[0].split('.')[0]}",
            "then read `git diff tests/contracts/golden` and name the change in CHANGELOG.md.",
        ]
    )


NUMBER = re.compile(r"(?<![\w.,-])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.]*\w)")


def numbers(text: str) -> str:
    """The numbers that a text has: what stays when its words are rewritten."""
    return " ".join(sorted(set(NUMBER.findall(text))))


def missing_numbers(key: str, old: str, new: str) -> list[str]:
    """One line for each number that a text had and no longer has; more numbers are no difference."""
    there = set(new.split())
    return [f"  gone     {key}: the number {number}" for number in old.split() if number not in there]
