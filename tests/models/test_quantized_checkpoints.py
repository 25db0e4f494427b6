"""Checkpoints that are quantized already are bases: unpacked by their formula, or refused by the name of the method."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitnet import pack_weights

from qlora_exp.cli import main
from qlora_exp.config.compose import compose
from qlora_exp.errors import ModelError
from qlora_exp.estimate.weights_and_optimizer import base_bytes
from qlora_exp.models.base import clone_sharing_weights, load_base
from qlora_exp.models.inspect import describe
from qlora_exp.models.packed_weights import AWQ_ORDER
from qlora_exp.models.quantized_checkpoints import METHODS
from qlora_exp.models.tuning import attach, merged_tuned
from qlora_exp.paths import RunPaths
from qlora_exp.records.files import read_record
from qlora_exp.runs.entry_points import config_from_plain
from tests.conftest import save_tiny_model

GROUP = 16
Packed = tuple[dict[str, Tensor], Tensor]
"""The tensors of a packed layer by their parts, and its weight."""


def words(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along rows, the first one in the lowest bits, as Python's integers say it."""
    per_word = 32 // bits
    rows = []
    for row in codes.tolist():
        packed = []
        for start in range(0, len(row), per_word):
            word = sum(code << (bits * place) for place, code in enumerate(row[start : start + per_word]))
            packed.append(word - 2**32 if word >= 2**31 else word)
        rows.append(packed)
    return torch.tensor(rows, dtype=torch.int32)


