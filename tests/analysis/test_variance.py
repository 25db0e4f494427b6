"""The variance split against brute force, and what must not change it."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_exp.analysis.variance import item_mean_squares, rank_seed_mean_square, split_variance


def brute_force_residual(cells: np.ndarray) -> tuple[float, int]:
    """Residual mean square and df of rank + seed, by least squares on dummy variables."""
    ranks, seeds = cells.shape
    rows, values = [], []
    for rank, seed in zip(*np.nonzero(~np.isnan(cells)), strict=True):
        row = np.zeros(ranks + seeds)
        row[[rank, ranks + seed]] = 1
        rows.append(row)
        values.append(cells[rank, seed])
    design, observed = np.array(rows), np.array(values)
    effects, _, dimension, _ = np.linalg.lstsq(design, observed, rcond=None)
    df = len(observed) - int(dimension)
    return float(((observed - design @ effects) ** 2).sum() / df), df


@pytest.mark.parametrize("missing", [0, 1, 4, 7])
def test_the_pooled_noise_is_the_residual_of_a_two_way_analysis_with_or_without_missing_runs(missing: int) -> None:
    rng = np.random.default_rng(missing)
    cells = rng.normal(size=(5, 4)) + 10 * rng.normal(size=(5, 1)) + 10 * rng.normal(size=(1, 4))
    cells[tuple(rng.permutation([(r, s) for r in range(5) for s in range(4)])[:missing].T)] = np.nan
    wanted, wanted_df = brute_force_residual(cells)
    mean_square, df = rank_seed_mean_square(cells)
    assert df == wanted_df
    assert mean_square == pytest.approx(wanted)


def test_ranks_that_share_no_seed_tell_nothing_about_the_noise() -> None:
    mean_square, df = rank_seed_mean_square(np.array([[1.0, 2.0, np.nan, np.nan], [np.nan, np.nan, 3.0, 5.0]]))
    assert (float(df), np.isnan(mean_square)) == (0.0, True)


def test_item_and_interaction_mean_squares_are_those_of_the_sums_of_squares() -> None:
    d = np.random.default_rng(0).normal(size=(3, 11)) + np.linspace(0, 2, 11)
    effect_of_item = d.mean(axis=0) - d.mean()
    rest = d - d.mean(axis=0) - d.mean(axis=1, keepdims=True) + d.mean()
    by_item, left = item_mean_squares(d)
    assert by_item == pytest.approx(3 * (effect_of_item**2).sum() / 10)
    assert left == pytest.approx((rest**2).sum() / 20)


def test_many_ladders_at_once_give_what_each_gives_alone_and_absent_seeds_count_for_nothing() -> None:
    rng = np.random.default_rng(1)
    many = rng.normal(size=(6, 5, 9))
    many[::2, 3:] = np.nan
    pooled, df = np.full(6, 0.1), np.full(6, 4.0)
    together = split_variance(many, pooled, df)
    for number, one in enumerate(many):
        present = one[~np.isnan(one[:, 0])]
        alone = split_variance(present, pooled[number], df[number])
        assert together.gain[number] == pytest.approx(float(alone.gain))
        assert together.variance[number] == pytest.approx(float(alone.variance))
        assert together.df[number] == pytest.approx(float(alone.df))


def test_the_split_estimates_the_variance_that_the_mean_difference_really_has() -> None:
    rng = np.random.default_rng(2)
    seeds, items, ladders = 6, 40, 4000
    by_seed = rng.normal(0, 0.5, (ladders, 2, seeds, 1))
    by_item = rng.normal(0, 2.0, (ladders, 2, 1, items))
    losses = by_seed + by_item + rng.normal(0, 1.0, (ladders, 2, seeds, items))
    pooled, df = rank_seed_mean_square(losses.mean(axis=-1))
    split = split_variance(losses[:, 0] - losses[:, 1], pooled, df)
    # With two ranks the pooled and the own variance are the same number, so nothing is biased upwards.
    assert np.mean(split.seed_part) == pytest.approx(2 * (0.5**2 + 1 / items) / seeds, rel=0.05)
    assert np.mean(split.item_part) == pytest.approx(2 * 2.0**2 / items, rel=0.05)
    assert np.var(split.gain) == pytest.approx(np.mean(split.variance), rel=0.08)
