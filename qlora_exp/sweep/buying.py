"""What a sweep's budget will buy, said at its start."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qlora_exp import compose
from qlora_exp.budget import Account, Purse, budget_of
from qlora_exp.config import Config, Quantization
from qlora_exp.errors import ConfigError, QloraExpError
from qlora_exp.paths import OutputPaths
from qlora_exp.study.types import StudySpec
from qlora_exp.sweep.asking import Asked
from qlora_exp.tables import bytes_text

if TYPE_CHECKING:
    from qlora_exp.planning.planned import PlannedRun
    from qlora_exp.planning.points import Point

MOST_PLANNED = 1000
"""More points would keep the first trial waiting."""

Cost = tuple[float, float, float]
"""Low, middle, high."""


def what_it_buys(asked: Asked, opened: Any, purse: Purse) -> Iterator[str]:
    """A sentence for each limit of the budget."""
    counts, memory_bytes = opened.counts(), budget_of(asked.config).memory_bytes
    accounts = purse.accounts(opened.trials())
    runs = None
    if memory_bytes is not None or any(not account.costs for account in accounts):
        runs = _planned(asked.spec, memory_bytes)
    for account in accounts:
        cost, basis = _cost(runs, account)
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
    if memory_bytes is not None:
        yield _fitting(runs, memory_bytes)


def _fitting(runs: Sequence[PlannedRun] | None, memory_bytes: int) -> str:
    told = f"budget.memory_bytes={memory_bytes} ({bytes_text(memory_bytes)})"
    if runs is None:
        return f"{told}: what fits is predicted trial by trial"
    fitting = sum(run.fits is True for run in runs)
    if _by_rows(runs):
        return f"{told}: {fitting} of {len(runs)} configurations fit, by the task's rows"
    return (
        f"{told}: at least {fitting} of {len(runs)} configurations fit, with rows as long as training.max_length; each"
        " trial is predicted again from the rows that there are"
    )


def _by_rows(runs: Sequence[PlannedRun]) -> bool:
    """Whether the task's own rows were counted, for all that can be run."""
    return all(run.rows is not None for run in runs if run.memory is not None)


def _cost(runs: Sequence[PlannedRun] | None, account: Account) -> tuple[Cost | None, str]:
    """Of one trial: as measured (cheapest, mean, dearest), else as planned."""
    if account.costs:
        count = len(account.costs)
        basis = f"{count} finished trial{'s' if count > 1 else ''}"
        return (min(account.costs), statistics.fmean(account.costs), max(account.costs)), basis
    whose = "the task's rows" if _by_rows(runs or ()) else "rows as long as training.max_length"
    known = sum(run.other_seconds is not None for run in runs or ())
    others = ("", ", and loading and scoring where they are known", ", loading and scoring")
    told = others[0 if not known else 1 + (known == len(runs or ()))]
    return _planned_cost(runs or (), account.name), f"the predicted training of {whose}{told}"


def _planned_cost(runs: Sequence[PlannedRun], name: str) -> Cost | None:
    """The mean over the space's points (of an interval, its ends); ``None`` where one of them isn't known."""
    if name not in ("seconds", "usd"):
        return None
    known = [cost for run in runs if (cost := _seconds(run) if name == "seconds" else _usd(run)) is not None]
    if len(known) < len(runs) or not known:
        return None
    return (
        min(low for low, _, _ in known),
        statistics.fmean(middle for _, middle, _ in known),
        max(high for _, _, high in known),
    )


def _seconds(run: PlannedRun) -> Cost | None:
    if run.seconds is None or run.seconds_interval is None:
        return None
    (low, high), (other_low, other_high) = run.seconds_interval, run.other_seconds_interval or (0.0, 0.0)
    return low + other_low, run.seconds + (run.other_seconds or 0.0), high + other_high


def _usd(run: PlannedRun) -> Cost | None:
    return (run.usd_interval[0], run.usd, run.usd_interval[1]) if run.usd is not None and run.usd_interval else None


def check_memory(asked: Asked) -> None:
    """Raises:
    ConfigError: no quantization of any base model of the search fits into ``budget.memory_bytes``."""
    from qlora_exp.plan.weights import smallest_base
    from qlora_exp.planning.devices import device_of
    from qlora_exp.planning.planned import Planner

    memory_bytes = budget_of(asked.config).memory_bytes
    configs = [point.config for point in _points(asked.spec) or () if point.config is not None]
    if memory_bytes is None or not configs:
        return
    planner = Planner()

    def smallest(config: Config) -> tuple[Quantization, int]:
        device = device_of(config)
        return smallest_base(planner.architecture(config.model), config.quantization, device.kind, device.bf16)

    different = {(repr(config.model), repr(config.quantization), config.training.device): config for config in configs}
    mode, least = min(map(smallest, different.values()), key=lambda found: found[1])
    if least > memory_bytes:
        what = f"no quantization of this base fits: {mode.value}, the smallest, takes {bytes_text(least)} by itself"
        hint = f"a smaller model, or more than budget.memory_bytes={least}"
        raise ConfigError(what, f"budget.memory_bytes = {memory_bytes}", hint)


def _planned(spec: StudySpec, memory_bytes: int | None) -> list[PlannedRun] | None:
    """The space's points, planned by the rates of the runs that have ended here, else by the machine's calibration.
    ``None``: as :func:`_points`."""
    from qlora_exp.history import EndedRuns
    from qlora_exp.planning.planned import Planner
    from qlora_exp.planning.rows import RowCounter

    points = _points(spec)
    if points is None:
        return None
    records = EndedRuns(OutputPaths.of(spec.output_root)).records()
    planner = Planner(budget_bytes=memory_bytes, records=records, counter=RowCounter(), hosts=True)
    return [planner.plan(point) for point in points]


def _points(spec: StudySpec) -> Sequence[Point] | None:
    """The space's points (of an interval, its ends); ``None``: nothing is trained, there are too many, or a model's
    layers aren't known without torch."""
    if spec.synthetic:
        return None
    from qlora_exp.plan.tables import known_architecture
    from qlora_exp.planning.points import points_of

    fixed = [text for text in spec.overrides if not compose.is_hydra(compose.key_of(text))]
    try:
        asked = points_of([*fixed, *(f"{axis.key}={axis.text}" for axis in spec.axes if "ladder" not in axis.tags)])
    except QloraExpError:  # too many points to plan
        return None
    configs = [point.config for point in asked.points if point.config is not None]
    if len(asked.points) > MOST_PLANNED or not all(known_architecture(one.model) for one in configs):
        return None  # describing another architecture loads torch
    return asked.points
