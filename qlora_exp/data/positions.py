"""Whether a model's context holds what it will be given to train on and to score."""

from __future__ import annotations

from qlora_exp.data.items import Item, Splits
from qlora_exp.errors import DataError


def check_positions(splits: Splits, positions: int | None) -> None:
    """:class:`DataError` with the longest item's place where it, or its prompt with the longest label, has more tokens
    than the model has ``positions`` (``None``: no limit is known). Generation needs no check: it ends at the limit."""
    if positions is None:
        return
    longest_label = max((len(ids) for ids in splits.label_ids.values()), default=0)

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
