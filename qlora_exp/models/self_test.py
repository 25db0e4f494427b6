"""Tests whether a quantization mode trains correctly on this machine. bitsandbytes doesn't test that itself."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from qlora_exp.config.enums import ComputeDtype, Quantization
from qlora_exp.config.schema import QuantizationConfig
from qlora_exp.models.base import QUANTIZED_LINEARS, load_model
from qlora_exp.models.integer_linear import IntegerLinear
from qlora_exp.models.quiet_loading import quiet_loading
from qlora_exp.models.sources import ModelSource

TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
"""Largest relative error of the gradient against fp32 arithmetic on the same (dequantized) weights, by compute dtype.
About ten times what rounding alone gives on two layers."""
INT8_TOLERANCE = 0.2
"""LLM.int8() also rounds the activations to 8 bits where it runs natively (CUDA)."""


@dataclass(frozen=True)
class SelfTest:
    """Result of a self-test: whether it passed, and the measured errors in words."""

    ok: bool
    detail: str


def quantization_self_test(mode: Quantization, device_kind: str) -> SelfTest:
    """Compare the gradients of a small random Llama in ``mode`` before and after an evaluation, and in fp32.

    ``ok``: the first two agree, and are close to that of an fp32 copy with the dequantized weights.
    """
    quantization = QuantizationConfig(mode, ComputeDtype.auto, True, 6.0, 64)
    with tempfile.TemporaryDirectory() as folder, quiet_loading():
        _small_llama().save_pretrained(folder)
        source = ModelSource("self-test", str(Path(folder)), None, None, True)
        model = load_model(source, quantization, "eager", device_kind)
    before = _gradient(model)
    with torch.no_grad():
        model.eval()(input_ids=_tokens(model))
    after = _gradient(model)
    reference = _gradient(dequantized(model))
    changed, error = _relative_error(after, before), _relative_error(before, reference)
    computed_in = str(model.dtype).removeprefix("torch.")
    tolerance = TOLERANCES[computed_in]
    if mode is Quantization.int8 and device_kind != "cpu":
        tolerance = INT8_TOLERANCE
    detail = f"{computed_in}; error against fp32 {error:.1e}; change after an evaluation {changed:.1e}"
    return SelfTest(changed <= 1e-6 + tolerance * 1e-2 and error <= tolerance, detail)


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """Return an fp32 copy of ``model`` with its quantized weights dequantized."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, QUANTIZED_LINEARS):
            if isinstance(module, IntegerLinear):
                weight = module.dequantized_weight()
            else:
                weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None)).float()
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if module.bias is not None:
                linear.bias = nn.Parameter(module.bias.float(), requires_grad=False)
            plain.set_submodule(name, linear)
    for parameter in plain.parameters():
        parameter.data = parameter.data.float()
    for buffer in plain.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()
    return plain


def _small_llama() -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=256,
                initializer_range=0.05,
            )
        )


def _tokens(model: PreTrainedModel) -> torch.Tensor:
    return torch.arange(48, device=model.device).reshape(2, 24) % 251


def _gradient(model: PreTrainedModel) -> torch.Tensor:
    """Return the loss's gradient at the embeddings, in training mode: what an adapter on the first layer would see."""
    model.train()
    tokens = _tokens(model)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    loss = model(inputs_embeds=embedded, labels=tokens).loss
    loss.backward()
    model.eval()
    gradient: torch.Tensor | None = embedded.grad
    assert gradient is not None
    return gradient.float()


def _relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())
