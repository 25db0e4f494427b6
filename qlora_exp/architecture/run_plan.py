"""Computes what a run will do from its architecture alone: adapters, dtypes, steps and fingerprints."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from qlora_exp.architecture.expert_targets import expert_targets
from qlora_exp.architecture.shapes import Architecture, WeightShape
from qlora_exp.architecture.targets import rank_of
from qlora_exp.architecture.tuned_weights import inserted_shapes, tuned_tensors, whole_tensors
from qlora_exp.config.allowed_values import INTEGER_MODES, NATIVE_DTYPES
from qlora_exp.config.enums import ComputeDtype, Method, Quantization
from qlora_exp.config.schema import Config, LoraConfig, QuantizationConfig, to_plain
from qlora_exp.errors import ModelError
from qlora_exp.records.types import Environment, Plan

CPU_SHAPE_MULTIPLES = (16, 64)
"""Multiples for lengths and for loss tokens, see :func:`shape_multiples`. The number of loss tokens varies more from
batch to batch than lengths do."""


def effective_alpha(lora: LoraConfig) -> float:
    """Return alpha under the policy: 2r, r, or ``lora.alpha`` for a fixed one (check() has refused a missing one)."""
    if lora.alpha_policy == "2r":
        return 2.0 * lora.r
    if lora.alpha_policy == "r":
        return float(lora.r)
    assert lora.alpha is not None
    return float(lora.alpha)


def alpha_pattern(lora: LoraConfig) -> dict[str, float]:
    """Return alpha by module, as PEFT's regular expressions: ``lora.alpha_pattern``, then those that give modules of
    ``lora.rank_pattern`` the scale of the others. A fixed alpha is that of every rank, as in PEFT."""
    fixed, factor = lora.alpha_policy == "fixed", effective_alpha(lora) / lora.r
    given = {key: float(alpha) for key, alpha in (lora.alpha_pattern or {}).items()}
    ranks = {key: rank for key, rank in (lora.rank_pattern or {}).items() if key not in given}
    of_ranks = {key: effective_alpha(lora) if fixed else factor * rank for key, rank in ranks.items()}
    return {re.escape(key): alpha for key, alpha in (given | of_ranks).items()}


def scale(lora: LoraConfig) -> float:
    """Return the factor of B·A: alpha / r (Hu et al. 2021), or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023)."""
    return effective_alpha(lora) / (math.sqrt(lora.r) if lora.rslora else lora.r)


def lora_parameters(shape: WeightShape, r: int, dora: bool) -> int:
    """Return the trainable parameters of one adapter: A is r × in, B is out × r.

    DoRA (Liu et al. 2024) adds one magnitude per output. Example: 65,536 at r = 8 for 4096 × 4096.
    """
    return r * (shape.in_features + shape.out_features) + (shape.out_features if dora else 0)


def trainable_parameters(architecture: Architecture, adapted: Sequence[WeightShape], config: Config) -> int:
    """Return the number of parameters that ``config.method`` trains. ``adapted``: the layers with a LoRA adapter."""
    if config.method.kind is Method.lora:
        others = sum(tensor.elements for tensor in whole_tensors(architecture, config.lora))
        for target in expert_targets(architecture, config.lora):
            others += config.lora.r * target.experts * (target.inputs + target.outputs)
        ranks = ((shape, rank_of(config.lora, shape.name)) for shape in adapted)
        return others + sum(lora_parameters(shape, rank, config.lora.dora) for shape, rank in ranks)
    inserted = inserted_shapes(architecture, config.method, adapted)
    if inserted is not None:
        return sum(math.prod(shape) for _, shape in inserted)
    return sum(tensor.elements for tensor in tuned_tensors(architecture, config.method))


def weight_dtype(mode: Quantization) -> str:
    """Return the dtype in which the base's linear weights are stored."""
    return NATIVE_DTYPES.get(mode, str(mode.value))


def compute_dtype(quantization: QuantizationConfig, device_kind: str, bf16: bool) -> str:
    """Return the dtype of the forward pass; the unquantized rest is stored in it, too.

    fp32, bf16 and fp16 weights compute in their own dtype on every device: current CPUs have kernels for all three.
    Quantized weights compute in float32 on a CPU. On CUDA they compute in bfloat16, or in float16 if the card has no
    bfloat16 (``bf16``: whether it has).
    """
    if quantization.mode in NATIVE_DTYPES:
        return NATIVE_DTYPES[quantization.mode]
    if quantization.compute_dtype is not ComputeDtype.auto:
        return str(quantization.compute_dtype.value)
    if device_kind == "cpu":
        return "float32"
    return "bfloat16" if bf16 else "float16"


