"""Measure by simulation how often the rank decision is wrong: ``make calibration``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from qlora_exp.analysis.error_rates.replay import DATA, all_seeds, load
from qlora_exp.analysis.error_rates.simulation import (
    CONTINUE,
    DOUBLINGS,
    INCONCLUSIVE,
    ITEMS,
    PLAN,
    RULE,
    STOP,
    Gains,
    World,
    decide_many,
    simulated_losses,
)
from qlora_exp.analysis.variance import Array

CHUNK = 250
"""Ladders simulated at once."""
COMMAND = "python -m qlora_exp.analysis.error_rates.calibration"
EDGE, PAST, BEYOND = 0.67, 1.0, 1.6
"""Seed standard deviations at which the planned half-width is about w, 1.5 w, and more than 2 w. Errors are most common
past the edge: with little noise, the half-zone leaves no room for them."""
GROWING = 0.07
"""The goal where the noise grows with the rank."""

WORLDS = (
    World("Gaussian, little noise", seed_sd=0.2, item_sd=0.5),
    World("Gaussian, at the edge of the plan", seed_sd=EDGE, item_sd=0.5),
    World("Gaussian, at the edge, items as much as seeds", seed_sd=0.5, item_sd=2.2),
    World("Gaussian, past the edge", seed_sd=PAST, item_sd=0.5),
    World("Gaussian, beyond the plan", seed_sd=BEYOND, item_sd=0.5),
    # If seeds agree by chance, the items' part dominates, with too many degrees of freedom.
    World("Gaussian, beyond the plan, items as much as seeds", seed_sd=1.2, item_sd=2.2),
    World("t₃, at the edge", seed_sd=EDGE, item_sd=0.5, t3=True),
    World("t₃, beyond", seed_sd=BEYOND, item_sd=0.5, t3=True),
    World("neighbouring ranks' noise correlates 0.9, past the edge", seed_sd=3.2, item_sd=0.5, neighbours=0.9),
    World("10 % of the runs fail, at the edge", seed_sd=EDGE, item_sd=0.5, failing=0.1),
    World("10 % of the runs fail, beyond", seed_sd=BEYOND, item_sd=0.5, failing=0.1),
    World("runs above + 1 sd diverge, at the edge", seed_sd=EDGE, item_sd=0.5, diverging=True),
    World("runs above + 1 sd diverge, beyond", seed_sd=BEYOND, item_sd=0.5, diverging=True),
    World("seed sd rises 2.5× with rank, to the edge", seed_sd=EDGE / 2.5, item_sd=0.5, growth=2.5, goal=GROWING),
    World("seed sd rises 2.5× with rank, from the edge", seed_sd=EDGE, item_sd=0.5, growth=2.5, goal=GROWING),
    World("seed sd rises 2.5× with rank, beyond", seed_sd=BEYOND, item_sd=0.5, growth=2.5, goal=GROWING),
    World("seed sd rises 4× with rank, from the edge", seed_sd=EDGE, item_sd=0.5, growth=4.0, goal=GROWING),
    World("the last rank alone is 4× noisier", seed_sd=EDGE / 2, item_sd=0.5, last_noise=4.0, goal=GROWING),
    World("seeds correlate in pairs 0.5, past the edge", seed_sd=PAST, item_sd=0.5, seed_pairs=0.5),
    World("seeds correlate in pairs 0.8, past the edge", seed_sd=PAST, item_sd=0.5, seed_pairs=0.8),
    World("clusters of 5 items (icc 0.3), grouped", seed_sd=0.5, item_sd=2.2, cluster=5, icc=0.3),
    World("clusters of 5 items (icc 0.9), grouped", seed_sd=0.5, item_sd=2.2, cluster=5, icc=0.9),
    World("clusters of 10 items (icc 0.9), grouped", seed_sd=0.5, item_sd=2.2, cluster=10, icc=0.9),
    World("clusters of 5 (icc 0.3), no group column", 0.5, 2.2, cluster=5, icc=0.3, grouped=False, goal=np.inf),
    World("clusters of 10 (icc 0.9), no group column", 0.5, 2.2, cluster=10, icc=0.9, grouped=False, goal=np.inf),
)
REPLAY_MARGINS = (0.05, 0.1)
"""Nats per item: the margins at which the covariance of the real runs is simulated."""


def replay_worlds(path: Path = DATA) -> tuple[World, ...]:
    """Return worlds with the seed covariance that the reference grid's runs have from r = 8 on, 16 seeds."""
    reference = load(path).starting_at(8)
    means = all_seeds(reference).mean(axis=-1)
    worlds = []
    for margin in REPLAY_MARGINS:
        half_zones = means[: DOUBLINGS + 1] / (margin / RULE.margin)
        rows = tuple(tuple(map(float, row)) for row in np.cov(half_zones))
        name = f"the replay's covariance, margin {margin:g} nats per item"
        noise = float(np.sqrt(np.diagonal(np.cov(half_zones)).mean()))
        worlds.append(World(name, seed_sd=noise, item_sd=0.5, covariance=rows))
    return tuple(worlds)


