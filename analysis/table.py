"""Answer the rank question for any tool's table with a rank and a score (CSV, TSV, JSON, JSON lines, Parquet).

A table without replicates is accepted; the answer says what can't be concluded from it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qlora_exp.analysis.columns import Columns, find_columns
from qlora_exp.analysis.rank import (
    Comparison,
    Decision,
    RankAnswer,
    answer,
    as_object,
    decide_from_summary,
    decide_ladder,
)
from qlora_exp.analysis.rule import Rule, make_rule
from qlora_exp.analysis.table_files import TableRow, read_table_rows
from qlora_exp.errors import AnalysisError, Problems, raise_all

TRUTH_VALUES = {"true": 1.0, "false": 0.0}
"""Per-item correctness is often written as one of these."""
ASSUMED_MARGIN_SHARE = 0.01
"""Default margin as a share of the smallest rank's mean score; every answer that uses it says so."""


@dataclass(frozen=True)
class Options:
    """How to read a table; ``None``: inferred from the table."""

    rank_column: str | None = None
    score_column: str | None = None
    configuration_column: str | None = None
    higher_is_better: bool | None = None
    margin: float | None = None
    se: float | None = None
    """A published standard error of every score, in the score's units."""

    @property
    def named_columns(self) -> dict[str, str]:
        """Meaning → column, for those that the user named."""
        columns = {"rank": self.rank_column, "score": self.score_column, "configuration": self.configuration_column}
        return {meaning: name for meaning, name in columns.items() if name is not None}


@dataclass(frozen=True)
class Result:
    """One row; ``where`` is its position, for messages."""

    where: str
    rank: int
    score: float
    seed: str | None
    item: str | None
    se: float | None
    df: float
    """Degrees of freedom of ``se`` if it comes from a known number of runs; else infinite: ``se`` counts as exact."""
    memory: float | None
    seconds: float | None
    others: dict[str, str]
    """All other columns, as text."""


@dataclass(frozen=True)
class TableAnswer:
    """One configuration's answer, and the assumptions made in reading the table."""

    configuration: str | None
    answer: RankAnswer
    notes: tuple[str, ...]


def analyze_table(file: Path, options: Options) -> list[TableAnswer]:
    """Return one answer per configuration, in the file's order.

    Raises:
        AnalysisError, Problems: the file, a column, a row or a number can't be used.
    """
    if options.se is not None and not (math.isfinite(options.se) and options.se > 0):
        raise AnalysisError(f"invalid standard error {options.se:g}", "--se", "use a number above 0")
    rows = read_table_rows(file)
    columns = find_columns(rows, options.named_columns, options.higher_is_better, file)
    by_configuration = _results(rows, columns, options, file)
    return [_answer(name, results, columns, options, file) for name, results in by_configuration.items()]


def _results(
    rows: Sequence[TableRow], columns: Columns, options: Options, file: Path
) -> dict[str | None, list[Result]]:
    """Return the results by configuration; the error lists the first ten wrong rows."""
    by_configuration: dict[str | None, list[Result]] = defaultdict(list)
    errors: list[AnalysisError] = []
    for where, row in rows:
        try:
            result = _result(where, row, columns, options, file)
        except AnalysisError as error:
            errors.append(error)
            continue
        values = [_text(row.get(name)) for name in columns.configuration]
        by_configuration[", ".join(values) if columns.configuration else None].append(result)
    if len(errors) > 10:
        raise Problems([*errors[:10], AnalysisError(f"{len(errors) - 10} more rows are wrong", str(file))])
    raise_all(errors)
    return by_configuration


def _result(where: str, row: Mapping[str, Any], columns: Columns, options: Options, file: Path) -> Result:
    def number(meaning: str) -> float | None:
        name = columns.named.get(meaning)
        return None if name is None or _text(row.get(name)) == "" else _number(row.get(name), f"{file}, {where}", name)

    def text(meaning: str) -> str | None:
        return _text(row.get(columns.named[meaning])) if meaning in columns.named else None

    rank_name = columns.named["rank"]
    rank = _number(row.get(rank_name), f"{file}, {where}", rank_name)
    if rank < 1 or rank != int(rank):
        raise AnalysisError(
            f"invalid rank {rank:g}", f"{file}, {where}, column {rank_name}", "use a whole number, at least 1"
        )
    count = number("count")
    known = {columns.score, *columns.named.values(), *columns.configuration}
    return Result(
        where=where,
        rank=int(rank),
        score=_number(row.get(columns.score), f"{file}, {where}", columns.score),
        seed=text("seed"),
        item=text("item"),
        se=_standard_error(number("se"), number("std"), count, options.se, f"{file}, {where}"),
        df=count - 1 if options.se is None and count is not None and count > 1 else math.inf,
        memory=number("memory"),
        seconds=number("seconds"),
        others={name: _text(value) for name, value in row.items() if name not in known},
    )


