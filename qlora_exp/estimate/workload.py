"""How large the batches of a training are. The largest has fewer tokens with a loss than its number of rows times the
longest; all are padded to the longest row that they happen to have."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RowLengths:
    """A task's training rows, ``rows`` of them, in tokens. ``scored_…``: of these, those that carry a loss.
    ``longest_of_tokens``: of one row, of two, of four, … drawn together the longest, in the mean."""

    rows: int
    shortest_tokens: int
    longest_tokens: int
    scored_mean_tokens: float
    scored_deviation_tokens: float
    scored_most_tokens: int
    longest_of_tokens: tuple[float, ...]

    @staticmethod
    def of(tokens: Sequence[int], scored: Sequence[int]) -> RowLengths:
        """``tokens`` and ``scored`` of each row, at least one."""
        return RowLengths(
            rows=len(tokens),
            shortest_tokens=min(tokens),
            longest_tokens=max(tokens),
            scored_mean_tokens=statistics.fmean(scored),
            scored_deviation_tokens=statistics.pstdev(scored),
            scored_most_tokens=max(scored),
            longest_of_tokens=_longest_of(tokens),
        )

    @property
    def mean_tokens(self) -> float:
        return self.longest_of_tokens[0]

    def expected_padded_length(self, rows: int) -> float:
        """Tokens that the longest of ``rows`` rows has in the mean: what a batch of them is padded to."""
        doublings = min(math.log2(rows), len(self.longest_of_tokens) - 1)
        below = int(doublings)
        near, far = self.longest_of_tokens[below], self.longest_of_tokens[math.ceil(doublings)]
        return near + (doublings - below) * (far - near)

    @property
    def differ(self) -> bool:
        return self.shortest_tokens < self.longest_tokens

    def max_loss_tokens(self, rows: int, batches: int) -> float:
        """Tokens with a loss that the largest of ``batches`` batches of ``rows`` rows is expected to have, as if each
        batch's sum were normal: the expected largest of n normal numbers by Blom 1958, *Statistical Estimates and
        Transformed Beta-Variables*. Where every row is drawn, at least the longest one's beside mean ones."""
        above = statistics.NormalDist().inv_cdf((batches - 0.375) / (batches + 0.25)) if batches > 1 else 0.0
        expected = rows * self.scored_mean_tokens + above * math.sqrt(rows) * self.scored_deviation_tokens
        if rows * batches >= self.rows:
            expected = max(expected, self.scored_most_tokens + (rows - 1) * self.scored_mean_tokens)
        return min(expected, float(rows * self.scored_most_tokens))


def _longest_of(tokens: Sequence[int]) -> tuple[float, ...]:
    """The mean of the longest of 1, 2, 4, … rows, up to as many as there are, each drawn from all of them: a share
    F(n)^k of such draws of k has no row above n tokens, F(n) being the share of the rows that haven't."""
    counts = sorted(Counter(tokens).items())
    shares = [0.0, *(number / len(tokens) for number in itertools.accumulate(count for _, count in counts))]
    of_several = (
        sum(
            length * (upto**drawn - below**drawn)
            for (length, _), (below, upto) in zip(counts, itertools.pairwise(shares), strict=True)
        )
        for drawn in (2**power for power in range(1, len(tokens).bit_length()))
    )
    return statistics.fmean(tokens), *of_several
