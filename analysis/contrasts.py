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

INTERVAL = 0.90
"""Level of the two-sided intervals."""
MIN_SEEDS = 2
"""With fewer, the variation from seed to seed is unknown."""
LOWER_BETTER_METRICS = ("bits_per_byte", "forgetting")

ItemScores = Callable[[RunRecord, str, str], Mapping[str, float] | None]
"""(run, moment, score) → the score of each test item, scaled so that their mean is the run's; ``None`` if there are
none. Moments: ``before``, ``after``, ``few_shot_DRAW``; scores: ``bits_per_byte``, ``accuracy``, ``exact_match``."""


@dataclass(frozen=True)
class Side:
    """Runs at one ``moment``: ``before`` (the base model, which has no seed), ``few_shot`` (the base model with worked
    examples, whose draws take the place of seeds) or ``after`` (the tuned model)."""

    runs: tuple[RunRecord, ...]
    moment: str


@dataclass(frozen=True)
class Difference:
    """How much better the first side is; ``low`` and ``high``: its two-sided 90 % interval. ``None`` is unknown."""

    value: float
    low: float | None
    high: float | None
    seeds: int
    over: str
    """What the interval is over, e.g. ``3 seeds and 300 items``."""
    p: float | None = None
    """Two-sided p-value of no difference."""

    def __str__(self) -> str:
        """Return e.g. ``+0.21 (90 % CI +0.18 to +0.24, 3 seeds and 300 items)``."""
        if self.low is None or self.high is None:
            return f"{self.value:+.3g} (no interval: {self.over})"
        return f"{self.value:+.3g} (90 % CI {self.low:+.3g} to {self.high:+.3g}, {self.over})"


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
    gains = _item_gains(pairs, score, items)
    if gains is not None:
        over += f" and {gains.shape[1]} items"
    else:
        values = np.array([[_value(row, score) for row in pair] for pair in pairs], dtype=float)
        gains = _sign(score) * (values[:, :1] - values[:, 1:])
    return interval(gains, over, trained="after" in moments)


def gain_difference(
    first: Sequence[RunRecord], second: Sequence[RunRecord], score: str, items: ItemScores | None
) -> Difference | None:
    """Return how much more tuning gains on the first side: the difference after tuning minus the one before."""
    sides = [(Side(tuple(first), moment), Side(tuple(second), moment)) for moment in ("before", "after")]
    before, after = (difference(a, b, score, items) for a, b in sides)
    if before is None or after is None:
        return None
    pairs = [_scored_pairs(a, b, score) for a, b in sides]
    gains = _item_gains([*pairs[0], *pairs[1]], score, items)
    if gains is not None:
        return interval(gains[len(pairs[0]) :] - gains[: len(pairs[0])], after.over, trained=True)
    low, high = (None if bound is None else bound - before.value for bound in (after.low, after.high))
    # The difference before tuning counts as exact: its uncertainty is over items, whose values are missing here.
    return replace(after, value=after.value - before.value, low=low, high=high, p=None)


def interval(values: Array, over: str, trained: bool) -> Difference:
    """Return the mean of (rows, items) with its 90 % interval: over both, over the items of a single row, or none.

    Args:
        trained: a row is a seed of a training. With a single one the interval is over its items alone, and there is no
            p, because the variation from seed to seed is unknown.
    """
    rows, items = values.shape
    value = float(values.mean())
    if rows > 1:
        # NaN: no mean square is pooled over other ranks, so the seeds' part comes from these rows alone.
        split = split_variance(values, np.array(np.nan), np.array(rows - 1.0))
        se, df = math.sqrt(float(split.variance)), float(split.df)
    elif items > 1:
        se, df, over = float(values.std(ddof=1)) / math.sqrt(items), items - 1.0, f"{items} items alone"
    else:
        return Difference(value, None, None, rows, over)
    half = float(stats.t.ppf((1 + INTERVAL) / 2, df)) * se
    if trained and rows < MIN_SEEDS:
        p = None
    elif se == 0:
        p = 1.0 if value == 0 else 0.0
    else:
        p = float(2 * stats.t.sf(abs(value) / se, df))
    return Difference(value, value - half, value + half, rows, over, p)


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


def _item_gains(pairs: Sequence[tuple[_Row, _Row]], score: str, items: ItemScores | None) -> Array | None:
    """Return how much better the first side is, (rows, items); ``None`` if values are missing or of other items."""
    if items is None:
        return None
    values = [[items(*row, score) or {} for row in pair] for pair in pairs]
    names = values[0][0].keys()
    if not names or any(side.keys() != names for pair in values for side in pair):
        return None
    gains = _sign(score) * np.array([[a[name] - b[name] for name in names] for a, b in values], dtype=float)
    return gains if np.isfinite(gains).all() else None


def _sign(score: str) -> float:
    """Return the factor after which a higher value is better."""
    return -1.0 if score in LOWER_BETTER_METRICS else 1.0