def _standard_error(
    se: float | None, std: float | None, count: float | None, published: float | None, where: str
) -> float | None:
    """Return ``--se``, else the se column, else std / √runs, else std."""
    standard_error = published if published is not None else se
    if standard_error is None and std is not None:
        standard_error = std / math.sqrt(count) if count is not None and count >= 1 else std
    if standard_error is not None and not standard_error > 0:
        raise AnalysisError(
            f"invalid standard error {standard_error:g}", where, "use a number above 0, or leave it out"
        )
    return standard_error


def _number(value: Any, where: str, column: str) -> float:
    try:
        number = float(TRUTH_VALUES.get(str(value).strip().lower(), value))
    except (TypeError, ValueError):
        problem = "is missing" if _text(value) == "" else f"is {_text(value)!r}, not a number"
        raise AnalysisError(f"column {column} {problem}", where, _fix_hint(_text(value))) from None
    if not math.isfinite(number):
        raise AnalysisError(f"column {column} is {number}", where, "leave out the runs without a result") from None
    return number


def _fix_hint(text: str) -> str:
    fixes = {"%": "remove the %", "±": "put what follows ± into a column se", ",": "use a decimal point, no comma"}
    matching = [fix for mark, fix in fixes.items() if mark in text]
    return ", and ".join(matching) or "fix the row, or leave out the runs without a result"


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _answer(name: str | None, results: Sequence[Result], columns: Columns, options: Options, file: Path) -> TableAnswer:
    where = f"{file}, configuration {name}" if name is not None else str(file)
    ranks = sorted({result.rank for result in results})
    if len(ranks) < 2:
        raise AnalysisError(
            f"r = {ranks[0]} is the only rank, and one rank can't be compared", where, "add rows of another rank"
        )
    _refuse_repeated(results, where)
    _refuse_mixed(results, columns, where)
    margin, margin_notes = _margin(results, ranks[0], options.margin)
    rule = make_rule(margin, len(ranks) - 1)
    result, notes = _decide(results, ranks, rule, columns, where)
    notes = [*columns.notes, *margin_notes, *_step_notes(ranks), *notes, *_savings(result, results)]
    return TableAnswer(name, result, tuple(notes))


def _refuse_repeated(results: Sequence[Result], where: str) -> None:
    """Refuse two scores for one rank, seed and item: a repeated row, or configurations that no column distinguishes."""
    first: dict[tuple[int, str | None, str | None], Result] = {}
    for result in results:
        key = (result.rank, result.seed, result.item)
        earlier = first.setdefault(key, result)
        if earlier is result:
            continue
        run = f"r = {result.rank}" + "".join(
            f", {what} {value}" for what, value in (("seed", result.seed), ("item", result.item)) if value is not None
        )
        differing = [name for name, value in result.others.items() if earlier.others.get(name) != value]
        hint = "leave each result in once"
        if differing:
            hint = (
                f"these rows differ in {', '.join(differing[:3])}: if that is a configuration, --configuration-column"
            )
        if result.seed is None:
            hint += "; if these are repetitions, add a column seed"
        raise AnalysisError(f"{run} has two scores ({earlier.where} and {result.where})", where, hint)


def _refuse_mixed(results: Sequence[Result], columns: Columns, where: str) -> None:
    """Refuse runs that differ in more than rank and seed: a gain could come from the steps, not from the rank."""
    for name in columns.protocol:
        values = list(dict.fromkeys(result.others[name] for result in results if name in result.others))
        if len(values) > 1:
            raise AnalysisError(
                f"these runs aren't comparable: {name} is {', '.join(values[:4])}",
                where,
                f"--configuration-column {name} answers for each apart",
            )


def _margin(results: Sequence[Result], smallest: int, requested: float | None) -> tuple[float, list[str]]:
    if requested is not None:
        return requested, []
    level = abs(float(np.mean([result.score for result in results if result.rank == smallest])))
    # Two digits, so that the note and the decision name the same margin.
    margin = float(f"{ASSUMED_MARGIN_SHARE * level:.2g}")
    if margin <= 0:
        raise AnalysisError(
            f"no margin can be assumed from a score of {level:g}",
            "--margin",
            "say how much a step must gain to be worth its cost",
        )
    note = (
        f"No margin was given: {margin:g} is assumed, {ASSUMED_MARGIN_SHARE:.0%} of the score at r = {smallest}. Decide"
        " beforehand how much a step must gain to be worth its cost, and give it with --margin."
    )
    return margin, [note]


def _step_notes(ranks: Sequence[int]) -> list[str]:
    others = [f"{a} → {b}" for a, b in pairwise(ranks) if b != 2 * a]
    return [f"Not every step is a doubling ({', '.join(others)}): the same margin applies to each."] if others else []


