"""Packed rows of tokens: documents are concatenated and cut into rows of equal length, epoch after epoch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from qlora_exp.embedded.build.pretrain import IGNORED, Rows
from qlora_exp.embedded.build.tokenizer import END_OF_TEXT
from qlora_exp.embedded.build.training_texts import Entry, Message

Stream = tuple[list[int], list[int]]
"""Token ids and targets of one epoch."""


def entry_batches(entries: list[Entry], tokenizer: Tokenizer, seed: int, rows: int, row_tokens: int) -> Iterator[Rows]:
    """Yield batches of packed entries without end. Each epoch shuffles and renders the entries again."""

    def epoch(number: int) -> Stream:
        rng = random.Random(f"{seed}/pretraining/{number}")
        texts = [entry.render(rng) + END_OF_TEXT for entry in rng.sample(entries, len(entries))]
        ids = [token for encoding in tokenizer.encode_batch(texts) for token in encoding.ids]
        return ids, ids

    return _batches(epoch, rows, row_tokens)


def chat_batches(
    chats: list[list[Message]], tokenizer: PreTrainedTokenizerBase, seed: int, rows: int, row_tokens: int
) -> Iterator[Rows]:
    """Yield batches of packed chats without end. Targets are the assistant's text and its end of turn."""
    encoded = tokenizer.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, padding=False
    )
    pairs = [
        (ids, [token if is_target else IGNORED for token, is_target in zip(ids, mask, strict=True)])
        for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    ]

    def epoch(number: int) -> Stream:
        order = random.Random(f"{seed}/instruct/{number}").sample(pairs, len(pairs))
        return [t for ids, _ in order for t in ids], [t for _, targets in order for t in targets]

    return _batches(epoch, rows, row_tokens)


def _batches(epoch: Callable[[int], Stream], rows: int, row_tokens: int) -> Iterator[Rows]:
    size = rows * row_tokens
    ids: list[int] = []
    targets: list[int] = []
    number = 0
    while True:
        while len(ids) < size:
            more_ids, more_targets = epoch(number)
            ids, targets, number = ids + more_ids, targets + more_targets, number + 1
        flat_ids, flat_targets = np.array(ids, dtype=np.int64), np.array(targets, dtype=np.int64)
        count = len(flat_ids) // size
        for i in range(count):
            part = slice(i * size, (i + 1) * size)
            yield flat_ids[part].reshape(rows, row_tokens), flat_targets[part].reshape(rows, row_tokens)
        ids, targets = ids[count * size :], targets[count * size :]
