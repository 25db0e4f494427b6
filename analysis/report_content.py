"""A report as sections of sentences, tables and figures; and the same as HTML, Markdown and CSV."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import jinja2

from qlora_exp.formatting import UNKNOWN_CELL, bytes_text

TEMPLATES = Path(__file__).resolve().parent / "templates"
DIGITS = 5
"""Significant digits in the page's data: more than are shown, and fewer bytes than all of them."""
MIN_SHOWN_P = 0.0001
"""Smaller p-values depend on the tails of a distribution more than on the runs."""

QUOTE = "quote"
"""Kind of a column with texts of rows and models, in which Markdown must find no links, images or code."""

DisplayedValue = str | int | float | None


@dataclass(frozen=True)
class Column:
    """``kind``, the format: text, integer, figure (4 digits), p (2 digits), bytes, seconds, percent (of 1),
    share (of 1, signed, 3 digits), usd or quote (:data:`QUOTE`)."""

    name: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    columns: tuple[Column, ...]
    rows: tuple[tuple[DisplayedValue, ...], ...]
    caption: str | None = None
    markdown_rows: int | None = None
    """So many rows in Markdown; ``None``: all."""
    folded: bool = False
    """On the page, the table opens with a click; Markdown leaves it out."""
    quotes: bool = False
    """The caption has texts of rows, in which Markdown must find no links, images or code."""


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
    commands: tuple[str, ...] = ()
    """Commands to copy, one a line."""
    folded: bool = True
    """On the page, the section opens with a click."""


class CardStatus(StrEnum):
    SETTLED = "settled"
    OPEN = "not settled"
    NOT_ASKED = "not asked"


@dataclass(frozen=True)
class AnswerCard:
    """A question and its answer, short enough to be read at a glance."""

    name: str
    question: str
    status: CardStatus
    verdict: str
    evidence: tuple[str, ...] = ()
    cost: str | None = None
    """What the answer may cost, and what it saves."""
    settle: str | None = None
    """What would settle the question; ``None`` if it is settled, or unknown."""
    command: str | None = None
    """A command that would settle it."""
    section: str | None = None
    """Name of the section with the details; ``None`` if there is none."""


@dataclass(frozen=True)
class ReportContent:
    title: str
    question: str | None
    headline: tuple[str, ...]
    """The first sentence says what to use, the others how far that holds. Empty without a score (``why_none`` then says
    why), and in a report of one section."""
    why_none: str | None
    sections: tuple[Section, ...]
    runs: Table
    """All runs with raw values; the first column is the run's id."""
    made: str
    """When the report was made, and from how many runs."""
    cards: tuple[AnswerCard, ...] = ()
    command: str | None = None
    """Command that runs what the headline says to use."""


@dataclass(frozen=True)
class StudyInfo:
    """What a report needs of a study besides its runs."""

    name: str
    question: str | None = None
    objectives: tuple[str, ...] = ()
    ladders: Sequence[Mapping[str, Any]] = ()
    """The answers in ``ladder.json``: those of ``rank.as_object``, with axes, costs and warnings."""
    importance: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Objective → axis → share of the variance."""
    predicted_memory: Mapping[str, Any] = field(default_factory=dict)
    """How many trials were skipped because they were predicted not to fit, and how accurate the predictions were; empty
    if the study has no memory limit."""
    overrides: tuple[str, ...] | None = None
    """Overrides of every trial besides its axes, for commands that run more of them; ``None``: unknown."""
    screening: Mapping[str, Any] | None = None
    """``ladder.json``'s successive halving, which chooses the configuration that gets a ladder."""
    confirmation: Mapping[str, Any] | None = None
    """``confirm.json`` of a study that confirms another one's finalists."""
    confirm_command: str | None = None
    """Command that confirms this study's best configurations; ``None``: it doesn't choose by a validation score."""


def report_object(content: ReportContent) -> dict[str, Any]:
    """Return the answer, its cards, and the sections with unrounded tables, without figures, for JSON."""
    return {
        "title": content.title,
        "question": content.question,
        "headline": list(content.headline),
        "why_none": content.why_none,
        "command": content.command,
        "cards": [asdict(card) for card in content.cards],
        "sections": [
            {
                "name": section.name,
                "title": section.title,
                "paragraphs": list(section.paragraphs),
                "points": list(section.points),
                "commands": list(section.commands),
                "tables": [
                    {
                        "caption": table.caption,
                        "columns": [column.name for column in table.columns],
                        "rows": [list(row) for row in table.rows],
                    }
                    for table in section.tables
                ],
            }
            for section in content.sections
        ],
    }


def formatted_value(value: DisplayedValue, kind: str) -> str:
    """Return the value as text, e.g. ``1.2 GB`` for bytes."""
    if value is None:
        return UNKNOWN_CELL
    if isinstance(value, str):
        return value
    match kind:
        case "integer":
            return f"{value:,.0f}"
        case "figure":
            return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
        case "p":
            return f"{value:.2g}" if value >= MIN_SHOWN_P else f"< {MIN_SHOWN_P:g}"
        case "bytes":
            return bytes_text(value)
        case "seconds":
            return f"{value:,.1f} s"
        case "percent":
            return f"{value:.0%}"
        case "share":
            return f"{100 * value:+.3g} %"
        case "usd":
            return f"${value:,.2f}"
    return str(value)


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


