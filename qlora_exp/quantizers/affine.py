"""Affine quantization of weight matrices: codes = round(w / scale) + zero point, and back.

Integers with one scale (and, if asymmetric, one zero point) for the whole matrix, for each output row, or for each
group of inputs of a row. Zero is always exact, because the zero point is an integer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Granularity = int | Literal["tensor", "channel"]
"""One scale for the whole matrix, for each output channel (row), or for each group of so many inputs of a row."""

SCALE_BITS = 16
"""A scale is a float16 number."""
SMALLEST_SCALE = 2.0**-24
"""The smallest float16 above 0: scales of small weights are subnormal."""
SHRINKS = 32
"""How many ranges the search for the smallest squared error tries, from the whole range down to :data:`SMALLEST`."""
SMALLEST = 0.3
EXPONENTS = tuple(step / 10 for step in range(10))
"""α of the activation-aware calibration."""


@dataclass(frozen=True)
class AffineFormat:
    """``bits``: of a code, 2 to 8. ``symmetric``: without a zero point, codes from −(2^(bits−1) − 1) to its negative;
    else codes from 0 to 2^bits − 1."""

    bits: int
    symmetric: bool
    granularity: Granularity

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        largest = 2 ** (self.bits - 1) - 1
        return (-largest, largest) if self.symmetric else (0, 2**self.bits - 1)

    @property
    def name(self) -> str:
        """E.g. ``int4_asym_g64``, ``int8_sym_channel``."""
        kind = "sym" if self.symmetric else "asym"
        place = f"g{self.granularity}" if isinstance(self.granularity, int) else self.granularity
        return f"int{self.bits}_{kind}_{place}"

    def stored_bits(self, rows: int, columns: int) -> int:
        """Return the bits of a packed matrix of this shape: codes, scales and zero points."""
        zero_bits = 0 if self.symmetric else self.bits
        return rows * columns * self.bits + self.groups(rows, columns) * (SCALE_BITS + zero_bits)

    def groups(self, rows: int, columns: int) -> int:
        """Return the number of scales of a matrix of this shape."""
        if self.granularity == "tensor":
            return 1
        return rows if self.granularity == "channel" else rows * (columns // int(self.granularity))


@dataclass(frozen=True)
class AffineWeight:
    """A quantized matrix (rows, columns). ``codes``: int32, (groups, values in a group). ``scale`` and ``zero_point``:
    (groups, 1), float32 (rounded to float16) and int32; the zero point of a symmetric format is 0. ``input_scale``:
    (columns,), by which the weights were multiplied before they were quantized; ``None``: they weren't."""

    format: AffineFormat
    rows: int
    columns: int
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    input_scale: Tensor | None = None

    @property
    def stored_bits(self) -> int:
        """The bits of the packed matrix."""
        extra = 0 if self.input_scale is None else self.columns * SCALE_BITS
        return self.format.stored_bits(self.rows, self.columns) + extra

    def dequantized(self) -> Tensor:
        """Return the matrix that the codes stand for: (rows, columns), float32."""
        weight = ((self.codes - self.zero_point) * self.scale).reshape(self.rows, self.columns)
        return weight if self.input_scale is None else weight / self.input_scale

    def clipped_share(self, weight: Tensor) -> float:
        """Return the share of ``weight``'s values that lie more than half a step beyond the range of the codes."""
        low, high = self.format.code_range
        scaled = weight.float() if self.input_scale is None else weight.float() * self.input_scale
        exact = grouped(scaled, self.format) / self.scale + self.zero_point
        return float(((exact < low - 0.5) | (exact > high + 0.5)).float().mean())


def quantize_affine(weight: Tensor, format: AffineFormat, *, search: bool = False) -> AffineWeight:
    """Quantize ``weight`` (rows, columns).

    Args:
        search: choose the range of each group that has the smallest squared error, instead of min to max.

    Example: values from −20 to 1000 in 8 bits, asymmetric: scale (1000 + 20) / 255 = 4, zero point 20 / 4 = 5.
    """
    rows, columns = weight.shape
    groups = grouped(weight.float(), format)
    low = groups.amin(1, keepdim=True).clamp(max=0)  # the range contains 0, so that 0 has a code
    high = groups.amax(1, keepdim=True).clamp(min=0)
    codes, scale, zero_point = _codes(groups, low, high, format)
    if search:
        error = _error(groups, codes, scale, zero_point)
        for shrink in torch.linspace(SMALLEST, 1.0, SHRINKS)[:-1].tolist():
            other_codes, other_scale, other_zero = _codes(groups, low * shrink, high * shrink, format)
            other_error = _error(groups, other_codes, other_scale, other_zero)
            better = other_error < error
            error = torch.where(better, other_error, error)
            codes = torch.where(better, other_codes, codes)
            scale, zero_point = torch.where(better, other_scale, scale), torch.where(better, other_zero, zero_point)
    return AffineWeight(format, rows, columns, codes, scale, zero_point)


def quantize_activation_aware(weight: Tensor, format: AffineFormat, inputs: Tensor) -> AffineWeight:
    """Quantize ``weight`` (rows, columns) so that the layer's output on ``inputs`` (tokens, columns) changes little.

    Columns that see large inputs are multiplied by s = mean|x|^α before they are quantized and divided by it after, so
    that their relative error is smaller. α is the one of :data:`EXPONENTS` with the smallest output error; α = 0 leaves
    the weights as they are. Lin et al. 2024, AWQ, section 3.2.
    """
    magnitude = inputs.float().abs().mean(0).clamp(min=1e-6)
    best, best_error = None, float("inf")
    for exponent in EXPONENTS:
        scale = magnitude**exponent
        scale = (scale / (scale.max() * scale.min()).sqrt()).half().float()
        quantized = quantize_affine(weight.float() * scale, format)
        if exponent:
            quantized = replace(quantized, input_scale=scale)
        error = output_error(weight, quantized.dequantized(), inputs)
        if error < best_error:
            best, best_error = quantized, error
    assert best is not None
    return best


def output_error(weight: Tensor, other: Tensor, inputs: Tensor) -> float:
    """Return ‖X (W − Ŵ)ᵀ‖ / ‖X Wᵀ‖ for inputs X (tokens, columns): the relative error of the layer's output."""
    exact = inputs.float() @ weight.float().T
    return float((inputs.float() @ (weight.float() - other).T).norm() / exact.norm().clamp(min=1e-12))


def grouped(weight: Tensor, format: AffineFormat) -> Tensor:
    """Return the values that share a scale as rows: (groups, values in a group)."""
    if format.granularity == "tensor":
        return weight.reshape(1, -1)
    return weight if format.granularity == "channel" else weight.reshape(-1, int(format.granularity))


def _codes(groups: Tensor, low: Tensor, high: Tensor, format: AffineFormat) -> tuple[Tensor, Tensor, Tensor]:
    smallest, largest = format.code_range
    span = torch.maximum(high, -low) if format.symmetric else high - low
    scale = (span / largest).clamp(min=SMALLEST_SCALE).half().float()  # above 0 for a group of zeros
    zero_point = torch.zeros_like(scale) if format.symmetric else torch.round(-low / scale).clamp(smallest, largest)
    codes = torch.clamp(torch.round(groups / scale) + zero_point, smallest, largest)
    return codes.int(), scale, zero_point.int()


def _error(groups: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return (((codes - zero_point) * scale - groups) ** 2).sum(1, keepdim=True)
