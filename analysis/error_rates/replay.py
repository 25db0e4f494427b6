"""Does a ladder give the answer of a whole grid, and how much cheaper is it? ``make replay``

The function that decides real ladders decides many of them from a pool of real runs. Their answers are compared with a
grid of the same ranks with other seeds. docs/replay.md explains the columns and has the result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from qlora_exp.analysis.power import Noise, half_width
from qlora_exp.analysis.rank import Comparison, RankAnswer, decide, decide_ladder, deciding_step
from qlora_exp.analysis.rank_rule import Rule, SeedPlan, StepVerdict, make_rule
from qlora_exp.analysis.rank_walk import walk
from qlora_exp.analysis.variance import Array, split_variance
from qlora_exp.errors import AnalysisError

DATA = Path("docs/replay.npz")
COMMAND = "python -m qlora_exp.analysis.error_rates.replay"
MARGINS = (0.02, 0.05, 0.1, 0.2)
"""In nats per item."""
STARTS = (1, 2, 4, 8)
PLAN = SeedPlan()
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
    """(ranks,): the pilots of a ladder that starts at this rank, training and validation."""
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
        """Return the rule applied to the whole grid: a single look, noise pooled over all ranks."""
        return decide_ladder(dict(zip(self.ranks, self.grid, strict=True)), rule)

    def judge(self, comparison: Comparison, rule: Rule) -> Comparison:
        """Return the whole grid's decision on the same two ranks."""
        smaller, larger = (self.grid[self.ranks.index(rank)] for rank in (comparison.from_rank, comparison.to_rank))
        decision = decide(smaller, larger, list(self.grid), rule.over(comparison.doublings))
        return Comparison(comparison.from_rank, comparison.to_rank, decision)


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
    """(ranks,): runs at each rank; 0 if the ladder didn't run it."""


def decide_from_pool(losses: Array, ranks: Sequence[int], rule: Rule, plan: SeedPlan = PLAN) -> Ladder:
    """Decide a ladder from existing runs.

    Args:
        losses: (ranks, available seeds, items), with at least the seeds of ``plan``.
    """
    seeds = np.zeros(len(ranks), dtype=int)

    def run(wanted: Mapping[int, int]) -> dict[int, Array]:
        for rank, number in wanted.items():
            position = ranks.index(rank)
            seeds[position] = max(seeds[position], number)
        made = np.arange(losses.shape[1]) < seeds[:, None]
        return {
            rank: np.where(made[position, :, None], losses[position], np.nan)
            for position, rank in enumerate(ranks)
            if seeds[position]
        }

    path = walk(ranks, plan, lambda _: rule, run)
    found = path.answer(plan, "nats per item")
    assert found is not None  # no run is missing
    return Ladder(path.comparisons, found, seeds)


def allowed_verdicts(comparison: Comparison, rule: Rule) -> frozenset[StepVerdict]:
    """Return the verdicts of a ladder on one step that agree with the grid's comparison of the same two ranks.

    Both agree if the grid's interval lies within margin ± half-zone. The set is empty if the grid is inconclusive.
    """
    low, high = comparison.decision.low, comparison.decision.high
    of_step = rule.over(comparison.doublings)
    consistent = {StepVerdict.CONTINUE: low is not None and low > of_step.margin - of_step.half_zone}
    consistent[StepVerdict.STOP] = high is not None and high < of_step.margin + of_step.half_zone
    return frozenset(verdict for verdict, holds in consistent.items() if holds)


def claims(ladder: Ladder) -> list[Comparison]:
    """Return the steps that the answer rests on: each *continue*, and the *stop* that decided."""
    last = deciding_step(ladder.comparisons)
    return [c for c in ladder.comparisons if c is last or c.decision.verdict is StepVerdict.CONTINUE]


def compatible(ladder: Ladder, reference: ReferenceGrid, rule: Rule) -> bool | None:
    """Return whether the grid allows every step of the answer; ``None`` if the grid is inconclusive at a step."""
    pairs = [(step.decision.verdict, allowed_verdicts(reference.judge(step, rule), rule)) for step in claims(ladder)]
    if any(limit and verdict not in limit for verdict, limit in pairs):
        return False
    return None if not all(limit for _, limit in pairs) else True


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
    """Nats per item of the decided ladders' rank above the best rank from ``r_start`` on, by the grid's means: median
    and 90th percentile."""
    priced_regret: tuple[float, float]
    """The same of all ladders' rank to use, if each doubling costs one margin: nats per item by which loss plus margins
    is above its minimum over the ranks; median and 90th percentile."""
    bound_holds: float
    """Share of all draws in which the rank to use costs at most ``regret_bound`` against the ranks that were run."""
    flops: tuple[float, float]
    """Share of the whole reference grid's FLOPs: median and 90th percentile."""
    flops_of_own: float
    """Share of the FLOPs of a user's grid with FIRST_SEEDS seeds at every rank from r_start: median."""
    seeds_per_rank: float


