"""The predicted peak memory of training: the exact parts, plus what forward saves and what the head needs.

The peak is at one of three moments. *At the head*, when backward begins: everything that forward saved exists, with the
logits and their gradient. *In a layer*, with checkpointing: the layers' inputs, and one recomputed layer. *In the
optimizer*, on CUDA: torch's optimizers process all adapters at once, with a temporary of the same size.

On a CPU the second moment leaves gaps in the heap. They are still there at the first moment one step later, so the two
add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlora_exp.architecture.run_plan import adapter_dtype, compute_dtype, gradient_checkpointing, shape_multiples
from qlora_exp.architecture.shapes import Architecture, WeightShape
from qlora_exp.config.allowed_values import QUANTIZED
from qlora_exp.config.schema import Config, Quantization
from qlora_exp.estimate.activations import FLOAT32_BYTES, SavedActivations, is_eager, saved_bytes_per_token
from qlora_exp.estimate.architecture_traits import traits_of
from qlora_exp.estimate.weights_and_optimizer import WIDTHS_OF, adapter_bytes, base_bytes, temporaries_bytes
from qlora_exp.estimate.workload import RowLengths

HEAD_TOKENS, HEAD_VOCABULARY = 4096, 32768
"""TRL's fused head (``trl/kernels/chunked_logprob.py``) computes logits in tiles of this many tokens and vocabulary
entries."""
HEAD_BYTES_WITHOUT_TRITON = 29
"""Bytes per logit of a tile's backward pass in plain torch, without the tile itself (``_backward_tile``): y, z, log p,
p and the gradient in float32, a mask of one byte, and two float32 temporaries of the gradient's product."""


PAGE_BYTES = 4096
DEFAULT_STEPS = 1000
"""Used if the number of steps is unknown."""


@dataclass(frozen=True)
class Heap:
    """What a CPU process holds beyond its tensors.

    glibc serves aligned requests of less than 32 MiB from its heap. There, the gap that a freed tensor leaves is a
    little too small for the next tensor of the same size.
    """

    code_bytes: float
    """What the libraries allocate at first use, their threads' buffers, and Python's objects."""
    kernels_16_bit_bytes: float
    """What oneDNN compiles and caches for the shapes of 16-bit multiplications."""
    gaps_layers: float
    """Share of what forward saves in the layers that stays resident as gaps. With checkpointing, the recomputed layers
    together leave as much."""
    gaps_logits: float
    """The same share of the head's tensors, if they are smaller than 32 MiB."""


DEFAULT_HEAP = Heap(42e6, 0.0, 0.58, 0.2)
TUNED_HEAP = Heap(17e6, 26e6, 0.165, 0.165)
"""glibc with its defaults, and with the settings of :mod:`qlora_exp.system.heap`. Fitted to the rows of llama, gpt2 and
gpt_neox in docs/predicted_memory_plain.csv and docs/predicted_memory.csv: docs/plan_accuracy.md."""
MAPPED_FROM_BYTES = 32 * 2**20
"""glibc's largest threshold (``M_MMAP_THRESHOLD``). Larger requests are mapped one by one, and returned at once."""

CUDA_CONTEXT_BYTES = 600 * 2**20
"""Driver, kernels and cuBLAS workspaces on the card, outside torch's allocator. An assumption, not measured."""
CUDA_FRAGMENTS = 0.05
"""What torch's allocator reserves beyond the allocated bytes, as a share of them. An assumption, not measured."""


@dataclass(frozen=True)
class Peak:
    """Bytes.

    ``peak_bytes`` is comparable with ``memory.train_working_set_bytes``. On CUDA it is what torch has allocated; on a
    CPU it is the base, adapters and training, without the process itself. ``needed_bytes`` is what the device must have
    free: on CUDA also fragmentation and the context.
    """

    exact_bytes: int
    """Base, quantization state, adapters and optimizer states; gradients, if they exist at the peak."""
    activation_bytes: int
    logits_bytes: int
    dequantization_bytes: int
    slack_bytes: int
    context_bytes: int
    peak_bytes: int

    @property
    def needed_bytes(self) -> int:
        return self.peak_bytes + self.context_bytes


