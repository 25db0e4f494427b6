"""Does a ladder give the answer of a whole grid, and how much cheaper is it? ``make replay``

The function that decides real ladders decides many of them from a pool of real runs. Their answers are compared with a
grid of the same ranks with other seeds. docs/replay.md explains the columns and has the result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from qlora_exp.analysis.power import Noise, half_width
from qlora_exp.analysis.rank import Comparison, RankAnswer, answer, decide_doubling, decide_ladder
from qlora_exp.analysis.rank_rule import FIRST_SEEDS, MAX_SEEDS, Rule, StepVerdict, make_rule
from qlora_exp.analysis.variance import Array, split_variance
from qlora_exp.errors import AnalysisError

DATA = Path("docs/replay.npz")
COMMAND = "python -m qlora_exp.analysis.error_rates.replay"
MARGINS = (0.02, 0.05, 0.1, 0.2)
"""In nats per item."""
STARTS = (1, 2, 4, 8)
HALVES = 50
"""Random divisions of all seeds into two halves, to measure how often two whole grids agree."""


@dataclass(frozen=True)
class ReferenceGrid:
    """Every rank run with every seed. Losses in nats, (ranks, seeds, items); a missing run is NaN."""

    ranks: tuple[int, ...]
    grid: Array
    pool: Array
    """Losses of the replay's seeds, none of which is in the grid."""
    run_flops: Array
    """(ranks,): training and test evaluation of one run."""
    pilot_flops: Array
    """(ranks,): all pilots that chose the rank's learning rate, training and validation."""
    provenance: Mapping[str, Any]

    def starting_at(self, r_start: int) -> ReferenceGrid:
        first = self.ranks.index(r_start)
        return ReferenceGrid(
            self.ranks[first:],
            self.grid[first:],
            self.pool[first:],
            self.run_flops[first:],
            self.pilot_flops[first:],
            self.provenance,
        )

    def answer(self, rule: Rule) -> RankAnswer:
        """Return the ladder's rule applied to the whole grid: no second look, noise pooled over all ranks."""
        return decide_ladder(dict(zip(self.ranks, self.grid, strict=True)), rule, complete=True)


