"""A table's rows as results; rows that can't enter a decision (crashed, without a score, pilots) are counted by why."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from qlora_exp.analysis.table_columns import Columns, Options
from qlora_exp.analysis.table_files import TableRow
from qlora_exp.analysis.table_values import (
    TRUTH_VALUES,
    WITHOUT_ADAPTER,
    TableNumber,
    is_missing,
    read_bytes,
    read_number,
    read_rank,
    read_seconds,
)
from qlora_exp.errors import AnalysisError, Problems, raise_all

MAX_ERRORS_NAMED = 10
UNFINISHED = frozenset(
    (
        *("crashed", "failed", "fail", "killed", "running", "pending", "preempting", "preempted", "scheduled", "error"),
        *("oom", "out_of_memory", "diverged", "interrupted", "pruned", "cancelled", "canceled", "aborted", "waiting"),
        *("timeout", "timed_out", "node_fail"),
    )
)
"""Statuses of W&B, MLflow, Optuna, PEFT and this package. A score of such a run is that of a training not finished."""
VALIDATION = ("val", "dev", "eval")
PILOTS = "of pilot runs, which only chose settings,"
NO_SCORE, NO_RANK, NOT_FINISHED = "without a score", "without a rank", "of runs that didn't finish"


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
    group: str | None = None
    decimals: int = 0
    """Digits after the score's decimal mark."""


@dataclass(frozen=True)
class LeftOut:
    """A row that can't enter a decision."""

    reason: str
    rank: str
    """As the table writes it."""
    where: str


@dataclass
class ConfigurationRows:
    """The results of one configuration, and the rows that were left out."""

    results: list[Result] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """How its scores were read."""


def results_of(rows: Sequence[TableRow], columns: Columns, options: Options) -> dict[str | None, ConfigurationRows]:
    """Return the results by configuration, in the table's order.

    Raises:
        AnalysisError, Problems: a number can't be read; scores of one column are written in several ways.
    """
    found: dict[str | None, ConfigurationRows] = defaultdict(ConfigurationRows)
    errors: list[AnalysisError] = []
    styles: dict[str, tuple[TableNumber, TableRow]] = {}
    reading = _Reading(columns, options, _has_pilots(rows, columns))
    for row in rows:
        name = None
        if columns.configuration:
            name = ", ".join(row.cells.get(column, "") for column in columns.configuration)
        reason = reading.why_not(row)
        if reason is not None:
            found[name].left_out.append(LeftOut(reason, row.cells.get(columns.named["rank"], ""), row.where))
            continue
        try:
            score, result = reading.result(row)
            _check_style(score, row, columns, styles)
            found[name].results.append(result)
        except AnalysisError as error:
            errors.append(error)
            continue
        if score.se is not None and "se" not in columns.named and "std" not in columns.named and options.se is None:
            _add(found[name].notes, "What follows ± is read as a standard error, the cautious reading.")
        if score.percent:
            _add(found[name].notes, "The scores are percentages: gains and the margin are in percentage points.")
    if len(errors) > MAX_ERRORS_NAMED:
        more = AnalysisError(f"{len(errors) - MAX_ERRORS_NAMED} more rows are wrong", "the table")
        raise Problems([*errors[:MAX_ERRORS_NAMED], more])
    raise_all(errors)
    return found


def left_out_notes(left_out: Sequence[LeftOut]) -> list[str]:
    """Return a sentence for each reason for which rows were left out, with their ranks and the first one's position."""
    notes = []
    for reason in dict.fromkeys(row.reason for row in left_out):
        rows = [row for row in left_out if row.reason == reason]
        ranks = Counter(_plain(row.rank) for row in rows if not is_missing(row.rank))
        by_rank = [f"r = {rank}: {count}" for rank, count in ranks.items() if reason != NO_RANK]
        which = f"{', '.join(by_rank)}; " if by_rank else ""
        counted = f"{len(rows)} {'row' if len(rows) == 1 else 'rows'} {reason} {'is' if len(rows) == 1 else 'are'}"
        notes.append(f"{counted} left out ({which}the first: {rows[0].where}).")
        if reason in (NO_SCORE, NOT_FINISHED):
            notes[-1] += " If such a run diverged, that speaks against its rank; the answer doesn't count it."
    return notes


