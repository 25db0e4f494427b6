"""What the runs say about each finding: estimates, 95 % intervals, verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from findings_runs import POLICIES, Array, Model, Run, alpha_of, law_rate, point, rate_grid, rate_ranks
from scipy import stats

from qlora_exp.analysis.variance import split_variance

LEVEL = 0.95
MARGIN = 0.01
"""Of the loss: two losses are equivalent if the interval of their difference lies within ± 1 %. Between r = 4 and
r = 64 this is 0.25 % per doubling, the sweeps' default margin."""
LITTLE = 0.25
"""Exponent of the best rate in the rank. Within ± 0.25, 16 times the rank moves the best rate by less than a factor of
2, one step of the grid."""
LAW_EXPONENT = -0.5
BITS_PER_PARAMETER = 2.0
"""What a parameter can store, as Schulman et al. assume."""
DRAWS = 4000


@dataclass(frozen=True)
class Estimate:
    """``low`` and ``high``: 95 % interval; infinite if it is unknown."""

    value: float
    low: float
    high: float


def within(estimate: Estimate, margin: float) -> str:
    """Return whether the value is within ± margin: ``holds``, ``does not hold`` or ``not decided``."""
    if -margin < estimate.low and estimate.high < margin:
        return "holds"
    return "does not hold" if estimate.low > margin or estimate.high < -margin else "not decided"


def below_zero(estimate: Estimate) -> str:
    """Return whether the value is below 0: ``holds``, ``does not hold`` or ``not decided``."""
    return "holds" if estimate.high < 0 else "does not hold" if estimate.low > 0 else "not decided"


def all_of(*verdicts: str) -> str:
    """Return the verdict of a claim that needs all of these."""
    ordered = ("does not hold", "not decided", "holds")
    return min(verdicts, key=ordered.index)


def relative_difference(losses: Array, reference: Array) -> Estimate:
    """Return mean(losses) / mean(reference) − 1, with the interval over seeds and items.

    Args:
        losses, reference: (seeds, items), paired by both.

    The ratio is linearized at its estimate (Cochran, *Sampling Techniques*, 1977, chapter 6); the variance is the rank
    rule's, a seeds' part and an items' part (docs/statistics.md), with Welch–Satterthwaite degrees of freedom.
    """
    seeds = len(losses)
    ratio = float(losses.mean() / reference.mean())
    if seeds < 2:
        return Estimate(ratio - 1, -math.inf, math.inf)
    values = (losses - ratio * reference) / reference.mean()
    split = split_variance(values, np.array(np.nan), np.array(seeds - 1.0))
    variance = float(split.variance)
    half = float(stats.t.ppf((1 + LEVEL) / 2, float(split.df))) * math.sqrt(variance) if variance > 0 else 0.0
    return Estimate(ratio - 1, ratio - 1 - half, ratio - 1 + half)


def mean_over_seeds(values: Array) -> Estimate:
    """Return the mean of one value a seed, with Student's interval."""
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1)) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


# (a) nf4 with double quantization against 16 bit.


@dataclass(frozen=True)
class QuantizationAnswer:
    seeds: int
    reference_loss: float
    """Nats per item, bf16."""
    seed_sd: float
    """Of one bf16 run's mean loss over seeds, as a share of the loss."""
    difference: Estimate
    """Of nf4, as a share of the loss of bf16; positive: nf4 is worse."""
    lost: int
    """Seeds left out, because a run diverged."""

    @property
    def verdict(self) -> str:
        return within(self.difference, MARGIN)


def quantization_answer(model: Model, runs: Sequence[Run]) -> QuantizationAnswer | None:
    """Compare nf4 with bf16 over the seeds that both have; ``None`` if there are fewer than two."""
    known = {run.point: run for run in runs}
    pairs = []
    for seed in range(1, model.quantization_seeds + 1):
        pair = [known.get(point(model, "2r", model.quantization_rank, 1.0, seed, mode)) for mode in ("nf4", "bf16")]
        pairs.append([run for run in pair if run is not None])
    ended = [pair for pair in pairs if len(pair) == 2]
    kept = [pair for pair in ended if all(run.losses for run in pair)]
    if len(kept) < 2:
        return None
    nf4, bf16 = np.array([[run.losses for run in pair] for pair in kept], dtype=float).transpose(1, 0, 2)
    seed_sd = float(bf16.mean(axis=1).std(ddof=1) / bf16.mean())
    lost = len(ended) - len(kept)
    return QuantizationAnswer(len(kept), float(bf16.mean()), seed_sd, relative_difference(nf4, bf16), lost)


# (b) Learning curves of ranks.


