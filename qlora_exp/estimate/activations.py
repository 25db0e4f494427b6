"""What a training step keeps for its backward pass: bytes a token, layer by layer, counted from the layers' shapes.

The bookkeeping is that of Korthikanti et al. 2022 (*Reducing Activation Recomputation in Large Transformer Models*,
section 4), read again for adapters on a frozen base, operation by operation, from the code that runs: transformers 5
(modeling files of each architecture), PEFT 0.21 (``tuners/lora/layer.py``, ``bnb.py``), bitsandbytes 0.50
(``autograd/_functions.py``) and torch 2.13 (``scaled_dot_product_attention``). A frozen linear layer keeps nothing of
its own: its input is kept only where an adapter (for A's gradient) or LLM.int8() holds it.
``tests/plan/test_activations.py`` compares the count with what autograd really saves.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from qlora_exp.architecture.shapes import Architecture, Experts, OtherTensor, WeightShape
from qlora_exp.architecture.targets import feeds
from qlora_exp.estimate.traits import ArchitectureTraits, traits_of

FLOAT32 = 4
LAYER_PLACE = re.compile(r"^(?:.*?\.)?\d+\.")
DOWN_NAME = re.compile(r"(down|c_proj|4h_to_h|fc2|fc_out|w2|out_proj|dense)[^.]*$")


USUAL_HEAD, WIDEST_HEAD = 64, 128
"""Width of an attention head where nothing tells it, and the largest that keys and values of one head have."""


def is_eager(attention: str, architecture: Architecture) -> bool:
    """Whether ``model.attention`` gives this architecture attention written out in Python, which keeps the scores."""
    return attention == "eager" or (attention == "auto" and architecture.eager_alone)


@dataclass(frozen=True)
class Layer:
    """One decoder layer's widths, in elements a token."""

    hidden: int
    query: int
    key_value: int
    fused: int
    """Output of a fused q, k, v projection; 0 where they are separate."""
    intermediate: int
    gated: bool
    norms: int
    norm_upcasts: bool
    """Root-mean-square norms are written out in Python and keep a float32 copy of their input."""
    normed_heads: bool
    heads: int
    habits: ArchitectureTraits
    experts: tuple[int, int, bool] = (0, 0, False)
    """How many a token passes through, the intermediate width of one, and whether it has a gate."""

    @property
    def multi_query(self) -> bool:
        """One head of keys and values, fused with the queries."""
        return (
            self.habits.multi_query
            and bool(self.fused)
            and self.key_value < self.query
            and self.key_value <= WIDEST_HEAD
        )


@dataclass(frozen=True)
class SavedActivations:
    """Bytes a token. ``layers``: all decoder layers' together, without checkpointing; ``layer``: the largest one's;
    ``inputs``: what each layer keeps under checkpointing, together: its input, and what LLM.int8() holds, which
    bitsandbytes keeps out of autograd's sight; ``outside``: around the layers."""

    layers: float
    layer: float
    inputs: float
    outside: float


def saved_bytes_per_token(
    architecture: Architecture,
    adapted: Collection[str],
    *,
    r: int,
    compute_bytes: int,
    adapter_bytes: int,
    int8: bool,
    length: int,
    padded: bool,
    cuda: bool = False,
    lora_dropout: bool = False,
    eager: bool = False,
) -> SavedActivations:
    """What forward keeps for backward, per token of a batch whose rows are ``length`` long, padding included.

    ``adapted``: full names of the weights with adapters; ``compute_bytes``, ``adapter_bytes``: bytes an element of the
    two dtypes; ``padded``: rows differ in length, so that attention gets a mask; ``eager``: attention is written out.
    """
    setting = _Setting(r, compute_bytes, adapter_bytes, int8, length, padded, cuda, lora_dropout, eager)
    wanted = frozenset(adapted)
    sizes: list[float] = []
    width = architecture.hidden_size
    inputs = 0
    known: dict[tuple[int, tuple[bool, ...], bool], tuple[float, int]] = {}
    for kind, (layer, shapes) in zip(_kinds(architecture), layers_of(architecture), strict=True):
        key = (kind, tuple([shape.name in wanted for shape in shapes]), not sizes)
        if key not in known:
            kept = _layer_bytes(layer, shapes, key[1], setting, first=not sizes)
            known[key] = kept, compute_bytes * (width + sum(held for _, held in _held(layer, shapes, setting)))
        size, held = known[key]
        sizes.append(size)
        inputs += held
    outside = width * (FLOAT32 + 2 * compute_bytes)  # the last norm's input, the head's, the embeddings' output
    return SavedActivations(sum(sizes), max(sizes, default=0.0), inputs, outside)


@dataclass(frozen=True)
class _Setting:
    r: int
    compute_bytes: int
    adapter_bytes: int
    int8: bool
    length: int
    padded: bool
    cuda: bool
    lora_dropout: bool
    eager: bool


