"""Simulated ladders, many at once, decided by the functions that decide real ones.

A simulated loss is the sum of the rank's effect, rank × seed, rank × item and a rest. The main effects of seed and item
are left out because they cancel in every paired difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlora_exp.analysis.power import Noise, half_width
from qlora_exp.analysis.rank_rule import (
    FUTILE,
    MarginBounds,
    Rule,
    SeedPlan,
    bounds,
    decision_probability,
    lost_run_splits,
    verdicts,
)
from qlora_exp.analysis.variance import Array, VarianceSplit, rank_seed_mean_square, split_variance

RULE, PLAN = Rule(margin=2.0, half_zone=1.0), SeedPlan()
"""Only margin : half-zone : noise matters, so the half-zone is the unit."""
DOUBLINGS = 5
"""r = 8 … 256."""
ITEMS = 100
REST_SD = 1.0
"""Standard deviation of one item's loss in one run, beyond what rank and seed explain."""

CONTINUE, STOP, INCONCLUSIVE, NOT_MADE = 0, 1, 2, -1


@dataclass(frozen=True)
class World:
    """A kind of ladder. Standard deviations in half-zones."""

    name: str
    seed_sd: float
    """Of rank × seed in one run, at the smallest rank."""
    item_sd: float
    """Of rank × item, for one item."""
    t3: bool = False
    """Student's t with 3 degrees of freedom, scaled to the same standard deviation, in place of the Gaussian."""
    failing: float = 0.0
    """Probability that a run leaves no result."""
    diverging: bool = False
    """A run above + 1 standard deviation of its rank's seed effect leaves no result, at all ranks but the first."""
    growth: float = 1.0
    """Seed standard deviation at the largest rank / at the smallest, geometric between."""
    last_noise: float = 1.0
    """Seed standard deviation at the last rank alone, as a multiple of ``seed_sd``."""
    neighbours: float = 0.0
    """Correlation of the seed effects of neighbouring ranks (autoregressive)."""
    seed_pairs: float = 0.0
    """Correlation of the seed effects of two seeds at one rank: seeds that aren't independent."""
    cluster: int = 1
    """Items a cluster, e.g. questions on one document."""
    icc: float = 0.0
    """Share of the rank × item variance that the items of a cluster have in common."""
    grouped: bool = True
    """Whether the rule gets the clusters as groups."""
    covariance: tuple[tuple[float, ...], ...] | None = None
    """Covariance of the ranks' seed effects, (ranks, ranks); in place of the standard deviations above."""
    goal: float = 0.05
    """The most wrong answers allowed, as a share; infinite: shown, without a goal."""

    @property
    def planned_half_width(self) -> float:
        units = ITEMS // self.cluster if self.grouped else ITEMS
        effective = self.item_sd**2 * (self.icc + (1 - self.icc) / self.cluster if self.grouped else 1.0)
        seed_sd = self.seed_sd * (1 - self.neighbours) ** 0.5
        noise = Noise(float(np.sqrt(2 * (seed_sd**2 + REST_SD**2 / ITEMS))), float(np.sqrt(2 * effective)))
        return half_width(noise, PLAN, units)


@dataclass(frozen=True)
class LadderOutcomes:
    """How each ladder went. A step from rank position k: its verdict, NOT_MADE if it wasn't decided."""

    quadruplings: NDArray[np.int_]
    """(ladders, ranks): r → 4r from this position."""
    doublings: NDArray[np.int_]
    """(ladders, ranks): r → 2r from this position."""
    use: NDArray[np.int_]
    """(ladders,): position of the rank to use."""
    ended: NDArray[np.int_]
    """(ladders,): the ladder's verdict."""
    regret_bound: Array
    """(ladders,): the most that the rank to use may cost against the ranks that were run."""
    run: NDArray[np.bool_]
    """(ladders, ranks, seeds): the runs that were made."""


Gains = Callable[[np.random.Generator, int], Array]