@dataclass(frozen=True)
class RankCurve:
    """One rank, compared with the largest one over ``seeds`` shared seeds."""

    rank: int
    learning_rate: float
    seeds: int
    test_loss: float
    """Nats per item, over all its seeds."""
    bits_per_parameter: float
    """Of what its training's labels contain before training, per trainable parameter."""
    test_difference: Estimate | None
    """Share of the largest rank's loss; positive: this rank is worse. ``None`` for the largest rank itself."""
    curve_difference: Estimate | None
    """Of the training loss: mean over logged steps of the relative difference, without the first step."""
    largest_gap: float | None
    """Largest relative difference of the mean curves at a logged step."""


@dataclass(frozen=True)
class CurvesAnswer:
    policy: str
    curves: tuple[RankCurve, ...]
    lost: int
    """Runs left out, because they diverged."""

    @property
    def verdict(self) -> str:
        """Return the verdict on the smallest rank against the largest: test losses and curves both count."""
        first = self.curves[0]
        assert first.test_difference is not None
        assert first.curve_difference is not None
        return all_of(within(first.test_difference, MARGIN), within(first.curve_difference, MARGIN))


def curves_answer(model: Model, policy: str, runs: Sequence[Run]) -> CurvesAnswer | None:
    """Compare each rank with the largest at the law's rate; ``None`` if fewer than two ranks share two seeds."""
    known = {run.point: run for run in runs}
    by_rank: dict[int, dict[int, Run]] = {}
    lost = 0
    for rank in model.ranks:
        points = [point(model, policy, rank, 1.0, seed) for seed in range(1, model.curve_seeds + 1)]
        ended = [known[each] for each in points if each in known]
        lost += sum(run.losses is None for run in ended)
        complete = {run.point.seed: run for run in ended if run.losses is not None}
        if len(complete) >= 2:
            by_rank[rank] = complete
    largest = by_rank[max(by_rank)] if by_rank else {}
    curves = [_curve(each, largest) for each in by_rank.values() if len(each.keys() & largest.keys()) >= 2]
    return CurvesAnswer(policy, tuple(curves), lost) if len(curves) > 1 else None


def _curve(runs: dict[int, Run], largest: dict[int, Run]) -> RankCurve:
    first = next(iter(runs.values()))
    at = first.point
    labels = np.mean([run.loss_tokens * run.curve[1] for run in runs.values()]) / math.log(2)
    test_loss = float(np.mean([run.losses for run in runs.values()]))
    seeds = sorted(runs.keys() & largest.keys())
    bits = float(labels) / first.trainable_parameters
    if runs is largest:
        return RankCurve(at.rank, at.learning_rate, len(seeds), test_loss, bits, None, None, None)
    losses, reference = (np.array([each[seed].losses for seed in seeds], dtype=float) for each in (runs, largest))
    # The first step's rate is 0: its loss is the base model's.
    steps = sorted(first.curve)[1:]
    own, other = (np.array([[each[seed].curve[step] for step in steps] for seed in seeds]) for each in (runs, largest))
    gaps = own / other - 1
    return RankCurve(
        *(at.rank, at.learning_rate, len(seeds), test_loss, bits),
        relative_difference(losses, reference),
        mean_over_seeds(gaps.mean(axis=1)),
        float(np.abs(own.mean(axis=0) / other.mean(axis=0) - 1).max()),
    )


# (c) The best learning rate.


@dataclass(frozen=True)
class BestRate:
    rank: int
    alpha: int
    seeds: int
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    """Mean test loss of each rate, nats per item; infinite if a run diverged."""
    best: Estimate
    at_edge: float
    """Share of the bootstrap's draws whose best rate is the grid's smallest or largest."""

    @property
    def resolved(self) -> bool:
        """Return whether the grid contains the interval of the best rate. If not, the grid's place decides the answer:
        grids around the law's rates would find the law in noise."""
        return self.at_edge <= (1 - LEVEL) / 2


@dataclass(frozen=True)
class RatesAnswer:
    policy: str
    ranks: tuple[BestRate, ...]
    exponent: Estimate
    """Of the best rate in the rank."""

    @property
    def resolved(self) -> bool:
        """Return whether each rank's grid contains the interval of its best rate."""
        return all(best.resolved for best in self.ranks)

    @property
    def verdict(self) -> str:
        if not self.resolved:
            return "not decided"
        return within(self.exponent, LITTLE) if self.policy == "fixed" else below_zero(self.exponent)


