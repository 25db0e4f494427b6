"""Measure by simulation how often the rank decision is wrong: ``make calibration``.

A simulated loss is the sum of the rank's effect, rank × seed, rank × item and a rest. The main effects of seed and item
are left out because they cancel in every paired difference. The functions that decide real ladders decide these too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from qlora_exp.analysis.power import Noise, half_width
from qlora_exp.analysis.rank_rule import (
    FIRST_LOOK,
    FIRST_SEEDS,
    LAST_LOOK,
    MAX_SEEDS,
    MarginBounds,
    Rule,
    bounds,
    needs_more_items,
    seeds_at_last_look,
    verdicts,
)
from qlora_exp.analysis.variance import Array, VarianceSplit, rank_seed_mean_square, split_variance

RULE = Rule(margin=2.0, half_zone=1.0, doublings=5)
"""r = 8 … 256. Only margin : half-zone : noise matters, so the half-zone is the unit."""
ITEMS = 100
REST_SD = 1.0
"""Standard deviation of one item's loss in one run, beyond what rank and seed explain."""
CHUNK = 500
"""Ladders simulated at once: about 0.1 GB."""
COMMAND = "python -m qlora_exp.analysis.error_rates.calibration"

CONTINUE, STOP, INCONCLUSIVE = range(3)


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
    growth: float = 1.0
    """Seed standard deviation at the largest rank / at the smallest, geometric between."""
    goal: float = 0.05
    """The most wrong answers allowed, as a share."""

    @property
    def planned_half_width(self) -> float:
        noise = Noise(float(np.sqrt(2 * (self.seed_sd**2 + REST_SD**2 / ITEMS))), float(np.sqrt(2) * self.item_sd))
        return half_width(noise, MAX_SEEDS, ITEMS, RULE)


EDGE, PAST, BEYOND = 0.67, 1.0, 1.6
"""Seed standard deviations at which the planned half-width is about w, 1.5 w, and more than 2 w. Errors are most common
past the edge: with little noise, the half-zone leaves no room for them."""

WORLDS = (
    World("Gaussian, little noise", seed_sd=0.2, item_sd=0.5),
    World("Gaussian, at the edge of the plan", seed_sd=EDGE, item_sd=0.5),
    World("Gaussian, at the edge, items as much as seeds", seed_sd=0.5, item_sd=2.2),
    World("Gaussian, past the edge", seed_sd=PAST, item_sd=0.5),
    World("Gaussian, beyond the plan", seed_sd=BEYOND, item_sd=0.5),
    World("t₃, at the edge", seed_sd=EDGE, item_sd=0.5, t3=True),
    World("t₃, beyond", seed_sd=BEYOND, item_sd=0.5, t3=True),
    World("10 % of the runs fail, at the edge", seed_sd=EDGE, item_sd=0.5, failing=0.1),
    World("10 % of the runs fail, beyond", seed_sd=BEYOND, item_sd=0.5, failing=0.1),
    World("seed sd rises 2.5× with rank, to the edge", seed_sd=EDGE / 2.5, item_sd=0.5, growth=2.5, goal=0.07),
    World("seed sd rises 2.5× with rank, from the edge", seed_sd=EDGE, item_sd=0.5, growth=2.5, goal=0.07),
    World("seed sd rises 2.5× with rank, beyond", seed_sd=BEYOND, item_sd=0.5, growth=2.5, goal=0.07),
    # The worst case: if seeds agree by chance, the items' part dominates, with too many degrees of freedom.
    World("Gaussian, beyond the plan, items as much as seeds", seed_sd=1.2, item_sd=2.2),
)


@dataclass(frozen=True)
class Cell:
    """The result of one simulated cell, in shares of ladders; ``seeds_per_rank``: mean number of runs at a rank."""

    world: World
    gains: str
    wrong_continue: float
    wrong_stop: float
    inconclusive: float
    seeds_per_rank: float
    ladders: int


@dataclass(frozen=True)
class LadderOutcomes:
    """How each ladder ended. ``verdicts``: (ladders, doublings), −1 after a ladder's end."""

    verdicts: NDArray[np.int_]
    runs: Array
    ranks: Array


Gains = Callable[[np.random.Generator, int], Array]


def all_gains_at(gain: float) -> Gains:
    return lambda rng, ladders: np.full((ladders, RULE.doublings), gain)


def random_gains(rng: np.random.Generator, ladders: int) -> Array:
    """Draw the first gain uniformly on 0 to 5 margins; each next one is a share of the last, uniform on 0.3 to 0.8."""
    first = rng.uniform(0, 5 * RULE.margin, (ladders, 1))
    return np.asarray(first * rng.uniform(0.3, 0.8, (ladders, 1)) ** np.arange(RULE.doublings))


SETTINGS: tuple[tuple[str, Gains], ...] = (
    ("all at m − w", all_gains_at(RULE.margin - RULE.half_zone)),
    ("all at m + w", all_gains_at(RULE.margin + RULE.half_zone)),
    ("random", random_gains),
)


