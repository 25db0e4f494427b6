"""Measures how fast this machine trains: forward and backward of a small random Llama in one quantization mode."""

from __future__ import annotations

import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qlora_exp.config.enums import ComputeDtype, Quantization
from qlora_exp.config.schema import QuantizationConfig
from qlora_exp.estimate.workload import MeanRow, train_flops_per_token
from qlora_exp.models.base import load_model
from qlora_exp.models.inspect import architecture_of
from qlora_exp.models.quiet_loading import quiet_loading
from qlora_exp.models.sources import ModelSource

PROBE_SIZES = {"cpu": (512, 4, 4, 128), "cuda": (2048, 2, 16, 512)}
"""Hidden width, layers, rows, tokens per row. On a GPU each kernel has enough work that it doesn't wait for the host
(an assumption: not measured)."""
PROBE_VOCABULARY = 4096


def measured_flops_per_second(mode: Quantization, device_kind: str, seconds: float) -> float:
    """Return the floating-point operations per second of forward and backward passes through a frozen random base.

    Operations are counted as in :func:`train_flops_per_token`. The passes repeat for ``seconds``, after one warm-up
    pass that isn't counted.
    """
    quantization = QuantizationConfig(mode, ComputeDtype.auto, True, 6.0, 64)
    hidden, layers, rows, length = PROBE_SIZES[device_kind]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=PROBE_VOCABULARY,
        max_position_embeddings=length,
    )
    with tempfile.TemporaryDirectory() as folder, quiet_loading():
        torch.manual_seed(0)
        unquantized = LlamaForCausalLM(config)
        unquantized.save_pretrained(folder)
        model = load_model(ModelSource("calibration", folder, None, None, True), quantization, "sdpa", device_kind)
    model.train()
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    architecture = architecture_of(unquantized)  # not of the quantized model: 4-bit weights are packed, two per byte
    flops = rows * length * train_flops_per_token(architecture, 0, MeanRow.whole(length), False, fused_head=False)
    tokens = torch.arange(rows * length, device=model.device).reshape(rows, length) % PROBE_VOCABULARY
    _pass(model, tokens)
    steps, started = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() - started < seconds:
        _pass(model, tokens)
        steps += 1
    return steps * flops / (time.perf_counter() - started)


def _pass(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
