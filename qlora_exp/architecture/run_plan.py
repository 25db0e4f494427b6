"""What a run will do, by arithmetic over a described architecture: adapters, dtypes, steps and fingerprints."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from qlora_exp.architecture.shapes import Architecture, WeightShape
from qlora_exp.config.names import NATIVE_DTYPES
from qlora_exp.config.schema import (
    Checkpointing,
    ComputeDtype,
    Config,
    LoraConfig,
    Quantization,
    QuantizationConfig,
    to_plain,
)
from qlora_exp.records.types import Environment, Plan

COMPILED_MULTIPLES = (16, 64)
"""See :func:`shape_multiples`. Tokens with a loss differ more from batch to batch than lengths do."""
CHECKPOINTING_FROM_PARAMETERS = 3_000_000_000
"""``gradient_checkpointing=auto``: smaller models fit as they are, and recomputing costs a third of the speed."""


def effective_alpha(lora: LoraConfig) -> float:
    """alpha under the policy: 2r, r, or ``lora.alpha`` where it is fixed (check() has refused a missing one)."""
    if lora.alpha_policy == "2r":
        return 2.0 * lora.r
    if lora.alpha_policy == "r":
        return float(lora.r)
    assert lora.alpha is not None
    return float(lora.alpha)


def scale(lora: LoraConfig) -> float:
    """What B·A is multiplied by: alpha / r (Hu et al. 2021), or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023)."""
    return effective_alpha(lora) / (math.sqrt(lora.r) if lora.rslora else lora.r)


def lora_parameters(shape: WeightShape, r: int, dora: bool) -> int:
    """Trainable parameters of one adapter: A is r × in, B is out × r; DoRA (Liu et al. 2024) adds one magnitude per
    output. 65,536 at r = 8 for 4096 × 4096."""
    return r * (shape.in_features + shape.out_features) + (shape.out_features if dora else 0)


def weight_dtype(mode: Quantization) -> str:
    """What the base's linear weights are stored in."""
    return NATIVE_DTYPES.get(mode, str(mode.value))


def compute_dtype(quantization: QuantizationConfig, device_kind: str, bf16: bool) -> str:
    """What the forward pass is computed in. fp32, bf16 and fp16 weights compute in their own dtype on every device
    (CPUs of today have kernels for all three). Quantized weights compute in float32 on a CPU; on CUDA in bfloat16, or
    float16 where the card has no bfloat16 (``bf16``: whether it has). The unquantized rest is stored in the same."""
    if quantization.mode in NATIVE_DTYPES:
        return NATIVE_DTYPES[quantization.mode]
    if quantization.compute_dtype is not ComputeDtype.auto:
        return str(quantization.compute_dtype.value)
    if device_kind == "cpu":
        return "float32"
    return "bfloat16" if bf16 else "float16"


def shape_multiples(compute_dtype: str, device_kind: str, max_length: int, positions: int | None) -> tuple[int, int]:
    """What a training batch's length, and the number of its tokens that get logits, are rounded up to a multiple of.
    On a CPU, oneDNN compiles a multiplication of 16-bit numbers for each shape that it meets, in milliseconds, and
    keeps up to 1024 of them; elsewhere a new shape costs nothing. A row of ``max_length`` tokens is
    never padded beyond the model's ``positions``, of which some have a table."""
    if device_kind != "cpu" or compute_dtype == "float32":
        return 1, 1
    length, logits = COMPILED_MULTIPLES
    reach = max_length if positions is None else min(max_length, positions)
    too_long = positions is not None and math.ceil(reach / length) * length > positions
    return 1 if too_long else length, logits


def inputs_rounded_in(mode: Quantization, device_kind: str) -> tuple[str, ...]:
    """The modes of a forward pass in which a quantized layer rounds its inputs to 8 bits a row (by way of float16;
    outlier columns stay in the compute dtype). bitsandbytes does it with int8 alone, and on a CPU not in training:
    there it multiplies by dequantized weights (``bitsandbytes/autograd/_functions.py``, ``matmul``)."""
    if mode is not Quantization.int8:
        return ()
    return ("evaluation",) if device_kind == "cpu" else ("training", "evaluation")


def adapter_dtype(lora: LoraConfig) -> str:
    """``auto`` is float32, as in the QLoRA recipe: 16-bit adapters lose small updates to rounding."""
    return "float32" if lora.dtype is ComputeDtype.auto else str(lora.dtype.value)


