"""How far a training's backward pass goes, from the head to the first thing that is trained, and what is saved for
it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum

from qlora_exp.architecture.shapes import Architecture, WeightShape
from qlora_exp.architecture.tuned_weights import (
    TunedTensor,
    bottleneck_places,
    first_tuned_layer,
    layer_of,
    tuned_tensors,
)
from qlora_exp.config.enums import Method
from qlora_exp.config.schema import MethodConfig

FLOAT32_BYTES = 4
DOWN_NAME = re.compile(r"(down|c_proj|4h_to_h|fc2|fc_out|w2|out_proj|dense)[^.]*$")


@dataclass(frozen=True)
class SavedActivations:
    """Bytes per token.

    ``layers``: all decoder layers together, without checkpointing. ``layer``: the largest layer alone. ``inputs``: what
    all layers save under checkpointing: their inputs, and what LLM.int8() holds outside autograd. ``outside``: the
    tensors around the decoder layers.
    """

    layers: float
    layer: float
    inputs: float
    outside: float


class Start(IntEnum):
    """Where in a decoder layer the backward pass ends. What forward computes before that place saves nothing."""

    INPUT = 0
    """The layer's input has a gradient."""
    ATTENTION = 1
    """The first norm or a projection of attention is trained."""
    RESIDUAL = 2
    """Only attention's output has a gradient."""
    MLP = 3
    """The second norm or a first projection of the MLP is trained."""
    DOWN = 4
    """The MLP's last projection is trained."""
    END = 5
    """Only the layer's output has a gradient."""


@dataclass(frozen=True)
class Backward:
    """How far the backward pass goes, and what it needs beyond the layers' own gradients.

    ``first_layer``: the first decoder layer that is trained; those before it save nothing. ``start``: where it ends in
    that layer; ``None``: at attention if that has an adapter, otherwise behind it. ``trained_norms``: by decoder layer,
    widths of norms whose weights are trained: each saves its normalized input, too. ``last_norm``: the same of the norm
    behind all layers. ``bottlenecks``: by decoder layer, the number of bottleneck adapters; each saves its input and
    its inner activations (``bottleneck_size``, twice). ``float32_stream``: under autocast, the residual stream is
    float32, because the embeddings are trained.
    """

    first_layer: int = 0
    start: Start | None = None
    trained_norms: tuple[tuple[int, int], ...] = ()
    last_norm: int = 0
    bottlenecks: tuple[tuple[int, int], ...] = ()
    bottleneck_size: int = 0
    float32_stream: bool = False

    def extra_bytes(self, number: int, hidden: int, compute_bytes: int, autocast: bool) -> int:
        """Return what a layer's trained norms and bottleneck adapters save, in bytes per token. ``compute_bytes``: per
        element of the compute dtype."""
        norms = sum(width for layer, width in self.trained_norms if layer == number)
        adapters = sum(count for layer, count in self.bottlenecks if layer == number)
        width = compute_bytes if autocast else FLOAT32_BYTES
        in_norms = norms * self.stream_bytes(compute_bytes, autocast)
        return in_norms + adapters * width * (hidden + 2 * self.bottleneck_size)

    def stream_bytes(self, compute_bytes: int, autocast: bool) -> int:
        """Return the bytes of one element of the residual stream."""
        return FLOAT32_BYTES if autocast and self.float32_stream else compute_bytes


WHOLE = Backward()


def backward_of(
    architecture: Architecture, method: MethodConfig, modules: Sequence[str], whole: Sequence[TunedTensor] = ()
) -> Backward:
    """Return the backward pass of ``method``; ``modules`` are the layers that it trains or adapts, ``whole`` the
    tensors that LoRA trains with them."""
    embeds = any(tensor.part == "embeddings" for tensor in whole)
    first = 0 if embeds else first_tuned_layer(architecture, method, modules)
    if method.kind is Method.bottleneck:
        places = bottleneck_places(architecture, method)
        counts = Counter(number for place in places if (number := layer_of(place)) is not None)
        start = Start.RESIDUAL if "attention" in method.after else Start.END
        return Backward(first, start, bottlenecks=tuple(counts.items()), bottleneck_size=method.size)
    tensors = tuned_tensors(architecture, method)
    norms = [tensor for tensor in tensors if tensor.part == "norms" and tensor.name.endswith("weight")]
    embeddings = embeds or any(tensor.part == "embeddings" for tensor in tensors)
    in_first = {tensor.part for tensor in tensors if tensor.layer == first}
    return Backward(
        first,
        Start.INPUT if embeddings else _start(architecture, modules, first, in_first),
        tuple((tensor.layer, tensor.elements) for tensor in norms if tensor.layer is not None),
        sum(tensor.elements for tensor in norms if tensor.layer is None),
        float32_stream=embeddings,
    )


def _start(architecture: Architecture, modules: Sequence[str], first: int, parts: Collection[str]) -> Start:
    """Return where the backward pass ends in the layer ``first``. ``parts``: of its own tensors that are trained."""
    names = {name for name in modules if layer_of(name) == first}
    shapes = [shape for shape in architecture.weights if shape.name in names]
    roles = {shape.role for shape in shapes} | {part.removesuffix(" bias") for part in parts}
    if not roles:  # prompts and prefixes are trained
        return Start.INPUT
    if roles - {"mlp"}:
        return Start.ATTENTION
    only_down = shapes and all(is_down_projection(shape, architecture.hidden_size) for shape in shapes)
    return Start.DOWN if only_down else Start.MLP


def is_down_projection(shape: WeightShape, hidden: int) -> bool:
    """Return whether the linear layer is the MLP's last one."""
    return shape.role == "mlp" and shape.out_features == hidden and bool(DOWN_NAME.search(shape.name))
