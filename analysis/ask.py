"""One question at a time, from run folders: prints the answer and its tables, and saves its plots as a page.

``python -m qlora_exp.analysis.ask tradeoffs outputs/runs --page tradeoffs.html``
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora_exp.analysis import sections
from qlora_exp.analysis.comparable import require_comparable
from qlora_exp.analysis.configurations import Configuration, Measure, configurations, measure_of
from qlora_exp.analysis.content import ReportContent, Section
from qlora_exp.analysis.instruct_base_section import instruct_section
from qlora_exp.analysis.rendering import to_html, to_markdown
from qlora_exp.errors import AnalysisError
from qlora_exp.records.files import read_record, write_text
from qlora_exp.records.types import RunRecord

Answer = Callable[[Sequence[RunRecord], Sequence[Configuration], Measure], Section | None]

QUESTIONS: dict[str, Answer] = {
    "rank": lambda records, found, measure: sections.rank_section(found, measure, with_ladder=False),
    "tradeoffs": lambda records, found, measure: sections.tradeoff_section(found, measure),
    "equal": lambda records, found, measure: sections.equal_everything_section(found, measure),
    "instruct_base": lambda records, found, measure: instruct_section(found),
    "memory": lambda records, found, measure: sections.memory_section(found, records),
    "speed": lambda records, found, measure: sections.speed_section(records),
}


def ask(question: str, records: Sequence[RunRecord]) -> ReportContent:
    """A report of one section.

    Raises:
        AnalysisError: runs that can't be compared, or that don't bear on the question.
    """
    group = require_comparable(records)
    measure = measure_of(group.records)
    if measure is None:
        raise AnalysisError("no finished run has a score", f"{len(group.records)} runs", "qlora-exp ls runs")
    found = configurations(group.records, measure)
    section = QUESTIONS[question](group.records, found, measure)
    if section is None:
        raise AnalysisError(
            f"these runs don't bear on {question}: nothing was varied that it asks about",
            f"{len(group.records)} runs",
            "ask it of runs with several ranks, or of base and instruct",
        )
    said = f"{len(group.records)} runs, {len(found)} configurations, {measure.label} on {group.protocol.split}"
    return ReportContent(question, None, (said,), None, (section,), sections.runs_section_table(group.records), said)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ask one question of finished runs.")
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("runs", type=Path, help="a folder of run folders, e.g. outputs/runs")
    parser.add_argument("--page", type=Path, help="also write the plots to this HTML file")
    given = parser.parse_args(arguments)
    records = [read_record(file) for file in sorted(given.runs.glob("*/record.json"))]
    try:
        report = ask(given.question, records)
    except AnalysisError as error:
        parser.exit(error.exit_code, f"{error}\n")
    print(to_markdown(report))
    if given.page is not None:
        write_text(given.page, to_html(report))


if __name__ == "__main__":
    main()
