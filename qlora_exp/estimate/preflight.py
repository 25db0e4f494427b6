"""Whether a run may start: its budget and its memory limit are large enough, or the error says what would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qlora_exp.config.checks import check
from qlora_exp.config.enums import Checkpointing, Quantization
from qlora_exp.config.schema import Config, to_plain
from qlora_exp.errors import ConfigError
from qlora_exp.estimate.budget import check_covers_a_step
from qlora_exp.estimate.estimator import RunEstimate
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
from qlora_exp.estimate.weights_and_optimizer import BITS_PER_WEIGHT, in_mode, smallest_base
from qlora_exp.formatting import bytes_text
from qlora_exp.records.fit_types import Fit, SkippedTrial
from qlora_exp.records.types import Device

if TYPE_CHECKING:
    from qlora_exp.estimate.planner import Planner

SMALLER_QUANTIZATIONS = (Quantization.bf16, Quantization.int8, Quantization.nf4)
"""Modes to suggest, the most precise first."""
MIN_LENGTH = 16
"""Tokens. Shorter rows are never suggested."""


def check_a_base_fits(planner: Planner, configs: Sequence[Config], memory_bytes: int | None) -> None:
    """Check that some quantization of some base fits into ``budget.memory_bytes``, without adapters and training.

    Raises:
        ConfigError: no quantization of any of their bases fits.
        ModelError: there is no such base.
    """
    if memory_bytes is None or not configs:
        return

    def smallest(config: Config) -> tuple[Quantization, int]:
        device = planner.device(config)
        return smallest_base(planner.architecture(config.model), config.quantization, device.kind, device.bf16)

    distinct = {(repr(config.model), repr(config.quantization), config.training.device): config for config in configs}
    mode, minimum = min(map(smallest, distinct.values()), key=lambda mode_and_bytes: mode_and_bytes[1])
    if minimum > memory_bytes:
        hint = f"a smaller model, or more than budget.memory_bytes={minimum}"
        raise ConfigError(_no_base_fits(mode, minimum), f"budget.memory_bytes = {memory_bytes}", hint)


def memory_fit(config: Config, estimate: RunEstimate, limit: MemoryLimit) -> Fit | None:
    """Return the predicted memory with its limit; ``None`` if no limit is known.

    Raises:
        PredictedOutOfMemory: the prediction exceeds the limit; the error has its parts, and what would fit.
        ConfigError: the budget is too small for one step.
    """
    check_covers_a_step(config.budget, estimate)
    device, peak, seconds = estimate.estimator.device, estimate.memory, estimate.time.train
    limit_bytes = memory_limit_bytes(limit, device)
    if limit_bytes is None:
        return None
    need = MemoryEstimate(
        peak.peak_bytes, peak.context_bytes, seconds.middle if seconds else None, estimate.train_flops, peak.exact_bytes
    )
    key = correction_key(to_plain(config), device, padding_free=estimate.padded_because is None)
    fit, may_start = fit_into(limit_bytes, need, limit, key, device.kind)
    if may_start and fit.excess < -fit.error:
        return fit
    from_budget = limit.limit_bytes is not None
    what, hint = _error_and_hint(config, estimate, fit, from_budget)
    fit = replace(fit, would_fit=hint)
    if may_start:
        return fit
    where = f"budget.memory_bytes = {limit_bytes}" if from_budget else _limit_text(device, limit_bytes, limit.hosts)
    raise PredictedOutOfMemory(
        what, where, f"{hint}; --force starts it anyway", SkippedTrial(fit, need.train_seconds, need.train_flops)
    )


def _limit_text(device: Device, limit_bytes: int, hosts: int) -> str:
    """Return a phrase that names the memory that limits the run."""
    shared = f", shared by {hosts} concurrent trials" if hosts > 1 else ""
    if device.kind == "cpu":
        total = bytes_text(device.memory_bytes or 0)
        limit = f"this machine's memory or its control group's limit is {total}"
        return f"{limit}; without the process itself {bytes_text(limit_bytes)} remain{shared}"
    return f"the memory of {device.name} = {limit_bytes}{shared}"


def _no_base_fits(mode: Quantization, minimum: int) -> str:
    return f"no quantization of this base fits: {mode.value}, the smallest, takes {bytes_text(minimum)} by itself"


def _error_and_hint(config: Config, estimate: RunEstimate, fit: Fit, from_budget: bool) -> tuple[str, str]:
    """Return what is wrong, and what to do. ``from_budget``: the limit is ``budget.memory_bytes``."""
    estimator = estimate.estimator

    def at_least(size: int) -> str:
        return f"at least budget.memory_bytes={size}" if from_budget else f"at least {bytes_text(size)} of memory"

    device = estimator.device
    mode, minimum = smallest_base(estimator.architecture, config.quantization, device.kind, device.bf16)
    if minimum > fit.limit_bytes:
        return _no_base_fits(mode, minimum), f"a smaller model, or {at_least(fit.corrected_bytes)}"
    corrected = f", corrected by the measured peaks of {fit.similar_runs} similar runs" if fit.similar_runs else ""
    what = (
        f"the run is predicted to need {bytes_text(fit.corrected_bytes)} of {bytes_text(fit.limit_bytes)}{corrected}"
        f": {_parts(estimate.memory)}"
    )
    scale = (fit.corrected_bytes - fit.context_bytes) / fit.peak_bytes

    def needed(variant: Config) -> float:
        predicted = estimator.peak(variant)
        return scale * predicted.peak_bytes + predicted.context_bytes

    changes = list(_smaller_settings(config, estimate, lambda variant: needed(variant) <= fit.limit_bytes))
    if changes:
        return what, "; or ".join(f"{text} ({bytes_text(needed(variant))})" for text, variant in changes)
    training = replace(
        config.training, micro_batch_size=1, micro_batch_tokens=None, gradient_checkpointing=Checkpointing.on
    )
    smallest = _in_mode(replace(config, training=training), Quantization.nf4)
    one_row = "training.micro_batch_size=1"
    if config.training.micro_batch_tokens is not None:
        one_row = f"training.micro_batch_tokens={estimate.longest_row_tokens}"
    text = f"{one_row} training.gradient_checkpointing=on quantization=nf4"
    if needed(smallest) <= fit.limit_bytes:
        return what, f"{text} ({bytes_text(needed(smallest))})"
    return what, f"a smaller model; with {text} {at_least(round(needed(smallest)))}"


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
    config: Config, estimate: RunEstimate, fits: Callable[[Config], bool]
) -> Iterator[tuple[str, Config]]:
    """Yield, for each setting, the nearest smaller value that makes the run fit by itself."""
    training = config.training
    rows = training.micro_batch_size or training.batch_size
    longest = estimate.rows.longest_tokens if estimate.rows is not None else training.max_length
    bits = BITS_PER_WEIGHT[config.quantization.mode]
    modes = [mode for mode in SMALLER_QUANTIZATIONS if BITS_PER_WEIGHT[mode] < bits]

    def with_training(key: str, value: int | str, setting: Any) -> tuple[str, Config]:
        return f"training.{key}={value}", replace(config, training=replace(training, **{key: setting}))

    in_tokens = estimate.micro_batch_tokens is not None
    token_counts = _halves(estimate.micro_batch_tokens or 0, estimate.longest_row_tokens)
    # Micro-batches that divide the batch: all of them for a small batch, else only by halving.
    row_counts = range(rows - 1, 0, -1) if rows <= 64 else _halvings(rows, training.batch_size)
    settings: tuple[Iterator[tuple[str, Config]], ...] = (
        (with_training("micro_batch_tokens", n, n) for n in token_counts)
        if in_tokens
        else (with_training("micro_batch_size", n, n) for n in row_counts if training.batch_size % n == 0),
        (with_training("max_length", n, n) for n in _halves(min(training.max_length, longest), MIN_LENGTH)),
        iter([with_training("gradient_checkpointing", "on", Checkpointing.on)]),
        ((f"quantization={mode.value}", _in_mode(config, mode)) for mode in modes),
    )
    for variants in settings:
        nearest = next(((text, variant) for text, variant in variants if not check(variant) and fits(variant)), None)
        if nearest is not None:
            yield nearest


def _halvings(rows: int, batch_size: int) -> Iterator[int]:
    while rows > 1:
        rows = next_smaller_micro_batch(rows, batch_size)
        yield rows


def _halves(tokens: int, minimum: int) -> Iterator[int]:
    while (tokens := tokens // 2) >= minimum:
        yield tokens


def _in_mode(config: Config, mode: Quantization) -> Config:
    return replace(config, quantization=in_mode(config.quantization, mode))