def integers(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes (rows, columns), scales and zero points (rows, groups), and the weight that they stand for."""
    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).half().float()
    zeros = (-low / scales).round().clamp(0, 2**bits - 1)
    codes = (groups / scales.unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    codes = codes.clamp(0, 2**bits - 1)
    back = (codes - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)
    return codes.reshape(weight.shape).int(), scales, zeros.int(), back.reshape(weight.shape)


def gptq(weight: Tensor, bits: int = 4, zero_offset: int = 1, act_order: bool = False) -> Packed:
    order = torch.randperm(weight.shape[1]) if act_order else torch.arange(weight.shape[1])
    codes, scales, zeros, back = integers(weight[:, order], bits)
    inverse = order.argsort()
    parts = {
        "qweight": words(codes[:, inverse], bits).T.contiguous(),
        "qzeros": words(zeros.T, bits) - zero_offset * sum(1 << place for place in range(0, 32, bits)),
        "scales": scales.T.half().contiguous(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP)[inverse].int(),
    }
    return parts, back[:, inverse]


def gptq_without_zero_codes(weight: Tensor) -> Packed:
    """Version 2 stores zero points as they are; version 1 subtracts 1 from whole words, so that 0 borrows."""
    parts, back = gptq(weight, zero_offset=0, act_order=True)
    return parts, back


def awq(weight: Tensor) -> Packed:
    codes, scales, zeros, back = integers(weight, 4)
    place = torch.tensor(AWQ_ORDER).argsort()  # word's field → column
    interleave = lambda values: values.reshape(len(values), -1, 8)[..., place].reshape(len(values), -1)  # noqa: E731
    parts = {
        "qweight": words(interleave(codes.T), 4),
        "qzeros": words(interleave(zeros.T), 4),
        "scales": scales.T.half().contiguous(),
    }
    return parts, back


def compressed(weight: Tensor) -> Packed:
    codes, scales, zeros, back = integers(weight, 4)
    parts = {
        "weight_packed": words(codes, 4),
        "weight_scale": scales,
        "weight_zero_point": words(zeros.T, 4).T.contiguous(),
        "weight_shape": torch.tensor(weight.shape),
    }
    return parts, back


def compressed_int8(weight: Tensor) -> Packed:
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def torchao(weight: Tensor) -> Packed:
    codes, scales, zeros, back = integers(weight, 4)
    parts = {"_weight_qdata": (codes - 8), "_weight_scale": scales, "_weight_zero_point": (zeros - 8)}
    return {name: part if "scale" in name else part.to(torch.int8) for name, part in parts.items()}, back


def fp8(weight: Tensor) -> Packed:
    scale = torch.rand(-(-weight.shape[0] // 48), -(-weight.shape[1] // 32)) + 0.5
    values = weight.to(torch.float8_e4m3fn)
    spread = scale.repeat_interleave(48, 0)[: len(weight)].repeat_interleave(32, 1)[:, : weight.shape[1]]
    return {"weight": values, "weight_scale_inv": scale}, values.float() * spread


def fp8_by_row(weight: Tensor) -> Packed:
    scale = torch.rand(len(weight), 1) + 0.5
    values = weight.to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def bitnet(weight: Tensor, divides: bool = True) -> Packed:
    scale = weight.abs().mean()
    ternary = (weight / scale).round().clamp(-1, 1)
    stored = (1 / scale if divides else scale).reshape(1)
    return {"weight": pack_weights(ternary.clone()), "weight_scale": stored}, (
        ternary / stored if divides else ternary * stored
    )


def bitnet_online(weight: Tensor) -> Packed:
    scale = weight.abs().mean()
    return {"weight": weight}, (weight / scale).round().clamp(-1, 1) * scale


def compressed_settings(**more: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": False} | more
    return {"config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}}, "format": "pack-quantized"}


CHECKPOINTS: dict[str, tuple[str, dict[str, Any], Callable[[Tensor], Packed]]] = {
    "gptq v2 with activation order": (
        "gptq",
        {"bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2", "desc_act": True},
        gptq_without_zero_codes,
    ),
    "gptq with zero points of 0": (
        "gptq",
        {"bits": 4, "group_size": GROUP},
        lambda weight: gptq(torch.where(torch.arange(len(weight))[:, None] % 2 == 0, weight, weight.abs())),
    ),
    "gptq v2 by its newer name": (
        "gptq",
        {"bits": 4, "group_size": GROUP, "format": "gptq_v2"},
        lambda weight: gptq(weight, zero_offset=0),
    ),
    "gptq 8 bits": ("gptq", {"bits": 8, "group_size": GROUP}, lambda weight: gptq(weight, bits=8)),
    "gptq 2 bits": (
        "gptq",
        {"bits": 2, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
        lambda weight: gptq(weight, bits=2, zero_offset=0),
    ),
    "awq": ("awq", {"bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}, awq),
    "compressed-tensors int4": ("compressed-tensors", compressed_settings(), compressed),
    "compressed-tensors int8": (
        "compressed-tensors",
        compressed_settings(num_bits=8, strategy="channel") | {"format": "int-quantized"},
        compressed_int8,
    ),
    "torchao": ("torchao", {"quant_type": {"default": {"_type": "IntxWeightOnlyConfig"}}}, torchao),
    "fp8": ("fp8", {"weight_block_size": [48, 32]}, fp8),
    "fbgemm_fp8": ("fbgemm_fp8", {"activation_scale_ub": 1200.0}, fp8_by_row),
    "compressed-tensors fp8": (
        "compressed-tensors",
        compressed_settings(num_bits=8, type="float", strategy="channel") | {"format": "float-quantized"},
        fp8_by_row,
    ),
    "bitnet": ("bitnet", {"linear_class": "bitlinear"}, bitnet),
    "bitnet offline": (
        "bitnet",
        {"linear_class": "autobitlinear", "quantization_mode": "offline"},
        lambda weight: bitnet(weight, divides=False),
    ),
    "bitnet online": ("bitnet", {"linear_class": "autobitlinear", "quantization_mode": "online"}, bitnet_online),
}


def write_checkpoint(source: Path, folder: Path, kind: str) -> dict[str, Tensor]:
    """Write a tiny model as a checkpoint of ``kind``, and return the weights that it stands for."""
    method, settings, pack = CHECKPOINTS[kind]
    torch.manual_seed(0)
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    stored, expected = {}, {}
    for name, weight in weights.items():
        if not name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")):
            stored[name] = expected[name] = weight
            continue
        parts, expected[name] = pack(weight)
        stored |= {f"{name.removesuffix('.weight')}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    write_settings(folder, {"quant_method": method, **settings})
    return expected


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_quantized_checkpoint_loads_with_the_weights_that_its_codes_stand_for(
    kind: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    expected = write_checkpoint(tiny_models["llama"], tmp_path / "model", kind)
    config = compose(["model=local", f"model.path={tmp_path / 'model'}", "quantization=fp32"])
    architecture = describe(config.model)
    assert architecture.unpacked_from == CHECKPOINTS[kind][0]
    assert architecture.total_parameters == sum(weight.numel() for weight in expected.values())
    loaded = load_base(config, "cpu").model.state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(loaded[name], weight.float(), rtol=1e-6, atol=1e-7)


def test_numbered_experts_are_unpacked_before_they_become_one_tensor(tmp_path: Path) -> None:
    source = save_tiny_model("mixtral", tmp_path / "mixtral")
    expected = write_checkpoint(source, tmp_path / "model", "fp8")
    config = compose(["model=local", f"model.path={tmp_path / 'model'}", "quantization=fp32"])
    describe(config.model)
    loaded = load_base(config, "cpu").model.state_dict()
    (name,) = (name for name in expected if name.endswith("layers.0.block_sparse_moe.experts.1.w2.weight"))
    torch.testing.assert_close(loaded["model.layers.0.mlp.experts.down_proj"][1], expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_bitsandbytes_checkpoint_computes_as_transformers_loads_it(
    bits: int, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    settings = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_threshold=0.0,
    )
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["llama"], folder)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    base = load_base(compose(["model=local", f"model.path={folder}", "quantization=fp32"]), "cpu").model
    tokens = torch.arange(20).unsqueeze(0)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference.train()  # in eval mode, bitsandbytes may compute in bfloat16
    with torch.no_grad():
        difference = (base(input_ids=tokens).logits - reference(input_ids=tokens).logits).abs().max()
    spread = float(base(input_ids=tokens).logits.std())
    assert float(difference) < (1e-4 if bits == 4 else 0.05) * spread  # LLM.int8() rounds the inputs, too


@pytest.mark.parametrize("quantization", ["nf4", "int4_asym"])
def test_adapters_train_on_an_unpacked_base_and_the_record_names_its_method(
    quantization: str, tiny_models: dict[str, Path], tmp_path: Path, colour_task: Path
) -> None:
    write_checkpoint(tiny_models["llama"], tmp_path / "model", "gptq 8 bits")
    given = ["model=local", f"model.path={tmp_path / 'model'}", "task=local", f"task.path={colour_task}"]
    given += [f"quantization={quantization}", "training.max_steps=2", "training.device=cpu", "tracking=off"]
    assert main(["run", *given, f"output_root={tmp_path / 'outputs'}"]) == 0
    (file,) = (tmp_path / "outputs").rglob("record.json")
    record = read_record(file)
    assert record.plan is not None
    assert (record.status.value, record.plan.unpacked_from) == ("COMPLETED", "gptq")
    config = compose([*given, "tracking=off"])
    predicted = base_bytes(describe(config.model), config.quantization, "float32")
    assert record.memory.base_weight_bytes == predicted.base_weight_bytes


@pytest.mark.parametrize("kind", ["bitnet", "bitnet online"])
@pytest.mark.parametrize("method", ["full", "layerwise"])
def test_ternary_training_starts_from_what_a_bitnet_checkpoint_computes(
    kind: str, method: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    write_checkpoint(tiny_models["llama"], tmp_path / "model", kind)
    given = ["model=local", f"model.path={tmp_path / 'model'}", "quantization=fp32", "training.qat.format=ternary"]
    config = compose([*given, f"method={method}", *(["method.layers=[1]"] if method == "layerwise" else [])])
    base = load_base(config, "cpu")
    architecture = describe(config.model)
    tuned = attach(clone_sharing_weights(base), config, (), architecture)
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        before = base.model(input_ids=tokens).logits
        after = tuned(input_ids=tokens).logits
        assert float((after - before).abs().max()) < 0.01 * float(before.std())
        trained = tuned.model.layers[1].mlp.up_proj.weight
        trained += 1e-4 * torch.randn(trained.shape)  # as after a step: no value leaps
        moved = tuned(input_ids=tokens).logits
    assert float((moved - before).abs().max()) < 0.05 * float(before.std())


def test_a_bitnet_checkpoint_trains_in_three_values_and_ships_so(
    tiny_models: dict[str, Path], tmp_path: Path, colour_task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tiny_models["llama"], tmp_path / "model", "bitnet")
    given = ["model=local", f"model.path={tmp_path / 'model'}", "task=local", f"task.path={colour_task}"]
    given += ["quantization=fp32", "method=layerwise", "method.layers=[1]", "training.qat.format=ternary"]
    given += ["training.max_steps=2", "training.device=cpu", "tracking=off", f"output_root={tmp_path / 'outputs'}"]
    assert main(["run", *given]) == 0
    (file,) = (tmp_path / "outputs").rglob("record.json")
    record = read_record(file)
    assert record.shipped is not None
    assert record.shipped.format == "ternary"
    model, _ = merged_tuned(config_from_plain(record.config), RunPaths(file.parent).weights)
    for layer in model.model.layers:
        assert len(layer.mlp.up_proj.weight.abs().unique()) == 2


UNREAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    **{
        method: ({"quant_method": method}, [method, row.library])
        for method, row in METHODS.items()
        if row.format is None
    },
    "gptq in 3 bits": ({"quant_method": "gptq", "bits": 3}, ["gptq", "2, 4 and 8 bits", "gptqmodel"]),
    "gptq with modules of other bits": (
        {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down_proj.*": {"bits": 8}}},
        ["gptq", "2, 4 and 8 bits"],
    ),
    "packed int4 of torchao": (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}},
        ["torchao"],
    ),
    "another version of awq": ({"quant_method": "awq", "version": "gemv"}, ["awq", "version gemm"]),
    "nvfp4 in compressed-tensors": (
        {"quant_method": "compressed-tensors", **compressed_settings(), "format": "nvfp4-pack-quantized"},
        ["compressed-tensors", "pack-quantized"],
    ),
    "bitnet with norms": ({"quant_method": "bitnet", "use_rms_norm": True}, ["bitnet", "use_rms_norm"]),
    "fp8 with exponents": ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, ["fp8"]),
    "a method of the future": ({"quant_method": "qubits"}, ["qubits", "transformers doesn't load"]),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_other_methods_are_refused_with_their_library_and_what_would_do(
    kind: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    settings, says = UNREAD[kind]
    folder = Path(shutil.copytree(tiny_models["llama"], tmp_path / "model"))
    write_settings(folder, settings)
    with pytest.raises(ModelError) as caught:
        describe(compose(["model=local", f"model.path={folder}"]).model)
    assert all(text in str(caught.value) for text in [*says, str(folder), "unquantized"]), str(caught.value)


def test_what_transformers_can_unpack_is_named(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_models["llama"], tmp_path / "model"))
    write_settings(folder, {"quant_method": "mxfp4"})
    with pytest.raises(ModelError, match="Mxfp4Config") as caught:
        describe(compose(["model=local", f"model.path={folder}"]).model)
    assert "save_pretrained" in str(caught.value)


def test_every_method_that_transformers_loads_has_a_row() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    own = {"bitsandbytes_4bit", "bitsandbytes_8bit", "gguf", "gemma"}
    assert set(AUTO_QUANTIZATION_CONFIG_MAPPING) - own <= set(METHODS)


def test_a_layer_without_its_scales_is_refused_before_it_is_loaded(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    write_checkpoint(tiny_models["llama"], folder, "awq")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.scales"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers.0.mlp.up_proj is packed \(by awq\) and lacks its scales"):
        describe(compose(["model=local", f"model.path={folder}"]).model)
