"""Is the larger rank worth it? Decides one doubling, or a ladder of them: pure functions over per-item losses.

The rule, its formulas and its sources are in docs/statistics.md, its measured error rates in docs/calibration.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qlora_exp.analysis.power import Noise, items_needed, requirement_sentence
from qlora_exp.analysis.rank_rule import (
    FUTILE,
    MAX_SEEDS,
    ONE_LOOK,
    Rule,
    SeedPlan,
    StepVerdict,
    bounds,
    decision_probability,
    lost_run_splits,
    make_rule,
    verdicts,
)
from qlora_exp.analysis.variance import Array, VarianceSplit, as_losses, rank_seed_mean_square, split_variance
from qlora_exp.errors import AnalysisError

LIKELY = 0.8
"""Advice names the fewest seeds with which the last look decides with at least this probability."""


@dataclass(frozen=True)
class Look:
    """One look of a ladder at a step."""

    plan: SeedPlan
    seeds: int
    """Seeds requested at both ranks. A run before this number that is missing at one rank only was lost."""

    @property
    def share(self) -> float:
        return self.plan.share(self.seeds)

    @property
    def may_add(self) -> bool:
        return self.seeds < self.plan.most


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
    """Seeds that both ranks share."""
    items: int | None = None
    """Test items, or groups of items."""
    lost_runs: int = 0
    """Runs of one rank that left no result although the other rank's run with the same seed did."""
    seed_part: float | None = None
    """A: the seeds' share of se², squared units."""
    item_part: float | None = None
    """B: the items' share of se²."""
    hopeless: bool = False
    """The last look would decide with a probability below 10 %: no seeds are added."""
    would_settle: str | None = None
    """What would settle the step, if the verdict is *inconclusive* or *buy*."""
    settling_seeds: int | None = None
    """Seeds per rank with which the step would probably be decided; ``None``: more than 64, or unknown."""


@dataclass(frozen=True)
class Comparison:
    """One step of a ladder, from a rank to a larger one: two or four times as large, or any other in a table."""

    from_rank: int
    to_rank: int
    decision: Decision

    @property
    def doublings(self) -> float:
        """How many doublings the step is; each of them has to gain the margin."""
        return float(np.log2(self.to_rank / self.from_rank))


@dataclass(frozen=True)
class Regret:
    """The most that a rank may cost in the score against any other rank that was run."""

    bound: float
    """In units of the score, ≥ 0."""
    rank: int
    """The other rank."""


@dataclass(frozen=True)
class RankAnswer:
    """A ladder's answer. ``recommended_rank`` is ``None`` if the ladder is inconclusive or not finished."""

    verdict: StepVerdict
    recommended_rank: int | None
    use_rank: int
    """The rank to use now: the recommended one, or the one at which the ladder couldn't decide."""
    rule: Rule
    comparisons: tuple[Comparison, ...]
    sentence: str
    regret: Regret | None = None
    """``None``: unknown."""

    @property
    def deciding(self) -> Decision:
        return deciding_step(self.comparisons).decision


