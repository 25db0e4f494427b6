"""Weights rounded to a format are the numbers that the packed file holds."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from qlora_exp.quantizers.weight_formats import GGUF_BITS, TERNARY_BITS, weight_format


def weights(scale: float = 0.05) -> torch.Tensor:
    drawn = torch.randn(24, 256, generator=torch.Generator().manual_seed(3)) * scale
    drawn[0] = 0.0
    drawn[1, :32] = 1.0
    return drawn


@pytest.mark.parametrize("name", GGUF_BITS)
@pytest.mark.parametrize("scale", [0.05, 1e-6, 30.0])
def test_gguf_blocks_are_those_of_the_gguf_package_bit_by_bit(name: str, scale: float) -> None:
    kind = gguf.GGMLQuantizationType[name.upper()]
    packed = gguf.quants.quantize(weights(scale).numpy(), kind)
    format = weight_format(name)
    rounded = format.rounded(weights(scale))
    assert np.array_equal(rounded.numpy(), gguf.quants.dequantize(packed, kind))
    assert packed.nbytes * 8 == format.stored_bits(24, 256)
    assert np.array_equal(gguf.quants.quantize(rounded.numpy(), kind).shape, packed.shape)


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_ternary_weights_survive_a_ternary_file(kind: str) -> None:
    format = weight_format("ternary")
    rounded = format.rounded(weights())
    assert len(rounded.unique()) == 3
    packed = gguf.quants.quantize(rounded.numpy(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind]), rounded.numpy())
    if kind == "TQ1_0":
        assert packed.nbytes * 8 == format.stored_bits(24, 256) == TERNARY_BITS * 24 * 256


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", ["tensor", "channel", 64])
def test_more_bits_mean_a_smaller_error(symmetric: bool, group: str | int) -> None:
    exact = weights()
    errors = [
        float((weight_format(f"int{bits}", symmetric, group).rounded(exact) - exact).norm()) for bits in range(2, 9)
    ]
    assert errors == sorted(errors, reverse=True)
