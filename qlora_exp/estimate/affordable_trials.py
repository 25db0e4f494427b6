"""What a sweep's budget will buy: trials, by what one is planned to take, or was seen to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_exp.config.schema import BudgetConfig
from qlora_exp.estimate.affordable_steps import Affordable
from qlora_exp.estimate.budget import limits_of

if TYPE_CHECKING:
    from qlora_exp.estimate.estimator import PlannedRun

Cost = tuple[float, float, float]
"""Low, middle, high."""


def affordable_trials(runs: Sequence[PlannedRun], budget: BudgetConfig, trials: int | None) -> tuple[Affordable, ...]:
    """What each limit buys of a sweep that begins, of as many ``trials`` (``None``: it has no end of its own), by the
    points that can be run."""
    counted = [run for run in runs if run.memory is not None]
    return tuple(
        affordable_trials_at(name, limit, limit, *planned_cost(counted, name), trials)
        for name, limit in limits_of(budget).items()
    )


def affordable_trials_at(
    name: str, limit: float, left: float, cost: Cost | None, basis: str, to_come: int | None
) -> Affordable:
    """What is ``left`` of ``limit`` buys of the trials ``to_come``, of which one takes ``cost``, known by ``basis``."""
    told = f"budget.{name}={limit:.12g}"
    if cost is None:
        told = f"{told}: what a trial takes isn't known until the first has ended"
        return Affordable(name, limit, "trials", None, None, None, to_come, told)
    low, middle, high = (int(max(left, 0.0) / max(one, 1e-12)) for one in cost)
    about, least, most = (one if to_come is None else min(one, to_come) for one in (middle, high, low))
    among = f"of {to_come} trials" if to_come is not None else "trials"
    told = f"{told} buys about {about} {among} ({least} to {most}, by {basis})"
    return Affordable(name, limit, "trials", about, least, most, to_come, told)


def planned_cost(runs: Sequence[PlannedRun], name: str) -> tuple[Cost | None, str]:
    """What one trial takes of the limit ``name``: the mean over ``runs``, the points of a search (of an interval, its
    ends), with the least and the most; ``None`` where one of them isn't known. And by what."""
    whose = "the task's rows" if by_rows(runs) else "rows as long as training.max_length"
    if name == "tokens":
        return _mean([_tokens(run) for run in runs]), whose
    known = sum(run.other_seconds is not None for run in runs)
    others = ("", ", and loading and scoring where they are known", ", loading and scoring")
    told = others[0 if not known else 1 + (known == len(runs))]
    costs = {"seconds": _seconds, "usd": _usd}
    cost = _mean([costs[name](run) for run in runs]) if name in costs else None
    return cost, f"the predicted training of {whose}{told}"


def by_rows(runs: Sequence[PlannedRun]) -> bool:
    """Whether the task's own rows were counted, for all that can be run."""
    return all(run.rows is not None for run in runs if run.memory is not None)


def _mean(costs: Sequence[Cost | None]) -> Cost | None:
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs) or not known:
        return None
    lows, middles, highs = zip(*known, strict=True)
    return min(lows), statistics.fmean(middles), max(highs)


def _tokens(run: PlannedRun) -> Cost | None:
    return (run.tokens, run.tokens, run.tokens) if run.tokens is not None else None


def _seconds(run: PlannedRun) -> Cost | None:
    if run.seconds is None or run.seconds_interval is None:
        return None
    (low, high), (other_low, other_high) = run.seconds_interval, run.other_seconds_interval or (0.0, 0.0)
    return low + other_low, run.seconds + (run.other_seconds or 0.0), high + other_high


def _usd(run: PlannedRun) -> Cost | None:
    return (run.usd_interval[0], run.usd, run.usd_interval[1]) if run.usd is not None and run.usd_interval else None
