"""Is the larger rank worth it? Decides one doubling, or a ladder of them: pure functions over per-item losses.

The rule, its formulas and its sources are in docs/statistics.md, its measured error rates in docs/calibration.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qlora_exp.analysis.power import Noise, items_needed, requirement_sentence, seeds_needed
from qlora_exp.analysis.rank_rule import (
    FIRST_LOOK,
    LAST_LOOK,
    MAX_SEEDS,
    MarginBounds,
    Rule,
    StepVerdict,
    bounds,
    make_rule,
    needs_more_items,
    seeds_at_last_look,
    t_quantiles,
    verdicts,
)
from qlora_exp.analysis.variance import Array, VarianceSplit, as_losses, rank_seed_mean_square, split_variance
from qlora_exp.errors import AnalysisError


@dataclass(frozen=True)
class SampleIncrease:
    """The totals to run before the last look: seeds, or items if no number of seeds is enough."""

    seeds: int | None
    items: int | None


@dataclass(frozen=True)
class Decision:
    """The decision on one step. Units are the score's; ``None`` is unknown."""

    verdict: StepVerdict
    gain: float
    low: float | None
    """One-sided bound that decides *continue*."""
    high: float | None
    """One-sided bound that decides *stop*."""
    se: float | None
    df: float | None = None
    seeds: int = 1
    items: int | None = None
    seed_part: float | None = None
    """A: the seeds' share of se², squared units."""
    item_part: float | None = None
    """B: the items' share of se²."""
    increase: SampleIncrease | None = None
    would_settle: str | None = None
    """What would settle the step, if the verdict is *inconclusive* or *buy*."""


@dataclass(frozen=True)
class Comparison:
    from_rank: int
    to_rank: int
    decision: Decision


@dataclass(frozen=True)
class RankAnswer:
    """A ladder's answer. ``recommended_rank`` is ``None`` if the ladder is inconclusive or not finished."""

    verdict: StepVerdict
    recommended_rank: int | None
    rule: Rule
    comparisons: tuple[Comparison, ...]
    sentence: str


def decide(smaller: Array, larger: Array, ladder: Sequence[Array], rule: Rule, look: int) -> Decision:
    """Decide one doubling.

    Args:
        smaller, larger: losses of the two ranks, (seeds, items) or, for scores without items, (seeds,). Row s is the
            same seed and column i the same test item in both; a missing run is a row of NaN.
        ladder: losses of all ranks run, these two among them: they show how much the seeds vary.
        look: FIRST_LOOK, or LAST_LOOK after seeds or items were added.

    Raises:
        AnalysisError: shapes that don't pair, missing items, no shared seed.
    """
    difference = _paired(smaller, larger)
    pooled = rank_seed_mean_square(np.stack([as_losses(losses).mean(axis=-1) for losses in ladder]))
    split = split_variance(difference, *pooled)
    interval = bounds(split, rule, look)
    continues, stops = verdicts(split.gain, interval, rule)
    items = difference.shape[1] if np.ndim(smaller) > 1 else None
    verdict, increase, requirement = StepVerdict.CONTINUE if continues else StepVerdict.STOP, None, None
    if not continues and not stops:
        requirement = _requirement(split, items, rule)
        increase = _sample_increase(split, interval, items, rule) if look == FIRST_LOOK else None
        verdict = StepVerdict.INCONCLUSIVE if increase is None else StepVerdict.BUY
    return Decision(
        verdict=verdict,
        gain=float(split.gain),
        low=_known(interval.low),
        high=_known(interval.high),
        se=_known(interval.se),
        df=_known(interval.df),
        seeds=int(split.seeds),
        items=items,
        seed_part=_known(split.seed_part),
        item_part=_known(split.item_part) if items is not None else None,
        increase=increase,
        would_settle=requirement,
    )


def decide_doubling(
    run: Callable[[int], Sequence[Array] | None], first_seeds: int, rule: Rule, max_seeds: int = MAX_SEEDS
) -> Decision | None:
    """Decide one doubling with two looks; seeds are added between them at most once.

    Args:
        run: total number of seeds → losses of the ladder's ranks so far, with that many seeds for the doubling's two
            ranks, which come last; ``None`` if runs are missing.
        first_seeds: seeds at the first look.
        max_seeds: the most seeds in total; if no seed can be added, the first look is the last.

    Returns:
        The decision; *buy* while added runs are missing, ``None`` while runs of the first look are missing.
    """
    ladder = run(first_seeds)
    if ladder is None:
        return None
    decision = decide(ladder[-2], ladder[-1], ladder, rule, FIRST_LOOK)
    if decision.increase is None:
        return decision
    if decision.increase.seeds is None:
        items = f"about {decision.increase.items}" if decision.increase.items else "many more"
        requirement = f"It would take {items} test items: more seeds can't settle it."
        return replace(decision, verdict=StepVerdict.INCONCLUSIVE, increase=None, would_settle=requirement)
    total_seeds = min(max(decision.increase.seeds, first_seeds + 1), max_seeds)
    if total_seeds <= first_seeds:
        return replace(decision, verdict=StepVerdict.INCONCLUSIVE, increase=None)
    ladder = run(total_seeds)
    if ladder is None:
        return replace(decision, increase=SampleIncrease(total_seeds, None))
    return decide(ladder[-2], ladder[-1], ladder, rule, LAST_LOOK)


