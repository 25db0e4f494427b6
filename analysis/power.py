"""Can the planned seeds and items settle the margin? Computed before training, and after an inconclusive ladder."""

from __future__ import annotations

import argparse
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlora_exp.analysis.rank_rule import FIRST_SEEDS, LAST_LOOK, MAX_SEEDS, Rule, t_quantiles
from qlora_exp.analysis.variance import VarianceSplit

MAX_SEEDS_SEARCHED, MAX_ITEMS_SEARCHED = 1000, 10_000_000
"""The search for enough seeds or items ends here: nobody would run more."""


@dataclass(frozen=True)
class Noise:
    """Expected variation of the difference between two ranks, in the units of the score."""

    seed_sd: float
    """Standard deviation over seeds of one seed's mean difference."""
    item_sd: float
    """Standard deviation over items of the true difference; 0 for scores without items."""


@dataclass(frozen=True)
class PowerPlan:
    """Whether a plan settles the margin."""

    settles: bool
    seeds_needed: int | None
    """With the planned items; ``None`` if no number of seeds is enough."""
    items_needed: int | None
    """With the most seeds; ``None`` if no number of items is enough."""
    sentence: str


def plan(noise: Noise, seeds: int, items: int, rule: Rule) -> PowerPlan:
    """Return whether ``seeds`` (the total at the last look) and ``items`` can settle every gain at this margin.

    The first doubling is the hardest: only its two ranks show how much seeds vary. If the half-width is at most the
    half-zone, every gain is decided.
    """
    width = half_width(noise, seeds, items, rule)
    needed_seeds = seeds_needed(noise, items, rule)
    needed_items = items_needed(noise, max(seeds, MAX_SEEDS), rule)
    settles = width <= rule.half_zone
    reach = f"{seeds} seeds and {items} items reach ±{width:.3g}, and the margin needs ±{rule.half_zone:.3g}"
    if settles:
        sentence = f"The plan can settle the margin: {reach}."
    else:
        needed = requirement_sentence(needed_seeds, needed_items)
        sentence = f"The plan can't settle every gain near the margin: {reach}. {needed}"
    return PowerPlan(settles, needed_seeds, needed_items, sentence)


def half_width(noise: Noise, seeds: int, items: int, rule: Rule) -> float:
    """Return the expected half-width of the interval at the first doubling's last look; infinite with a single seed."""
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
    """Return the fewest seeds that settle every gain with ``items``; ``None`` if more seeds don't help."""
    return _fewest(lambda seeds: half_width(noise, seeds, items, rule) <= rule.half_zone, MAX_SEEDS_SEARCHED)


def items_needed(noise: Noise, seeds: int, rule: Rule) -> int | None:
    """Return the fewest items that settle every gain with ``seeds``; ``None`` if more items don't help."""
    return _fewest(lambda items: half_width(noise, seeds, items, rule) <= rule.half_zone, MAX_ITEMS_SEARCHED)


def requirement_sentence(seeds: int | None, items: int | None) -> str:
    """Return a sentence on what would settle the margin."""
    ways = [f"about {seeds} seeds with these items"] if seeds is not None else []
    ways += [f"about {items} items with {MAX_SEEDS} seeds"] if items is not None and seeds is None else []
    return (
        f"It would take {' or '.join(ways)}." if ways else "It would take more seeds and more items, or a wider margin."
    )


def _fewest(enough: Callable[[int], bool], maximum: int) -> int | None:
    """Return the smallest integer from 2 on that is ``enough``: every larger one must be enough, too."""
    return bisect_left(range(maximum), True, lo=2, key=enough) if enough(maximum) else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Print half-widths in units of the half-zone, for a ladder of five doublings: 1 or less settles every gain."""
    from qlora_exp.analysis.figures import lines, write_figure

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--figure", type=Path, help="also draw them into this HTML file")
    options = parser.parse_args(arguments)
    rule, seeds = Rule(margin=2.0, half_zone=1.0, doublings=5), (FIRST_SEEDS, 4, 6, MAX_SEEDS)
    widths = {sd: [half_width(Noise(sd, 0.0), n, 1, rule) for n in seeds] for sd in (0.1, 0.25, 0.5, 0.75, 1.0)}
    print("| seed sd / half-zone | " + " | ".join(f"{n} seeds" for n in seeds) + " |")
    print("|---|---|---|---|---|")
    for seed_sd, row in widths.items():
        print(f"| {seed_sd} | " + " | ".join(f"{width:.2f}" for width in row) + " |")
    if options.figure is not None:
        series = {f"seed sd {sd} half-zones": (seeds, row) for sd, row in widths.items()}
        write_figure(lines(series, ("seeds", "half-width / half-zone"), goal=1.0), options.figure)


if __name__ == "__main__":
    main()