def decide(
    smaller: Array,
    larger: Array,
    ladder: Sequence[Array],
    rule: Rule,
    look: Look | None = None,
) -> Decision:
    """Decide one step.

    Args:
        smaller, larger: losses of the two ranks, (seeds, items) or, for scores without items, (seeds,). Row s is the
            same seed and column i the same test item (or group of items) in both; a missing run is a row of NaN.
        ladder: losses of all ranks run, these two among them: they show how much the seeds vary.
        rule: the margin of the whole step (:meth:`~qlora_exp.analysis.rank_rule.Rule.over`).
        look: ``None``: a single look at results that were all there beforehand.

    Raises:
        AnalysisError: shapes that don't pair, missing items, no shared seed.
    """
    differences = _paired(smaller, larger)
    pooled = rank_seed_mean_square(np.stack([as_losses(losses).mean(axis=-1) for losses in ladder]))
    split = split_variance(differences, *pooled)
    requested = np.arange(len(differences)) < (look.seeds if look is not None else 0)
    lost = [
        requested & np.isnan(as_losses(a)).all(axis=1) & ~np.isnan(as_losses(b)).any(axis=1)
        for a, b in ((larger, smaller), (smaller, larger))
    ]
    for_low, for_high = lost_run_splits(split, differences.mean(axis=-1), lost[0], lost[1], rule, *pooled)
    interval = bounds(for_low, for_high, ONE_LOOK if look is None else look.share)
    continues, stops = verdicts(split.gain, interval, rule)
    items = differences.shape[1] if np.ndim(smaller) > 1 else None
    verdict = StepVerdict.CONTINUE if continues else StepVerdict.STOP if stops else StepVerdict.INCONCLUSIVE
    hopeless, requirement, settling = False, None, None
    if verdict is StepVerdict.INCONCLUSIVE:
        requirement, settling = _requirement(split, items, rule, look.plan if look is not None else SeedPlan())
        if look is not None and look.may_add:
            hopeless = is_hopeless(split, rule, look.plan)
            verdict = verdict if hopeless else StepVerdict.BUY
    return Decision(
        verdict=verdict,
        gain=float(split.gain),
        low=_known(interval.low),
        high=_known(interval.high),
        se=_known(interval.se),
        df=_known(interval.df),
        seeds=int(split.seeds),
        items=items,
        lost_runs=int(lost[0].sum() + lost[1].sum()),
        seed_part=_known(split.seed_part),
        item_part=_known(split.item_part) if items is not None else None,
        hopeless=hopeless,
        would_settle=requirement,
        settling_seeds=settling,
    )


def share_a_seed(smaller: Array, larger: Array) -> bool:
    """Return whether a seed left a result at both ranks; losses as :func:`decide` takes them."""
    return bool((~np.isnan(as_losses(smaller)) & ~np.isnan(as_losses(larger))).all(axis=1).any())


def is_hopeless(split: VarianceSplit, rule: Rule, plan: SeedPlan) -> bool:
    """Return whether the last look of the plan would decide with a probability below 10 %."""
    return bool(decision_probability(split, rule, plan.most, plan.share(plan.most)) < FUTILE)


def decide_from_summary(gain: float, se: float, rule: Rule, df: float = np.inf) -> Decision:
    """Decide from a published gain (positive is better) and its standard error.

    ``df``: degrees of freedom of ``se``; infinite: ``se`` is exact, and the gain is normal.
    """
    split = VarianceSplit(*(np.array(x) for x in (gain, se**2, 0.0, df, np.inf, 1.0)))
    interval = bounds(split, split)
    continues, stops = verdicts(split.gain, interval, rule)
    verdict = StepVerdict.CONTINUE if continues else StepVerdict.STOP if stops else StepVerdict.INCONCLUSIVE
    requirement = None
    if verdict is StepVerdict.INCONCLUSIVE:
        needed = se * rule.half_zone / float(interval.half_width)
        requirement = f"It would take a standard error of the gain of at most {needed:.3g}; it is {se:.3g}."
    return Decision(verdict, gain, float(interval.low), float(interval.high), se, would_settle=requirement)


