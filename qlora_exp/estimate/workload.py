"""The sizes of a training's batches.

Each batch is padded to its longest row. Even the largest batch has fewer tokens with a loss than its rows times the
longest row.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RowLengths:
    """The lengths of a task's ``rows`` training rows, in tokens. ``scored_…``: tokens with a loss.
    ``expected_longest_tokens``: the expected longest of 1, 2, 4, … randomly drawn rows."""

    rows: int
    shortest_tokens: int
    longest_tokens: int
    mean_loss_tokens: float
    loss_tokens_deviation: float
    row_max_loss_tokens: int
    expected_longest_tokens: tuple[float, ...]

    @staticmethod
    def of(tokens: Sequence[int], scored: Sequence[int]) -> RowLengths:
        """Return the statistics of rows with these ``tokens`` and ``scored`` tokens (with a loss); at least one row."""
        return RowLengths(
            rows=len(tokens),
            shortest_tokens=min(tokens),
            longest_tokens=max(tokens),
            mean_loss_tokens=statistics.fmean(scored),
            loss_tokens_deviation=statistics.pstdev(scored),
            row_max_loss_tokens=max(scored),
            expected_longest_tokens=_expected_max(tokens),
        )

    @property
    def mean_tokens(self) -> float:
        return self.expected_longest_tokens[0]

    def expected_padded_length(self, rows: int) -> float:
        """Return the expected length of the longest of ``rows`` rows: a batch of them is padded to it."""
        doublings = min(math.log2(rows), len(self.expected_longest_tokens) - 1)
        # Interpolate linearly in the logarithm of the number of rows.
        lower = int(doublings)
        lower_length, upper_length = (
            self.expected_longest_tokens[lower],
            self.expected_longest_tokens[math.ceil(doublings)],
        )
        return lower_length + (doublings - lower) * (upper_length - lower_length)

    @property
    def differ(self) -> bool:
        return self.shortest_tokens < self.longest_tokens

    def max_loss_tokens(self, rows: int, batches: int) -> float:
        """Return the expected tokens with a loss in the largest of ``batches`` batches of ``rows`` rows.

        Each batch's sum is taken as normal. The expected largest of n normal numbers follows Blom 1958, *Statistical
        Estimates and Transformed Beta-Variables*. If every row is drawn, the result is at least the longest row plus
        mean rows.
        """
        deviations = statistics.NormalDist().inv_cdf((batches - 0.375) / (batches + 0.25)) if batches > 1 else 0.0
        expected = rows * self.mean_loss_tokens + deviations * math.sqrt(rows) * self.loss_tokens_deviation
        if rows * batches >= self.rows:
            expected = max(expected, self.row_max_loss_tokens + (rows - 1) * self.mean_loss_tokens)
        return min(expected, float(rows * self.row_max_loss_tokens))


def _expected_max(tokens: Sequence[int]) -> tuple[float, ...]:
    """Return the expected longest of 1, 2, 4, … rows, up to as many as there are, drawn with replacement.

    If F(n) is the share of rows with at most n tokens, F(n)^k is the probability that none of k drawn rows is longer.
    """
    counts = sorted(Counter(tokens).items())
    shares = [0.0, *(number / len(tokens) for number in itertools.accumulate(count for _, count in counts))]
    expected_max = (
        sum(
            length * (share**drawn - share_below**drawn)
            for (length, _), (share_below, share) in zip(counts, itertools.pairwise(shares), strict=True)
        )
        for drawn in (2**power for power in range(1, len(tokens).bit_length()))
    )
    return statistics.fmean(tokens), *expected_max
