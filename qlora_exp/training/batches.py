"""Batches without padding: one sequence of real tokens, in which ``cu_seq_lens`` bounds the rows.

TRL's collator makes them (``padding_free``): ``input_ids``, ``labels`` and ``position_ids`` of shape (1, tokens), the
row of each token in ``seq_idx`` (1, tokens), and ``cu_seq_lens_q`` (rows + 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

REAL_ROWS = "real_rows"
"""Key of a batch: how many rows come before those that only round its tokens up. The model doesn't take it."""


@dataclass(frozen=True)
class RoundedBatches:
    """A collator that rounds a batch up to a multiple of ``tokens``, and its longest row to one of ``length``.

    Where each new shape is compiled (``shape_multiples``), lengths must repeat. TRL's ``pad_to_multiple_of`` would make
    each token of padding a row by itself. Here rows without a loss follow the real ones, none longer than the longest.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    tokens: int
    length: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        lengths = [len(example["input_ids"]) for example in examples]
        missing, longest = -sum(lengths) % self.tokens, max(lengths)
        fillers = [min(longest, missing - start) for start in range(0, missing, longest)]
        token = examples[0]["input_ids"][0]
        batch = self.collate(
            [*examples, *({"input_ids": [token] * length, "labels": [-100] * length} for length in fillers)]
        )
        rounded = longest + -longest % self.length
        # Layers compare their sliding window with the longest row as it is.
        batch |= {"max_length_q": rounded, "max_length_k": rounded, "longest_row": longest}
        return batch | {REAL_ROWS: len(examples)}


def token_count(batch: dict[str, Any]) -> int:
    """Return the number of real tokens, without padding and without rows that round up."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    if REAL_ROWS in batch:
        return int(batch["cu_seq_lens_q"][batch[REAL_ROWS]])
    return int(batch["input_ids"].numel())


def row_sums(values: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """Return each row's sum of ``values`` (rows, tokens − 1), those of a row's tokens but its first; without padding
    (1, tokens − 1), where the first token's of each later row must be 0."""
    if "seq_idx" not in batch:
        return values.sum(dim=1)
    rows = len(batch["cu_seq_lens_q"]) - 1
    return values.new_zeros(rows).index_add(0, batch["seq_idx"][0, 1:].long(), values[0])
