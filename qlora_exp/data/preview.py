"""Items as a person can check them: token by token, the trained ones marked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from qlora_exp.data.formatting import Tokenizer
from qlora_exp.data.items import Item, Splits
from qlora_exp.data.sources import SPLIT_NAMES
from qlora_exp.errors import DataError, nearest


class PreviewToken(NamedTuple):
    text: str
    id: int
    trained: bool


@dataclass(frozen=True)
class PreviewItem:
    """One item's tokens in order, and how many of them are the prompt's, the completion's and the end's."""

    item_id: str
    tokens: tuple[PreviewToken, ...]
    prompt_tokens: int
    completion_tokens: int
    end_tokens: int
    label: str | None


def preview(splits: Splits, tokenizer: Tokenizer, split: str, count: int) -> list[PreviewItem]:
    """The first ``count`` items of a split. Raises :class:`DataError` for an unknown split or a count below 1."""
    if split not in SPLIT_NAMES:
        raise DataError(f"there is no split {split!r}", "data preview", nearest(split, SPLIT_NAMES))
    if count < 1:
        raise DataError(f"{count} items can't be shown", "data preview", "a number of at least 1")
    items: tuple[Item, ...] = getattr(splits, split)
    return [_preview(item, tokenizer) for item in items[:count]]


def _preview(item: Item, tokenizer: Tokenizer) -> PreviewItem:
    tokens = tuple(
        PreviewToken(_shown(token, tokenizer), token, bool(trained))
        for token, trained in zip(item.ids, item.completion_mask, strict=True)
    )
    lengths = (len(item.prompt_ids), len(item.completion_ids), len(item.end_ids))
    return PreviewItem(item.item_id, tokens, *lengths, item.label)


def _shown(token: int, tokenizer: Tokenizer) -> str:
    """The token's text; its name in the vocabulary where it is only a part of a character."""
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    return text if text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token))
