"""The decision rule of the rank question: margin, error rates, bounds, verdict. docs/statistics.md explains it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from scipy import special

from qlora_exp.analysis.variance import Array, VarianceSplit
from qlora_exp.errors import AnalysisError

FIRST_LOOK, LAST_LOOK = 1, 2
ALPHA = {FIRST_LOOK: 0.015, LAST_LOOK: 0.025}
"""One-sided error rate by look. Two looks at one doubling together stay below 5 %."""
FIRST_SEEDS = 3
MIN_SEEDS_AT_LAST_LOOK, MAX_SEEDS = 4, 8
"""Range of the total number of seeds at the last look."""


class StepVerdict(StrEnum):
    CONTINUE = "continue"
    STOP = "stop"
    INCONCLUSIVE = "inconclusive"
    BUY = "buy"
    """Undecided so far: more seeds or items have to be run, once a doubling."""


@dataclass(frozen=True)
class Rule:
    """What is fixed beforehand. ``margin`` and ``half_zone`` are in the units of the score, both above 0."""

    margin: float
    """The smallest gain of a doubling that is worth its cost."""
    half_zone: float
    """For a true gain within margin ± half_zone, either answer counts as right."""
    doublings: int
    """The most doublings that the ladder can make."""


def make_rule(margin: float, doublings: int, half_zone: float | None = None) -> Rule:
    """Return a checked rule; ``half_zone`` defaults to margin / 2.

    Raises:
        AnalysisError: a margin that isn't above 0, a half-zone outside (0, margin], or no doubling.
    """
    if not (math.isfinite(margin) and margin > 0):
        raise AnalysisError(f"invalid margin {margin:g}", "margin", "use a number above 0, in the score's units")
    zone = margin / 2 if half_zone is None else half_zone
    if not 0 < zone <= margin:
        raise AnalysisError(f"invalid half-zone {zone:g} for margin {margin:g}", "half-zone", "above 0, ≤ margin")
    if doublings < 1:
        raise AnalysisError("a ladder needs at least two ranks", "ranks", "add a rank to compare with")
    return Rule(margin, zone, doublings)


@dataclass(frozen=True)
class MarginBounds:
    """One-sided bounds of the gain, each of shape (...): ``low`` decides *continue*, ``high`` decides *stop*."""

    low: Array
    high: Array
    se: Array
    df: Array

    @property
    def half_width(self) -> Array:
        return (self.high - self.low) / 2


def t_quantiles(df: Array, rule: Rule, look: int) -> tuple[Array, Array]:
    """Return (t of *continue*, t of *stop*).

    A wrong stop can happen at any doubling, so its alpha is divided among them. A wrong continue requires that the
    first true null hypothesis is rejected (a fixed sequence of tests), so its alpha is not divided.
    """
    alpha = ALPHA[look]
    # The same as stats.t.isf without its argument checks: a replay calls this a hundred thousand times.
    return -special.stdtrit(df, alpha), -special.stdtrit(df, alpha / rule.doublings)


def bounds(split: VarianceSplit, rule: Rule, look: int) -> MarginBounds:
    se, df = np.sqrt(split.variance), split.df
    t_continue, t_stop = t_quantiles(df, rule, look)
    return MarginBounds(split.gain - t_continue * se, split.gain + t_stop * se, se, df)


def verdicts(gain: Array, interval: MarginBounds, rule: Rule) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return (continue, stop), never both: if both bounds hold, the gain is compared with the margin. NaN: neither."""
    continues = interval.low > rule.margin - rule.half_zone
    stops = interval.high < rule.margin + rule.half_zone
    above = gain > rule.margin
    return continues & (~stops | above), stops & (~continues | ~above)


def seeds_at_last_look(half_width: Array, seeds: Array, rule: Rule) -> Array:
    """Return S₂ = clip(⌈S·(h/w)²⌉, 4, 8), the total number of seeds; 8 if the half-width is unknown."""
    needed = np.ceil(np.nan_to_num(seeds * (half_width / rule.half_zone) ** 2, nan=MAX_SEEDS, posinf=MAX_SEEDS))
    return np.clip(needed, MIN_SEEDS_AT_LAST_LOOK, MAX_SEEDS)


def needs_more_items(split: VarianceSplit, rule: Rule) -> NDArray[np.bool_]:
    """Return whether t·√B alone exceeds the half-zone; then no number of seeds can settle it.

    t is the last look's with the items' degrees of freedom, the limit for many seeds.
    """
    t_continue, t_stop = t_quantiles(split.item_df, rule, LAST_LOOK)
    return np.asarray((t_continue + t_stop) / 2 * np.sqrt(split.item_part) > rule.half_zone)
