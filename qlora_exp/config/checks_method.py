"""What must hold in a configuration's tuning method."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qlora_exp.config.allowed_values import QUANTIZED, config_error
from qlora_exp.config.enums import AdapterInit, DeviceChoice, Method, Quantization, Sampler
from qlora_exp.config.schema import Config
from qlora_exp.errors import ConfigError, nearest

PARAMETER_PARTS = ("norms", "biases", "embeddings", "head", "attention", "mlp")
BLOCKS = ("attention", "mlp")
TUNES_WEIGHTS = (Method.full, Method.layerwise, Method.selective)
"""Methods that train weights of the base itself."""
LAYERS_HINT = "method.layers=last:2, first:4, or a list such as [0,3,7]"


def method_problems(config: Config) -> Iterator[ConfigError]:
    """Yield every problem of ``config.method``, and of what it is combined with."""
    method, mode = config.method, config.quantization.mode
    name = method.kind.value
    if method.kind in TUNES_WEIGHTS and mode in QUANTIZED:
        what = f"method={name} trains the base's own weights, which need 16 or 32 bits"
        yield config_error(what, "quantization", mode.value, "quantization=bf16 (or fp32), or method=lora")
    if problem := scaled_16_bit_weights(config) if config.training.device is DeviceChoice.cpu else None:
        yield problem
    yield from _layers(config)
    if method.kind is Method.selective:
        if not method.parameters:
            yield config_error(
                "no parameters are chosen", "method.parameters", None, f"some of {', '.join(PARAMETER_PARTS)}"
            )
        for part in method.parameters or ():
            if part not in PARAMETER_PARTS:
                what = f"there are no parameters called {part}"
                yield config_error(what, "method.parameters", part, nearest(part, PARAMETER_PARTS))
    if method.kind is Method.bottleneck:
        if method.size < 1:
            yield config_error("an adapter needs a width of at least 1", "method.size", method.size, "method.size=16")
        if not method.after:
            yield config_error("no block gets an adapter", "method.after", "[]", "method.after=[attention,mlp]")
        for block in method.after:
            if block not in BLOCKS:
                what = f"there is no block called {block}"
                yield config_error(what, "method.after", block, nearest(block, BLOCKS))
    if method.kind is not Method.lora and config.sweep is not None and config.sweep.sampler is Sampler.ladder:
        what = f"rank doubling compares ranks of LoRA adapters, which method={name} doesn't have"
        yield config_error(what, "method", name, "method=lora, or another sweep, e.g. qlora-exp sweep methods")
    if method.kind is not Method.lora:
        for key, used in (("dora", config.lora.dora), ("rslora", config.lora.rslora)):
            if used:
                yield config_error(f"method={name} has no LoRA adapters", f"lora.{key}", True, "method=lora")
        if config.lora.init is not AdapterInit.kaiming:
            what = f"method={name} has no LoRA adapters"
            yield config_error(what, "lora.init", config.lora.init.value, "method=lora, or lora.init=kaiming")


def scaled_16_bit_weights(config: Config) -> ConfigError | None:
    """Return the problem of training the base's own weights in fp16 on a CPU, or ``None``."""
    if config.method.kind not in TUNES_WEIGHTS or config.quantization.mode is not Quantization.fp16:
        return None
    what = f"method={config.method.kind.value} in fp16 needs a scaled loss, which torch has on GPUs alone"
    return config_error(what, "quantization", "fp16", "quantization=bf16 or fp32")


def _layers(config: Config) -> Iterator[ConfigError]:
    method, layers = config.method, config.method.layers
    if layers is None:
        if method.kind is Method.layerwise:
            yield config_error("no layers are chosen", "method.layers", None, LAYERS_HINT)
        return
    if method.kind is Method.full:
        hint = "method.layers=null, or method=layerwise"
        yield config_error("method=full trains all layers", "method.layers", layers, hint)
    if isinstance(layers, str):
        valid = re.fullmatch(r"(first|last):[1-9]\d*", layers) is not None
    else:
        numbers = layers if isinstance(layers, list) else ()
        valid = bool(numbers) and all(type(number) is int and number >= 0 for number in numbers)
    if not valid:
        yield config_error("these can't be layers", "method.layers", layers, LAYERS_HINT)
