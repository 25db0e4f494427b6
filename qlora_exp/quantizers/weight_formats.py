"""The formats to which weights are rounded: integers with a scale, GGUF's blocks, and ternary weights.

Each format rounds a matrix (rows, columns) and says how many bits the packed matrix takes. Training with rounded
weights, shipping them, and the sizes that a plan names all ask the same object.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qlora_exp.errors import ConfigError, nearest
from qlora_exp.quantizers.affine import AffineFormat, Granularity, quantize_affine

BLOCK_WEIGHTS = 32
"""Weights of a row that share a scale in GGUF's q8_0, q4_0 and q4_1."""
GGUF_BITS = {"q8_0": 8.5, "q4_0": 4.5, "q4_1": 5.0}
"""Bits per weight, scales included."""
TERNARY = "ternary"
TERNARY_BITS = 1.6875
"""GGUF's TQ1_0 packs five ternary weights into a byte: 54 bytes for 256 weights, scale included."""
INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))
FORMATS = (*INTEGERS, *GGUF_BITS, TERNARY)


class WeightFormat(Protocol):
    """A number format for the weights of linear layers."""

    @property
    def name(self) -> str:
        """E.g. ``int4_asym_g64``, ``q4_0``, ``ternary``."""

    @property
    def group(self) -> int | None:
        """Inputs of a row that share a scale, by which a layer's width must be divisible; ``None``: any width does."""

    def rounded(self, weight: Tensor, search: bool = False) -> Tensor:
        """Return what the packed ``weight`` (rows, columns) stands for, in float32.

        Args:
            search: choose each group's range by the smallest squared error, where the format has a choice.
        """

    def stored_bits(self, rows: int, columns: int) -> float:
        """Return the bits of the packed matrix."""


@dataclass(frozen=True)
class IntegerFormat:
    """Integers of 2 to 8 bits, see :class:`~qlora_exp.quantizers.affine.AffineFormat`."""

    affine: AffineFormat

    @property
    def name(self) -> str:
        return self.affine.name

    @property
    def group(self) -> int | None:
        return self.affine.granularity if isinstance(self.affine.granularity, int) else None

    def rounded(self, weight: Tensor, search: bool = False) -> Tensor:
        return quantize_affine(weight, self.affine, search=search).dequantized()

    def stored_bits(self, rows: int, columns: int) -> float:
        return float(self.affine.stored_bits(rows, columns))


@dataclass(frozen=True)
class BlockFormat:
    """A block type of GGUF, with the numerics of llama.cpp's reference: a file written from rounded weights, or from
    the weights before, holds the same numbers."""

    name: str
    group: int | None = BLOCK_WEIGHTS

    def rounded(self, weight: Tensor, search: bool = False) -> Tensor:
        blocks = weight.float().reshape(-1, BLOCK_WEIGHTS)
        if self.name == "q8_0":
            scale = blocks.abs().amax(1, keepdim=True) / 127
            return (_half(scale) * _half_away(blocks * _inverse(scale))).reshape(weight.shape)
        if self.name == "q4_0":
            largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
            scale = largest / -8
            codes = torch.trunc(blocks * _inverse(scale) + 8.5).clamp(0, 15) - 8
            return (_half(scale) * codes).reshape(weight.shape)
        low = blocks.amin(1, keepdim=True)
        scale = (blocks.amax(1, keepdim=True) - low) / 15
        codes = torch.trunc((blocks - low) * _inverse(scale) + 0.5).clamp(0, 15)
        return (_half(scale) * codes + _half(low)).reshape(weight.shape)

    def stored_bits(self, rows: int, columns: int) -> float:
        return rows * columns * GGUF_BITS[self.name]


@dataclass(frozen=True)
class TernaryFormat:
    """Weights −s, 0 and s with one scale s for the matrix: its mean magnitude (Ma et al. 2024, BitNet b1.58). A matrix
    that is ternary already stays as it is."""

    name: str = TERNARY
    group: int | None = None

    def rounded(self, weight: Tensor, search: bool = False) -> Tensor:
        exact = weight.float()
        if is_ternary(exact):
            return exact
        scale = _half(exact.abs().mean().clamp(min=1e-5))
        return torch.round(exact / scale).clamp(-1, 1) * scale

    def stored_bits(self, rows: int, columns: int) -> float:
        return rows * columns * TERNARY_BITS


def is_ternary(weight: Tensor) -> bool:
    """Return whether a matrix has no values but −s, 0 and s."""
    magnitude = weight.abs()
    return bool(((magnitude == 0) | (magnitude == magnitude.max())).all())


def ternary_masters(ternary: Tensor) -> Tensor:
    """Return weights that :class:`TernaryFormat` rounds to ``ternary``, for training to start from.

    The scale of a rounded matrix is its mean magnitude, to which zeros add nothing: so the others are divided by their
    share. One zero becomes a thousandth of the scale, or else the matrix would be taken for one that is rounded.
    """
    share = float((ternary != 0).float().mean())
    if share in (0.0, 1.0):
        return ternary.clone()
    masters = ternary / share
    zero = int((ternary == 0).flatten().nonzero()[0])
    masters.view(-1)[zero] = ternary.abs().max() / 1000
    return masters


def weight_format(name: str, symmetric: bool = False, group: str | int = 64) -> WeightFormat:
    """Return the format ``name``: ``int2`` to ``int8`` (with ``symmetric`` and ``group``), ``q8_0``, ``q4_0``,
    ``q4_1`` or ``ternary``.

    Args:
        symmetric: integers without a zero point.
        group: inputs that share a scale, ``channel`` (an output row) or ``tensor``.
    """
    if re.fullmatch(r"int[2-8]", name):
        size: Granularity = int(group) if str(group).isdecimal() else group  # type: ignore[assignment]
        return IntegerFormat(AffineFormat(int(name[3:]), symmetric, size))
    if name in GGUF_BITS:
        return BlockFormat(name)
    if name == TERNARY:
        return TernaryFormat()
    raise ConfigError(f"there is no weight format {name!r}", "format", nearest(name, FORMATS))


def packed_bytes(format: WeightFormat, shapes: list[tuple[int, int]]) -> int:
    """Return the bytes of packed matrices of these shapes (rows, columns)."""
    return round(sum(format.stored_bits(rows, columns) for rows, columns in shapes) / 8)


def _half(value: Tensor) -> Tensor:
    return value.half().float()


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)


def _half_away(value: Tensor) -> Tensor:
    """Round halves away from zero, as C's ``roundf``."""
    magnitude = value.abs()
    floored = magnitude.floor()
    return value.sign() * (floored + (2 * (magnitude - floored)).floor())
