"""What the code of each architecture does that its layers' shapes don't tell, and what memory it costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ArchitectureTraits:
    """What the code of an architecture does that its shapes don't tell."""

    rotary: bool = True
    """Queries and keys are turned: new tensors beside the projections' outputs."""
    parallel_residual: bool = False
    """Attention and feed-forward read the same residual stream, side by side."""
    activation_copies: int = 1
    """Tensors of the intermediate width that the activation keeps; 4 for ``gelu_new``, written out in Python."""
    activation_mask: bool = False
    """The activation keeps which of its inputs are positive, a byte each (xIELU)."""
    saves_output: bool = False
    """The activation keeps its output (ReLU), which is the next layer's input too."""
    dropout: bool = False
    """Dropout on both branches, in the published configurations."""
    attention_dropout: bool = False
    """On CPUs, attention with dropout takes torch's plain path, which keeps the scores."""
    logit_softcapping: bool = False
    """Scores of attention and logits go through tanh (Gemma 2), which keeps what it made."""
    softmax_in_compute_dtype: bool = False
    """The softmax of attention that is written out is computed in the compute dtype, not in float32."""
    qk_in_float32: bool = False
    """Attention that is written out multiplies queries and keys in float32."""
    partial_rope: bool = False
    """A part of each head is turned: queries are put together anew, and attention's output, laid out as they are, is
    copied on CPUs before the projection reads it."""
    unweighted_norms: int = 0
    """Norms without weights, which shapes don't show."""
    norm_copies: int = 1
    """Copies of its input that a norm keeps; 2 where it is a layer norm written out in Python."""
    expert_copies: int = 3
    """Tensors of the intermediate width that a gated expert keeps."""
    gates_shared: bool = False
    """The output of the expert that all tokens pass through is multiplied by a gate of its own, and kept for that."""
    multi_query: bool = False
    """Keys and values may be those of a single head, broadcast to all (Falcon's ``multi_query``), for which CPUs take
    the plain path too."""


TRAITS = {
    "apertus": ArchitectureTraits(activation_copies=3, activation_mask=True),
    "biogpt": ArchitectureTraits(rotary=False, dropout=True, attention_dropout=True),
    "codegen": ArchitectureTraits(parallel_residual=True, activation_copies=4, qk_in_float32=True),
    "cohere": ArchitectureTraits(parallel_residual=True, norm_copies=2),
    "cohere2": ArchitectureTraits(parallel_residual=True, norm_copies=2),
    "falcon": ArchitectureTraits(parallel_residual=True, multi_query=True),
    "gemma2": ArchitectureTraits(logit_softcapping=True),
    "glm": ArchitectureTraits(partial_rope=True),
    "glm4": ArchitectureTraits(partial_rope=True),
    "glm4_moe": ArchitectureTraits(partial_rope=True),
    "gpt2": ArchitectureTraits(
        rotary=False, activation_copies=4, dropout=True, attention_dropout=True, softmax_in_compute_dtype=True
    ),
    "gpt_bigcode": ArchitectureTraits(rotary=False, dropout=True, attention_dropout=True),
    "gpt_neo": ArchitectureTraits(rotary=False, activation_copies=4, qk_in_float32=True),
    "gpt_neox": ArchitectureTraits(parallel_residual=True),
    "gpt_oss": ArchitectureTraits(expert_copies=6, softmax_in_compute_dtype=True),
    "gptj": ArchitectureTraits(parallel_residual=True, activation_copies=4, qk_in_float32=True),
    "nemotron": ArchitectureTraits(partial_rope=True),
    "olmo": ArchitectureTraits(unweighted_norms=2),
    "opt": ArchitectureTraits(rotary=False, saves_output=True, dropout=True),
    "phi": ArchitectureTraits(parallel_residual=True, activation_copies=4, partial_rope=True),
    "qwen2_moe": ArchitectureTraits(gates_shared=True),
    "seed_oss": ArchitectureTraits(dropout=True, attention_dropout=True),
    "stablelm": ArchitectureTraits(partial_rope=True),
    "vaultgemma": ArchitectureTraits(logit_softcapping=True),
    "xglm": ArchitectureTraits(rotary=False, dropout=True, attention_dropout=True),
}
"""Every other architecture is taken to be built as Llama is; what shapes tell (gated or not, fused projections, norms
of queries and keys, the number and kind of norms) is read from the shapes."""


def traits_of(model_type: str) -> ArchitectureTraits:
    return TRAITS.get(model_type, ArchitectureTraits())
