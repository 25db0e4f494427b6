"""Is the business goal met beyond noise, and which configuration that meets it is the cheapest?"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from qlora_exp.analysis.configurations import Configuration, pooled_sd
from qlora_exp.analysis.contrasts import GroupScores, ItemScores
from qlora_exp.analysis.recommendation import (
    MAX_SEEDS_ADVISED,
    SEEDS_ADVISED,
    TAIL,
    Recommendation,
    seeds_command,
)
from qlora_exp.analysis.report_content import StudyInfo
from qlora_exp.records.types import Goal, RunRecord

RECORDED_TAIL = 0.05
"""Error rate of the one-sided bounds over items that records have."""
MET, NOT_MET, OPEN = "met", "not met", "not settled"


@dataclass(frozen=True)
class GoalAnswer:
    """Whether ``task.goal`` is met at one configuration, beyond noise. ``None`` is unknown."""

    text: str
    split: str
    verdict: str
    """``met``, ``not met`` or ``not settled``: the whole interval meets the goal, none of it does, or neither."""
    chosen: Configuration | None
    """The configuration of the interval: the requested one, else the cheapest one that is shown to meet the goal, else
    the best one."""
    value: float | None
    low: float | None
    """Ends of the 95 % interval over seeds and items. If the configuration was chosen among K, each end's error rate is
    2.5 % / K."""
    high: float | None
    shown: int
    """How many configurations are shown to meet the goal."""
    cheapest: Configuration | None
    """Of these, the one with the least memory, then time."""
    seeds_to_settle: int | None
    sentence: str

    @property
    def threshold(self) -> float:
        return _parsed(self.text)[2]

    @property
    def shortfall(self) -> float | None:
        """Return by how much the goal may be missed at most, at least 0."""
        end = self.low if _is_floor(self.text) else self.high
        return None if end is None else max(0.0, self.threshold - end if _is_floor(self.text) else end - self.threshold)


@dataclass(frozen=True)
class _Score:
    """A configuration's score: mean over seeds, and its variance in two parts."""

    value: float
    seeds: int
    item_variance: float
    seed_variance: float
    """Of one seed; 0 if it is unknown."""
    seed_df: int

    def half_width(self, alpha: float, seeds: int | None = None) -> float:
        of_seeds = self.seed_variance / (seeds or self.seeds)
        variance = self.item_variance + of_seeds
        # Welch–Satterthwaite, with infinite degrees of freedom for the items: there are many.
        df = variance**2 / of_seeds**2 * self.seed_df if of_seeds > 0 else math.inf
        return float(stats.t.isf(alpha, df)) * math.sqrt(variance)


def goal_answer(
    configurations: Sequence[Configuration], chosen: Configuration | None = None, items: ItemScores | None = None
) -> GoalAnswer | None:
    """Return whether ``task.goal`` is met beyond noise; ``None`` if no run had a goal.

    Args:
        chosen: the configuration to answer for, chosen without its test scores. Without it, one is chosen by them, and
            each end of its interval is at 2.5 % divided by the number of configurations (Bonferroni), because the best
            of many may pass by luck.
        items: per-item values: with groups of items, the interval is over groups.
    """
    with_goals = [(c, [run.goal for run in c.runs if run.goal is not None]) for c in configurations]
    with_goals = [(c, goals) for c, goals in with_goals if goals]
    if not with_goals:
        return None
    texts = {goal.text for _, goals in with_goals for goal in goals}
    text, split = with_goals[0][1][0].text, with_goals[0][1][0].split
    if len(texts) > 1:
        sentence = f"The runs have {len(texts)} different goals: no answer."
        return GoalAnswer(text, split, OPEN, None, None, None, None, 0, None, None, sentence)
    sd, df = pooled_sd([[goal.value for goal in goals if goal.value is not None] for _, goals in with_goals])
    scores = [(c, _score(c, goals, sd, df, items)) for c, goals in with_goals]
    alpha = TAIL / len(scores)
    met = [c for c, score in scores if _verdict(text, score, alpha) == MET]
    cheapest = min(met, key=_memory_then_time) if met else None
    known = [(c, score) for c, score in scores if score is not None]
    sign = 1.0 if _is_floor(text) else -1.0
    best = max(known, key=lambda pair: sign * pair[1].value)[0] if known else None
    asked = chosen is not None and any(c is chosen for c, _ in scores)
    subject = chosen if asked else cheapest or best
    score = next((score for c, score in scores if c is subject), None)
    if asked:
        alpha = TAIL
    half = score.half_width(alpha) if score is not None else None
    verdict = _verdict(text, score, alpha)
    answer = GoalAnswer(
        text=text,
        split=split,
        verdict=verdict,
        chosen=subject,
        value=score.value if score is not None else None,
        low=score.value - half if score is not None and half is not None else None,
        high=score.value + half if score is not None and half is not None else None,
        shown=len(met),
        cheapest=cheapest,
        seeds_to_settle=_seeds_to_settle(text, score, alpha) if verdict == OPEN and sd is not None else None,
        sentence="",
    )
    over = "seeds and items" if sd is not None else "items alone: no configuration has a second seed"
    return _with_sentence(answer, over, 1 if asked else len(scores), len(scores))


