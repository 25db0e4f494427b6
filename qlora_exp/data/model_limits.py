"""Checks of items against a model's limits: the length of its context and the size of its vocabulary."""

from __future__ import annotations

from typing import Any

from qlora_exp.data.items import Item, Splits
from qlora_exp.errors import DataError


def check_positions(splits: Splits, positions: int | None) -> None:
    """Raise :class:`DataError` if an item, or its prompt with the longest label, has more tokens than ``positions``.

    The error names the longest item's row. ``None``: the model's limit is not known. Generation needs no check: it ends
    at the limit."""
    if positions is None:
        return
    longest_label = max((len(ids) for ids in splits.option_ids.values()), default=0)

    def needed(item: Item) -> int:
        return max(len(item.ids), len(item.prompt_ids) + longest_label)

    item = max((*splits.train, *splits.validation, *splits.test), key=needed)
    if needed(item) <= positions:
        return
    file, _, row = item.item_id.rpartition(":")
    answer = needed(item) - len(item.prompt_ids)
    what = f"the prompt has {len(item.prompt_ids)} tokens and the answer up to {answer}; the model takes {positions}"
    hint = "a shorter row, or a model with a longer context"
    if not splits.labels and len(item.prompt_ids) < positions:
        hint = f"training.max_length={positions} cuts such answers; or {hint}"
    raise DataError(what, f"{file}, row {row}", hint)


def check_vocabulary(splits: Splits, tokenizer: Any, vocabulary_size: int) -> None:
    """Raise :class:`DataError` if an item, a label or the padding has a token without an embedding in the model.

    The tokenizer may have such tokens as long as none occurs."""
    if len(tokenizer) <= vocabulary_size:
        return
    hint = "use the folder that the tokenizer came with, whose model has a row for each of its tokens"
    outside = f"; the model's vocabulary ends at {vocabulary_size - 1}"
    if (tokenizer.pad_token_id or 0) >= vocabulary_size:
        raise DataError(f"padding is token {tokenizer.pad_token_id}{outside}", "the model's tokenizer", hint)
    for label, ids in splits.label_ids.items():
        if max(ids, default=0) >= vocabulary_size:
            raise DataError(f"the label {label!r} has token {max(ids)}{outside}", "the task's labels", hint)
    item = max((*splits.train, *splits.validation, *splits.test), key=lambda item: max(item.ids, default=0))
    if max(item.ids, default=0) < vocabulary_size:
        return
    file, _, row = item.item_id.rpartition(":")
    raise DataError(f"the row has token {max(item.ids)}{outside}", f"{file}, row {row}", hint)
