"""Problems of single rows: raised as errors that name the first of them, or counted by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_exp.config.schema import InvalidRows
from qlora_exp.errors import DataError, Problems

_MAX_SHOWN = 10
_DROP_HINT = "mend the rows, or leave them out and count them with task.invalid_rows=drop"


@dataclass(frozen=True)
class RowProblem:
    """One row that can't be used. ``reason`` is equal for all rows with this fault; the record counts rows by it."""

    file: str
    row: int
    """1-based, as an editor shows it: a line of a text file, an element of a .json or Parquet file."""
    column: str | None
    reason: str
    detail: str
    hint: str | None = None
    of_template: bool = False
    """The chat template is at fault, so every row would have the problem: it is reported once."""

    def error(self, others: int = 0) -> DataError:
        """Return the problem as an error. ``others``: how many other rows have the same problem."""
        where = f"{self.file}, row {self.row}" + (f", and {others} other rows" if others else "")
        if self.column is not None:
            where += f", column {self.column}"
        return DataError(f"{self.reason}: {self.detail}", where, self.hint or _DROP_HINT)


def raise_or_count(problems: Sequence[RowProblem], policy: InvalidRows) -> dict[str, int]:
    """Return rows by reason under ``drop``. Under ``error``, raise the first ten together, with the count of all."""
    reasons = Counter(problem.reason for problem in problems)
    if not problems or policy is InvalidRows.drop:
        return dict(sorted(reasons.items()))
    reported = _merge_template_faults(problems)
    errors = [problem.error(others) for problem, others in reported[:_MAX_SHOWN]]
    if len(reported) == 1:
        (only,) = errors
        hint = only.hint if only.hint == _DROP_HINT or reported[0][0].of_template else f"{only.hint}; or {_DROP_HINT}"
        raise DataError(only.what, only.where, hint)
    by_reason = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
    files = ", ".join(sorted({problem.file for problem in problems}))
    total = DataError(f"{len(problems)} rows can't be used: {by_reason}", files, _DROP_HINT)
    raise Problems([*errors, total])


def _merge_template_faults(problems: Sequence[RowProblem]) -> list[tuple[RowProblem, int]]:
    """Return the problems to report, each with the number of other rows that have the same one."""
    reported: dict[tuple[object, ...], tuple[RowProblem, int]] = {}
    for number, problem in enumerate(problems):
        key = (problem.reason, problem.detail, problem.hint) if problem.of_template else (number,)
        first, others = reported.get(key, (problem, -1))
        reported[key] = (first, others + 1)
    return list(reported.values())


def add_counts(*counts: dict[str, int]) -> dict[str, int]:
    """Return the sum of several counts by reason."""
    return dict(sorted(sum((Counter(count) for count in counts), Counter()).items()))
