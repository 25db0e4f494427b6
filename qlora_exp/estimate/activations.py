"""Bytes per token that a training step saves for its backward pass, layer by layer, from the layers' shapes.

The count follows Korthikanti et al. 2022 (*Reducing Activation Recomputation in Large Transformer Models*, section 4),
adapted to adapters on a frozen base. It goes operation by operation through the code that runs: transformers 5
(modeling files of each architecture), PEFT 0.21 (``tuners/lora/layer.py``, ``bnb.py``), bitsandbytes 0.50
(``autograd/_functions.py``) and torch 2.13 (``scaled_dot_product_attention``). A frozen linear layer saves no input for
itself. The input is saved only where an adapter (for A's gradient) or LLM.int8() holds it.
``tests/plan/test_activations.py`` compares the count with the tensors that autograd saves.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from qlora_exp.architecture.shapes import Architecture, Experts, OtherTensor, WeightShape
from qlora_exp.architecture.targets import qkv_of_name
from qlora_exp.estimate.backward import FLOAT32_BYTES, WHOLE, Backward, SavedActivations, Start, is_down_projection

LAYER_PREFIX = re.compile(r"^(?:.*?\.)?\d+\.")
DEFAULT_HEAD_WIDTH, MAX_HEAD_WIDTH = 64, 128
"""The head width assumed if the architecture doesn't give one, and the largest width of one head's keys and values."""


@dataclass(frozen=True)
class ArchitectureTraits:
    """What an architecture's code does that the shapes of its layers don't show."""

    rotary: bool = True
    """Queries and keys are rotated (RoPE): new tensors in addition to the projections' outputs."""
    parallel_residual: bool = False
    """Attention and feed-forward read the same residual stream in parallel."""
    activation_copies: int = 1
    """Tensors of the intermediate width that the activation saves; 4 for ``gelu_new``, written in Python."""
    activation_in_float32: bool = False
    """The activation calls ``pow``, ``square`` or ``expm1``. CUDA's autocast computes them in float32, so the
    activation's output is float32."""
    activation_mask: bool = False
    """The activation saves which of its inputs are positive, one byte each (xIELU)."""
    saves_output: bool = False
    """The activation saves its output (ReLU), which is also the next layer's input."""
    dropout: bool = False
    """The published configurations have dropout on both branches."""
    attention_dropout: bool = False
    """On CPUs, attention with dropout takes torch's math path, which saves the scores."""
    logit_softcapping: bool = False
    """Attention scores and logits go through tanh (Gemma 2), which saves its output."""
    softmax_in_compute_dtype: bool = False
    """Eager attention computes the softmax in the compute dtype, not in float32."""
    softmax_names_dtype: bool = False
    """It names the dtype, so CUDA's autocast doesn't choose float32."""
    qk_in_float32: bool = False
    """Eager attention multiplies queries and keys in float32."""
    partial_rope: bool = False
    """Only a part of each head is rotated, so queries are concatenated anew. Attention's output has their memory
    layout, and is copied on CPUs before the projection reads it."""
    unweighted_norms: int = 0
    """The number of norms without weights, which shapes don't show."""
    norm_copies: int = 1
    """Copies of its input that a norm saves; 2 for a layer norm written in Python."""
    expert_copies: int = 3
    """Tensors of the intermediate width that a gated expert saves."""
    gates_shared: bool = False
    """The shared expert's output is multiplied by its own gate, so it is saved."""
    norm_casts_back: bool = False
    """Under autocast, the layer norm's code switches autocast off and computes in the compute dtype."""
    multi_query: bool = False
    """All query heads may share one head of keys and values (Falcon's ``multi_query``). CPUs take the math path for it,
    too."""


