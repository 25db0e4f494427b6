"""Affine quantization: what torchao computes, the arithmetic by hand, and what more bits and better ranges give."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from qlora_exp.quantizers.affine import (
    AffineFormat,
    Granularity,
    output_error,
    quantize_activation_aware,
    quantize_affine,
)

REFERENCE = json.loads(Path(__file__).with_name("torchao_reference.json").read_text(encoding="utf-8"))
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "channel", 16)


def uneven_weights() -> torch.Tensor:
    """Rows of different size, and one far outlier."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(24, 64, generator=generator) * torch.rand(24, 1, generator=generator)
    weight[3, 5] = 4.0
    return weight


def relative_error(format: AffineFormat, search: bool = False) -> float:
    weight = uneven_weights()
    return float((quantize_affine(weight, format, search=search).dequantized() - weight).norm() / weight.norm())


@pytest.mark.parametrize(
    "reference", REFERENCE["formats"], ids=lambda f: f"{f['bits']}-{f['symmetric']}-{f['granularity']}"
)
def test_scales_zero_points_and_codes_are_those_of_torchao(reference: dict[str, object]) -> None:
    format = AffineFormat(reference["bits"], reference["symmetric"], reference["granularity"])  # type: ignore[arg-type]
    quantized = quantize_affine(torch.tensor(REFERENCE["weight"]), format)
    assert quantized.scale.flatten().tolist() == reference["scale"]
    # torchao rounds the zero point with the scale before that is rounded to float16: it may be one off.
    zero_point = torch.tensor(reference["zero_point"]).reshape(-1, 1)
    assert (quantized.zero_point - zero_point).abs().max() <= 1
    same = (quantized.zero_point == zero_point).flatten()
    assert same.float().mean() > 0.9
    codes = torch.tensor(reference["codes"]).reshape(quantized.codes.shape)
    assert torch.equal(quantized.codes[same], codes[same])


def test_values_from_minus_20_to_1000_in_8_bits_have_scale_4_and_zero_point_5() -> None:
    weight = torch.tensor([[-20.0, 0.0, 100.0, 500.0, 1000.0]])
    quantized = quantize_affine(weight, AffineFormat(8, symmetric=False, granularity="tensor"))
    assert quantized.scale.item() == 4
    assert quantized.zero_point.item() == 5
    assert quantized.codes.tolist() == [[0, 5, 30, 130, 255]]
    assert torch.equal(quantized.dequantized(), weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_stays_zero_even_where_all_weights_are_positive(
    bits: int, granularity: Granularity, symmetric: bool
) -> None:
    weight = uneven_weights().abs() + 0.5
    weight[:, ::7] = 0
    weight[2] = 0  # a group of zeros alone
    for search in (False, True):
        back = quantize_affine(weight, AffineFormat(bits, symmetric, granularity), search=search).dequantized()
        assert bool((back[weight == 0] == 0).all())
        assert bool(back.isfinite().all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_each_bit_and_the_search_for_a_range_lower_the_error(granularity: Granularity, symmetric: bool) -> None:
    formats = [AffineFormat(bits, symmetric, granularity) for bits in range(2, 9)]
    for search in (False, True):
        assert all(a > b for a, b in pairwise(relative_error(format, search) for format in formats))
    assert all(relative_error(format, search=True) <= relative_error(format) for format in formats)
    assert relative_error(formats[0], search=True) < 0.95 * relative_error(formats[0])


def test_smaller_groups_have_a_smaller_error_and_more_bits() -> None:
    formats = [AffineFormat(4, symmetric=False, granularity=granularity) for granularity in GRANULARITIES]
    assert all(a > b for a, b in pairwise(map(relative_error, formats)))
    assert [format.stored_bits(24, 64) - 4 * 24 * 64 for format in formats] == [20, 24 * 20, 96 * 20]


def test_activations_that_differ_by_column_are_heeded_and_equal_ones_change_nothing() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, format = uneven_weights(), AffineFormat(3, symmetric=False, granularity=16)
    inputs = torch.randn(200, 64, generator=generator) * torch.logspace(-2, 1, 64)
    by_range = output_error(weight, quantize_affine(weight, format).dequantized(), inputs)
    aware = quantize_activation_aware(weight, format, inputs)
    assert output_error(weight, aware.dequantized(), inputs) < 0.9 * by_range
    assert aware.stored_bits == format.stored_bits(24, 64) + 64 * 16
    equal = quantize_activation_aware(weight, format, torch.ones(10, 64))
    assert torch.equal(equal.dequantized(), quantize_affine(weight, format).dequantized())


def test_values_beyond_a_smaller_range_are_counted() -> None:
    weight, format = uneven_weights(), AffineFormat(4, symmetric=True, granularity="tensor")
    assert quantize_affine(weight, format).clipped_share(weight) == 0
    searched = quantize_affine(weight, format, search=True)
    largest = 7.5 * searched.scale.item()
    assert searched.clipped_share(weight) == pytest.approx(float((weight.abs() > largest).float().mean()))
    assert searched.clipped_share(weight) > 0
