"""Which runs train without padding, as far as configuration and architecture say; imports neither torch nor
transformers."""

from __future__ import annotations

from qlora_exp.architecture.shapes import Architecture
from qlora_exp.config.allowed_values import MASKED_ATTENTIONS
from qlora_exp.config.enums import PaddingFree
from qlora_exp.config.schema import Config
from qlora_exp.errors import ConfigError

PADDING_FREE_TYPES = frozenset(
    {
        *("apertus", "arcee", "biogpt", "bitnet", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "dots1"),
        *("ernie4_5", "ernie4_5_moe", "exaone4", "gemma", "gemma3", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2"),
        *("gpt_bigcode", "gpt_neox", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "llama"),
        *("ministral", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3"),
        *("phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2"),
    }
)
"""Model types whose attention is causal and follows ``cu_seq_lens``. ``tests/models/test_padding_free.py`` compares
each of them with padded training."""
RECURRENT = "its recurrent or convolutional layers would read across rows"
OWN_ATTENTION = "its attention doesn't follow where rows begin"
REASONS = {
    **dict.fromkeys(("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe"), RECURRENT),
    **dict.fromkeys(("mamba2", "minimax", "qwen3_5_text", "qwen3_next"), RECURRENT),
    **dict.fromkeys(("bloom", "falcon", "mpt", "nemotron", "stablelm", "xglm"), OWN_ATTENTION),
    **dict.fromkeys(("gemma2", "vaultgemma"), "its attention has a soft cap"),
    "gpt_oss": "its attention has sinks",
}
"""Model type → why its rows must be padded."""
FLASH_ATTENTION = "flash_attention"


def planned_padding_reason(architecture: Architecture, config: Config, longest_row: int) -> str | None:
    """Return why a training pads its rows, of which the longest has ``longest_row`` tokens; ``None`` if it doesn't.

    The loaded model may need padding all the same: ``models.attention.measured_padding_reason`` compares its logits.

    Raises:
        ConfigError: ``training.padding_free=on``, and the architecture or its attention needs padding.
    """
    choice = config.training.padding_free
    if choice is PaddingFree.off:
        return "training.padding_free=off"
    reason = _reason(architecture, config.model.attention, longest_row, tries=choice is PaddingFree.on)
    if reason is not None and choice is PaddingFree.on:
        raise needs_padding(architecture.model_type, reason)
    return reason


def needs_padding(model_type: str, reason: str) -> ConfigError:
    """Return the error for ``training.padding_free=on`` where ``reason`` forbids it."""
    what = f"{model_type} can't be trained without padding: {reason}"
    return ConfigError(what, "training.padding_free = on", "training.padding_free=auto, which pads rows here")


def window_reason(window: int, longest_row: int) -> str:
    return f"its attention window of {window} tokens is shorter than the longest row of {longest_row}"


def _reason(architecture: Architecture, attention: str, longest_row: int, tries: bool) -> str | None:
    """``tries``: an architecture that isn't listed is left to the comparison of its logits."""
    if attention in MASKED_ATTENTIONS:
        return f"model.attention={attention} would mask all pairs of a batch's tokens"
    listed = REASONS.get(architecture.model_type)
    if listed is not None:
        return listed
    if architecture.eager_alone:
        return "transformers implements its attention only in Python, which would mask all pairs of a batch's tokens"
    if architecture.model_type not in PADDING_FREE_TYPES and not tries:
        return f"{architecture.model_type} is not tested without padding (training.padding_free=on tries it)"
    if attention.startswith(FLASH_ATTENTION):  # it implements windows itself
        return None
    window = architecture.window
    return window_reason(window, longest_row) if window is not None and window < longest_row else None
