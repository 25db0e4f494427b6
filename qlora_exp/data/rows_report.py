"""What to know about a task's rows before training: rows left out, rows cut, and likely mistakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qlora_exp.data.compression import ending_of
from qlora_exp.data.encoding import unstripped_prompt
from qlora_exp.data.items import Splits
from qlora_exp.data.row_problems import RowProblem
from qlora_exp.data.rows import Example
from qlora_exp.data.split_names import SPLIT_NAMES
from qlora_exp.data.texts import separator_between

_MAX_SHOWN = 5
_OPENING, _CLOSING = tuple("([{“‘«„$/\\_"), tuple(",.;:!?)]}%”’»")
"""Characters that people usually write no space after (``_OPENING``) or before (``_CLOSING``)."""
_MISSING_WORDS = {"NA", "N/A", "#N/A", "NaN", "nan", "null", "NULL", "None"}


def rows_report(splits: Splits) -> list[str]:
    """Return lines of text: files read as one split, rows left out by reason, rows cut by ``max_length``, notes."""
    lines = []
    for split in SPLIT_NAMES:
        files = list(dict.fromkeys(item.item_id.rpartition(":")[0] for item in getattr(splits, split)))
        if len(files) > 1:
            more = f" and {len(files) - 3} more" if len(files) > 3 else ""
            lines.append(f"{split} rows come from {len(files)} files: {', '.join(files[:3])}{more}")
    lines += _by_reason(splits.left_out, "left out")
    lines += _by_reason(splits.truncated, "kept")
    return [*lines, *splits.notes]


def _by_reason(problems: Sequence[RowProblem], outcome: str) -> Iterator[str]:
    for reason, count in Counter(problem.reason for problem in problems).most_common():
        matching = [problem for problem in problems if problem.reason == reason]
        yield f"{count} {'row' if count == 1 else 'rows'} {outcome}: {reason}"
        for problem in matching[:_MAX_SHOWN]:
            column = f", column {problem.column}" if problem.column else ""
            yield f"  {problem.file}, row {problem.row}{column}: {problem.detail}"
        if count > _MAX_SHOWN:
            yield f"  … and {count - _MAX_SHOWN} more"


def missing_value_notes(splits: Mapping[str, list[Example]]) -> Iterator[str]:
    """Yield a note on a CSV file's answers that look like missing values. They are text: 'NA' may be Namibia."""
    answers: Counter[str] = Counter()
    for example in (example for split in SPLIT_NAMES for example in splits.get(split, [])):
        if example.completion in _MISSING_WORDS and ending_of(Path(example.file)) in (".csv", ".tsv"):
            answers[example.completion] += 1
    if answers:
        words = ", ".join(f"{word!r} ({count})" for word, count in answers.most_common())
        yield f"answers that are words for a missing value are learned as text: {words}"


def unusual_space_notes(examples: Sequence[Example]) -> Iterator[str]:
    """Yield a note on rows where the plain format puts a space that nobody would write, e.g. ``(`` + space + ``a)``."""
    suspicious = [example for example in examples if not example.conversation and _needs_no_space(example)]
    if suspicious:
        first = suspicious[0]
        begin, end = unstripped_prompt(first)[-20:], first.completion[:20]
        count = "1 row has" if len(suspicious) == 1 else f"{len(suspicious)} rows have"
        yield (
            f"{count} a space between prompt and completion that may be a mistake, e.g. {first.file}, row {first.row}: "
            f"{begin!r} + {end!r}; 'task.separator=\"\"' joins all rows without one"
        )


def _needs_no_space(example: Example) -> bool:
    """Return whether prompt and completion seem to belong together without a space."""
    prompt, completion = unstripped_prompt(example), example.plain.space_before + example.completion
    if separator_between(prompt, completion) != " ":
        return False
    opens = prompt.endswith(_OPENING) or (prompt.endswith('"') and prompt.count('"') % 2 == 1)
    return opens or completion.startswith(_CLOSING)