def replay(reference_grid: ReferenceGrid, margin: float, r_start: int, draws: int, seed: int) -> Row:
    """Replay ``draws`` ladders: the pool's seeds in random order, its items drawn with replacement."""
    rng = np.random.default_rng([seed, r_start])
    reference = reference_grid.starting_at(r_start)
    rule = make_rule(margin)
    grid = reference.answer(rule)
    ladders = [decide_from_pool(_resample(reference.pool, rng), reference.ranks, rule) for _ in range(draws)]
    decided = [ladder for ladder in ladders if ladder.found.recommended_rank is not None]
    judged = _judged([(ladder, reference) for ladder in ladders], rule)
    grids_agree, in_halves = _halves(reference, rule, rng)
    exact = [_same(ladder.found, grid) for ladder in decided]
    noise = noise_of(all_seeds(reference)[:2])
    shares = np.array([_flops(reference, ladder) for ladder in ladders])
    levels = np.nanmean(reference.grid, axis=(1, 2))
    priced = levels + margin * np.arange(len(levels))
    at = {rank: position for position, rank in enumerate(reference.ranks)}
    regrets = [float(levels[at[ladder.found.use_rank]] - levels.min()) for ladder in decided]
    return Row(
        margin=margin,
        r_start=r_start,
        planned=half_width(noise, PLAN, reference.pool.shape[2]) / rule.half_zone,
        grid=grid,
        decided=len(decided) / draws,
        compatible=_share(judged),
        unjudged=1 - len(judged) / len(decided) if decided else 0.0,
        exact=_share(exact),
        grids_agree=grids_agree,
        in_halves=in_halves,
        regret=_middle_and_high(regrets) if regrets else None,
        priced_regret=_middle_and_high([float(priced[at[ladder.found.use_rank]] - priced.min()) for ladder in ladders]),
        bound_holds=float(np.mean([_bound_holds(ladder, levels, at) for ladder in ladders])),
        flops=_middle_and_high(shares / _grid_flops(reference_grid, reference_grid.grid.shape[1])),
        flops_of_own=float(np.median(shares) / _grid_flops(reference, PLAN.first)),
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


def _bound_holds(ladder: Ladder, levels: Array, at: Mapping[int, int]) -> bool:
    """Return whether no rank that was run is better than the rank to use by more than the bound (the grid's means)."""
    regret, best = ladder.found.regret, min(levels[ladder.seeds > 0])
    return regret is None or bool(levels[at[ladder.found.use_rank]] - best <= regret.bound)


def _halves(reference: ReferenceGrid, rule: Rule, rng: np.random.Generator) -> tuple[float, tuple[int, int]]:
    together = all_seeds(reference)
    half = together.shape[1] // 2
    same, pairs = 0, []
    for _ in range(HALVES):
        order = rng.permutation(together.shape[1])
        halves = [
            replace(reference, grid=together[:, order[:half]]),
            replace(reference, grid=together[:, order[half : 2 * half]]),
        ]
        same += _same(halves[0].answer(rule), halves[1].answer(rule))
        pairs.append((decide_from_pool(_resample(halves[1].grid, rng), reference.ranks, rule), halves[0]))
    judged = _judged(pairs, rule)
    return same / HALVES, (sum(judged), len(judged))


def _judged(pairs: Sequence[tuple[Ladder, ReferenceGrid]], rule: Rule) -> list[bool]:
    decided = [(ladder, grid) for ladder, grid in pairs if ladder.found.recommended_rank is not None]
    return [verdict for ladder, grid in decided if (verdict := compatible(ladder, grid, rule)) is not None]


def _same(first: RankAnswer, second: RankAnswer) -> bool:
    return (first.verdict, first.recommended_rank) == (second.verdict, second.recommended_rank)


def _flops(reference: ReferenceGrid, ladder: Ladder) -> float:
    return float((ladder.seeds * reference.run_flops).sum() + reference.pilot_flops[0])


def _grid_flops(reference: ReferenceGrid, seeds: int) -> float:
    return float((seeds * reference.run_flops).sum() + reference.pilot_flops[0])


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
        rule = make_rule(MARGINS[1])
        write_figure(ladder(as_object(reference.answer(rule))), options.figure)


if __name__ == "__main__":
    main()
