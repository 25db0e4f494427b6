"""A report's content before it is HTML, Markdown or CSV: sections of sentences, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

UNKNOWN_TEXT = "–"
MAX_LEAD_CHARACTERS = 180
"""Characters; a longer first sentence is not emphasised."""
MIN_SHOWN_P = 0.0001
"""Smaller p-values depend on the tails of a distribution more than on the runs."""

DisplayedValue = str | int | float | None


@dataclass(frozen=True)
class Column:
    """``kind``, the format: text, integer, figure (4 digits), p (2 digits), bytes, seconds, percent (of 1) or usd."""

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
    """The section's anchor: lower case, no spaces."""
    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[dict[str, Any], ...] = ()
    points: tuple[str, ...] = ()
    """Bullet points after the paragraphs."""


@dataclass(frozen=True)
class ReportContent:
    title: str
    question: str | None
    headline: tuple[str, ...]
    """Empty if no conclusion may be drawn; ``why_none`` then says why."""
    why_none: str | None
    sections: tuple[Section, ...]
    runs: Table
    """All runs with raw values; the first column is the run's id."""
    made: str
    """When the report was made, and from how many runs."""


@dataclass(frozen=True)
class StudyInfo:
    """What a report needs of a study besides its runs. ``ladder``: one or several of ``analysis.rank.as_object``."""

    name: str
    question: str | None = None
    objectives: tuple[str, ...] = ()
    ladder: Any = None
    importance: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Objective → axis → share of the variance."""
    predicted_memory: Mapping[str, Any] = field(default_factory=dict)
    """How many trials were skipped because they were predicted not to fit, and how accurate the predictions were; empty
    if the study has no memory limit."""


def formatted_value(value: DisplayedValue, kind: str) -> str:
    """Return the value as text, e.g. ``1.2 GB`` for bytes."""
    if value is None:
        return UNKNOWN_TEXT
    if isinstance(value, str) or kind == "text":
        return str(value)
    return {
        "integer": f"{value:,.0f}",
        "figure": _figure(value),
        "p": f"{value:.2g}" if value >= MIN_SHOWN_P else f"< {MIN_SHOWN_P:g}",
        "bytes": _bytes(value),
        "seconds": f"{value:,.1f} s",
    }.get(kind) or (f"{value:.0%}" if kind == "percent" else f"${value:,.2f}" if kind == "usd" else str(value))


def lead_sentence(sentence: str) -> tuple[str, str]:
    """Return an answer's first sentence, to be emphasised, and the rest. A long first sentence is left in the rest."""
    first, dot, rest = sentence.partition(". ")
    return (first + dot.strip(), rest) if len(first) <= MAX_LEAD_CHARACTERS else ("", sentence)


def value_table(
    columns: Sequence[tuple[str, str] | str],
    rows: Sequence[Sequence[DisplayedValue]],
    caption: str | None = None,
    keep_empty: bool = False,
) -> Table:
    """Return a table. Columns without a known value are dropped, unless ``keep_empty``."""
    named = [Column(column) if isinstance(column, str) else Column(*column) for column in columns]
    kept = [i for i in range(len(named)) if keep_empty or not rows or any(row[i] is not None for row in rows)]
    return Table(tuple(named[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in rows), caption)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _bytes(value: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"
