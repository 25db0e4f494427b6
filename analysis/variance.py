"""Split the variance of a difference between two ranks into the seeds' part and the items' part.

Arrays may have leading axes (simulated ladders); NaN marks a missing run. Source: the two-way analysis of variance with
one observation per cell (Searle, Casella and McCulloch, *Variance Components*, 1992), by least squares if cells are
missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class VarianceSplit:
    """The mean difference of two ranks and its variance, each of shape (...). NaN is unknown."""

    gain: Array
    """Mean over seeds and items of loss(smaller rank) − loss(larger rank)."""
    seed_part: Array
    """A in docs/statistics.md, squared units of the loss: falls with more seeds."""
    item_part: Array
    """B in docs/statistics.md: falls with more items. 0 for scores without items."""
    seed_df: Array
    item_df: Array
    """Items − 1; infinite for scores without items."""
    seeds: Array
    """Seeds that both ranks share."""

    @property
    def variance(self) -> Array:
        return self.seed_part + self.item_part

    @property
    def df(self) -> Array:
        """Welch–Satterthwaite degrees of freedom of ``variance``; those of the seeds if it is 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = self.seed_part**2 / self.seed_df + self.item_part**2 / self.item_df
            df: Array = np.where(self.variance > 0, self.variance**2 / spread, self.seed_df)
        return df


def rank_seed_mean_square(cells: Array) -> tuple[Array, Array]:
    """Return MS_rank×seed and its degrees of freedom.

    Args:
        cells: mean loss of each run, (..., ranks, seeds); NaN for a missing run.

    Returns:
        The residual mean square of rank + seed by least squares, and its df, both (...). NaN if df is 0.
    """
    present = ~np.isnan(cells)
    runs_of_seed = np.maximum(present.sum(axis=-2), 1)
    seed_means = np.where(present, cells, 0.0).sum(axis=-2) / runs_of_seed
    centred = np.where(present, cells - seed_means[..., None, :], 0.0)
    weights = present.astype(float)
    # The seeds' effects are eliminated first: the system left to solve is only as large as the number of ranks.
    normal = np.eye(cells.shape[-2]) * weights.sum(axis=-1)[..., None, :]
    normal = normal - np.einsum("...rs,...qs->...rq", weights / runs_of_seed[..., None, :], weights)
    inverse = np.linalg.pinv(normal, rcond=1e-9, hermitian=True)
    effects = np.einsum("...rq,...q->...r", inverse, centred.sum(axis=-1))
    mean_effects = np.einsum("...rs,...r->...s", weights, effects) / runs_of_seed
    residuals = np.where(present, centred - effects[..., None] + mean_effects[..., None, :], 0.0)
    rank = np.linalg.matrix_rank(normal, tol=1e-9, hermitian=True)
    df = (present.sum(axis=(-2, -1)) - present.any(axis=-2).sum(axis=-1) - rank).astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_square = np.where(df > 0, (residuals**2).sum(axis=(-2, -1)) / df, np.nan)
    return mean_square, df


def item_mean_squares(differences: Array) -> tuple[Array, Array]:
    """Return MS_item and MS_item×seed of paired differences.

    Args:
        differences: (..., seeds, items); a missing seed is NaN throughout.

    Returns:
        Both mean squares, (...). MS_item×seed is 0 with a single seed, which can't separate it from MS_item.
    """
    present = ~np.isnan(differences[..., 0])
    seeds, items = present.sum(axis=-1), differences.shape[-1]
    kept = np.where(present[..., None], differences, 0.0)
    item_means = kept.sum(axis=-2) / np.maximum(seeds, 1)[..., None]
    grand_mean = item_means.mean(axis=-1)
    item_effects = item_means - grand_mean[..., None]
    by_item = seeds * (item_effects**2).sum(axis=-1) / (items - 1)
    residuals = kept - kept.mean(axis=-1)[..., None] - item_effects[..., None, :]
    residual_squares = (np.where(present[..., None], residuals, 0.0) ** 2).sum(axis=(-2, -1))
    return by_item, residual_squares / np.maximum((seeds - 1) * (items - 1), 1) * (seeds > 1)


def split_variance(differences: Array, mean_square: Array, df: Array) -> VarianceSplit:
    """Return the variance split of one comparison.

    Args:
        differences: loss(smaller) − loss(larger), (..., seeds, items), or (..., seeds, 1) for scores without items;
            a seed that isn't shared is NaN throughout.
        mean_square: MS_rank×seed pooled over all ranks run, (...).
        df: its degrees of freedom, (...).
    """
    seeds, items = (~np.isnan(differences[..., 0])).sum(axis=-1).astype(float), differences.shape[-1]
    gain, seed_part, seed_df = _seed_part(differences.mean(axis=-1), mean_square, df)
    item_part = np.zeros_like(gain)
    if items > 1:
        by_item, by_item_and_seed = item_mean_squares(differences)
        with np.errstate(divide="ignore", invalid="ignore"):
            item_part = np.maximum(0.0, by_item - by_item_and_seed) / (seeds * items)
    item_df = np.full_like(gain, items - 1 if items > 1 else np.inf)
    return VarianceSplit(gain, seed_part, item_part, seed_df, item_df, seeds)


def with_lost_runs(
    split: VarianceSplit, seed_means: Array, lost: NDArray[np.bool_], value: Array, mean_square: Array, df: Array
) -> VarianceSplit:
    """Return the split with each lost run counted as a seed whose mean difference is ``value``.

    Args:
        split: the split without the lost runs; its items' part stays.
        seed_means: mean differences of the seeds, (..., seeds), NaN where a seed isn't shared.
        lost: seeds at which one rank's run is there and the other's was lost, (..., seeds).
        value: (...), the difference to count.
        mean_square, df: as for :func:`split_variance`.
    """
    counted = np.where(lost, value[..., None], seed_means)
    gain, seed_part, seed_df = _seed_part(counted, mean_square, df)
    seeds = (~np.isnan(counted)).sum(axis=-1).astype(float)
    return VarianceSplit(gain, seed_part, split.item_part, seed_df, split.item_df, seeds)


def _seed_part(seed_means: Array, mean_square: Array, df: Array) -> tuple[Array, Array, Array]:
    """Return the gain, the seeds' part A and its degrees of freedom.

    A uses the larger of the pair's variance and the pooled one, each with its degrees of freedom: the pair's are
    S − 1. With the pooled ones, a pair that is noisier than the other ranks would get too narrow an interval.
    """
    present = ~np.isnan(seed_means)
    seeds = present.sum(axis=-1).astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = np.where(present, seed_means, 0.0).sum(axis=-1) / seeds
        deviations = np.where(present, seed_means - gain[..., None], 0.0)
        of_pair = np.where(seeds > 1, (deviations**2).sum(axis=-1) / (seeds - 1), np.nan)
        pooled = np.asarray(2 * mean_square)
        # A NaN is unknown: then the other one is used. Rounding must not decide which of two equal ones is larger:
        # with two ranks they are the same number, and so are their degrees of freedom.
        pair_is_larger = np.isnan(pooled) | (of_pair > pooled * (1 + 1e-9))
        part = np.fmax(of_pair, pooled) / seeds
        seed_df = np.where(pair_is_larger & ~np.isnan(of_pair), seeds - 1, np.asarray(df, dtype=float))
    return gain, part, seed_df


def as_losses(values: Any) -> Array:
    """Return (seeds, items); scores without items get an item axis of length 1."""
    array = np.asarray(values, dtype=float)
    return array[:, None] if array.ndim == 1 else array
