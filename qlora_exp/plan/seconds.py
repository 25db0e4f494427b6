"""How long training takes, and what it costs: floating-point operations over the rate that this machine was seen at.

Operations after Kaplan et al. 2020 (*Scaling Laws for Neural Language Models*, section 2.1): 2 per weight and token for
a forward pass, and with a frozen base 2 more for the activations' gradients (the weights have none). A rate is measured
in the same operations, by :mod:`qlora_exp.models.rate` or from finished runs, so what both leave out cancels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_exp.config import Config
from qlora_exp.plan import gradient_checkpointing, lora_parameters
from qlora_exp.plan.activations import layers_of
from qlora_exp.plan.architecture import Architecture
from qlora_exp.plan.feasibility import key_of
from qlora_exp.records import Device, Environment, RunRecord, Status

CALIBRATED_SHARE = (0.2, 0.45, 0.9)
"""Of the calibration's rate, what a training reaches: low, middle, high. The calibration multiplies matrices; a step
also has element-wise work, an optimizer and the trainer's own. Assumed, not measured: docs/plan_accuracy.md."""
T_90 = (math.nan, 6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)
"""Student's t, 95 % one-sided, by degrees of freedom; 1.7 above."""


@dataclass(frozen=True)
class Interval:
    """``low`` ≤ ``middle`` ≤ ``high``, and how they were made."""

    low: float
    middle: float
    high: float
    basis: str

    def times(self, factor: float) -> Interval:
        return Interval(self.low * factor, self.middle * factor, self.high * factor, self.basis)

    def plus(self, other: Interval | None) -> Interval:
        """Ends added to ends: wider than chance would have it, never narrower."""
        if other is None:
            return self
        basis = f"{self.basis}; {other.basis}"
        return Interval(self.low + other.low, self.middle + other.middle, self.high + other.high, basis)


@dataclass(frozen=True)
class Rate:
    """Floating-point operations a second that trainings reach on one machine in one quantization mode."""

    flops_per_second: Interval
    machine: str
    quantization: str


@dataclass(frozen=True)
class Seen:
    """What the runs that ended say of one more. ``other``: its seconds beside training. ``None`` is unknown."""

    rate: Rate | None
    other: Interval | None


def train_flops_per_token(
    architecture: Architecture, adapter_parameters: int, length: float, recomputed: bool, fused_head: bool = True
) -> float:
    """Operations to train one token of rows ``length`` tokens long.

    2N forward and 2N backward (N: weights that multiply: linear layers and the head, not the embedding table), 2N more
    where layers are computed again, 2 per head weight more where TRL's fused head computes its logits again, 6 per
    adapter parameter. Attention: 4 per width of the queries and position forward, 8 backward, over the half of the
    positions that a causal mask leaves.
    """
    layers = sum(shape.in_features * shape.out_features for shape in architecture.weights)
    head = architecture.vocabulary_size * architecture.hidden_size
    attention = sum(layer.query for layer, _ in layers_of(architecture)) * length / 2
    passes = 6.0 if recomputed else 4.0
    head_passes = 6.0 if fused_head else 4.0
    return passes * layers + head_passes * head + 6.0 * adapter_parameters + (2 * passes + 4.0) * attention


def predicted_seconds(
    architecture: Architecture,
    modules: Sequence[str],
    config: Config,
    device_kind: str,
    rate: Rate | None,
    *,
    tokens: int | None = None,
    length: float | None = None,
) -> Interval | None:
    """Seconds of training ``config`` with adapters on ``modules`` (full names), without loading and evaluation.

    ``tokens``: all that training processes, padding included, where known; else steps × rows × ``length``, and
    ``length`` (tokens of a mean row) is ``training.max_length`` where it isn't known, an upper bound. ``None`` where
    the machine's rate is unknown.
    """
    if rate is None:
        return None
    training = config.training
    row = length or float(training.max_length)
    if tokens is None:
        tokens = training.max_tokens or round((training.max_steps or 0) * training.batch_size * row)
    wanted = set(modules)
    adapters = sum(
        lora_parameters(shape, config.lora.r, config.lora.dora)
        for shape in architecture.weights
        if shape.name in wanted
    )
    recomputed = gradient_checkpointing(training.gradient_checkpointing, device_kind, architecture)
    flops = tokens * train_flops_per_token(architecture, adapters, row, recomputed)
    speed = rate.flops_per_second
    return Interval(flops / speed.high, flops / speed.middle, flops / speed.low, speed.basis)


