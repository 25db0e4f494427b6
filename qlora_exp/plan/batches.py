"""How large the largest batch of a training is: with rows of many lengths, less than its number times the longest."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RowLengths:
    """A task's training rows, ``rows`` of them, in tokens. ``scored_…``: of these, those that carry a loss."""

    rows: int
    shortest_tokens: int
    longest_tokens: int
    scored_mean_tokens: float
    scored_deviation_tokens: float
    scored_most_tokens: int

    @staticmethod
    def of(tokens: Sequence[int], scored: Sequence[int]) -> RowLengths:
        """``tokens`` and ``scored`` of each row, at least one."""
        return RowLengths(
            len(tokens), min(tokens), max(tokens), statistics.fmean(scored), statistics.pstdev(scored), max(scored)
        )

    @property
    def differ(self) -> bool:
        return self.shortest_tokens < self.longest_tokens

    def most_scored(self, rows: int, batches: int) -> float:
        """Tokens with a loss that the largest of ``batches`` batches of ``rows`` rows is expected to have, as if each
        batch's sum were normal: the expected largest of n normal numbers by Blom 1958, *Statistical Estimates and
        Transformed Beta-Variables*. Where every row is drawn, at least the longest one's beside mean ones."""
        above = statistics.NormalDist().inv_cdf((batches - 0.375) / (batches + 0.25)) if batches > 1 else 0.0
        expected = rows * self.scored_mean_tokens + above * math.sqrt(rows) * self.scored_deviation_tokens
        if rows * batches >= self.rows:
            expected = max(expected, self.scored_most_tokens + (rows - 1) * self.scored_mean_tokens)
        return min(expected, float(rows * self.scored_most_tokens))
