"""How much a training computes: rows, tokens and floating-point operations.

Operations after Kaplan et al. 2020 (*Scaling Laws for Neural Language Models*, section 2.1): 2 per weight and token for
a forward pass, and with a frozen base 2 more for the activations' gradients (the weights have none). Counted are the
tokens that are computed: padding in the layers, in the head those with a loss. Left out is all that isn't a matrix
product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_exp.architecture.run_plan import gradient_checkpointing, lora_parameters
from qlora_exp.architecture.shapes import Architecture
from qlora_exp.config.schema import Config, TrainingConfig
from qlora_exp.estimate.activations import layers_of
from qlora_exp.estimate.workload import RowLengths


@dataclass(frozen=True)
class MeanRow:
    """A training's mean row, in tokens. ``padded``: as long as its batch; ``scored``: of its tokens those that carry a
    loss, which alone get logits."""

    tokens: float
    padded: float
    scored: float

    @staticmethod
    def whole(tokens: float) -> MeanRow:
        """All rows as long as this one, and each of their tokens with logits."""
        return MeanRow(tokens, tokens, tokens)


def train_flops_per_token(
    architecture: Architecture, adapter_parameters: int, row: MeanRow, recomputed: bool, fused_head: bool = True
) -> float:
    """Operations to train one unpadded token of rows like ``row``.

    For each padded token 2N forward and 2N backward (N: weights of linear layers and adapters, of experts those that a
    token passes through; not of the embedding table), 2N more where layers are computed again, and 2 per adapter
    parameter for its own gradient. Attention: 4 per width of the queries and position forward, 8 backward, over the
    half of the positions that a causal mask leaves. For each scored token 4 per weight of the head, and 2 more where
    TRL's fused head computes its logits again.
    """
    width = architecture.hidden_size
    layers = sum(shape.in_features * shape.out_features for shape in architecture.weights)
    layers += sum(one.per_token * one.intermediate * width * (3 if one.gated else 2) for one in architecture.experts)
    head = architecture.vocabulary_size * width
    attention = sum(layer.query for layer, _ in layers_of(architecture)) * row.padded / 2
    passes = 6.0 if recomputed else 4.0
    in_layers = passes * layers + (passes + 2.0) * adapter_parameters + (2 * passes + 4.0) * attention
    in_head = (6.0 if fused_head else 4.0) * head
    return (row.padded * in_layers + row.scored * in_head) / row.tokens


@dataclass(frozen=True)
class Workload:
    """How much a training processes. ``step_rows``: in the mean of an epoch, whose last step has what is left."""

    steps: int
    step_rows: float
    row: MeanRow
    tokens: int

    @staticmethod
    def of(training: TrainingConfig, lengths: RowLengths | None = None) -> Workload:
        """``lengths``: of the rows that there are; unknown, every step has a whole batch, and every row is as long as
        ``training.max_length`` with a loss on all of it, an upper bound."""
        rows = lengths.rows if lengths is not None else None
        step_rows = rows / math.ceil(rows / training.batch_size) if rows else float(training.batch_size)
        row = MeanRow.whole(float(training.max_length))
        if lengths is not None:
            together = min(training.micro_batch_size or training.batch_size, lengths.rows)
            row = MeanRow(lengths.mean_tokens, lengths.expected_padded_length(together), lengths.scored_mean_tokens)
        if training.max_tokens is not None:
            return Workload(
                math.ceil(training.max_tokens / (step_rows * row.tokens)), step_rows, row, training.max_tokens
            )
        steps = training.max_steps or 0
        return Workload(steps, step_rows, row, round(steps * step_rows * row.tokens))

    @property
    def padded_tokens(self) -> int:
        return round(self.tokens * self.row.padded / self.row.tokens)

    @property
    def scored_tokens(self) -> int:
        return round(self.tokens * self.row.scored / self.row.tokens)


def train_flops(
    architecture: Architecture, modules: Sequence[str], config: Config, device_kind: str, extent: Workload
) -> float:
    """Operations of training ``config`` with adapters on ``modules`` (full names)."""
    wanted = set(modules)
    adapters = sum(
        lora_parameters(shape, config.lora.r, config.lora.dora)
        for shape in architecture.weights
        if shape.name in wanted
    )
    recomputed = gradient_checkpointing(config.training.gradient_checkpointing, device_kind, architecture)
    return extent.tokens * train_flops_per_token(architecture, adapters, extent.row, recomputed)
