"""How much a training computes: rows, tokens and floating-point operations.

Operations follow Kaplan et al. 2020 (*Scaling Laws for Neural Language Models*, section 2.1): 2 per weight and token
for a forward pass, and 2 more for the activations' gradients. A frozen base needs no gradients of its weights. The
count covers the tokens that are computed: the layers compute padding, too; the head computes only tokens with a loss.
Only matrix products are counted.
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
    """The mean row of a training, in tokens. ``padded``: the length of its batch. ``scored``: its tokens with a loss;
    only they get logits."""

    tokens: float
    padded: float
    scored: float

    @staticmethod
    def whole(tokens: float) -> MeanRow:
        """Return the mean row if every row is this long and each of its tokens has a loss."""
        return MeanRow(tokens, tokens, tokens)


def train_flops_per_token(
    architecture: Architecture, adapter_parameters: int, row: MeanRow, recomputed: bool, fused_head: bool = True
) -> float:
    """Return the operations to train one unpadded token of rows like ``row``.

    * Layers, per padded token: 2N forward and 2N backward. N counts the weights of linear layers, adapters and the
      experts of one token, not the embedding table. 2N more if layers are recomputed, and 2 per adapter parameter for
      its own gradient.
    * Attention: 4 forward and 8 backward per query width and position, over the half of the positions that a causal
      mask leaves.
    * Head, per token with a loss: 4 per weight, and 2 more if TRL's fused head recomputes its logits.
    """
    width = architecture.hidden_size
    layers = sum(shape.in_features * shape.out_features for shape in architecture.weights)
    layers += sum(
        experts.per_token * experts.intermediate * width * (3 if experts.gated else 2)
        for experts in architecture.experts
    )
    head = architecture.vocabulary_size * width
    attention = sum(layer.query for layer, _ in layers_of(architecture)) * row.padded / 2
    passes = 6.0 if recomputed else 4.0
    in_layers = passes * layers + (passes + 2.0) * adapter_parameters + (2 * passes + 4.0) * attention
    in_head = (6.0 if fused_head else 4.0) * head
    return (row.padded * in_layers + row.scored * in_head) / row.tokens


@dataclass(frozen=True)
class Workload:
    """How much a training processes. ``step_rows``: the mean rows per step of an epoch, whose last batch may be
    smaller."""

    steps: int
    step_rows: float
    row: MeanRow
    tokens: int

    @staticmethod
    def of(training: TrainingConfig, lengths: RowLengths | None = None) -> Workload:
        """Return the workload of ``training`` on rows of ``lengths``. If they are unknown, every batch is full, and
        every row has ``training.max_length`` tokens with a loss: an upper bound."""
        rows = lengths.rows if lengths is not None else None
        step_rows = rows / math.ceil(rows / training.batch_size) if rows else float(training.batch_size)
        row = MeanRow.whole(float(training.max_length))
        if lengths is not None:
            micro_batch = min(training.micro_batch_size or training.batch_size, lengths.rows)
            row = MeanRow(lengths.mean_tokens, lengths.expected_padded_length(micro_batch), lengths.mean_loss_tokens)
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
    """Return the operations of training ``config`` with adapters on ``modules`` (full names)."""
    module_names = set(modules)
    adapters = sum(
        lora_parameters(shape, config.lora.r, config.lora.dora)
        for shape in architecture.weights
        if shape.name in module_names
    )
    recomputed = gradient_checkpointing(config.training.gradient_checkpointing, device_kind, architecture)
    return extent.tokens * train_flops_per_token(architecture, adapters, extent.row, recomputed)
