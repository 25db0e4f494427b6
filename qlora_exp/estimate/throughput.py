"""What finished runs predict for the next one: the rate of its training, and the seconds of loading and scoring.

A rate is in floating-point operations per second, counted as in :mod:`qlora_exp.estimate.workload`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_exp.records.types import Environment, RunRecord, Status

MAX_LOG_HALF_WIDTH = math.log(4.0)
"""The largest half-width of an interval, as a factor: two values say little about their spread."""
SHORT_RUN_FACTOR = 10
"""A training with this many times fewer steps than the next one was mostly start-up."""
T_95 = (math.nan, 6.3138, 2.9200, 2.3534)
"""Student's t, 95 % one-sided, by degrees of freedom: the first ones, for which the series of :func:`t_95` isn't
accurate."""


@dataclass(frozen=True)
class Interval:
    """``low`` ≤ ``middle`` ≤ ``high``, and what they are based on."""

    low: float
    middle: float
    high: float
    basis: str

    def times(self, factor: float) -> Interval:
        return Interval(self.low * factor, self.middle * factor, self.high * factor, self.basis)

    def plus(self, other: Interval | None) -> Interval:
        """Add low to low and high to high, as if both were short or long together."""
        if other is None:
            return self
        basis = f"{self.basis}; {other.basis}"
        return Interval(self.low + other.low, self.middle + other.middle, self.high + other.high, basis)


def seconds_at(rate: Interval | None, flops: float) -> Interval | None:
    """Return the seconds of ``flops`` operations; ``None`` if the rate is unknown."""
    return rate and Interval(flops / rate.high, flops / rate.middle, flops / rate.low, rate.basis)


@dataclass(frozen=True)
class MeasuredThroughput:
    """What finished runs predict for the next one; ``None`` is unknown."""

    rate: Interval | None
    other: Interval | None
    """Seconds without training, from loading on: loading the base, scoring it before tuning, and scoring after
    tuning."""
    before: float | None
    """The part of ``other`` before the last scoring."""


def from_finished_runs(
    records: Sequence[RunRecord],
    environment: Environment,
    config: Mapping[str, Any],
    steps: int | None = None,
    warm: bool = False,
    padding_free: bool = False,
) -> MeasuredThroughput:
    """Return what ``records`` (ended runs) predict for a run in ``environment`` with ``config`` (as a record holds it).

    The rate comes from runs of the same base and variant; if there are none, from the other variant. Only runs with
    padding predict one with padding, and only ``padding_free`` ones one without: another share of their seconds isn't
    counted as operations. ``steps``: how
    many steps the run will train. The other seconds come from runs of the same variant in the same state: with
    ``warm``, runs whose process had made a run before, else the first runs of their process. If there are none, all
    runs of the variant count.
    """
    machine, base, variant = machine_of(environment), _base_key(config), _setting(config, "model", "variant")
    same_base = [
        record for record in records if machine_of(record.environment) == machine and _base_key(record.config) == base
    ]
    same_variant = [record for record in same_base if _setting(record.config, "model", "variant") == variant]
    same_warmth = [record for record in same_variant if record.memory.process_reused == warm]
    rate = _rate(same_variant, padding_free, steps) or _rate(same_base, padding_free, steps)
    other, before = _other_seconds(same_warmth, config) or _other_seconds(same_variant, config) or (None, None)
    return MeasuredThroughput(rate, other, before)


def _rate(records: Iterable[RunRecord], padding_free: bool, steps: int | None) -> Interval | None:
    """Return the rate that these trainings reached; ``None`` if there are none.

    The middle is the harmonic mean, because seconds are proportional to one over a rate.
    """
    like = (record for record in records if record.plan is not None and bool(record.plan.padding_free) is padding_free)
    rates = [rate for record in like if (rate := achieved_flops_per_second(record, steps)) is not None]
    if not rates:
        return None
    basis = f"{len(rates)} training{'s' if len(rates) > 1 else ''} of this base on this machine"
    return prediction_interval(rates, statistics.harmonic_mean(rates), basis)


def _other_seconds(records: Iterable[RunRecord], config: Mapping[str, Any]) -> tuple[Interval, float] | None:
    """Return the seconds of loading and scoring in completed runs with the same task and evaluation, and the mean of
    the part before the last scoring; ``None`` if there are none.

    Runs count whether they measured the base model's scores or read them from the cache.
    """
    parts = [
        seconds_of_run
        for record in records
        if record.status is Status.COMPLETED
        and record.config.get("task") == config.get("task")
        and _scored_alike(record.config.get("evaluation"), config.get("evaluation"))
        and (seconds_of_run := _before_and_after(record)) is not None
    ]
    if not parts:
        return None
    seconds = [before + after for before, after in parts]
    basis = f"{len(seconds)} similar run{'s' if len(seconds) > 1 else ''} on this machine"
    interval = prediction_interval(seconds, statistics.fmean(seconds), basis)
    return interval, statistics.fmean(before for before, _ in parts)


def _scored_alike(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> bool:
    """Return whether two ``evaluation`` groups score alike: whether texts are kept takes no time."""
    groups = [{key: value for key, value in (group or {}).items() if key != "keep_texts"} for group in (first, second)]
    return groups[0] == groups[1]


def _before_and_after(record: RunRecord) -> tuple[float, float] | None:
    """Return a run's seconds from loading on without training and the last scoring, and those of the last scoring.

    If the run failed or repeated steps, only its measured phases count: the rest may be lost training.
    """
    speed, spent = record.speed, record.spent
    if speed.load_seconds is None or speed.evaluation_seconds is None:
        return None
    before = speed.load_seconds + (speed.base_evaluation_seconds or 0.0)
    in_one_part = spent is not None and spent.tokens == speed.train_tokens and not record.earlier_failures
    if in_one_part and speed.total_seconds is not None and speed.train_seconds is not None:
        other = speed.total_seconds - speed.train_seconds - speed.evaluation_seconds
        before = max(before, other - (speed.waiting_seconds or 0.0))
    parts = (before, speed.evaluation_seconds)
    return parts if all(map(math.isfinite, parts)) and sum(parts) > 0 else None


def prediction_interval(values: Sequence[float], middle: float, basis: str) -> Interval:
    """Return the 90 % prediction interval for one more of ``values``, over their logarithms.

    Of a single value it is a factor of 2 either way. It is widened to contain ``middle``, another mean of the values.
    """
    logs = [math.log(value) for value in values]
    half, words = math.log(2.0), "a factor of 2 either way (a guess)"
    if len(logs) > 1:
        half = t_95(len(logs) - 1) * statistics.stdev(logs) * math.sqrt(1 + 1 / len(logs))
        words = "90 % prediction interval"
    if half > MAX_LOG_HALF_WIDTH:
        half, words = MAX_LOG_HALF_WIDTH, "a factor of 4 either way (the 90 % prediction interval is wider)"
    centre = statistics.fmean(logs)
    low, high = min(math.exp(centre - half), middle), max(math.exp(centre + half), middle)
    return Interval(low, middle, high, f"{basis}, {words}")


def t_95(degrees: int) -> float:
    """Return Student's t, 95 % one-sided, with ``degrees`` of freedom, to 0.02 %.

    Importing scipy for it would take longer than a plan. Abramowitz & Stegun 1964, *Handbook of Mathematical
    Functions*, 26.7.5.
    """
    if degrees < len(T_95):
        return T_95[degrees]
    z = statistics.NormalDist().inv_cdf(0.95)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / float(degrees) ** power for power, term in enumerate(terms))


def achieved_flops_per_second(record: RunRecord, steps: int | None = None) -> float | None:
    """Return the operations per second of a training, counted as the prediction counts them.

    Usually over all its seconds, validations and checkpoints included. If ``steps`` is more than
    :data:`SHORT_RUN_FACTOR` times its steps, only over its steps after the first ones.

    ``None`` for records without ``plan.train_flops_per_token``, for trainings without a step, and for older records.
    Those counted no padding, and the head for every token: up to three times too much for small models.
    """
    plan, speed = record.plan, record.speed
    if plan is None or plan.train_flops_per_token is None or plan.predicted_loss_tokens is None or record.synthetic:
        return None
    tokens_per_second = 0.0
    if steps is not None and speed.steps is not None and speed.steps * SHORT_RUN_FACTOR < steps:
        tokens_per_second = (speed.train_tokens_per_second or 0.0) if speed.excluded_steps else 0.0
    elif speed.train_tokens and speed.train_seconds:
        tokens_per_second = speed.train_tokens / speed.train_seconds
    rate = plan.train_flops_per_token * tokens_per_second
    return rate if math.isfinite(rate) and rate > 0 else None


def machine_of(environment: Environment) -> str:
    """Return what a rate belongs to: device, number of cores and threads, and torch's version."""
    device = environment.device
    on_cpu = (environment.cpu_cores, environment.torch_threads) if device.kind == "cpu" else ()
    parts = (device.kind, device.name, *on_cpu, environment.packages.get("torch"))
    return ", ".join(str(part) for part in parts if part is not None)


def _base_key(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the base model (both variants) and the quantization."""
    keys = ("family", "path", "instruct_path", "checkpoints", "revision")
    model = tuple(_setting(config, "model", key) for key in keys)
    return (*model, _setting(config, "quantization", "mode"))


def _setting(config: Mapping[str, Any], section: str, key: str) -> Any:
    """Return a value of a record's configuration, or ``None`` if it lacks it."""
    settings = config.get(section)
    return settings.get(key) if isinstance(settings, Mapping) else None
