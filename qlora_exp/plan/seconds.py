"""How long training takes, and what it costs: floating-point operations over the rate that this machine was seen at.

Operations after Kaplan et al. 2020 (*Scaling Laws for Neural Language Models*, section 2.1): 2 per weight and token for
a forward pass, and with a frozen base 2 more for the activations' gradients (the weights have none). Counted are the
tokens that are computed: padding in the layers, in the head those with a loss. A rate is measured in the same
operations, by :mod:`qlora_exp.models.rate` or from finished runs; left out is all that isn't a matrix product.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_exp.config import Config, TrainingConfig
from qlora_exp.plan import gradient_checkpointing, lora_parameters
from qlora_exp.plan.activations import layers_of
from qlora_exp.plan.architecture import Architecture
from qlora_exp.plan.batches import RowLengths
from qlora_exp.records import Environment, RunRecord, Status

CALIBRATED_SHARE = (0.2, 0.45, 0.9)
"""Of the calibration's rate, what a training reaches: low, middle, high. The calibration multiplies matrices; a step
also has element-wise work, an optimizer and the trainer's own. Assumed: tests/benchmarks/predicted_seconds.py fits it,
and hasn't been run on an idle machine yet."""
T_95 = (math.nan, 6.3138, 2.9200, 2.3534)
"""Student's t, 95 % one-sided, by degrees of freedom: those that :func:`t_95`'s series isn't right for."""


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
        """Ends added to ends, as if both were long or short together."""
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
    """What runs that ended say of one more; ``None`` is unknown."""

    rate: Rate | None
    other: Interval | None
    """Seconds beside training, from loading on: loading the base, scoring it untouched and scoring it tuned."""
    before: float | None
    """Of these all but the last scoring."""


@dataclass(frozen=True)
class Row:
    """A training's mean row, in tokens. ``padded``: as long as its batch; ``scored``: of its tokens those that carry a
    loss, which alone get logits."""

    tokens: float
    padded: float
    scored: float

    @staticmethod
    def whole(tokens: float) -> Row:
        """All rows as long as this one, and each of their tokens with logits."""
        return Row(tokens, tokens, tokens)


def train_flops_per_token(
    architecture: Architecture, adapter_parameters: int, row: Row, recomputed: bool, fused_head: bool = True
) -> float:
    """Operations to train one unpadded token of rows like ``row``.

    For each padded token 2N forward and 2N backward (N: weights of linear layers and adapters; not of the embedding
    table), 2N more where layers are computed again, and 2 per adapter parameter for its own gradient. Attention: 4 per
    width of the queries and position forward, 8 backward, over the half of the positions that a causal mask leaves. For
    each scored token 4 per weight of the head, and 2 more where TRL's fused head computes its logits again.
    """
    layers = sum(shape.in_features * shape.out_features for shape in architecture.weights)
    head = architecture.vocabulary_size * architecture.hidden_size
    attention = sum(layer.query for layer, _ in layers_of(architecture)) * row.padded / 2
    passes = 6.0 if recomputed else 4.0
    in_layers = passes * layers + (passes + 2.0) * adapter_parameters + (2 * passes + 4.0) * attention
    in_head = (6.0 if fused_head else 4.0) * head
    return (row.padded * in_layers + row.scored * in_head) / row.tokens


@dataclass(frozen=True)
class Extent:
    """How much a training processes. ``step_rows``: in the mean of an epoch, whose last step has what is left."""

    steps: int
    step_rows: float
    row: Row
    tokens: int

    @staticmethod
    def of(training: TrainingConfig, lengths: RowLengths | None = None) -> Extent:
        """``lengths``: of the rows that there are; unknown, every step has a whole batch, and every row is as long as
        ``training.max_length`` with a loss on all of it, an upper bound."""
        rows = lengths.rows if lengths is not None else None
        step_rows = rows / math.ceil(rows / training.batch_size) if rows else float(training.batch_size)
        row = Row.whole(float(training.max_length))
        if lengths is not None:
            together = min(training.micro_batch_size or training.batch_size, lengths.rows)
            row = Row(lengths.mean_tokens, lengths.mean_longest(together), lengths.scored_mean_tokens)
        if training.max_tokens is not None:
            return Extent(
                math.ceil(training.max_tokens / (step_rows * row.tokens)), step_rows, row, training.max_tokens
            )
        steps = training.max_steps or 0
        return Extent(steps, step_rows, row, round(steps * step_rows * row.tokens))

    @property
    def padded_tokens(self) -> int:
        return round(self.tokens * self.row.padded / self.row.tokens)

    @property
    def scored_tokens(self) -> int:
        return round(self.tokens * self.row.scored / self.row.tokens)


