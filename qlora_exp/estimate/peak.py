"""The predicted peak memory of training: the exact parts, plus what forward saves and what the head needs.

The peak is at one of three moments. *At the head*, when backward begins: everything that forward saved exists, with the
logits and their gradient. *In a layer*, with checkpointing: the layers' inputs (and attention's outputs,
if it is selective), and one recomputed layer. *In the
optimizer*, on CUDA: torch's optimizers process all adapters at once, with a temporary of the same size.

On a CPU the second moment leaves gaps in the heap. They are still there at the first moment one step later, so the two
add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_exp.architecture.expert_targets import expert_targets
from qlora_exp.architecture.padding import FLASH_ATTENTION
from qlora_exp.architecture.run_plan import adapter_dtype, compute_dtype, optimizer_on, shape_multiples
from qlora_exp.architecture.shapes import Architecture
from qlora_exp.architecture.targets import rank_of
from qlora_exp.architecture.tuned_weights import layer_of, tuned_tensors, whole_tensors
from qlora_exp.config.allowed_values import INTEGER_MODES, QUANTIZED
from qlora_exp.config.checks_method import TUNES_WEIGHTS
from qlora_exp.config.enums import Checkpointing, DistillationMode, Method, Quantization
from qlora_exp.config.schema import Config
from qlora_exp.estimate.activations import (
    TrainingPass,
    is_eager,
    layers_of,
    saved_bytes_per_token,
    traits_of,
)
from qlora_exp.estimate.backward import FLOAT32_BYTES, SavedActivations, backward_of
from qlora_exp.estimate.selective_checkpointing import kept_attention_bytes
from qlora_exp.estimate.weights_and_optimizer import (
    WIDTHS_OF,
    AdapterBytes,
    BaseBytes,
    frozen_bytes,
    temporaries_bytes,
    trained_bytes,
)
from qlora_exp.estimate.workload import RowLengths, Workload

HEAD_TOKENS, HEAD_VOCABULARY = 4096, 32768
"""TRL's fused head (``trl/kernels/chunked_logprob.py``) computes logits in tiles of this many tokens and vocabulary
entries."""
HEAD_BYTES_WITHOUT_TRITON = 29
"""Bytes per logit of a tile's backward pass in plain torch, without the tile itself (``_backward_tile``): y, z, log p,
p and the gradient in float32, a mask of one byte, and two float32 temporaries of the gradient's product."""
PAGE_BYTES = 4096


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

    base: BaseBytes
    adapters: AdapterBytes
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
    joined_heap: bool = False,
    padding_free: bool = False,
) -> Peak:
    """Return the peak of training ``config`` with adapters on ``modules`` (full names, as resolve_targets gives them).

    * ``device_kind``: ``cpu`` or ``cuda``; ``bf16``: whether the card has it. On CUDA, ``gradient_checkpointing=auto``
      counts as on: ``Estimator.checkpointing`` compares the peak without it with the memory.
    * ``rows``: the lengths of the training rows. If unknown, they differ, and each row has ``training.max_length``
      tokens with a loss.
    * ``joined_heap``: whether a CPU process runs with the settings of :mod:`qlora_exp.system.heap`.
    * ``padding_free``: batches have no padding.
    """
    compute = compute_dtype(config.quantization, device_kind, bf16)
    batch = _micro_batch(config, architecture, device_kind, compute, rows, padding_free)
    cuda, width = device_kind == "cuda", WIDTHS_OF[compute]
    module_names = set(modules)
    adapted = [weight for weight in architecture.weights if weight.name in module_names]
    adapters = trained_bytes(architecture, adapted, config, compute)
    base = frozen_bytes(architecture, config, compute, adapted)
    is_lora = config.method.kind is Method.lora
    trained_dtype = adapter_dtype(config.lora) if is_lora else "float32"
    flash = config.model.attention.startswith(FLASH_ATTENTION)  # it takes the bounds of rows
    whole = whole_tensors(architecture, config.lora) if is_lora else ()
    tunes_weights = config.method.kind in TUNES_WEIGHTS or bool(whole)
    autocast = (cuda or tunes_weights) and compute != "float32"  # as in training/trainer.py: bf16 or fp16
    setting = TrainingPass(
        r=max((rank_of(config.lora, name) for name in modules), default=0) if is_lora else 0,
        compute_bytes=width,
        adapter_bytes=WIDTHS_OF[trained_dtype] if is_lora else width,
        int8=config.quantization.mode is Quantization.int8,
        length=batch.length,
        padded=batch.padded,
        cuda=cuda,
        lora_dropout=is_lora and config.lora.dropout > 0,
        eager=is_eager(config.model.attention, architecture),
        autocast=autocast,
        quantized=config.quantization.mode in QUANTIZED,
        laid_out=batch.laid_out if padding_free and not flash else None,
        dora=is_lora and config.lora.dora,
    )
    backward = backward_of(architecture, config.method, modules, whole)
    activations = saved_bytes_per_token(architecture, module_names, setting, backward)
    choice = config.training.gradient_checkpointing
    selective = choice is Checkpointing.selective
    checkpointing = selective or choice is Checkpointing.on or (cuda and choice is Checkpointing.auto)
    outer = batch.tokens * (activations.outside + (activations.inputs if checkpointing else activations.layers))
    outer += batch.tokens * kept_attention_bytes(architecture, setting) if selective else 0.0
    outer += _rounded_weights(architecture, config, backward.first_layer, checkpointing)
    if is_lora:
        outer += expert_backward_bytes(architecture, config, batch.tokens, width, checkpointing)
    recomputed = batch.tokens * activations.layer * 2 if checkpointing else 0.0
    if is_lora:  # the gradient of one stack of experts' weights, before those of its adapter
        stacks = [target.elements for target in expert_targets(architecture, config.lora)]
        recomputed += width * max(stacks, default=0)
    hidden_gradient = batch.loss_tokens * architecture.hidden_size * FLOAT32_BYTES
    logits = _logits_tile(architecture, batch.loss_tokens, width, cuda) + hidden_gradient
    distillation = config.distillation
    if distillation.teacher is not None and distillation.mode is DistillationMode.offline:
        # Logits, their log-softmax and its gradient, of all learned tokens.
        logits += 3 * FLOAT32_BYTES * batch.loss_tokens * architecture.vocabulary_size
    # Before the first backward pass of a step the gradients of the last step are freed. From the second micro-batch of
    # a batch on, gradients of the earlier ones exist.
    accumulates = config.training.batch_size * batch.length > batch.tokens
    # Autocast multiplies by copies of A and B in the compute dtype. Backward needs each of them until it has made the
    # gradient, which is larger. With checkpointing they exist until forward ends, i.e. before the head's gradient; then
    # those of the recomputed layer alone.
    copied = autocast and trained_dtype != compute
    cast = adapters.trainable_parameters
    if whole:  # a table of embeddings is read in its own dtype
        cast -= sum(tensor.elements for tensor in whole if tensor.part == "embeddings")
    elif tunes_weights:  # of the base's own tensors, those of linear layers
        cast = sum(tensor.elements for tensor in tuned_tensors(architecture, config.method) if tensor.matrix)
    copies = width * cast if copied else 0
    copies_at_head, copies_in_layer = copies, copies if accumulates else 0
    if checkpointing:
        copies_at_head = max(copies - hidden_gradient, 0)
        copies_in_layer = copies // max(len(layers_of(architecture)), 1)
    # Every multiplication by a quantized weight makes a copy in the compute dtype and frees it again. On CUDA,
    # LLM.int8()'s forward multiplies integers, but its backward dequantizes, too.
    quantized = [weight for weight in architecture.weights if weight.quantizable]
    largest = max((weight.in_features * weight.out_features for weight in quantized), default=0)
    dequantized = largest * width if config.quantization.mode in QUANTIZED else 0
    if config.quantization.mode in INTEGER_MODES:  # in float32 first, from one byte for each code
        dequantized = largest * (FLOAT32_BYTES + (width if width < FLOAT32_BYTES else 1))
    heap = TUNED_HEAP if joined_heap else DEFAULT_HEAP
    slack = 0.0 if cuda else _heap_fragmentation(heap, architecture, batch, width, activations, logits)

    def moment(
        exact: int, activations: float, logits: float = 0.0, dequantized: float = 0.0, slack: float = 0.0
    ) -> Peak:
        needed = exact + activations + logits + dequantized
        return Peak(
            base=base,
            adapters=adapters,
            exact_bytes=exact,
            activation_bytes=round(activations),
            logits_bytes=round(logits),
            dequantization_bytes=round(dequantized),
            slack_bytes=round(slack),
            context_bytes=round(CUDA_CONTEXT_BYTES + CUDA_FRAGMENTS * needed) if cuda else 0,
            peak_bytes=round(needed + slack),
        )

    resting = base.total_bytes + adapters.adapter_bytes + adapters.optimizer_bytes
    with_gradients = resting + adapters.gradient_bytes
    moments = [
        moment(with_gradients if accumulates else resting, outer + copies_at_head, logits, slack=slack),
        moment(with_gradients, outer + recomputed + copies_in_layer, dequantized=dequantized, slack=slack),
    ]
    if cuda:
        moments.append(
            moment(
                with_gradients,
                temporaries_bytes(optimizer_on(device_kind, compute, config.training.optimizer), adapters),
            )
        )
    return max(moments, key=lambda peak: peak.peak_bytes)