@dataclass(frozen=True)
class Cell:
    """The result of one simulated cell, in shares of ladders; ``seeds_per_rank``: mean number of runs at a rank."""

    world: World
    gains: str
    wrong_continue: float
    wrong_stop: float
    inconclusive: float
    bound_broken: float
    """The rank to use is worse than another rank that was run by more than the answer's bound."""
    seeds_per_rank: float
    ladders: int


def all_gains_at(gain: float) -> Gains:
    return lambda rng, ladders: np.full((ladders, DOUBLINGS), gain)


def late_gains_at(gain: float) -> Gains:
    """Return large gains, and ``gain`` at the last doubling alone: the false step comes last."""
    return lambda rng, ladders: np.array([[*[5 * RULE.half_zone] * (DOUBLINGS - 1), gain]] * ladders)


def random_gains(rng: np.random.Generator, ladders: int) -> Array:
    """Draw the first gain uniformly on 0 to 5 margins; each next one is a share of the last, uniform on 0.3 to 0.8."""
    first = rng.uniform(0, 5 * RULE.margin, (ladders, 1))
    return np.asarray(first * rng.uniform(0.3, 0.8, (ladders, 1)) ** np.arange(DOUBLINGS))


LOW, HIGH = RULE.margin - RULE.half_zone, RULE.margin + RULE.half_zone
SETTINGS: tuple[tuple[str, Gains], ...] = (
    ("all at m − w", all_gains_at(LOW)),
    ("all at m + w", all_gains_at(HIGH)),
    ("last at m − w", late_gains_at(LOW)),
    ("last at m + w", late_gains_at(HIGH)),
    ("random", random_gains),
)


def simulate(world: World, name: str, gains_of: Gains, ladders: int, seed: int) -> Cell:
    """Simulate one cell. The same ``seed`` gives the same figures."""
    rng = np.random.default_rng(seed)
    counts = dict.fromkeys(("wrong_continue", "wrong_stop", "inconclusive", "bound_broken"), 0)
    runs = ranks = 0.0
    for size in _chunks(ladders):
        gains = gains_of(rng, size)
        outcomes = decide_many(simulated_losses(world, gains, rng), RULE)
        # The tolerance keeps gains of exactly m ± w in, in spite of rounding.
        small, large = gains <= LOW + 1e-9, gains >= HIGH - 1e-9
        both_small = (gains[:, :-1] + gains[:, 1:]) <= 2 * LOW + 1e-9
        wrong = ((outcomes.doublings[:, :-1] == CONTINUE) & small).any(axis=1)
        wrong |= ((outcomes.quadruplings[:, :-2] == CONTINUE) & both_small).any(axis=1)
        made = outcomes.run.any(axis=2)
        levels = np.concatenate([np.zeros((size, 1)), np.cumsum(gains, axis=1)], axis=1)
        regret = np.where(made, levels, -np.inf).max(axis=1) - levels[np.arange(size), outcomes.use]
        counts["wrong_continue"] += int(wrong.sum())
        counts["wrong_stop"] += int(((outcomes.doublings[:, :-1] == STOP) & large).any(axis=1).sum())
        counts["inconclusive"] += int((outcomes.ended == INCONCLUSIVE).sum())
        counts["bound_broken"] += int((regret > outcomes.regret_bound + 1e-9).sum())
        runs, ranks = runs + outcomes.run.sum(), ranks + made.sum()
    shares: Mapping[str, float] = {key: count / ladders for key, count in counts.items()}
    return Cell(world, name, **shares, seeds_per_rank=float(runs / ranks), ladders=ladders)


def calibrate(ladders: int, seed: int, worlds: Sequence[World] = WORLDS) -> Iterator[Cell]:
    """Simulate every world with every setting of the gains; each cell has its own stream of random numbers."""
    for number, world in enumerate(worlds):
        for position, (name, gains_of) in enumerate(SETTINGS):
            yield simulate(world, name, gains_of, ladders, seed + 1000 * number + position)


