"""Packed rows of tokens: documents one after the other, cut into rows of equal length, epoch after epoch."""

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


def entry_batches(entries: list[Entry], tokenizer: Tokenizer, seed: int, rows: int, row_tokens: int) -> Iterator[Rows]:
    """Batches of packed entries without end; each epoch shuffles and renders them anew."""

    def epoch(number: int) -> Stream:
        rng = random.Random(f"{seed}/pretraining/{number}")
        texts = [entry.render(rng) + END_OF_TEXT for entry in rng.sample(entries, len(entries))]
        ids = [token for encoding in tokenizer.encode_batch(texts) for token in encoding.ids]
        return ids, ids

    return _batches(epoch, rows, row_tokens)


def chat_batches(
    chats: list[list[Message]], tokenizer: PreTrainedTokenizerBase, seed: int, rows: int, row_tokens: int
) -> Iterator[Rows]:
    """Batches of packed chats without end; only what the assistant says, and its end of turn, is a target."""
    encoded = tokenizer.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, padding=False
    )
    pairs = [
        (ids, [token if said else IGNORED for token, said in zip(ids, mask, strict=True)])
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
        flat, wanted = np.array(ids, dtype=np.int64), np.array(targets, dtype=np.int64)
        whole = len(flat) // size
        for i in range(whole):
            part = slice(i * size, (i + 1) * size)
            yield flat[part].reshape(rows, row_tokens), wanted[part].reshape(rows, row_tokens)
        ids, targets = ids[whole * size :], targets[whole * size :]
