"""Is the larger rank worth it? One doubling decided, and a ladder of them walked: pure functions over per-item losses.

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
from qlora_exp.analysis.rule import (
    FIRST_LOOK,
    LAST_LOOK,
    MOST_SEEDS,
    MarginBounds,
    Rule,
    StepVerdict,
    bounds,
    make_rule,
    needs_more_items,
    seeds_to_buy,
    t_quantiles,
    verdicts,
)
from qlora_exp.analysis.variance import Array, VarianceSplit, as_losses, rank_seed_mean_square, split_variance
from qlora_exp.errors import AnalysisError


@dataclass(frozen=True)
class PooledNoise:
    """MS_rank×seed over all ranks run (squared units of the score) and its degrees of freedom; ``None`` where there is
    no second seed to tell it by."""

    mean_square: float | None
    df: int


@dataclass(frozen=True)
class SampleIncrease:
    """What to add before the last look, each in all: seeds, or — where no number of seeds is enough — items."""

    seeds: int | None
    items: int | None


@dataclass(frozen=True)
class Decision:
    """The answer for one step. Units are the score's; ``None`` is unknown."""

    verdict: StepVerdict
    gain: float
    low: float | None
    """One-sided bound that decides *continue*."""
    high: float | None
    """One-sided bound that decides *stop*."""
    se: float | None
    df: float | None
    seeds: int
    items: int | None
    seed_part: float | None
    """A: the seeds' share of se², squared units."""
    item_part: float | None
    """B: the items' share of se²."""
    purchase: SampleIncrease | None = None
    what_it_takes: str | None = None
    """Where the verdict is *inconclusive*, and for a *buy*: what would settle it."""


@dataclass(frozen=True)
class Comparison:
    from_rank: int
    to_rank: int
    decision: Decision


@dataclass(frozen=True)
class RankAnswer:
    """What a ladder says. ``recommended_rank`` is ``None`` where it is inconclusive or still open."""

    verdict: StepVerdict
    recommended_rank: int | None
    rule: Rule
    comparisons: tuple[Comparison, ...]
    sentence: str


def pooled_noise(ladder: Sequence[Array]) -> PooledNoise:
    """MS_rank×seed over the ranks of ``ladder``, (seeds, items) or (seeds,); a run that doesn't exist is NaN."""
    mean_square, df = rank_seed_mean_square(np.stack([as_losses(losses).mean(axis=-1) for losses in ladder]))
    return PooledNoise(float(mean_square) if df > 0 else None, int(df))


def decide(smaller: Array, larger: Array, pooled: PooledNoise, rule: Rule, look: int) -> Decision:
    """Decide one doubling.

    Args:
        smaller, larger: losses of the two ranks, (seeds, items) or, for scores without items, (seeds,). Row s is the
            same seed and column i the same test item in both; a run that doesn't exist is a row of NaN.
        pooled: the noise over all ranks run.
        look: FIRST_LOOK, or LAST_LOOK after the purchase.

    Raises:
        AnalysisError: shapes that don't pair, missing items, no shared seed.
    """
    difference = _paired(smaller, larger)
    mean_square = np.array(np.nan if pooled.mean_square is None else pooled.mean_square)
    split = split_variance(difference, mean_square, np.array(float(pooled.df)))
    found = bounds(split, rule, look)
    enough, little = verdicts(split.gain, found, rule)
    items = difference.shape[1] if np.ndim(smaller) > 1 else None
    verdict, purchase, takes = StepVerdict.CONTINUE if enough else StepVerdict.STOP, None, None
    if not enough and not little:
        takes = _what_it_takes(split, items, rule)
        purchase = _purchase(split, found, items, rule) if look == FIRST_LOOK else None
        verdict = StepVerdict.INCONCLUSIVE if purchase is None else StepVerdict.BUY
    return Decision(
        verdict=verdict,
        gain=float(split.gain),
        low=_known(found.low),
        high=_known(found.high),
        se=_known(found.se),
        df=_known(found.df),
        seeds=int(split.seeds),
        items=items,
        seed_part=_known(split.seed_part),
        item_part=_known(split.item_part) if items is not None else None,
        purchase=purchase,
        what_it_takes=takes,
    )


