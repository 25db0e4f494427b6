"""``training.gradient_checkpointing=selective``: where it is possible, and what it keeps.

TRL's policy (``trl/models/selective_activation_checkpointing.py``) keeps what torch's fused attention operations and
those of FlashAttention return, and recomputes all else of a layer. Attention that is computed otherwise would be
recomputed, too, and ``selective`` would be the same as ``on``.
"""

from __future__ import annotations

from qlora_exp.architecture.shapes import Architecture
from qlora_exp.config.allowed_values import MASKED_ATTENTIONS
from qlora_exp.config.enums import Checkpointing
from qlora_exp.config.schema import Config
from qlora_exp.errors import ConfigError
from qlora_exp.estimate.activations import Layer, TrainingPass, is_eager, layers_of
from qlora_exp.estimate.backward import FLOAT32_BYTES


def check_selective(architecture: Architecture, config: Config, device_kind: str) -> None:
    """Raise :class:`ConfigError` if ``gradient_checkpointing=selective`` would keep nothing."""
    if config.training.gradient_checkpointing is not Checkpointing.selective:
        return
    reason = _reason(architecture, config.model.attention, device_kind)
    if reason is not None:
        what = f"selective checkpointing can't keep the attention of {architecture.model_type}: {reason}"
        raise ConfigError(
            what, "training.gradient_checkpointing = selective", "training.gradient_checkpointing=on, or auto"
        )


def _reason(architecture: Architecture, attention: str, device_kind: str) -> str | None:
    if attention in MASKED_ATTENTIONS:
        return f"model.attention={attention} is not one operation of torch"
    if is_eager(attention, architecture):
        return "transformers implements it only in Python"
    layers = attention_layers(architecture)
    if not layers:
        return "it has none"
    if device_kind == "cpu" and all(layer.traits.attention_dropout or layer.multi_query for layer in layers):
        return "on a CPU torch has no fused operation for it"
    return None


def attention_layers(architecture: Architecture) -> list[Layer]:
    """Return the decoder layers that have attention."""
    return [layer for layer, shapes in layers_of(architecture) if any(shape.role == "attention" for shape in shapes)]


def kept_attention_bytes(architecture: Architecture, setting: TrainingPass) -> float:
    """Return the bytes per token that attention keeps in all layers: its output, and the log-sum-exp of the scores.

    Without padding, they are laid out as rows times the longest row.
    """
    layers = attention_layers(architecture)
    per_token = sum(layer.query * setting.compute_bytes + FLOAT32_BYTES * layer.heads for layer in layers)
    return per_token * (setting.laid_out or 1.0)
