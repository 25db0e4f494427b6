"""Compare two sides, paired by run and item: difference, interval, p, Holm's adjustment."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from qlora_exp.analysis.comparable import answering_scores, base_model_scores, finite_score
from qlora_exp.analysis.variance import Array, split_variance
from qlora_exp.records.types import RunRecord, Scores

INTERVAL = 0.95
"""Level of the two-sided intervals."""
MIN_SEEDS = 2
"""With fewer, the variation from seed to seed is unknown."""
LOWER_BETTER_METRICS = ("loss_per_item", "loss", "bits_per_byte", "forgetting")

ItemScores = Callable[[RunRecord, str, str], Mapping[str, float] | None]
"""(run, moment, score) → the score of each test item, scaled so that their mean is the run's; ``None`` if there are
none. Moments: ``before``, ``after``, ``few_shot_DRAW``; scores: ``loss_per_item``, ``bits_per_byte``, ``accuracy``,
``exact_match``."""


class GroupScores(dict[str, float]):
    """Group → mean score of its items, where the task has a group column: a group counts as one item."""


@dataclass(frozen=True)
class Side:
    """Runs at one ``moment``: ``before`` (the base model, which has no seed), ``few_shot`` (the base model with worked
    examples, whose draws take the place of seeds) or ``after`` (the tuned model)."""

    runs: tuple[RunRecord, ...]
    moment: str


@dataclass(frozen=True)
class Difference:
    """How much better the first side is; ``low`` and ``high``: its two-sided 95 % interval. ``None`` is unknown."""

    value: float
    low: float | None
    high: float | None
    seeds: int
    over: str
    """What the interval is over, e.g. ``3 seeds and 300 items``."""
    p: float | None = None
    """Two-sided p-value of no difference."""
    se: float | None = None
    df: float | None = None
    item_variance: float = 0.0
    """The items' part of se², which more seeds leave as it is."""
    item_df: float = math.inf

    def __str__(self) -> str:
        """Return e.g. ``+0.21 (95 % CI +0.18 to +0.24, 3 seeds and 300 items)``."""
        if self.low is None or self.high is None:
            return f"{self.value:+.3g} (no interval: {self.over})"
        return f"{self.value:+.3g} (95 % CI {self.low:+.3g} to {self.high:+.3g}, {self.over})"

    def upper(self, alpha: float) -> float | None:
        """Return the one-sided upper bound at error rate ``alpha``; ``None`` if it is unknown."""
        if self.se is None or self.df is None or self.seeds < MIN_SEEDS:
            return None
        return self.value + float(stats.t.isf(alpha, self.df)) * self.se

    def lower(self, alpha: float) -> float | None:
        """Return the one-sided lower bound at error rate ``alpha``; ``None`` if it is unknown."""
        upper = self.upper(alpha)
        return None if upper is None else 2 * self.value - upper

    def half_width_with(self, seeds: int) -> float | None:
        """Return the expected half-width of the interval with this many seeds; ``None`` if the noise is unknown."""
        if self.se is None or self.seeds < MIN_SEEDS or seeds < MIN_SEEDS:
            return None
        seed_part = max(0.0, self.se**2 - self.item_variance) * self.seeds / seeds
        variance = seed_part + self.item_variance
        spread = seed_part**2 / (seeds - 1) + self.item_variance**2 / self.item_df
        df = variance**2 / spread if spread > 0 else seeds - 1.0
        return float(stats.t.ppf((1 + INTERVAL) / 2, df)) * math.sqrt(variance)


def difference(first: Side, second: Side, score: str, items: ItemScores | None) -> Difference | None:
    """Return the difference over the shared seeds with finite scores; ``None`` if there is no such seed.

    The interval is over seeds and items, or over seeds alone if per-item values are missing or belong to other items.
    """
    pairs = _scored_pairs(first, second, score)
    if not pairs:
        return None
    moments = {first.moment, second.moment}
    unit = "seed" if "after" in moments else "draw" if "few_shot" in moments else "model"
    over = f"{len(pairs)} {unit}" + ("" if len(pairs) == 1 else "s")
    gains, of_items = _gains(pairs, score, items)
    return interval(gains, over + of_items, trained="after" in moments)


def stratified_difference(
    strata: Sequence[tuple[Sequence[RunRecord], Sequence[RunRecord]]], score: str, items: ItemScores | None
) -> Difference | None:
    """Return how much better the tuned first sides are than the second ones, as the mean over ``strata``.

    The two sides of a stratum differ in one setting only. If all strata share at least two seeds, these seeds are the
    rows: what a seed does to all strata counts once. Otherwise each seed is a row, with the mean of its pairs: pairs of
    one seed aren't independent.
    """
    paired = [_scored_pairs(Side(tuple(a), "after"), Side(tuple(b), "after"), score) for a, b in strata if a and b]
    by_seed = [{pair[0][0].seed: pair for pair in pairs} for pairs in paired if pairs]
    if not by_seed:
        return None
    shared = [seed for seed in by_seed[0] if all(seed in stratum for stratum in by_seed)]
    if len(by_seed) > 1 and len(shared) < MIN_SEEDS:
        keyed = [(seed, pair) for stratum in by_seed for seed, pair in stratum.items()]
        gains, of_items = _gains([pair for _, pair in keyed], score, items)
        seeds = list(dict.fromkeys(seed for seed, _ in keyed))
        rows = np.array([gains[[own == seed for own, _ in keyed]].mean(axis=0) for seed in seeds])
        return interval(rows, f"{len(seeds)} seed{'s' * (len(seeds) > 1)}{of_items}", trained=True)
    gains, of_items = _gains([stratum[seed] for stratum in by_seed for seed in shared], score, items)
    over = f"{len(shared)} seed{'s' * (len(shared) > 1)}{of_items}"
    by_stratum = gains.reshape(len(by_seed), len(shared), -1)
    return interval(by_stratum.mean(axis=0), over, trained=True)


