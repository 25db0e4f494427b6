"""How many trials of a sweep each limit of its budget is enough for, from planned or measured costs."""

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
    """Return what each limit is enough for in a sweep that starts, from the points that can be run. ``trials``: how
    many the sweep has; ``None``: it is unbounded."""
    counted = [run for run in runs if run.memory is not None]
    return tuple(
        affordable_trials_at(name, limit, limit, *planned_cost(counted, name), trials)
        for name, limit in limits_of(budget).items()
    )


def affordable_trials_at(
    name: str, limit: float, left: float, cost: Cost | None, basis: str, to_come: int | None
) -> Affordable:
    """Return how many of the remaining trials ``to_come`` the rest ``left`` of ``limit`` is enough for. One trial takes
    ``cost``, known from ``basis``."""
    message = f"budget.{name}={limit:.12g}"
    if cost is None:
        message = f"{message}: the cost of a trial is unknown until the first has ended"
        return Affordable(name, limit, "trials", None, None, None, to_come, message)
    low, middle, high = (int(max(left, 0.0) / max(bound, 1e-12)) for bound in cost)
    about, minimum, maximum = (bound if to_come is None else min(bound, to_come) for bound in (middle, high, low))
    among = f"of {to_come} trials" if to_come is not None else "trials"
    message = f"{message} is enough for about {about} {among} ({minimum}–{maximum}, from {basis})"
    return Affordable(name, limit, "trials", about, minimum, maximum, to_come, message)


def planned_cost(runs: Sequence[PlannedRun], name: str) -> tuple[Cost | None, str]:
    """Return the cost of one trial in the unit of the limit ``name``, and a phrase that says what it is based on.

    The cost is the mean over ``runs`` (the points of a search; of an interval, its ends), with the smallest and the
    largest; ``None`` if the cost of any of them is unknown.
    """
    rows = "the task's row lengths" if all_rows_counted(runs) else "rows of training.max_length tokens"
    if name == "tokens":
        return _mean([_tokens(run) for run in runs]), rows
    known_count = sum(run.other_seconds is not None for run in runs)
    phrases = ("", ", plus loading and scoring where known", ", plus loading and scoring")
    with_other_seconds = phrases[0 if not known_count else 1 + (known_count == len(runs))]
    costs = {"seconds": _seconds, "usd": _usd}
    cost = _mean([costs[name](run) for run in runs]) if name in costs else None
    return cost, f"training times predicted from {rows}{with_other_seconds}"


def all_rows_counted(runs: Sequence[PlannedRun]) -> bool:
    """Return whether the task's rows were counted for every run that can be run."""
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
