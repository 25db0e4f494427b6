"""What must hold in a configuration's tuning method."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qlora_exp.config.allowed_values import INTEGER_MODES, QUANTIZED, config_error
from qlora_exp.config.enums import AdapterInit, DeviceChoice, Method, Quantization, Sampler
from qlora_exp.config.peft_kinds import BASES, MEASURED_WITH, PEFT_KINDS, sparse_parameters
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
    kept = config.model.layers
    if kept is not None and not are_layers(kept):
        yield config_error("these can't be layers", "model.layers", kept, LAYERS_HINT.replace("method", "model"))
    if method.kind is Method.peft:
        yield from _peft_problems(config)
    if method.kind is Method.selective and not isinstance(method.parameters, list | None):
        yield config_error("these can't be parameters", "method.parameters", method.parameters, "[norms,biases]")
    elif (chosen := sparse_parameters(method)) is not None:
        if not 0 < chosen[1] < 1:
            what = "the share of entries that are trained is between 0 and 1"
            yield config_error(what, "method.parameters", f"{chosen[0]}:{chosen[1]:g}", f"{chosen[0]}:0.01")
    elif method.kind is Method.selective:
        if not method.parameters:
            yield config_error(
                "no parameters are chosen", "method.parameters", None, f"some of {', '.join(PARAMETER_PARTS)}"
            )
        for part in method.parameters or ():
            if part not in PARAMETER_PARTS:
                what = f"there are no parameters called {part}"
                hint = nearest(str(part), (*PARAMETER_PARTS, "magnitude:0.01", "gradient:0.01"))
                yield config_error(what, "method.parameters", part, hint)
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
        for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters", "loraplus_lr_ratio"):
            if (value := getattr(config.lora, key)) is not None:
                yield config_error(f"method={name} has no LoRA adapters", f"lora.{key}", value, "method=lora, or null")
        if config.lora.init is not AdapterInit.kaiming:
            what = f"method={name} has no LoRA adapters"
            yield config_error(what, "lora.init", config.lora.init.value, "method=lora, or lora.init=kaiming")


def trains_base_weights(config: Config) -> bool:
    """Return whether the run trains weights that the base has: by its method, or by ``lora.modules_to_save``."""
    whole = config.method.kind is Method.lora and config.lora.modules_to_save is not None
    return whole or config.method.kind in TUNES_WEIGHTS


def scaled_16_bit_weights(config: Config) -> ConfigError | None:
    """Return the problem of training the base's own weights in fp16 on a CPU, or ``None``."""
    if not trains_base_weights(config) or config.quantization.mode is not Quantization.fp16:
        return None
    name = "lora.modules_to_save" if config.method.kind is Method.lora else f"method={config.method.kind.value}"
    what = f"{name} in fp16 needs a scaled loss, which torch has on GPUs alone"
    return config_error(what, "quantization", "fp16", "quantization=bf16 or fp32")


def _peft_problems(config: Config) -> Iterator[ConfigError]:
    method, mode = config.method, config.quantization.mode
    if method.peft_type is None or method.peft_type not in PEFT_KINDS:
        what = "no kind of adapter is chosen" if method.peft_type is None else f"there is no kind {method.peft_type}"
        yield config_error(what, "method.peft_type", method.peft_type, nearest(str(method.peft_type), PEFT_KINDS))
        return
    kind = PEFT_KINDS[method.peft_type]
    if not isinstance(method.options, dict | None):
        yield config_error("options are a mapping", "method.options", method.options, "method.options={r: 8}")
        return
    for name, value in (method.options or {}).items():
        key = f"method.options.{name}"
        if name not in kind.options:
            hint = nearest(name, kind.options) if kind.options else f"{method.peft_type} has no options"
            yield config_error(f"{method.peft_type} has no option {name}", key, value, hint)
        elif problem := _value_problem(value, kind.options[name]):
            yield config_error(problem, key, value, f"e.g. {kind.options[name]}")
    if mode in INTEGER_MODES:
        what = f"PEFT can't unpack the weights of {mode.value} for {config.method.peft_type or 'sparse parameters'}"
        yield config_error(what, "quantization.mode", mode.value, "quantization=nf4 or bf16, or method=lora")
    elif reason := kind.refused.get(BASES[mode]):
        allowed = [base.value for base in Quantization if BASES[base] not in kind.refused]
        others = sorted(name for name, other in PEFT_KINDS.items() if BASES[mode] not in other.refused)
        hint = f"quantization={allowed[0]}" if allowed else f"method.peft_type={', '.join(others)}, or method=lora"
        what = f"{method.peft_type} can't be trained on {mode.value} (measured with PEFT {MEASURED_WITH}): {reason}"
        yield config_error(what, "method.peft_type", method.peft_type, hint)


def _value_problem(value: object, default: object) -> str | None:
    if isinstance(default, bool | str):
        return (
            None
            if type(value) is type(default)
            else f"{'true or false' if isinstance(default, bool) else 'a text'} is needed"
        )
    if type(value) not in (int, float) or (isinstance(default, int) and type(value) is not int):
        return "an integer is needed" if isinstance(default, int) else "a number is needed"
    assert isinstance(value, int | float)
    positive = isinstance(default, int) and default > 0
    return "at least 1 is needed" if positive and value < 1 else None


def _layers(config: Config) -> Iterator[ConfigError]:
    method, layers = config.method, config.method.layers
    if layers is None:
        if method.kind is Method.layerwise:
            yield config_error("no layers are chosen", "method.layers", None, LAYERS_HINT)
        return
    if method.kind is Method.full:
        hint = "method.layers=null, or method=layerwise"
        yield config_error("method=full trains all layers", "method.layers", layers, hint)
    valid = are_layers(layers)
    if not valid:
        yield config_error("these can't be layers", "method.layers", layers, LAYERS_HINT)


def are_layers(layers: object) -> bool:
    """Return whether ``layers`` is ``first:N``, ``last:N`` or a list of different numbers."""
    if isinstance(layers, str):
        return re.fullmatch(r"(first|last):[1-9]\d*", layers) is not None
    if not isinstance(layers, list) or not layers or len(set(layers)) < len(layers):
        return False
    return all(type(number) is int and number >= 0 for number in layers)
