"""Margins with a unit: the smallest gain of a doubling that is worth its cost, as a user writes it.

>>> parse_margin("0.25%").per_item(Levels(loss_per_item=2.0))
0.005

docs/statistics.md has the default's reason, and how each unit is converted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import fmean
from typing import Any

import numpy as np

from qlora_exp.analysis.comparable import answering_scores, base_model_scores, finite_score
from qlora_exp.errors import AnalysisError, nearest
from qlora_exp.records.types import RunRecord


class MarginUnit(StrEnum):
    """Units of a margin, as a user writes them after the number."""

    SHARE_OF_LOSS = "% of the loss"
    NATS_PER_ITEM = "nats_per_item"
    NATS_PER_TOKEN = "nats_per_token"
    SHARE_OF_TUNING_GAIN = "% of the tuning gain"
    SCORE = "units of the score"
    """A number without a unit in a table."""


_WRITTEN = {
    "%": MarginUnit.SHARE_OF_LOSS,
    "% of loss": MarginUnit.SHARE_OF_LOSS,
    "% of the loss": MarginUnit.SHARE_OF_LOSS,
    "nats_per_item": MarginUnit.NATS_PER_ITEM,
    "nats_per_token": MarginUnit.NATS_PER_TOKEN,
    "% of tuning gain": MarginUnit.SHARE_OF_TUNING_GAIN,
    "% of the tuning gain": MarginUnit.SHARE_OF_TUNING_GAIN,
}
EXAMPLES = "0.25% (of the loss at the first rank), 0.1 nats_per_item, 0.002 nats_per_token, 1% of the tuning gain"
DEFAULT_SHARE = 0.0025
"""Share of the loss per doubling that ``analyze`` assumes; conf/sweep/default.yaml has the same as ``0.25%``."""
MIN_RUNS_FOR_SLOPE = 4
TASK_METRICS = ("accuracy", "exact_match", "token_f1", "rouge_l")
"""The metrics in which a margin is also shown; the first that all runs have is used."""
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Levels:
    """What a relative margin is relative to: means over the runs at the first rank. ``None`` is unknown."""

    loss_per_item: float
    """Nats."""
    tokens_per_item: float | None = None
    """Tokens with a loss."""
    tuning_gain_per_item: float | None = None
    """How much lower the loss is than the untuned model's, nats per item."""


@dataclass(frozen=True)
class Margin:
    """One margin per doubling. ``value`` is a share for the two relative units: 0.0025 for ``0.25%``."""

    value: float
    unit: MarginUnit

    def __str__(self) -> str:
        """Return the margin as a user writes it, e.g. ``0.25%``."""
        if self.unit is MarginUnit.SHARE_OF_TUNING_GAIN:
            return f"{self.number:g}{self.unit}"
        return f"{self.number:g}" + {MarginUnit.SCORE: "", MarginUnit.SHARE_OF_LOSS: "%"}.get(
            self.unit, f" {self.unit}"
        )

    def per_item(self, levels: Levels) -> float:
        """Return the margin in nats per item.

        Raises:
            AnalysisError: the level that the unit needs is unknown, or not above 0.
        """
        if self.unit in (MarginUnit.NATS_PER_ITEM, MarginUnit.SCORE):
            return self.value
        level, what = {
            MarginUnit.SHARE_OF_LOSS: (levels.loss_per_item, "the loss at the first rank"),
            MarginUnit.NATS_PER_TOKEN: (levels.tokens_per_item, "the number of tokens per item"),
            MarginUnit.SHARE_OF_TUNING_GAIN: (levels.tuning_gain_per_item, "the tuning gain at the first rank"),
        }[self.unit]
        if level is None or not math.isfinite(level):
            reason = "no score before tuning" if self.unit is MarginUnit.SHARE_OF_TUNING_GAIN else "no record of it"
            problem = f"the margin {self} has no size: {what} is unknown ({reason})"
            raise AnalysisError(problem, "margin", "use 0.25% (of the loss), or 0.1 nats_per_item")
        if level <= 0:
            problem = f"the margin {self} has no size: {what} is {level:.3g}, not above 0"
            raise AnalysisError(problem, "margin", "use 0.1 nats_per_item")
        return self.value * level

    @property
    def number(self) -> float:
        """The number that the user wrote: 0.25 for ``0.25%``. A half-zone and expected noise are in the same terms."""
        relative = self.unit in (MarginUnit.SHARE_OF_LOSS, MarginUnit.SHARE_OF_TUNING_GAIN)
        return 100 * self.value if relative else self.value

    @property
    def needs_levels(self) -> bool:
        """Return whether its size in nats per item follows only from runs."""
        return self.unit not in (MarginUnit.NATS_PER_ITEM, MarginUnit.SCORE)


