"""Micro-batches chosen in tokens: a step's rows, sorted by length and cut so that no micro-batch is too large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

PARTS = "micro_batches"
"""The key of a collated batch that holds its micro-batches."""


def padded_tokens(multiple: int = 1) -> Callable[[Sequence[int]], int]:
    """Return the cost of rows that are padded to the longest one, rounded up to ``multiple`` tokens."""
    return lambda lengths: len(lengths) * -(-max(lengths) // multiple) * multiple


def cut_rows(lengths: Sequence[int], limit: int, cost: Callable[[Sequence[int]], int]) -> list[list[int]]:
    """Return the indices of rows of these ``lengths`` (tokens), cut into micro-batches that cost at most ``limit``.

    ``cost``: lengths of a micro-batch's rows, the longest first → its tokens: :func:`padded_tokens`, or ``sum`` without
    padding. A row that costs more than ``limit`` has a micro-batch for itself.

    Rows are taken in the order of their lengths, so that a micro-batch has little padding. The longest come first: if
    memory runs out, it does so at the start of a step.

    Example: lengths 5, 9, 2, 4 with a limit of 10 padded tokens → [[1], [0, 3], [2]].
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    longest_first = [lengths[row] for row in order]
    groups: list[list[int]] = []
    start = 0
    while start < len(order):
        # More rows never cost less, so the size is found by doubling and halving: a step may have 100,000 rows.
        fits, size = 1, 2
        while start + size <= len(order) and cost(longest_first[start : start + size]) <= limit:
            fits, size = size, 2 * size
        too_many = min(size, len(order) - start + 1)
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if cost(longest_first[start : start + middle]) <= limit:
                fits = middle
            else:
                too_many = middle
        groups.append(order[start : start + fits])
        start += fits
    return groups


@dataclass(frozen=True)
class MicroBatchCollator:
    """Collates each micro-batch of a step's rows by itself, with ``collate``."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    limit: int
    cost: Callable[[Sequence[int]], int]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        groups = cut_rows([len(row["input_ids"]) for row in rows], self.limit, self.cost)
        return {PARTS: [self.collate([rows[index] for index in group]) for group in groups]}
