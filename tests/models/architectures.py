"""Small configurations of many decoder architectures, and which of their layers belong to which target set."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LLAMA_LIKE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = {key: value for key, value in LLAMA_LIKE.items() if key not in ("num_key_value_heads", "head_dim")}
GPT2 = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

QKVO = "k_proj o_proj q_proj v_proj"
GATED = "down_proj gate_proj up_proj"
LLAMA_SETS = (QKVO, "q_proj v_proj", GATED)
FUSED = ("dense query_key_value", "query_key_value", "dense_4h_to_h dense_h_to_4h")

# model type → (sizes, last parts of attention, attention_qv, mlp), by reading each architecture's code
ARCHITECTURES: dict[str, tuple[dict[str, object], tuple[str, str, str]]] = {
    "llama": (LLAMA_LIKE, LLAMA_SETS),
    "mistral": (LLAMA_LIKE, LLAMA_SETS),
    "qwen2": (LLAMA_LIKE, LLAMA_SETS),
    "qwen3": (LLAMA_LIKE, LLAMA_SETS),
    "gemma": (LLAMA_LIKE, LLAMA_SETS),
    "gemma2": (LLAMA_LIKE, LLAMA_SETS),
    "gemma3_text": (LLAMA_LIKE, LLAMA_SETS),
    "olmo2": (LLAMA_LIKE, LLAMA_SETS),
    "granite": (LLAMA_LIKE, LLAMA_SETS),
    "cohere": (LLAMA_LIKE, LLAMA_SETS),
    "smollm3": (LLAMA_LIKE, LLAMA_SETS),
    "stablelm": (LLAMA_LIKE, LLAMA_SETS),
    "starcoder2": (LLAMA_LIKE, (QKVO, "q_proj v_proj", "c_fc c_proj")),
    "phi": (PLAIN, ("dense k_proj q_proj v_proj", "q_proj v_proj", "fc1 fc2")),
    "phi3": (PLAIN | {"num_key_value_heads": 4}, ("o_proj qkv_proj", "qkv_proj", "down_proj gate_up_proj")),
    "glm": (LLAMA_LIKE, (QKVO, "q_proj v_proj", "down_proj gate_up_proj")),
    "gpt2": (GPT2, ("c_attn c_proj", "c_attn", "c_fc c_proj")),
    "gpt_bigcode": (GPT2, ("c_attn c_proj", "c_attn", "c_fc c_proj")),
    "gptj": (GPT2 | {"rotary_dim": 8}, ("k_proj out_proj q_proj v_proj", "q_proj v_proj", "fc_in fc_out")),
    "codegen": (GPT2 | {"rotary_dim": 8}, ("out_proj qkv_proj", "qkv_proj", "fc_in fc_out")),
    "gpt_neo": (
        {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
        | {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2},
        ("k_proj out_proj q_proj v_proj", "q_proj v_proj", "c_fc c_proj"),
    ),
    "gpt_neox": (PLAIN, FUSED),
    "falcon": (PLAIN, FUSED),
    "bloom": ({"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256}, FUSED),
    "mpt": (
        {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 256, "expansion_ratio": 2},
        ("Wqkv out_proj", "Wqkv", "down_proj up_proj"),
    ),
    "opt": (
        {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
        | {"word_embed_proj_dim": 64},
        ("k_proj out_proj q_proj v_proj", "q_proj v_proj", "fc1 fc2"),
    ),
}


def build(model_type: str, device: str = "meta") -> PreTrainedModel:
    """A random small model of ``model_type``; on the meta device it has no weights."""
    config = AutoConfig.for_model(model_type, **ARCHITECTURES[model_type][0])
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)
