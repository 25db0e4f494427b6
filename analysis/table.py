"""Answer the rank question for any tool's tables with a rank and a score: CSV, TSV, JSON, Parquet, Markdown.

A table without replicates is accepted; the answer says what can't be concluded from it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qlora_exp.analysis.rank import RankAnswer, as_object
from qlora_exp.analysis.rank_rule import make_rule
from qlora_exp.analysis.table_columns import Columns, Options, find_columns, name_words
from qlora_exp.analysis.table_decisions import decide_results
from qlora_exp.analysis.table_files import RANK_FROM_PATH, SEED_FROM_PATH, read_table_rows
from qlora_exp.analysis.table_layouts import to_long
from qlora_exp.analysis.table_margin import TableMargin, table_margin
from qlora_exp.analysis.table_results import (
    NO_RANK,
    ConfigurationRows,
    LeftOut,
    Result,
    averaged_in_groups,
    best_of,
    left_out_notes,
    results_of,
)
from qlora_exp.analysis.table_values import is_missing, read_number
from qlora_exp.errors import AnalysisError

SETTING_WORDS = frozenset(
    ("config", "params", "hparams", "training", "lora", "optimizer", "learning", "lr", "alpha", "use")
)
"""Words of columns that a user sets: the first to be named where two runs differ."""
IDENTIFYING = frozenset(
    (
        *("id", "uuid", "name", "time", "date", "datetime", "created", "updated", "duration", "runtime", "user", "url"),
        *("run", "trial", "timestamp", "number", "sha", "host", "seconds", "memory", "metrics", "summary", "train"),
    )
)
"""Words of columns that differ between any two runs, so that they say little about why two differ."""


@dataclass(frozen=True)
class TableAnswer:
    """One configuration's answer, and the assumptions made in reading the table."""

    configuration: str | None
    answer: RankAnswer
    margin: TableMargin
    notes: tuple[str, ...]


def analyze_table(files: Sequence[Path], options: Options) -> list[TableAnswer]:
    """Return one answer per configuration, in the table's order. Several files are one table.

    Raises:
        AnalysisError, Problems: a file, a column, a row or a number can't be used.
    """
    if options.se is not None and not (math.isfinite(options.se) and options.se > 0):
        raise AnalysisError(f"invalid standard error {options.se:g}", "--se", "use a number above 0")
    if twice := [file for file in files if list(files).count(file) > 1]:
        raise AnalysisError("the file is given twice", str(twice[0]), "give each file once")
    table = to_long(read_table_rows(files), options.rank_column)
    where = str(files[0]) if len(files) == 1 else f"{len(files)} files"
    columns = find_columns(table.rows, options, where, table.configuration)
    found = results_of(table.rows, columns, options)
    answers, unanswered, without_rank = [], [], []
    left_out: list[LeftOut] = []
    for name, rows in found.items():
        of = f"{where}, configuration {name}" if name is not None else where
        ranks = {result.rank for result in rows.results}
        if len(ranks) < 2:
            error = _too_few_ranks(of, rows, columns)
            unanswered.append(error)
            if not ranks and all(row.reason == NO_RANK for row in rows.left_out):
                # A baseline, or a study's parent run in MLflow's export: it asks for no answer.
                without_rank.append(error)
                left_out += rows.left_out
            continue
        answers.append(_answer(name, rows, columns, options, of, table.notes))
    if not answers:
        raise unanswered[0]
    if unanswered:
        # The hint has the rows that were left out: they may be why a rank is missing.
        missing = [error for error in unanswered if error not in without_rank]
        texts = [f"No answer for {error.where}: {error.what}; {error.hint}" for error in missing]
        first = answers[0]
        answers[0] = replace(first, notes=(*first.notes, *left_out_notes(left_out), *texts))
    return answers


def table_as_json(answers: Sequence[TableAnswer]) -> dict[str, Any]:
    """Return the object that ``--json`` prints: one answer, or ``configurations`` with one answer each."""
    objects = [
        {
            "configuration": one.configuration,
            **as_object(one.answer),
            "margin_text": one.margin.text,
            "margin_units": one.margin.units.as_object(),
            "settle_command": None,
            "notes": list(one.notes),
        }
        for one in answers
    ]
    return objects[0] if len(objects) == 1 else {"configurations": objects}


