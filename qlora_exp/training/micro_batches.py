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
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if groups and cost([lengths[other] for other in (*groups[-1], row)]) <= limit:
            groups[-1].append(row)
        else:
            groups.append([row])
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
