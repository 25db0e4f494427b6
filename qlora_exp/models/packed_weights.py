"""Unpacks weights of checkpoints that are quantized already, by the formula of each format, without its library.

Each class below reads one format. ``marker`` is the tensor that a packed layer has, and ``parts`` are the others, all
under the layer's name. Unpacked weights are (rows, columns), as ``nn.Linear`` has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch import Tensor

MatrixShape = tuple[int, ...]
Parts = Mapping[str, Tensor]
FLOAT8 = ("F8_E4M3", "F8_E5M2")
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place of each of eight columns in an AWQ word, counted from the lowest four bits."""


class PackedFormat(Protocol):
    """How a checkpoint stores the weight of a linear layer."""

    @property
    def marker(self) -> str:
        """The tensor that every packed layer has."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Dtypes of the marker, as safetensors names them."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Other tensors of a packed layer; some formats store more than a weight's computation takes."""

    @property
    def needed(self) -> tuple[str, ...]:
        """Those without which there is no weight."""

    def shape(self, shapes: Mapping[str, MatrixShape], read: Callable[[str], Tensor]) -> MatrixShape:
        """Return rows and columns. ``read`` loads a part, for formats that store the shape in a tensor."""

    def unpack(self, parts: Parts) -> Tensor:
        """Return the weight, computed in float32."""


@dataclass(frozen=True)
class Gptq:
    """W[o, i] = (code − zero point) · scale of i's group, 2, 4 or 8 bits; codes are packed along the inputs.
    ``zero_offset``: version 1 of the format stores zero points less 1, subtracted from whole words: a zero point of 0
    borrows from its neighbour."""

    bits: int
    group: int
    zero_offset: int
    marker: ClassVar[str] = "qweight"
    dtypes: ClassVar[tuple[str, ...]] = ("I32",)
    parts: ClassVar[tuple[str, ...]] = ("qzeros", "scales", "g_idx")
    needed: ClassVar[tuple[str, ...]] = ("qzeros", "scales")

    def shape(self, shapes: Mapping[str, MatrixShape], read: Callable[[str], Tensor]) -> MatrixShape:
        words, outputs = shapes["qweight"]
        return outputs, words * 32 // self.bits

    def unpack(self, parts: Parts) -> Tensor:
        codes = int32_fields(parts["qweight"].T, self.bits)  # (outputs, inputs)
        ones = sum(1 << place for place in range(0, 32, self.bits))
        zeros = int32_fields(parts["qzeros"] + self.zero_offset * ones, self.bits)  # (groups, outputs)
        groups = parts.get("g_idx")
        if groups is None:
            groups = torch.arange(codes.shape[1]) // (self.group if self.group > 0 else codes.shape[1])
        scales = parts["scales"].float()
        groups = groups.long()
        return (codes.float() - zeros.float()[groups].T) * scales[groups].T


@dataclass(frozen=True)
class Awq:
    """W[o, i] = (code − zero point) · scale of i's group, 4 bits; codes are packed along the outputs, interleaved."""

    marker: ClassVar[str] = "qweight"
    dtypes: ClassVar[tuple[str, ...]] = ("I32",)
    parts: ClassVar[tuple[str, ...]] = ("qzeros", "scales")
    needed: ClassVar[tuple[str, ...]] = ("qzeros", "scales")

    def shape(self, shapes: Mapping[str, MatrixShape], read: Callable[[str], Tensor]) -> MatrixShape:
        inputs, words = shapes["qweight"]
        return words * 8, inputs

    def unpack(self, parts: Parts) -> Tensor:
        codes, zeros, scales = self._columns(parts["qweight"]), self._columns(parts["qzeros"]), parts["scales"].float()
        size = codes.shape[0] // scales.shape[0]
        return ((codes - zeros.repeat_interleave(size, 0)) * scales.repeat_interleave(size, 0)).T

    def _columns(self, packed: Tensor) -> Tensor:
        fields = int32_fields(packed, 4).reshape(packed.shape[0], -1, 8)
        return fields[..., list(AWQ_ORDER)].reshape(packed.shape[0], -1).float()