@lru_cache(maxsize=64)
def layers_of(architecture: Architecture) -> tuple[tuple[Layer, tuple[WeightShape, ...]], ...]:
    """Each decoder layer's widths, and its linear layers."""
    grouped: dict[str, list[WeightShape]] = {}
    for shape in architecture.weights:
        place = LAYER_PLACE.match(shape.name)
        if place:
            grouped.setdefault(place[0], []).append(shape)
    norms: dict[str, list[OtherTensor]] = {}
    for tensor in architecture.others:
        place = LAYER_PLACE.match(tensor.name)
        if place and not tensor.buffer:
            norms.setdefault(place[0], []).append(tensor)
    experts = {place[0]: one for one in architecture.experts if (place := LAYER_PLACE.match(one.name))}
    return tuple(
        (_layer(architecture, shapes, norms.get(place, []), experts.get(place)), tuple(shapes))
        for place, shapes in grouped.items()
        if any(shape.role != "other" for shape in shapes)
    )


@lru_cache(maxsize=64)
def _kinds(architecture: Architecture) -> tuple[int, ...]:
    """Each decoder layer's kind: layers of one kind differ in nothing but their place."""
    kinds: dict[tuple[Layer, tuple[WeightShape, ...]], int] = {}
    numbers = []
    for layer, shapes in layers_of(architecture):
        placeless = tuple(replace(shape, name=LAYER_PLACE.sub("", shape.name)) for shape in shapes)
        numbers.append(kinds.setdefault((layer, placeless), len(kinds)))
    return tuple(numbers)


