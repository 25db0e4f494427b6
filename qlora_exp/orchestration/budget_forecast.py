"""What a sweep's budget will buy, said at its start."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qlora_exp.config.overrides import is_hydra, override_key
from qlora_exp.errors import QloraExpError
from qlora_exp.estimate.affordable_trials import Cost, affordable_trials_at, by_rows, planned_cost
from qlora_exp.estimate.budget import LimitUsage, StudyBudget, budget_of, without_limits
from qlora_exp.formatting import bytes_text
from qlora_exp.orchestration.command import SweepCommand
from qlora_exp.paths import OutputPaths
from qlora_exp.study.types import StudySpec

if TYPE_CHECKING:
    from qlora_exp.estimate.estimator import PlannedRun
    from qlora_exp.estimate.sweep import Candidate

MOST_PLANNED = 1000
"""More points would keep the first trial waiting."""


def affordable_trials_message(asked: SweepCommand, opened: Any, purse: StudyBudget) -> Iterator[str]:
    """A sentence for each limit of the budget."""
    counts, memory_bytes = opened.counts(), budget_of(asked.config).memory_bytes
    accounts = purse.accounts(opened.trials())
    to_come = counts.waiting + counts.to_ask + counts.running
    runs = None
    if memory_bytes is not None or any(not account.costs for account in accounts):
        runs = _planned(asked.spec, memory_bytes)
    for account in accounts:
        left = account.limit - account.spent
        yield affordable_trials_at(account.name, account.limit, left, *_cost(runs, account), to_come).told
    if memory_bytes is not None:
        yield _fitting(runs, memory_bytes)


def _fitting(runs: Sequence[PlannedRun] | None, memory_bytes: int) -> str:
    told = f"budget.memory_bytes={memory_bytes} ({bytes_text(memory_bytes)})"
    if runs is None:
        return f"{told}: what fits is predicted trial by trial"
    fitting = sum(run.fits is True for run in runs)
    if by_rows(runs):
        return f"{told}: {fitting} of {len(runs)} configurations fit, by the task's rows"
    return (
        f"{told}: at least {fitting} of {len(runs)} configurations fit, with rows as long as training.max_length; each"
        " trial is predicted again from the rows that there are"
    )


def _cost(runs: Sequence[PlannedRun] | None, account: LimitUsage) -> tuple[Cost | None, str]:
    """Of one trial: as measured (cheapest, mean, dearest), else as planned."""
    if account.costs:
        count = len(account.costs)
        basis = f"{count} finished trial{'s' if count > 1 else ''}"
        return (min(account.costs), statistics.fmean(account.costs), max(account.costs)), basis
    return planned_cost(runs or (), account.name)


def check_memory(asked: SweepCommand) -> None:
    """Raises:
    ConfigError: no quantization of any base model of the search fits into ``budget.memory_bytes``."""
    from qlora_exp.estimate.estimator import Planner
    from qlora_exp.estimate.smallest_base import check_a_base_fits

    memory_bytes = budget_of(asked.config).memory_bytes
    if memory_bytes is not None:
        configs = [point.config for point in _points(asked.spec) or () if point.config is not None]
        check_a_base_fits(Planner(), configs, memory_bytes)


def _planned(spec: StudySpec, memory_bytes: int | None) -> list[PlannedRun] | None:
    """The space's points, planned by the rates of the runs that have ended here, else by the machine's calibration.
    ``None``: as :func:`_points`."""
    from qlora_exp.estimate.estimator import Planner
    from qlora_exp.estimate.tokens import RowCounter
    from qlora_exp.records.find import EndedRuns

    points = _points(spec)
    if points is None:
        return None
    records = EndedRuns(OutputPaths.of(spec.output_root)).records()
    planner = Planner(records=records, counter=RowCounter(), hosts=True)
    return [planner.plan(_held_to(point, memory_bytes)) for point in points]


def _held_to(point: Candidate, memory_bytes: int | None) -> Candidate:
    """As a trial is run: the study's budget is not its own, but for the memory that it must fit into."""
    if point.config is None:
        return point
    config = without_limits(point.config)
    return replace(point, config=replace(config, budget=replace(config.budget, memory_bytes=memory_bytes)))


def _points(spec: StudySpec) -> Sequence[Candidate] | None:
    """The space's points (of an interval, its ends); ``None``: nothing is trained, there are too many, or a model's
    layers aren't known without torch."""
    if spec.synthetic:
        return None
    from qlora_exp.architecture.families import known_architecture
    from qlora_exp.estimate.sweep import search_space

    fixed = [text for text in spec.overrides if not is_hydra(override_key(text))]
    try:
        asked = search_space([*fixed, *(f"{axis.key}={axis.text}" for axis in spec.axes if "ladder" not in axis.tags)])
    except QloraExpError:  # too many points to plan
        return None
    configs = [point.config for point in asked.points if point.config is not None]
    if len(asked.points) > MOST_PLANNED or not all(known_architecture(one.model) for one in configs):
        return None  # describing another architecture loads torch
    return asked.points
