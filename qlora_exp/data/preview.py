"""What a person checks before training: items token by token, rows that are left out or cut, and likely mistakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qlora_exp.data.encoding import Tokenizer
from qlora_exp.data.items import SPLIT_NAMES, Item, RowProblem, Splits
from qlora_exp.errors import DataError, nearest

_MAX_SHOWN_ROWS = 5
_MAX_TOKENS_PER_CHARACTER = 4
"""A character has at most four bytes in UTF-8."""


class PreviewToken(NamedTuple):
    text: str
    id: int
    trained: bool


def preview_items(
    splits: Splits, tokenizer: Tokenizer, split: str, count: int
) -> list[tuple[Item, tuple[PreviewToken, ...]]]:
    """Return the first ``count`` items of a split with their tokens.

    Raises :class:`DataError` for an unknown split or ``count < 1``.
    """
    if split not in SPLIT_NAMES:
        raise DataError(f"there is no split {split!r}", "data preview", nearest(split, SPLIT_NAMES))
    if count < 1:
        raise DataError(f"{count} items can't be shown", "data preview", "a number of at least 1")
    shown = []
    for item in getattr(splits, split)[:count]:
        trained = [bool(has_loss) for has_loss in item.completion_mask]
        texts = _token_texts(item.ids, trained, tokenizer)
        tokens = tuple(PreviewToken(*fields) for fields in zip(texts, item.ids, trained, strict=True))
        shown.append((item, tokens))
    return shown


def _token_texts(ids: Sequence[int], trained: Sequence[bool], tokenizer: Tokenizer) -> list[str]:
    """Return each token's text. If several tokens make up one character, the first has its text, the others have none.

    A token without a text, or with a part of an incomplete character, is shown by its name in the vocabulary."""
    texts: list[str] = []
    while (start := len(texts)) < len(ids):
        text, stop = "", start
        while stop < len(ids) and stop - start < _MAX_TOKENS_PER_CHARACTER and trained[stop] == trained[start]:
            stop += 1
            text = str(tokenizer.decode(list(ids[start:stop]), clean_up_tokenization_spaces=False))
            if "\ufffd" not in text:
                break
        if text and "\ufffd" not in text:
            texts += [text, *[""] * (stop - start - 1)]
        else:
            texts.append(str(tokenizer.convert_ids_to_tokens(ids[start])))
    return texts


def rows_report(splits: Splits) -> list[str]:
    """Return lines of text: files read as one split, rows left out by reason, rows cut by ``max_length``, notes."""
    lines = []
    for split in SPLIT_NAMES:
        files = list(dict.fromkeys(item.item_id.rpartition(":")[0] for item in getattr(splits, split)))
        if len(files) > 1:
            more = f" and {len(files) - 3} more" if len(files) > 3 else ""
            lines.append(f"{split} rows come from {len(files)} files: {', '.join(files[:3])}{more}")
    return [*lines, *_by_reason(splits.left_out, "left out"), *_by_reason(splits.truncated, "kept"), *splits.notes]


def _by_reason(problems: Sequence[RowProblem], outcome: str) -> Iterator[str]:
    for reason, count in Counter(problem.reason for problem in problems).most_common():
        matching = [problem for problem in problems if problem.reason == reason]
        yield f"{count} {'row' if count == 1 else 'rows'} {outcome}: {reason}"
        for problem in matching[:_MAX_SHOWN_ROWS]:
            column = f", column {problem.column}" if problem.column else ""
            yield f"  {problem.file}, row {problem.row}{column}: {problem.detail}"
        if count > _MAX_SHOWN_ROWS:
            yield f"  … and {count - _MAX_SHOWN_ROWS} more"
