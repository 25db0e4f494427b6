"""Frozen integer bases: their numbers, gradients, bytes, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_exp.cli import main
from qlora_exp.config.allowed_values import INTEGER_MODES
from qlora_exp.config.compose import compose
from qlora_exp.config.enums import Quantization
from qlora_exp.errors import ConfigError
from qlora_exp.models.base import load_base
from qlora_exp.models.integer_linear import IntegerLinear
from qlora_exp.models.merging import dequantized_base
from qlora_exp.models.self_test import quantization_self_test
from qlora_exp.quantizers.affine import AffineFormat, quantize_affine


@pytest.mark.parametrize("mode", INTEGER_MODES)
def test_packed_codes_stand_for_the_rounded_weights_and_the_gradient_is_theirs(mode: Quantization) -> None:
    torch.manual_seed(0)
    exact, bias, format = torch.randn(6, 32), nn.Parameter(torch.randn(6)), AffineFormat(*INTEGER_MODES[mode], 8)
    layer, rounded = IntegerLinear(exact, bias, format), quantize_affine(exact, format).dequantized()
    assert torch.equal(layer.dequantized_weight(), rounded)
    inputs = torch.randn(3, 5, 32, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = layer(inputs)
    assert not saved  # the dequantized weight isn't kept for the backward pass
    output.square().sum().backward()
    reference = inputs.detach().clone().requires_grad_()
    nn.functional.linear(reference, rounded, bias).square().sum().backward()
    assert torch.allclose(inputs.grad, reference.grad, atol=1e-5)
    assert layer.weight.nbytes == 6 * 32 * {8: 8, 4: 4, 3: 4, 2: 2}[format.bits] // 8


def test_an_integer_base_trains_on_its_dequantized_weights() -> None:
    for mode in (Quantization.int4_asym, Quantization.int8_sym):
        assert quantization_self_test(mode, "cpu").ok


def test_the_dequantized_base_has_the_values_that_an_integer_base_computes_with(tiny_models: dict[str, Path]) -> None:
    for family in ("llama", "gpt2"):  # gpt2: transposed layers
        path = f"model.path={tiny_models[family]}"
        config = compose(["model=local", path, "quantization=int4_asym", "quantization.group=16"])
        base = load_base(config, "cpu")
        assert any(isinstance(module, IntegerLinear) for module in base.model.modules())
        tokens = torch.arange(12)[None]
        with torch.no_grad():
            expected = base.model(tokens).logits
            again = dequantized_base(config, base).model(tokens).logits
            exact = load_base(replace(config, quantization=compose(["quantization=fp32"]).quantization), "cpu")
            unrounded = exact.model(tokens).logits
        assert torch.allclose(again, expected, atol=1e-4)
        assert not torch.allclose(unrounded, expected, atol=1e-4)


def test_a_group_that_does_not_divide_is_refused_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "quantization=int4_asym", "quantization.group=128", "training.max_steps=5"]) == 2
    message = capsys.readouterr().err
    assert "192 inputs" in message
    assert "quantization.group=64" in message


def test_what_needs_to_read_packed_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"DoRA.*int4_sym"):
        compose(["quantization=int4_sym", "lora.dora=true"])
    with pytest.raises(ConfigError, match="unpack"):
        compose(["quantization=int4_sym", "method=peft", "method.peft_type=oft"])
    with pytest.raises(ConfigError, match="method"):
        compose(["quantization=int4_sym", "method=full"])
