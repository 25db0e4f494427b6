"""What forward keeps for backward, counted from shapes, against what autograd saves."""

from __future__ import annotations

import subprocess
import sys
import weakref
from dataclasses import replace
from typing import Any

import pytest

from qlora_exp.architecture.families import known_architecture
from qlora_exp.estimate.activations import TrainingPass, is_eager, saved_bytes_per_token
from qlora_exp.estimate.candidates import search_space

HIDDEN, ROWS, LENGTH = 256, 2, 24
LONG = 128
"""For attention that is written out: its scores must weigh more than the tolerance."""
FLOAT32 = TrainingPass(r=8, compute_bytes=4, adapter_bytes=4, int8=False, length=LENGTH, padded=False)
MODERN = {
    "hidden_size": HIDDEN,
    "intermediate_size": 3 * HIDDEN,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
PLAIN = {"hidden_size": HIDDEN, "num_attention_heads": 8, "max_position_embeddings": 256}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": MODERN,
    "qwen3": MODERN | {"head_dim": 64},
    "gemma3_text": MODERN | {"head_dim": 64},
    "phi3": MODERN | {"original_max_position_embeddings": 256},
    "gpt2": {"n_embd": HIDDEN, "n_head": 8, "n_positions": 256},
    "gpt_neox": PLAIN | {"intermediate_size": 4 * HIDDEN},
    "opt": PLAIN | {"ffn_dim": 4 * HIDDEN, "word_embed_proj_dim": HIDDEN},
    "falcon": PLAIN,
    "falcon, few heads": PLAIN | {"num_attention_heads": 4},
}
EAGER: dict[str, dict[str, Any]] = {
    "gemma2": MODERN | {"head_dim": 64},
    "gemma2, wide heads": MODERN | {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
    "llama": MODERN,
    "qwen3": MODERN | {"head_dim": 64},
    "gpt2": SHAPES["gpt2"],
}
PLAIN_GPT = {"n_embd": HIDDEN, "n_head": 8, "n_positions": 256}
ROUTED = {"moe_intermediate_size": 256, "num_experts_per_tok": 2}
OTHERS: dict[str, dict[str, Any]] = {
    "apertus": MODERN,
    "biogpt": PLAIN,
    "bloom": {"hidden_size": HIDDEN, "n_head": 8},
    "codegen": PLAIN_GPT | {"rotary_dim": 32},
    "cohere": MODERN,
    "glm4": MODERN | {"head_dim": 64},
    "glm4_moe": MODERN | ROUTED | {"head_dim": 64, "n_routed_experts": 4},
    "gpt_bigcode": PLAIN_GPT,
    "gpt_neo": {"hidden_size": HIDDEN, "num_heads": 8, "max_position_embeddings": 256},
    "gpt_oss": MODERN | ROUTED | {"head_dim": 64, "num_local_experts": 4},
    "gptj": PLAIN_GPT | {"rotary_dim": 32},
    "granitemoe": MODERN | ROUTED | {"num_local_experts": 4},
    "mixtral": MODERN | ROUTED | {"num_local_experts": 4},
    "nemotron": MODERN,
    "olmo": MODERN,
    "olmo2": MODERN,
    "olmoe": MODERN | ROUTED | {"num_experts": 4},
    "persimmon": PLAIN | {"intermediate_size": 3 * HIDDEN},
    "phi": MODERN,
    "qwen2_moe": MODERN | ROUTED | {"num_experts": 4, "shared_expert_intermediate_size": 256},
    "qwen3_moe": MODERN | ROUTED | {"num_experts": 4, "head_dim": 64},
    "seed_oss": MODERN | {"head_dim": 64},
    "smollm3": MODERN,
    "stablelm": MODERN,
    "starcoder2": MODERN,
}
LAYERS = {
    **dict.fromkeys(("bloom", "codegen", "gpt2", "gpt_bigcode", "gptj"), "n_layer"),
    "gpt_neo": "num_layers",
}


def saved_bytes(
    architecture: str,
    layers: int,
    dtype: str,
    padded: bool,
    adapted: bool,
    eager: bool = False,
    length: int = LENGTH,
) -> tuple[int, Any]:
    """Bytes of distinct tensors, other than weights, that a forward pass in training mode saves."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_exp.models.inspect import architecture_of

    count: dict[str, Any] = {LAYERS.get(architecture, "num_hidden_layers"): layers}
    if architecture == "gpt_neo":
        count["attention_types"] = [[["global"], layers]]
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    shape = (SHAPES | EAGER | OTHERS)[architecture]
    config = AutoConfig.for_model(architecture.partition(",")[0], vocab_size=128, **shape, **count, **tokens)
    attention = {"attn_implementation": "eager"} if eager else {}
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), **attention)
    model.requires_grad_(False)
    described = architecture_of(model)
    names = [shape.name for shape in described.weights if shape.kind != "other"]
    if adapted:
        settings = LoraConfig(r=4, target_modules=names, fan_in_fan_out=architecture == "gpt2")
        get_peft_model(model, settings, autocast_adapter_dtype=False)
        for parameter in model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    model.train()
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    mask = torch.ones(ROWS, length, dtype=torch.long)
    mask[0, length // 2 :] = 0 if padded else 1
    ids = torch.arange(ROWS * length).reshape(ROWS, length) % 128
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    total = sum(storage.nbytes() for storage in kept.values())
    del output
    return total, (described, names if adapted else [])


def check_a_layer(
    architecture: str, dtype: str, padded: bool, adapted: bool, eager: bool = False, length: int = LENGTH
) -> None:
    """What a third layer adds to two. Small vectors (norms' deviations, a number a head) are left out of the count."""
    saved, counted = [], []
    for layers in (2, 3):
        total, (described, names) = saved_bytes(architecture, layers, dtype, padded, adapted, eager, length)
        setting = TrainingPass(
            r=4,
            compute_bytes=4 if dtype == "float32" else 2,
            adapter_bytes=4,
            int8=False,
            length=length,
            padded=padded,
            eager=eager or is_eager("auto", described),
        )
        kept = saved_bytes_per_token(described, names, setting)
        saved.append(total)
        counted.append(kept.layers * ROWS * length)
    assert counted[1] - counted[0] == pytest.approx(saved[1] - saved[0], rel=0.03)


@pytest.mark.parametrize("architecture", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "padded", "adapted"),
    [("float32", False, True), ("bfloat16", True, True), ("float32", True, False)],
)
def test_kept_bytes_of_a_layer_are_what_autograd_saves(
    architecture: str, dtype: str, padded: bool, adapted: bool
) -> None:
    check_a_layer(architecture, dtype, padded, adapted)


@pytest.mark.parametrize("architecture", OTHERS)
@pytest.mark.parametrize(("dtype", "padded"), [("float32", False), ("bfloat16", True)])
def test_kept_bytes_of_a_layer_of_other_architectures(architecture: str, dtype: str, padded: bool) -> None:
    check_a_layer(architecture, dtype, padded, adapted=True, length=LONG)


@pytest.mark.parametrize("architecture", EAGER)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapted", [True, False])
def test_attention_that_is_written_out_keeps_its_scores(architecture: str, dtype: str, adapted: bool) -> None:
    check_a_layer(architecture, dtype, True, adapted, eager=True, length=LONG)


def test_a_llama_layer_in_numbers() -> None:
    """fp32, no adapters: two norms' inputs, q and output, k and v, three of the intermediate width, a sum a head."""
    _, (described, _) = saved_bytes("llama", 1, "float32", False, False)
    kept = saved_bytes_per_token(described, [], FLOAT32)
    elements = 2 * HIDDEN + 2 * HIDDEN + 2 * HIDDEN // 2 + 3 * 3 * HIDDEN + 8
    # the first layer's first norm keeps nothing, nor does its attention: its input needs no gradient
    assert kept.layers == 4 * (elements - HIDDEN - (2 * HIDDEN + 2 * HIDDEN // 2 + 8))
    assert kept.inputs == 4 * HIDDEN


@pytest.mark.parametrize("mode", ["int8", "fp32"])
def test_what_int8_holds_outlives_checkpointing(mode: str) -> None:
    import bitsandbytes
    import torch
    from torch.utils.checkpoint import checkpoint

    linear = torch.nn.Linear(16, 16)
    if mode == "int8":
        linear = bitsandbytes.nn.Linear8bitLt(16, 16, has_fp16_weights=False).to("cpu")
    linear.requires_grad_(False)
    inner: list[weakref.ref[Any]] = []

    def layer(x: Any) -> Any:
        doubled = x * 2
        inner.append(weakref.ref(doubled))
        return linear(doubled)

    output = checkpoint(layer, torch.randn(4, 16, requires_grad=True), use_reentrant=False)
    assert (inner[0]() is not None) == (mode == "int8")
    del output
    _, (described, _) = saved_bytes("llama", 2, "float32", False, False)
    kept = saved_bytes_per_token(described, [], replace(FLOAT32, int8=mode == "int8"))
    held = 2 * HIDDEN + HIDDEN + 3 * HIDDEN  # what q, k, v read, what o reads, what gate and up read, what down reads
    assert kept.inputs == 2 * 4 * (HIDDEN + (held if mode == "int8" else 0))


def test_counting_loads_no_torch() -> None:
    modules = "qlora_exp.estimate.peak, qlora_exp.estimate.throughput, qlora_exp.system.cards"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_what_adapters_keep_in_single_layers_adds_up() -> None:
    [point] = search_space(["model=smollm2_135m"]).points
    assert point.config is not None
    architecture = known_architecture(point.config.model)
    assert architecture is not None
    names = [shape.name for shape in architecture.weights if shape.name.endswith("q_proj")]

    def kept(adapted: list[str]) -> float:
        return saved_bytes_per_token(architecture, adapted, FLOAT32).layers

    single = [kept([name]) - kept([]) for name in names]
    assert kept(names) - kept([]) == pytest.approx(sum(single))
    assert single[0] > single[1] == single[-1] > 0  # the first layer's attention is kept for its adapter alone
