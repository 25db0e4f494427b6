"""How far the backward pass of a tuning method goes, and what it saves beyond a layer's own gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_exp.architecture.shapes import Architecture
from qlora_exp.architecture.tuned_weights import bottleneck_places, first_tuned_layer, layer_of, tuned_tensors
from qlora_exp.config.enums import Method
from qlora_exp.config.schema import MethodConfig

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Backward:
    """How far the backward pass goes, and what it needs beyond the layers' own gradients.

    ``first_layer``: the first decoder layer that is trained; those before it save nothing. ``from_embeddings``: the
    embeddings are trained, so the first layer's input has a gradient. ``trained_norms``: by decoder layer, widths of
    norms whose weights are trained: each saves its normalized input, too. ``bottlenecks``: by decoder layer, the number
    of bottleneck adapters; each saves its input and its inner activations (``bottleneck_size``, twice), in float32.
    """

    first_layer: int = 0
    from_embeddings: bool = False
    trained_norms: tuple[tuple[int, int], ...] = ()
    bottlenecks: tuple[tuple[int, int], ...] = ()
    bottleneck_size: int = 0

    def extra_elements(self, number: int) -> int:
        """Return what a layer's trained norms save, in elements per token."""
        return sum(width for layer, width in self.trained_norms if layer == number)

    def extra_bytes(self, number: int, hidden: int) -> int:
        """Return what a layer's bottleneck adapters save, in bytes per token."""
        count = sum(adapters for layer, adapters in self.bottlenecks if layer == number)
        return count * _FLOAT32_BYTES * (hidden + 2 * self.bottleneck_size)


WHOLE = Backward()


def backward_of(architecture: Architecture, method: MethodConfig, modules: Sequence[str]) -> Backward:
    """Return the backward pass of ``method``; ``modules`` are the layers that it trains or adapts."""
    first = first_tuned_layer(architecture, method, modules)
    if method.kind is Method.bottleneck:
        numbers = [layer_of(place) for place in bottleneck_places(architecture, method)]
        counts = Counter(number for number in numbers if number is not None)
        return Backward(first_layer=first, bottlenecks=tuple(counts.items()), bottleneck_size=method.size)
    tensors = tuned_tensors(architecture, method)
    norms = tuple(
        (tensor.layer, tensor.elements)
        for tensor in tensors
        if tensor.part == "norms" and tensor.layer is not None and tensor.name.endswith("weight")
    )
    return Backward(first, any(tensor.part == "embeddings" for tensor in tensors), norms)