def _decide(
    results: Sequence[Result], ranks: Sequence[int], rule: Rule, columns: Columns, where: str
) -> tuple[RankAnswer, list[str]]:
    sign = -1.0 if columns.higher_is_better else 1.0
    losses = [replace(result, score=sign * result.score) for result in results]
    seeds = sorted({result.seed or "" for result in results})
    items = sorted({result.item for result in results if result.item is not None})
    with_se = [result for result in results if result.se is not None]
    if len(seeds) == 1 and not items and len(with_se) == len(results):
        by_rank = {result.rank: result for result in losses}
        steps = [Comparison(a, b, _decide_published(by_rank[a], by_rank[b], rule)) for a, b in pairwise(ranks)]
        exact = all(math.isinf(result.df) for result in results)
        return answer(steps, rule, f"in {columns.score}"), [_PUBLISHED if exact else _PUBLISHED_RUNS]
    notes = [_SINGLE] if len(seeds) == 1 else []
    if len(seeds) > 1 and not items:
        notes.append("Scores without items: the answer is for these test items, not for others.")
    if with_se:
        notes.append("The standard errors are not used: only some rows have one, or seeds and items are more precise.")
    ladder = _loss_arrays(losses, ranks, seeds, items, where)
    result = decide_ladder(ladder, rule, complete=True, unit=f"in {columns.score}")
    notes += (
        [_SAME_SEEDS]
        if any(step.decision.se is not None and step.decision.se < 1e-12 for step in result.comparisons)
        else []
    )
    return result, notes


_PUBLISHED = (
    "The standard errors count as exact, and two ranks' scores as independent. Paired results (the same seeds and items"
    " at every rank) would be more precise."
)
_PUBLISHED_RUNS = (
    "The standard errors come from the runs of each score (Welch's degrees of freedom), and two ranks' scores count as"
    " independent. Paired results (the same seeds and items at every rank) would be more precise."
)
_SAME_SEEDS = (
    "At some step every seed gave exactly the same gain: the seed changed nothing, or the scores are rounded. The"
    " interval may be too narrow."
)
_SINGLE = (
    "One run per rank: the gains are those of these runs. How much of a gain is due to the seed is unknown, so the"
    " table shows neither that returns continue nor that they have diminished."
)


def _decide_published(smaller: Result, larger: Result, rule: Rule) -> Decision:
    se = math.hypot(smaller.se or 0.0, larger.se or 0.0)
    spread = sum((result.se or 0.0) ** 4 / result.df for result in (smaller, larger))
    return decide_from_summary(smaller.score - larger.score, se, rule, se**4 / spread if spread else math.inf)


def _loss_arrays(
    losses: Sequence[Result], ranks: Sequence[int], seeds: Sequence[str], items: Sequence[str], where: str
) -> dict[int, np.ndarray[Any, np.dtype[np.float64]]]:
    """Return rank → (seeds, items) or (seeds,), NaN for a missing run.

    Raises:
        AnalysisError: neighbouring ranks without a common seed, or runs scored on different items.
    """
    seed_of, item_of = ({name: number for number, name in enumerate(names)} for names in (seeds, items))
    ladder = {rank: np.full((len(seeds), max(len(items), 1)), np.nan) for rank in ranks}
    for result in losses:
        item = 0 if result.item is None else item_of[result.item]
        ladder[result.rank][seed_of[result.seed or ""], item] = result.score
    for rank, values in ladder.items():
        counts = (~np.isnan(values)).sum(axis=1)
        incomplete = [seed for seed, count in zip(seeds, counts, strict=True) if 0 < count < values.shape[1]]
        if incomplete:
            raise AnalysisError(
                f"r = {rank}, seed {incomplete[0]} lacks some of the {len(items)} items",
                where,
                "score every run on the same items",
            )
    for a, b in pairwise(ranks):
        if np.isnan(ladder[a] + ladder[b]).all():
            raise AnalysisError(f"r = {a} and r = {b} share no seed", where, "run both with the same seeds")
    return ladder if items else {rank: values[:, 0] for rank, values in ladder.items()}


def _savings(result: RankAnswer, results: Sequence[Result]) -> Iterable[str]:
    """Yield what the recommended rank saves against the largest one in the table."""
    largest = max(row.rank for row in results)
    if result.recommended_rank in (None, largest):
        return
    for what, word in (("memory", "memory"), ("seconds", "time")):
        known = Counter(row.rank for row in results if getattr(row, what) is not None)
        if not (known[result.recommended_rank or 0] and known[largest]):
            continue
        at_recommended, at_largest = (
            float(np.mean([getattr(r, what) for r in results if r.rank == rank and getattr(r, what) is not None]))
            for rank in (result.recommended_rank, largest)
        )
        if at_largest > 0:
            difference = (
                f"{abs(1 - at_recommended / at_largest):.0%} {'less' if at_recommended <= at_largest else 'more'}"
            )
            yield f"r = {result.recommended_rank} takes {difference} {word} than r = {largest}."


def table_as_json(answers: Sequence[TableAnswer]) -> dict[str, Any]:
    """Return the object that ``--json`` prints: one answer, or ``configurations`` with one answer each."""
    objects = [
        {
            "configuration": table_answer.configuration,
            **as_object(table_answer.answer),
            "notes": list(table_answer.notes),
        }
        for table_answer in answers
    ]
    return objects[0] if len(objects) == 1 else {"configurations": objects}
