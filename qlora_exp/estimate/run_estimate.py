"""What a run is expected to need, beside what it will be seen to: memory, seconds, dollars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlora_exp.architecture.shapes import Architecture
from qlora_exp.config.schema import Config, to_plain
from qlora_exp.data.items import Splits
from qlora_exp.estimate.calibration import known_rate
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
    """``plan`` has what memory, time and money are expected to be, for the rows that there are. Seconds; ``None`` is
    unknown."""

    plan: Plan
    least_train_seconds: float | None
    """By this machine's calibration alone, at the whole of its rate: earlier runs may have been slowed by something."""
    before_seconds: float | None
    """What passes from loading on beside training and the last scoring, by runs like it."""
    extent: Workload
    """As is expected: with ``training.max_tokens`` the plan's steps are an upper bound."""


def predicted(
    planned: Plan,
    config: Config,
    environment: Environment,
    architecture: Architecture,
    modules: Sequence[str],
    splits: Splits,
    ended: Sequence[RunRecord],
    warm: bool,
) -> PredictedRun:
    """``ended``: runs of which those of the same base say how fast this machine is; else its calibration does.
    ``warm``: its base is here already."""
    device = environment.device
    peak = peak_of(config, environment, architecture, modules, splits)
    extent = Workload.of(config.training, lengths_of(splits, config.training.max_length))

    def by(rate: Rate | None) -> Interval | None:
        return predicted_seconds(architecture, modules, config, device.kind, rate, extent)

    seen = from_finished_runs(ended, environment, redact(to_plain(config)), extent.steps, warm)
    calibrated = by(known_rate(environment, config.quantization.mode))
    seconds = by(seen.rate) if seen.rate is not None else calibrated
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
        predicted_other_seconds=seen.other.middle if seen.other else None,
    )
    return PredictedRun(plan, lower_bound_seconds(calibrated), seen.before, extent)


TIMES = (
    *("predicted_train_seconds", "predicted_train_seconds_low", "predicted_train_seconds_high"),
    *("predicted_train_seconds_basis", "predicted_train_usd", "predicted_other_seconds"),
)


def as_first_told(planned: Plan, before: Plan | None) -> Plan:
    """A resumed run's times are those that it was told at its start, whatever has ended since."""
    return planned if before is None else replace(planned, **{name: getattr(before, name) for name in TIMES})


def peak_of(
    config: Config, environment: Environment, architecture: Architecture, modules: Sequence[str], splits: Splits
) -> Peak:
    """The peak of training with the rows that there are, cut at ``training.max_length``."""
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
    """The training rows' tokens, each row cut at ``limit``."""
    lengths = [min(length, limit) for length in row_lengths(splits)]
    scored = [sum(item.completion_mask[:limit]) for item in splits.train]
    return RowLengths.of(lengths, scored)


def row_lengths(splits: Splits) -> list[int]:
    """Tokens of each training row."""
    return [len(item.prompt_ids) + len(item.completion_ids) + len(item.end_ids) for item in splits.train]