def to_html(report: ReportContent, runs_at: str | None = None) -> str:
    """Return one HTML file that contains its script, style and data.

    Args:
        runs_at: path of the run folders, relative to the file; ``None``: runs are not linked.
    """
    from plotly.offline import get_plotlyjs

    # Labels, messages and settings are untrusted text: all of it is escaped, and the script writes text only.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": formatted_value, "lead": _lead}
    counts = itertools.accumulate((len(section.figures) for section in report.sections), initial=0)
    # Section → number of its first figure. Macros see only what the environment has.
    environment.globals["numbers"] = dict(zip((section.name for section in report.sections), counts, strict=False))
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    figures = [figure for section in report.sections for figure in section.figures]
    columns = [_rounded(list(column)) for column in zip(*report.runs.rows, strict=True)]
    runs = json.dumps(columns, separators=(",", ":"), ensure_ascii=False)
    data = {
        "figures": _rounded(figures),
        "columns": [[column.name, column.kind] for column in report.runs.columns],
        # Compressed, so that 10,000 runs don't fill the file. mtime=0: the same runs give the same bytes.
        "runs": base64.b64encode(gzip.compress(runs.encode(), mtime=0)).decode(),
        "runsAt": runs_at,
    }
    return environment.get_template("report.html.jinja").render(
        report=report,
        data=data,
        plotly=get_plotlyjs() if figures else "",
        script=(TEMPLATES / "report.js").read_text(encoding="utf-8"),
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
    )


def _lead(sentence: str) -> tuple[str, str]:
    """Return the first line up to its first colon, which is emphasised, and the rest."""
    first, colon, rest = sentence.partition(": ")
    return (first + colon.strip(), f" {rest}") if colon else (sentence, "")


def to_markdown(report: ReportContent) -> str:
    """Return the same sentences and tables as Markdown; the runs are in the CSV."""
    lines = [f"# {_plain(report.title)}", ""]
    lines += [_plain(report.question), ""] if report.question else []
    for number, sentence in enumerate(report.headline or [report.why_none]):
        lines += [_plain(sentence) if number else f"**{_plain(sentence)}**", ""] if sentence else []
    for card in report.cards:
        lines += [f"**{_plain(card.question)}** {_plain(card.verdict)} ({card.status})", ""]
        points = [*card.evidence, *(text for text in (card.cost, card.settle) if text)]
        lines += [*(f"* {_plain(point)}" for point in points), ""] if points else []
        lines += [*_code(card.command), ""] if card.command else []
    for section in report.sections:
        lines += [f"## {_plain(section.title)}", ""]
        for paragraph in section.paragraphs:
            lines += [_plain(paragraph), ""]
        lines += [*(f"* {_plain(point)}" for point in section.points), ""] if section.points else []
        lines += [*_code("\n".join(section.commands)), ""] if section.commands else []
        folded = sum(table.folded for table in section.tables)
        for table in (table for table in section.tables if not table.folded):
            caption = _quoted(table.caption) if table.caption and table.quotes else table.caption
            lines += [f"{_plain(caption)}:", ""] if caption else []
            lines += [*_markdown_table(table), ""]
            if table.markdown_rows is not None and len(table.rows) > table.markdown_rows:
                lines += [f"{len(table.rows) - table.markdown_rows} more are in report.html.", ""]
        lines += [f"{folded} more tables are in report.html.", ""] if folded else []
    return "\n".join([*lines, f"Made {report.made}."]) + "\n"


def to_csv(report: ReportContent) -> str:
    """Return all runs as CSV with raw values; unknown ones are empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([column.name.replace(" ", "_") for column in report.runs.columns])
    writer.writerows(report.runs.rows)
    return stream.getvalue()


def _code(commands: str) -> list[str]:
    # A longer fence than any in the text: a command is untrusted text, too.
    longest = max((len(run) for run in re.findall("`+", commands)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}console", *(f"$ {line}" for line in commands.splitlines()), fence]


def _markdown_table(table: Table) -> Iterator[str]:
    def row(cells: Iterable[str]) -> str:
        return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"

    def shown(value: DisplayedValue, kind: str) -> str:
        text = formatted_value(value, kind)
        return _quoted(text) if kind == QUOTE else text

    yield row(column.name for column in table.columns)
    yield "|" + "|".join("---" if column.kind in ("text", QUOTE) else "---:" for column in table.columns) + "|"
    for values in table.rows[: table.markdown_rows]:
        yield row(shown(value, column.kind) for value, column in zip(values, table.columns, strict=True))


def _quoted(text: str) -> str:
    """Return the text without what Markdown would read as links, images, code or emphasis."""
    return re.sub(r"([\\`*_\[\]!~$&])", r"\\\1", text)


def _plain(text: str) -> str:
    """Return the text on one line, without what Markdown would read as HTML."""
    return " ".join(text.split()).replace("<", "&lt;")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(entry) for entry in value]
    return value
