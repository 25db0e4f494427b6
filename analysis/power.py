"""Can the planned seeds and items settle the margin? Computed before training, and after an inconclusive ladder."""

from __future__ import annotations

import argparse
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlora_exp.analysis.rank_rule import MAX_SEEDS, Rule, SeedPlan, t_quantiles
from qlora_exp.analysis.variance import VarianceSplit

MAX_ITEMS_SEARCHED = 10_000_000
"""The search for enough items ends here: nobody would score more."""


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
    """With the planned items; ``None`` if no number of seeds up to 64 is enough."""
    items_needed: int | None
    """With the planned seeds; ``None`` if no number of items is enough."""
    sentence: str


def plan(noise: Noise, seeds: SeedPlan, items: int, rule: Rule) -> PowerPlan:
    """Return whether ``seeds`` and ``items`` (or groups of items) can settle every gain of a doubling.

    The first doubling is the hardest: only its ranks show how much seeds vary. If the half-width is at most the
    half-zone, every gain is decided.
    """
    width = half_width(noise, seeds, items)
    needed_seeds = seeds_needed(noise, seeds, items, rule)
    needed_items = items_needed(noise, seeds, rule)
    settles = width <= rule.half_zone
    reach = f"{seeds.most} seeds and {items} items reach ±{width:.3g}, and the margin needs ±{rule.half_zone:.3g}"
    if settles:
        sentence = f"The plan can settle the margin: {reach}."
    else:
        needed = requirement_sentence(needed_seeds, needed_items, seeds)
        sentence = f"The plan can't settle every gain near the margin: {reach}. {needed}"
    return PowerPlan(settles, needed_seeds, needed_items, sentence)


def half_width(noise: Noise, seeds: SeedPlan, items: int) -> float:
    """Return the expected half-width of the interval at the first comparison's last look."""
    item_df = items - 1 if noise.item_sd > 0 and items > 1 else np.inf
    split = VarianceSplit(
        gain=np.array(0.0),
        seed_part=np.array(noise.seed_sd**2 / seeds.most),
        item_part=np.array(noise.item_sd**2 / items),
        seed_df=np.array(seeds.most - 1.0),
        item_df=np.array(float(item_df)),
        seeds=np.array(float(seeds.most)),
    )
    t_continue, t_stop = t_quantiles(split.df, seeds.share(seeds.most))
    return float((t_continue + t_stop) / 2 * np.sqrt(split.variance))


def seeds_needed(noise: Noise, seeds: SeedPlan, items: int, rule: Rule) -> int | None:
    """Return the fewest seeds at the last look that settle every gain with ``items``; ``None`` if 64 aren't enough."""

    def enough(most: int) -> bool:
        return half_width(noise, SeedPlan(min(seeds.first, most), most), items) <= rule.half_zone

    return _fewest(enough, MAX_SEEDS)


def items_needed(noise: Noise, seeds: SeedPlan, rule: Rule) -> int | None:
    """Return the fewest items that settle every gain with ``seeds``; ``None`` if more items don't help."""
    return _fewest(lambda items: half_width(noise, seeds, items) <= rule.half_zone, MAX_ITEMS_SEARCHED)


def requirement_sentence(needed_seeds: int | None, needed_items: int | None, seeds: SeedPlan) -> str:
    """Return a sentence on what would settle the margin."""
    if needed_seeds is not None:
        return f"It would take about {needed_seeds} seeds with these items."
    if needed_items is not None:
        return f"It would take about {needed_items} items with {seeds.most} seeds."
    return "It would take more seeds and more items, or a wider margin."


def _fewest(enough: Callable[[int], bool], maximum: int) -> int | None:
    """Return the smallest integer from 2 on that is ``enough``: every larger one must be enough, too."""
    return bisect_left(range(maximum), True, lo=2, key=enough) if enough(maximum) else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Print half-widths in units of the half-zone, by the largest number of seeds: 1 or less settles every gain."""
    from qlora_exp.analysis.figures import lines, write_figure

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--figure", type=Path, help="also draw them into this HTML file")
    options = parser.parse_args(arguments)
    seeds = (3, 4, 6, 8, 16)
    widths = {sd: [half_width(Noise(sd, 0.0), SeedPlan(3, n), 1) for n in seeds] for sd in (0.1, 0.25, 0.5, 0.75, 1.0)}
    print("| seed sd / half-zone | " + " | ".join(f"at most {n} seeds" for n in seeds) + " |")
    print("|" + "---|" * (len(seeds) + 1))
    for seed_sd, row in widths.items():
        print(f"| {seed_sd} | " + " | ".join(f"{width:.2f}" for width in row) + " |")
    if options.figure is not None:
        series = {f"seed sd {sd} half-zones": (seeds, row) for sd, row in widths.items()}
        write_figure(lines(series, ("seeds", "half-width / half-zone"), goal=1.0), options.figure)


if __name__ == "__main__":
    main()