def predicted_peak(
    architecture: Architecture,
    modules: Sequence[str],
    config: Config,
    device_kind: str,
    *,
    bf16: bool = True,
    rows: RowLengths | None = None,
    steps: int | None = None,
    joined_heap: bool = False,
) -> Peak:
    """Return the peak of training ``config`` with adapters on ``modules`` (full names, as resolve_targets gives them).

    * ``device_kind``: ``cpu`` or ``cuda``; ``bf16``: whether the card has it.
    * ``rows``: the lengths of the training rows. If unknown, they differ, and each row has ``training.max_length``
      tokens with a loss.
    * ``steps``: of the training; if unknown, many.
    * ``joined_heap``: whether a CPU process runs with the settings of :mod:`qlora_exp.system.heap`.
    """
    shape = _Shape.of(config, architecture, device_kind, bf16, rows, steps)
    module_names = set(modules)
    adapted = [weight for weight in architecture.weights if weight.name in module_names]
    adapters = adapter_bytes(adapted, config.lora, config.training.optimizer)
    base = base_bytes(architecture, config.quantization, shape.compute)
    resting = base.base_weight_bytes + base.quantization_state_bytes + adapters.adapter_bytes + adapters.optimizer_bytes
    activations = saved_bytes_per_token(
        architecture,
        module_names,
        r=config.lora.r,
        compute_bytes=shape.width,
        adapter_bytes=WIDTHS_OF[adapter_dtype(config.lora)],
        int8=config.quantization.mode is Quantization.int8,
        length=shape.length,
        padded=shape.padded,
        cuda=shape.cuda,
        lora_dropout=config.lora.dropout > 0,
        eager=is_eager(config.model.attention, architecture),
    )
    logits = _logits(architecture, shape)
    dequantized = _dequantized_bytes(architecture, config, shape)
    with_gradients = resting + adapters.gradient_bytes
    outer = shape.tokens * (activations.outside + (activations.inputs if shape.checkpointing else activations.layers))
    recomputed = shape.tokens * activations.layer * 2 if shape.checkpointing else 0.0
    # Before the first backward pass of a step the gradients of the last step are freed.
    at_head = _PeakCandidate(with_gradients if shape.accumulates else resting, outer, logits, 0, 0)
    in_layer = _PeakCandidate(with_gradients, outer + recomputed, 0, dequantized, 0)
    in_optimizer = _PeakCandidate(with_gradients, temporaries_bytes(config.training.optimizer, adapters), 0, 0, 0)
    if not shape.cuda:
        slack = _heap_fragmentation(
            TUNED_HEAP if joined_heap else DEFAULT_HEAP, architecture, shape, activations, logits
        )
        at_head, in_layer = replace(at_head, slack=slack), replace(in_layer, slack=slack)
    moments = (at_head, in_layer, in_optimizer) if shape.cuda else (at_head, in_layer)
    return max((_peak(moment, shape) for moment in moments), key=lambda peak: peak.peak_bytes)


