"""Bytes of weights, quantization state and adapters, against sums made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_exp.architecture.targets import resolve_targets
from qlora_exp.config.compose import compose
from qlora_exp.models.adapters import attach_adapters
from qlora_exp.models.base import load_base
from qlora_exp.models.inspect import describe
from qlora_exp.models.weight_bytes import weight_bytes

BLOCK = 64
"""Weights to a block constant in bitsandbytes' 4-bit formats; the constants' own block is 256."""


def measured(folder: Path, *more: str) -> tuple[object, object]:
    config = compose(["model=local", f"model.path={folder}", *more])
    return describe(config.model), weight_bytes(load_base(config, "cpu").model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_unquantized_bytes_are_parameters_times_their_size_tied_ones_once(
    family: str, tiny_models: dict[str, Path]
) -> None:
    for mode, size in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
        architecture, counted = measured(tiny_models[family], f"quantization={mode}")
        buffers = counted.base_weight_bytes - size * architecture.total_parameters
        assert 0 <= buffers <= 512 * 4  # the rotary tables
        assert counted.quantization_state_bytes == counted.adapter_bytes == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_int8_keeps_a_byte_a_weight_and_a_scale_a_row(family: str, tiny_models: dict[str, Path]) -> None:
    architecture, counted = measured(tiny_models[family], "quantization=int8")
    _, whole = measured(tiny_models[family], "quantization=fp32")
    weights = sum(shape.in_features * shape.out_features for shape in architecture.weights)
    assert counted.base_weight_bytes == whole.base_weight_bytes - 3 * weights
    assert counted.quantization_state_bytes == 4 * sum(shape.out_features for shape in architecture.weights)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("mode", ["nf4", "fp4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_four_bits_keep_half_a_byte_a_weight_and_the_block_constants(
    family: str, mode: str, double: bool, tiny_models: dict[str, Path]
) -> None:
    chosen = f"quantization.double_quantization={str(double).lower()}"
    architecture, counted = measured(tiny_models[family], f"quantization={mode}", chosen)
    _, whole = measured(tiny_models[family], "quantization=fp32")
    sizes = [shape.in_features * shape.out_features for shape in architecture.weights]
    assert counted.base_weight_bytes == whole.base_weight_bytes - sum(4 * size - size // 2 for size in sizes)
    code = 16 * 4
    if double:  # constants in a byte each, their own constants and offset in fp32, a code book of 256
        expected = sum(size // BLOCK + 4 * -(-size // (BLOCK * 256)) + 4 + code + 256 * 4 for size in sizes)
    else:
        expected = sum(4 * (size // BLOCK) + code for size in sizes)
    shared_books = len(sizes) * (code + (256 * 4 if double else 0))
    assert expected - shared_books < counted.quantization_state_bytes <= expected


def test_adapters_are_counted_apart_from_the_base(tiny_models: dict[str, Path]) -> None:
    for mode in ("fp32", "int8", "nf4"):
        config = compose(["model=local", f"model.path={tiny_models['gpt2']}", f"quantization={mode}", "lora.r=4"])
        base = load_base(config, "cpu")
        before = weight_bytes(base.model)
        modules = resolve_targets(describe(config.model), config.targets)
        adapted = attach_adapters(base.model, config, modules)
        after = weight_bytes(adapted)
        assert after.base_weight_bytes == before.base_weight_bytes
        assert after.quantization_state_bytes == before.quantization_state_bytes
        assert after.adapter_bytes == 4 * adapted.get_nb_trainable_parameters()[0]
