"""Which configuration of a search to use now, and how much another one may be better."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats

from qlora_exp.analysis.comparable import answering_scores
from qlora_exp.analysis.configurations import Configuration, Measure, best_on_validation
from qlora_exp.analysis.margin import Margin
from qlora_exp.analysis.recommendation import (
    SEEDS_ADVISED,
    ComparisonVerdict,
    Recommendation,
    cost_words,
    joint_alpha,
    margin_in_score,
    margin_note,
    seeds_command,
    size_words,
)
from qlora_exp.analysis.report_content import StudyInfo

MAX_REPEATED = 8
"""Configurations that the proposed command repeats: the best and the ones that may be better by the most."""


def search_recommendation(
    candidates: Sequence[Configuration],
    measure: Measure,
    margin: Margin | None = None,
    studies: Sequence[StudyInfo] = (),
) -> Recommendation | None:
    """Return the configuration that is best on validation, and the most that another one may be better on test.

    ``None`` with fewer than two configurations, or without a score. The bound holds against all of them together with
    95 % (multiple comparisons with the best, Hsu 1981, Ann. Statist. 9, with Bonferroni's correction). It is over
    seeds, on these items.
    """
    scored = [c for c in candidates if c.quality is not None]
    best = best_on_validation(scored, measure)
    if best is None or best.quality is None or len(candidates) < 2:
        return None
    level, size = best.quality.mean, margin_in_score(margin, best.runs, measure.name)
    bounds: list[tuple[float, Configuration]] = []
    for other in scored:
        estimate = other.quality
        if other is best or estimate is None or estimate.se is None or estimate.df is None or best.quality.se is None:
            continue
        t = float(stats.t.isf(joint_alpha(len(candidates) - 1), estimate.df))
        ahead = measure.sign * (estimate.mean - best.quality.mean)
        bounds.append((ahead + t * math.hypot(estimate.se, best.quality.se), other))
    bounds.sort(key=lambda pair: -pair[0])
    complete = len(bounds) == len(candidates) - 1
    bound = max(0.0, bounds[0][0]) if complete else None
    ties = len(candidates) - 1 - sum(reach <= 0 for reach, _ in bounds)
    verdict = ComparisonVerdict.OPEN
    if bound == 0:
        verdict = ComparisonVerdict.BETTER
    elif bound is not None and size is not None and bound < size:
        verdict = ComparisonVerdict.EQUIVALENT
    interval = "one seed: no interval"
    if best.quality.low is not None and best.quality.high is not None:
        seeds = f"{best.quality.seeds} seed{'s' * (best.quality.seeds > 1)}"
        interval = f"95 % CI {best.quality.low:.4g} to {best.quality.high:.4g}, {seeds}"
    settle = command = None
    if verdict is ComparisonVerdict.OPEN:
        rivals = [other for reach, other in bounds if reach > 0][: MAX_REPEATED - 1]
        repeated = [best, *(rivals or [c for c in scored if c is not best][: MAX_REPEATED - 1])]
        wanted = SEEDS_ADVISED if best.quality.seeds < SEEDS_ADVISED else 2 * best.quality.seeds
        settle = f"{wanted} seeds of the {len(repeated)} configurations that may be the best would tell more."
        command = seeds_command(repeated, wanted, studies)
    shown = "It is shown to be better than all others."
    if ties:
        shown = f"It isn't shown to be better than {ties} of the others."
    without = len(candidates) - len(scored)
    why = f"{without} of them have no such score" if without else "no configuration has a second seed"
    note = margin_note(size, str(margin) if margin is not None else None, measure)
    rival = bounds[0][1].label if bounds else None
    return Recommendation(
        question="Which configuration?",
        use=best.label,
        verdict=str(verdict),
        evidence=(
            f"of {len(candidates)} configurations it is the best on validation; {_place(best)} it has {measure.words}"
            f" {best.quality.mean:.4g} ({interval}). {shown}"
        ),
        cost=cost_words(bound, rival, lambda x: size_words(x, measure, level), why),
        settle=settle,
        settle_command=command,
        regret_bound=bound,
        regret_against=rival,
        unit=measure.label,
        margin=size,
        margin_text=str(margin) if margin is not None else None,
        notes=(note,) if note is not None else (),
    )


def _place(configuration: Configuration) -> str:
    scored = answering_scores(configuration.first)
    return "on test" if scored is not None and scored.split == "test" else "there"
