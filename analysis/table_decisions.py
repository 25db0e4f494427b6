"""Decide each step of a table: paired over shared seeds, unpaired (Welch), or from published standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from qlora_exp.analysis.rank import (
    Comparison,
    Decision,
    RankAnswer,
    Regret,
    answer,
    decide,
    decide_from_summary,
    rank_to_use,
)
from qlora_exp.analysis.rank_rule import Rule, StepVerdict
from qlora_exp.analysis.table_columns import Columns
from qlora_exp.analysis.table_results import Result
from qlora_exp.analysis.variance import Array
from qlora_exp.errors import AnalysisError

LossesByRank = dict[int, Array]
"""Rank → (seeds, items), NaN for a missing run."""

StepDecision = Callable[[int, int, Rule], Decision]
"""(rank, larger or other rank, the rule of the whole step) → its decision."""


def decide_results(
    results: Sequence[Result], ranks: Sequence[int], rule: Rule, columns: Columns, where: str
) -> tuple[RankAnswer, list[str]]:
    """Return the answer, and notes on what it rests on. ``rule`` is that of one doubling.

    Raises:
        AnalysisError: a run lacks some of the items.
    """
    losses = [replace(result, score=-result.score) for result in results] if columns.higher_is_better else results
    seeds = sorted({result.seed or "" for result in results})
    items = sorted({result.item for result in results if result.item is not None})
    with_se = [result for result in results if result.se is not None]
    step = 0.0 if items else 10.0 ** -max(result.decimals for result in results)
    one_run_a_rank = len({(result.rank, result.seed) for result in results}) == len(ranks)
    unit = f"in {columns.score}"
    if one_run_a_rank and not items and len(with_se) == len(results):
        published, notes = _published_steps(losses, columns)
        steps = _steps(published, ranks, rule)
        # Intervals that lack the seeds' noise don't bound what a rank may cost.
        regret = None if columns.items_only else _regret(published, steps, ranks, rule)
        return answer(steps, rule, unit, regret), [*notes, *_near_resolution(rule, step)]
    notes = []
    if one_run_a_rank:
        notes.append(
            "One run per rank: the gains are those of these runs. How much of a gain is due to the seed is unknown, so"
            " the table shows neither that returns continue nor that they have diminished."
        )
    elif not items:
        notes.append("Scores without items: the answer is for these test items, not for others.")
    if with_se and len(with_se) == len(results):
        notes.append("The standard errors are not used: seeds and items show the noise more precisely.")
    elif with_se:
        notes.append("The standard errors are not used: only some rows have one.")
    ladder = _loss_arrays(losses, ranks, seeds, items, where)

    def decided(a: int, b: int, of_step: Rule) -> Decision:
        return _with_rounding(_step(ladder, a, b, of_step, [], bool(items)), of_step, step)

    steps = _steps(lambda a, b, of_step: _step(ladder, a, b, of_step, notes, bool(items)), ranks, rule)
    if any(one.decision.se is not None and one.decision.se < 1e-12 for one in steps):
        notes.append(
            "At some step every seed gave exactly the same gain: the seed changed nothing, or the scores are rounded."
            " The interval may be too narrow."
        )
    widened = _steps(decided, ranks, rule)
    if changed := [
        f"r = {one.from_rank} → {one.to_rank}" for one, old in zip(widened, steps, strict=True) if one != old
    ]:
        notes.append(
            f"The scores are written to {step:g}, and the gains differ less between seeds at {', '.join(changed)}: the"
            f" interval there contains what rounding can change, ± {step:g}."
        )
    else:
        notes += _near_resolution(rule, step)
    return answer(widened, rule, unit, _regret(decided, widened, ranks, rule)), notes


def _steps(decided: StepDecision, ranks: Sequence[int], rule: Rule) -> list[Comparison]:
    """Return the decision of each step between neighbouring ranks; each of its doublings has to gain the margin."""
    return [Comparison(a, b, decided(a, b, rule.over(math.log2(b / a)))) for a, b in pairwise(ranks)]


def _regret(decided: StepDecision, steps: Sequence[Comparison], ranks: Sequence[int], rule: Rule) -> Regret | None:
    """Return the most that the rank to use may cost against any other rank; ``None`` if one bound is unknown."""
    use = rank_to_use(steps)
    highs = [(decided(use, rank, rule).high, rank) for rank in ranks if rank != use]
    known = [(high, rank) for high, rank in highs if high is not None]
    if len(known) < len(highs):
        return None
    bound, rank = max(known)
    return Regret(max(bound, 0.0), rank)


def _published_steps(losses: Sequence[Result], columns: Columns) -> tuple[StepDecision, list[str]]:
    by_rank = {result.rank: result for result in losses}
    only_items = columns.items_only

    def decided(a: int, b: int, rule: Rule) -> Decision:
        decision = _decide_published(by_rank[a], by_rank[b], rule)
        return _without_seeds(decision) if only_items else decision

    known = "come from the runs of each score (Welch's degrees of freedom), and two ranks' scores count as"
    if all(math.isinf(result.df) for result in losses):
        known = "count as exact, and two ranks' scores as"
    paired = "Paired results (the same seeds and items at every rank) would be more precise."
    notes = [f"The standard errors {known} independent. {paired}"]
    if columns.items_only:
        column = columns.named["se"]
        notes = [
            f"{column!r} is the standard error over the test items, as lm-eval computes it, and each rank has one run."
            " The intervals contain the noise of the items but not that of the training seed, so they show neither that"
            " returns continue nor that they have diminished. If it is the standard error over several seeds, call the"
            " column se."
        ]
    return decided, notes


def _without_seeds(decision: Decision) -> Decision:
    return replace(
        decision,
        verdict=StepVerdict.INCONCLUSIVE,
        would_settle="It would take more than one seed a rank: the interval has the noise of the test items only.",
    )


def _decide_published(smaller: Result, larger: Result, rule: Rule) -> Decision:
    se = math.hypot(smaller.se or 0.0, larger.se or 0.0)
    spread = sum((result.se or 0.0) ** 4 / result.df for result in (smaller, larger))
    return decide_from_summary(smaller.score - larger.score, se, rule, se**4 / spread if spread else math.inf)


def _step(ladder: LossesByRank, a: int, b: int, rule: Rule, notes: list[str], has_items: bool) -> Decision:
    """Decide one step: paired if at least two seeds are shared, or if no other comparison is possible."""
    runs = {rank: ~np.isnan(values).all(axis=1) for rank, values in ladder.items()}
    counts = {rank: int(runs[rank].sum()) for rank in (a, b)}
    shared = int((runs[a] & runs[b]).sum())
    if shared >= 2 or (shared == 1 and min(counts.values()) == 1):
        values = {rank: array if has_items else array[:, 0] for rank, array in ladder.items()}
        decision = decide(values[a], values[b], list(values.values()), rule)
        if shared < max(counts.values()):
            notes.append(
                f"r = {a} and r = {b} share {shared} of their seeds ({counts[a]} and {counts[b]} runs): only these are"
                " paired."
            )
            if decision.low is None:
                settle = f"It would take two seeds that r = {a} and r = {b} share, or two runs of each."
                decision = replace(decision, would_settle=settle)
        return decision
    if max(counts.values()) > 1:
        seeds = "no seed" if shared == 0 else "one seed only"
        notes.append(
            f"r = {a} and r = {b} share {seeds}: their runs are compared without pairs (Welch), which is less precise."
        )
    return _unpaired(ladder[a][runs[a]], ladder[b][runs[b]], (a, b), rule)


def _unpaired(smaller: Array, larger: Array, ranks: tuple[int, int], rule: Rule) -> Decision:
    """Decide from runs with different seeds on the same items, by Welch's test.

    Args:
        smaller, larger: losses of the two ranks, (runs, items).

    The variance of the gain has the runs' part of each rank, and the items' part of the mean difference, in which the
    noise of the runs is subtracted as in docs/statistics.md's B.
    """
    gain = float(smaller.mean() - larger.mean())
    single = [rank for rank, losses in zip(ranks, (smaller, larger), strict=True) if len(losses) < 2]
    if single:
        lacking = " and ".join(f"r = {rank}" for rank in single)
        settle = f"It would take at least two runs of each rank; {lacking} {'has' if len(single) == 1 else 'have'} one."
        if len(single) == 2:
            settle = "It would take more than one seed a rank."
        return Decision(StepVerdict.INCONCLUSIVE, gain, None, None, None, would_settle=settle)
    items = smaller.shape[1]
    parts = [(float(losses.mean(axis=1).var(ddof=1)) / len(losses), len(losses) - 1) for losses in (smaller, larger)]
    if items > 1:
        residual = 0.0
        for losses in (smaller, larger):
            rest = losses - losses.mean(axis=1, keepdims=True) - losses.mean(axis=0) + losses.mean()
            residual += float((rest**2).sum()) / ((len(losses) - 1) * (items - 1)) / len(losses)
        by_item = float((smaller.mean(axis=0) - larger.mean(axis=0)).var(ddof=1))
        parts.append((max(0.0, by_item - residual) / items, items - 1))
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / df for part, df in parts)
    df = variance**2 / spread if spread > 0 else float(len(smaller) + len(larger) - 2)
    decision = decide_from_summary(gain, math.sqrt(variance), rule, df)
    return replace(decision, df=df, seeds=min(len(smaller), len(larger)), items=items if items > 1 else None)


def _with_rounding(decision: Decision, rule: Rule, step: float) -> Decision:
    """Return the decision with bounds that contain rounding, where the seeds' noise is smaller than the rounding.

    Noise larger than a step averages rounding errors out, and its variance contains theirs. Without such noise all
    seeds are rounded alike: each mean is off by half a step at most, and the gain by a step.
    """
    if decision.low is None or decision.high is None or decision.se is None:
        return decision
    # A difference of two rounded scores has the standard deviation step / √6.
    if decision.se * math.sqrt(decision.seeds) >= step / math.sqrt(6):
        return decision
    low, high = min(decision.low, decision.gain - step), max(decision.high, decision.gain + step)
    continues, stops = low > rule.margin - rule.half_zone, high < rule.margin + rule.half_zone
    if continues and stops:
        continues, stops = decision.gain > rule.margin, decision.gain <= rule.margin
    verdict = StepVerdict.CONTINUE if continues else StepVerdict.STOP if stops else StepVerdict.INCONCLUSIVE
    settle = decision.would_settle
    if verdict is StepVerdict.INCONCLUSIVE and decision.verdict is not verdict:
        settle = f"It would take scores with more decimals: these are written to {step:g}."
    return replace(decision, verdict=verdict, low=low, high=high, would_settle=settle)


def _near_resolution(rule: Rule, step: float) -> list[str]:
    """Return a note if rounding can change a gain by a considerable part of the half-zone."""
    if rule.half_zone > 2 * step:
        return []
    return [
        f"The scores are written to {step:g}, and the margin is {rule.margin:g}: if they are rounded, that alone can"
        f" change a gain by up to {step:g}."
    ]


def _loss_arrays(
    losses: Sequence[Result], ranks: Sequence[int], seeds: Sequence[str], items: Sequence[str], where: str
) -> LossesByRank:
    """Return rank → (seeds, items), with one column for scores without items.

    Raises:
        AnalysisError: runs scored on different items.
    """
    seed_of, item_of = ({name: number for number, name in enumerate(names)} for names in (seeds, items))
    ladder = {rank: np.full((len(seeds), max(len(items), 1)), np.nan) for rank in ranks}
    for result in losses:
        item = 0 if result.item is None else item_of[result.item]
        ladder[result.rank][seed_of[result.seed or ""], item] = result.score
    for rank, values in ladder.items():
        missing = np.isnan(values)
        incomplete = np.flatnonzero(missing.any(axis=1) & ~missing.all(axis=1))
        if incomplete.size:
            lacks = f"r = {rank}, seed {seeds[incomplete[0]]} lacks some of the {len(items)} items"
            raise AnalysisError(lacks, where, "score every run on the same items")
    return ladder
