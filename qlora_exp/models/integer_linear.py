"""Linear layers with frozen integer weights: ``quantization=int4_asym`` and the like.

Codes are kept packed, two to a byte at 3 and 4 bits, four at 2, and dequantized in every forward and backward pass. So
the dequantized weight isn't kept between the two, as in bitsandbytes' 4-bit layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from qlora_exp.config.allowed_values import INTEGER_MODES, codes_per_byte
from qlora_exp.config.schema import QuantizationConfig
from qlora_exp.quantizers.affine import AffineFormat, quantize_affine


class IntegerLinear(nn.Linear):
    """y = x Ŵᵀ + b with Ŵ = (codes − zero point) · scale.

    ``weight``: the packed codes, (rows, columns / codes in a byte), uint8. ``scale`` (float16) and, if asymmetric,
    ``zero_point`` (uint8): (rows, groups of a row).
    """

    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, format: AffineFormat) -> None:
        """Quantize ``weight`` (rows, columns), min to max of each group. Its dtype is that of the computation."""
        nn.Module.__init__(self)
        rows, columns = weight.shape
        self.in_features, self.out_features = columns, rows
        self.bits, self.symmetric, self.compute_dtype = format.bits, format.symmetric, weight.dtype
        quantized = quantize_affine(weight.detach(), format)
        codes = (quantized.codes - format.code_range[0]).reshape(rows, columns).to(torch.uint8)
        self.weight = nn.Parameter(_packed(codes, codes_per_byte(format.bits)), requires_grad=False)
        self.register_parameter("bias", bias)
        self.register_buffer("scale", quantized.scale.half().reshape(rows, -1), persistent=False)
        zero_point = None if format.symmetric else quantized.zero_point.to(torch.uint8).reshape(rows, -1)
        self.register_buffer("zero_point", zero_point, persistent=False)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight that the layer computes with: (rows, columns)."""
        codes = _unpacked(self.weight, codes_per_byte(self.bits)).reshape(*self.scale.shape, -1).float()
        zero_point = 2 ** (self.bits - 1) - 1 if self.zero_point is None else self.zero_point.float().unsqueeze(-1)
        weight: Tensor = codes.sub_(zero_point).mul_(self.scale.float().unsqueeze(-1))  # in place: one float32 copy
        return weight.reshape(self.out_features, -1).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        # As bitsandbytes' 4-bit layers: compute in one dtype, also under autocast, and give back the input's.
        output: Tensor = _Multiply.apply(input.to(self.compute_dtype), self)  # type: ignore[no-untyped-call]
        return (output if bias is None else output + bias).to(input.dtype)

    def extra_repr(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, {kind}"


class _Multiply(torch.autograd.Function):
    """x Ŵᵀ, which dequantizes Ŵ once more for its gradient instead of keeping it."""

    @staticmethod
    def forward(context: Any, input: Tensor, layer: IntegerLinear) -> Tensor:
        context.layer = layer
        return linear(input, layer.dequantized_weight(input.dtype))

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        gradient = gradients[0]
        return gradient @ context.layer.dequantized_weight(gradient.dtype), None


def integer_format(quantization: QuantizationConfig) -> AffineFormat | None:
    """Return the integers of a mode such as ``int4_asym``; ``None``: the mode has none of ours."""
    mode = INTEGER_MODES.get(quantization.mode)
    return AffineFormat(*mode, quantization.group) if mode is not None else None


def replace_linears(model: nn.Module, format: AffineFormat, names: set[str]) -> None:
    """Replace the linear layers ``names`` of ``model``, one after the other, by layers with integer weights.
    The plan has checked that the group divides their widths."""
    for name in sorted(names):
        module: Any = model.get_submodule(name)
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        model.set_submodule(name, IntegerLinear(weight, module.bias, format))


def _packed(codes: Tensor, per_byte: int) -> Tensor:
    """Pack codes (rows, columns) along the columns, the first code in the lowest bits."""
    bits = 8 // per_byte
    parts = codes.reshape(codes.shape[0], -1, per_byte)
    packed = parts[..., 0].clone()
    for place in range(1, per_byte):
        packed |= parts[..., place] << (bits * place)
    return packed


def _unpacked(packed: Tensor, per_byte: int) -> Tensor:
    bits = 8 // per_byte
    places = [(packed >> (bits * place)) & (2**bits - 1) for place in range(per_byte)]
    return torch.stack(places, -1).reshape(packed.shape[0], -1)