TRAITS = {
    "apertus": ArchitectureTraits(activation_copies=3, activation_in_float32=True, activation_mask=True),
    "arcee": ArchitectureTraits(activation_in_float32=True),
    "biogpt": ArchitectureTraits(rotary=False, dropout=True, attention_dropout=True),
    "codegen": ArchitectureTraits(
        parallel_residual=True, activation_copies=4, activation_in_float32=True, qk_in_float32=True
    ),
    "cohere": ArchitectureTraits(parallel_residual=True, norm_copies=2),
    "cohere2": ArchitectureTraits(parallel_residual=True, norm_copies=2),
    "falcon": ArchitectureTraits(parallel_residual=True, multi_query=True),
    "gemma2": ArchitectureTraits(logit_softcapping=True),
    "glm": ArchitectureTraits(partial_rope=True),
    "glm4": ArchitectureTraits(partial_rope=True),
    "glm4_moe": ArchitectureTraits(partial_rope=True),
    "gpt2": ArchitectureTraits(
        rotary=False,
        activation_copies=4,
        activation_in_float32=True,
        dropout=True,
        attention_dropout=True,
        softmax_in_compute_dtype=True,
    ),
    "gpt_bigcode": ArchitectureTraits(rotary=False, dropout=True, attention_dropout=True),
    "gpt_neo": ArchitectureTraits(rotary=False, activation_copies=4, activation_in_float32=True, qk_in_float32=True),
    "gpt_neox": ArchitectureTraits(parallel_residual=True),
    "gpt_oss": ArchitectureTraits(expert_copies=6, softmax_in_compute_dtype=True, softmax_names_dtype=True),
    "gptj": ArchitectureTraits(
        parallel_residual=True, activation_copies=4, activation_in_float32=True, qk_in_float32=True
    ),
    "nemotron": ArchitectureTraits(activation_in_float32=True, partial_rope=True, norm_casts_back=True),
    "olmo": ArchitectureTraits(unweighted_norms=2),
    "opt": ArchitectureTraits(rotary=False, saves_output=True, dropout=True),
    "persimmon": ArchitectureTraits(activation_in_float32=True),
    "phi": ArchitectureTraits(
        parallel_residual=True, activation_copies=4, activation_in_float32=True, partial_rope=True
    ),
    "qwen2_moe": ArchitectureTraits(gates_shared=True),
    "seed_oss": ArchitectureTraits(dropout=True, attention_dropout=True),
    "stablelm": ArchitectureTraits(partial_rope=True),
    "vaultgemma": ArchitectureTraits(logit_softcapping=True),
    "xglm": ArchitectureTraits(rotary=False, dropout=True, attention_dropout=True),
}
"""Other architectures are assumed to be built like Llama. What shapes do show is read from them: gates, fused
projections, norms of queries and keys, the number and kind of norms."""


def traits_of(model_type: str) -> ArchitectureTraits:
    return TRAITS.get(model_type, ArchitectureTraits())


def is_eager(attention: str, architecture: Architecture) -> bool:
    """Return whether ``model.attention`` gives this architecture eager attention, which saves the scores."""
    return attention == "eager" or (attention == "auto" and architecture.eager_alone)


@dataclass(frozen=True)
class Layer:
    """The widths of one decoder layer, in elements per token."""

    hidden: int
    query: int
    key_value: int
    fused: int
    """Output width of a fused q, k, v projection; 0 if the projections are separate."""
    intermediate: int
    gated: bool
    norms: int
    norm_upcasts: bool
    """The RMS norms are written in Python and save a float32 copy of their input."""
    normed_heads: bool
    heads: int
    quantizable: bool
    traits: ArchitectureTraits
    experts: tuple[int, int, bool] = (0, 0, False)
    """Experts per token, the intermediate width of one expert, and whether it has a gate."""

    @property
    def multi_query(self) -> bool:
        """Whether all query heads share one head of keys and values, fused with the queries."""
        return (
            self.traits.multi_query
            and bool(self.fused)
            and self.key_value < self.query
            and self.key_value <= MAX_HEAD_WIDTH
        )


@dataclass(frozen=True)
class TrainingPass:
    """What a training's passes have in common besides the architecture. ``compute_bytes``, ``adapter_bytes``: bytes per
    element of the two dtypes."""

    r: int
    compute_bytes: int
    adapter_bytes: int
    int8: bool
    length: int
    padded: bool
    """Rows differ in length, so attention gets a mask."""
    cuda: bool = False
    lora_dropout: bool = False
    eager: bool = False
    """Attention is eager."""
    autocast: bool = False
    """Forward runs under CUDA's autocast to the compute dtype."""
    quantized: bool = False
    """The base's linear layers are those of bitsandbytes."""
    laid_out: float | None = None
    """Without padding: rows times the longest row, divided by the batch's tokens. Attention alone computes so many."""
    dora: bool = False
    trained_norms: bool = False
    """Weights of norms are trained, in float32: under autocast these norms give float32."""

    @property
    def low_rank_bytes(self) -> int:
        """Bytes per element of A's output. Autocast multiplies in the compute dtype."""
        return self.compute_bytes if self.autocast else self.adapter_bytes

    @property
    def dropout_mask_bytes(self) -> int:
        """CPUs save a mask in the dtype of what is dropped."""
        return 1 if self.cuda or self.autocast else self.compute_bytes


