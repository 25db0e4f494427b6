"""Rows that share a document or context: the group column, and a warning where it isn't set."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import pairwise

from qlora_exp.data.rows import Example
from qlora_exp.errors import DataError

KEY = "task.columns.group"
SOURCE_COLUMNS = frozenset(
    (
        *("article", "context", "conversation", "dialogue", "doc", "document", "page", "paragraph", "passage"),
        *("source", "story", "thread", "title", "url"),
    )
)
"""Names of columns that tell which text a row comes from, without an ``id`` at the end."""
MIN_SHARED_CHARACTERS = 100
"""A beginning or end that two prompts share, beyond what all rows share (an instruction, a template), is a context.

It must have this length at least, and half the length of the shorter prompt's rest."""
MIN_SHARE = 0.05
"""Share of the rows that must have a context in common with another row: below it, the interval hardly changes."""
MIN_SOURCES = 5
"""A source column with fewer values names data sets or topics, not documents."""


def check_groups(scored: Sequence[Example], split: str) -> None:
    """Raise :class:`DataError` if the rows of the scored split are all of one group."""
    groups = {example.group for example in scored}
    if len(scored) > 1 and len(groups) == 1 and None not in groups:
        (group,) = groups
        what = f"all {len(scored)} {split} rows are of one group, {group!r}: nothing shows how groups vary"
        hint = f"a column with a value for each document; a larger {split} split; or {KEY}=null for independent rows"
        raise DataError(what, f"{KEY} ({scored[0].file})", hint)


def shared_context_warning(scored: Sequence[Example], split: str) -> str | None:
    """Return a warning if rows of the scored split share a context and no group column is set; ``None`` otherwise.

    It is looked for in columns named as a source (``document_id``, ``context`` …), then in the prompts' texts.
    """
    if len(scored) < 2 or any(example.group is not None for example in scored):
        return None
    for column, sharing, example in (*_by_source(scored), *_by_prompt(scored)):
        if sharing < max(2, MIN_SHARE * len(scored)):
            continue
        where = f"in column {column!r}" if column else "in their prompts"
        remedy = f"{KEY}={column}" if column else f"add a column that names each row's document, and set {KEY}=COLUMN"
        return (
            f"{sharing} of {len(scored)} {split} rows share a context {where} with another row, for example"
            f" {_place(example[0])} and {_place(example[1])}. They aren't independent, so intervals over items are too"
            f" narrow: {remedy}"
        )
    return None


_Finding = tuple[str | None, int, tuple[Example, Example]]
"""Column, number of rows that share a context, and two rows that do."""


def _by_source(scored: Sequence[Example]) -> list[_Finding]:
    findings: list[_Finding] = []
    for column in scored[0].extra:
        if re.sub(r"[^a-z]|_?id$", "", column.lower()) not in SOURCE_COLUMNS:
            continue
        by_value: dict[Hashable, list[Example]] = defaultdict(list)
        for example in scored:
            value = example.extra.get(column)
            if isinstance(value, str | int) and str(value).strip():
                by_value[value].append(example)
        shared = [rows for rows in by_value.values() if len(rows) > 1]
        if shared and len(by_value) >= MIN_SOURCES:
            findings.append((column, sum(map(len, shared)), (shared[0][0], shared[0][1])))
    return findings


def _by_prompt(scored: Sequence[Example]) -> list[_Finding]:
    texts = [
        "\n".join(message.content for message in example.messages if message.role != "system") for example in scored
    ]
    backwards = [text[::-1] for text in texts]
    findings = (_by_beginning(scored, texts), _by_beginning(scored, backwards))  # the context comes first, or last
    return [finding for finding in findings if finding is not None]


def _by_beginning(scored: Sequence[Example], texts: Sequence[str]) -> _Finding | None:
    """Return how many rows share a long beginning with another one. Sorted, they are next to each other."""
    ordered = sorted(zip(texts, range(len(scored)), strict=True))
    common = _shared(ordered[0][0], ordered[-1][0])
    sharing: set[int] = set()
    found: tuple[Example, Example] | None = None
    for (first, index), (second, next_index) in pairwise(ordered):
        shared = _shared(first, second) - common
        shorter = min(len(first), len(second)) - common
        if shared >= MIN_SHARED_CHARACTERS and 2 * shared >= shorter:
            sharing |= {index, next_index}
            pair = sorted((index, next_index))
            found = found or (scored[pair[0]], scored[pair[1]])
    return (None, len(sharing), found) if found is not None else None


def _shared(first: str, second: str) -> int:
    """Return how many characters the two texts begin with in common."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # by halves: slices are compared fast, and the prompts of a data set may be long
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low


def _place(example: Example) -> str:
    return f"{example.file}, row {example.row}"
