"""What is wrong with single rows, and what becomes of it: errors that name the first of them, or a count by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_exp.config import InvalidRows
from qlora_exp.errors import DataError, Problems

_SHOWN = 10
_DROP_HINT = "mend the rows, or leave them out and count them with task.invalid_rows=drop"


@dataclass(frozen=True)
class RowProblem:
    """One row that can't be used. ``reason`` is the same for all rows with this fault: it is counted in the record."""

    file: str
    row: int
    """1-based, as an editor shows it: a line of a text file, an element of a .json or Parquet file."""
    column: str | None
    reason: str
    detail: str
    hint: str | None = None

    def error(self) -> DataError:
        where = f"{self.file}, row {self.row}"
        if self.column is not None:
            where += f", column {self.column}"
        return DataError(f"{self.reason}: {self.detail}", where, self.hint or _DROP_HINT)


def settle(problems: Sequence[RowProblem], policy: InvalidRows) -> dict[str, int]:
    """Rows by reason under ``drop``. Under ``error`` the first ten are raised together, with the count of all."""
    reasons = Counter(problem.reason for problem in problems)
    if not problems or policy is InvalidRows.drop:
        return dict(sorted(reasons.items()))
    errors = [problem.error() for problem in problems[:_SHOWN]]
    if len(problems) == 1:
        (only,) = errors
        hint = only.hint if only.hint == _DROP_HINT else f"{only.hint}; or {_DROP_HINT}"
        raise DataError(only.what, only.where, hint)
    by_reason = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
    files = ", ".join(sorted({problem.file for problem in problems}))
    total = DataError(f"{len(problems)} rows can't be used: {by_reason}", files, _DROP_HINT)
    raise Problems([*errors, total])


def add_counts(*counts: dict[str, int]) -> dict[str, int]:
    """The sum of several counts by reason."""
    return dict(sorted(sum((Counter(count) for count in counts), Counter()).items()))
