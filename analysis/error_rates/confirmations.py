"""Measure by simulation how often ``confirm`` errs, and how often it finds the best finalist: ``python -m
qlora_exp.analysis.error_rates.confirmations`` prints the tables of docs/confirm.md."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qlora_exp.analysis.confirmation import pair_intervals
from qlora_exp.analysis.variance import Array

CONFIRMATIONS_AT_ONCE = 1000
"""Confirmations simulated at once."""
SIMULATED_ITEMS = 100
GAPS = (2.0, 3.0, 4.0, 6.0)
"""How much better the best finalist is, in standard deviations of a run over seeds."""


@dataclass(frozen=True)
class NoiseWorld:
    """How a finalist's loss varies; the standard deviation of a run over seeds is 1."""

    name: str
    item_share: float = 0.0
    """Standard error over items of a finalist's mean, relative to its standard error over seeds."""
    t3: bool = False
    """Seeds have Student's t with 3 degrees of freedom, which is scaled to the same variance."""
    noisiest: float = 1.0
    """Factor of the last finalist's standard deviation over seeds."""


NOISE_WORLDS = (
    NoiseWorld("seeds alone"),
    NoiseWorld("items half of seeds", item_share=0.5),
    NoiseWorld("items as much as seeds", item_share=1.0),
    NoiseWorld("items four times seeds", item_share=4.0),
    NoiseWorld("t₃", t3=True),
    NoiseWorld("one finalist's seeds are 2.5× noisier", noisiest=2.5),
    NoiseWorld("one finalist's seeds are 4× noisier", noisiest=4.0),
)


@dataclass(frozen=True)
class ConfirmRates:
    """Shares of simulated confirmations."""

    missed: float
    """Some pair's interval doesn't contain the true difference: every false *better*, *equal* or bound is one."""
    false_better: float
    """Some finalist is called better than one that is as good or better."""
    found: float
    """The first finalist is shown to be better than all others."""


def finalists_losses(
    world: NoiseWorld, means: Sequence[float], seeds: int, count: int, rng: np.random.Generator
) -> Array:
    """Return (count, finalists, seeds, items) losses around ``means``, in standard deviations over seeds."""
    finalists = len(means)
    shape = (count, finalists, seeds)
    of_seeds = rng.standard_t(3, shape) / np.sqrt(3) if world.t3 else rng.standard_normal(shape)
    of_seeds[:, -1] *= world.noisiest
    item_sd = world.item_share * np.sqrt(SIMULATED_ITEMS / seeds)
    of_items = item_sd * rng.standard_normal((count, finalists, 1, SIMULATED_ITEMS))
    rest = 0.3 * max(item_sd, 1.0) * rng.standard_normal((*shape, SIMULATED_ITEMS))
    losses: Array = np.asarray(means)[None, :, None, None] + of_seeds[..., None] + of_items + rest
    return losses


def confirm_rates(world: NoiseWorld, means: Sequence[float], seeds: int, count: int, seed: int = 1) -> ConfirmRates:
    """Return the rates of ``count`` confirmations of finalists with true losses ``means``."""
    rng, totals = np.random.default_rng(seed), np.zeros(3)
    for start in range(0, count, CONFIRMATIONS_AT_ONCE):
        number = min(CONFIRMATIONS_AT_ONCE, count - start)
        bounds = pair_intervals(finalists_losses(world, means, seeds, number, rng))
        true = np.array([means[b] - means[a] for a, b in bounds.pairs])
        missed = (bounds.low > true) | (bounds.high < true)
        false = ((bounds.low > 0) & (true <= 0)) | ((bounds.high < 0) & (true >= 0))
        of_first = [index for index, (a, _) in enumerate(bounds.pairs) if a == 0]
        found = (bounds.low[:, of_first] > 0).all(axis=-1)
        totals += [missed.any(axis=-1).sum(), false.any(axis=-1).sum(), found.sum()]
    return ConfirmRates(*(totals / count))


def error_table(count: int) -> Iterator[str]:
    """Yield a Markdown table: in how many confirmations of equal finalists any statement is wrong."""
    plans = ((2, 3), (3, 2), (3, 3), (3, 5), (5, 2), (5, 3))
    yield "| noise | " + " | ".join(f"{finalists} finalists, {seeds} seeds" for finalists, seeds in plans) + " |"
    yield "|---" * (len(plans) + 1) + "|"
    for world in NOISE_WORLDS:
        rates = [confirm_rates(world, [0.0] * finalists, seeds, count) for finalists, seeds in plans]
        yield f"| {world.name} | " + " | ".join(f"{100 * rate.missed:.1f} %" for rate in rates) + " |"


def power_table(count: int) -> Iterator[str]:
    """Yield a Markdown table: how often a finalist that is better than all others is shown to be."""
    plans = ((2, 3), (3, 3), (3, 5), (3, 8), (5, 3))
    yield "| better than the others by | " + " | ".join(f"{f} finalists, {s} seeds" for f, s in plans) + " |"
    yield "|---" * (len(plans) + 1) + "|"
    for gap in GAPS:
        rates = [confirm_rates(NOISE_WORLDS[1], [0.0] + [gap] * (f - 1), s, count) for f, s in plans]
        yield f"| {gap:g} standard deviations | " + " | ".join(f"{100 * rate.found:.0f} %" for rate in rates) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="confirmations a cell")
    count = parser.parse_args().count
    print(*error_table(count), "", *power_table(count), sep="\n")


if __name__ == "__main__":
    main()