@dataclass(frozen=True)
class _MicroBatch:
    """The largest micro-batch. ``tokens``: with padding, if there is any. ``length``: its longest row. ``laid_out``:
    rows times the longest row, divided by ``tokens``. ``loss_tokens`` get logits. ``padded``: its rows differ in
    length, so that attention gets a mask."""

    tokens: int
    length: int
    laid_out: float
    loss_tokens: int
    padded: bool


def _micro_batch(
    config: Config,
    architecture: Architecture,
    device_kind: str,
    compute: str,
    lengths: RowLengths | None,
    padding_free: bool,
) -> _MicroBatch:
    training = config.training
    rows, limit = training.micro_batch_size or training.batch_size, training.micro_batch_tokens
    length, padded = training.max_length, True
    length_multiple, logits_multiple = shape_multiples(compute, device_kind, length, architecture.positions)
    if isinstance(limit, int):  # as many rows as of the shortest ones: an upper bound
        shortest = lengths.shortest_tokens if lengths is not None else 1
        rows = min(rows, max(1, limit // (shortest if padding_free else _rounded_up(shortest, length_multiple))))
    real_tokens, loss_tokens = float(rows * length), float(rows * (length - 1))
    if lengths is not None:
        length = min(lengths.longest_tokens, length)
        padded = lengths.differ or length % length_multiple != 0
        batches = Workload.of(training, lengths).steps * math.ceil(training.batch_size / rows)
        loss_tokens = min(rows * (length - 1), lengths.max_loss_tokens(rows, batches))
        real_tokens = lengths.max_tokens(rows, batches)
    length = _rounded_up(length, length_multiple)
    tokens = _rounded_up(round(real_tokens), logits_multiple) if padding_free else rows * length
    laid_out = rows * length / tokens if padding_free else 1.0
    if isinstance(limit, int):
        tokens = min(tokens, limit)
        if padding_free and lengths is not None:  # rows of a micro-batch are similar in length
            laid_out = max(1.0, min(laid_out, lengths.largest_layout(training.batch_size, limit) / tokens))
    scored = _rounded_up(round(min(loss_tokens, tokens)), logits_multiple)
    return _MicroBatch(tokens, length, laid_out, scored, padded and not padding_free)


def expert_backward_bytes(
    architecture: Architecture, config: Config, tokens: int, width: int, checkpointing: bool
) -> float:
    """Return the bytes that the backward pass of ``lora.target_parameters`` needs: PEFT adds each adapter to all
    experts' weights, which makes a second stack of them, and each expert's inputs are saved. With checkpointing they
    exist for one layer at a time."""
    used = {entry.name: entry.per_token for entry in architecture.experts}
    sizes: dict[int | None, int] = {}
    for target in expert_targets(architecture, config.lora):
        routed = tokens * used[target.name.rpartition(".")[0]] * target.inputs
        number = layer_of(target.name)
        sizes[number] = sizes.get(number, 0) + target.elements + routed
    return float(width * (max(sizes.values(), default=0) if checkpointing else sum(sizes.values())))


def _rounded_weights(architecture: Architecture, config: Config, first_layer: int, checkpointing: bool) -> float:
    """Return the bytes of rounded weights that QAT's backward pass needs: a float32 copy of each linear layer's from
    the first trained decoder layer on. With checkpointing they exist for one layer at a time."""
    if config.training.qat.format is None:
        return 0.0
    sizes: dict[int | None, int] = {}
    for shape in architecture.weights:
        number = layer_of(shape.name)
        if number is None or number >= first_layer:
            sizes[number] = sizes.get(number, 0) + shape.in_features * shape.out_features
    return FLOAT32_BYTES * float(max(sizes.values()) if checkpointing else sum(sizes.values()))


def _rounded_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def _logits_tile(architecture: Architecture, loss_tokens: int, width: int, cuda: bool) -> float:
    """Return the bytes of one tile of logits, and of what its backward pass computes.

    A tile always has rows of the full tile width. On CUDA all of it takes memory; on a CPU only the pages that the
    vocabulary touches.
    """
    tokens = min(loss_tokens, HEAD_TOKENS)
    if cuda:
        return tokens * HEAD_VOCABULARY * width
    vocabulary = min(architecture.vocabulary_size, HEAD_VOCABULARY)
    softcap_bytes = FLOAT32_BYTES if traits_of(architecture.model_type).logit_softcapping else 0
    tile = tokens * vocabulary * (HEAD_BYTES_WITHOUT_TRITON + softcap_bytes + width)
    return tile + (tokens * PAGE_BYTES if vocabulary < HEAD_VOCABULARY else 0)


def _heap_fragmentation(
    heap: Heap, architecture: Architecture, batch: _MicroBatch, width: int, activations: SavedActivations, logits: float
) -> float:
    tile = min(batch.loss_tokens, HEAD_TOKENS) * min(architecture.vocabulary_size, HEAD_VOCABULARY)
    logits_in_heap = logits if tile * FLOAT32_BYTES < MAPPED_FROM_BYTES else 0.0
    kernels = heap.kernels_16_bit_bytes if width < FLOAT32_BYTES else 0.0
    in_layers = heap.gaps_layers * batch.tokens * activations.layers
    return heap.code_bytes + kernels + in_layers + heap.gaps_logits * logits_in_heap