def parse_margin(text: object, bare_unit: MarginUnit = MarginUnit.NATS_PER_ITEM, where: str = "margin") -> Margin:
    """Return the margin that a user wrote: ``0.25%``, ``0.1 nats_per_item``, ``0.002 nats_per_token``, ``1% of the
    tuning gain``, or a number.

    Args:
        bare_unit: unit of a number without one.
        where: key or option, for the error.

    Raises:
        AnalysisError: no margin, two of them, an unknown unit, or a number that isn't above 0.
    """
    numbers = [] if isinstance(text, bool) else _NUMBER.findall(str(text))
    if len(numbers) != 1:
        what = f"{text!r} is not a margin" if not numbers else f"{len(numbers)} margins in {str(text)!r}; use one"
        hint = f"for example {EXAMPLES}" if not numbers else "one number with a decimal point and its unit, as in 0.25%"
        raise AnalysisError(what, where, hint)
    before, written = (part.strip() for part in str(text).split(numbers[0], 1))
    if before:
        raise AnalysisError(f"{str(text)!r} is not a margin", where, f"the number comes first: {EXAMPLES}")
    unit = _unit(written, bare_unit, str(text), where)
    value = float(numbers[0])
    if not (math.isfinite(value) and value > 0):
        raise AnalysisError(f"invalid margin {text}", where, f"use a number above 0: {EXAMPLES}")
    relative = unit in (MarginUnit.SHARE_OF_LOSS, MarginUnit.SHARE_OF_TUNING_GAIN)
    return Margin(value / 100 if relative else value, unit)


def _unit(written: str, bare_unit: MarginUnit, text: str, where: str) -> MarginUnit:
    if not written:
        return bare_unit
    words = " ".join(re.sub(r"percent\b", "%", written.lower()).replace("/", " per ").split())
    name = re.sub(r"nats?[ _-]+per[ _-]+(\w+)", r"nats_per_\1", words)
    if name in _WRITTEN:
        return _WRITTEN[name]
    valid = [str(unit) for unit in MarginUnit if unit is not MarginUnit.SCORE]
    close = nearest(name, valid)
    suggestion = "" if close.startswith("valid") else f"{close} "
    hint = f"{suggestion}units: {', '.join(valid)}; for example {EXAMPLES}"
    if bare_unit is MarginUnit.SCORE:
        hint = f"{suggestion}use a number in the score's units, e.g. 0.5; for a loss also 0.25% of it or nats_per_token"
    raise AnalysisError(f"unknown unit {written!r} in the margin {text!r}", where, hint)


def levels_of(records: Sequence[RunRecord]) -> Levels | None:
    """Return the mean levels of these runs on the split that answers; ``None`` if no run has a loss."""
    scores = [(answering_scores(record), base_model_scores(record)) for record in records]
    losses = [loss for after, _ in scores if (loss := finite_score(after, "loss_per_item")) is not None]
    tokens = [
        per_item / per_token
        for after, _ in scores
        if (per_item := finite_score(after, "loss_per_item")) and (per_token := finite_score(after, "loss"))
    ]
    gains = [
        before - after
        for tuned, base in scores
        if (after := finite_score(tuned, "loss_per_item")) is not None
        and (before := finite_score(base, "loss_per_item")) is not None
    ]
    tokens_per_item, gain = (fmean(values) if values else None for values in (tokens, gains))
    return Levels(fmean(losses), tokens_per_item, gain) if losses else None