def _too_few_ranks(where: str, rows: ConfigurationRows, columns: Columns) -> AnalysisError:
    ranks = sorted({result.rank for result in rows.results})
    left_out = " ".join(left_out_notes(rows.left_out))
    hint = f"add rows of another rank{f'. {left_out}' if left_out else ''}"
    if not ranks:
        what = f"no row has a rank and a score in {columns.score!r}"
        return AnalysisError(what, where, left_out or hint)
    return AnalysisError(f"r = {ranks[0]} is the only rank, and one rank can't be compared", where, hint)


def _answer(
    name: str | None, rows: ConfigurationRows, columns: Columns, options: Options, where: str, notes: Sequence[str]
) -> TableAnswer:
    said = [*notes, *columns.notes, *rows.notes, *left_out_notes(rows.left_out)]
    results = best_of(rows.results, columns, said) if columns.best_over else rows.results
    ranks = sorted({result.rank for result in results})
    _check_protocol(results, columns, where)
    _check_unique(results, where)
    if "group" in columns.named:
        results = averaged_in_groups(results, columns.named["group"], where, said)
    margin = table_margin(options.margin, results, columns)
    said += margin.notes
    other_steps = [f"{a} → {b}" for a, b in pairwise(ranks) if b != 2 * a]
    if other_steps:
        said.append(
            f"Not every step is a doubling ({', '.join(other_steps)}): such a step is held to the margin times log2 of"
            " its ratio."
        )
    result, decision_notes = decide_results(results, ranks, make_rule(margin.value), columns, where)
    return TableAnswer(name, result, margin, (*said, *decision_notes, *_savings(result, results)))


def _check_protocol(results: Sequence[Result], columns: Columns, where: str) -> None:
    """Refuse runs that differ in what a gain could come from in place of the rank, e.g. the training steps."""
    for column in columns.protocol:
        texts = [text for result in results if not is_missing(text := result.others.get(column, ""))]
        # "100" and "100.0" are the same number of steps.
        values = {(number.value if (number := read_number(text)) else text): text for text in reversed(texts)}
        if len(values) > 1:
            raise AnalysisError(
                f"these runs aren't comparable: {column} is {', '.join([*reversed(values.values())][:4])}",
                where,
                f"--configuration-column {column} answers for each apart",
            )


def _check_unique(results: Sequence[Result], where: str) -> None:
    """Refuse two scores for one rank, seed and item: a repeated row, or configurations that no column distinguishes."""
    first: dict[tuple[int, str | None, str | None], Result] = {}
    for result in results:
        earlier = first.setdefault((result.rank, result.seed, result.item), result)
        if earlier is result:
            continue
        run = f"r = {result.rank}" + "".join(
            f", {what} {value}" for what, value in (("seed", result.seed), ("item", result.item)) if value is not None
        )
        differing = [
            name
            for name, value in result.others.items()
            if earlier.others.get(name) != value and name not in (RANK_FROM_PATH, SEED_FROM_PATH)
        ]
        differing.sort(key=_says_little)
        hint = "leave each result in once"
        if differing:
            columns = ", ".join(differing[:3])
            hint = f"these rows differ in {columns}: if that is a configuration, --configuration-column"
            hint += "; if the best of them counts (e.g. of learning rates), --best-over"
        if result.seed is None:
            hint += "; if these are repetitions, add a column seed"
        pair = " and ".join(
            one.where.removeprefix(f"{where.partition(', configuration ')[0]}, ") for one in (earlier, result)
        )
        raise AnalysisError(f"{run} has two scores ({pair})", where, hint)


def _says_little(column: str) -> int:
    """Return 0 for a setting, 2 for what differs between any two runs."""
    words = set(name_words(column))
    return 0 if words & SETTING_WORDS else 2 if words & IDENTIFYING else 1


def _savings(result: RankAnswer, results: Sequence[Result]) -> Iterable[str]:
    """Yield what the recommended rank saves against the largest one in the table."""
    recommended, largest = result.recommended_rank, max(row.rank for row in results)
    if recommended is None or recommended == largest:
        return
    for what, word in (("memory", "memory"), ("seconds", "time")):
        values: dict[int, list[float]] = defaultdict(list)
        for row in results:
            if (value := getattr(row, what)) is not None:
                values[row.rank].append(value)
        if values[recommended] and values[largest] and np.mean(values[largest]) > 0:
            share = float(np.mean(values[recommended]) / np.mean(values[largest]))
            # Less than half a percent either way is no saving.
            if abs(1 - share) >= 0.005:
                difference = f"{abs(1 - share):.0%} {'less' if share <= 1 else 'more'}"
                yield f"r = {recommended} takes {difference} {word} than r = {largest}."