def decide_ladder(ladder: Mapping[int, Array], rule: Rule, unit: str = "nats per item") -> RankAnswer:
    """Return the answer of a ladder of which all ranks were run before anything was decided: a table, or a grid.

    Noise is pooled over all ranks, and each step has a single look.

    Args:
        ladder: rank → losses as :func:`decide` takes them, with the same seeds and items at every rank.
        rule: the margin of one doubling.
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
    runs = [ladder[rank] for rank in ranks]
    comparisons = [
        Comparison(a, b, decide(ladder[a], ladder[b], runs, rule.over(float(np.log2(b / a)))))
        for a, b in pairwise(ranks)
    ]
    return answer(comparisons, rule, unit, regret_of(ladder, rank_to_use(comparisons), rule))


def rank_to_use(comparisons: Sequence[Comparison]) -> int:
    """Return the rank to use now: where returns diminished, else the smaller rank of the step that is undecided.

    A larger rank has to earn its cost, so an undecided step doesn't recommend it.
    """
    last = deciding_step(comparisons)
    return last.to_rank if last.decision.verdict is StepVerdict.CONTINUE else last.from_rank


def regret_of(
    ladder: Mapping[int, Array],
    use: int,
    rule: Rule,
    plan: SeedPlan | None = None,
    requested: Mapping[int, int] | None = None,
) -> Regret | None:
    """Return the largest upper bound of what another rank gains over ``use``; ``None`` if a bound is unknown.

    Args:
        ladder: rank → losses as :func:`decide` takes them, of every rank that was run.
        plan, requested: the looks of the ladder, and rank → seeds requested.
    """
    runs = list(ladder.values())
    worst: Regret | None = None
    for rank in sorted(ladder.keys() - {use}):
        look = Look(plan, min(requested[use], requested[rank])) if plan and requested else None
        try:
            of_step = rule.over(max(1.0, abs(float(np.log2(rank / use)))))
            high = decide(ladder[use], ladder[rank], runs, of_step, look).high
        except AnalysisError:
            return None
        if high is None:
            return None
        if worst is None or high > worst.bound:
            worst = Regret(high, rank)
    return worst and Regret(max(worst.bound, 0.0), worst.rank)


def answer(comparisons: Sequence[Comparison], rule: Rule, unit: str, regret: Regret | None = None) -> RankAnswer:
    """Return the ladder's answer: the first step that isn't *continue* decides; later steps are listed, not used."""
    last = deciding_step(comparisons)
    verdict = last.decision.verdict
    use = rank_to_use(comparisons)
    recommended = use if verdict in (StepVerdict.CONTINUE, StepVerdict.STOP) else None
    sentence = _sentence(last, tuple(comparisons), use, rule, unit, regret)
    return RankAnswer(verdict, recommended, use, rule, tuple(comparisons), sentence, regret)


def as_object(result: RankAnswer) -> dict[str, Any]:
    """Return the answer in plain JSON types, as ``analyze --json`` prints it and a sweep's record stores it."""
    last = result.deciding
    return {
        "decision": str(result.verdict),
        "recommended_rank": result.recommended_rank,
        "use_rank": result.use_rank,
        "regret_bound": result.regret.bound if result.regret is not None else None,
        "regret_rank": result.regret.rank if result.regret is not None else None,
        "margin": result.rule.margin,
        "half_zone": result.rule.half_zone,
        "comparisons": [
            {
                "from_rank": step.from_rank,
                "to_rank": step.to_rank,
                "doublings": step.doublings,
                "margin": result.rule.margin * step.doublings,
                "gain": step.decision.gain,
                "low": step.decision.low,
                "high": step.decision.high,
                "seeds": step.decision.seeds,
                "items": step.decision.items,
                "lost_runs": step.decision.lost_runs,
                "decision": str(step.decision.verdict),
            }
            for step in result.comparisons
        ],
        "would_settle": last.would_settle if last.verdict is StepVerdict.INCONCLUSIVE else None,
        "sentence": result.sentence,
    }


def deciding_step(comparisons: Sequence[Comparison]) -> Comparison:
    """Return the step that decides: the first one that isn't *continue*, else the last one.

    A step r → 4r that isn't *continue* decides only if no step r → 2r follows it.
    """
    for position, step in enumerate(comparisons):
        bisected = position + 1 < len(comparisons) and comparisons[position + 1].from_rank == step.from_rank
        if step.decision.verdict is not StepVerdict.CONTINUE and not bisected:
            return step
    return comparisons[-1]