def decide_from_summary(gain: float, se: float, rule: Rule, df: float = np.inf) -> Decision:
    """Decide from a published gain (positive is better) and its standard error.

    ``df``: degrees of freedom of ``se``; infinite: ``se`` is exact, and the gain is normal.
    """
    t_continue, t_stop = t_quantiles(np.array(df), rule, LAST_LOOK)
    split = VarianceSplit(*(np.array(x) for x in (gain, se**2, 0.0, df, np.inf, 1.0)))
    interval = bounds(split, rule, LAST_LOOK)
    continues, stops = verdicts(split.gain, interval, rule)
    verdict = StepVerdict.CONTINUE if continues else StepVerdict.STOP if stops else StepVerdict.INCONCLUSIVE
    requirement = None
    if verdict is StepVerdict.INCONCLUSIVE:
        needed = 2 * rule.half_zone / float(t_continue + t_stop)
        requirement = f"It would take a standard error of the gain of at most {needed:.3g}; it is {se:.3g}."
    return Decision(verdict, gain, float(interval.low), float(interval.high), se, would_settle=requirement)


def decide_ladder(
    ladder: Mapping[int, Array],
    rule: Rule,
    bought: Collection[int] = (),
    complete: bool = False,
    unit: str = "nats per item",
) -> RankAnswer:
    """Return the answer of the ladder as far as it was run: *continue* asks for the next doubling, *buy* for seeds.

    Args:
        ladder: rank → losses as :func:`decide` takes them, with the same seeds and items at every rank.
        bought: the larger rank of each doubling to which seeds or items were added.
        complete: all ranks were run before anything was decided (a table, a grid). Then noise is pooled over all of
            them, and there is no second look. Otherwise each doubling uses the ranks up to its own.
        unit: unit of the scores, for the sentence.

    Raises:
        AnalysisError: fewer than two ranks, or losses that don't pair.
    """
    ranks = sorted(ladder)
    if len(ranks) < 2:
        raise AnalysisError("a single rank can't be compared", "ranks", "add the results of a second rank")
    shapes = {np.shape(ladder[rank]) for rank in ranks}
    if len(shapes) > 1:
        raise AnalysisError(f"the ranks' results have different shapes: {sorted(shapes)}", "ladder", "pair them first")
    comparisons = []
    for position, (smaller, larger) in enumerate(pairwise(ranks)):
        run = [ladder[rank] for rank in (ranks if complete else ranks[: position + 2])]
        look = LAST_LOOK if complete or larger in bought else FIRST_LOOK
        decision = decide(ladder[smaller], ladder[larger], run, rule, look)
        comparisons.append(Comparison(smaller, larger, decision))
    return answer(comparisons, rule, unit)


def answer(comparisons: Sequence[Comparison], rule: Rule, unit: str) -> RankAnswer:
    """Return the ladder's answer: the first step that isn't *continue* decides; later steps are listed, not used."""
    last = _deciding_step(comparisons)
    verdict = last.decision.verdict
    recommended = {StepVerdict.CONTINUE: last.to_rank, StepVerdict.STOP: last.from_rank}.get(verdict)
    return RankAnswer(verdict, recommended, rule, tuple(comparisons), _sentence(last, rule, unit))


def as_object(result: RankAnswer) -> dict[str, Any]:
    """Return the answer in plain JSON types, as ``analyze --json`` prints it and a sweep's record stores it."""
    last = _deciding_step(result.comparisons).decision
    return {
        "decision": str(result.verdict),
        "recommended_rank": result.recommended_rank,
        "margin": result.rule.margin,
        "half_zone": result.rule.half_zone,
        "comparisons": [
            {
                "from_rank": step.from_rank,
                "to_rank": step.to_rank,
                "gain": step.decision.gain,
                "low": step.decision.low,
                "high": step.decision.high,
                "decision": str(step.decision.verdict),
            }
            for step in result.comparisons
        ],
        "would_settle": last.would_settle if last.verdict is StepVerdict.INCONCLUSIVE else None,
        "sentence": result.sentence,
    }


def _deciding_step(comparisons: Sequence[Comparison]) -> Comparison:
    """Return the first step that isn't *continue*, else the last one."""
    return next((c for c in comparisons if c.decision.verdict is not StepVerdict.CONTINUE), comparisons[-1])