def best_of(results: Sequence[Result], columns: Columns, notes: list[str]) -> list[Result]:
    """Return, at each rank, the results with the best value of the ``best_over`` columns, and add to ``notes`` which.

    A value is judged by its mean over seeds and items, among the values with the most of them.
    """
    sign = 1.0 if columns.higher_is_better else -1.0
    kept, chosen, most = [], [], 0
    for rank in sorted({result.rank for result in results}):
        by_value: dict[tuple[str, ...], list[Result]] = defaultdict(list)
        for result in results:
            if result.rank == rank:
                texts = [result.others.get(name, "") for name in columns.best_over]
                numbers = [read_number(text) for text in texts]  # 1e-4 is 0.0001
                same = (text if n is None else f"{n.value:.12g}" for text, n in zip(texts, numbers, strict=True))
                by_value[tuple(same)].append(result)
        full = max(len(group) for group in by_value.values())
        means = {
            value: sign * sum(one.score for one in group) / full
            for value, group in by_value.items()
            if len(group) == full
        }
        best = max(means, key=lambda value: means[value])
        kept += by_value[best]
        most, fewer = max(most, len(by_value)), len(by_value) - len(means)
        ignored = f"; {fewer} with fewer runs ignored" if fewer else ""
        chosen.append(f"r = {rank}: {', '.join(best)} (of {len(means)}{ignored})")
    names = " and ".join(columns.best_over)
    if most > 1:
        notes.append(
            f"The best {names} of each rank was chosen by these same scores: {'; '.join(chosen)}. Such scores are"
            " optimistic, most where many values were tried; the interval doesn't contain this choice."
        )
    return kept


def averaged_in_groups(results: Sequence[Result], column: str, where: str, notes: list[str]) -> list[Result]:
    """Return one result for each run and group: the mean over the group's items, which then counts as an item.

    Items that share a context aren't independent. Differences are averaged within groups first, and the number of
    groups takes the place of the number of items (Miller 2024, arXiv 2411.00640, on clustered standard errors).

    Raises:
        AnalysisError: an item without a group or in two, only one group, or a run that lacks an item.
    """
    group_of: dict[str, Result] = {}
    for result in results:
        if not result.group:
            raise AnalysisError(f"column {column} is missing", result.where, "give every item a group")
        first = group_of.setdefault(result.item or "", result)
        if first.group != result.group:
            raise AnalysisError(
                f"item {result.item} is in the groups {first.group} and {result.group}",
                f"{first.where}; {result.where}",
                "give each item one group",
            )
    groups = {result.group for result in results}
    if len(groups) < 2:
        raise AnalysisError(
            f"all items are in the group {next(iter(groups), '')!r}: one group shows no noise",
            f"{where}, column {column}",
            "use a column with at least two groups, or leave out --group-column",
        )
    members: dict[tuple[int, str | None, str | None], list[Result]] = defaultdict(list)
    for result in results:
        members[result.rank, result.seed, result.group].append(result)
    sizes = Counter(result.group for result in group_of.values())
    for (rank, seed, group), of_run in members.items():
        # A mean over other items would not pair. A group that a run lacks altogether is found later.
        if len(of_run) < sizes[group]:
            run = f"r = {rank}" if seed is None else f"r = {rank}, seed {seed}"
            lacks = f"{run} lacks some of the {sizes[group]} items of {group}"
            raise AnalysisError(lacks, where, "score every run on the same items")
    equal = len(set(sizes.values())) == 1
    notes.append(
        f"{len(group_of)} items in {len(groups)} groups: scores are averaged within a group first, and a group counts"
        f" as one observation{'' if equal else '; groups have unequal sizes, and each counts the same'}."
    )
    return [
        replace(group[0], item=group[0].group, score=sum(one.score for one in group) / len(group))
        for group in members.values()
    ]


