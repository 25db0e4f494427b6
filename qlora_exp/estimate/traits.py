"""What the code of each architecture does that its layers' shapes don't tell, and what memory it costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Habits:
    """What the code of an architecture does that its shapes don't tell."""

    rotary: bool = True
    """Queries and keys are turned: new tensors beside the projections' outputs."""
    shared_input: bool = False
    """Attention and feed-forward read the same residual stream, side by side."""
    activation_copies: int = 1
    """Tensors of the intermediate width that the activation keeps; 4 for ``gelu_new``, written out in Python."""
    activation_mask: bool = False
    """The activation keeps which of its inputs are positive, a byte each (xIELU)."""
    keeps_output: bool = False
    """The activation keeps its output (ReLU), which is the next layer's input too."""
    dropout: bool = False
    """Dropout on both branches, in the published configurations."""
    attention_dropout: bool = False
    """On CPUs, attention with dropout takes torch's plain path, which keeps the scores."""
    softcaps: bool = False
    """Scores of attention and logits go through tanh (Gemma 2), which keeps what it made."""
    narrow_scores: bool = False
    """The softmax of attention that is written out is computed in the compute dtype, not in float32."""
    wide_scores: bool = False
    """Attention that is written out multiplies queries and keys in float32."""
    partly_rotary: bool = False
    """A part of each head is turned: queries are put together anew, and attention's output, laid out as they are, is
    copied on CPUs before the projection reads it."""
    bare_norms: int = 0
    """Norms without weights, which shapes don't show."""
    norm_copies: int = 1
    """Copies of its input that a norm keeps; 2 where it is a layer norm written out in Python."""
    expert_copies: int = 3
    """Tensors of the intermediate width that a gated expert keeps."""
    gates_shared: bool = False
    """The output of the expert that all tokens pass through is multiplied by a gate of its own, and kept for that."""
    one_head: bool = False
    """Keys and values may be those of a single head, broadcast to all (Falcon's ``multi_query``), for which CPUs take
    the plain path too."""


HABITS = {
    "apertus": Habits(activation_copies=3, activation_mask=True),
    "biogpt": Habits(rotary=False, dropout=True, attention_dropout=True),
    "codegen": Habits(shared_input=True, activation_copies=4, wide_scores=True),
    "cohere": Habits(shared_input=True, norm_copies=2),
    "cohere2": Habits(shared_input=True, norm_copies=2),
    "falcon": Habits(shared_input=True, one_head=True),
    "gemma2": Habits(softcaps=True),
    "glm": Habits(partly_rotary=True),
    "glm4": Habits(partly_rotary=True),
    "glm4_moe": Habits(partly_rotary=True),
    "gpt2": Habits(rotary=False, activation_copies=4, dropout=True, attention_dropout=True, narrow_scores=True),
    "gpt_bigcode": Habits(rotary=False, dropout=True, attention_dropout=True),
    "gpt_neo": Habits(rotary=False, activation_copies=4, wide_scores=True),
    "gpt_neox": Habits(shared_input=True),
    "gpt_oss": Habits(expert_copies=6, narrow_scores=True),
    "gptj": Habits(shared_input=True, activation_copies=4, wide_scores=True),
    "nemotron": Habits(partly_rotary=True),
    "olmo": Habits(bare_norms=2),
    "opt": Habits(rotary=False, keeps_output=True, dropout=True),
    "phi": Habits(shared_input=True, activation_copies=4, partly_rotary=True),
    "qwen2_moe": Habits(gates_shared=True),
    "seed_oss": Habits(dropout=True, attention_dropout=True),
    "stablelm": Habits(partly_rotary=True),
    "vaultgemma": Habits(softcaps=True),
    "xglm": Habits(rotary=False, dropout=True, attention_dropout=True),
}
"""Every other architecture is taken to be built as Llama is; what shapes tell (gated or not, fused projections, norms
of queries and keys, the number and kind of norms) is read from the shapes."""


def habits_of(model_type: str) -> Habits:
    return HABITS.get(model_type, Habits())