def load(path: Path) -> ReferenceGrid:
    """Read a reference grid that :func:`save` wrote.

    Raises:
        AnalysisError: no such file, or another kind of file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return ReferenceGrid(
            tuple(arrays["ranks"].tolist()),
            arrays["grid"].astype(float),
            arrays["pool"].astype(float),
            arrays["run_flops"],
            arrays["pilot_flops"],
            json.loads(str(arrays["provenance"])),
        )
    except (OSError, KeyError, ValueError, BadZipFile) as error:
        raise AnalysisError(f"no reference grid: {error}", str(path), "make replay in a checkout, or --data") from None


def save(reference: ReferenceGrid, path: Path) -> None:
    """Write the grid, with losses in single precision: they are compared in hundredths of a nat."""
    np.savez_compressed(
        path,
        ranks=np.array(reference.ranks),
        grid=reference.grid.astype(np.float32),
        pool=reference.pool.astype(np.float32),
        run_flops=reference.run_flops,
        pilot_flops=reference.pilot_flops,
        provenance=np.array(json.dumps(reference.provenance, sort_keys=True)),
    )


@dataclass(frozen=True)
class Ladder:
    """One replayed ladder."""

    comparisons: tuple[Comparison, ...]
    found: RankAnswer
    seeds: NDArray[np.int_]
    """(ranks,): runs at each rank; 0 if the ladder ended before it."""


def decide_from_pool(losses: Array, ranks: Sequence[int], rule: Rule) -> Ladder:
    """Decide a ladder from existing runs: three seeds per rank, more seeds at most once a doubling, up to its end.

    Args:
        losses: (ranks, available seeds, items).
    """
    seeds = np.zeros(len(ranks), dtype=int)
    comparisons: list[Comparison] = []
    for step, (smaller, larger) in enumerate(pairwise(ranks)):

        def run(requested: int, step: int = step) -> list[Array]:
            seeds[step : step + 2] = np.maximum(seeds[step : step + 2], min(requested, losses.shape[1]))
            available = np.arange(losses.shape[1]) < seeds[: step + 2, None]
            return list(np.where(available[..., None], losses[: step + 2], np.nan))

        decision = decide_doubling(run, FIRST_SEEDS, rule)
        assert decision is not None
        comparisons.append(Comparison(smaller, larger, decision))
        if decision.verdict is not StepVerdict.CONTINUE:
            break
    return Ladder(tuple(comparisons), answer(comparisons, rule, "nats per item"), seeds)


def allowed_verdicts(comparison: Comparison, rule: Rule) -> frozenset[StepVerdict]:
    """Return the verdicts of a ladder on one doubling that agree with the grid.

    Both agree if the grid's interval lies within margin ± half-zone. The set is empty if the grid is inconclusive.
    """
    low, high = comparison.decision.low, comparison.decision.high
    consistent = {StepVerdict.CONTINUE: low is not None and low > rule.margin - rule.half_zone}
    consistent[StepVerdict.STOP] = high is not None and high < rule.margin + rule.half_zone
    return frozenset(verdict for verdict, holds in consistent.items() if holds)


def compatible(ladder: Ladder, grid: RankAnswer) -> bool | None:
    """Return whether the grid allows every step; ``None`` if the grid is inconclusive at a step."""
    limits = [allowed_verdicts(comparison, grid.rule) for comparison in grid.comparisons[: len(ladder.comparisons)]]
    pairs = [(c.decision.verdict, limit) for c, limit in zip(ladder.comparisons, limits, strict=True)]
    if any(limit and verdict not in limit for verdict, limit in pairs):
        return False
    return None if not all(limits) else True


@dataclass(frozen=True)
class Row:
    """The result for one margin and first rank. Shares of draws unless stated otherwise; ``None``: no such draw."""

    margin: float
    r_start: int
    planned: float
    """Expected half-width with the most seeds / half-zone, from the first doubling's noise. Above 1, not every gain can
    be settled."""
    grid: RankAnswer
    decided: float
    compatible: float | None
    """Share of the draws that were decided and judged."""
    unjudged: float
    """Share of the decided draws: the grid is inconclusive at one of their steps."""
    exact: float | None
    """Share of the decided draws: verdict and rank are the grid's."""
    grids_agree: float
    """Share of pairs of whole grids, each with half of all seeds."""
    in_halves: tuple[int, int]
    """Compatible ladders, and those decided and judged, with one half as the grid and the other as the pool."""
    regret: tuple[float, float] | None
    """Nats per item above the best rank of the whole grid, by the grid's means: median and 90th percentile."""
    flops: tuple[float, float]
    """Share of the whole reference grid's FLOPs: median and 90th percentile."""
    flops_of_own: float
    """Share of the FLOPs of a user's grid with FIRST_SEEDS seeds at every rank from r_start: median."""
    seeds_per_rank: float


def replay(reference_grid: ReferenceGrid, margin: float, r_start: int, draws: int, seed: int) -> Row:
    """Replay ``draws`` ladders: the pool's seeds in random order, its items drawn with replacement."""
    rng = np.random.default_rng([seed, r_start])
    reference = reference_grid.starting_at(r_start)
    rule = make_rule(margin, len(reference.ranks) - 1)
    grid = reference.answer(rule)
    ladders = [decide_from_pool(_resample(reference.pool, rng), reference.ranks, rule) for _ in range(draws)]
    decided = [ladder for ladder in ladders if ladder.found.recommended_rank is not None]
    judged = _judged([(ladder, grid) for ladder in ladders])
    grids_agree, in_halves = _halves(reference, rule, rng)
    exact = [_same(ladder.found, grid) for ladder in decided]
    noise = noise_of(all_seeds(reference)[:2])
    shares = np.array([_flops(reference, ladder) for ladder in ladders])
    levels = dict(zip(reference_grid.ranks, np.nanmean(reference_grid.grid, axis=(1, 2)), strict=True))
    regrets = [
        levels[ladder.found.recommended_rank] - min(levels.values())
        for ladder in decided
        if ladder.found.recommended_rank
    ]
    return Row(
        margin=margin,
        r_start=r_start,
        planned=half_width(noise, MAX_SEEDS, reference.pool.shape[2], rule) / rule.half_zone,
        grid=grid,
        decided=len(decided) / draws,
        compatible=_share(judged),
        unjudged=1 - len(judged) / len(decided) if decided else 0.0,
        exact=_share(exact),
        grids_agree=grids_agree,
        in_halves=in_halves,
        regret=_middle_and_high(regrets) if regrets else None,
        flops=_middle_and_high(shares / _grid_flops(reference_grid, reference_grid.grid.shape[1])),
        flops_of_own=float(np.median(shares) / _grid_flops(reference, FIRST_SEEDS)),
        seeds_per_rank=float(
            sum(ladder.seeds.sum() for ladder in ladders) / sum((ladder.seeds > 0).sum() for ladder in ladders)
        ),
    )


