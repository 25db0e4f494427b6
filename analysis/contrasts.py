"""One side of a comparison against another, run by run and item by item: difference, interval, p, Holm's adjustment."""

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
MIN_SEEDS = 2
"""Below, nothing tells what another seed would have trained."""
LOWER_BETTER_METRICS = ("bits_per_byte", "forgetting")

ItemScores = Callable[[RunRecord, str, str], Mapping[str, float] | None]
"""(run, moment, score) → the score of each test item, scaled so that their mean is the run's; ``None`` where there are
none. Moments: ``before``, ``after``, ``few_shot_DRAW``; scores: ``bits_per_byte``, ``accuracy``, ``exact_match``."""


@dataclass(frozen=True)
class Side:
    """``moment``: ``before`` (the untouched model, which has no seed), ``few_shot`` (with worked examples: its draws
    take the place of seeds) or ``after``."""

    runs: tuple[RunRecord, ...]
    moment: str


@dataclass(frozen=True)
class Difference:
    """By how much the first side is better; low and high: 90 %, two-sided; ``None`` where unknown."""

    value: float
    low: float | None
    high: float | None
    seeds: int
    over: str
    """What the interval is over, in words."""
    p: float | None = None
    """Two-sided, of no difference."""


def difference(first: Side, second: Side, score: str, items: ItemScores | None) -> Difference | None:
    """``None`` where the sides share no seed of which both have a finite score; other seeds are left out. Without
    per-item values, or where they are of other items, the interval is over seeds alone."""
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
    """How much more tuning gains on the first side: the difference after, less the one before."""
    sides = [(Side(tuple(first), moment), Side(tuple(second), moment)) for moment in ("before", "after")]
    before, after = (difference(a, b, score, items) for a, b in sides)
    if before is None or after is None:
        return None
    shared = [scored_pairs(a, b, score) for a, b in sides]
    cells = _items([*shared[0], *shared[1]], score, items)
    if cells is not None:
        return interval(cells[len(shared[0]) :] - cells[: len(shared[0])], after.over, trained=True)
    low, high = (None if bound is None else bound - before.value for bound in (after.low, after.high))
    # What was before is taken as known: its own uncertainty is the items', and they are not at hand.
    return replace(after, value=after.value - before.value, low=low, high=high, p=None)


def interval(values: Array, over: str, trained: bool) -> Difference:
    """The mean of (rows, items) with its 90 % interval: over both, over the items of a single row, or none.

    Args:
        trained: a row is a seed of a training; with a single one the interval is over its items alone, and there is no
            p: nothing tells what another seed would have trained.
    """
    rows, items = values.shape
    value = float(values.mean())
    if rows > 1:
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
    """Adjusted p, in the same order: the k-th smallest of m times m − k + 1, never less than a smaller one's (Holm
    1979). ``None`` where p is unknown; such a contrast still counts in m."""
    adjusted: list[float | None] = [None] * len(p_values)
    least = 0.0
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    for before, (p, index) in enumerate(known):
        least = max(least, min(1.0, (len(p_values) - before) * p))
        adjusted[index] = least
    return adjusted


def contrast_sentence(found: Difference | None) -> str:
    if found is None:
        return "an unknown amount"
    if found.low is None or found.high is None:
        return f"{found.value:+.3g} (no interval: {found.over})"
    return f"{found.value:+.3g} [90 % {found.low:+.3g}, {found.high:+.3g}; {found.over}]"


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


_Row = tuple[RunRecord, str]


def scored_pairs(first: Side, second: Side, score: str) -> list[tuple[_Row, _Row]]:
    """The pairs of which both have a finite score."""
    return [pair for pair in _pairs(first, second) if None not in (_value(pair[0], score), _value(pair[1], score))]


def _pairs(first: Side, second: Side) -> list[tuple[_Row, _Row]]:
    """Rows of the same seed or draw; what has neither stands beside each row of the other side."""
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
        # A run without a seed is one of its own, not the untouched model.
        return {-1 if run.seed is None else run.seed: (run, "after") for run in side.runs}
    run = side.runs[0]
    if side.moment == "before":
        return {None: (run, "before")}
    return {shown.draw: (run, f"few_shot_{shown.draw}") for shown in run.scores.few_shot}


def _rows(first: Side, second: Side) -> str:
    moments = {first.moment, second.moment}
    return "seed" if "after" in moments else "draw" if "few_shot" in moments else "model"


def _items(pairs: Sequence[tuple[_Row, _Row]], score: str, items: ItemScores | None) -> Array | None:
    """(rows, items) by which the first is better; ``None`` where values are missing or of other items."""
    if items is None or not pairs:
        return None
    sides = [[items(*row, score) for row in pair] for pair in pairs]
    names = sides[0][0]
    rows = []
    for own, other in sides:
        if not names or not own or not other or not own.keys() == other.keys() == names.keys():
            return None
        rows.append([_minus(score, own[item], other[item]) for item in names])
    found = np.array(rows, dtype=float)
    return found if np.isfinite(found).all() else None


def _value(row: _Row, score: str) -> float | None:
    run, moment = row
    if score == "forgetting":
        return finite(run.scores.forgetting.difference) if run.scores.forgetting else None
    return finite(getattr(scores, score)) if (scores := scores_at(run, moment)) is not None else None


def scores_at(run: RunRecord, moment: str) -> Scores | None:
    """On the split that answers."""
    if moment == "after":
        return answering_scores(run)
    if moment == "before":
        return base_model_scores(run)
    shown = next(one for one in run.scores.few_shot if f"few_shot_{one.draw}" == moment)
    return shown.test if run.scores.test is not None else shown.validation


def _minus(score: str, first: float, second: float) -> float:
    return second - first if score in LOWER_BETTER_METRICS else first - second


def _two_sided(value: float, se: float, df: float) -> float:
    if se == 0:
        return 1.0 if value == 0 else 0.0
    return float(2 * stats.t.sf(abs(value) / se, df))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
