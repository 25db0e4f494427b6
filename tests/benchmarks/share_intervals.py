"""How often the interval of the share of the gap that a student closes holds the true share, in simulated studies.

    python tests/benchmarks/share_intervals.py [--studies 1000]

The true share is 0.5: the gap has mean 1, the gain 0.5. Items differ in gap and gain, seeds shift both, and each run's
item varies on top. Printed for each setting: the share of the studies with an interval in which it held the true share,
over seeds and items and over seeds alone, and how many studies had none.
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np

from qlora_exp.analysis.distilled import ratio_of_means

GAP, SHARE, ITEMS, RUN_SD = 1.0, 0.5, 100, 0.5
SEEDS, SEED_SDS, ITEM_SDS = (3, 5), (0.02, 0.2), (0.3, 1.5)


def held(seeds: int, seed_sd: float, item_sd: float, studies: int) -> list[tuple[float, int]]:
    """Return (share of the intervals that hold the true share, studies without an interval), with items and without."""
    drawn = np.random.default_rng(1)
    inside, without = [0, 0], [0, 0]
    for _ in range(studies):
        gap_of_item = GAP + drawn.normal(0, item_sd, ITEMS)
        gain_of_item = GAP * SHARE + drawn.normal(0, item_sd, ITEMS)
        shift = drawn.normal(0, seed_sd, (2, seeds, 1))
        gap = gap_of_item + shift[0] + drawn.normal(0, RUN_SD, (seeds, ITEMS))
        gain = gain_of_item + shift[1] + drawn.normal(0, RUN_SD, (seeds, ITEMS))
        for number, rows in enumerate(((gain, gap), (gain.mean(1, keepdims=True), gap.mean(1, keepdims=True)))):
            _, low, high = ratio_of_means(*rows)
            if low is None or high is None:
                without[number] += 1
            else:
                inside[number] += low <= SHARE <= high
    return [(one / max(studies - none, 1), none) for one, none in zip(inside, without, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000)
    studies = parser.parse_args().studies
    print("| seeds | sd of seeds | sd of items | seeds and items | without | seeds alone | without |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for seeds, seed_sd, item_sd in itertools.product(SEEDS, SEED_SDS, ITEM_SDS):
        both, alone = held(seeds, seed_sd, item_sd, studies)
        print(
            f"| {seeds} | {seed_sd} | {item_sd} | {both[0]:.3f} | {both[1]} | {alone[0]:.3f} | {alone[1]} |", flush=True
        )


if __name__ == "__main__":
    main()