def _layer(
    architecture: Architecture, shapes: Sequence[WeightShape], others: Sequence[OtherTensor], experts: Experts | None
) -> Layer:
    hidden = architecture.hidden_size
    attention = [shape for shape in shapes if shape.role == "attention"]
    entering = [shape for shape in attention if feeds(shape.name)]
    leaving = next((shape for shape in attention if not feeds(shape.name)), None)
    query = leaving.in_features if leaving else hidden
    fused = entering[0].out_features if len(entering) == 1 else 0
    key_value = max(0, sum(shape.out_features for shape in entering) - query) // 2
    down = [shape for shape in shapes if _leads_down(shape, hidden)]
    intermediate = sum(shape.in_features for shape in down)
    up = sum(shape.out_features for shape in shapes if shape.role == "mlp" and shape not in down)
    weights = [other for other in others if other.name.endswith("weight")]
    of_heads = [other for other in weights if feeds(other.name)]
    sizes = {other.name.removesuffix("weight"): other.elements for other in weights}
    biases = [other for other in others if sizes.get(other.name.removesuffix("bias")) == other.elements]
    habits = traits_of(architecture.model_type)
    return Layer(
        hidden=hidden,
        query=query,
        key_value=key_value,
        fused=fused,
        intermediate=intermediate,
        gated=up >= 2 * intermediate > 0,
        norms=habits.unweighted_norms
        or max(1, sum(other.elements == hidden for other in weights if other not in of_heads)),
        norm_upcasts=not biases,
        normed_heads=bool(of_heads),
        heads=architecture.heads or max(1, query // USUAL_HEAD),
        habits=habits,
        experts=(experts.per_token, experts.intermediate, experts.gated) if experts else (0, 0, False),
    )


def _leads_down(shape: WeightShape, hidden: int) -> bool:
    return shape.role == "mlp" and shape.out_features == hidden and bool(DOWN_NAME.search(shape.name))


def _layer_bytes(
    layer: Layer, shapes: Sequence[WeightShape], adapted: Sequence[bool], setting: _Setting, first: bool
) -> float:
    """Bytes a token. The first layer's input needs no gradient, so its first norm keeps nothing; neither does its
    attention before an adapter."""
    attention_adapted = any(flag and shape.role == "attention" for shape, flag in zip(shapes, adapted, strict=True))
    kept = _norms(layer, setting) + _feed_forward(layer, setting) + _adapters(layer, shapes, adapted, setting)
    if first:
        kept -= _norm_bytes(layer, setting)
    if not first or attention_adapted:
        kept += _attention(layer, setting)
    return kept


def _norm_bytes(layer: Layer, setting: _Setting) -> float:
    return layer.habits.norm_copies * layer.hidden * (FLOAT32 if layer.norm_upcasts else setting.compute_bytes)


def _norms(layer: Layer, setting: _Setting) -> float:
    """Each norm's input (norms that read the same tensor: once), and dropout's noise on both branches."""
    count = 1 if layer.habits.parallel_residual else layer.norms
    noise = 2 * layer.hidden * (1 if setting.cuda else setting.compute_bytes) if layer.habits.dropout else 0
    return count * _norm_bytes(layer, setting) + noise


def _attention(layer: Layer, setting: _Setting) -> float:
    """Queries, keys, values, output, the scores' logarithmic sums, and the mask as numbers (a copy a layer). With a
    mask, shared keys and values are repeated for each head. A fused projection is kept whole by its values' view."""
    width, query, key_value = setting.compute_bytes, layer.query, layer.key_value
    normed = (query + key_value) * FLOAT32 if layer.normed_heads and not layer.fused else 0
    if setting.eager:
        wide = 2 * query * (FLOAT32 - width) if layer.habits.qk_in_float32 else 0
        return 3 * query * width + wide + normed + _score_bytes(layer, setting) * layer.heads * setting.length
    if not setting.cuda and (layer.habits.attention_dropout or layer.multi_query):
        scores = 3 if layer.habits.attention_dropout else 1
        return FLOAT32 * (3 * query + scores * layer.heads * setting.length)
    repeated = setting.padded and 0 < key_value < query
    if repeated:
        three = 3 * query
    elif layer.fused:
        three = layer.fused + (query + key_value if layer.habits.rotary else 0)
    else:
        three = query + 2 * key_value
    mask = setting.length * width if setting.padded else 0
    return (three + query) * width + normed + mask + FLOAT32 * layer.heads


def _score_bytes(layer: Layer, setting: _Setting) -> int:
    """A score of attention that is written out. Where the softmax is computed in float32, what multiplies the values is
    a 16-bit copy of it; with dropout it is what that left, and the noise is kept, too."""
    width, habits = setting.compute_bytes, layer.habits
    softmax = width if habits.softmax_in_compute_dtype else FLOAT32
    left = width if softmax > width else 0
    if habits.attention_dropout:
        left = width + (1 if setting.cuda else width)
    return softmax + left + (width if habits.logit_softcapping else 0)


def _feed_forward(layer: Layer, setting: _Setting) -> float:
    """Gated: the gate before and after its activation, and what it multiplies; else what the activation keeps. Of the
    experts that a token passes through the same, and their outputs, which the router's weights multiply."""
    copies = layer.habits.activation_copies
    per_token, width, gated = layer.experts
    routed = per_token * (width * (layer.habits.expert_copies if gated else copies) + layer.hidden)
    shared = layer.hidden if layer.habits.gates_shared else 0
    mask = layer.intermediate if layer.habits.activation_mask else 0
    return setting.compute_bytes * (layer.intermediate * (3 if layer.gated else copies) + routed + shared) + mask


def _adapters(layer: Layer, shapes: Sequence[WeightShape], adapted: Sequence[bool], setting: _Setting) -> float:
    """Inputs kept for A's gradients, and A's outputs for B's. In one dtype, layers that read the same tensor share it,
    and what attention or ReLU keeps anyway isn't kept twice; where the adapter's dtype differs, each layer casts a copy
    of its own. LLM.int8() holds its input whether it is adapted or not."""
    same_dtype = setting.compute_bytes == setting.adapter_bytes
    per_layer, shared = 0.0, _held(layer, shapes, setting)
    for shape, flag in zip(shapes, adapted, strict=True):
        if flag:
            per_layer += setting.r * setting.adapter_bytes
            per_layer += 0 if same_dtype else shape.in_features * setting.adapter_bytes
            per_layer += 2 * shape.in_features * setting.adapter_bytes if setting.lora_dropout else 0
        if flag and same_dtype:
            shared.add((_read_by(layer, shape), shape.in_features))
    free = {"output"} if _output_is_kept(layer, setting) else set()
    if layer.habits.saves_output:
        free.add("down")
    return per_layer + setting.compute_bytes * sum(width for place, width in shared if place not in free)


def _held(layer: Layer, shapes: Sequence[WeightShape], setting: _Setting) -> set[tuple[str, int]]:
    """The inputs that LLM.int8() holds, as what is read and its width: as attributes of its function's context
    (``MatMul8bitLt``, ``MatMul8bitFp``), not as saved tensors, so that checkpointing doesn't let go of them."""
    quantized = (shape for shape in shapes if setting.int8 and shape.quantizable)
    return {(_read_by(layer, shape), shape.in_features) for shape in quantized}


def _read_by(layer: Layer, shape: WeightShape) -> str:
    """Which tensor a linear layer reads: the normed input, attention's output, or the activation's."""
    if shape.role == "attention":
        return "input" if feeds(shape.name) else "output"
    if _leads_down(shape, layer.hidden):
        return "down"
    return "input" if layer.habits.parallel_residual and layer.norms == 1 else "middle"


def _output_is_kept(layer: Layer, setting: _Setting) -> bool:
    """Whether the output projection reads the very tensor that attention keeps; a fused projection's views make it lie
    otherwise in memory, and it is copied."""
    if setting.eager:
        return False
    copied = layer.fused or layer.habits.attention_dropout or layer.multi_query or layer.habits.partial_rope
    return setting.cuda or not copied