@dataclass(frozen=True)
class _Shape:
    """The shape of one forward pass: dtype, rows and tokens of a micro-batch."""

    compute: str
    width: int
    rows: int
    length: int
    scored: int
    """Tokens with a loss; only they get logits."""
    padded: bool
    checkpointing: bool
    accumulates: bool
    """The batch has several micro-batches: from the second one on, gradients of the earlier ones exist."""
    cuda: bool

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @staticmethod
    def of(
        config: Config,
        architecture: Architecture,
        device_kind: str,
        bf16: bool,
        lengths: RowLengths | None,
        steps: int | None,
    ) -> _Shape:
        training = config.training
        compute = compute_dtype(config.quantization, device_kind, bf16)
        rows = training.micro_batch_size or training.batch_size
        length = min(lengths.longest_tokens, training.max_length) if lengths else training.max_length
        scored: float = rows * (length - 1)
        if lengths:
            batches = (steps or training.max_steps or DEFAULT_STEPS) * math.ceil(training.batch_size / rows)
            scored = min(scored, lengths.max_loss_tokens(rows, batches))
        differ = lengths is None or lengths.differ
        length_multiple, logits_multiple = shape_multiples(
            compute, device_kind, training.max_length, architecture.positions
        )
        differ = differ or length % length_multiple != 0
        return _Shape(
            compute=compute,
            width=WIDTHS_OF[compute],
            rows=rows,
            length=_rounded_up(length, length_multiple),
            scored=_rounded_up(round(scored), logits_multiple),
            padded=differ,
            checkpointing=gradient_checkpointing(training.gradient_checkpointing, device_kind, architecture),
            accumulates=training.batch_size > rows,
            cuda=device_kind == "cuda",
        )


def _rounded_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


@dataclass(frozen=True)
class _PeakCandidate:
    exact: float
    activations: float
    logits: float
    unpacked: float
    slack: float


def _logits(architecture: Architecture, shape: _Shape) -> float:
    """Return the bytes of one tile of logits, of what its backward pass computes, and of the hidden states' float32
    gradient.

    A tile always has rows of the full tile width. On CUDA all of it takes memory; on a CPU only the pages that the
    vocabulary touches.
    """
    tokens = min(shape.scored, HEAD_TOKENS)
    if shape.cuda:
        tile = tokens * HEAD_VOCABULARY * shape.width
    else:
        vocabulary = min(architecture.vocabulary_size, HEAD_VOCABULARY)
        softcap_bytes = FLOAT32_BYTES if traits_of(architecture.model_type).logit_softcapping else 0
        tile = tokens * vocabulary * (HEAD_BYTES_WITHOUT_TRITON + softcap_bytes + shape.width)
        tile += tokens * PAGE_BYTES if vocabulary < HEAD_VOCABULARY else 0
    return tile + shape.scored * architecture.hidden_size * FLOAT32_BYTES


def _dequantized_bytes(architecture: Architecture, config: Config, shape: _Shape) -> float:
    """Return the bytes of the largest quantized weight in the compute dtype: every multiplication dequantizes one and
    frees it again. On CUDA, LLM.int8()'s forward multiplies integers, but its backward dequantizes, too."""
    if config.quantization.mode not in QUANTIZED:
        return 0.0
    return max((_matrix(weight) for weight in architecture.weights if weight.quantizable), default=0) * shape.width


def _matrix(weight: WeightShape) -> int:
    return weight.in_features * weight.out_features


def _heap_fragmentation(
    heap: Heap, architecture: Architecture, shape: _Shape, activations: SavedActivations, logits: float
) -> float:
    tile = min(shape.scored, HEAD_TOKENS) * min(architecture.vocabulary_size, HEAD_VOCABULARY)
    logits_in_heap = logits if tile * FLOAT32_BYTES < MAPPED_FROM_BYTES else 0.0
    kernels = heap.kernels_16_bit_bytes if shape.width < FLOAT32_BYTES else 0.0
    return (
        heap.code_bytes
        + kernels
        + heap.gaps_layers * shape.tokens * activations.layers
        + heap.gaps_logits * logits_in_heap
    )


def _peak(moment: _PeakCandidate, shape: _Shape) -> Peak:
    needed = moment.exact + moment.activations + moment.logits + moment.unpacked
    context = CUDA_CONTEXT_BYTES + CUDA_FRAGMENTS * needed if shape.cuda else 0.0
    return Peak(
        exact_bytes=round(moment.exact),
        activation_bytes=round(moment.activations),
        logits_bytes=round(moment.logits),
        dequantization_bytes=round(moment.unpacked),
        slack_bytes=round(moment.slack),
        context_bytes=round(context),
        peak_bytes=round(needed + moment.slack),
    )
