"""Bytes by arithmetic equal bytes in memory, on many architectures and in every mode; parameters equal PEFT's count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from qlora_exp.architecture.run_plan import compute_dtype
from qlora_exp.architecture.targets import resolve_targets
from qlora_exp.config.allowed_values import OPTIMIZERS, QUANTIZED, UNSUPPORTED_OPTIMIZERS
from qlora_exp.config.compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.errors import ModelError
from qlora_exp.estimate.weights_and_optimizer import adapter_bytes, base_bytes, optimizer_state_bytes
from qlora_exp.models.adapters import attach_adapters, save_adapter
from qlora_exp.models.base import load_base
from qlora_exp.models.inspect import describe
from qlora_exp.models.weight_bytes import weight_bytes

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
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "llama tied": LLAMA_LIKE | {"tie_word_embeddings": True},
    "qwen3": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE,
    "gemma3_text": LLAMA_LIKE,
    "olmo2": LLAMA_LIKE,
    "stablelm": LLAMA_LIKE,
    "phi3": PLAIN | {"num_key_value_heads": 4},
    "gpt2": GPT2 | {"n_positions": 64},
    "gpt_neox": PLAIN,
    "falcon": PLAIN,
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 256, "expansion_ratio": 2},
    "opt": OPT | {"word_embed_proj_dim": 32},
    "mixtral": LLAMA_LIKE | {"num_local_experts": 4},
}
INTEGERS = ("int8_sym quantization.group=32", "int4_asym quantization.group=16", "int2_asym quantization.group=8")
MODES = ("fp32", "bf16", "fp16", "int8", "nf4", "nf4 quantization.double_quantization=false", "fp4", *INTEGERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("architectures")
    for name, sizes in ARCHITECTURES.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(name.split()[0], **sizes)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / name)
    return {name: root / name for name in ARCHITECTURES}


def configured(folder: Path, *overrides: str) -> Config:
    return compose(["model=local", f"model.path='{folder}'", "model.attention=eager", "targets=all_linear", *overrides])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_predicted_bytes_of_a_base_are_those_in_memory(name: str, mode: str, folders: dict[str, Path]) -> None:
    config = configured(folders[name], *f"quantization={mode}".split())
    predicted = base_bytes(
        describe(config.model), config.quantization, compute_dtype(config.quantization, "cpu", False)
    )
    if name == "falcon" and config.quantization.mode in QUANTIZED:
        with pytest.raises(ModelError, match="unquantized"):
            load_base(config, "cpu")
        return
    measured = weight_bytes(load_base(config, "cpu").model)
    assert predicted.base_weight_bytes == pytest.approx(measured.base_weight_bytes, rel=1e-3)
    assert predicted.quantization_state_bytes == pytest.approx(measured.quantization_state_bytes, rel=1e-3)


@pytest.mark.parametrize("adapter", ["lora.r=4", "lora.r=16 lora.dtype=bfloat16", "lora.r=8 lora.dora=true"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3", "gpt2", "gpt_neox", "falcon", "opt", "mixtral"])
def test_adapters_are_as_many_and_as_large_as_peft_makes_them(
    name: str, adapter: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = configured(folders[name], "quantization=fp32", *adapter.split())
    architecture = describe(config.model)
    modules = resolve_targets(architecture, config.targets)
    adapted = [shape for shape in architecture.weights if shape.name in modules]
    predicted = adapter_bytes(adapted, config.lora, "adamw_torch")
    model = attach_adapters(load_base(config, "cpu").model, config, modules)
    assert predicted.trainable_parameters == model.get_nb_trainable_parameters()[0]
    assert predicted.adapter_bytes == predicted.gradient_bytes == weight_bytes(model).adapter_bytes
    save_adapter(model, tmp_path)
    assert predicted.file_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if not UNSUPPORTED_OPTIMIZERS.search(name)])
def test_optimizer_states_are_as_large_as_after_a_step(optimizer: str, dtype: torch.dtype, tmp_path: Path) -> None:
    shapes = [(8, 64), (64, 8), (8, 1000), (1000, 8), (64,), (5000,)]
    parameters = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=optimizer, use_cpu=True, report_to=[])
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    made = kind(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    made.step()
    states = [value for state in made.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    measured = sum({value.data_ptr(): value.nbytes for value in states if value.nbytes}.values())
    assert optimizer_state_bytes(optimizer, [(shape, dtype.itemsize) for shape in shapes]) == measured