def _chunks(ladders: int) -> Iterator[int]:
    for start in range(0, ladders, CHUNK):
        yield min(CHUNK, ladders - start)


HEADINGS = (
    "noise",
    "gains",
    "planned half-width / w",
    "wrong *continue*",
    "wrong *stop*",
    "goal",
    "*inconclusive*",
    "goal",
    "bound broken",
    "seeds a rank",
    "reached",
)


def row(cell: Cell) -> tuple[str, ...]:
    world, width = cell.world, cell.world.planned_half_width / RULE.half_zone
    plain = world.growth == world.last_noise == 1 and not world.failing and not world.diverging and world.grouped
    bounded = cell.gains == "random" and plain and world.covariance is None and width <= 1
    wrong = max(cell.wrong_continue, cell.wrong_stop, cell.bound_broken)
    reached = wrong <= world.goal and (not bounded or cell.inconclusive <= 0.20)
    return (
        cell.world.name,
        cell.gains,
        f"{width:.2f}",
        _percent(cell.wrong_continue, cell.ladders),
        _percent(cell.wrong_stop, cell.ladders),
        f"≤ {100 * world.goal:.0f} %" if np.isfinite(world.goal) else "–",
        _percent(cell.inconclusive, cell.ladders),
        "≤ 20 %" if bounded else "–",
        _percent(cell.bound_broken, cell.ladders),
        f"{cell.seeds_per_rank:.1f}",
        "no goal" if not np.isfinite(world.goal) else "yes" if reached else "**no**",
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
        f"Each row is {ladders:,} simulated ladders with {DOUBLINGS} doublings, {PLAN.first} to {PLAN.most} seeds a"
        f" rank and {ITEMS} items.",
        f"The margin is m = {RULE.margin:g} and the half-zone w = {RULE.half_zone:g}. Rates are shares of ladders,"
        " ± half of the simulation's own 95 % interval.",
        "",
        "* *Wrong continue*: the answer was *continue* at a doubling whose true gain is ≤ m − w, or at a step r → 4r",
        "  whose true gain is ≤ 2 (m − w).",
        "* *Wrong stop*: the answer was *stop* at a doubling whose true gain is ≥ m + w.",
        "* *Inconclusive*: the ladder ended undecided. This rate has a goal only for random gains that the plan can",
        "  settle, with equal noise at all ranks and without lost runs.",
        "* *Bound broken*: a rank that was run is better than the rank to use by more than the answer's bound.",
        "* The *planned half-width* is known before training (`analysis/power.py`, with the most seeds and the",
        "  smallest rank's noise): if it is above 1, the plan can't settle every gain.",
        "* *Last at*: all gains are 5 w, and the last one alone is m − w or m + w.",
        "* *Random* gains: the first gain is uniform on 0 to 5 margins, and each next gain is a share of the last one;",
        "  the share is uniform on 0.3 to 0.8. Returns diminish, as they do in practice.",
        "* *No group column*: items that aren't independent, and a rule that doesn't know. These rows have no goal;",
        "  they show why the column is needed.",
        "* *Edge*: the noise at which the planned half-width is about 1.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
        *("| " + " | ".join(row(cell)) + " |" for cell in cells),
        "",
        "## What it shows",
        "",
        *_summary(cells),
        "",
    ]
    return "\n".join(lines)


def _summary(cells: Sequence[Cell]) -> Iterator[str]:
    judged = [cell for cell in cells if np.isfinite(cell.world.goal)]
    missed = [cell for cell in judged if row(cell)[-1] != "yes"]
    yield f"* {len(judged) - len(missed)} of {len(judged)} cells reach their goals."
    for cell in missed:
        yield f"* Missed: {cell.world.name}, {cell.gains}."
    diminishing = [cell for cell in judged if cell.gains == "random"]
    for name, some in (("all cells with a goal", judged), ("those with random, diminishing gains", diminishing)):
        worst = max(some, key=lambda cell: max(cell.wrong_continue, cell.wrong_stop))
        share = 100 * max(worst.wrong_continue, worst.wrong_stop)
        yield f"* The largest rate of wrong answers in {name}: {share:.1f} % ({worst.world.name}, {worst.gains})."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the error rates of the rank decision by simulation.")
    parser.add_argument("--ladders", type=int, default=10_000, help="a cell (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="also write the page to this Markdown file")
    parser.add_argument("--figure", type=Path, help="also draw the error rates into this HTML file")
    options = parser.parse_args(arguments)
    cells = []
    for cell in calibrate(options.ladders, options.seed, (*WORLDS, *replay_worlds())):
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