def noise_of(pair: Array) -> Noise:
    """Return the noise of the difference of two ranks; ``pair``: their losses, (2, seeds, items)."""
    unknown = np.array(np.nan)
    split = split_variance(pair[0] - pair[1], unknown, unknown)
    return Noise(float(np.sqrt(split.seed_part * split.seeds)), float(np.sqrt(split.item_part * pair.shape[2])))


def all_seeds(reference: ReferenceGrid) -> Array:
    return np.concatenate([reference.grid, reference.pool], axis=1)


def _resample(pool: Array, rng: np.random.Generator) -> Array:
    seeds, items = rng.permutation(pool.shape[1]), rng.integers(pool.shape[2], size=pool.shape[2])
    return np.asarray(pool[:, seeds][:, :, items])


def _halves(reference: ReferenceGrid, rule: Rule, rng: np.random.Generator) -> tuple[float, tuple[int, int]]:
    together = all_seeds(reference)
    half = together.shape[1] // 2
    same, pairs = 0, []
    for _ in range(HALVES):
        order = rng.permutation(together.shape[1])
        grid, pool = together[:, order[:half]], together[:, order[half : 2 * half]]
        grid_answer, pool_answer = (
            decide_ladder(dict(zip(reference.ranks, runs, strict=True)), rule, complete=True) for runs in (grid, pool)
        )
        same += _same(grid_answer, pool_answer)
        pairs.append((decide_from_pool(_resample(pool, rng), reference.ranks, rule), grid_answer))
    judged = _judged(pairs)
    return same / HALVES, (sum(judged), len(judged))


def _judged(pairs: Sequence[tuple[Ladder, RankAnswer]]) -> list[bool]:
    decided = [(ladder, grid) for ladder, grid in pairs if ladder.found.recommended_rank is not None]
    return [verdict for ladder, grid in decided if (verdict := compatible(ladder, grid)) is not None]


def _same(first: RankAnswer, second: RankAnswer) -> bool:
    return (first.verdict, first.recommended_rank) == (second.verdict, second.recommended_rank)


def _flops(reference: ReferenceGrid, ladder: Ladder) -> float:
    return float((ladder.seeds * reference.run_flops + (ladder.seeds > 0) * reference.pilot_flops).sum())


def _grid_flops(reference: ReferenceGrid, seeds: int) -> float:
    return float((seeds * reference.run_flops + reference.pilot_flops).sum())


def _share(values: Sequence[bool]) -> float | None:
    return float(np.mean(values)) if values else None


def _middle_and_high(values: Sequence[float] | Array) -> tuple[float, float]:
    return float(np.median(values)), float(np.quantile(values, 0.9))


def main(arguments: Sequence[str] | None = None) -> None:
    from qlora_exp.analysis.error_rates.replay_page import document
    from qlora_exp.analysis.figures import ladder, write_figure
    from qlora_exp.analysis.rank import as_object

    parser = argparse.ArgumentParser(description="Replay the rank decision against a reference grid.")
    parser.add_argument("--data", type=Path, default=DATA, help="default: %(default)s")
    parser.add_argument("--draws", type=int, default=100, help="a row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="also write the page to this Markdown file")
    parser.add_argument("--figure", type=Path, help="also draw the grid's doublings into this HTML file")
    options = parser.parse_args(arguments)
    reference = load(options.data)
    rows = [replay(reference, margin, start, options.draws, options.seed) for start in STARTS for margin in MARGINS]
    page = document(reference, rows, options.draws, options.seed)
    print(page)
    if options.output is not None:
        options.output.write_text(page, encoding="utf-8")
    if options.figure is not None:
        rule = make_rule(MARGINS[1], len(reference.ranks) - 1)
        write_figure(ladder(as_object(reference.answer(rule))), options.figure)


if __name__ == "__main__":
    main()