def simulated_losses(world: World, gains: Array, rng: np.random.Generator) -> Array:
    """Return losses (ladders, ranks, seeds, items); a failed run is NaN throughout."""
    ladders, ranks = gains.shape[0], gains.shape[1] + 1
    levels = -np.concatenate([np.zeros((ladders, 1)), np.cumsum(gains, axis=1)], axis=1)
    seed_sds = world.seed_sd * world.growth ** np.linspace(0, 1, ranks)
    by_seed = seed_sds[:, None] * _noise(world, rng, (ladders, ranks, MAX_SEEDS))
    by_item = world.item_sd * _noise(world, rng, (ladders, ranks, ITEMS))
    by_seed[rng.random(by_seed.shape) < world.failing] = np.nan
    rest = REST_SD * _noise(world, rng, (ladders, ranks, MAX_SEEDS, ITEMS))
    return levels[..., None, None] + by_seed[..., None] + by_item[:, :, None, :] + rest


def decide_many(losses: Array, rule: Rule) -> LadderOutcomes:
    """Decide many ladders at once: three seeds per rank, more at most once a doubling, up to *stop* or *inconclusive*.

    Args:
        losses: (ladders, ranks, available seeds, items).
    """
    ladders, ranks, seeds, _ = losses.shape
    run = np.zeros((ladders, ranks, seeds), dtype=bool)
    run[:, 0, :FIRST_SEEDS] = True
    decisions = np.full((ladders, ranks - 1), -1)
    running = np.arange(ladders)
    for step in range(ranks - 1):
        run[running, step + 1, :FIRST_SEEDS] = True
        split, intervals = _split_and_bounds(losses, run, running, step, rule, FIRST_LOOK)
        decisions[running, step] = _decisions(split, intervals, rule)
        undecided = decisions[running, step] == INCONCLUSIVE
        buyers = running[undecided & ~needs_more_items(split, rule)]
        if buyers.size:
            increased = np.isin(running, buyers)
            needed = seeds_at_last_look(intervals.half_width[increased], split.seeds[increased], rule)
            to_run = np.arange(seeds) < needed[:, None]
            run[buyers, step] |= to_run
            run[buyers, step + 1] |= to_run
            split, intervals = _split_and_bounds(losses, run, buyers, step, rule, LAST_LOOK)
            decisions[buyers, step] = _decisions(split, intervals, rule)
        running = running[decisions[running, step] == CONTINUE]
    return LadderOutcomes(decisions, run.sum(axis=(1, 2)).astype(float), run.any(axis=2).sum(axis=1).astype(float))


def _split_and_bounds(
    losses: Array, run: NDArray[np.bool_], which: NDArray[np.int_], step: int, rule: Rule, look: int
) -> tuple[VarianceSplit, MarginBounds]:
    available = np.where(run[which, : step + 2, :, None], losses[which, : step + 2], np.nan)
    mean_square, df = rank_seed_mean_square(available.mean(axis=-1))
    split = split_variance(available[:, step] - available[:, step + 1], mean_square, df)
    return split, bounds(split, rule, look)


def _decisions(split: VarianceSplit, intervals: MarginBounds, rule: Rule) -> NDArray[np.int_]:
    continues, stops = verdicts(split.gain, intervals, rule)
    return np.select([continues, stops], [CONTINUE, STOP], INCONCLUSIVE)


def simulate(world: World, name: str, gains_of: Gains, ladders: int, seed: int) -> Cell:
    """Simulate one cell. The same ``seed`` gives the same figures."""
    rng = np.random.default_rng(seed)
    wrong_continue = wrong_stop = open_ends = 0
    runs = ranks = 0.0
    for size in _chunks(ladders):
        gains = gains_of(rng, size)
        walked = decide_many(simulated_losses(world, gains, rng), RULE)
        # The tolerance keeps gains of exactly m ± w in, in spite of rounding.
        low, high = gains <= RULE.margin - RULE.half_zone + 1e-9, gains >= RULE.margin + RULE.half_zone - 1e-9
        wrong_continue += int(((walked.verdicts == CONTINUE) & low).any(axis=1).sum())
        wrong_stop += int(((walked.verdicts == STOP) & high).any(axis=1).sum())
        open_ends += int((walked.verdicts == INCONCLUSIVE).any(axis=1).sum())
        runs, ranks = runs + walked.runs.sum(), ranks + walked.ranks.sum()
    shares = (wrong_continue / ladders, wrong_stop / ladders, open_ends / ladders)
    return Cell(world, name, *shares, float(runs / ranks), ladders)


def calibrate(ladders: int, seed: int, worlds: Sequence[World] = WORLDS) -> Iterator[Cell]:
    """Simulate every world with every setting of the gains; each cell has its own stream of random numbers."""
    for number, world in enumerate(worlds):
        for position, (name, gains_of) in enumerate(SETTINGS):
            yield simulate(world, name, gains_of, ladders, seed + 1000 * number + position)


