"""The path of a ladder: which ranks are compared, with how many seeds, until returns diminish or nothing decides.

At rank r the walk compares r with 4r first, against two margins. *Continue* goes on from 4r, and 2r is never run.
Otherwise r → 2r and 2r → 4r are decided, each by one margin. So a stop at r always knows what 4r gains in all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qlora_exp.analysis.rank import (
    Comparison,
    Look,
    RankAnswer,
    answer,
    decide,
    deciding_step,
    rank_to_use,
    regret_of,
    share_a_seed,
)
from qlora_exp.analysis.rank_rule import Rule, SeedPlan, StepVerdict
from qlora_exp.analysis.variance import Array

LossesOf = Callable[[Mapping[int, int]], Mapping[int, Array] | None]
"""Rank → seeds wanted, to rank → losses of every rank requested so far, (plan.most, items), NaN for runs that weren't
requested or left no result. ``None``: runs are still missing. Requests only grow."""


@dataclass(frozen=True)
class Walk:
    """A ladder as far as it went."""

    comparisons: tuple[Comparison, ...]
    """The last one is *buy* if its next look still lacks runs."""
    pending: bool
    """Runs are missing: the walk isn't finished."""
    rule: Rule | None
    """``None`` until the losses are there from which it follows."""
    losses: Mapping[int, Array]
    """Rank → losses at the last look."""
    requested: Mapping[int, int]
    """Rank → seeds requested at the last look."""

    @property
    def verdict(self) -> StepVerdict | None:
        return deciding_step(self.comparisons).decision.verdict if self.comparisons else None

    def answer(self, plan: SeedPlan, unit: str) -> RankAnswer | None:
        """Return the answer so far; ``None`` before the first look."""
        if not self.comparisons or self.rule is None:
            return None
        regret = regret_of(self.losses, rank_to_use(self.comparisons), self.rule, plan, self.requested)
        return answer(self.comparisons, self.rule, unit, regret)


def walk(
    ranks: Sequence[int],
    plan: SeedPlan,
    rule_of: Callable[[Mapping[int, Array]], Rule],
    losses: LossesOf,
    probe: bool = True,
) -> Walk:
    """Walk a ladder as far as its runs allow.

    Args:
        ranks: each twice the one before, at least two.
        rule_of: losses of the first comparison's first look → the rule, which then holds for the whole ladder.
        probe: compare r with 4r first. Ladders of the rule's first edition doubled only, and have no runs at 4r.

    Raises:
        AnalysisError: losses that don't pair, or two ranks that share no seed at the last look.
    """
    path = _Path(ranks, plan, rule_of, losses)
    start = 0
    while start < len(ranks) - 1:
        if probe and start + 2 < len(ranks):
            verdict = path.compare(start, start + 2)
            if verdict is StepVerdict.CONTINUE:
                start += 2
                continue
            if verdict is None:
                break
        for smaller in range(start, min(start + 2, len(ranks) - 1)):
            verdict = path.compare(smaller, smaller + 1)
            if verdict is not StepVerdict.CONTINUE:
                return path.walk()
        start += 2
    return path.walk()


class _Path:
    def __init__(
        self,
        ranks: Sequence[int],
        plan: SeedPlan,
        rule_of: Callable[[Mapping[int, Array]], Rule],
        losses: LossesOf,
    ) -> None:
        self.ranks, self.plan, self.rule_of, self.losses = ranks, plan, rule_of, losses
        self.rule: Rule | None = None
        self.known: Mapping[int, Array] = {}
        self.comparisons: list[Comparison] = []
        self.requested: dict[int, int] = {}
        self.seen: dict[int, int] = {}
        """Rank → seeds requested at the last look whose runs are all there."""
        self.pending = False

    def walk(self) -> Walk:
        return Walk(tuple(self.comparisons), self.pending, self.rule, self.known, self.seen)

    def compare(self, smaller: int, larger: int) -> StepVerdict | None:
        """Decide one step with as many seeds as it needs; ``None``: runs are missing."""
        a, b = self.ranks[smaller], self.ranks[larger]
        decided: Comparison | None = None
        # Both ranks may have more seeds than the first look needs, from other steps.
        shared = min(self.requested.get(a, 0), self.requested.get(b, 0))
        for seeds in range(max(self.plan.first, shared), self.plan.most + 1):
            self.requested |= {rank: max(self.requested.get(rank, 0), seeds) for rank in (a, b)}
            known = self.losses({a: seeds, b: seeds})
            if known is None:
                self.pending = True
                if decided is not None:
                    self.comparisons.append(decided)
                return None
            self.known, self.seen = known, dict(self.requested)
            if seeds < self.plan.most and not share_a_seed(known[a], known[b]):
                continue  # all shared seeds were lost so far; without any at the last look, decide() says so
            if self.rule is None:
                self.rule = self.rule_of(known)
            rule = self.rule.over(larger - smaller)
            decided = Comparison(a, b, decide(known[a], known[b], list(known.values()), rule, Look(self.plan, seeds)))
            if decided.decision.verdict is not StepVerdict.BUY:
                break
        assert decided is not None  # a plan has at least one look
        self.comparisons.append(decided)
        return decided.decision.verdict