def saved_bytes_per_token(
    architecture: Architecture, adapted: Collection[str], setting: TrainingPass, backward: Backward = WHOLE
) -> SavedActivations:
    """Return what forward saves for backward, per token (padding included) of a batch with rows of ``setting.length``
    tokens. ``adapted``: full names of the weights with adapters."""
    adapted_names = frozenset(adapted)
    sizes: list[float] = []
    inputs, width = 0, architecture.hidden_size
    bytes_by_layer: dict[tuple[int, tuple[bool, ...], Start | None, bool], tuple[float, int]] = {}
    with_norms = {number for number, _ in backward.trained_norms}
    plain, stream_bytes = setting, backward.stream_bytes(setting.compute_bytes, setting.autocast)
    for number, (kind, (layer, shapes)) in enumerate(zip(_kinds(architecture), layers_of(architecture), strict=True)):
        if number < backward.first_layer:
            continue
        start = Start.INPUT if sizes else backward.start
        setting = replace(plain, trained_norms=True) if number in with_norms else plain
        key = (kind, tuple([shape.name in adapted_names for shape in shapes]), start, setting.trained_norms)
        if key not in bytes_by_layer:
            in_float32 = _float32_inputs(layer, setting)
            held = _bytes_of_inputs(_held_by_int8(layer, shapes, setting), in_float32, setting)
            # bitsandbytes' down projection adds float32 to the residual stream if it reads float32.
            added = _is_quantized(layer, setting) and "down" in in_float32
            residual = FLOAT32_BYTES if added else stream_bytes
            layer_bytes = _layer_bytes(layer, shapes, key[1], setting, start)
            bytes_by_layer[key] = layer_bytes, width * residual + held
        size, input_bytes = bytes_by_layer[key]
        sizes.append(size + backward.extra_bytes(number, width, setting.compute_bytes, setting.autocast))
        inputs += input_bytes
    # The last norm's input, the head's, the embeddings' output.
    outside = width * (FLOAT32_BYTES + stream_bytes + plain.compute_bytes) + backward.last_norm * stream_bytes
    return SavedActivations(sum(sizes), max(sizes, default=0.0), inputs, outside)


@lru_cache(maxsize=64)
def layers_of(architecture: Architecture) -> tuple[tuple[Layer, tuple[WeightShape, ...]], ...]:
    """Return the widths and the linear layers of each decoder layer."""
    grouped: dict[str, list[WeightShape]] = {}
    for shape in architecture.weights:
        prefix = LAYER_PREFIX.match(shape.name)
        if prefix:
            grouped.setdefault(prefix[0], []).append(shape)
    norms: dict[str, list[OtherTensor]] = {}
    for tensor in architecture.others:
        prefix = LAYER_PREFIX.match(tensor.name)
        if prefix and not tensor.buffer:
            norms.setdefault(prefix[0], []).append(tensor)
    experts = {prefix[0]: entry for entry in architecture.experts if (prefix := LAYER_PREFIX.match(entry.name))}
    return tuple(
        (_layer(architecture, shapes, norms.get(prefix, []), experts.get(prefix)), tuple(shapes))
        for prefix, shapes in grouped.items()
        if any(shape.role != "other" for shape in shapes)
    )


@lru_cache(maxsize=64)
def _kinds(architecture: Architecture) -> tuple[int, ...]:
    """Return each decoder layer's kind: layers of one kind differ only in their index."""
    kinds: dict[tuple[Layer, tuple[WeightShape, ...]], int] = {}
    numbers = []
    for layer, shapes in layers_of(architecture):
        shapes_without_index = tuple(replace(shape, name=LAYER_PREFIX.sub("", shape.name)) for shape in shapes)
        numbers.append(kinds.setdefault((layer, shapes_without_index), len(kinds)))
    return tuple(numbers)


