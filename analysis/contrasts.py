"""Compare two sides, paired by run and item: difference, interval, p, Holm's adjustment."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from qlora_exp.analysis.comparable import answering_scores, base_model_scores
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


def difference(first: Side, second: Side, score: str, items: ItemScores | None) -> Difference | None:
    """Return the difference over the shared seeds with finite scores; ``None`` if there is no such seed.

    The interval is over seeds and items, or over seeds alone if per-item values are missing or belong to other items.
    """
    pairs = scored_pairs(first, second, score)
    if not pairs:
        return None
    trained = "after" in (first.moment, second.moment)
    cells = _items(pairs, score, items)
    if cells is not None:
        return interval(cells, f"{_count(len(pairs), _rows(first, second))} and {cells.shape[1]} items", trained)
    values = [(_value(a, score), _value(b, score)) for a, b in pairs]
    known = [_minus(score, a, b) for a, b in values if a is not None and b is not None]
    return interval(np.array(known)[:, None], _count(len(known), _rows(first, second)), trained)


def gain_difference(
    first: Sequence[RunRecord], second: Sequence[RunRecord], score: str, items: ItemScores | None
) -> Difference | None:
    """Return how much more tuning gains on the first side: the difference after tuning minus the one before."""
    sides = [(Side(tuple(first), moment), Side(tuple(second), moment)) for moment in ("before", "after")]
    before, after = (difference(a, b, score, items) for a, b in sides)
    if before is None or after is None:
        return None
    shared = [scored_pairs(a, b, score) for a, b in sides]
    cells = _items([*shared[0], *shared[1]], score, items)
    if cells is not None:
        return interval(cells[len(shared[0]) :] - cells[: len(shared[0])], after.over, trained=True)
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
    p = None if trained and rows < MIN_SEEDS else _two_sided(value, se, df)
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


def contrast_sentence(contrast: Difference | None) -> str:
    """Return e.g. ``+0.21 (90 % CI +0.18 to +0.24, 3 seeds and 300 items)``."""
    if contrast is None:
        return "unknown"
    if contrast.low is None or contrast.high is None:
        return f"{contrast.value:+.3g} (no interval: {contrast.over})"
    return f"{contrast.value:+.3g} (90 % CI {contrast.low:+.3g} to {contrast.high:+.3g}, {contrast.over})"


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


_Row = tuple[RunRecord, str]


def scored_pairs(first: Side, second: Side, score: str) -> list[tuple[_Row, _Row]]:
    """Return the pairs in which both sides have a finite score."""
    return [pair for pair in _pairs(first, second) if None not in (_value(pair[0], score), _value(pair[1], score))]


def _pairs(first: Side, second: Side) -> list[tuple[_Row, _Row]]:
    """Pair rows of the same seed or draw; a side with neither is paired with every row of the other side."""
    rows = [_by_key(side) for side in (first, second)]
    alone = [by_key.get(None) for by_key in rows]
    if alone[0] is not None and alone[1] is not None:
        return [(alone[0], alone[1])]
    if alone[1] is not None:
        return [(row, alone[1]) for row in rows[0].values()]
    if alone[0] is not None:
        return [(alone[0], row) for row in rows[1].values()]
    return [(row, rows[1][key]) for key, row in rows[0].items() if key in rows[1]]


def _by_key(side: Side) -> dict[int | None, _Row]:
    if side.moment == "after":
        # -1 for a tuned run without a seed: None stands for the base model.
        return {-1 if run.seed is None else run.seed: (run, "after") for run in side.runs}
    run = side.runs[0]
    if side.moment == "before":
        return {None: (run, "before")}
    return {few_shot.draw: (run, f"few_shot_{few_shot.draw}") for few_shot in run.scores.few_shot}


def _rows(first: Side, second: Side) -> str:
    moments = {first.moment, second.moment}
    return "seed" if "after" in moments else "draw" if "few_shot" in moments else "model"


def _items(pairs: Sequence[tuple[_Row, _Row]], score: str, items: ItemScores | None) -> Array | None:
    """Return how much better the first side is, (rows, items); ``None`` if values are missing or of other items."""
    if items is None or not pairs:
        return None
    sides = [[items(*row, score) for row in pair] for pair in pairs]
    names = sides[0][0]
    rows = []
    for first_items, second_items in sides:
        if (
            not names
            or not first_items
            or not second_items
            or not first_items.keys() == second_items.keys() == names.keys()
        ):
            return None
        rows.append([_minus(score, first_items[item], second_items[item]) for item in names])
    differences = np.array(rows, dtype=float)
    return differences if np.isfinite(differences).all() else None


def _value(row: _Row, score: str) -> float | None:
    run, moment = row
    if score == "forgetting":
        return finite(run.scores.forgetting.difference) if run.scores.forgetting else None
    return finite(getattr(scores, score)) if (scores := scores_at(run, moment)) is not None else None


def scores_at(run: RunRecord, moment: str) -> Scores | None:
    """Return the run's scores at ``moment``, on the test split if the run was scored on it."""
    if moment == "after":
        return answering_scores(run)
    if moment == "before":
        return base_model_scores(run)
    few_shot = next(draw for draw in run.scores.few_shot if f"few_shot_{draw.draw}" == moment)
    return few_shot.test if run.scores.test is not None else few_shot.validation


def _minus(score: str, first: float, second: float) -> float:
    return second - first if score in LOWER_BETTER_METRICS else first - second


def _two_sided(value: float, se: float, df: float) -> float:
    if se == 0:
        return 1.0 if value == 0 else 0.0
    return float(2 * stats.t.sf(abs(value) / se, df))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