def decide_doubling(
    run: Callable[[int], Sequence[Array] | None], first_seeds: int, rule: Rule, most_seeds: int = MOST_SEEDS
) -> Decision | None:
    """One doubling with its two looks and the one purchase between them.

    Args:
        run: seeds in all → losses of the ladder's ranks so far, the doubling's two last, both with so many seeds;
            ``None`` where runs are still missing.
        first_seeds: of the first look.
        most_seeds: in all; where that allows no purchase, the first look is the last.

    Returns:
        The decision, a *buy* while what was bought is missing; ``None`` while the first look's runs are.
    """
    ladder = run(first_seeds)
    if ladder is None:
        return None
    decision = decide(ladder[-2], ladder[-1], pooled_noise(ladder), rule, FIRST_LOOK)
    if decision.purchase is None:
        return decision
    if decision.purchase.seeds is None:
        return _items_are_missing(decision, decision.purchase.items)
    bought = min(max(decision.purchase.seeds, first_seeds + 1), most_seeds)
    if bought <= first_seeds:
        return replace(decision, verdict=StepVerdict.INCONCLUSIVE, purchase=None)
    ladder = run(bought)
    if ladder is None:
        return replace(decision, purchase=SampleIncrease(bought, None))
    return decide(ladder[-2], ladder[-1], pooled_noise(ladder), rule, LAST_LOOK)


def decide_from_summary(gain: float, se: float, rule: Rule, df: float = np.inf) -> Decision:
    """Decide from a published gain (positive is better) and its standard error with ``df`` degrees of freedom;
    infinite: taken as known (normal)."""
    t_continue, t_stop = t_quantiles(np.array(df), rule, LAST_LOOK)
    split = VarianceSplit(*(np.array(x) for x in (gain, se**2, 0.0, df, np.inf, 1.0)))
    found = bounds(split, rule, LAST_LOOK)
    enough, little = verdicts(split.gain, found, rule)
    verdict = StepVerdict.CONTINUE if enough else StepVerdict.STOP if little else StepVerdict.INCONCLUSIVE
    takes = None
    if verdict is StepVerdict.INCONCLUSIVE:
        needed = 2 * rule.half_zone / float(t_continue + t_stop)
        takes = f"It would take a standard error of the gain of at most {needed:.3g}; it is {se:.3g}."
    return Decision(verdict, gain, float(found.low), float(found.high), se, None, 1, None, None, None, None, takes)


def decide_ladder(
    ladder: Mapping[int, Array],
    rule: Rule,
    bought: Collection[int] = (),
    complete: bool = False,
    unit: str = "nats per item",
) -> RankAnswer:
    """The answer of the ladder as far as it has been run: *continue* asks for the next doubling, *buy* for seeds.

    Args:
        ladder: rank → losses as :func:`decide` takes them, with the same seeds and items at every rank.
        bought: the larger ranks of the doublings whose purchase has been made.
        complete: the ranks had all been run before anything was decided (a table, a grid): noise is pooled over all of
            them, and there is no second look. Otherwise each doubling is decided as it was when its turn came.
        unit: of the scores, for the sentence.

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
        pooled = pooled_noise([ladder[rank] for rank in (ranks if complete else ranks[: position + 2])])
        look = LAST_LOOK if complete or larger in bought else FIRST_LOOK
        decision = decide(ladder[smaller], ladder[larger], pooled, rule, look)
        comparisons.append(Comparison(smaller, larger, decision))
    return answer(comparisons, rule, unit)


def answer(comparisons: Sequence[Comparison], rule: Rule, unit: str) -> RankAnswer:
    """The ladder's answer: that of the first step that isn't *continue*; steps after it are told, not used."""
    last = next((c for c in comparisons if c.decision.verdict is not StepVerdict.CONTINUE), comparisons[-1])
    verdict = last.decision.verdict
    recommended = {StepVerdict.CONTINUE: last.to_rank, StepVerdict.STOP: last.from_rank}.get(verdict)
    return RankAnswer(verdict, recommended, rule, tuple(comparisons), _sentence(last, rule, unit))


def as_object(found: RankAnswer) -> dict[str, Any]:
    """The answer in plain JSON types, as ``analyze --json`` prints it and a sweep's record keeps it."""
    return {
        "decision": str(found.verdict),
        "recommended_rank": found.recommended_rank,
        "margin": found.rule.margin,
        "half_zone": found.rule.half_zone,
        "comparisons": [
            {
                "from_rank": step.from_rank,
                "to_rank": step.to_rank,
                "gain": step.decision.gain,
                "low": step.decision.low,
                "high": step.decision.high,
                "decision": str(step.decision.verdict),
            }
            for step in found.comparisons
        ],
        "what_it_takes": _open_end(found),
        "sentence": found.sentence,
    }


def _open_end(found: RankAnswer) -> str | None:
    """Of the step that ended the ladder undecided."""
    last = next((c.decision for c in found.comparisons if c.decision.verdict is not StepVerdict.CONTINUE), None)
    return last.what_it_takes if last is not None and last.verdict is StepVerdict.INCONCLUSIVE else None