def optimizer_on(device_kind: str, compute_dtype: str, optimizer: str) -> str:
    """Return transformers' name of the implementation that runs ``training.optimizer``.

    On CUDA ``adamw_torch`` is torch's fused AdamW, ``adamw_torch_fused``: one kernel for all adapters, and no
    temporaries. In float16 it isn't: the loss scaler couldn't tell transformers that it skipped a step.
    """
    fused = device_kind == "cuda" and compute_dtype != "float16" and optimizer == "adamw_torch"
    return "adamw_torch_fused" if fused else optimizer


def shape_multiples(compute_dtype: str, device_kind: str, max_length: int, positions: int | None) -> tuple[int, int]:
    """Return the multiples to which a training batch's length and its number of tokens with logits are rounded up.

    On a CPU, oneDNN compiles each new shape of a 16-bit matrix multiplication, which takes milliseconds, and caches up
    to 1024 of them. Elsewhere a new shape costs nothing. A row of ``max_length`` tokens is never padded beyond the
    model's ``positions``: some models have an embedding table of that size.
    """
    if device_kind != "cpu" or compute_dtype == "float32":
        return 1, 1
    length, logits = CPU_SHAPE_MULTIPLES
    reach = max_length if positions is None else min(max_length, positions)
    too_long = positions is not None and math.ceil(reach / length) * length > positions
    return 1 if too_long else length, logits


def inputs_rounded_in(mode: Quantization, device_kind: str) -> tuple[str, ...]:
    """Return the phases in which a quantized layer rounds its inputs to 8 bits per row.

    The inputs pass through float16; outlier columns keep the compute dtype. bitsandbytes does this only for int8. On a
    CPU it doesn't do it in training, where it multiplies by dequantized weights
    (``bitsandbytes/autograd/_functions.py``, ``matmul``).
    """
    if mode is not Quantization.int8:
        return ()
    return ("evaluation",) if device_kind == "cpu" else ("training", "evaluation")


def adapter_dtype(lora: LoraConfig) -> str:
    """Return the adapters' dtype. ``auto`` is float32, as in the QLoRA recipe: 16-bit adapters lose small updates to
    rounding."""
    return "float32" if lora.dtype is ComputeDtype.auto else str(lora.dtype.value)


def config_fingerprint(config: Config) -> str:
    """Return SHA-256 over all settings that can change a result. Names, places, prices and tracking can't."""
    plain = to_plain(config)
    plain["model"] = _without_newer_model_defaults(plain["model"])
    plain["task"] = _without_newer_defaults(plain["task"])
    for key, value in EARLIER_LORA_DEFAULTS.items():
        if plain["lora"][key] == value:
            del plain["lora"][key]
    plain["quantization"] = _quantization_settings(config.quantization)
    plain.pop("method")
    if method := method_settings(config):
        plain["method"] = method
    for key, value in NEWER_DISTILLATION_DEFAULTS.items():
        if plain["distillation"][key] == value:
            del plain["distillation"][key]
    if plain["distillation"]["teacher"] is None:
        del plain["distillation"]
    if plain.pop("ship")["model"] is not None:
        plain["ship"] = to_plain(config)["ship"]
    for group in ("tracking", "notify", "budget", "sweep", "workers", "name", "output_root"):
        del plain[group]
    for key in ("logging_steps", "save_every_steps", "resume"):
        del plain["training"][key]
    if plain["training"]["kernels"] == "auto":  # which they are depends on the machine; the plan has them
        plain["training"]["kernels"] = EARLIER_TRAINING_DEFAULTS["kernels"]
    for key, value in EARLIER_TRAINING_DEFAULTS.items():
        if plain["training"][key] == value:
            del plain["training"][key]
    for key in ("cache", "keep_texts"):
        del plain["evaluation"][key]
    return _digest(plain)