@dataclass(frozen=True)
class TaskSlope:
    """How the task's own metric follows the loss over a study's runs (least squares)."""

    metric: str
    per_nat: float
    """Rise of the metric for each nat per item by which the loss falls."""
    r: float
    """Correlation of the metric with the fall of the loss."""
    runs: int
    loss_range: float
    """Largest minus smallest loss, nats per item."""


@dataclass(frozen=True)
class TaskMargin:
    """A margin in the task's own metric, by the slope over ``runs`` runs with correlation ``r``."""

    metric: str
    value: float
    r: float
    runs: int


@dataclass(frozen=True)
class MarginUnits:
    """One margin in all units. ``None`` is unknown."""

    share_of_loss: float | None
    nats_per_item: float | None
    nats_per_token: float | None
    task: TaskMargin | None

    def as_object(self) -> dict[str, Any]:
        return asdict(self)


def task_slope(records: Sequence[RunRecord]) -> TaskSlope | None:
    """Return the least-squares slope of the task's own metric over ``loss_per_item``.

    ``None``: fewer than four runs that have both, or a loss or metric that is the same in all of them. The slope
    describes these runs; it doesn't say that a lower loss causes a better metric.
    """
    for metric in TASK_METRICS:
        pairs = [
            (loss, value)
            for record in records
            if (loss := finite_score(answering_scores(record), "loss_per_item")) is not None
            and (value := finite_score(answering_scores(record), metric)) is not None
        ]
        if len(pairs) < MIN_RUNS_FOR_SLOPE:
            continue
        loss, value = np.array(pairs).T
        if np.ptp(loss) <= 1e-9 * abs(loss.mean()) or np.ptp(value) == 0:
            return None
        r = float(np.corrcoef(-loss, value)[0, 1])
        per_nat = r * float(value.std() / loss.std())
        return TaskSlope(metric, per_nat, r, len(pairs), float(np.ptp(loss)))
    return None


def margin_units(nats_per_item: float | None, levels: Levels | None, slope: TaskSlope | None = None) -> MarginUnits:
    """Return a margin in all units that are known.

    The task's metric is unknown if the losses of the runs span less than the margin: the slope would be extrapolated.
    """
    if nats_per_item is None:
        return MarginUnits(None, None, None, None)
    tokens = levels.tokens_per_item if levels is not None else None
    share = nats_per_item / levels.loss_per_item if levels is not None and levels.loss_per_item > 0 else None
    task = None
    if slope is not None and slope.loss_range >= nats_per_item:
        task = TaskMargin(slope.metric, slope.per_nat * nats_per_item, slope.r, slope.runs)
    return MarginUnits(share, nats_per_item, nats_per_item / tokens if tokens else None, task)


def margin_words(margin_text: str, units: MarginUnits) -> str:
    """Return a margin in its units, e.g. ``0.25% of the loss = 0.0071 nats per item = 0.00036 nats per token, about
    0.2 points of accuracy (r = 0.93 over 12 runs)``."""
    known = [
        (f"{100 * units.share_of_loss:.2g}% of the loss" if units.share_of_loss is not None else None),
        (f"{units.nats_per_item:.3g} nats per item" if units.nats_per_item is not None else None),
        (f"{units.nats_per_token:.3g} nats per token" if units.nats_per_token is not None else None),
    ]
    parts = [part for part in known if part is not None]
    if not parts:
        return margin_text
    words = " = ".join(parts if "tuning gain" not in margin_text else [margin_text, *parts])
    if units.task is None:
        return words
    task, metric = units.task, units.task.metric.replace("_", " ")
    return f"{words}, about {100 * task.value:.2g} points of {metric} (r = {task.r:.2g} over {task.runs} runs)"
