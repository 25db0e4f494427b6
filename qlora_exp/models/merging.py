"""Merges an adapter into the weights of its base: one model that needs no adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_exp.config.enums import ComputeDtype, Quantization
from qlora_exp.config.schema import Config
from qlora_exp.errors import ModelError
from qlora_exp.models.adapters import load_adapter
from qlora_exp.models.base import QUANTIZED_LINEARS, Base, load_base
from qlora_exp.models.integer_linear import IntegerLinear
from qlora_exp.models.starting_adapters import retie_embeddings


def merged_model(
    config: Config, adapter: Path, load: Callable[[Base, Path], PeftModel] = load_adapter
) -> tuple[PreTrainedModel, str]:
    """Return W + scale · B·A in fp32, on the CPU, from the *unquantized* base; and the fingerprint of that base.

    W holds the adapters that the run started from. ``load`` reads the run's adapter.

    Raises:
        ModelError: the base can't be loaded, the adapter doesn't fit it, or the merged weights are not finite.
    """
    unquantized = replace(config.quantization, mode=Quantization.fp32, compute_dtype=ComputeDtype.auto)
    base = load_base(replace(config, quantization=unquantized), "cpu")
    return merge_into(base, adapter, load), base.fingerprint


def merge_into(base: Base, adapter: Path, load: Callable[[Base, Path], PeftModel] = load_adapter) -> PreTrainedModel:
    """Return an unquantized base with the adapter merged into its weights.

    Raises:
        ModelError: the adapter doesn't fit, or the merged weights are not finite.
    """
    tied = bool(base.model.config.tie_word_embeddings)
    adapted = load(base, adapter)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT: NaNs detected in the merged weights
        raise ModelError(f"the adapter can't be merged: {error}", str(adapter), "train it again") from None
    assert isinstance(merged, PreTrainedModel)
    if tied:
        retie_embeddings(merged)
    return merged


def dequantized_base(config: Config, base: Base) -> Base:
    """Return a float32 base whose linear layers have the values that the quantized ``base`` computes with."""
    unquantized = replace(config.quantization, mode=Quantization.fp32, compute_dtype=ComputeDtype.auto)
    exact = load_base(replace(config, quantization=unquantized), "cpu")
    for name, module in base.model.named_modules():
        if isinstance(module, QUANTIZED_LINEARS):
            layer = exact.model.get_submodule(name.removesuffix(".base_layer"))  # without its adapter
            weight = _dequantized_weight(module).to("cpu", torch.float32)
            layer.weight.data = weight.T.contiguous() if isinstance(layer, Conv1D) else weight
    return exact


def _dequantized_weight(module: Any) -> torch.Tensor:
    """Return the weight with which a quantized layer computes, (rows, columns). LLM.int8() has a scale for each
    row, in 127ths (Dettmers et al. 2022)."""
    if isinstance(module, IntegerLinear):
        return module.dequantized_weight()
    if isinstance(module, Linear4bit):
        weight: torch.Tensor = dequantize_4bit(module.weight.data, module.weight.quant_state)
        return weight
    codes = module.state.CB if module.state.CB is not None else module.weight.CB
    scales = module.state.SCB if module.state.SCB is not None else module.weight.SCB
    codes = module.weight.data if codes is None else codes
    return codes.float() * scales.float()[:, None] / 127  # type: ignore[no-any-return]