@dataclass(frozen=True)
class _Reading:
    columns: Columns
    options: Options
    pilots: bool
    """Rows of the validation split are pilots of those of the test split."""

    def why_not(self, row: TableRow) -> str | None:
        """Return why the row can't enter a decision."""
        columns = self.columns
        cell = {meaning: row.cells.get(name, "") for meaning, name in columns.named.items()}
        if cell.get("status", "").lower().replace(" ", "_") in UNFINISHED:
            return NOT_FINISHED
        if cell.get("pilot", "").lower() in ("true", "1", "1.0", "yes"):
            return PILOTS
        if self.pilots and cell.get("split", "").lower().startswith(VALIDATION):
            return PILOTS
        if is_missing(row.cells.get(columns.score, "")):
            return NO_SCORE
        if is_missing(cell["rank"]) or WITHOUT_ADAPTER.fullmatch(cell["rank"]):
            return NO_RANK
        return None

    def result(self, row: TableRow) -> tuple[TableNumber, Result]:
        named, options = self.columns.named, self.options

        def text(meaning: str) -> str:
            return row.cells.get(named.get(meaning, ""), "")

        def number(meaning: str) -> float | None:
            return None if is_missing(text(meaning)) else _number(row, named[meaning]).value

        rank = read_rank(text("rank"))
        if rank is None:
            raise AnalysisError(
                f"column {named['rank']} is {text('rank')!r}, not a number",
                row.where,
                "fix the row, or leave out the runs without a rank",
            )
        if rank < 1 or rank != int(rank):
            hint = "use a whole number, at least 1"
            raise AnalysisError(f"invalid rank {rank:g}", f"{row.where}, column {named['rank']}", hint)
        score = _number(row, self.columns.score)
        se, std, count = number("se"), number("std"), number("count")
        if options.se is not None:
            se = options.se
        elif se is None and std is not None and count == 1:
            raise AnalysisError("one run has no standard deviation", row.where, "leave the deviation out")
        elif se is None and std is not None:
            se = std / math.sqrt(count) if count is not None and count >= 1 else std
        elif se is None:
            se = score.se
        if se is not None and not se > 0:
            raise AnalysisError(f"invalid standard error {se:g}", row.where, "use a number above 0, or leave it out")
        known = {self.columns.score, *named.values(), *self.columns.configuration} - {named.get("split")}
        return score, Result(
            where=row.where,
            rank=int(rank),
            score=score.value,
            seed=_plain(text("seed")) if "seed" in named else None,
            item=text("item") if "item" in named else None,
            se=se,
            df=count - 1 if options.se is None and count is not None and count > 1 else math.inf,
            memory=read_bytes(text("memory")),
            seconds=read_seconds(text("seconds")),
            others={name: value for name, value in row.cells.items() if name not in known},
            group=text("group") if "group" in named else None,
            decimals=score.decimals,
        )


def _has_pilots(rows: Sequence[TableRow], columns: Columns) -> bool:
    """Return whether rows of the validation split stand next to test scores of at least two ranks."""
    split = columns.named.get("split")
    if split is None or split in columns.configuration:
        return False
    ranks = {
        row.cells.get(columns.named["rank"], "")
        for row in rows
        if row.cells.get(split, "").lower() == "test" and not is_missing(row.cells.get(columns.score, ""))
    }
    return len(ranks) >= 2


def _number(row: TableRow, column: str) -> TableNumber:
    text = row.cells.get(column, "")
    number = read_number(text, row.decimal_comma)
    if number is not None:
        return number
    hint = "fix the row, or leave out the runs without a result"
    if "(" in text:
        hint = "if the brackets have a standard error, write it after ±"
    elif "," in text:
        hint = "the comma can be a decimal mark or separate thousands: write a decimal point, or separate columns by ;"
    raise AnalysisError(f"column {column} is {text!r}, not a number", row.where, hint)


def _check_style(
    score: TableNumber, row: TableRow, columns: Columns, styles: dict[str, tuple[TableNumber, TableRow]]
) -> None:
    """Refuse scores of which some have a % or a decimal comma and others don't."""
    if row.cells.get(columns.score, "").lower() in TRUTH_VALUES:
        return
    first, at = styles.setdefault("percent", (score, row))
    if first.percent != score.percent:
        raise AnalysisError(
            f"column {columns.score} is written with % ({(at if first.percent else row).where}) and without",
            f"{row.where}, column {columns.score}",
            "write all scores in the same way",
        )
    if not score.mark:
        return
    first, at = styles.setdefault("mark", (score, row))
    if first.mark != score.mark:
        raise AnalysisError(
            f"column {columns.score} has a decimal comma ({(at if first.mark == ',' else row).where}) and a point",
            f"{row.where}, column {columns.score}",
            "write all scores in the same way",
        )


def _plain(text: str) -> str:
    """Return a whole number's text without ``.0``: pandas writes 1.0 for a seed or a rank if another row has none."""
    return text[:-2] if text.endswith(".0") and text[:-2].isdigit() else text


def _add(notes: list[str], note: str) -> None:
    if note not in notes:
        notes.append(note)
