"""How fast this machine trains: a small random Llama forward and backward, in one quantization mode."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qlora_exp.config.schema import ComputeDtype, Quantization, QuantizationConfig
from qlora_exp.estimate.flops import MeanRow, train_flops_per_token
from qlora_exp.models.base import load_model
from qlora_exp.models.inspect import architecture_of
from qlora_exp.models.quiet_loading import quiet_loading
from qlora_exp.models.sources import ModelSource

PROBE_SIZES = {"cpu": (512, 4, 4, 128), "cuda": (2048, 2, 16, 512)}
"""Hidden width, layers, rows, tokens a row: on a card enough work a kernel that it doesn't wait for its host (assumed:
none was at hand)."""
PROBE_VOCABULARY = 4096


def measured_flops_per_second(mode: Quantization, device_kind: str, seconds: float) -> float:
    """Floating-point operations a second, counted as :func:`train_flops_per_token` counts them, of forward and backward
    passes through a frozen random base, repeated for ``seconds`` after one that isn't counted."""
    quantization = QuantizationConfig(mode, ComputeDtype.auto, True, 6.0)
    hidden, layers, rows, length = PROBE_SIZES[device_kind]
    with tempfile.TemporaryDirectory() as folder, quiet_loading():
        plain = _llama(hidden, layers, length)
        plain.save_pretrained(folder)
        model = load_model(ModelSource("calibration", folder, None, None, True), quantization, "sdpa", device_kind)
    model.train()
    model.get_input_embeddings().register_forward_hook(_with_gradient)
    architecture = architecture_of(plain)  # a quantized one's weights are packed: two to a byte in four bits
    flops = rows * length * train_flops_per_token(architecture, 0, MeanRow.whole(length), False, fused_head=False)
    tokens = torch.arange(rows * length, device=model.device).reshape(rows, length) % PROBE_VOCABULARY
    _pass(model, tokens)
    steps, began = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() - began < seconds:
        _pass(model, tokens)
        steps += 1
    return steps * flops / (time.perf_counter() - began)


def _llama(hidden: int, layers: int, length: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            vocab_size=PROBE_VOCABULARY,
            max_position_embeddings=length,
        )
    )


def _with_gradient(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_(True)


def _pass(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
