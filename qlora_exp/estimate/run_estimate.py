"""The predictions that a run's record shows next to its measurements: memory, seconds, dollars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlora_exp.architecture.shapes import Architecture
from qlora_exp.config.schema import Config, to_plain
from qlora_exp.data.items import Splits
from qlora_exp.estimate.calibration import calibrated_rate
from qlora_exp.estimate.duration import Interval, Rate, lower_bound_seconds, predicted_seconds, predicted_usd
from qlora_exp.estimate.flops import Workload, train_flops_per_token
from qlora_exp.estimate.peak import Peak, predicted_peak
from qlora_exp.estimate.throughput import from_finished_runs
from qlora_exp.estimate.workload import RowLengths
from qlora_exp.records.redaction import redact
from qlora_exp.records.types import Environment, Plan, RunRecord
from qlora_exp.system import heap
from qlora_exp.system.hardware import price_of


@dataclass(frozen=True)
class PredictedRun:
    """``plan`` holds the predicted memory, time and money for the run's rows. Seconds; ``None`` is unknown."""

    plan: Plan
    least_train_seconds: float | None
    """A lower bound from this machine's calibration alone: something may have slowed earlier runs."""
    before_seconds: float | None
    """Seconds from loading on, without training and the last scoring, from similar runs."""
    extent: Workload
    """The expected workload. With ``training.max_tokens`` the plan's steps are an upper bound instead."""


def predict_run(
    planned: Plan,
    config: Config,
    environment: Environment,
    architecture: Architecture,
    modules: Sequence[str],
    splits: Splits,
    ended: Sequence[RunRecord],
    warm: bool,
) -> PredictedRun:
    """Return ``planned`` with its predictions. ``ended``: finished runs; those of the same base say how fast this
    machine is, otherwise its calibration does. ``warm``: the base is loaded already."""
    device = environment.device
    peak = peak_of(config, environment, architecture, modules, splits)
    extent = Workload.of(config.training, lengths_of(splits, config.training.max_length))

    def seconds_at(rate: Rate | None) -> Interval | None:
        return predicted_seconds(architecture, modules, config, device.kind, rate, extent)

    throughput = from_finished_runs(ended, environment, redact(to_plain(config)), extent.steps, warm)
    calibrated = seconds_at(calibrated_rate(environment, config.quantization.mode))
    seconds = seconds_at(throughput.rate) if throughput.rate is not None else calibrated
    price = price_of(config.budget.usd_per_hour, device.kind, device.name)
    usd = predicted_usd(seconds, price.usd_per_hour if price else None)
    plan = replace(
        planned,
        predicted_peak_train_bytes=peak.peak_bytes,
        predicted_context_bytes=peak.context_bytes,
        predicted_activation_bytes=peak.activation_bytes,
        predicted_logits_bytes=peak.logits_bytes,
        predicted_train_tokens=extent.tokens,
        predicted_padded_tokens=extent.padded_tokens,
        predicted_loss_tokens=extent.scored_tokens,
        train_flops_per_token=train_flops_per_token(
            architecture, planned.trainable_parameters, extent.row, planned.gradient_checkpointing
        ),
        predicted_train_seconds=seconds.middle if seconds else None,
        predicted_train_seconds_low=seconds.low if seconds else None,
        predicted_train_seconds_high=seconds.high if seconds else None,
        predicted_train_seconds_basis=seconds.basis if seconds else None,
        predicted_train_usd=usd.middle if usd else None,
        usd_per_hour=price.usd_per_hour if price else None,
        usd_per_hour_from=price.source if price else None,
        predicted_other_seconds=throughput.other.middle if throughput.other else None,
    )
    return PredictedRun(plan, lower_bound_seconds(calibrated), throughput.before, extent)


TIME_FIELDS = (
    *("predicted_train_seconds", "predicted_train_seconds_low", "predicted_train_seconds_high"),
    *("predicted_train_seconds_basis", "predicted_train_usd", "predicted_other_seconds"),
)


def with_first_predictions(planned: Plan, before: Plan | None) -> Plan:
    """Return ``planned`` with the predicted times of ``before``: a resumed run keeps those of its start."""
    return planned if before is None else replace(planned, **{name: getattr(before, name) for name in TIME_FIELDS})


def peak_of(
    config: Config, environment: Environment, architecture: Architecture, modules: Sequence[str], splits: Splits
) -> Peak:
    """Return the predicted peak of training on these rows, cut at ``training.max_length``."""
    lengths = lengths_of(splits, config.training.max_length)
    return predicted_peak(
        architecture,
        modules,
        config,
        environment.device.kind,
        bf16=environment.device.bf16,
        rows=lengths,
        steps=Workload.of(config.training, lengths).steps,
        joined_heap=heap.merges_free_chunks(environment.glibc_tunables),
    )


def lengths_of(splits: Splits, limit: int) -> RowLengths:
    """Return the lengths of the training rows, each row cut at ``limit`` tokens."""
    lengths = [min(length, limit) for length in row_lengths(splits)]
    scored = [sum(item.completion_mask[:limit]) for item in splits.train]
    return RowLengths.of(lengths, scored)


def row_lengths(splits: Splits) -> list[int]:
    """Return the tokens of each training row."""
    return [len(item.prompt_ids) + len(item.completion_ids) + len(item.end_ids) for item in splits.train]
