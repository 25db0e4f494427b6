"""The rule of docs/statistics.md once more, written from that page alone: slow, plain, with nothing of the product."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats


def pooled_mean_square(means: np.ndarray) -> tuple[float, int]:
    """Residual mean square of rank + seed by ordinary least squares; ``means``: (ranks, seeds), NaN for no run."""
    ranks, seeds = means.shape
    rows = [(r, s) for r in range(ranks) for s in range(seeds) if not math.isnan(means[r, s])]
    design = np.zeros((len(rows), ranks + seeds))
    for number, (r, s) in enumerate(rows):
        design[number, r] = design[number, ranks + s] = 1
    values = np.array([means[r, s] for r, s in rows])
    fitted, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    df = len(rows) - int(rank)
    return (float(((values - design @ fitted) ** 2).sum()) / df if df > 0 else math.nan), df


def interval(
    smaller: np.ndarray, larger: np.ndarray, means: np.ndarray, share: float, requested: int, margin: float, zone: float
) -> dict[str, float]:
    """Gain, bounds and parts of one comparison; losses (seeds, items), ``means``: all runs of the ladder so far."""
    kept = [s for s in range(len(smaller)) if not (np.isnan(smaller[s]).any() or np.isnan(larger[s]).any())]
    d = np.array([smaller[s] - larger[s] for s in kept])
    seeds, items = d.shape
    per_seed = [float(row.mean()) for row in d]
    mean_square, df = pooled_mean_square(means)
    if items > 1:
        by_item = [float(column.mean()) for column in d.T]
        centre = sum(by_item) / items
        ms_item = seeds * sum((x - centre) ** 2 for x in by_item) / (items - 1)
        rest = sum((d[s, i] - per_seed[s] - by_item[i] + centre) ** 2 for s in range(seeds) for i in range(items))
        ms_rest = rest / ((seeds - 1) * (items - 1)) if seeds > 1 else 0.0
        b = max(0.0, ms_item - ms_rest) / (seeds * items)
    else:
        b = 0.0

    def side(extra: list[float]) -> tuple[float, float, float, float]:
        values = per_seed + extra
        own = float(np.var(values, ddof=1)) if len(values) > 1 else math.nan
        if math.isnan(own) and df <= 0:
            return float(np.mean(values)), math.nan, math.nan, math.nan
        use_own = df <= 0 or own > 2 * mean_square * (1 + 1e-9)
        a = (own if use_own else 2 * mean_square) / len(values)
        nu = len(values) - 1 if use_own else df
        freedom = (a + b) ** 2 / (a**2 / nu + (b**2 / (items - 1) if items > 1 else 0.0)) if a + b > 0 else nu
        return float(np.mean(values)), a, math.sqrt(a + b), freedom

    lost_larger = [s for s in range(requested) if np.isnan(larger[s]).all() and not np.isnan(smaller[s]).any()]
    lost_smaller = [s for s in range(requested) if np.isnan(smaller[s]).all() and not np.isnan(larger[s]).any()]
    low_mean, _, low_se, low_df = side([min([margin - zone, *per_seed])] * len(lost_larger))
    high_mean, _, high_se, high_df = side([max([margin + zone, *per_seed])] * len(lost_smaller))
    mean, a, _, _ = side([])
    a_df = side([])[3]
    return {
        "gain": mean,
        "low": low_mean + stats.t.ppf(share / 30, low_df) * low_se,
        "high": high_mean - stats.t.ppf(share / 60, high_df) * high_se,
        "a": a,
        "b": b,
        "seeds": seeds,
        "items": items,
        "df": a_df,
        "seed_df": seed_freedom(per_seed, mean_square, df),
    }


def seed_freedom(per_seed: list[float], mean_square: float, df: int) -> float:
    own = float(np.var(per_seed, ddof=1)) if len(per_seed) > 1 else math.nan
    return len(per_seed) - 1 if df <= 0 or own > 2 * mean_square * (1 + 1e-9) else df


def share_of(seeds: int, first: int, most: int) -> float:
    x = 1 - first / most
    return seeds / most / (1 + 2.5 * x + x**3)


def probability(found: dict[str, float], first: int, most: int, margin: float, zone: float) -> float:
    """Predictive probability that the last look decides."""
    if math.isnan(found["a"]):
        return 1.0
    kept = min(1.0, found["seeds"] / most)
    a, b = found["a"] * kept, found["b"]
    nu = found["seed_df"] + max(0.0, most - found["seeds"])
    df = (a + b) ** 2 / (a**2 / nu + (b**2 / (found["items"] - 1) if found["items"] > 1 else 0.0)) if a + b > 0 else nu
    se, share = math.sqrt(a + b), share_of(most, first, most)
    stops_below = margin + zone - stats.t.isf(share / 60, df) * se
    continues_above = margin - zone + stats.t.isf(share / 30, df) * se
    spread = math.sqrt(found["a"] * (1 - kept))
    if spread == 0:
        return float(found["gain"] < stops_below or found["gain"] > continues_above)
    between = stats.norm.cdf((continues_above - found["gain"]) / spread) - stats.norm.cdf(
        (stops_below - found["gain"]) / spread
    )
    return 1 - max(0.0, float(between))


def ladder(losses: np.ndarray, first: int, most: int, margin: float, zone: float) -> list[tuple[int, int, str]]:
    """Walk a ladder whose runs exist already; losses (ranks, seeds, items). Steps as (from, to, verdict)."""
    ranks = len(losses)
    requested = [0] * ranks
    steps: list[tuple[int, int, str]] = []

    def compare(a: int, b: int) -> str:
        m, w = margin * (b - a), zone * (b - a)
        for look in range(max(first, min(requested[a], requested[b])), most + 1):
            requested[a], requested[b] = max(requested[a], look), max(requested[b], look)
            seen = np.array(
                [[row if s < requested[r] else np.full_like(row, math.nan) for s, row in enumerate(losses[r])]
                 for r in range(ranks) if requested[r]]
            )  # fmt: skip
            order = [r for r in range(ranks) if requested[r]]
            smaller, larger = seen[order.index(a)], seen[order.index(b)]
            if not any(not np.isnan(smaller[s]).any() and not np.isnan(larger[s]).any() for s in range(len(smaller))):
                continue
            found = interval(smaller, larger, seen.mean(axis=-1), share_of(look, first, most), look, m, w)
            goes_on, ends = found["low"] > m - w, found["high"] < m + w
            if goes_on and ends:
                return "continue" if found["gain"] > m else "stop"
            if goes_on or ends:
                return "continue" if goes_on else "stop"
            if look < most and probability(found, first, most, m, w) < 0.1:
                return "inconclusive"
        return "inconclusive"

    r = 0
    while r < ranks - 1:
        if r + 2 < ranks:
            verdict = compare(r, r + 2)
            steps.append((r, r + 2, verdict))
            if verdict == "continue":
                r += 2
                continue
        for smaller in range(r, min(r + 2, ranks - 1)):
            verdict = compare(smaller, smaller + 1)
            steps.append((smaller, smaller + 1, verdict))
            if verdict != "continue":
                return steps
        r += 2
    return steps
