"""The decision rule of the rank question: margin, looks, error rates, bounds, verdict (docs/statistics.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from scipy import special

from qlora_exp.analysis.variance import Array, VarianceSplit, with_lost_runs
from qlora_exp.errors import AnalysisError

WRONG_CONTINUE, WRONG_STOP = 1 / 30, 1 / 60
"""One-sided error rates over all looks at one comparison. Together they leave a two-sided interval of 95 %."""
MIN_SEEDS, MAX_SEEDS = 2, 64
"""Range of the seeds that a plan may have."""
FUTILE = 0.1
"""A comparison ends as inconclusive if the probability that the last look decides it is below this."""


class StepVerdict(StrEnum):
    CONTINUE = "continue"
    STOP = "stop"
    INCONCLUSIVE = "inconclusive"
    BUY = "buy"
    """Undecided so far: the next look needs one more seed."""


@dataclass(frozen=True)
class Rule:
    """What is fixed beforehand, for one doubling. Both are in the units of the score, and above 0."""

    margin: float
    """The smallest gain of a doubling that is worth its cost."""
    half_zone: float
    """For a true gain within margin ± half_zone, either answer counts as right."""

    def over(self, doublings: float) -> Rule:
        """Return the rule for a step of several doublings: each of them has to gain the margin."""
        return Rule(self.margin * doublings, self.half_zone * doublings)


def make_rule(margin: float, half_zone: float | None = None) -> Rule:
    """Return a checked rule; ``half_zone`` defaults to margin / 2.

    Raises:
        AnalysisError: a margin that isn't above 0, or a half-zone outside (0, margin].
    """
    if not (math.isfinite(margin) and margin > 0):
        raise AnalysisError(f"invalid margin {margin:g}", "margin", "use a number above 0, in the score's units")
    zone = margin / 2 if half_zone is None else half_zone
    if not 0 < zone <= margin:
        raise AnalysisError(f"invalid half-zone {zone:g} for margin {margin:g}", "half-zone", "above 0, ≤ margin")
    return Rule(margin, zone)


@dataclass(frozen=True)
class SeedPlan:
    """Seeds per rank: ``first`` at the first look at a comparison, one more at each next look, ``most`` at the last.

    Raises:
        AnalysisError: unless 2 ≤ first ≤ most ≤ 64.
    """

    first: int = 3
    most: int = 8

    def __post_init__(self) -> None:
        if not MIN_SEEDS <= self.first <= self.most <= MAX_SEEDS:
            raise AnalysisError(
                f"a plan of {self.first} to {self.most} seeds",
                "seeds",
                f"{MIN_SEEDS} ≤ first look ≤ last look ≤ {MAX_SEEDS}",
            )

    def share(self, seeds: int) -> float:
        """Return which share of an error rate the look at ``seeds`` seeds may use, as its nominal rate.

        It rises with the seeds, because a small sample decides little. The denominator is fitted to simulated t
        statistics (tests/analysis/test_rank.py): all looks together stay within the error rate, for every plan.
        """
        before = 1 - self.first / self.most
        return seeds / self.most / (1 + 2.5 * before + before**3)


ONE_LOOK = 1.0
"""The share of a single look, at results that were all there before the first decision."""


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


def t_quantiles(df: Array, share: float | Array = ONE_LOOK) -> tuple[Array, Array]:
    """Return (t of *continue*, t of *stop*) of a look with this share of the error rates.

    A wrong *continue* needs a first false step that is rejected (a fixed sequence of tests), so its rate needs no
    division. A wrong *stop* may happen at several steps. Its rate is halved, not divided by their number: returns that
    diminish can't all lie at margin + half-zone.
    """
    # The same as stats.t.isf without its argument checks: a replay calls this a hundred thousand times.
    return -special.stdtrit(df, WRONG_CONTINUE * share), -special.stdtrit(df, WRONG_STOP * share)


def bounds(for_low: VarianceSplit, for_high: VarianceSplit, share: float | Array = ONE_LOOK) -> MarginBounds:
    """Return the bounds of one look. The two splits differ if runs were lost: each counts them against its claim."""
    low_t, high_t = t_quantiles(for_low.df, share)[0], t_quantiles(for_high.df, share)[1]
    low, high = for_low.gain - low_t * np.sqrt(for_low.variance), for_high.gain + high_t * np.sqrt(for_high.variance)
    return MarginBounds(low, high, np.sqrt(for_high.variance), for_high.df)


def lost_run_splits(
    split: VarianceSplit,
    seed_means: Array,
    larger_lost: NDArray[np.bool_],
    smaller_lost: NDArray[np.bool_],
    rule: Rule,
    mean_square: Array,
    df: Array,
) -> tuple[VarianceSplit, VarianceSplit]:
    """Return the splits for ``low`` and ``high``: each counts the lost runs against its claim.

    A seed whose run was lost at the larger rank counts as margin − half-zone, the largest gain at which *continue* is
    wrong, or as the smallest gain of the other seeds if that is less. A seed whose run was lost at the smaller rank
    counts as margin + half-zone, or as the largest gain if that is more. Runs that diverge are the worst ones: leaving
    them out would flatter the rank that lost them.

    Args:
        seed_means: mean differences by seed, (..., seeds).
        larger_lost, smaller_lost: the seeds whose run was lost at that rank and not at the other, (..., seeds).
        mean_square, df: as for :func:`~qlora_exp.analysis.variance.split_variance`.
    """
    splits = []
    for lost, value in (
        (larger_lost, np.fmin(rule.margin - rule.half_zone, np.fmin.reduce(seed_means, axis=-1))),
        (smaller_lost, np.fmax(rule.margin + rule.half_zone, np.fmax.reduce(seed_means, axis=-1))),
    ):
        counted = with_lost_runs(split, seed_means, lost, value, mean_square, df) if lost.any() else split
        splits.append(counted)
    return splits[0], splits[1]


def verdicts(gain: Array, interval: MarginBounds, rule: Rule) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return (continue, stop), never both: if both bounds hold, the gain is compared with the margin. NaN: neither."""
    continues = interval.low > rule.margin - rule.half_zone
    stops = interval.high < rule.margin + rule.half_zone
    above = gain > rule.margin
    return continues & (~stops | above), stops & (~continues | ~above)


