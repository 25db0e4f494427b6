"""What a person should know of a task's rows before training: rows left out, rows cut, and what may not be meant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qlora_exp.data.compressed import ending_of
from qlora_exp.data.items import Splits
from qlora_exp.data.problems import RowProblem
from qlora_exp.data.rows import Example
from qlora_exp.data.split_names import SPLIT_NAMES

_SHOWN = 5
_MISSING_WORDS = {"NA", "N/A", "#N/A", "NaN", "nan", "null", "NULL", "None"}


def rows_report(splits: Splits) -> list[str]:
    """One line each: files read as one split, rows left out by reason and row, rows cut by ``max_length``, notes."""
    lines = []
    for split in SPLIT_NAMES:
        files = list(dict.fromkeys(item.item_id.rpartition(":")[0] for item in getattr(splits, split)))
        if len(files) > 1:
            more = f" and {len(files) - 3} more" if len(files) > 3 else ""
            lines.append(f"{split} rows come from {len(files)} files: {', '.join(files[:3])}{more}")
    lines += _by_reason(splits.left_out, "left out")
    lines += _by_reason(splits.truncated, "kept")
    return [*lines, *splits.notes]


def _by_reason(problems: Sequence[RowProblem], fate: str) -> Iterator[str]:
    for reason, count in Counter(problem.reason for problem in problems).most_common():
        alike = [problem for problem in problems if problem.reason == reason]
        yield f"{count} {'row' if count == 1 else 'rows'} {fate}: {reason}"
        for problem in alike[:_SHOWN]:
            column = f", column {problem.column}" if problem.column else ""
            yield f"  {problem.file}, row {problem.row}{column}: {problem.detail}"
        if count > _SHOWN:
            yield f"  … and {count - _SHOWN} more"


def missing_value_notes(splits: Mapping[str, list[Example]]) -> Iterator[str]:
    """Answers of a CSV file that read like a missing value. They are read as text: 'NA' may be Namibia."""
    answers: Counter[str] = Counter()
    for example in (example for split in SPLIT_NAMES for example in splits.get(split, [])):
        if example.completion in _MISSING_WORDS and ending_of(Path(example.file)) in (".csv", ".tsv"):
            answers[example.completion] += 1
    if answers:
        words = ", ".join(f"{word!r} ({count})" for word, count in answers.most_common())
        yield f"answers that are words for a missing value are learned as text: {words}"