def rates_answer(model: Model, policy: str, runs: Sequence[Run], draws: int = DRAWS) -> RatesAnswer | None:
    """Fit best rate ∝ rank^exponent; ``None`` if fewer than two ranks have a grid with two seeds.

    The standard error is a bootstrap's, over seeds and items; the interval has t with the degrees of freedom of the
    seeds. Seeds are drawn for each rank, each with its losses at all rates; items are drawn once for all ranks. A
    draw's deviations from the mean over seeds are scaled by √(S / (S − 1)), since few seeds drawn with replacement vary
    too little (Rao and Wu 1988).
    """
    grids = {rank: grid for rank in rate_ranks(model) if (grid := rate_grid(model, runs, policy, rank)) is not None}
    if len(grids) < 2:
        return None
    generator = np.random.default_rng(1)
    weights = generator.multinomial(model.items, np.full(model.items, 1 / model.items), size=draws) / model.items
    found, drawn = [], []
    for rank, (factors, losses) in grids.items():
        centre = law_rate(model, policy, rank)
        minimum_of = grid_minimum(np.log2(np.array(factors) * centre), losses, weights, generator)
        bounds = (minimum_of.log, minimum_of.log - minimum_of.half_width, minimum_of.log + minimum_of.half_width)
        best = Estimate(*(float(2.0**log) for log in bounds))
        rates = tuple(float(each) for each in np.array(factors) * centre)
        alpha, seeds = alpha_of(policy, rank), losses.shape[1]
        found.append(BestRate(rank, alpha, seeds, rates, minimum_of.means, best, minimum_of.at_edge))
        drawn.append(minimum_of.draws)
    doublings = np.log2(np.array(list(grids), dtype=float))
    centred = (doublings - doublings.mean()) / ((doublings - doublings.mean()) ** 2).sum()
    exponents = centred @ np.array(drawn)
    value = float(centred @ np.log2([each.best.value for each in found]))
    half = t_half_width(exponents, sum(each.seeds - 1 for each in found))
    return RatesAnswer(policy, tuple(found), Estimate(value, value - half, value + half))


@dataclass(frozen=True)
class GridMinimum:
    """The best rate of one grid. ``log``: its log2; ``half_width``: of the 95 % interval of that; ``draws``: the
    bootstrap's; ``means``: loss of each rate; ``at_edge``: share of the draws at the smallest or largest rate."""

    log: float
    half_width: float
    draws: Array
    means: tuple[float, ...]
    at_edge: float

    @property
    def resolved(self) -> bool:
        """Return whether the grid contains the interval of the best rate."""
        return self.at_edge <= (1 - LEVEL) / 2


def grid_minimum(logs: Array, losses: Array, weights: Array, generator: np.random.Generator) -> GridMinimum:
    """Return where the losses (rates, seeds, items) are lowest; ``logs``: log2 of the rates; ``weights``: of the items
    in each draw, (draws, items)."""
    seeds, draws = losses.shape[1], len(weights)
    means = losses.mean(axis=(1, 2))
    finite = np.where(np.isfinite(losses), losses, 0.0)
    of_seed = np.einsum("fsi,di->dfs", finite, weights)
    counts = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
    shares = 1 / seeds + math.sqrt(seeds / (seeds - 1)) * (counts - 1) / seeds
    curves = np.where(np.isfinite(means), np.einsum("dfs,ds->df", of_seed, shares), np.inf)
    bests = minimum(logs, curves)
    found = float(minimum(logs, means[None])[0])
    at_edge = float(np.isin(curves.argmin(axis=1), (0, len(logs) - 1)).mean())
    return GridMinimum(found, t_half_width(bests, seeds - 1), bests, tuple(map(float, means)), at_edge)


def t_half_width(draws: Array, df: int) -> float:
    """Return t · (standard deviation of the draws): the percentiles of draws of two seeds reach 1.4 standard errors."""
    return float(stats.t.ppf((1 + LEVEL) / 2, df) * draws.std())


def minimum(logs: Array, curves: Array) -> Array:
    """Return log2 of each curve's best rate: the minimum of the parabola through the lowest loss and its neighbours.

    Args:
        logs: log2 of the rates, (rates,), one apart.
        curves: losses, (curves, rates). If the lowest one is at an edge or next to a run that diverged, its rate is
            the answer.
    """
    best = curves.argmin(axis=1)
    rows = np.arange(len(curves))
    left, right = curves[rows, np.maximum(best - 1, 0)], curves[rows, np.minimum(best + 1, len(logs) - 1)]
    middle = curves[rows, best]
    inside = (best > 0) & (best < len(logs) - 1) & np.isfinite(left + right)
    with np.errstate(invalid="ignore", divide="ignore"):
        shift = 0.5 * (left - right) / (left - 2 * middle + right)
    return np.asarray(logs[best] + np.where(inside & np.isfinite(shift), shift, 0.0))


@dataclass(frozen=True)
class ModelAnswers:
    model: Model
    runs: int
    quantization: QuantizationAnswer | None
    curves: tuple[CurvesAnswer, ...]
    rates: tuple[RatesAnswer, ...]


def answers(model: Model, runs: Sequence[Run]) -> ModelAnswers:
    own = [run for run in runs if run.point.model == model.name]
    curves = [curves_answer(model, policy, own) for policy in POLICIES]
    rates = [rates_answer(model, policy, own) for policy in POLICIES]
    return ModelAnswers(
        model,
        len(own),
        quantization_answer(model, own),
        tuple(each for each in curves if each is not None),
        tuple(each for each in rates if each is not None),
    )