def _layer(
    architecture: Architecture, shapes: Sequence[WeightShape], others: Sequence[OtherTensor], experts: Experts | None
) -> Layer:
    hidden = architecture.hidden_size
    attention = [shape for shape in shapes if shape.role == "attention"]
    inputs = [shape for shape in attention if qkv_of_name(shape.name)]
    output = next((shape for shape in attention if not qkv_of_name(shape.name)), None)
    query = output.in_features if output else hidden
    fused = inputs[0].out_features if len(inputs) == 1 else 0
    # The width of q, k and v together, minus that of q; k and v are equally wide.
    key_value = max(0, sum(shape.out_features for shape in inputs) - query) // 2
    down = [shape for shape in shapes if is_down_projection(shape, hidden)]
    intermediate = sum(shape.in_features for shape in down)
    up = sum(shape.out_features for shape in shapes if shape.role == "mlp" and shape not in down)
    norm_weights = [tensor for tensor in others if tensor.name.endswith("weight")]
    head_norms = [tensor for tensor in norm_weights if qkv_of_name(tensor.name)]
    sizes = {tensor.name.removesuffix("weight"): tensor.elements for tensor in norm_weights}
    biases = [tensor for tensor in others if sizes.get(tensor.name.removesuffix("bias")) == tensor.elements]
    traits = traits_of(architecture.model_type)
    return Layer(
        hidden=hidden,
        query=query,
        key_value=key_value,
        fused=fused,
        intermediate=intermediate,
        # A gated layer has two projections of the intermediate width: gate and up.
        gated=up >= 2 * intermediate > 0,
        norms=traits.unweighted_norms
        or max(1, sum(tensor.elements == hidden for tensor in norm_weights if tensor not in head_norms)),
        norm_upcasts=not biases,
        normed_heads=bool(head_norms),
        heads=architecture.heads or max(1, query // DEFAULT_HEAD_WIDTH),
        quantizable=any(shape.quantizable for shape in shapes),
        traits=traits,
        experts=(experts.per_token, experts.intermediate, experts.gated) if experts else (0, 0, False),
    )


def _layer_bytes(
    layer: Layer, shapes: Sequence[WeightShape], adapted: Sequence[bool], setting: TrainingPass, start: Start | None
) -> float:
    """Return the layer's bytes per token. Without ``start``, its attention saves nothing unless it has an adapter."""
    if start is None:
        attention_adapted = any(flag and shape.role == "attention" for shape, flag in zip(shapes, adapted, strict=True))
        start = Start.ATTENTION if attention_adapted else Start.RESIDUAL
    if start > Start.RESIDUAL and not _saves_by_parts(layer):
        start = Start.RESIDUAL
    size = _adapters(layer, shapes, adapted, setting)
    if start <= Start.RESIDUAL:
        size += _norms(layer, setting, first=start is not Start.INPUT)
    if start <= Start.MLP:
        size += _feed_forward(layer, setting)
    if start <= Start.ATTENTION:
        size += _attention(layer, setting)
    return size


def _saves_by_parts(layer: Layer) -> bool:
    """Return whether attention and the MLP follow one another, each behind its own norm alone."""
    traits = layer.traits
    return layer.norms == 2 and not (
        traits.parallel_residual or traits.dropout or traits.saves_output or any(layer.experts)
    )


def _norm_bytes(layer: Layer, setting: TrainingPass) -> float:
    in_float32 = layer.norm_upcasts or _norms_give_float32(layer, setting)
    return layer.traits.norm_copies * layer.hidden * (FLOAT32_BYTES if in_float32 else setting.compute_bytes)


def _norms_give_float32(layer: Layer, setting: TrainingPass) -> bool:
    """CUDA's autocast computes ``layer_norm`` in float32. RMS norms are written in Python, and give the dtype of the
    residual stream."""
    if not setting.autocast or layer.traits.norm_casts_back:
        return False
    return not layer.norm_upcasts or (layer.traits.activation_in_float32 and _is_quantized(layer, setting))


def _projections_give_float32(layer: Layer, setting: TrainingPass) -> bool:
    """Whether the projections after a norm do: layers of bitsandbytes return the dtype of their input."""
    return _is_quantized(layer, setting) and _norms_give_float32(layer, setting)


def _float32_inputs(layer: Layer, setting: TrainingPass) -> set[str]:
    """Return which tensors that linear layers read are float32 under autocast, named as by :func:`_input_of`."""
    trained = setting.autocast and setting.trained_norms and not layer.traits.norm_casts_back
    after_norm = {"input", "middle"} if trained or _norms_give_float32(layer, setting) else set()
    in_float32 = setting.autocast and layer.traits.activation_in_float32
    return after_norm | ({"down"} if in_float32 or _projections_give_float32(layer, setting) else set())


def _is_quantized(layer: Layer | WeightShape, setting: TrainingPass) -> bool:
    return setting.quantized and layer.quantizable


def _norms(layer: Layer, setting: TrainingPass, first: bool) -> float:
    """Each norm's input (once, if several norms read the same tensor), and the dropout masks of both branches.

    The first layer's input needs no gradient, so the norms that read it save nothing.
    """
    parallel = layer.traits.parallel_residual
    # Each layer norm casts its own copy of a 16-bit residual stream.
    copied = _norms_give_float32(layer, setting) and not _projections_give_float32(layer, setting)
    of_input = layer.norms if parallel and copied else 1
    count = (of_input if parallel else layer.norms) - (of_input if first else 0)
    dropout_masks = 2 * layer.hidden * setting.dropout_mask_bytes if layer.traits.dropout else 0
    return count * _norm_bytes(layer, setting) + dropout_masks


def _attention(layer: Layer, setting: TrainingPass) -> float:
    """Queries, keys, values, output, the log-sum-exp of the scores, and the mask as numbers (one copy per layer).

    Without padding, they are saved twice: as real tokens, and laid out as rows times the longest row for attention.

    With a mask, keys and values that several heads share are repeated for each head. The view of the values keeps all
    of a fused projection's output in memory.
    """
    width, query, key_value = setting.compute_bytes, layer.query, layer.key_value
    normed = (query + key_value) * FLOAT32_BYTES if layer.normed_heads and not layer.fused else 0
    if layer.normed_heads and layer.fused and _norms_give_float32(layer, setting):
        normed = FLOAT32_BYTES * (layer.fused if _projections_give_float32(layer, setting) else query + key_value)
    if setting.eager:
        in_float32 = layer.traits.qk_in_float32 and not setting.autocast
        upcast = 2 * query * (FLOAT32_BYTES - width) if in_float32 else 0
        return 3 * query * width + upcast + normed + _score_bytes(layer, setting) * layer.heads * setting.length
    laid_out = setting.laid_out or 1.0
    source = FLOAT32_BYTES if _projections_give_float32(layer, setting) else width
    if not setting.cuda and (layer.traits.attention_dropout or layer.multi_query):
        scores = 3 if layer.traits.attention_dropout else 1
        copied = 3 * query * source if laid_out > 1 else 0
        return laid_out * FLOAT32_BYTES * (3 * query + scores * layer.heads * setting.length) + copied
    repeated = setting.padded and 0 < key_value < query
    if repeated:
        qkv = 3 * query
    elif layer.fused and not _projections_give_float32(layer, setting):
        qkv = layer.fused + (query + key_value if layer.traits.rotary else 0)
    else:
        qkv = query + 2 * key_value
    if laid_out > 1:  # torch's ``index_copy`` keeps what it copies
        if setting.cuda and width == FLOAT32_BYTES and 0 < key_value < query:  # models/attention.py repeats them then
            key_value, qkv = query, 3 * query
        copies = (2 * query + 2 * key_value) * width + FLOAT32_BYTES * layer.heads
        return laid_out * copies + qkv * source + normed
    mask = setting.length * width if setting.padded else 0
    return (qkv + query) * width + normed + mask + FLOAT32_BYTES * layer.heads


def _score_bytes(layer: Layer, setting: TrainingPass) -> int:
    """Bytes per score of eager attention.

    If the softmax is computed in float32, a 16-bit copy of it multiplies the values. With dropout the product uses the
    softmax after dropout, and the dropout mask is saved, too.
    """
    width, traits = setting.compute_bytes, layer.traits
    narrow = traits.softmax_in_compute_dtype and (traits.softmax_names_dtype or not setting.autocast)
    softmax = width if narrow else FLOAT32_BYTES
    multiplier = width if softmax > width else 0
    if traits.attention_dropout:
        multiplier = width + setting.dropout_mask_bytes
    return softmax + multiplier + (width if traits.logit_softcapping else 0)


def _feed_forward(layer: Layer, setting: TrainingPass) -> float:
    """Bytes per token of the feed-forward layers.

    With a gate: the gate before and after its activation, and the tensor that it multiplies. Without: what the
    activation saves. Each expert of a token saves the same, and its output, which the router's weight multiplies.
    """
    copies = layer.traits.activation_copies
    per_token, expert_width, gated = layer.experts
    routed = per_token * (expert_width * (layer.traits.expert_copies if gated else copies) + layer.hidden)
    shared = layer.hidden if layer.traits.gates_shared else 0
    mask = layer.intermediate if layer.traits.activation_mask else 0
    width = FLOAT32_BYTES if _projections_give_float32(layer, setting) else setting.compute_bytes
    activation = width * (3 if layer.gated else copies)
    if setting.autocast and layer.traits.activation_in_float32:
        float32_copies = max(copies - 1, 1 if width < FLOAT32_BYTES else 0)
        activation = width + FLOAT32_BYTES * float32_copies
    return layer.intermediate * activation + setting.compute_bytes * (routed + shared) + mask


def _adapters(layer: Layer, shapes: Sequence[WeightShape], adapted: Sequence[bool], setting: TrainingPass) -> float:
    """Inputs saved for A's gradients, and A's outputs saved for B's gradients.

    In one dtype, layers that read the same tensor share it, and a tensor that attention or ReLU saves anyway isn't
    counted twice. If the adapter's dtype differs, each layer casts its own copy. LLM.int8() holds its input with or
    without an adapter.

    Under autocast, adapters read a 16-bit input as it is (``autocast_casts_inputs`` in models/adapters.py). With DoRA,
    PEFT casts the input of layers that aren't bitsandbytes' to the adapter's dtype. Autocast casts what is float32 to
    the compute dtype, once for each layer: it remembers the copies of weights alone.
    """
    same_dtype = setting.compute_bytes == setting.adapter_bytes
    in_float32 = _float32_inputs(layer, setting)
    per_layer, shared = 0.0, _held_by_int8(layer, shapes, setting)
    for shape, flag in zip(shapes, adapted, strict=True):
        if not flag:
            continue
        source, width = _input_of(layer, shape), shape.in_features
        per_layer += setting.r * setting.low_rank_bytes
        if setting.autocast and setting.lora_dropout:
            per_layer += width * (setting.dropout_mask_bytes + setting.compute_bytes)
        elif setting.autocast and (source in in_float32 or _cast_by_peft(shape, setting)):
            per_layer += width * setting.compute_bytes
        elif setting.autocast or same_dtype:
            shared.add((source, width))
        else:
            per_layer += width * setting.adapter_bytes
        if setting.lora_dropout and not setting.autocast:
            per_layer += 2 * width * setting.adapter_bytes
    already_saved = {"output"} if _output_is_saved(layer, setting) else set()
    if layer.traits.saves_output:
        already_saved.add("down")
    return per_layer + _bytes_of_inputs({read for read in shared if read[0] not in already_saved}, in_float32, setting)


def _cast_by_peft(shape: WeightShape, setting: TrainingPass) -> bool:
    """Return whether PEFT casts the layer's input to the adapter's dtype, though autocast is on."""
    same_dtype = setting.compute_bytes == setting.adapter_bytes
    return setting.dora and not (same_dtype or _is_quantized(shape, setting))


def _bytes_of_inputs(inputs: set[tuple[str, int]], in_float32: set[str], setting: TrainingPass) -> int:
    return sum(width * (FLOAT32_BYTES if name in in_float32 else setting.compute_bytes) for name, width in inputs)


def _held_by_int8(layer: Layer, shapes: Sequence[WeightShape], setting: TrainingPass) -> set[tuple[str, int]]:
    """Return the inputs that LLM.int8() holds, as (tensor that is read, width).

    The autograd functions (``MatMul8bitLt``, ``MatMul8bitFp``) hold them as attributes of their context, not as saved
    tensors, so checkpointing doesn't free them.
    """
    quantized = (shape for shape in shapes if setting.int8 and shape.quantizable)
    return {(_input_of(layer, shape), shape.in_features) for shape in quantized}


def _input_of(layer: Layer, shape: WeightShape) -> str:
    """Return which tensor a linear layer reads: ``input`` or ``middle`` (after the first or second norm), ``output``
    (of attention) or ``down`` (of the activation)."""
    if shape.role == "attention":
        return "input" if qkv_of_name(shape.name) else "output"
    if is_down_projection(shape, layer.hidden):
        return "down"
    return "input" if layer.traits.parallel_residual and layer.norms == 1 else "middle"


def _output_is_saved(layer: Layer, setting: TrainingPass) -> bool:
    """Return whether the output projection reads the same tensor that attention saves. Without padding it reads a copy
    of the real tokens. A fused projection's views give
    attention's output another memory layout, so it is copied."""
    if setting.eager or (setting.laid_out or 1.0) > 1:
        return False
    copied = layer.fused or layer.traits.attention_dropout or layer.multi_query or layer.traits.partial_rope
    return setting.cuda or not copied
