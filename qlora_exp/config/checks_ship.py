"""What must hold in the settings of the model that ships, and of quantization-aware training."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_exp.config.allowed_values import FROM_WEIGHTS, QUANTIZED, config_error
from qlora_exp.config.enums import Method, ShippedModel
from qlora_exp.config.peft_kinds import peft_kind_of
from qlora_exp.config.schema import Config
from qlora_exp.errors import ConfigError, nearest

WEIGHT_FORMATS = (*(f"int{bits}" for bits in range(2, 9)), "q8_0", "q4_0", "q4_1", "ternary")
"""Names of :mod:`qlora_exp.quantizers.weight_formats`, which loads torch; a test holds them equal."""
TERNARY_METHODS = (Method.full, Method.layerwise)


def ship_problems(config: Config) -> Iterator[ConfigError]:
    """Yield every problem of ``ship`` and ``training.qat``."""
    ship, qat, mode = config.ship, config.training.qat, config.quantization.mode
    for key, format, group in (
        ("ship", ship.format if ship.model is not None else None, ship.group),
        ("training.qat", qat.format, qat.group),
    ):
        if format is not None and format not in WEIGHT_FORMATS:
            what = f"there is no weight format {format!r}"
            yield config_error(what, f"{key}.format", format, nearest(format, WEIGHT_FORMATS))
        if format is not None and not (group in ("channel", "tensor") or (group.isdecimal() and int(group) > 1)):
            what = "weights can't share a scale so"
            yield config_error(what, f"{key}.group", group, f"{key}.group=64, channel or tensor")
    if ship.model is not None and qat.format is not None:
        what = "a run with training.qat ships in the format that it was trained for"
        yield config_error(what, "ship.model", ship.model.value, "ship=none, or training.qat.format=null")
    if ship.model is ShippedModel.merged_into_dequantized and mode not in QUANTIZED:
        what = f"quantization={mode.value} has no rounded weights to merge into"
        yield config_error(what, "ship.model", ship.model.value, "ship=merged, or quantization=nf4")
    if ship.model not in (None, ShippedModel.trained) and config.method.kind is Method.bottleneck:
        what = "bottleneck adapters can't be merged"
        yield config_error(what, "ship.model", str(ship.model), "ship=trained, or method=lora")
    if qat.format is not None:
        yield from _qat(config)
    distillation = config.distillation
    if distillation.temperature <= 0:
        yield config_error("a temperature is above 0", "distillation.temperature", distillation.temperature, "e.g. 2")
    if not 0 <= distillation.gold_weight <= 1:
        what = "a weight lies between 0 and 1"
        yield config_error(what, "distillation.gold_weight", distillation.gold_weight, "e.g. 0.5")
    if distillation.top_k < 1:
        what = "at least one of the teacher's probabilities is kept"
        yield config_error(what, "distillation.top_k", distillation.top_k, "e.g. 64")


def _qat(config: Config) -> Iterator[ConfigError]:
    qat, mode, lora = config.training.qat, config.quantization.mode, config.method.kind is Method.lora
    if mode in QUANTIZED:
        what = f"quantization={mode.value} has rounded weights already: QAT rounds exact ones in every step"
        yield config_error(what, "training.qat.format", qat.format, "quantization=fp32 or bf16")
    if (found := peft_kind_of(config.method)) is not None:
        what = f"{found[0].config.removesuffix('Config')} layers multiply in their own way, which QAT can't round"
        yield config_error(what, "training.qat.format", qat.format, "method=lora or full")
    if config.method.kind is Method.bottleneck:
        what = "bottleneck adapters can't be merged into weights that are rounded"
        yield config_error(what, "training.qat.format", qat.format, "method=lora or full")
    if qat.format == "ternary" and config.method.kind not in TERNARY_METHODS:
        what = f"method={config.method.kind.value} leaves most weights as they are, and these don't become ternary"
        yield config_error(
            what, "training.qat.format", "ternary", "method=full or layerwise, or training.qat.format=int2"
        )
    for key, used, hint in (
        ("lora.dora", lora and config.lora.dora, "lora.dora=false"),
        ("lora.dropout", lora and config.lora.dropout > 0, "lora.dropout=0"),
        ("lora.init", lora and config.lora.init in FROM_WEIGHTS, "lora.init=kaiming"),
    ):
        if used:
            what = "training.qat rounds W + scale · B · A, which this setting changes"
            yield config_error(what, key, used, f"{hint}, or training.qat.format=null")
    if qat.start_step < 0:
        yield config_error("the first step is 0", "training.qat.start_step", qat.start_step, "0 or more")
    if not 0 <= qat.warmup_ratio <= 1:
        yield config_error("a share lies between 0 and 1", "training.qat.warmup_ratio", qat.warmup_ratio, "e.g. 0.25")