def goal_recommendation(answer: GoalAnswer, studies: Sequence[StudyInfo] = ()) -> Recommendation:
    """Return whether the goal is met, and the configuration to use for it."""
    metric, use = _parsed(answer.text)[0], answer.chosen
    shortfall = answer.shortfall
    settle = command = None
    if answer.verdict == OPEN and answer.chosen is not None:
        if answer.seeds_to_settle is not None:
            settle = f"About {answer.seeds_to_settle} seeds would settle it."
            command = seeds_command([answer.chosen], answer.seeds_to_settle, studies)
        elif len(answer.chosen.runs) < 2:
            settle, command = "Three seeds would tell more.", seeds_command([answer.chosen], SEEDS_ADVISED, studies)
        else:
            settle = f"More test items would settle it: {MAX_SEEDS_ADVISED} seeds wouldn't."
    cost = "By how much the goal may be missed is unknown."
    if shortfall is not None:
        cost = (
            "The whole interval meets the goal."
            if shortfall == 0
            else f"It may miss the goal by at most {shortfall:.3g}."
        )
    return Recommendation(
        question="Is the goal met?",
        use=use.label if use is not None and answer.verdict != NOT_MET else None,
        verdict=answer.verdict,
        evidence=answer.sentence,
        cost=cost,
        settle=settle,
        settle_command=command,
        regret_bound=shortfall,
        regret_against=f"the goal {answer.text}",
        unit=metric.replace("_", " "),
    )


def _score(
    configuration: Configuration, goals: Sequence[Goal], sd: float | None, df: int, items: ItemScores | None
) -> _Score | None:
    """Return the configuration's score; ``None`` if a run has no value or no bound."""
    values = [goal.value for goal in goals if goal.value is not None]
    rising = _is_floor(goals[0].text)
    edges = [goal.low if rising else goal.high for goal in goals if goal.value is not None]
    known = [(v, edge) for v, edge in zip(values, edges, strict=True) if edge is not None]
    if not values or len(known) < len(edges):
        return None
    # The records' bounds are one-sided over items: dividing by the normal quantile gives the standard error.
    item_se = max(abs(v - edge) for v, edge in known) / float(stats.norm.isf(RECORDED_TAIL))
    grouped = _group_se(configuration.runs, _parsed(goals[0].text)[0], items)
    seed_variance = 0.0 if sd is None else sd**2
    return _Score(float(np.mean(values)), len(values), max(item_se, grouped or 0.0) ** 2, seed_variance, df)


def _group_se(runs: Sequence[RunRecord], metric: str, items: ItemScores | None) -> float | None:
    """Return the largest standard error of a run's mean over groups of items; ``None`` without groups."""
    errors = []
    for run in runs:
        scores = items(run, "after", metric) if items is not None else None
        if isinstance(scores, GroupScores) and len(scores) > 1:
            errors.append(float(np.std(list(scores.values()), ddof=1)) / math.sqrt(len(scores)))
    return max(errors, default=None)


def _verdict(text: str, score: _Score | None, alpha: float) -> str:
    if score is None:
        return OPEN
    half = score.half_width(alpha)
    ends = [_meets(text, score.value - half), _meets(text, score.value + half)]
    return MET if all(ends) else OPEN if any(ends) else NOT_MET


def _seeds_to_settle(text: str, score: _Score | None, alpha: float) -> int | None:
    """Return the fewest seeds in all with which the interval would leave the threshold, if score and noise stay."""
    if score is None:
        return None
    distance = abs(score.value - _parsed(text)[2])
    enough = (s for s in range(score.seeds + 1, MAX_SEEDS_ADVISED + 1) if score.half_width(alpha, s) < distance)
    return next(enough, None)


def _parsed(text: str) -> tuple[str, str, float]:
    """Return (metric, operator, threshold) of a goal such as ``accuracy >= 0.8``."""
    metric, operator, number = re.split(r"\s*(>=|<=|>|<)\s*", text.strip())
    return metric, operator, float(number)


def _is_floor(text: str) -> bool:
    return ">" in text


def _meets(text: str, value: float) -> bool:
    _, operator, threshold = _parsed(text)
    above = value >= threshold if operator == ">=" else value > threshold
    below = value <= threshold if operator == "<=" else value < threshold
    return above if _is_floor(text) else below


def _memory_then_time(c: Configuration) -> list[float]:
    return [math.inf if value is None else value for value in (c.memory_bytes, c.train_seconds)]


def _with_sentence(answer: GoalAnswer, over: str, divided_by: int, compared: int) -> GoalAnswer:
    metric = _parsed(answer.text)[0].replace("_", " ")
    level = "95 % CI" if divided_by == 1 else f"95 % CI of the {divided_by} compared configurations together"
    if answer.chosen is None or answer.value is None or answer.low is None or answer.high is None:
        sentence = f"Whether {answer.text} is met on {answer.split} is unknown: no configuration has a bound."
    else:
        interval = f"{level} {answer.low:.3g} to {answer.high:.3g}, over {over}"
        score = f"{metric} {answer.value:.3g} on {answer.split} ({interval})"
        verdict = {
            MET: f"The goal {answer.text} is met beyond noise",
            NOT_MET: f"The goal {answer.text} is not met",
            OPEN: f"It is not settled whether the goal {answer.text} is met",
        }[answer.verdict]
        sentence = f"{verdict}: {answer.chosen.label} has {score}."
    if compared > 1:
        one = f"the cheapest (least memory, then time) is {answer.cheapest.label}" if answer.cheapest else ""
        counted = f"{answer.shown} of {compared} configurations are shown to meet it" if answer.shown else ""
        more = "; ".join(part for part in (counted, one) if part)
        sentence += f" {more}." if more else f" None of {compared} configurations is shown to meet it."
    return replace(answer, sentence=sentence)
