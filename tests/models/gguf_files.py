"""Random GGUF files of a few architectures, small, and with whatever a test wants changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

TOKENS = 64
SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 96, "max_position_embeddings": 64, "vocab_size": TOKENS}
ADJUSTED = {"block_auto_adjust_ff_dim": False}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3moe": ("qwen3_moe", {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 768}),
    "gemma2": ("gemma2", {"head_dim": 256, "sliding_window": 32}),
    "lfm2": ("lfm2", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]} | ADJUSTED),
}
"""GGML's name → transformers' name and sizes. ``lfm2`` goes through transformers' newer reader."""


def meta_model(architecture: str, **more: Any) -> PreTrainedModel:
    family, sizes = FAMILIES[architecture]
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **(SIZES | sizes | more))
        )
    return model


def tensors_of(architecture: str, **more: Any) -> dict[str, np.ndarray]:
    """Name → random values, of all that a whole file holds."""
    model = meta_model(architecture, **more)
    rng = np.random.default_rng(0)
    names = get_gguf_hf_weights_map(model, TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={}))
    weights = model.state_dict()
    made: dict[str, np.ndarray] = {}
    for name, full in sorted(names.items()):
        if full == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        shape = [axis for axis in weights[full].shape if axis != 1]
        if full.endswith("gate_up_proj"):
            shape[1] //= 2
        stored = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
        made[stored] = (rng.normal(size=shape) * 0.1 + (len(shape) == 1)).astype(np.float32)
    return made


def write_gguf(
    path: Path,
    architecture: str = "llama",
    tensors: Mapping[str, np.ndarray] | None = None,
    settings: Mapping[str, Any] | None = None,
    tensors_a_part: int = 0,
    kind: str = "model",
    **more: Any,
) -> Path:
    """``settings``: keys below the architecture's name, in place of or next to the right ones; ``None`` leaves one out.
    ``tensors_a_part``: split into files of so many tensors, whose first one is returned."""
    import gguf

    tensors = tensors if tensors is not None else tensors_of(architecture, **more)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_a_part)
    writer.add_type(kind)
    for key, value in (settings_of(architecture, **more) | dict(settings or {})).items():
        if value is None:
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(TOKENS)])
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if not tensors_a_part else min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def settings_of(architecture: str, **more: Any) -> dict[str, Any]:
    """Hyperparameters as llama.cpp's converter writes them."""
    config = meta_model(architecture, **more).config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(getattr(config, "rms_norm_eps", 1e-5)),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": width,
        "vocab_size": TOKENS,
    }
    if architecture == "lfm2":
        found["attention.head_count_kv"] = [0, config.num_key_value_heads]
        found["shortconv.l_cache"] = config.conv_L_cache
        found["attention.layer_norm_rms_epsilon"] = float(config.norm_eps)
    if architecture in ("qwen3moe", "gemma2"):
        found["attention.key_length"] = width
    if architecture == "gemma2":
        found["attention.sliding_window"] = config.sliding_window
    if architecture == "qwen3moe":
        found |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
    return found