def gain_difference(
    first: Sequence[RunRecord], second: Sequence[RunRecord], score: str, items: ItemScores | None
) -> Difference | None:
    """Return how much more tuning gains on the first side: the difference after tuning minus the one before."""
    sides = [(Side(tuple(first), moment), Side(tuple(second), moment)) for moment in ("before", "after")]
    before, after = (difference(a, b, score, items) for a, b in sides)
    if before is None or after is None:
        return None
    pairs = [_scored_pairs(a, b, score) for a, b in sides]
    gains, of_items = _gains([*pairs[0], *pairs[1]], score, items)
    if of_items:
        return interval(gains[len(pairs[0]) :] - gains[: len(pairs[0])], after.over, trained=True)
    low, high = (None if bound is None else bound - before.value for bound in (after.low, after.high))
    # The difference before tuning counts as exact: its uncertainty is over items, whose values are missing here.
    return replace(after, value=after.value - before.value, low=low, high=high, p=None)


def interval(values: Array, over: str, trained: bool) -> Difference:
    """Return the mean of (rows, items) with its 95 % interval: over both, over the items of a single row, or none.

    Args:
        trained: a row is a seed of a training. With a single one the interval is over its items alone, and there is no
            p, because the variation from seed to seed is unknown.
    """
    rows, items = values.shape
    value = float(values.mean())
    if rows > 1:
        # NaN: no mean square is pooled over other ranks, so the seeds' part comes from these rows alone.
        split = split_variance(values, np.array(np.nan), np.array(rows - 1.0))
        se, df, item_variance = math.sqrt(float(split.variance)), float(split.df), float(split.item_part)
    elif items > 1:
        se, df = float(values.std(ddof=1)) / math.sqrt(items), items - 1.0
        item_variance, over = se**2, f"{over.partition(' and ')[2] or f'{items} items'} alone"
    else:
        return Difference(value, None, None, rows, over)
    half = float(stats.t.ppf((1 + INTERVAL) / 2, df)) * se
    if trained and rows < MIN_SEEDS:
        p = None
    elif se == 0:
        p = 1.0 if value == 0 else 0.0
    else:
        p = float(2 * stats.t.sf(abs(value) / se, df))
    item_df = items - 1.0 if items > 1 else math.inf
    return Difference(value, value - half, value + half, rows, over, p, se, df, item_variance, item_df)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return adjusted p-values in the same order (Holm 1979).

    The k-th smallest of m is multiplied by m − k + 1, and is never less than the one before it. ``None`` is unknown;
    such a contrast still counts in m.
    """
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    for smaller, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(p_values) - smaller) * p))
        adjusted[index] = largest
    return adjusted


def scores_at(run: RunRecord, moment: str) -> Scores | None:
    """Return the run's scores at ``moment``, on the test split if the run was scored on it."""
    if moment == "after":
        return answering_scores(run)
    if moment == "before":
        return base_model_scores(run)
    few_shot = next(draw for draw in run.scores.few_shot if f"few_shot_{draw.draw}" == moment)
    return few_shot.test if run.scores.test is not None else few_shot.validation


_Row = tuple[RunRecord, str]
"""A run and its moment, as in :func:`scores_at`."""


def _scored_pairs(first: Side, second: Side, score: str) -> list[tuple[_Row, _Row]]:
    """Pair rows of the same seed or draw, if both have a finite score.

    A side with neither seed nor draw is paired with every row of the other side.
    """
    a, b = _rows(first), _rows(second)
    if None in a and None in b:
        pairs = [(a[None], b[None])]
    elif None in b:
        pairs = [(row, b[None]) for row in a.values()]
    elif None in a:
        pairs = [(a[None], row) for row in b.values()]
    else:
        pairs = [(row, b[key]) for key, row in a.items() if key in b]
    return [pair for pair in pairs if all(_value(row, score) is not None for row in pair)]


def _rows(side: Side) -> dict[int | None, _Row]:
    if side.moment == "after":
        # -1 for a tuned run without a seed: None stands for the base model.
        return {-1 if run.seed is None else run.seed: (run, "after") for run in side.runs}
    run = side.runs[0]
    if side.moment == "before":
        return {None: (run, "before")}
    return {few_shot.draw: (run, f"few_shot_{few_shot.draw}") for few_shot in run.scores.few_shot}


def _value(row: _Row, score: str) -> float | None:
    run, moment = row
    if score == "forgetting":
        return finite_score(run.scores.forgetting, "difference")
    return finite_score(scores_at(run, moment), score)


def _gains(pairs: Sequence[tuple[_Row, _Row]], score: str, items: ItemScores | None) -> tuple[Array, str]:
    """Return how much better the first sides are, (rows, items), and e.g. `` and 300 items``.

    (rows, 1) and no text if per-item values are missing or of other items.
    """
    values = [[(items(*row, score) if items is not None else None) or {} for row in pair] for pair in pairs]
    names = values[0][0].keys()
    if names and all(side.keys() == names for pair in values for side in pair):
        gains = _sign(score) * np.array([[a[name] - b[name] for name in names] for a, b in values], dtype=float)
        if np.isfinite(gains).all():
            grouped = isinstance(values[0][0], GroupScores)
            return gains, f" and {len(names)} {'groups of items' if grouped else 'items'}"
    scores = np.array([[_value(row, score) for row in pair] for pair in pairs], dtype=float)
    return _sign(score) * (scores[:, :1] - scores[:, 1:]), ""


def _sign(score: str) -> float:
    """Return the factor after which a higher value is better."""
    return -1.0 if score in LOWER_BETTER_METRICS else 1.0