def predicted_usd(seconds: Interval | None, usd_per_hour: float | None) -> Interval | None:
    """``None`` where time or price is unknown."""
    return seconds.times(usd_per_hour / 3600.0) if seconds is not None and usd_per_hour is not None else None


def rate_from_calibration(flops_per_second: float, machine: str, quantization: str) -> Rate:
    """From the rate of bare matrix products, before any run has finished here."""
    low, middle, high = (share * flops_per_second for share in CALIBRATED_SHARE)
    basis = "a calibration of this machine: matrix products, and the share of their rate that trainings reach"
    return Rate(Interval(low, middle, high, basis), machine, quantization)


def seen_of(records: Sequence[RunRecord], environment: Environment, config: Mapping[str, Any]) -> Seen:
    """What ``records`` say of a run in ``environment`` with ``config`` (as a record holds it)."""
    machine, device = machine_of(environment), environment.device
    rate = rate_from_records(records, machine, config["quantization"]["mode"], key_of(config, device))
    return Seen(rate, other_seconds(records, machine, config, device))


def rate_from_records(records: Iterable[RunRecord], machine: str, quantization: str, kin: str) -> Rate | None:
    """What trainings that ended on ``machine`` (see :func:`machine_of`) in ``quantization`` reached, those of ``kin``
    alone (see :func:`~qlora_exp.plan.feasibility.key_of`) where there are any: as :func:`_expected`. ``None`` where
    none has ended."""
    found = [
        (key_of(record.config, record.environment.device) == kin, rate)
        for record in records
        if machine_of(record.environment) == machine
        and (record.config.get("quantization") or {}).get("mode") == quantization
        and (rate := achieved_flops_per_second(record)) is not None
    ]
    speed = _expected([rate for of_kin, rate in found if of_kin] or [rate for _, rate in found], "training")
    return Rate(speed, machine, quantization) if speed is not None else None


def other_seconds(
    records: Iterable[RunRecord], machine: str, config: Mapping[str, Any], device: Device
) -> Interval | None:
    """Seconds of a run beside its training: loading the base, and scoring before and after. As those that completed on
    ``machine`` took, of the same base and quantization with the same task and evaluation, whether the untouched base's
    scores were read or measured: as :func:`_expected`. ``None`` where none has.

    ``config``: as a record holds it.
    """
    kin = key_of(config, device)
    seconds = [
        record.speed.total_seconds - record.speed.train_seconds
        for record in records
        if record.status is Status.COMPLETED
        and not record.synthetic
        and not record.earlier_failures
        and record.speed.total_seconds is not None
        and record.speed.train_seconds is not None
        and machine_of(record.environment) == machine
        and key_of(record.config, record.environment.device) == kin
        and all(record.config.get(section) == config.get(section) for section in ("task", "evaluation"))
    ]
    return _expected([one for one in seconds if one > 0], "run")


def _expected(values: Sequence[float], what: str) -> Interval | None:
    """The geometric mean and a 90 % prediction interval for one more, t over the logarithms (of one value: a factor of
    2 either way; never more than 4); ``None`` of none."""
    if not values:
        return None
    logs = [math.log(value) for value in values]
    count, mean = len(logs), statistics.fmean(logs)
    half = math.log(2.0)
    if count > 1:
        t = T_90[count - 1] if count <= len(T_90) else 1.7
        half = min(2 * math.log(2.0), t * statistics.stdev(logs) * math.sqrt(1 + 1 / count))
    basis = f"{count} finished {what}{'s' if count > 1 else ''} here, 90 % interval for one more"
    return Interval(math.exp(mean - half), math.exp(mean), math.exp(mean + half), basis)


def achieved_flops_per_second(record: RunRecord) -> float | None:
    """Operations that a training made a second, by the same count as the prediction's; ``None`` for records without it
    (``plan.train_flops_per_token``), or that had no step measured."""
    plan, rate = record.plan, record.speed.train_tokens_per_second
    if plan is None or plan.train_flops_per_token is None or rate is None or record.synthetic:
        return None
    return plan.train_flops_per_token * rate


def machine_of(environment: Any) -> str:
    """What a rate belongs to: device, how many cores and threads, and torch's version."""
    device = environment.device
    threads = environment.torch_threads if device.kind == "cpu" else None
    parts = (device.kind, device.name, environment.cpu_cores if device.kind == "cpu" else None, threads)
    return ", ".join(str(part) for part in (*parts, environment.packages.get("torch")) if part is not None)