def _sentence(
    last: Comparison, comparisons: Sequence[Comparison], use: int, rule: Rule, unit: str, regret: Regret | None
) -> str:
    decision = last.decision
    gain = f"going from r = {last.from_rank} to {last.to_rank} gains {decision.gain:+.3g} {unit}"
    if decision.low is not None and decision.high is not None:
        gain += f" (95 % CI {decision.low:+.3g} to {decision.high:+.3g})"
    of_step = rule.over(last.doublings)
    limits = f"stop below {of_step.margin + of_step.half_zone:.3g}, continue above"
    limits += f" {of_step.margin - of_step.half_zone:.3g}"
    if last.doublings != 1:
        limits = f"{rule.margin:.3g} per doubling; {limits}"
    gain += f", against a margin of {of_step.margin:.3g} ({limits})"
    cost = " What it may cost at most is unknown."
    if regret is not None:
        cost = f" It costs at most {regret.bound:.3g} {unit} against r = {regret.rank}."
    if decision.verdict is StepVerdict.BUY:
        return f"Use r = {use} for now.{cost} Not settled yet: {gain}. The next look needs one more seed."
    if decision.verdict is StepVerdict.CONTINUE:
        verdict = f"Returns still continue at r = {last.to_rank}, the largest rank compared: {gain}."
    elif decision.verdict is StepVerdict.STOP:
        verdict = f"Returns have diminished at r = {last.from_rank}: {gain}."
    else:
        verdict = f"Inconclusive: {gain}. {decision.would_settle}"
    lost = f" {decision.lost_runs} lost runs count against their rank." if decision.lost_runs else ""
    return f"Use r = {use}.{cost} {verdict}{_probe(last, comparisons, unit)}{lost}"


def _probe(last: Comparison, comparisons: Sequence[Comparison], unit: str) -> str:
    """Return what the larger rank of an earlier comparison gains over the one at which returns have diminished."""
    probes = [step for step in comparisons if step.from_rank == last.from_rank and step.to_rank > last.to_rank]
    if last.decision.verdict is not StepVerdict.STOP or not probes:
        return ""
    probe = probes[-1].decision
    interval = ""
    if probe.low is not None and probe.high is not None:
        interval = f" (95 % CI {probe.low:+.3g} to {probe.high:+.3g})"
    return f" r = {probes[-1].to_rank} gains {probe.gain:+.3g} {unit}{interval} over r = {last.from_rank} in all."


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
    difference[missing.all(axis=1)] = np.nan
    return difference


def _requirement(split: VarianceSplit, items: int | None, rule: Rule, plan: SeedPlan) -> tuple[str, int | None]:
    """Return what would settle the step in words, and the seeds that would probably do it."""
    if np.isnan(split.seed_part):
        return "It would take more than one seed a rank.", None
    for most in range(max(int(split.seeds) + 1, plan.first), MAX_SEEDS + 1):
        looks = SeedPlan(min(plan.first, most), most)
        if decision_probability(split, rule, most, looks.share(most)) >= LIKELY:
            return f"It would take about {most} seeds a rank.", most
    noise = Noise(float(np.sqrt(split.seed_part * split.seeds)), float(np.sqrt(split.item_part * (items or 1))))
    return requirement_sentence(None, items_needed(noise, plan, rule) if items is not None else None, plan), None


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
        rank: item + level + rng.normal(0, 0.003, (8, 1)) + rng.normal(0, 0.1, (8, 1000))
        for rank, level in zip((8, 16, 32, 64), np.cumsum([0.0, -0.09, -0.05, -0.005]), strict=True)
    }
    print("| seeds | step | gain | low | high | decision |\n|---|---|---|---|---|---|")
    for seeds in (3, 8):
        result = decide_ladder({rank: values[:seeds] for rank, values in losses.items()}, make_rule(0.02))
        for step in result.comparisons:
            d, ranks = step.decision, f"{step.from_rank} → {step.to_rank}"
            print(f"| {seeds} | {ranks} | {d.gain:.4f} | {d.low:.4f} | {d.high:.4f} | {d.verdict} |")
        print(f"\n{result.sentence}\n")
    if options.figure is not None:
        figures.write_figure(figures.ladder(as_object(result)), options.figure)


if __name__ == "__main__":
    main()
