"""What a model is made of: every tensor's place, shape and width, known without its weights."""

from __future__ import annotations

from dataclasses import dataclass

Widths = tuple[int, int, int]
"""Bytes an element takes in a model of float32, of bfloat16 and of float16."""
DTYPES = ("float32", "bfloat16", "float16")
AS_ASKED: Widths = (4, 2, 2)
"""Follows the model's dtype. Rotary frequencies are (4, 4, 4); what transformers keeps in float32 for float16's sake
(``_keep_in_fp32_modules``) is (4, 2, 4)."""


@dataclass(frozen=True)
class WeightShape:
    """One weight matrix and its place. ``kind`` is ``linear``, ``conv1d`` (GPT-2's transposed linear) or ``other``
    (a linear outside the language model, or one whose input can't be adapted); ``role`` is ``attention``, ``mlp`` or
    ``other``; ``parameters`` includes the bias. ``quantizable``: bitsandbytes takes its place in a quantized mode."""

    name: str
    kind: str
    in_features: int
    out_features: int
    parameters: int
    role: str = "other"
    quantizable: bool = True
    element_bytes: Widths = AS_ASKED


@dataclass(frozen=True)
class OtherTensor:
    """A parameter or buffer that is no linear layer's: embeddings, norms, the output head (once, where it is tied to
    the embedding), experts' three-dimensional weights, rotary frequencies. ``elements``: how many numbers it has."""

    name: str
    elements: int
    element_bytes: Widths = AS_ASKED
    buffer: bool = False


@dataclass(frozen=True)
class Experts:
    """A layer's experts, whose weights are three-dimensional parameters (:class:`OtherTensor`): how many there are, how
    many of them a token passes through, and the width of each between its two projections. ``gated``: it has a gate."""

    name: str
    count: int
    per_token: int
    intermediate: int
    gated: bool = True


@dataclass(frozen=True)
class Architecture:
    """What a model is made of, known without its weights. ``weights`` lists every linear layer but the output head,
    ``others`` every other tensor."""

    model_type: str
    total_parameters: int
    weights: tuple[WeightShape, ...]
    output_head: str | None
    layers: int
    hidden_size: int
    vocabulary_size: int
    positions: int | None = None
    """The longest sequence that it takes, in tokens; ``None`` where its configuration doesn't say."""
    heads: int | None = None
    """Of queries, in a layer; ``None`` where its configuration doesn't say."""
    eager_alone: bool = False
    """transformers has its attention written out in Python only, no scaled_dot_product_attention."""
    others: tuple[OtherTensor, ...] = ()
    experts: tuple[Experts, ...] = ()

    def __hash__(self) -> int:
        """By few fields: what is worked out for an architecture is looked up for every configuration of a plan."""
        return hash((self.model_type, self.total_parameters, self.hidden_size, self.layers, len(self.others)))
