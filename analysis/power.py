"""Can the planned seeds and items settle the margin? Asked before training, and answered after an open end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlora_exp.analysis.rule import FIRST_SEEDS, LAST_LOOK, MOST_SEEDS, Rule, t_quantiles
from qlora_exp.analysis.variance import VarianceSplit

MOST_SEEDS_TOLD, MOST_ITEMS_TOLD = 1000, 10_000_000
"""Beyond these, "more than anyone would run" is the honest word."""


@dataclass(frozen=True)
class Noise:
    """What a difference between two ranks is expected to vary by, in the units of the score."""

    seed_sd: float
    """Standard deviation over seeds of one seed's mean difference."""
    item_sd: float
    """Standard deviation over items of the true difference; 0 for scores without items."""


@dataclass(frozen=True)
class PowerPlan:
    """``half_width_at_cap`` in the units of the score: half of what the interval spans with the most seeds."""

    settles: bool
    half_width_at_cap: float
    seeds_needed: int | None
    """Seeds at the planned items; ``None`` where no number of seeds is enough."""
    items_needed: int | None
    """Items at the most seeds; ``None`` where no number of items is enough."""
    sentence: str


def plan(noise: Noise, seeds: int, items: int, rule: Rule) -> PowerPlan:
    """Whether ``seeds`` (after the purchase) and ``items`` can settle every gain at this margin.

    The first doubling is the hardest: only its own two ranks tell about the seeds. A half-width of at most the
    half-zone leaves no gain undecided.
    """
    width = half_width(noise, seeds, items, rule)
    needed_seeds = seeds_needed(noise, items, rule)
    needed_items = items_needed(noise, max(seeds, MOST_SEEDS), rule)
    settles = width <= rule.half_zone
    reach = f"{seeds} seeds and {items} items reach ±{width:.3g}, and the margin needs ±{rule.half_zone:.3g}"
    if settles:
        sentence = f"The plan can settle the margin: {reach}."
    else:
        needed = requirement_sentence(needed_seeds, needed_items)
        sentence = f"The plan can't settle every gain near the margin: {reach}. {needed}"
    return PowerPlan(settles, width, needed_seeds, needed_items, sentence)


def half_width(noise: Noise, seeds: int, items: int, rule: Rule) -> float:
    """Expected half-width of the interval at the last look of the first doubling; infinite with a single seed."""
    if seeds < 2:
        return float("inf")
    item_df = items - 1 if noise.item_sd > 0 and items > 1 else np.inf
    split = VarianceSplit(
        gain=np.array(0.0),
        seed_part=np.array(noise.seed_sd**2 / seeds),
        item_part=np.array(noise.item_sd**2 / items),
        seed_df=np.array(seeds - 1.0),
        item_df=np.array(float(item_df)),
        seeds=np.array(float(seeds)),
    )
    t_continue, t_stop = t_quantiles(split.df, rule, LAST_LOOK)
    return float((t_continue + t_stop) / 2 * np.sqrt(split.variance))


def seeds_needed(noise: Noise, items: int, rule: Rule) -> int | None:
    """The fewest seeds at which every gain is settled with ``items``; ``None`` where more seeds don't help."""
    return _fewest(lambda seeds: half_width(noise, seeds, items, rule) <= rule.half_zone, 2, MOST_SEEDS_TOLD)


def items_needed(noise: Noise, seeds: int, rule: Rule) -> int | None:
    """The fewest items at which every gain is settled with ``seeds``; ``None`` where more items don't help."""
    return _fewest(lambda items: half_width(noise, seeds, items, rule) <= rule.half_zone, 2, MOST_ITEMS_TOLD)


def requirement_sentence(seeds: int | None, items: int | None) -> str:
    """What it would take, as a sentence."""
    ways = [f"about {seeds} seeds with these items"] if seeds is not None else []
    ways += [f"about {items} items with {MOST_SEEDS} seeds"] if items is not None and seeds is None else []
    return (
        f"It would take {' or '.join(ways)}." if ways else "It would take more seeds and more items, or a wider margin."
    )


def _fewest(enough: Callable[[int], bool], least: int, most: int) -> int | None:
    """The smallest whole number that is ``enough``, which holds for every larger one too."""
    if not enough(most):
        return None
    low, high = least, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def main(arguments: Sequence[str] | None = None) -> None:
    """Half-widths in units of the half-zone, for a ladder of five doublings: 1 or less settles every gain."""
    from qlora_exp.analysis.figures import lines, write_figure

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--figure", type=Path, help="also draw them into this HTML file")
    given = parser.parse_args(arguments)
    rule, seeds = Rule(margin=2.0, half_zone=1.0, doublings=5), (FIRST_SEEDS, 4, 6, MOST_SEEDS)
    widths = {sd: [half_width(Noise(sd, 0.0), n, 1, rule) for n in seeds] for sd in (0.1, 0.25, 0.5, 0.75, 1.0)}
    print("| seed sd / half-zone | " + " | ".join(f"{n} seeds" for n in seeds) + " |")
    print("|---|---|---|---|---|")
    for seed_sd, of_seeds in widths.items():
        print(f"| {seed_sd} | " + " | ".join(f"{width:.2f}" for width in of_seeds) + " |")
    if given.figure is not None:
        drawn = {f"seed sd {sd} half-zones": (seeds, of_seeds) for sd, of_seeds in widths.items()}
        write_figure(lines(drawn, ("seeds", "half-width / half-zone"), goal=1.0), given.figure)


if __name__ == "__main__":
    main()
