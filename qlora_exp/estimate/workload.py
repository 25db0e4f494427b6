"""How much a training computes: lengths of rows, batches, tokens and floating-point operations.

A batch is padded to its longest row, or has no padding (``padding_free``). Even the largest batch has fewer tokens with
a loss than its rows times the longest row.

Operations follow Kaplan et al. 2020 (*Scaling Laws for Neural Language Models*, section 2.1): 2 per weight and token
for a forward pass, and 2 more for the activations' gradients. A frozen base needs no gradients of its weights. The
count covers the tokens that are computed: the layers compute padding, if there is any; the head computes only tokens
with a loss. Only matrix products are counted.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_exp.architecture.shapes import Architecture
from qlora_exp.config.schema import TrainingConfig
from qlora_exp.estimate.activations import layers_of
from qlora_exp.training.micro_batches import cut_rows, padded_tokens

KEPT_LENGTHS = 500
SIMULATED_ROWS = 2048
"""Rows of the simulated steps together: a few hundredths of a second."""


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
    tokens_deviation: float = 0.0
    longest_validation_tokens: int = 0
    """The longest validation row, which is read if ``training.evaluate_every_steps`` is set; 0: unknown."""
    sorted_tokens: tuple[int, ...] = ()
    """The rows' lengths; of many rows, :data:`KEPT_LENGTHS` evenly spaced ones. Empty: unknown."""

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
            tokens_deviation=statistics.pstdev(tokens),
            expected_longest_tokens=_expected_max(tokens),
            sorted_tokens=_evenly_spaced(sorted(tokens)),
        )

    def longest_read_tokens(self, training: TrainingConfig) -> int:
        """Return the longest row that a training reads: of its training rows, and of what it validates on."""
        validated = self.longest_validation_tokens if training.evaluate_every_steps is not None else 0
        return min(max(self.longest_tokens, validated), training.max_length)

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

    def expected_length_when_cut(self, rows: int, limit: int, padding_free: bool) -> float:
        """Return the length of the longest row in a row's micro-batch, in the mean of ``rows`` rows of a step.

        The step is cut into micro-batches of at most ``limit`` tokens, with padding if there is any. Steps are
        simulated.
        """
        if not self.sorted_tokens:
            return self.expected_padded_length(rows)
        draw, longest = random.Random(0), padded_tokens()
        cost = sum if padding_free else longest
        padded = 0
        steps = max(1, SIMULATED_ROWS // rows)
        for _ in range(steps):
            lengths = draw.choices(self.sorted_tokens, k=rows)
            padded += sum(longest([lengths[row] for row in group]) for group in cut_rows(lengths, limit, cost))
        return padded / (steps * rows) * self.mean_tokens / statistics.fmean(self.sorted_tokens)

    def largest_layout(self, rows: int, limit: int) -> int:
        """Return rows times the longest row of the largest micro-batch, if ``rows`` rows of a step are cut into
        micro-batches of at most ``limit`` tokens without padding; from simulated steps that hold the longest row."""
        if not self.sorted_tokens:
            return rows * self.longest_tokens
        rows = min(rows, self.rows)  # a step has no more
        draw, largest = random.Random(0), 0
        for _ in range(max(1, SIMULATED_ROWS // rows)):
            lengths = [*draw.choices(self.sorted_tokens, k=rows - 1), self.longest_tokens]
            groups = cut_rows(lengths, limit, sum)
            largest = max(largest, *(len(group) * max(lengths[row] for row in group) for group in groups))
        return largest

    @property
    def differ(self) -> bool:
        return self.shortest_tokens < self.longest_tokens

    def max_loss_tokens(self, rows: int, batches: int) -> float:
        """Return the expected tokens with a loss in the largest of ``batches`` batches of ``rows`` rows."""
        largest = self.row_max_loss_tokens
        return self._max_of_batches(rows, batches, self.mean_loss_tokens, self.loss_tokens_deviation, largest)

    def max_tokens(self, rows: int, batches: int) -> float:
        """Return the expected tokens of the largest of ``batches`` batches of ``rows`` rows, without padding."""
        return self._max_of_batches(rows, batches, self.mean_tokens, self.tokens_deviation, self.longest_tokens)

    def _max_of_batches(self, rows: int, batches: int, mean: float, deviation: float, largest: int) -> float:
        """Return the expected largest sum of ``rows`` rows' values among ``batches`` batches.

        Each batch's sum is taken as normal. The expected largest of n normal numbers follows Blom 1958, *Statistical
        Estimates and Transformed Beta-Variables*. If every row is drawn, the result is at least the longest row plus
        mean rows.
        """
        deviations = statistics.NormalDist().inv_cdf((batches - 0.375) / (batches + 0.25)) if batches > 1 else 0.0
        expected = rows * mean + deviations * math.sqrt(rows) * deviation
        if rows * batches >= self.rows:
            expected = max(expected, largest + (rows - 1) * mean)
        return min(expected, float(rows * largest))


def _evenly_spaced(ordered: Sequence[int]) -> tuple[int, ...]:
    kept = min(len(ordered), KEPT_LENGTHS)
    return tuple(ordered[(2 * number + 1) * len(ordered) // (2 * kept)] for number in range(kept))


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


@dataclass(frozen=True)
class MeanRow:
    """The mean row of a training, in tokens. ``padded``: what the layers compute, the length of its batch or, without
    padding, its own. ``scored``: its tokens with a loss; only they get logits. ``attended``: what attention computes,
    the length of its batch."""

    tokens: float
    padded: float
    scored: float
    attended: float

    @staticmethod
    def whole(tokens: float) -> MeanRow:
        """Return the mean row if every row is this long and each of its tokens has a loss."""
        return MeanRow(tokens, tokens, tokens, tokens)


@dataclass(frozen=True)
class WeightsByPass:
    """Weights of linear layers. ``tuned``: they are trained themselves. ``frozen_below``: they lie before the first
    trained layer, so they have no backward pass."""

    tuned: int = 0
    frozen_below: int = 0


def train_flops_per_token(
    architecture: Architecture,
    adapter_parameters: int,
    row: MeanRow,
    recomputed: bool,
    fused_head: bool = True,
    keeps_attention: bool = False,
    weights: WeightsByPass | None = None,
) -> float:
    """Return the operations to train one unpadded token of rows like ``row``.

    * Layers, per padded token: 2N forward and 2N backward. N counts the weights of linear layers, adapters and the
      experts of one token, not the embedding table. 2N more if layers are recomputed, and 2 per adapter parameter for
      its own gradient.
    * ``weights`` that are trained themselves: 2 more each. Those below the first trained layer: 2 forward alone.
    * Attention, per attended token: 4 forward and 8 backward per query width and position, over the half of the
      positions that a causal mask leaves. 4 more if layers are recomputed, unless attention's output is kept.
    * Head, per token with a loss: 4 per weight, and 2 more if TRL's fused head recomputes its logits.
    """
    width = architecture.hidden_size
    layers = sum(shape.in_features * shape.out_features for shape in architecture.weights)
    layers += sum(
        experts.per_token * experts.intermediate * width * (3 if experts.gated else 2)
        for experts in architecture.experts
    )
    head = architecture.vocabulary_size * width
    attention = sum(layer.query for layer, _ in layers_of(architecture)) * row.attended / 2
    passes = 6.0 if recomputed else 4.0
    in_layers = passes * layers + (passes + 2.0) * adapter_parameters
    if weights is not None:
        in_layers += 2.0 * weights.tuned - (passes - 2.0) * weights.frozen_below
    in_attention = (16.0 if recomputed and not keeps_attention else 12.0) * attention
    in_head = (6.0 if fused_head else 4.0) * head
    return (row.padded * in_layers + row.attended * in_attention + row.scored * in_head) / row.tokens


def steps_of_epochs(epochs: float, rows: int, batch_size: int) -> int:
    """Return the optimizer steps of ``epochs`` passes over ``rows``, as transformers counts them.

    The last batch of a pass may be smaller. Example: 3 epochs of 60 rows in batches of 16 are 3 × 4 = 12 steps, and
    half an epoch is 2.
    """
    return max(1, math.ceil(epochs * math.ceil(rows / batch_size)))


@dataclass(frozen=True)
class Workload:
    """How much a training processes. ``step_rows``: the mean rows per step of an epoch, whose last batch may be
    smaller."""

    steps: int
    step_rows: float
    row: MeanRow
    tokens: int

    @staticmethod
    def of(training: TrainingConfig, lengths: RowLengths | None = None, padding_free: bool = False) -> Workload:
        """Return the workload of ``training`` on rows of ``lengths``. If they are unknown, every batch is full, and
        every row has ``training.max_length`` tokens with a loss: an upper bound. ``padding_free``: batches have no
        padding."""
        if lengths is None:
            step_rows, row = float(training.batch_size), MeanRow.whole(float(training.max_length))
        else:
            step_rows = lengths.rows / math.ceil(lengths.rows / training.batch_size)
            micro_batch = min(training.micro_batch_size or training.batch_size, lengths.rows)
            longest, mean = lengths.expected_padded_length(micro_batch), lengths.mean_tokens
            if isinstance(training.micro_batch_tokens, int):
                limit = training.micro_batch_tokens
                longest = lengths.expected_length_when_cut(round(step_rows), limit, padding_free)
            row = MeanRow(mean, mean if padding_free else longest, lengths.mean_loss_tokens, longest)
        if training.max_tokens is not None:
            steps = math.ceil(training.max_tokens / (step_rows * row.tokens))
            return Workload(steps, step_rows, row, training.max_tokens)
        steps = training.max_steps or 0
        if training.epochs is not None and lengths is not None:
            steps = steps_of_epochs(training.epochs, lengths.rows, training.batch_size)
        return Workload(steps, step_rows, row, round(steps * step_rows * row.tokens))

    @property
    def padded_tokens(self) -> int:
        return round(self.tokens * self.row.padded / self.row.tokens)

    @property
    def scored_tokens(self) -> int:
        return round(self.tokens * self.row.scored / self.row.tokens)
