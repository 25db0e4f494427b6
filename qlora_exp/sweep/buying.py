"""What a sweep's budget will buy, said at its start."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from qlora_exp import compose
from qlora_exp.budget import Account, Purse
from qlora_exp.errors import QloraExpError
from qlora_exp.study.types import StudySpec
from qlora_exp.sweep.asking import Asked

MOST_PLANNED = 1000
"""More points would keep the first trial waiting."""

Cost = tuple[float, float, float]
"""Low, middle, high."""


def what_it_buys(asked: Asked, opened: Any, purse: Purse) -> Iterator[str]:
    """A sentence for each limit of the budget."""
    counts = opened.counts()
    accounts = purse.accounts(opened.trials())
    for account in accounts:
        cost, basis = _cost(asked, account)
        left = account.limit - account.spent
        if cost is None:
            yield f"budget.{account.name}={account.limit:g}: what a trial takes isn't known until the first has ended"
            continue
        to_come = counts.waiting + counts.to_ask + counts.running
        about, low, high = (min(int(max(left, 0.0) / max(one, 1e-12)), to_come) for one in (cost[1], cost[2], cost[0]))
        yield (
            f"budget.{account.name}={account.limit:g} buys about {about} of {to_come} trials "
            f"({low} to {high}, by {basis})"
        )


def _cost(asked: Asked, account: Account) -> tuple[Cost | None, str]:
    """Of one trial: as measured (cheapest, mean, dearest), else as planned."""
    if account.costs:
        count = len(account.costs)
        basis = f"{count} finished trial{'s' if count > 1 else ''}"
        return (min(account.costs), statistics.fmean(account.costs), max(account.costs)), basis
    return _planned(asked.spec, account.name), "the predicted training of rows as long as training.max_length"


def _planned(spec: StudySpec, name: str) -> Cost | None:
    """The mean over the space's points (of an interval, its ends); ``None`` where one of them isn't known. Training
    alone, with rows as long as ``training.max_length``."""
    if name not in ("seconds", "usd") or spec.synthetic:
        return None
    from qlora_exp.plan.tables import known_architecture
    from qlora_exp.planning.planned import Planner
    from qlora_exp.planning.points import points_of

    fixed = [text for text in spec.overrides if not compose.is_hydra(compose.key_of(text))]
    try:
        asked = points_of([*fixed, *(f"{axis.key}={axis.text}" for axis in spec.axes if "ladder" not in axis.tags)])
    except QloraExpError:  # too many points to plan
        return None
    configs = [point.config for point in asked.points]
    if len(configs) > MOST_PLANNED or not all(one and known_architecture(one.model) for one in configs):
        return None  # describing another architecture loads torch
    planner = Planner()
    runs = [planner.plan(point) for point in asked.points]
    middles = [run.seconds if name == "seconds" else run.usd for run in runs]
    intervals = [run.seconds_interval if name == "seconds" else run.usd_interval for run in runs]
    known = [(each[0], middle, each[1]) for each, middle in zip(intervals, middles, strict=True) if each and middle]
    if len(known) < len(runs) or not known:
        return None
    return (
        min(low for low, _, _ in known),
        statistics.fmean(middle for _, middle, _ in known),
        max(high for _, _, high in known),
    )
