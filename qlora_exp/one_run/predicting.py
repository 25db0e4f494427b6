"""What a run is expected to need, beside what it will be seen to: memory, seconds, dollars."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from qlora_exp import heap
from qlora_exp.calibration import known_rate
from qlora_exp.config import Config, to_plain
from qlora_exp.data import Splits
from qlora_exp.plan import Architecture
from qlora_exp.plan.peak import Peak, predicted_peak
from qlora_exp.plan.seconds import predicted_seconds, predicted_usd, seen_of, train_flops_per_token
from qlora_exp.records import Environment, Plan, RunRecord
from qlora_exp.redaction import redact


def with_predictions(
    planned: Plan,
    config: Config,
    environment: Environment,
    architecture: Architecture,
    modules: Sequence[str],
    splits: Splits,
    ended: Sequence[RunRecord],
) -> Plan:
    """The plan with what memory, time and money are expected to be, for the rows that there are; ``ended``: runs that
    say how fast this machine is, before its calibration does."""
    device, lengths = environment.device, row_lengths(splits)
    peak = peak_of(config, environment, architecture, modules, splits)
    row = statistics.fmean(lengths)
    seen = seen_of(ended, environment, redact(to_plain(config)))
    rate = seen.rate or known_rate(environment, config.quantization.mode)
    tokens = config.training.max_tokens or round(planned.max_steps * planned.batch_size * row)
    seconds = predicted_seconds(architecture, modules, config, device.kind, rate, tokens=tokens, length=row)
    usd = predicted_usd(seconds, config.budget.usd_per_hour)
    return replace(
        planned,
        predicted_peak_train_bytes=peak.peak_bytes,
        predicted_context_bytes=peak.context_bytes,
        predicted_activation_bytes=peak.activation_bytes,
        predicted_logits_bytes=peak.logits_bytes,
        predicted_train_tokens=tokens,
        train_flops_per_token=train_flops_per_token(
            architecture, planned.trainable_parameters, row, planned.gradient_checkpointing
        ),
        predicted_train_seconds=seconds.middle if seconds else None,
        predicted_train_seconds_low=seconds.low if seconds else None,
        predicted_train_seconds_high=seconds.high if seconds else None,
        predicted_train_seconds_basis=seconds.basis if seconds else None,
        predicted_train_usd=usd.middle if usd else None,
        predicted_other_seconds=seen.other.middle if seen.other else None,
    )


def peak_of(
    config: Config, environment: Environment, architecture: Architecture, modules: Sequence[str], splits: Splits
) -> Peak:
    """The peak of training with the rows that there are, and of these the longest in one batch."""
    device, lengths = environment.device, row_lengths(splits)
    scored = sum(len(item.completion_ids) + len(item.end_ids) for item in splits.train)
    return predicted_peak(
        architecture,
        modules,
        config,
        device.kind,
        bf16=device.bf16,
        length=max(lengths),
        padded=min(lengths) < max(lengths),
        loss_share=scored / sum(lengths),
        joined_heap=heap.joins(environment.glibc_tunables),
    )


def row_lengths(splits: Splits) -> list[int]:
    """Tokens of each training row."""
    return [len(item.prompt_ids) + len(item.completion_ids) + len(item.end_ids) for item in splits.train]