def decision_probability(split: VarianceSplit, rule: Rule, seeds: float, share: float) -> Array:
    """Return the predictive probability that a look at ``seeds`` seeds decides, given the seeds so far, (...).

    The gain at that look is normal around today's, with the variance A·(1 − S/seeds) that the seeds to come leave open
    (Spiegelhalter, Freedman and Blackburn, *Monitoring clinical trials: conditional or predictive power?*, 1986).
    Unknown noise gives 1: nothing shows that the comparison is hopeless.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = np.minimum(1.0, split.seeds / seeds)
        seed_part = split.seed_part * kept
        later = VarianceSplit(
            split.gain, seed_part, split.item_part, split.seed_df + np.maximum(0.0, seeds - split.seeds), split.item_df,
            np.maximum(split.seeds, seeds),
        )  # fmt: skip
        continue_t, stop_t = t_quantiles(later.df, share)
        se = np.sqrt(later.variance)
        stops_below = rule.margin + rule.half_zone - stop_t * se
        continues_above = rule.margin - rule.half_zone + continue_t * se
        open_sd = np.sqrt(split.seed_part * (1 - kept))
        undecided = special.ndtr((continues_above - split.gain) / open_sd) - special.ndtr(
            (stops_below - split.gain) / open_sd
        )
        settled = (split.gain < stops_below) | (split.gain > continues_above)
    probability = np.where(open_sd > 0, 1 - np.maximum(undecided, 0.0), settled.astype(float))
    return np.asarray(np.where(np.isfinite(split.variance), probability, 1.0))