def predicted_seconds(
    architecture: Architecture,
    modules: Sequence[str],
    config: Config,
    device_kind: str,
    rate: Rate | None,
    extent: Extent,
) -> Interval | None:
    """Seconds of training ``config`` with adapters on ``modules`` (full names), without loading and evaluation;
    ``None`` where the machine's rate is unknown."""
    if rate is None:
        return None
    wanted = set(modules)
    adapters = sum(
        lora_parameters(shape, config.lora.r, config.lora.dora)
        for shape in architecture.weights
        if shape.name in wanted
    )
    recomputed = gradient_checkpointing(config.training.gradient_checkpointing, device_kind, architecture)
    flops = extent.tokens * train_flops_per_token(architecture, adapters, extent.row, recomputed)
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


def seen_of(
    records: Sequence[RunRecord],
    environment: Environment,
    config: Mapping[str, Any],
    steps: int | None = None,
    warm: bool = False,
) -> Seen:
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
    return Seen(rate, *(found if found[0] is not None else _other_seconds(nearest, config)))


def _rate(records: Iterable[RunRecord], machine: str, quantization: str, steps: int | None) -> Rate | None:
    """What trainings of one base reached on ``machine``: the harmonic mean, by which many take together what they are
    told to (seconds are one over a rate), and an interval for one more over the logarithms of their rates, as
    :func:`_half` has it. ``None`` of none."""
    rates = [rate for record in records if (rate := achieved_flops_per_second(record, steps)) is not None]
    if not rates:
        return None
    basis = f"{len(rates)} training{'s' if len(rates) > 1 else ''} of this base here"
    return Rate(for_one_more(rates, statistics.harmonic_mean(rates), basis), machine, quantization)


def _other_seconds(records: Iterable[RunRecord], config: Mapping[str, Any]) -> tuple[Interval | None, float | None]:
    """Of the records that completed with the same task and evaluation, whether the untouched base's scores were
    measured or read: the mean (what many runs take together), with an interval for one more as :func:`_half` has it,
    and the mean of what came before the last scoring. ``None`` of none."""
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
    told = for_one_more(seconds, statistics.fmean(seconds), basis)
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


MOST = math.log(4.0)
"""An interval's half-width, as a factor either way: two values say little of their spread."""
TOO_SHORT = 10
"""A training of so many times fewer steps than the one to come was mostly its start."""


def for_one_more(values: Sequence[float], middle: float, basis: str) -> Interval:
    """The interval for one more of ``values`` around their geometric mean, as :func:`_half` has it. ``middle``, another
    mean of them, lies in it."""
    centre, (half, words) = statistics.fmean(map(math.log, values)), _half(values)
    low, high = min(math.exp(centre - half), middle), max(math.exp(centre + half), middle)
    return Interval(low, middle, high, f"{basis}, {words}")


def _half(values: Sequence[float]) -> tuple[float, str]:
    """Half the width of an interval for one more, over the logarithms of ``values``, and what it is in words."""
    count = len(values)
    if count == 1:
        return math.log(2.0), "a factor of 2 either way, which is a guess"
    half = t_95(count - 1) * statistics.stdev(map(math.log, values)) * math.sqrt(1 + 1 / count)
    if half > MOST:
        return MOST, "a factor of 4 either way, to which the 90 % interval for one more is cut"
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
    and checkpoints within it too; of one that was :data:`TOO_SHORT` beside ``steps``, of its steps alone after the
    first ones. ``None`` for records without it (``plan.train_flops_per_token``), without a step, or of versions that
    counted no padding and the head for every token: up to three times what small models did."""
    plan, speed = record.plan, record.speed
    if plan is None or plan.train_flops_per_token is None or plan.predicted_loss_tokens is None or record.synthetic:
        return None
    tokens_per_second = 0.0
    if steps is not None and speed.steps is not None and speed.steps * TOO_SHORT < steps:
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
