"""Counts the exact bytes of a model's tensors: base weights, quantization state and adapters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear8bitLt
from torch import nn

from qlora_exp.models.integer_linear import IntegerLinear
from qlora_exp.models.tuning import tuned_parameters


@dataclass(frozen=True)
class WeightBytes:
    """``base_weight_bytes``: parameters and buffers. ``quantization_state_bytes``: block constants, code books, row
    scales. ``adapter_bytes``: what the run trains, also weights of the base itself. Each tensor counts once, also tied
    weights."""

    base_weight_bytes: int
    quantization_state_bytes: int
    adapter_bytes: int


def weight_bytes(model: nn.Module) -> WeightBytes:
    """Count the bytes of ``model``, quantized or not, with adapters or without."""
    adapter = _bytes_by_storage(parameter for _, parameter in tuned_parameters(model))
    tensors = _bytes_by_storage([*model.parameters(), *model.buffers()])
    state = _bytes_by_storage(tensor for module in model.modules() for tensor in _quantization_state(module))
    weights = _bytes_by_storage(model.parameters())
    state = {key: size for key, size in state.items() if key not in weights}
    base = {key: size for key, size in tensors.items() if key not in adapter and key not in state}
    return WeightBytes(sum(base.values()), sum(state.values()), sum(adapter.values()))


def _bytes_by_storage(tensors: Iterator[torch.Tensor] | list[torch.Tensor]) -> dict[tuple[int, int], int]:
    """Map each place in memory to its bytes: a tied weight counts once, as does an int8 weight that is seen twice."""
    return {(tensor.data_ptr(), tensor.nbytes): tensor.nbytes for tensor in tensors if tensor.nbytes}


def _quantization_state(module: nn.Module) -> Iterator[torch.Tensor]:
    for parameter in module.parameters(recurse=False):
        state = getattr(parameter, "quant_state", None)
        if isinstance(state, QuantState):
            yield from _four_bit_state(state)
        scales = getattr(parameter, "SCB", None)
        if isinstance(scales, torch.Tensor):
            yield scales
    if isinstance(module, IntegerLinear):
        yield from module.buffers(recurse=False)
    if isinstance(module, Linear8bitLt):
        yield from (value for value in (module.state.CB, module.state.SCB) if isinstance(value, torch.Tensor))


def _four_bit_state(state: QuantState) -> Iterator[torch.Tensor]:
    """Yield block constants and code book; with double quantization also the constants' own and their offset."""
    yield from (value for value in (state.absmax, state.code, state.offset) if isinstance(value, torch.Tensor))
    if state.state2 is not None:
        yield from _four_bit_state(state.state2)
