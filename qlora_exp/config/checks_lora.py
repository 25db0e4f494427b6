"""Checks of the model, the quantization, the adapter and the target modules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from qlora_exp.config.allowed_values import (
    EPSILON_IN_ADAPTER_DTYPE,
    FROM_WEIGHTS,
    INTEGER_MODES,
    MAX_RANK,
    NATIVE_DTYPES,
    QUANTIZED,
    TARGET_SETS,
    config_error,
    one_of,
)
from qlora_exp.config.enums import AdapterInit, ComputeDtype, DeviceChoice, Quantization, Sampler
from qlora_exp.config.model_choice import place_problems
from qlora_exp.config.schema import Config, LoraConfig, ModelConfig, QuantizationConfig, TargetsConfig
from qlora_exp.errors import ConfigError, nearest


def model_problems(model: ModelConfig) -> Iterator[ConfigError]:
    variant = model.variant.value
    is_on_disk = model.family == "local" or (model.checkpoint or "").startswith("embedded:")
    if model.revision is not None and is_on_disk:
        what = "only a model of the Hub has revisions: this one is read from disk"
        yield config_error(what, "model.revision", model.revision, "model.revision=null")
    yield from place_problems(model)
    if model.family == "local":
        if not model.path:
            hint = "model.path=DIRECTORY_OR_FILE.gguf"
            yield config_error("a local model needs a path", "model.path", model.path, hint)
        return
    if model.family == "hub":
        if not model.id:
            yield config_error("a model of the Hub needs an id", "model.id", model.id, "model.id=OWNER/NAME")
        return
    if variant not in model.checkpoints:
        known = ", ".join(sorted(model.checkpoints)) or "none"
        hint = f"known: {known}; add model.checkpoints.{variant}=OWNER/NAME"
        yield config_error(f"{model.family} has no {variant} checkpoint", "model.variant", variant, hint)
    for name, checkpoint in model.checkpoints.items():
        key = f"model.checkpoints.{name}"
        if name not in ("base", "instruct"):
            hint = nearest(name, ("base", "instruct"))
            yield config_error(f"there is no variant called {name}", key, checkpoint, hint)
        if not re.fullmatch(r"embedded:[\w-]+|[\w.-]+/[\w.-]+", checkpoint):
            yield config_error("a checkpoint is a Hub id or embedded:NAME", key, checkpoint, "e.g. Qwen/Qwen3-0.6B")


def quantization_problems(quantization: QuantizationConfig) -> Iterator[ConfigError]:
    mode, choice = quantization.mode, quantization.compute_dtype
    if quantization.group < 2:
        what = "at least two weights share a scale"
        yield config_error(what, "quantization.group", quantization.group, "quantization.group=64")
    native = NATIVE_DTYPES.get(mode)
    if native and choice is not ComputeDtype.auto and choice.value != native:
        matching_mode = next(name.value for name, dtype in NATIVE_DTYPES.items() if dtype == choice.value)
        what = f"{mode.value} weights are always computed in {native}"
        hint = f"quantization.compute_dtype=auto, or quantization={matching_mode}"
        yield config_error(what, "quantization.compute_dtype", choice.value, hint)


def int8_dora(config: Config) -> ConfigError | None:
    """Return the problem of a configuration that would train DoRA over int8 on a CPU, or ``None``."""
    if not (config.lora.dora and config.quantization.mode is Quantization.int8):
        return None
    what = (
        "DoRA can't be trained over int8 on a CPU: peft 0.21 loses the weights' scales when it dequantizes them there"
    )
    return config_error(what, "lora.dora", config.lora.dora, "quantization=nf4, or lora.dora=false, or a GPU")


def scaled_16_bit_adapters(config: Config, computed_in: str) -> ConfigError | None:
    """Return the problem of 16-bit adapters over a base that a GPU computes in ``computed_in``, or ``None``."""
    if computed_in != "float16" or config.lora.dtype not in (ComputeDtype.float16, ComputeDtype.bfloat16):
        return None
    what = "float16 computation on a GPU scales the loss, and torch unscales gradients of float32 adapters only"
    return config_error(what, "lora.dtype", config.lora.dtype.value, "lora.dtype=float32, or compute in bfloat16")


def lora_problems(config: Config) -> Iterator[ConfigError]:
    lora, mode = config.lora, config.quantization.mode
    if config.training.device is DeviceChoice.cpu and (problem := int8_dora(config)):
        yield problem
    computed_in = NATIVE_DTYPES.get(mode, config.quantization.compute_dtype.value)
    if config.training.device is DeviceChoice.cuda and (problem := scaled_16_bit_adapters(config, computed_in)):
        yield problem
    if lora.dora and mode in INTEGER_MODES:
        what = f"DoRA reads the base's weights, which PEFT can't unpack from {mode.value}"
        yield config_error(what, "lora.dora", lora.dora, "quantization=nf4, or lora.dora=false")
    yield from _alpha(lora)
    optimizer = config.training.optimizer
    if lora.dtype is ComputeDtype.float16 and optimizer in EPSILON_IN_ADAPTER_DTYPE:
        what = f"{optimizer} can't train float16 adapters: it divides by at least 1e-8, which is 0 in float16"
        yield config_error(what, "lora.dtype", lora.dtype.value, "lora.dtype=float32, or bfloat16")
    yield from _patterns(config)
    yield from _modules_to_save(config)
    yield from _target_parameters(config)
    ratio = lora.loraplus_lr_ratio
    if ratio is not None and not (ratio > 0 and math.isfinite(ratio)):
        yield config_error("a ratio of learning rates is positive", "lora.loraplus_lr_ratio", ratio, "16, or null")
    if lora.init in FROM_WEIGHTS and mode in QUANTIZED:
        name = INIT_NAMES[lora.init]
        what = f"{name} is initialized from the base's exact weights, which {mode.value} has rounded"
        hint = "quantization=bf16 (or fp16, fp32), or lora.init=kaiming"
        yield config_error(what, "lora.init", lora.init.value, hint)


def _patterns(config: Config) -> Iterator[ConfigError]:
    """Yield every problem of ranks and alphas by module."""
    lora = config.lora
    for name, pattern, example, kind in (
        ("rank_pattern", lora.rank_pattern, f"{{down_proj: {2 * lora.r}}}", f"a rank is 1 to {MAX_RANK}"),
        ("alpha_pattern", lora.alpha_pattern, f"{{down_proj: {4 * lora.r}}}", "an alpha is a positive number"),
    ):
        key = f"lora.{name}"
        if pattern is None:
            continue
        if not isinstance(pattern, dict) or not pattern:
            yield config_error("this is a mapping of modules", key, pattern, f"{key}='{example}', or null")
            continue
        for module, value in pattern.items():
            is_rank = type(value) is int and 1 <= value <= MAX_RANK
            is_alpha = type(value) in (int, float) and value > 0 and math.isfinite(value)
            if not (is_rank if name == "rank_pattern" else is_alpha):
                yield config_error(kind, f"{key}.{module}", value, f"e.g. {key}='{example}'")
            if not re.fullmatch(r"\w+(\.\w+)*", str(module)):
                hint = "a module's name or its last parts, e.g. self_attn.q_proj"
                yield config_error(f"{module!r} can't be a module's name", key, module, hint)
        if lora.init in FROM_WEIGHTS:
            what = f"{INIT_NAMES[lora.init]} can't be combined with {key}: its saved adapter has one scale"
            yield config_error(what, "lora.init", lora.init.value, f"lora.init=kaiming, or {key}=null")
        if lora.rslora:
            what = f"rsLoRA can't be combined with {key}: its saved adapter has one scale"
            yield config_error(what, "lora.rslora", True, f"lora.rslora=false, or {key}=null")
        if config.sweep is not None and config.sweep.sampler is Sampler.ladder:
            what = f"rank doubling doubles lora.r, and what {key} names stays"
            yield config_error(what, key, pattern, f"{key}=null")


def _modules_to_save(config: Config) -> Iterator[ConfigError]:
    names = config.lora.modules_to_save
    if names is None:
        return
    key = "lora.modules_to_save"
    if not names:
        yield config_error("the list of modules is empty", key, "[]", f"{key}=[lm_head], or null")
    for name in names:
        if not re.fullmatch(r"\w+(\.\w+)*", name):
            hint = "a module's name or its last parts, e.g. lm_head"
            yield config_error(f"{name!r} can't be a module's name", key, name, hint)
    if config.method.layers is not None:
        what = "embeddings and head are in no layer, and method.layers trains layers alone"
        yield config_error(what, "method.layers", config.method.layers, f"method.layers=null, or {key}=null")
    if config.training.qat.format is not None:
        what = "training.qat rounds linear layers, and wasn't measured with a head or embeddings that are trained whole"
        yield config_error(what, key, names, f"{key}=null, or training.qat.format=null")


def _target_parameters(config: Config) -> Iterator[ConfigError]:
    lora, names = config.lora, config.lora.target_parameters
    if names is None:
        return
    key = "lora.target_parameters"
    if not names:
        yield config_error("the list of parameters is empty", key, "[]", f"{key}=[experts.down_proj], or null")
    for name in names:
        if not re.fullmatch(r"\w+(\.\w+)*", name):
            hint = "the last parts of a parameter's name, e.g. experts.down_proj"
            yield config_error(f"{name!r} can't be a parameter's name", key, name, hint)
    init = lora.init if lora.init not in (AdapterInit.kaiming, AdapterInit.gaussian) else None
    for other, value, default in (
        ("lora.dropout", lora.dropout or None, "0"),
        ("lora.dora", lora.dora or None, "false"),
        ("lora.init", init and init.value, "kaiming"),
        ("lora.rank_pattern", lora.rank_pattern, "null"),
        ("lora.alpha_pattern", lora.alpha_pattern, "null"),
        ("method.layers", config.method.layers, "null"),
        ("training.qat.format", config.training.qat.format, "null"),
    ):
        if value is not None:
            what = "adapters of experts' parameters can't be trained with this"
            yield config_error(what, other, value, f"{other}={default}, or {key}=null")


INIT_NAMES = {AdapterInit.pissa: "PiSSA", AdapterInit.olora: "OLoRA"}


def _alpha(lora: LoraConfig) -> Iterator[ConfigError]:
    if lora.alpha_policy == "fixed" and lora.alpha is None:
        what = "lora.alpha_policy=fixed needs a value of lora.alpha"
        yield config_error(what, "lora.alpha", None, f"lora.alpha={2 * lora.r}")
    implied = {"2r": 2 * lora.r, "r": lora.r}.get(str(lora.alpha_policy))
    if implied is not None and lora.alpha is not None and lora.alpha != implied:
        what = f"lora.alpha contradicts lora.alpha_policy={lora.alpha_policy}, which makes it {implied}"
        yield config_error(what, "lora.alpha", lora.alpha, "lora.alpha_policy=fixed, or leave lora.alpha_policy out")


def targets_problems(targets: TargetsConfig) -> Iterator[ConfigError]:
    if targets.modules is None:
        yield from one_of("targets.set", targets.set, TARGET_SETS)
    elif not targets.modules:
        hint = "targets.modules=[q_proj,v_proj]"
        yield config_error("the list of target modules is empty", "targets.modules", "[]", hint)
    for name in targets.modules or ():
        if not re.fullmatch(r"\w+(\.\w+)*", name):
            hint = "a module's name or its last parts, e.g. self_attn.q_proj"
            yield config_error(f"{name!r} can't be a module's name", "targets.modules", name, hint)