@dataclass(frozen=True)
class BitsAndBytes4:
    """Blocks of a row-major matrix in nf4 or fp4, as bitsandbytes itself dequantizes them."""

    kind: str
    marker: ClassVar[str] = "weight"
    dtypes: ClassVar[tuple[str, ...]] = ("U8",)
    parts: ClassVar[tuple[str, ...]] = (
        *("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
        *("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"),
    )
    needed: ClassVar[tuple[str, ...]] = ("weight.absmax", "weight.quant_map")

    def shape(self, shapes: Mapping[str, MatrixShape], read: Callable[[str], Tensor]) -> MatrixShape:
        stored = read(f"weight.quant_state.bitsandbytes__{self.kind}")
        return tuple(json.loads(bytes(stored.tolist()))["shape"])

    def unpack(self, parts: Parts) -> Tensor:
        state = QuantState.from_dict(
            {name: tensor for name, tensor in parts.items() if name != "weight"}, device=torch.device("cpu")
        )
        state.dtype = torch.float32
        weight: Tensor = dequantize_4bit(parts["weight"], state)
        return weight


@dataclass(frozen=True)
class BitsAndBytes8:
    """W = code · row's largest magnitude / 127."""

    marker: ClassVar[str] = "weight"
    dtypes: ClassVar[tuple[str, ...]] = ("I8",)
    parts: ClassVar[tuple[str, ...]] = ("SCB", "weight_format")
    needed: ClassVar[tuple[str, ...]] = ("SCB",)

    def shape(self, shapes: Mapping[str, MatrixShape], read: Callable[[str], Tensor]) -> MatrixShape:
        return shapes["weight"]

    def unpack(self, parts: Parts) -> Tensor:
        return parts["weight"].float() * (parts["SCB"].float() / 127).unsqueeze(1)


@dataclass(frozen=True)
class BitNet:
    """Ternary weights, four to a byte along the outputs. ``divides``: transformers' BitLinear divides by the stored
    scale, and its AutoBitLinear multiplies by it."""

    divides: bool
    marker: ClassVar[str] = "weight"
    dtypes: ClassVar[tuple[str, ...]] = ("U8",)
    parts: ClassVar[tuple[str, ...]] = ("weight_scale",)
    needed: ClassVar[tuple[str, ...]] = ("weight_scale",)

    def shape(self, shapes: Mapping[str, MatrixShape], read: Callable[[str], Tensor]) -> MatrixShape:
        rows, columns = shapes["weight"]
        return rows * 4, columns

    def unpack(self, parts: Parts) -> Tensor:
        packed, scale = parts["weight"], parts["weight_scale"].float()
        ternary = torch.cat([(packed >> place & 3).float() - 1 for place in (0, 2, 4, 6)])
        return ternary / scale if self.divides else ternary * scale


@dataclass(frozen=True)
class ScaledWeights:
    """W = (code − zero point) · scale with 8-bit codes, or fp8 values without a zero point.

    A scale belongs to the matrix, a row, a group of a row, or a block of ``block`` rows and columns."""

    marker: str
    scale: str
    zero_point: str = "weight_zero_point"
    dtypes: tuple[str, ...] = ("I8", *FLOAT8)
    block: tuple[int, int] | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        unneeded = ("input_scale", "input_zero_point", "output_scale", "activation_scale", "weight_shape")
        return (self.scale, self.zero_point, *unneeded)

    @property
    def needed(self) -> tuple[str, ...]:
        return (self.scale,)

    def shape(self, shapes: Mapping[str, MatrixShape], read: Callable[[str], Tensor]) -> MatrixShape:
        return shapes[self.marker]

    def unpack(self, parts: Parts) -> Tensor:
        codes, scale = parts[self.marker], parts[self.scale].float()
        zero_point = parts.get(self.zero_point)
        values = codes.float()
        if zero_point is not None:
            values = values - self._spread(zero_point.float(), codes.shape)
        return values * self._spread(scale, codes.shape)

    def _spread(self, scale: Tensor, shape: MatrixShape) -> Tensor:
        rows, columns = shape
        if scale.numel() == 1:
            return scale.reshape(1, 1)
        scale = scale.unsqueeze(1) if scale.ndim == 1 else scale
        high, wide = self.block or (rows // scale.shape[0], columns // scale.shape[1])
        return scale.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]


@dataclass(frozen=True)
class CompressedIntegers:
    """W = (code − zero point) · scale of a group; codes of ``bits`` bits, less their middle, packed along a row."""

    bits: int
    marker: ClassVar[str] = "weight_packed"
    dtypes: ClassVar[tuple[str, ...]] = ("I32",)
    parts: ClassVar[tuple[str, ...]] = (
        *("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        *("input_scale", "input_zero_point", "output_scale"),
    )
    needed: ClassVar[tuple[str, ...]] = ("weight_scale", "weight_shape")

    def shape(self, shapes: Mapping[str, MatrixShape], read: Callable[[str], Tensor]) -> MatrixShape:
        return tuple(int(size) for size in read("weight_shape").tolist())

    def unpack(self, parts: Parts) -> Tensor:
        rows, columns = (int(size) for size in parts["weight_shape"].tolist())
        middle = 2 ** (self.bits - 1)
        values = (int32_fields(parts["weight_packed"], self.bits)[:, :columns] - middle).float()
        scale = parts["weight_scale"].float().reshape(rows if parts["weight_scale"].numel() > 1 else 1, -1)
        groups = parts.get("weight_g_idx")
        if groups is None or bool((groups < 0).any()):
            groups = torch.arange(columns) // -(-columns // scale.shape[1])
        zero_point = parts.get("weight_zero_point")
        if zero_point is not None:
            if zero_point.dtype is torch.int32:
                zero_point = int32_fields(zero_point.T, self.bits).T[:rows] - middle
            values = values - zero_point.float().reshape(scale.shape)[:, groups.long()]
        weight: Tensor = values * scale[:, groups.long()]
        return weight


def int32_fields(packed: Tensor, bits: int) -> Tensor:
    """Return the fields of ``bits`` bits of each 32-bit word along a row, the lowest bits first."""
    places = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32)
    fields: Tensor = (packed.unsqueeze(-1) >> places) & (2**bits - 1)
    return fields.reshape(packed.shape[0], -1)


def gptq_format(settings: Mapping[str, Any]) -> PackedFormat | None:
    """Return how a GPTQ checkpoint is packed; ``None``: not in a way that is read here."""
    bits = settings.get("bits")
    version = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    if any(
        isinstance(own, Mapping) and own.get("bits", bits) != bits
        for own in dict(settings.get("dynamic") or {}).values()
    ):
        return None  # some modules have other bits
    if bits not in (2, 4, 8) or version not in ("gptq", "gptq_v2"):
        return None
    return Gptq(int(bits), int(settings.get("group_size", -1)), 1 if version == "gptq" else 0)


def awq_format(settings: Mapping[str, Any]) -> PackedFormat | None:
    """Return how an AWQ checkpoint is packed; ``None``: not in a way that is read here."""
    names = ("checkpoint_format", "version", "format")
    version = str(next((settings[name] for name in names if settings.get(name)), "gemm")).lower()
    if str(settings.get("backend", "")).lower() == "llm-awq":
        return None
    return Awq() if settings.get("bits", settings.get("w_bit", 4)) == 4 and version == "gemm" else None


def bitsandbytes_format(settings: Mapping[str, Any]) -> PackedFormat | None:
    """Return how a bitsandbytes checkpoint is packed; ``None``: not in a way that is read here."""
    if settings.get("load_in_8bit"):
        return BitsAndBytes8()
    kind = settings.get("bnb_4bit_quant_type", "fp4")
    stored = str(settings.get("bnb_4bit_quant_storage", "uint8"))
    return BitsAndBytes4(str(kind)) if stored == "uint8" and kind in ("nf4", "fp4") else None


def bitnet_format(settings: Mapping[str, Any]) -> PackedFormat | None:
    """Return how a BitNet checkpoint is packed; ``None``: it adds norms, which the plain architecture lacks."""
    return None if settings.get("use_rms_norm") else BitNet(settings.get("linear_class", "bitlinear") == "bitlinear")


def fp8_format(settings: Mapping[str, Any]) -> PackedFormat | None:
    """Return how an fp8 checkpoint with a scale for each block or matrix stores its weights; ``None``: its scales are
    exponents."""
    if settings.get("scale_fmt") == "ue8m0":
        return None
    size = settings.get("weight_block_size", (128, 128))
    block = (int(size[0]), int(size[1])) if size else None
    return ScaledWeights("weight", "weight_scale_inv", dtypes=FLOAT8, block=block)


def fbgemm_format(settings: Mapping[str, Any]) -> PackedFormat | None:
    """Return how an fp8 checkpoint with a scale for each row stores its weights."""
    return ScaledWeights("weight", "weight_scale", dtypes=FLOAT8)


def torchao_format(settings: Mapping[str, Any]) -> PackedFormat | None:
    """Return how a torchao checkpoint in safetensors stores integers of one to a byte, and fp8."""
    kinds = json.dumps(settings.get("quant_type") or "", default=str)
    if re.search(r'"_type": "Int4', kinds) or "int4_weight_only" in kinds:  # two codes in a byte, under the same names
        return None
    return ScaledWeights("_weight_qdata", "_weight_scale", "_weight_zero_point")


def compressed_format(settings: Mapping[str, Any]) -> PackedFormat | None:
    """Return how a compressed-tensors checkpoint is packed; ``None``: not in a way that is read here."""
    weights = [group.get("weights") or {} for group in (settings.get("config_groups") or {}).values()]
    bits = {entry.get("num_bits") for entry in weights}
    kind = settings.get("format")
    if len(bits) != 1 or settings.get("transform_config") or settings.get("sparsity_config"):
        return None
    if kind == "pack-quantized" and bits <= {2, 4, 8}:  # words of other widths changed from version to version
        return CompressedIntegers(int(str(bits.pop())))
    block = next((entry["block_structure"] for entry in weights if entry.get("block_structure")), None)
    if kind in ("int-quantized", "float-quantized", "naive-quantized") and bits == {8}:
        return ScaledWeights("weight", "weight_scale", block=(block[0], block[1]) if block else None)
    return None
