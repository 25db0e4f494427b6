"""The report's section on what the tuned model says: some items, answered by the best configuration and the next."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qlora_exp.analysis.answer_samples import Answers
from qlora_exp.analysis.configurations import Configuration, Measure, known_mean
from qlora_exp.analysis.report_content import QUOTE, Column, Section, Table
from qlora_exp.analysis.shown_items import (
    ItemRow,
    answer_words,
    chosen_items,
    marked,
    one_line,
    shown_prompts,
    shows_generated,
    without_end,
)
from qlora_exp.records.types import RunRecord

REPORTED_ANSWERS = 12
SHOWN_IN_MARKDOWN = 4
REPORTED_CHARACTERS = 400
"""Of each text."""


def by_validation(configurations: Sequence[Configuration], measure: Measure) -> list[Configuration]:
    """Return the configurations, the best on validation first."""

    def score(c: Configuration) -> float:
        value = known_mean(measure.of(run.scores.after) for run in c.runs)
        return math.inf if value is None else -measure.sign * value

    return sorted(configurations, key=score)


def answers_section(ordered: Sequence[Configuration], answers: Answers) -> Section | None:
    """Return the same items, answered by the first and the second configuration.

    ``None`` if no run of the first has answers: it is of an earlier version, or ``evaluation.keep_texts=false``.
    """
    chosen, others = ordered[0], ordered[1:]
    first = _answered(chosen, answers)
    if first is None:
        return None
    items = [row["id"] for row in chosen_items(first[1], REPORTED_ANSWERS)]
    second = next((found for c in others[:1] if (found := _answered(c, answers)) is not None), None)
    tables = [_table("Best", chosen, first, items)]
    tables += [_table("Next", others[0], second, items)] if second is not None else []
    of_all = f"{len(items)} of {len(first[1]):,} {first[1][0]['split']} items, drawn at random"
    text = f"{of_all}. {answer_words(first[1])} So few items show how a model answers, not how often it is right."
    return Section("what-it-says", "What the tuned model says", (text,), tuple(tables))


def _answered(configuration: Configuration, answers: Answers) -> tuple[RunRecord, Sequence[ItemRow]] | None:
    """Return the configuration's first run that has answers, and its items."""
    for run in configuration.runs:
        rows = answers(run)
        if any(row["answer"] is not None for row in rows):
            return run, rows
    return None


def _table(
    which: str, configuration: Configuration, found: tuple[RunRecord, Sequence[ItemRow]], items: list[str]
) -> Table:
    run, rows = found
    by_id, prompts = {row["id"]: row for row in rows}, shown_prompts(rows)
    shown = [by_id[name] for name in items if name in by_id]
    names = ("prompt", "right answer", "base", "tuned", *(("tuned writes",) if shows_generated(rows) else ()))
    cells = [
        (
            prompts[row["id"]] or row["id"],
            row["expected"],
            marked(row["base_answer"], row["base_correct"]),
            marked(row["answer"], row["correct"]),
            row["generated"],
        )[: len(names)]
        for row in shown
    ]
    texts = tuple(
        tuple(None if c is None else one_line(without_end(c, REPORTED_CHARACTERS)) for c in row) for row in cells
    )
    seed = "" if run.seed is None else f", seed {run.seed}"
    caption = f"{which}: {configuration.label}{seed} ({run.run_id})"
    return Table(tuple(Column(name, QUOTE) for name in names), texts, caption, SHOWN_IN_MARKDOWN)
