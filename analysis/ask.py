"""Answer one question from run folders: print the answer and its tables, and save its plots as a page.

``python -m qlora_exp.analysis.ask tradeoffs outputs/runs --page tradeoffs.html``
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora_exp.analysis import sections
from qlora_exp.analysis.comparable import require_comparable
from qlora_exp.analysis.configurations import Configuration, Measure, configurations, measure_of
from qlora_exp.analysis.instruct_base_section import instruct_section
from qlora_exp.analysis.report_content import ReportContent, Section
from qlora_exp.analysis.report_rendering import to_html, to_markdown
from qlora_exp.errors import AnalysisError
from qlora_exp.records.files import read_record, write_text
from qlora_exp.records.types import RunRecord

Answer = Callable[[Sequence[RunRecord], Sequence[Configuration], Measure], Section | None]

QUESTIONS: dict[str, Answer] = {
    "rank": lambda records, configs, measure: sections.rank_section(configs, measure, with_ladder=False),
    "tradeoffs": lambda records, configs, measure: sections.tradeoff_section(configs, measure),
    "equal": lambda records, configs, measure: sections.equal_everything_section(configs, measure),
    "instruct_base": lambda records, configs, measure: instruct_section(configs),
    "memory": lambda records, configs, measure: sections.memory_section(configs, records),
    "speed": lambda records, configs, measure: sections.speed_section(records),
}


def ask(question: str, records: Sequence[RunRecord]) -> ReportContent:
    """Return a report with one section, the answer to ``question``.

    Raises:
        AnalysisError: the runs aren't comparable, or don't bear on the question.
    """
    group = require_comparable(records)
    measure = measure_of(group.records)
    if measure is None:
        raise AnalysisError("no finished run has a score", f"{len(group.records)} runs", "qlora-exp ls runs")
    configs = configurations(group.records, measure)
    section = QUESTIONS[question](group.records, configs, measure)
    if section is None:
        raise AnalysisError(
            f"these runs can't answer {question}: they don't vary what it compares",
            f"{len(group.records)} runs",
            "use runs with several ranks, or of base and instruct",
        )
    summary = f"{len(group.records)} runs, {len(configs)} configurations, {measure.label} on {group.protocol.split}"
    return ReportContent(
        question, None, (summary,), None, (section,), sections.runs_section_table(group.records), summary
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ask one question of finished runs.")
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("runs", type=Path, help="a folder of run folders, e.g. outputs/runs")
    parser.add_argument("--page", type=Path, help="also write the plots to this HTML file")
    options = parser.parse_args(arguments)
    records = [read_record(file) for file in sorted(options.runs.glob("*/record.json"))]
    try:
        report = ask(options.question, records)
    except AnalysisError as error:
        parser.exit(error.exit_code, f"{error}\n")
    print(to_markdown(report))
    if options.page is not None:
        write_text(options.page, to_html(report))


if __name__ == "__main__":
    main()
