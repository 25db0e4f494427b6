"""Whether a run may start: it is predicted to fit into its memory limit, or the error says what would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from qlora_exp.config.checks import check
from qlora_exp.config.schema import Checkpointing, Config, Quantization, to_plain
from qlora_exp.estimate.memory_fit import (
    MemoryEstimate,
    MemoryLimit,
    PredictedOutOfMemory,
    correction_key,
    fit_into,
    memory_limit_bytes,
    next_smaller_micro_batch,
)
from qlora_exp.estimate.peak import Peak
from qlora_exp.estimate.preflight_budget import check_budget_covers_a_step
from qlora_exp.estimate.run_estimate import peak_of, row_lengths
from qlora_exp.estimate.weights_and_optimizer import in_mode, smallest_base
from qlora_exp.formatting import bytes_text
from qlora_exp.records.types import Device, Environment, Fit, Plan, SkippedTrial
from qlora_exp.runs.prepare import Prepared

SMALLER_QUANTIZATIONS = (Quantization.bf16, Quantization.int8, Quantization.nf4)
"""Modes to suggest, the most precise first."""
BITS_PER_WEIGHT = {Quantization.fp32: 32, Quantization.bf16: 16, Quantization.fp16: 16, Quantization.int8: 8}
"""Bits per weight; 4 for the other modes."""
MIN_LENGTH = 16
"""Tokens. Shorter rows are never suggested."""


def memory_fit(config: Config, prepared: Prepared, environment: Environment, rule: MemoryLimit) -> Fit | None:
    """Return the predicted memory with its limit; ``None`` if no limit is known.

    Raises:
        PredictedOutOfMemory: the prediction exceeds the limit; the error has its parts, and what would fit.
        ConfigError: the budget is too small for one step.
    """
    check_budget_covers_a_step(config, prepared)
    device, plan = environment.device, prepared.plan
    limit = memory_limit_bytes(rule, device)
    if limit is None:
        return None
    exact = peak_of(config, environment, prepared.architecture, prepared.modules, prepared.splits).exact_bytes
    need = memory_estimate(plan, exact)
    fit, may_start = fit_into(limit, need, rule, correction_key(to_plain(config), device), device.kind)
    if may_start and fit.excess < -fit.error:
        return fit
    from_budget = rule.limit_bytes is not None
    what, hint = _error_and_hint(config, prepared, environment, fit, from_budget)
    fit = replace(fit, would_fit=hint)
    if may_start:
        return fit
    where = f"budget.memory_bytes = {limit}" if from_budget else _limit_text(device, limit, rule.hosts)
    raise PredictedOutOfMemory(
        what, where, f"{hint}; --force starts it anyway", SkippedTrial(fit, need.train_seconds, need.train_flops)
    )


def _limit_text(device: Device, bound: int, hosts: int) -> str:
    """Return a phrase that names the memory that limits the run."""
    shared = f", shared by {hosts} concurrent trials" if hosts > 1 else ""
    if device.kind == "cpu":
        total = bytes_text(device.memory_bytes or 0)
        limit = f"this machine's memory or its control group's limit is {total}"
        return f"{limit}; without the process itself {bytes_text(bound)} remain{shared}"
    return f"the memory of {device.name} = {bound}{shared}"


def memory_estimate(planned: Plan, exact_bytes: int = 0) -> MemoryEstimate:
    """Return the memory estimate of a plan that has predictions."""
    tokens = planned.predicted_train_tokens
    flops = planned.train_flops_per_token
    return MemoryEstimate(
        peak_bytes=planned.predicted_peak_train_bytes or 0,
        context_bytes=planned.predicted_context_bytes or 0,
        train_seconds=planned.predicted_train_seconds,
        train_flops=flops * tokens if flops is not None and tokens is not None else None,
        exact_bytes=exact_bytes,
    )


def _error_and_hint(
    config: Config, prepared: Prepared, environment: Environment, fit: Fit, limited: bool
) -> tuple[str, str]:
    """Return what is wrong, and what to do. ``limited``: the limit is ``budget.memory_bytes``."""

    def at_least(size: int) -> str:
        return f"at least budget.memory_bytes={size}" if limited else f"at least {bytes_text(size)} of memory"

    device = environment.device
    mode, minimum = smallest_base(prepared.architecture, config.quantization, device.kind, device.bf16)
    if minimum > fit.limit_bytes:
        what = f"no quantization of this base fits: {mode.value}, the smallest, takes {bytes_text(minimum)} by itself"
        return what, f"a smaller model, or {at_least(fit.corrected_bytes)}"

    def peak(variant: Config) -> Peak:
        return peak_of(variant, environment, prepared.architecture, prepared.modules, prepared.splits)

    corrected = f", corrected by the measured peaks of {fit.similar_runs} similar runs" if fit.similar_runs else ""
    what = (
        f"the run is predicted to need {bytes_text(fit.corrected_bytes)} of {bytes_text(fit.limit_bytes)}{corrected}"
        f": {_parts(peak(config))}"
    )
    scale = (fit.corrected_bytes - fit.context_bytes) / fit.peak_bytes

    def needed(variant: Config) -> float:
        predicted = peak(variant)
        return scale * predicted.peak_bytes + predicted.context_bytes

    changes = list(_smaller_settings(config, prepared, lambda variant: needed(variant) <= fit.limit_bytes))
    if changes:
        return what, "; or ".join(f"{text} ({bytes_text(needed(variant))})" for text, variant in changes)
    text, smallest = _smallest_settings(config)
    if needed(smallest) <= fit.limit_bytes:
        return what, f"{text} ({bytes_text(needed(smallest))})"
    minimum = round(needed(smallest))
    return what, f"a smaller model; with {text} {at_least(minimum)}"


def _parts(peak: Peak) -> str:
    parts = {
        "base, adapters and optimizer": peak.exact_bytes,
        "activations": peak.activation_bytes,
        "logits": peak.logits_bytes,
        "dequantized weights": peak.dequantization_bytes,
        "heap fragmentation and code": peak.slack_bytes,
        "context": peak.context_bytes,
    }
    return ", ".join(f"{name} {bytes_text(size)}" for name, size in parts.items() if size)


def _smaller_settings(
    config: Config, prepared: Prepared, fits: Callable[[Config], bool]
) -> Iterator[tuple[str, Config]]:
    """Yield, for each setting, the nearest smaller value that makes the run fit by itself."""
    for values in _settings(config, prepared):
        candidate = next(((text, variant) for text, variant in values if not check(variant) and fits(variant)), None)
        if candidate is not None:
            yield candidate


def _settings(config: Config, prepared: Prepared) -> Iterator[Iterator[tuple[str, Config]]]:
    """Yield each setting's smaller values, the nearest first."""
    training = config.training
    rows = training.micro_batch_size or training.batch_size
    length = min(training.max_length, max(row_lengths(prepared.splits)))
    modes = [
        mode
        for mode in SMALLER_QUANTIZATIONS
        if BITS_PER_WEIGHT.get(mode, 4) < BITS_PER_WEIGHT.get(config.quantization.mode, 4)
    ]

    def with_training(key: str, value: int | str, setting: Any) -> tuple[str, Config]:
        return f"training.{key}={value}", replace(config, training=replace(training, **{key: setting}))

    # Micro-batches that divide the batch: all of them for a small batch, else only by halving.
    row_counts = range(rows - 1, 0, -1) if rows <= 64 else _halvings(rows, training.batch_size)
    yield (with_training("micro_batch_size", n, n) for n in row_counts if training.batch_size % n == 0)
    yield (with_training("max_length", n, n) for n in _halves(length, MIN_LENGTH))
    yield (with_training("gradient_checkpointing", "on", checkpointing) for checkpointing in [Checkpointing.on])
    yield ((f"quantization={mode.value}", _in_mode(config, mode)) for mode in modes)


def _halvings(rows: int, batch_size: int) -> Iterator[int]:
    while rows > 1:
        rows = next_smaller_micro_batch(rows, batch_size)
        yield rows


def _halves(value: int, minimum: int) -> Iterator[int]:
    while (value := value // 2) >= minimum:
        yield value


def _smallest_settings(config: Config) -> tuple[str, Config]:
    training = replace(config.training, micro_batch_size=1, gradient_checkpointing=Checkpointing.on)
    text = "training.micro_batch_size=1 training.gradient_checkpointing=on quantization=nf4"
    return text, _in_mode(replace(config, training=training), Quantization.nf4)


def _in_mode(config: Config, mode: Quantization) -> Config:
    return replace(config, quantization=in_mode(config.quantization, mode))
