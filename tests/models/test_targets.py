"""Target sets are found by looking at the model, on every architecture, and PEFT adapts exactly what they name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora_exp.architecture.run_plan import lora_parameters
from qlora_exp.architecture.shapes import WeightShape
from qlora_exp.architecture.targets import qkv_of_name, resolve_targets
from qlora_exp.config.compose import compose
from qlora_exp.config.schema import TargetsConfig
from qlora_exp.errors import ModelError, Problems
from qlora_exp.models.adapters import adapter_parameters, attach_adapters
from qlora_exp.models.inspect import architecture_of, describe

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


def last_parts(names: tuple[str, ...]) -> str:
    return " ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_sets_name_the_right_layers(model_type: str) -> None:
    architecture = architecture_of(build(model_type))
    found = {
        name: resolve_targets(architecture, TargetsConfig(name, None)) for name in ("attention", "attention_qv", "mlp")
    }
    assert tuple(last_parts(names) for names in found.values()) == ARCHITECTURES[model_type][1]
    assert not set(found["attention"]) & set(found["mlp"])
    assert set(found["attention_qv"]) <= set(found["attention"])
    everything = resolve_targets(architecture, TargetsConfig("all_linear", None))
    assert set(found["attention"]) | set(found["mlp"]) <= set(everything)
    assert architecture.output_head is not None
    assert architecture.output_head not in everything


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_parameters_equal_pefts_own_count_on_exactly_the_named_layers(model_type: str) -> None:
    model = build(model_type, "cpu")
    architecture = architecture_of(model)
    for name, dora in (("all_linear", False), ("attention_qv", True)):
        config = compose(["quantization=fp32", "lora.r=4", f"lora.dora={str(dora).lower()}"])
        modules = resolve_targets(architecture, TargetsConfig(name, None))
        adapted = attach_adapters(build(model_type, "cpu"), config, modules)
        shapes = {shape.name: shape for shape in architecture.weights}
        expected = sum(lora_parameters(shapes[module], 4, dora) for module in modules)
        assert adapted.get_nb_trainable_parameters()[0] == expected
        assert sum(parameter.numel() for _, parameter in adapter_parameters(adapted)) == expected
        tokens = torch.arange(6)[None]
        with torch.no_grad():  # B is zero: the adapted model is the base (and Conv1D's orientation is right)
            torch.testing.assert_close(adapted.eval()(tokens).logits, model.eval()(tokens).logits)


def test_lora_of_a_4096_matrix_is_two_thin_matrices() -> None:
    shape = WeightShape("q_proj", "linear", 4096, 4096, 4096 * 4096)
    assert lora_parameters(shape, 8, dora=False) == 65_536
    assert lora_parameters(shape, 8, dora=True) == 65_536 + 4096
    assert shape.parameters == 16_777_216


def test_a_layer_whose_full_name_ends_another_ones_is_adapted_alone() -> None:
    """PEFT matches endings: ``layers.1.mlp`` asked for by a list would also take ``layers.11.…`` in some names."""
    model = build("llama", "cpu")
    config = compose(["quantization=fp32"])
    wanted = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
    adapted = attach_adapters(model, config, wanted)
    names = {name.split(".lora_")[0].removeprefix("base_model.model.") for name, _ in adapter_parameters(adapted)}
    assert names == set(wanted)


def test_explicit_names_match_whole_endings_and_each_must_match() -> None:
    architecture = architecture_of(build("llama"))
    chosen = resolve_targets(architecture, TargetsConfig("attention", ["self_attn.q_proj", "v_proj"]))
    assert last_parts(chosen) == "q_proj v_proj"
    assert len(chosen) == 4
    with pytest.raises(ModelError, match="proj") as caught:
        resolve_targets(architecture, TargetsConfig("attention", ["q_proj", "proj"]))
    assert "q_proj" in str(caught.value.hint)
    with pytest.raises(Problems) as several:
        resolve_targets(architecture, TargetsConfig("attention", ["q_prj", "query", "v_proj"]))
    assert len(several.value.errors) == 2
    with pytest.raises(ModelError, match="output head"):
        resolve_targets(architecture, TargetsConfig("attention", ["lm_head"]))


def test_experts_without_linear_layers_are_told_not_guessed() -> None:
    sizes = LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes))
    architecture = architecture_of(model)
    assert last_parts(resolve_targets(architecture, TargetsConfig("attention", None))) == QKVO
    experts = sum(value.numel() for name, value in model.named_parameters() if "experts" in name)
    assert architecture.total_parameters > experts > sum(shape.parameters for shape in architecture.weights)
    with pytest.raises(ModelError, match="experts"):
        resolve_targets(architecture, TargetsConfig("mlp", None))


def test_only_the_language_model_of_a_multimodal_one_is_a_target() -> None:
    from transformers import Gemma3Config

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=LLAMA_LIKE, vision_config=vision | {"image_size": 28, "patch_size": 14})
    with torch.device("meta"):
        architecture = architecture_of(AutoModelForCausalLM.from_config(config))
    names = resolve_targets(architecture, TargetsConfig("all_linear", None))
    assert len(names) == 14
    assert all("language_model.layers" in name for name in names)
    assert any("vision_tower" in shape.name for shape in architecture.weights)


def test_architectures_with_other_mixers_keep_them_out_of_attention_and_mlp() -> None:
    with torch.device("meta"):
        jamba = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("jamba", **LLAMA_LIKE | {"num_hidden_layers": 8, "num_experts": 2})
        )
        mamba = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("mamba", hidden_size=64, num_hidden_layers=2, vocab_size=256)
        )
    described = architecture_of(jamba)
    assert last_parts(resolve_targets(described, TargetsConfig("attention", None))) == QKVO
    assert last_parts(resolve_targets(described, TargetsConfig("mlp", None))) == GATED
    assert "in_proj" in last_parts(resolve_targets(described, TargetsConfig("all_linear", None)))
    with pytest.raises(ModelError, match="attention"):
        resolve_targets(architecture_of(mamba), TargetsConfig("attention", None))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("self_attn.q_proj", "q"),
        ("attention.self.query", "q"),
        ("attn.Wqkv", "qkv"),
        ("attention.query_key_value", "qkv"),
        ("attn.c_attn", "qkv"),
        ("attn.c_proj", ""),
        ("self_attn.o_proj", ""),
        ("self_attn.out_proj", ""),
        ("self_attn.kv_a_proj_with_mqa", "kv"),
        ("self_attn.q_b_proj", "q"),
        ("linear_attn.in_proj_qkvz", "qkv"),
        ("self_attn.q_proj.linear", "q"),
        ("multi_head_attention.Wk", "k"),
        ("self_attention.dense", ""),
        ("self_attn.v_lin", "v"),
    ],
)
def test_what_a_projection_gives_is_read_from_its_name(name: str, given: str) -> None:
    assert qkv_of_name(name) == given


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_described_directory_has_the_names_of_the_loaded_model(family: str, tiny_models: dict[str, Path]) -> None:
    config = compose(["model=local", f"model.path={tiny_models[family]}"])
    architecture = describe(config.model)
    model = AutoModelForCausalLM.from_pretrained(tiny_models[family])
    modules = dict(model.named_modules())
    assert architecture.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert architecture.layers == 2
    assert architecture.hidden_size == 64
    for shape in architecture.weights:
        weight = modules[shape.name].weight
        expected = tuple(reversed(weight.shape)) if shape.kind == "conv1d" else tuple(weight.shape)
        assert (shape.out_features, shape.in_features) == expected