def _chunks(ladders: int) -> Iterator[int]:
    for start in range(0, ladders, CHUNK):
        yield min(CHUNK, ladders - start)


def _noise(world: World, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Draw noise with standard deviation 1."""
    if world.t3:
        return np.asarray(rng.standard_t(3, shape) / np.sqrt(3))
    return rng.standard_normal(shape)


HEADINGS = (
    "noise",
    "gains",
    "planned half-width / w",
    "wrong *continue*",
    "wrong *stop*",
    "goal",
    "*inconclusive*",
    "goal",
    "seeds a rank",
    "reached",
)


def row(cell: Cell) -> tuple[str, ...]:
    width = cell.world.planned_half_width / RULE.half_zone
    homoscedastic = cell.world.growth == 1 and not cell.world.failing
    bounded = cell.gains == "random" and homoscedastic and width <= 1
    wrong = max(cell.wrong_continue, cell.wrong_stop)
    reached = wrong <= cell.world.goal and (not bounded or cell.inconclusive <= 0.20)
    return (
        cell.world.name,
        cell.gains,
        f"{width:.2f}",
        _percent(cell.wrong_continue, cell.ladders),
        _percent(cell.wrong_stop, cell.ladders),
        f"≤ {cell.world.goal:.0%}".replace("%", " %"),
        _percent(cell.inconclusive, cell.ladders),
        "≤ 20 %" if bounded else "–",
        f"{cell.seeds_per_rank:.1f}",
        "yes" if reached else "**no**",
    )


def _percent(share: float, ladders: int) -> str:
    """Return the share with the half-width of the simulation's 95 % interval (Wilson), in points."""
    interval = stats.binomtest(round(share * ladders), ladders).proportion_ci(method="wilson")
    return f"{100 * share:.1f} ± {50 * (interval.high - interval.low):.1f} %"


def document(cells: Sequence[Cell], ladders: int, seed: int) -> str:
    lines = [
        "# Error rates of the rank decision, measured",
        "",
        f"`{COMMAND} --ladders {ladders} --seed {seed}` (`make calibration`) wrote this page.",
        "[statistics.md](statistics.md) explains the rule.",
        "",
        f"Each row is {ladders:,} simulated ladders with {RULE.doublings} doublings, {FIRST_SEEDS} seeds a rank"
        f" (at most {MAX_SEEDS} after seeds were added) and {ITEMS} items.",
        f"The margin is m = {RULE.margin:g} and the half-zone w = {RULE.half_zone:g}. Rates are shares of ladders,"
        " ± half of the simulation's own 95 % interval.",
        "",
        "* *Wrong continue*: the answer was *continue* at a doubling whose true gain is ≤ m − w.",
        "* *Wrong stop*: the answer was *stop* at a doubling whose true gain is ≥ m + w.",
        "* *Inconclusive*: the ladder ended undecided. This rate has a goal only for random gains that the plan can",
        "  settle, with equal noise at all ranks and without failing runs.",
        "* The *planned half-width* is known before training (`analysis/power.py`, with the most seeds and the",
        "  smallest rank's noise): if it is above 1, the plan can't settle every gain.",
        "* *Random* gains: the first gain is uniform on 0 to 5 margins, and each next gain is a share of the last one;",
        "  the share is uniform on 0.3 to 0.8.",
        "* *Edge*: the noise at which the planned half-width is about 1.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
        *("| " + " | ".join(row(cell)) + " |" for cell in cells),
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the error rates of the rank decision by simulation.")
    parser.add_argument("--ladders", type=int, default=10_000, help="a cell (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="also write the page to this Markdown file")
    parser.add_argument("--figure", type=Path, help="also draw the error rates into this HTML file")
    options = parser.parse_args(arguments)
    cells = []
    for cell in calibrate(options.ladders, options.seed):
        cells.append(cell)
        print(f"{cell.world.name}, {cell.gains}: done", file=sys.stderr, flush=True)
    page = document(cells, options.ladders, options.seed)
    print(page)
    if options.output is not None:
        options.output.write_text(page, encoding="utf-8")
    if options.figure is not None:
        _draw(cells, options.figure)


def _draw(cells: Sequence[Cell], path: Path) -> None:
    """Plot the larger error rate by the planned half-width, one line for each setting of the gains."""
    from qlora_exp.analysis.figures import lines, write_figure

    series = {}
    for name, _ in SETTINGS:
        cells_of_setting = sorted((c for c in cells if c.gains == name), key=lambda c: c.world.planned_half_width)
        widths = [cell.world.planned_half_width / RULE.half_zone for cell in cells_of_setting]
        series[f"gains {name}"] = (widths, [max(cell.wrong_continue, cell.wrong_stop) for cell in cells_of_setting])
    axes = ("planned half-width / half-zone", "share of ladders with a wrong answer")
    write_figure(lines(series, axes, goal=0.05), path)


if __name__ == "__main__":
    main()