def base_fingerprint(config: Config, format: str) -> str:
    """Return SHA-256 over everything that the base model's scores depend on.

    That is: model, quantization, task, evaluation, the longest sequence, the device and the data format (``chat`` or
    ``plain``). Scores with worked examples are cached separately.
    """
    plain = to_plain(config)
    excluded = ("before", "cache", "few_shots", "few_shot_draws", "keep_texts")
    evaluation = {key: value for key, value in plain["evaluation"].items() if key not in excluded}
    task = {key: value for key, value in _without_newer_defaults(plain["task"]).items() if key != "goal"}
    return _digest(
        {
            "model": _without_newer_model_defaults(plain["model"]),
            "quantization": _quantization_settings(config.quantization),
            "task": task,
            "evaluation": evaluation,
            "max_length": plain["training"]["max_length"],
            "device": plain["training"]["device"],
            "format": format,
        }
    )


EARLIER_MODEL_DEFAULTS: dict[str, Any] = dict.fromkeys(("id", "instruct_id", "instruct_path", "adapter", "layers"))
"""What a model was before these keys existed."""


def _quantization_settings(quantization: QuantizationConfig) -> dict[str, Any]:
    """Return the settings without ``group``, unless the mode reads it: earlier versions didn't have it."""
    plain: dict[str, Any] = to_plain(quantization)
    if quantization.mode not in INTEGER_MODES:
        del plain["group"]
    return plain


def _without_newer_model_defaults(model: dict[str, Any]) -> dict[str, Any]:
    """Return ``model`` without the keys that earlier versions lacked, unless they are set, and with ``sdpa`` for
    ``auto``. ``sdpa`` was the earlier default and gives the same scores wherever it is supported, so old fingerprints
    stay valid."""
    kept = {key: value for key, value in model.items() if key not in EARLIER_MODEL_DEFAULTS or value is not None}
    return kept | ({"attention": "sdpa"} if model["attention"] == "auto" else {})


EARLIER_TASK_DEFAULTS: dict[str, Any] = {
    "learn": "last",
    "ignore_fields": [],
    "date": "2026-01-01",
    "separator": None,
    "special_tokens": "refuse",
    "answer_after": None,
}
"""What a task did before these keys existed. If a date or a separator changes the text of the rows, the data's own
fingerprint changes."""


EARLIER_TRAINING_DEFAULTS: dict[str, Any] = {
    "micro_batch_tokens": None,
    "padding_free": "off",
    "kernels": "none",
    "epochs": None,
    "qat": {"format": None, "symmetric": False, "group": "64", "start_step": 0, "warmup_ratio": 0.0},
}
"""What a training did before these keys existed."""

NEWER_DISTILLATION_DEFAULTS: dict[str, Any] = {"teacher_quantization": None, "mode": "offline"}
"""Keys that the first runs with a teacher lacked, and what those did."""

EARLIER_DISTILLATION: dict[str, Any] = {
    **NEWER_DISTILLATION_DEFAULTS,
    "teacher": None,
    "divergence": "forward",
    "temperature": 1.0,
    "gold_weight": 0.5,
    "top_k": 64,
}
"""Before a run could have a teacher."""

EARLIER_SHIP: dict[str, Any] = {
    "model": None,
    "format": None,
    "symmetric": False,
    "group": "64",
    "calibration": "mse",
}
"""Before a model could ship."""


EARLIER_EVALUATION_DEFAULTS: dict[str, Any] = {"keep_texts": True}
"""What an evaluation did before these keys existed: it kept answers."""


def check_integer_groups(architecture: Architecture, quantization: QuantizationConfig) -> None:
    """Raise :class:`ModelError` if a mode such as ``int4_asym`` can't divide the inputs of a layer into groups."""
    if quantization.mode not in INTEGER_MODES:
        return
    group = quantization.group
    for shape in architecture.weights:
        if shape.quantizable and shape.in_features % group:
            widths = {other.in_features for other in architecture.weights if other.quantizable}
            common = math.gcd(*widths)
            fitting = next((size for size in (128, 64, 32, 16, 8, 4) if size <= group and common % size == 0), None)
            what = f"{shape.name} has {shape.in_features} inputs, which can't be divided into groups of {group}"
            hint = f"quantization.group={fitting}, or quantization=nf4" if fitting else "quantization=nf4"
            raise ModelError(what, f"quantization.group = {group}", hint)


EARLIER_GROUP = 64
"""``quantization.group`` of runs before it existed: only integer modes read it."""
EARLIER_LORA_DEFAULTS: dict[str, Any] = dict.fromkeys(
    ("loraplus_lr_ratio", "rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters")
)
"""What adapters had before these keys existed."""


