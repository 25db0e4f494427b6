"""What runs that ended say of one more: the rate that their trainings reached, and their other seconds.

Rates are in the operations that :mod:`qlora_exp.estimate.flops` counts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_exp.estimate.duration import Interval, Rate
from qlora_exp.records.types import Environment, RunRecord, Status

T_95 = (math.nan, 6.3138, 2.9200, 2.3534)
"""Student's t, 95 % one-sided, by degrees of freedom: those that :func:`t_95`'s series isn't right for."""


@dataclass(frozen=True)
class MeasuredThroughput:
    """What runs that ended say of one more; ``None`` is unknown."""

    rate: Rate | None
    other: Interval | None
    """Seconds beside training, from loading on: loading the base, scoring it untouched and scoring it tuned."""
    before: float | None
    """Of these all but the last scoring."""


def from_finished_runs(
    records: Sequence[RunRecord],
    environment: Environment,
    config: Mapping[str, Any],
    steps: int | None = None,
    warm: bool = False,
) -> MeasuredThroughput:
    """What ``records`` (ended runs) say of a run in ``environment`` with ``config`` (as a record holds it).

    Of its rate those of the same base and variant, without any those of the other variant; ``steps``: as many as it
    will train. Of its other seconds those of the same variant whose process had made a run before, where it is
    ``warm``, else those whose had not; without any of these all.
    """
    machine, variant = machine_of(environment), _of(config, "model", "variant")
    kin = [one for one in records if machine_of(one.environment) == machine and _base(one.config) == _base(config)]
    nearest = [one for one in kin if _of(one.config, "model", "variant") == variant]
    alike = [one for one in nearest if one.memory.host_reused == warm]
    mode = str(_of(config, "quantization", "mode"))
    rate = _rate(nearest, machine, mode, steps) or _rate(kin, machine, mode, steps)
    found = _other_seconds(alike, config)
    return MeasuredThroughput(rate, *(found if found[0] is not None else _other_seconds(nearest, config)))


def _rate(records: Iterable[RunRecord], machine: str, quantization: str, steps: int | None) -> Rate | None:
    """What trainings of one base reached on ``machine``: the harmonic mean, by which many take together what they are
    told to (seconds are one over a rate), and an interval for one more over the logarithms of their rates, as
    :func:`_log_half_width` has it. ``None`` of none."""
    rates = [rate for record in records if (rate := achieved_flops_per_second(record, steps)) is not None]
    if not rates:
        return None
    basis = f"{len(rates)} training{'s' if len(rates) > 1 else ''} of this base here"
    return Rate(prediction_interval(rates, statistics.harmonic_mean(rates), basis), machine, quantization)


def _other_seconds(records: Iterable[RunRecord], config: Mapping[str, Any]) -> tuple[Interval | None, float | None]:
    """Of the records that completed with the same task and evaluation, whether the untouched base's scores were
    measured or read: the mean (what many runs take together), with an interval for one more as
    :func:`_log_half_width` has it, and the mean of what came before the last scoring. ``None`` of none."""
    parts = [
        found
        for record in records
        if record.status is Status.COMPLETED
        and all(record.config.get(section) == config.get(section) for section in ("task", "evaluation"))
        and (found := _before_and_after(record)) is not None
    ]
    if not parts:
        return None, None
    seconds = [before + after for before, after in parts]
    basis = f"{len(seconds)} run{'s' if len(seconds) > 1 else ''} like it here"
    told = prediction_interval(seconds, statistics.fmean(seconds), basis)
    return told, statistics.fmean(before for before, _ in parts)


def _before_and_after(record: RunRecord) -> tuple[float, float] | None:
    """Seconds of a run, from loading on, that are neither training nor the last scoring, and those of the last scoring.
    Of one that failed or trained steps twice only what its phases took: the rest may be training that was lost."""
    speed, spent = record.speed, record.spent
    if speed.load_seconds is None or speed.evaluation_seconds is None:
        return None
    before = speed.load_seconds + (speed.untouched_evaluation_seconds or 0.0)
    in_one_part = spent is not None and spent.tokens == speed.train_tokens and not record.earlier_failures
    if in_one_part and speed.total_seconds is not None and speed.train_seconds is not None:
        before = max(before, speed.total_seconds - speed.train_seconds - speed.evaluation_seconds)
    parts = (before, speed.evaluation_seconds)
    return parts if all(map(math.isfinite, parts)) and sum(parts) > 0 else None


MAX_LOG_HALF_WIDTH = math.log(4.0)
"""An interval's half-width, as a factor either way: two values say little of their spread."""
SHORT_RUN_FACTOR = 10
"""A training of so many times fewer steps than the one to come was mostly its start."""


def prediction_interval(values: Sequence[float], middle: float, basis: str) -> Interval:
    """The interval for one more of ``values`` around their geometric mean, as :func:`_log_half_width` has it.
    ``middle``, another mean of them, lies in it."""
    centre, (half, words) = statistics.fmean(map(math.log, values)), _log_half_width(values)
    low, high = min(math.exp(centre - half), middle), max(math.exp(centre + half), middle)
    return Interval(low, middle, high, f"{basis}, {words}")


def _log_half_width(values: Sequence[float]) -> tuple[float, str]:
    """Half the width of an interval for one more, over the logarithms of ``values``, and what it is in words."""
    count = len(values)
    if count == 1:
        return math.log(2.0), "a factor of 2 either way, which is a guess"
    half = t_95(count - 1) * statistics.stdev(map(math.log, values)) * math.sqrt(1 + 1 / count)
    if half > MAX_LOG_HALF_WIDTH:
        return MAX_LOG_HALF_WIDTH, "a factor of 4 either way, to which the 90 % interval for one more is cut"
    return half, "90 % interval for one more"


def t_95(degrees: int) -> float:
    """Student's t, 95 % one-sided, with ``degrees`` of freedom, to 0.02 %; importing scipy for it would take longer
    than a plan. Abramowitz & Stegun 1964, *Handbook of Mathematical Functions*, 26.7.5."""
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


def _base(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """Which base, of both variants, in which quantization."""
    model = tuple(_of(config, "model", key) for key in ("family", "path", "checkpoints", "revision"))
    return (*model, _of(config, "quantization", "mode"))


def _of(config: Mapping[str, Any], section: str, key: str) -> Any:
    """``None`` where a record's configuration lacks it."""
    found = config.get(section)
    return found.get(key) if isinstance(found, Mapping) else None


def achieved_flops_per_second(record: RunRecord, steps: int | None = None) -> float | None:
    """Operations that a training made a second, by the same count as the prediction's: of all that it took, validations
    and checkpoints within it too; of one that was :data:`SHORT_RUN_FACTOR` beside ``steps``, of its steps alone after
    the first ones. ``None`` for records without it (``plan.train_flops_per_token``), without a step, or of versions
    that counted no padding and the head for every token: up to three times what small models did."""
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


def machine_of(environment: Any) -> str:
    """What a rate belongs to: device, how many cores and threads, and torch's version."""
    device = environment.device
    threads = environment.torch_threads if device.kind == "cpu" else None
    parts = (device.kind, device.name, environment.cpu_cores if device.kind == "cpu" else None, threads)
    return ", ".join(str(part) for part in (*parts, environment.packages.get("torch")) if part is not None)
