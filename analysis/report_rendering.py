"""Render a report as one HTML file that works offline, as Markdown, and its runs as CSV: the same figures in each."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2

from qlora_exp.analysis.report_content import UNKNOWN_TEXT, ReportContent, Table, formatted_value, lead_sentence

TEMPLATES = Path(__file__).resolve().parent / "templates"
DIGITS = 5
"""Significant digits in the page's data: more than are shown, and fewer bytes than all of them."""


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
    environment.filters |= {"shown": formatted_value, "led": lead_sentence}
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    figures = [figure for section in report.sections for figure in section.figures]
    data = {
        "figures": _rounded(figures),
        "columns": [[column.name, column.kind] for column in report.runs.columns],
        "runs": _compressed([_rounded(list(column)) for column in zip(*report.runs.rows, strict=True)]),
        "runsAt": runs_at,
    }
    return environment.get_template("report.html.jinja").render(
        report=report,
        data=data,
        plotly=get_plotlyjs() if figures else "",
        script=(TEMPLATES / "report.js").read_text(encoding="utf-8"),
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
    )


def to_markdown(report: ReportContent) -> str:
    """Return the same sentences and tables as Markdown; the runs are in the CSV."""
    return "\n".join(_markdown(report)).rstrip() + "\n"


def to_csv(report: ReportContent) -> str:
    """Return all runs as CSV with raw values; unknown ones are empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([column.name.replace(" ", "_") for column in report.runs.columns])
    writer.writerows(report.runs.rows)
    return stream.getvalue()


def markdown_table(table: Table) -> Iterator[str]:
    yield _row(column.name for column in table.columns)
    yield "|" + "|".join("---" if column.kind == "text" else "---:" for column in table.columns) + "|"
    for row in table.rows:
        yield _row(formatted_value(value, column.kind) for value, column in zip(row, table.columns, strict=True))


def _markdown(report: ReportContent) -> Iterator[str]:
    yield from (f"# {_plain(report.title)}", "", *([_plain(report.question), ""] if report.question else []))
    for sentence in report.headline or [report.why_none or UNKNOWN_TEXT]:
        yield from (f"**{_plain(sentence)}**", "")
    for section in report.sections:
        yield from (f"## {_plain(section.title)}", "")
        for paragraph in section.paragraphs:
            yield from (_plain(paragraph), "")
        for point in section.points:
            yield f"* {_plain(point)}"
        yield from [""] if section.points else []
        for table in section.tables:
            yield from [f"{_plain(table.caption)}:", ""] if table.caption else []
            yield from (*markdown_table(table), "")
    yield f"Made {report.made}."


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"


def _plain(text: str) -> str:
    """Return the text on one line, without what Markdown would read as HTML."""
    return " ".join(text.split()).replace("<", "&lt;")


def _compressed(value: Any) -> str:
    """Return JSON, gzipped, in base64, so that 10,000 runs don't fill the file."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    # mtime=0: the same runs give the same bytes.
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(entry) for entry in value]
    return value