def simulated_losses(world: World, gains: Array, rng: np.random.Generator) -> Array:
    """Return losses (ladders, ranks, seeds, items); a lost run is NaN throughout. Grouped items are averaged."""
    ladders, ranks = gains.shape[0], gains.shape[1] + 1
    levels = -np.concatenate([np.zeros((ladders, 1)), np.cumsum(gains, axis=1)], axis=1)
    by_seed = _seed_effects(world, rng, ladders, ranks)
    lost = rng.random(by_seed.shape) < world.failing
    if world.diverging:
        lost[:, 1:] |= by_seed[:, 1:] > world.seed_sd
    by_item = np.sqrt(1 - world.icc) * _noise(world, rng, (ladders, ranks, ITEMS))
    if world.cluster > 1:
        shared = _noise(world, rng, (ladders, ranks, ITEMS // world.cluster))
        by_item += np.sqrt(world.icc) * np.repeat(shared, world.cluster, axis=-1)
    losses = REST_SD * _noise(world, rng, (ladders, ranks, PLAN.most, ITEMS))
    losses += levels[..., None, None] + by_seed[..., None] + world.item_sd * by_item[:, :, None, :]
    losses[lost] = np.nan
    if world.cluster > 1 and world.grouped:
        losses = losses.reshape(*losses.shape[:-1], ITEMS // world.cluster, world.cluster).mean(axis=-1)
    return losses


def _seed_effects(world: World, rng: np.random.Generator, ladders: int, ranks: int) -> Array:
    drawn = _noise(world, rng, (ladders, ranks, PLAN.most))
    if world.seed_pairs:
        pairs = np.repeat(_noise(world, rng, (ladders, ranks, (PLAN.most + 1) // 2)), 2, axis=-1)[..., : PLAN.most]
        drawn = np.sqrt(world.seed_pairs) * pairs + np.sqrt(1 - world.seed_pairs) * drawn
    if world.covariance is not None:
        factor = np.linalg.cholesky(np.asarray(world.covariance) + 1e-12 * np.eye(ranks))
        return np.asarray(np.einsum("rq,lqs->lrs", factor, drawn))
    for rank in range(1, ranks):
        kept = world.neighbours
        drawn[:, rank] = kept * drawn[:, rank - 1] + np.sqrt(1 - kept**2) * drawn[:, rank]
    sds = world.seed_sd * world.growth ** np.linspace(0, 1, ranks)
    sds[-1] *= world.last_noise
    return np.asarray(sds[:, None] * drawn)


def _noise(world: World, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Draw noise with standard deviation 1."""
    if world.t3:
        return np.asarray(rng.standard_t(3, shape) / np.sqrt(3))
    return rng.standard_normal(shape)


def decide_many(losses: Array, rule: Rule, plan: SeedPlan = PLAN) -> LadderOutcomes:
    """Decide many ladders at once, as :func:`~qlora_exp.analysis.rank_walk.walk` decides one.

    Args:
        losses: (ladders, ranks, seeds, items), with at least ``plan.most`` seeds.
    """
    ladders, ranks, _, _ = losses.shape
    walks = _Walks(losses, rule, plan)
    quadruplings, doublings = (np.full((ladders, ranks), NOT_MADE) for _ in range(2))
    use, ended = np.zeros(ladders, dtype=int), np.full(ladders, CONTINUE)
    arrived = [np.arange(ladders)] + [np.array([], dtype=int) for _ in range(ranks + 1)]
    for k in range(ranks - 1):
        here = np.sort(arrived[k])
        use[here] = k
        if not here.size:
            continue
        if k + 2 < ranks:
            quadruplings[here, k] = walks.decide(here, k, k + 2)
            arrived[k + 2] = np.concatenate([arrived[k + 2], here[quadruplings[here, k] == CONTINUE]])
            here = here[quadruplings[here, k] != CONTINUE]
        for smaller in range(k, min(k + 2, ranks - 1)):
            use[here] = smaller
            doublings[here, smaller] = walks.decide(here, smaller, smaller + 1)
            ended[here] = doublings[here, smaller]
            here = here[doublings[here, smaller] == CONTINUE]
        arrived[min(k + 2, ranks - 1)] = np.concatenate([arrived[min(k + 2, ranks - 1)], here])
    use[arrived[ranks - 1]] = ranks - 1
    return LadderOutcomes(quadruplings, doublings, use, ended, walks.regret_bounds(use), walks.run)


class _Walks:
    """The runs of many ladders so far, and the decisions that follow from them."""

    def __init__(self, losses: Array, rule: Rule, plan: SeedPlan) -> None:
        self.losses, self.rule, self.plan = losses, rule, plan
        self.means = losses.mean(axis=-1)
        self.run = np.zeros(losses.shape[:3], dtype=bool)

    def decide(self, which: NDArray[np.int_], smaller: int, larger: int) -> NDArray[np.int_]:
        """Return the verdicts of one comparison, with as many seeds as each ladder needs."""
        rule = self.rule.over(larger - smaller)
        results = np.full(len(which), INCONCLUSIVE)
        still = np.arange(len(which))
        for seeds in range(self.plan.first, self.plan.most + 1):
            ladders = which[still]
            for rank in (smaller, larger):
                self.run[ladders, rank, :seeds] = True
            split, interval = self.look(ladders, smaller, larger, rule, self.plan.share(seeds))
            continues, stops = verdicts(split.gain, interval, rule)
            results[still] = np.select([continues, stops], [CONTINUE, STOP], INCONCLUSIVE)
            last = self.plan.most
            hopeless = decision_probability(split, rule, last, self.plan.share(last)) < FUTILE
            still = still[~continues & ~stops & ~hopeless]
            if not still.size:
                break
        return results

    def look(
        self, ladders: NDArray[np.int_], smaller: int, larger: int, rule: Rule, share: float | Array
    ) -> tuple[VarianceSplit, MarginBounds]:
        made = self.run[ladders]
        mean_square, df = rank_seed_mean_square(np.where(made, self.means[ladders], np.nan))
        pair = made[:, smaller] & made[:, larger]
        differences = self.losses[ladders, smaller] - self.losses[ladders, larger]
        differences = np.where(pair[..., None], differences, np.nan)
        split = split_variance(differences, mean_square, df)
        larger_lost, smaller_lost = (
            pair & np.isnan(self.means[ladders, a]) & ~np.isnan(self.means[ladders, b])
            for a, b in ((larger, smaller), (smaller, larger))
        )
        for_low, for_high = lost_run_splits(
            split, differences.mean(axis=-1), larger_lost, smaller_lost, rule,
            mean_square, df,
        )  # fmt: skip
        return split, bounds(for_low, for_high, share)

    def regret_bounds(self, use: NDArray[np.int_]) -> Array:
        """Return the largest upper bound of what any rank that was run gains over the rank to use."""
        worst = np.zeros(len(use))
        made = self.run.sum(axis=2)
        shares = np.array([self.plan.share(max(seeds, self.plan.first)) for seeds in range(self.plan.most + 1)])
        for position in range(self.losses.shape[1]):
            for other in range(self.losses.shape[1]):
                which = np.flatnonzero((use == position) & self.run[:, other].any(axis=1))
                if other != position and which.size:
                    share = shares[np.minimum(made[which, position], made[which, other])]
                    of_step = self.rule.over(abs(other - position))
                    high = self.look(which, position, other, of_step, share)[1].high
                    worst[which] = np.maximum(worst[which], np.where(np.isnan(high), np.inf, high))
        return worst
