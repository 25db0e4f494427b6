"""What an architecture's code does that the shapes of its layers don't show, and that costs memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ArchitectureTraits:
    """What an architecture's code does that the shapes of its layers don't show."""

    rotary: bool = True
    """Queries and keys are rotated (RoPE): new tensors in addition to the projections' outputs."""
    parallel_residual: bool = False
    """Attention and feed-forward read the same residual stream in parallel."""
    activation_copies: int = 1
    """Tensors of the intermediate width that the activation saves; 4 for ``gelu_new``, written in Python."""
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
    multi_query: bool = False
    """All query heads may share one head of keys and values (Falcon's ``multi_query``). CPUs take the math path for it,
    too."""


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
"""Other architectures are assumed to be built like Llama. What shapes do show is read from them: gates, fused
projections, norms of queries and keys, the number and kind of norms."""


def traits_of(model_type: str) -> ArchitectureTraits:
    return TRAITS.get(model_type, ArchitectureTraits())
