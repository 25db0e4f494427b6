"""Describes a model without its weights: name, shape and bytes per element of every tensor."""

from __future__ import annotations

from dataclasses import dataclass

ElementBytes = tuple[int, int, int]
"""Bytes per element if the model is loaded in float32, in bfloat16 and in float16."""
DTYPES = ("float32", "bfloat16", "float16")
MODEL_DTYPE: ElementBytes = (4, 2, 2)
"""The tensor has the model's dtype. Rotary frequencies are (4, 4, 4). Tensors that transformers keeps in float32 for
float16's sake (``_keep_in_fp32_modules``) are (4, 2, 4)."""


@dataclass(frozen=True)
class WeightShape:
    """One linear layer's weight matrix.

    ``kind`` is ``linear``, ``conv1d`` (GPT-2's transposed linear) or ``other`` (a linear layer outside the language
    model, or one that can't have an adapter). ``role`` is ``attention``, ``mlp`` or ``other``. ``parameters`` includes
    the bias. ``quantizable``: bitsandbytes replaces the layer in a quantized mode.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    parameters: int
    role: str = "other"
    quantizable: bool = True
    element_bytes: ElementBytes = MODEL_DTYPE


@dataclass(frozen=True)
class OtherTensor:
    """A parameter or buffer outside the linear layers.

    Examples: embeddings, norms, the output head (once, if it is tied to the embedding), experts' three-dimensional
    weights, rotary frequencies. ``elements`` is the number of values.
    """

    name: str
    elements: int
    element_bytes: ElementBytes = MODEL_DTYPE
    buffer: bool = False


@dataclass(frozen=True)
class Experts:
    """A layer's experts with three-dimensional weights (:class:`OtherTensor`): their number, how many a token uses, and
    their intermediate width. ``gated``: they have a gate projection."""

    name: str
    count: int
    per_token: int
    intermediate: int
    gated: bool = True


@dataclass(frozen=True)
class Architecture:
    """A model without its weights. ``weights`` lists all linear layers but the output head, ``others`` all other
    tensors."""

    model_type: str
    total_parameters: int
    weights: tuple[WeightShape, ...]
    output_head: str | None
    layers: int
    hidden_size: int
    vocabulary_size: int
    positions: int | None = None
    """Longest sequence that the model takes, in tokens; ``None`` if its configuration doesn't say."""
    heads: int | None = None
    """Query heads in a layer; ``None`` if the configuration doesn't say."""
    eager_alone: bool = False
    """transformers implements its attention only in Python, without scaled_dot_product_attention."""
    window: int | None = None
    """The sliding window of the layers that have one, in tokens; ``None``: all layers see all tokens."""
    others: tuple[OtherTensor, ...] = ()
    experts: tuple[Experts, ...] = ()
    unpacked_from: str | None = None
    """The method by which the checkpoint is quantized (``gptq`` …), whose weights are unpacked when they are loaded."""

    def __hash__(self) -> int:
        """Hash a few fields only: a plan looks up results by architecture for each of its configurations."""
        return hash((self.model_type, self.total_parameters, self.hidden_size, self.layers, len(self.others)))