def _sentence(last: Comparison, rule: Rule, unit: str) -> str:
    decision, increase = last.decision, last.decision.increase
    gain = f"going from r = {last.from_rank} to {last.to_rank} gains {decision.gain:+.3g} {unit}"
    if decision.low is not None and decision.high is not None:
        gain += f" [{decision.low:+.3g}, {decision.high:+.3g}]"
    gain += f", against a margin of {rule.margin:g}"
    if decision.verdict is StepVerdict.CONTINUE:
        return f"Returns still continue at r = {last.to_rank}, the largest rank compared: {gain}."
    if decision.verdict is StepVerdict.STOP:
        return f"Returns have diminished at r = {last.from_rank}: {gain}."
    if increase is not None:
        added = (
            f"{increase.seeds} seeds" if increase.seeds is not None else f"{increase.items or 'many more'} test items"
        )
        return f"Not settled yet: {gain}. Run {added} in total and decide again."
    return f"Inconclusive: {gain}. {decision.would_settle}"


def _paired(smaller: Array, larger: Array) -> Array:
    """Return loss(smaller) − loss(larger), (seeds, items), for the seeds that both have."""
    if np.shape(smaller) != np.shape(larger):
        raise AnalysisError(
            f"losses of shape {np.shape(smaller)} and {np.shape(larger)} don't pair",
            "a doubling",
            "score both ranks with the same seeds on the same test items",
        )
    difference = as_losses(smaller) - as_losses(larger)
    missing = np.isnan(difference)
    partly = missing.any(axis=1) & ~missing.all(axis=1)
    if partly.any():
        raise AnalysisError(
            f"{int(missing[partly].sum())} items have no finite loss in {int(partly.sum())} of the runs",
            "per-item losses",
            "score every run on the same test items; leave out failed runs completely",
        )
    if missing.all():
        raise AnalysisError("the two ranks share no seed", "a doubling", "run both ranks with the same seeds")
    return difference[~missing.all(axis=1)]


def _sample_increase(
    split: VarianceSplit, interval: MarginBounds, items: int | None, rule: Rule
) -> SampleIncrease | None:
    """Return the totals to run; ``None`` if all allowed seeds were run."""
    if items is not None and needs_more_items(split, rule):
        item_sd = float(np.sqrt(split.item_part * items))
        # If eight seeds aren't enough with any number of items: the items needed for their part of the variance alone.
        needed = items_needed(_noise(split, items), MAX_SEEDS, rule) or items_needed(Noise(0.0, item_sd), 2, rule)
        return SampleIncrease(None, needed)
    if split.seeds >= MAX_SEEDS:
        return None
    return SampleIncrease(int(seeds_at_last_look(interval.half_width, split.seeds, rule)), None)


def _noise(split: VarianceSplit, items: int | None) -> Noise:
    return Noise(float(np.sqrt(split.seed_part * split.seeds)), float(np.sqrt(split.item_part * (items or 1))))


def _requirement(split: VarianceSplit, items: int | None, rule: Rule) -> str:
    if np.isnan(split.seed_part):
        return "It would take more than one seed a rank."
    noise = _noise(split, items)
    seeds = seeds_needed(noise, items or 1, rule)
    return requirement_sentence(seeds, items_needed(noise, MAX_SEEDS, rule) if items is not None else None)


def _known(value: Array) -> float | None:
    return float(value) if np.isfinite(value) else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Apply the rule to a simulated ladder: gains 0.09, 0.05, 0.005 nats per item, margin 0.02, 3 and 8 seeds."""
    from qlora_exp.analysis import figures

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--figure", type=Path, help="also draw the last answer's doublings into this HTML file")
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    item = rng.normal(0.9, 0.4, 1000)
    losses = {
        rank: item + level + rng.normal(0, 0.003, (MAX_SEEDS, 1)) + rng.normal(0, 0.1, (MAX_SEEDS, 1000))
        for rank, level in zip((8, 16, 32, 64), np.cumsum([0.0, -0.09, -0.05, -0.005]), strict=True)
    }
    print("| seeds | step | gain | low | high | decision |\n|---|---|---|---|---|---|")
    for seeds in (3, MAX_SEEDS):
        ladder = {rank: values[:seeds] for rank, values in losses.items()}
        result = decide_ladder(ladder, make_rule(0.02, 3), bought=(16, 32, 64) if seeds > 3 else ())
        for step in result.comparisons:
            d, ranks = step.decision, f"{step.from_rank} → {step.to_rank}"
            print(f"| {seeds} | {ranks} | {d.gain:.4f} | {d.low:.4f} | {d.high:.4f} | {d.verdict} |")
        print(f"\n{result.sentence}\n")
    if options.figure is not None:
        figures.write_figure(figures.ladder(as_object(result)), options.figure)


if __name__ == "__main__":
    main()
