"""Adapters: the same start whatever the base is stored in, kept through SFTTrainer, saved and read back exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from qlora_exp.architecture.targets import resolve_targets
from qlora_exp.config.compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.errors import ModelError
from qlora_exp.models.adapters import adapter_parameters, attach_adapters, load_adapter, recast_adapters, save_adapter
from qlora_exp.models.base import Base, clone_sharing_weights, load_base
from qlora_exp.models.inspect import architecture_of, describe

TOKENS = torch.arange(5, 25).reshape(2, 10)
FAMILIES = ["llama", "gpt2", "phi3"]


def adapted(folder: Path, *more: str) -> tuple[Base, PeftModel, Config]:
    config = compose(["model=local", f"model.path={folder}", "targets=all_linear", *more])
    base = load_base(config, "cpu")
    modules = resolve_targets(describe(config.model), config.targets)
    return base, attach_adapters(clone_sharing_weights(base), config, modules), config


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in adapter_parameters(model)}


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_precisions_start_from_bit_equal_adapters(family: str, init: str, tiny_models: dict[str, Path]) -> None:
    starts = {
        mode: values(adapted(tiny_models[family], f"quantization={mode}", f"lora.init={init}")[1])
        for mode in ("fp32", "fp16", "bf16", "int8", "nf4")
    }
    for mode, start in starts.items():
        assert start.keys() == starts["fp32"].keys()
        for name, value in start.items():
            assert value.dtype is torch.float32
            assert torch.equal(value, starts["fp32"][name]), (mode, name)
            assert ("lora_A" in name) == bool(value.any())


def test_the_start_depends_on_seed_and_module_and_on_nothing_drawn_before(tiny_models: dict[str, Path]) -> None:
    first = values(adapted(tiny_models["llama"], "seed=1")[1])
    torch.manual_seed(99)
    again = values(adapted(tiny_models["llama"], "seed=1")[1])
    other = values(adapted(tiny_models["llama"], "seed=2")[1])
    drawn = [name for name in first if "lora_A" in name]
    assert all(torch.equal(first[name], again[name]) for name in drawn)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    assert len({first[name][0, :8].sum().item() for name in drawn}) == len(drawn)


def test_fewer_targets_leave_the_other_adapters_start_as_it_was(tiny_models: dict[str, Path]) -> None:
    everything = values(adapted(tiny_models["llama"])[1])
    queries = values(adapted(tiny_models["llama"], "targets.modules=[q_proj]")[1])
    assert 0 < len(queries) < len(everything)
    assert all(torch.equal(value, everything[name]) for name, value in queries.items())


def test_kaiming_is_torchs_default_for_a_linear_layer_and_gaussian_pefts(tiny_models: dict[str, Path]) -> None:
    uniform = values(adapted(tiny_models["llama"], "lora.r=32")[1])
    drawn = torch.cat([value.flatten() for name, value in uniform.items() if "lora_A" in name and value.shape[1] == 64])
    assert 0.12 < drawn.abs().max() <= 0.125  # 1/sqrt(64)
    normal = values(adapted(tiny_models["llama"], "lora.r=32", "lora.init=gaussian")[1])
    drawn = torch.cat([value.flatten() for name, value in normal.items() if "lora_A" in name])
    assert drawn.std().item() == pytest.approx(1 / 32, rel=0.02)


@pytest.mark.parametrize("mode", ["fp32", "int8", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sft_trainers_cast_to_bf16_is_undone_to_the_last_bit(
    mode: str, dtype: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    _, model, config = adapted(tiny_models["llama"], f"quantization={mode}", f"lora.dtype={dtype}", "lora.dora=true")
    start = values(model)
    settings = SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    trainer = SFTTrainer(model, settings, train_dataset=Dataset.from_dict({"input_ids": TOKENS.tolist()}))
    cast = {parameter.dtype for name, parameter in adapter_parameters(trainer.model) if "magnitude" not in name}
    assert cast == {torch.float32 if mode == "fp32" and dtype == "float32" else torch.bfloat16}
    recast_adapters(trainer.model, config.lora)
    for name, parameter in adapter_parameters(trainer.model):
        assert parameter.dtype is (torch.float32 if "magnitude" in name else getattr(torch, dtype))
    assert all(torch.equal(value, start[name]) for name, value in values(trainer.model).items())
    assert all(parameter.requires_grad for _, parameter in adapter_parameters(trainer.model))


def test_recasting_keeps_what_was_trained(tiny_models: dict[str, Path]) -> None:
    _, model, config = adapted(tiny_models["llama"])
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.add_(1.0)
    trained = values(model)
    recast_adapters(model, config.lora)
    assert all(torch.equal(value, trained[name]) for name, value in values(model).items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "more", [("quantization=nf4",), ("quantization=fp16", "lora.dora=true"), ("quantization=int8",)]
)
def test_a_saved_adapter_is_read_back_exactly(
    family: str, more: tuple[str, ...], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    base, model, _ = adapted(tiny_models[family], *more)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.01)
    save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = load_adapter(base, tmp_path)
    written, read = values(model), values(loaded)
    assert written.keys() == read.keys()
    for name, value in written.items():
        assert read[name].dtype is torch.float32
        assert torch.equal(value, read[name])
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)
        assert not torch.equal(loaded(TOKENS).logits, base.model(TOKENS).logits)


@pytest.mark.parametrize(
    ("family", "init", "dora"),
    [*((family, "pissa", dora) for family in FAMILIES for dora in ("false", "true")), ("llama", "olora", "false")],
)
def test_a_start_from_the_bases_weights_begins_at_the_base_and_leaves_a_warm_one_as_it_was(
    family: str, init: str, dora: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    base, model, _ = adapted(tiny_models[family], "quantization=fp32", f"lora.init={init}", f"lora.dora={dora}")
    fresh = load_base(compose(["model=local", f"model.path={tiny_models[family]}", "quantization=fp32"]), "cpu")
    for (name, weight), (_, original) in zip(
        base.model.named_parameters(), fresh.model.named_parameters(), strict=True
    ):
        assert torch.equal(weight, original), name
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(TOKENS).logits, base.model(TOKENS).logits, atol=1e-4, rtol=1e-3)
    assert all(value.any() for value in values(model).values())
    save_adapter(model, tmp_path)
    with torch.no_grad():
        again = load_adapter(base, tmp_path)(TOKENS).logits
        torch.testing.assert_close(again, model(TOKENS).logits, atol=1e-5, rtol=1e-4)
        assert torch.equal(base.model(TOKENS).logits, fresh.model(TOKENS).logits)


def test_pissa_with_more_directions_than_a_matrix_has_is_refused(tiny_models: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="directions"):
        adapted(tiny_models["llama"], "quantization=fp32", "lora.init=pissa", "lora.r=65")


@pytest.mark.parametrize(
    ("overrides", "scale"),
    [
        (["lora.r=4"], 2.0),
        (["lora.r=16", "lora.alpha_policy=r"], 1.0),
        (["lora.r=16", "lora.alpha_policy=fixed", "lora.alpha=8"], 0.5),
        (["lora.r=16", "lora.alpha_policy=fixed", "lora.alpha=8", "lora.rslora=true"], 2.0),
    ],
)
def test_peft_scales_by_what_the_plan_says(overrides: list[str], scale: float, tiny_models: dict[str, Path]) -> None:
    from qlora_exp.architecture import run_plan

    _, model, config = adapted(tiny_models["gpt2"], *overrides)
    scales = {module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer)}
    assert scales == {scale} == {run_plan.scale(config.lora)}


def test_unreadable_adapters_are_told(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    base, model, _ = adapted(tiny_models["llama"])
    with pytest.raises(ModelError, match="no adapter"):
        load_adapter(base, tmp_path / "nowhere")
    save_adapter(model, tmp_path)
    other = load_base(compose(["model=local", f"model.path={tiny_models['gpt2']}"]), "cpu")
    with pytest.raises(ModelError, match="fit"):
        load_adapter(other, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ModelError, match="read"):
        load_adapter(base, tmp_path)


LAYERS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
    },
    "ernie4_5_moe": {},
    "glm4_moe": {"first_k_dense_replace": 1},
    "qwen2_moe": {"shared_expert_intermediate_size": 32},
    "qwen3_moe": {},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_n_groups": 1, "mamba_d_state": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16, "expand": 2},
}


@pytest.mark.parametrize("family", LAYERS)
def test_all_linear_is_what_peft_adapts_where_it_takes_names_for_others(family: str) -> None:
    """Asked for a shared expert's layers, it adapts all experts; Mamba's last projection it refuses."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    if family != "mamba2":
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 16}
        sizes |= {"num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
    config = compose(["targets=all_linear"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | LAYERS[family]))
    modules = resolve_targets(architecture_of(model), config.targets)
    attached = attach_adapters(model.to_empty(device="cpu"), config, modules)
    found = {name for name, module in attached.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    assert found == set(modules)
    if family == "glm4_moe":
        for given in ("targets=mlp", "targets.modules=[gate_proj]"):
            with pytest.raises(ModelError, match="PEFT"):
                resolve_targets(architecture_of(model), compose([given]).targets)


def test_targets_that_the_model_lacks_are_refused(tiny_models: dict[str, Path]) -> None:
    config = compose(["model=local", f"model.path={tiny_models['gpt2']}"])
    base = load_base(config, "cpu")
    with pytest.raises(ModelError, match="doesn't have"):
        attach_adapters(clone_sharing_weights(base), config, ["model.layers.0.self_attn.q_proj"])