def config_fingerprint(config: Config) -> str:
    """SHA-256 over every setting that can change a result; names, places, prices and tracking can't."""
    plain = to_plain(config)
    plain["model"] = _as_it_was(plain["model"])
    plain["task"] = _task_as_it_was(plain["task"])
    for group in ("tracking", "budget", "sweep", "workers", "name", "output_root"):
        del plain[group]
    for key in ("logging_steps", "save_every_steps", "resume"):
        del plain["training"][key]
    del plain["evaluation"]["cache"]
    return _digest(plain)


def base_fingerprint(config: Config, format: str) -> str:
    """SHA-256 over what the untouched base's scores depend on: model, quantization, task, evaluation, the longest
    sequence, the device and the data format (``chat`` or ``plain``). Scores with worked examples are kept apart."""
    plain = to_plain(config)
    apart = ("before", "cache", "few_shots", "few_shot_draws")
    evaluation = {key: value for key, value in plain["evaluation"].items() if key not in apart}
    task = {key: value for key, value in _task_as_it_was(plain["task"]).items() if key != "goal"}
    return _digest(
        {
            "model": _as_it_was(plain["model"]),
            "quantization": plain["quantization"],
            "task": task,
            "evaluation": evaluation,
            "max_length": plain["training"]["max_length"],
            "device": plain["training"]["device"],
            "format": format,
        }
    )


def _as_it_was(model: dict[str, Any]) -> dict[str, Any]:
    """``sdpa`` was the default before ``auto``, and is the same wherever it isn't refused: old scores stay valid."""
    return model | ({"attention": "sdpa"} if model["attention"] == "auto" else {})


EARLIER_TASK: dict[str, Any] = {
    "learn": "last",
    "ignore_fields": [],
    "date": "2026-01-01",
    "separator": None,
    "special_tokens": "refuse",
}
"""What a task did before these keys existed. Where a date or a separator makes another text of the rows, the data's own
fingerprint says so."""


def _task_as_it_was(task: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that earlier versions lacked, where they ask for what those versions did."""
    kept = {key: value for key, value in task.items() if key not in EARLIER_TASK or value != EARLIER_TASK[key]}
    columns = {key: value for key, value in task["columns"].items() if (key, value) != ("tools", "tools")}
    return kept | {"columns": columns}


def make_plan(
    config: Config, environment: Environment, architecture: Architecture, modules: Sequence[str], format: str
) -> Plan:
    """The plan of one run. ``modules`` are full names of weights in ``architecture``, as resolve_targets gives them.

    Where only a budget of tokens is given, ``max_steps`` is its upper bound (every sequence has a token or more).
    """
    shapes = {shape.name: shape for shape in architecture.weights}
    adapted = [shapes[name] for name in modules]
    training, device = config.training, environment.device
    micro_batch_size = training.micro_batch_size or training.batch_size
    computed = compute_dtype(config.quantization, device.kind, device.bf16)
    length_multiple, logits_multiple = shape_multiples(
        computed, device.kind, training.max_length, architecture.positions
    )
    return Plan(
        config_fingerprint=config_fingerprint(config),
        base_fingerprint=base_fingerprint(config, format),
        architecture=architecture.model_type,
        total_parameters=architecture.total_parameters,
        trainable_parameters=sum(lora_parameters(shape, config.lora.r, config.lora.dora) for shape in adapted),
        full_parameters_of_adapted_modules=sum(shape.in_features * shape.out_features for shape in adapted),
        target_modules=tuple(sorted({name.rsplit(".", 1)[-1] for name in modules})),
        adapted_modules=len(adapted),
        alpha=effective_alpha(config.lora),
        scale=scale(config.lora),
        device=device.kind,
        weight_dtype=weight_dtype(config.quantization.mode),
        compute_dtype=computed,
        adapter_dtype=adapter_dtype(config.lora),
        max_steps=_max_steps(config),
        batch_size=training.batch_size,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=training.batch_size // micro_batch_size,
        gradient_checkpointing=gradient_checkpointing(training.gradient_checkpointing, device.kind, architecture),
        format=format,
        length_multiple=length_multiple,
        logits_multiple=logits_multiple,
        inputs_rounded_in=inputs_rounded_in(config.quantization.mode, device.kind),
    )


def _max_steps(config: Config) -> int:
    training = config.training
    if training.max_steps is not None:
        return training.max_steps
    assert training.max_tokens is not None  # check() refuses a training without an end
    return math.ceil(training.max_tokens / training.batch_size)


def gradient_checkpointing(choice: Checkpointing, device_kind: str, architecture: Architecture) -> bool:
    if choice is not Checkpointing.auto:
        return choice is Checkpointing.on
    return device_kind == "cuda" and architecture.total_parameters > CHECKPOINTING_FROM_PARAMETERS


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
