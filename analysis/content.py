"""What a report says, before it is HTML, Markdown or CSV: sections of sentences, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

UNKNOWN_TEXT = "–"
MOST_LED = 180
"""Letters; a paragraph that stands out as a whole doesn't."""
LEAST_P = 0.0001
"""Smaller ones say more of the tails of a distribution than of the runs."""

DisplayedValue = str | int | float | None


@dataclass(frozen=True)
class Column:
    """``kind``: text, integer, figure (4 digits), p (2 digits), bytes, seconds, percent (of 1) or usd."""

    name: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    columns: tuple[Column, ...]
    rows: tuple[tuple[DisplayedValue, ...], ...]
    caption: str | None = None


@dataclass(frozen=True)
class Section:
    name: str
    """An anchor: lower case, no blanks."""
    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[dict[str, Any], ...] = ()
    points: tuple[str, ...] = ()
    """A list after the paragraphs."""


@dataclass(frozen=True)
class ReportContent:
    title: str
    question: str | None
    headline: tuple[str, ...]
    """Empty where none may be drawn; ``why_none`` says why then."""
    why_none: str | None
    sections: tuple[Section, ...]
    runs: Table
    """Every run, raw values; the first column is the run's id."""
    made: str
    """When, and with what."""


@dataclass(frozen=True)
class StudyInfo:
    """What is known of a study besides its runs; ``ladder`` as ``analysis.rank.as_object`` has it, or several."""

    name: str
    question: str | None = None
    objectives: tuple[str, ...] = ()
    ladder: Any = None
    importance: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Objective → axis → share of the variance."""
    predicted_memory: Mapping[str, Any] = field(default_factory=dict)
    """How many trials were not started because they were predicted not to fit, and how right that was; empty where
    nothing limited their memory."""


def formatted_value(value: DisplayedValue, kind: str) -> str:
    """A figure as a person reads it."""
    if value is None:
        return UNKNOWN_TEXT
    if isinstance(value, str) or kind == "text":
        return str(value)
    return {
        "integer": f"{value:,.0f}",
        "figure": _figure(value),
        "p": f"{value:.2g}" if value >= LEAST_P else f"< {LEAST_P:g}",
        "bytes": _bytes(value),
        "seconds": f"{value:,.1f} s",
    }.get(kind) or (f"{value:.0%}" if kind == "percent" else f"${value:,.2f}" if kind == "usd" else str(value))


def lead_sentence(sentence: str) -> tuple[str, str]:
    """What stands out of an answer, its first sentence where that is short, and the rest of it."""
    first, dot, rest = sentence.partition(". ")
    return (first + dot.strip(), rest) if len(first) <= MOST_LED else ("", sentence)


def value_table(
    columns: Sequence[tuple[str, str] | str],
    rows: Sequence[Sequence[DisplayedValue]],
    caption: str | None = None,
    whole: bool = False,
) -> Table:
    """``whole`` keeps columns of which nothing is known."""
    named = [Column(column) if isinstance(column, str) else Column(*column) for column in columns]
    kept = [i for i in range(len(named)) if whole or not rows or any(row[i] is not None for row in rows)]
    return Table(tuple(named[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in rows), caption)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _bytes(value: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"