def _sentence(last: Comparison, rule: Rule, unit: str) -> str:
    decision, step = last.decision, f"from r = {last.from_rank} to {last.to_rank}"
    gained = f"going {step} gains {_plain(decision.gain)} {unit}"
    if decision.low is not None and decision.high is not None:
        gained += f" [{_plain(decision.low)}, {_plain(decision.high)}]"
    against = f"against a margin of {rule.margin:g}"
    if decision.verdict is StepVerdict.CONTINUE:
        return f"Returns still continue at r = {last.to_rank}, the largest rank compared: {gained}, {against}."
    if decision.verdict is StepVerdict.STOP:
        return f"Returns have diminished at r = {last.from_rank}: {gained}, {against}."
    if decision.purchase is not None:
        bought = decision.purchase
        asked = f"{bought.seeds} seeds" if bought.seeds is not None else f"{bought.items or 'many more'} test items"
        return f"Not settled yet: {gained}, {against}. Run {asked} in all and look once more."
    return f"Inconclusive: {gained}, {against}. {decision.what_it_takes}"


def _paired(smaller: Array, larger: Array) -> Array:
    """loss(smaller) − loss(larger), (seeds, items), of the seeds that both have."""
    if np.shape(smaller) != np.shape(larger):
        raise AnalysisError(
            f"losses of shape {np.shape(smaller)} and {np.shape(larger)} don't pair",
            "a doubling",
            "score both ranks with the same seeds on the same test items",
        )
    difference = as_losses(smaller) - as_losses(larger)
    absent = np.isnan(difference)
    partly = absent.any(axis=1) & ~absent.all(axis=1)
    if partly.any():
        raise AnalysisError(
            f"{int(absent[partly].sum())} items have no finite loss in {int(partly.sum())} of the runs",
            "per-item losses",
            "score every run on the same test items; a run that failed is left out whole",
        )
    if absent.all():
        raise AnalysisError("the two ranks share no seed", "a doubling", "run both ranks with the same seeds")
    return difference[~absent.all(axis=1)]


def _purchase(split: VarianceSplit, found: MarginBounds, items: int | None, rule: Rule) -> SampleIncrease | None:
    """``None`` where all the seeds that may be bought are there already."""
    if items is not None and needs_more_items(split, rule):
        item_sd = float(np.sqrt(split.item_part * items))
        # Where eight seeds can't do even with all items, the number that the items' own part asks for.
        needed = items_needed(_noise(split, items), MOST_SEEDS, rule) or items_needed(Noise(0.0, item_sd), 2, rule)
        return SampleIncrease(None, needed)
    if split.seeds >= MOST_SEEDS:
        return None
    return SampleIncrease(int(seeds_to_buy(found.half_width, split.seeds, rule)), None)


def _items_are_missing(decision: Decision, items: int | None) -> Decision:
    takes = f"It would take {f'about {items}' if items else 'many more'} test items: more seeds can't settle it."
    return replace(decision, verdict=StepVerdict.INCONCLUSIVE, purchase=None, what_it_takes=takes)


def _noise(split: VarianceSplit, items: int | None) -> Noise:
    return Noise(float(np.sqrt(split.seed_part * split.seeds)), float(np.sqrt(split.item_part * (items or 1))))


def _what_it_takes(split: VarianceSplit, items: int | None, rule: Rule) -> str:
    if np.isnan(split.seed_part):
        return "It would take more than one seed a rank."
    noise = _noise(split, items)
    seeds = seeds_needed(noise, items or 1, rule)
    return requirement_sentence(seeds, items_needed(noise, MOST_SEEDS, rule) if items is not None else None)


def _known(value: Array) -> float | None:
    return float(value) if np.isfinite(value) else None


def _plain(value: float) -> str:
    return f"{value:+.3g}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The rule on a made-up ladder: gains 0.09, 0.05, 0.005 nats per item, margin 0.02, three seeds, then eight."""
    from qlora_exp.analysis import figures

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--figure", type=Path, help="also draw the last answer's doublings into this HTML file")
    given = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    item = rng.normal(0.9, 0.4, 1000)
    losses = {
        rank: item + level + rng.normal(0, 0.003, (MOST_SEEDS, 1)) + rng.normal(0, 0.1, (MOST_SEEDS, 1000))
        for rank, level in zip((8, 16, 32, 64), np.cumsum([0.0, -0.09, -0.05, -0.005]), strict=True)
    }
    print("| seeds | step | gain | low | high | decision |\n|---|---|---|---|---|---|")
    for seeds in (3, MOST_SEEDS):
        ladder = {rank: values[:seeds] for rank, values in losses.items()}
        found = decide_ladder(ladder, make_rule(0.02, 3), bought=(16, 32, 64) if seeds > 3 else ())
        for step in found.comparisons:
            d = step.decision
            print(
                f"| {seeds} | {step.from_rank} → {step.to_rank} | {d.gain:.4f} | {d.low:.4f} | {d.high:.4f} |", end=""
            )
            print(f" {d.verdict} |")
        print(f"\n{found.sentence}\n")
    if given.figure is not None:
        figures.write_figure(figures.ladder(as_object(found)), given.figure)


if __name__ == "__main__":
    main()
