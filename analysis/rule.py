"""The rule of the rank question as arithmetic: margin, error rates, bounds, verdict. docs/statistics.md explains it."""

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
"""One-sided, by look. Two looks at one doubling together stay below 5 %."""
FIRST_SEEDS = 3
LEAST_SEEDS_BOUGHT, MOST_SEEDS = 4, 8
"""Seeds in all after the purchase."""


class StepVerdict(StrEnum):
    CONTINUE = "continue"
    STOP = "stop"
    INCONCLUSIVE = "inconclusive"
    BUY = "buy"
    """Neither yet, and the one purchase is still to be made."""


@dataclass(frozen=True)
class Rule:
    """What is fixed beforehand. ``margin`` and ``half_zone`` in the units of the score, both above 0."""

    margin: float
    """The least gain of a doubling that is worth paying for."""
    half_zone: float
    """Gains within margin ± half_zone may be called either way."""
    doublings: int
    """The largest number of doublings that the ladder can make."""


def make_rule(margin: float, doublings: int, half_zone: float | None = None) -> Rule:
    """A checked rule; ``half_zone`` is margin / 2 where not given.

    Raises:
        AnalysisError: a margin that isn't above 0, a half-zone outside (0, margin], or no doubling.
    """
    if not (math.isfinite(margin) and margin > 0):
        raise AnalysisError(
            f"a margin of {margin:g} can't be decided against", "margin", "a number above 0, in the score's units"
        )
    zone = margin / 2 if half_zone is None else half_zone
    if not 0 < zone <= margin:
        raise AnalysisError(f"a half-zone of {zone:g} doesn't fit margin {margin:g}", "half-zone", "above 0, ≤ margin")
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
    """(t of *continue*, t of *stop*). A wrong stop can happen at any doubling, so its alpha is divided among them; a
    wrong continue needs the first true null to be rejected (a fixed sequence), so its alpha is not."""
    alpha = ALPHA[look]
    # What stats.t.isf computes, without its checks of every argument: a replay asks a hundred thousand times.
    return -special.stdtrit(df, alpha), -special.stdtrit(df, alpha / rule.doublings)


def bounds(split: VarianceSplit, rule: Rule, look: int) -> MarginBounds:
    se, df = np.sqrt(split.variance), split.df
    t_continue, t_stop = t_quantiles(df, rule, look)
    return MarginBounds(split.gain - t_continue * se, split.gain + t_stop * se, se, df)


def verdicts(gain: Array, found: MarginBounds, rule: Rule) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(continue, stop), never both: where both bounds hold, the gain is compared with the margin. NaN is neither."""
    enough = found.low > rule.margin - rule.half_zone
    little = found.high < rule.margin + rule.half_zone
    above = gain > rule.margin
    return enough & (~little | above), little & (~enough | ~above)


def seeds_to_buy(half_width: Array, seeds: Array, rule: Rule) -> Array:
    """S₂ = clip(⌈S·(h/w)²⌉, 4, 8), seeds in all; 8 where the half-width isn't known."""
    wanted = np.ceil(np.nan_to_num(seeds * (half_width / rule.half_zone) ** 2, nan=MOST_SEEDS, posinf=MOST_SEEDS))
    return np.clip(wanted, LEAST_SEEDS_BOUGHT, MOST_SEEDS)


def needs_more_items(split: VarianceSplit, rule: Rule) -> NDArray[np.bool_]:
    """Whether t·√B alone exceeds the half-zone: then no number of seeds can settle it.

    t is that of the last look with the items' own degrees of freedom: what is left when seeds are plenty.
    """
    t_continue, t_stop = t_quantiles(split.item_df, rule, LAST_LOOK)
    return np.asarray((t_continue + t_stop) / 2 * np.sqrt(split.item_part) > rule.half_zone)