EARLIER_METHOD: dict[str, Any] = {
    "kind": "lora",
    "layers": None,
    "parameters": None,
    "size": 16,
    "after": ["attention", "mlp"],
    "peft_type": None,
    "options": None,
}
"""What was trained before there was a choice."""


def method_settings(config: Config) -> dict[str, Any]:
    """Return the settings of ``method`` that the run's method reads; nothing for LoRA on all layers."""
    method, plain = config.method, to_plain(config)["method"]
    keys = {
        Method.selective: ("parameters",),
        Method.bottleneck: ("size", "after"),
        Method.peft: ("peft_type", "options"),
    }
    settings = {key: plain[key] for key in keys.get(method.kind, ())}
    if method.layers is not None:
        settings["layers"] = plain["layers"]
    return {"kind": plain["kind"], **settings} if settings or method.kind is not Method.lora else {}


def _without_newer_defaults(task: dict[str, Any]) -> dict[str, Any]:
    """Return ``task`` without the keys that earlier versions lacked, if their values ask for the earlier behaviour."""
    kept = {
        key: value
        for key, value in task.items()
        if key not in EARLIER_TASK_DEFAULTS or value != EARLIER_TASK_DEFAULTS[key]
    }
    newer = (("tools", "tools"), ("group", None))
    columns = {key: value for key, value in task["columns"].items() if (key, value) not in newer}
    return kept | {"columns": columns}


def make_plan(
    config: Config,
    environment: Environment,
    architecture: Architecture,
    modules: Sequence[str],
    format: str,
    checkpointing: bool,
    padded_because: str | None,
) -> Plan:
    """Return the plan of one run. ``modules`` are full names of weights in ``architecture``, from resolve_targets.
    ``checkpointing``: whether it uses gradient checkpointing, from ``Estimator.checkpointing``. ``padded_because``: why
    rows are padded, from ``Estimator.padding_reason``.

    Raises:
        ModelError: ``quantization.group`` doesn't divide a layer's width.

    With a budget of tokens alone, ``max_steps`` is an upper bound (every sequence has at least one token). With
    ``training.epochs`` it is 1: the caller knows the rows.
    """
    check_integer_groups(architecture, config.quantization)
    shapes = {shape.name: shape for shape in architecture.weights}
    adapted, is_lora = [shapes[name] for name in modules], config.method.kind is Method.lora
    experts = expert_targets(architecture, config.lora) if is_lora else ()
    endings = {name.rsplit(".", 1)[-1] for name in (*modules, *(target.name for target in experts))}
    training, device = config.training, environment.device
    micro_batch_size = training.micro_batch_size or training.batch_size
    max_steps = training.max_steps
    if max_steps is None and training.epochs is not None:
        max_steps = 1
    elif max_steps is None:
        assert training.max_tokens is not None  # check() refuses a training without an end
        max_steps = math.ceil(training.max_tokens / training.batch_size)
    computed = compute_dtype(config.quantization, device.kind, device.bf16)
    length_multiple, logits_multiple = shape_multiples(
        computed, device.kind, training.max_length, architecture.positions
    )
    return Plan(
        config_fingerprint=config_fingerprint(config),
        base_fingerprint=base_fingerprint(config, format),
        architecture=architecture.model_type,
        total_parameters=architecture.total_parameters,
        trainable_parameters=trainable_parameters(architecture, adapted, config),
        full_parameters_of_adapted_modules=sum(shape.in_features * shape.out_features for shape in adapted)
        + sum(target.elements for target in experts),
        target_modules=tuple(sorted(endings)),
        adapted_modules=len(adapted) + len(experts),
        alpha=effective_alpha(config.lora) if is_lora else None,
        scale=scale(config.lora) if is_lora else None,
        device=device.kind,
        weight_dtype=weight_dtype(config.quantization.mode),
        compute_dtype=computed,
        adapter_dtype=adapter_dtype(config.lora) if is_lora else "float32",
        max_steps=max_steps,
        batch_size=training.batch_size,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=training.batch_size // micro_batch_size,
        gradient_checkpointing=checkpointing,
        format=format,
        padding_free=padded_because is None,
        padded_because=padded_because,
        length_multiple=length_multiple,
        logits_multiple=logits_multiple,
        inputs_rounded_in=inputs_rounded_in(config.quantization.mode, device.kind),
        unpacked_from=architecture.unpacked_from,
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
