"""What a sweep's budget is enough for, printed at its start."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qlora_exp.config.overrides import is_hydra, override_key
from qlora_exp.errors import QloraExpError
from qlora_exp.estimate.affordable_trials import Cost, affordable_trials_at, all_rows_counted, planned_cost
from qlora_exp.estimate.budget import LimitUsage, StudyBudget, budget_of, without_limits
from qlora_exp.formatting import bytes_text
from qlora_exp.orchestration.command import SweepCommand
from qlora_exp.paths import OutputPaths
from qlora_exp.study.types import StudySpec

if TYPE_CHECKING:
    from qlora_exp.estimate.candidates import Candidate
    from qlora_exp.estimate.estimator import PlannedRun

MAX_ESTIMATED_POINTS = 1000
"""Estimating more points would delay the first trial."""


def affordable_trials_message(command: SweepCommand, opened: Any, budget: StudyBudget) -> Iterator[str]:
    """Yield a sentence for each limit of the budget."""
    counts, memory_bytes = opened.counts(), budget_of(command.config).memory_bytes
    limits = budget.usages(opened.trials())
    to_come = counts.waiting + counts.to_ask + counts.running
    runs = None
    if memory_bytes is not None or any(not limit.costs for limit in limits):
        runs = _estimates(command.spec, memory_bytes)
    for limit in limits:
        remaining = limit.limit - limit.spent
        yield affordable_trials_at(limit.name, limit.limit, remaining, *_cost(runs, limit), to_come).message
    if memory_bytes is not None:
        yield _memory_message(runs, memory_bytes)


def _memory_message(runs: Sequence[PlannedRun] | None, memory_bytes: int) -> str:
    """Return a sentence that says how many configurations fit into ``memory_bytes``."""
    limit_text = f"budget.memory_bytes={memory_bytes} ({bytes_text(memory_bytes)})"
    if runs is None:
        return f"{limit_text}: each trial's memory is predicted before it starts"
    fitting = sum(run.fits is True for run in runs)
    if all_rows_counted(runs):
        return f"{limit_text}: {fitting} of {len(runs)} configurations fit (from the task's row lengths)"
    return (
        f"{limit_text}: at least {fitting} of {len(runs)} configurations fit (if all rows have training.max_length"
        " tokens); each trial is predicted again from the task's row lengths"
    )


def _cost(runs: Sequence[PlannedRun] | None, limit: LimitUsage) -> tuple[Cost | None, str]:
    """Return one trial's cost (minimum, mean, maximum) and where it is from: finished trials if any, else the
    estimates."""
    if limit.costs:
        count = len(limit.costs)
        basis = f"{count} finished trial{'s' if count > 1 else ''}"
        return (min(limit.costs), statistics.fmean(limit.costs), max(limit.costs)), basis
    return planned_cost(runs or (), limit.name)


def check_memory(command: SweepCommand) -> None:
    """Check that some base model of the search fits into ``budget.memory_bytes``.

    Raises:
        ConfigError: no quantization of any of them does.
    """
    from qlora_exp.estimate.estimator import Planner
    from qlora_exp.estimate.smallest_base import check_a_base_fits

    memory_bytes = budget_of(command.config).memory_bytes
    if memory_bytes is not None:
        configs = [point.config for point in _candidates(command.spec) or () if point.config is not None]
        check_a_base_fits(Planner(), configs, memory_bytes)


def _estimates(spec: StudySpec, memory_bytes: int | None) -> list[PlannedRun] | None:
    """Return an estimate for each point of the space; ``None`` as in :func:`_candidates`.

    The rates are those of runs that have ended here, else of the machine's calibration.
    """
    from qlora_exp.estimate.estimator import Planner
    from qlora_exp.estimate.tokens import RowCounter
    from qlora_exp.records.find import EndedRuns

    points = _candidates(spec)
    if points is None:
        return None
    records = EndedRuns(OutputPaths.of(spec.output_root)).records()
    planner = Planner(records=records, counter=RowCounter(), hosts=True)
    return [planner.plan(_as_trial(point, memory_bytes)) for point in points]


def _as_trial(point: Candidate, memory_bytes: int | None) -> Candidate:
    """Return the point as a trial runs it: without the study's budget, except for the memory limit."""
    if point.config is None:
        return point
    config = without_limits(point.config)
    return replace(point, config=replace(config, budget=replace(config.budget, memory_bytes=memory_bytes)))


def _candidates(spec: StudySpec) -> Sequence[Candidate] | None:
    """Return the space's points (of an interval, its ends).

    ``None``: nothing is trained, there are too many points, or a model's architecture isn't known without torch.
    """
    if spec.synthetic:
        return None
    from qlora_exp.architecture.families import known_architecture
    from qlora_exp.estimate.candidates import search_space

    fixed = [text for text in spec.overrides if not is_hydra(override_key(text))]
    try:
        space = search_space([*fixed, *(f"{axis.key}={axis.text}" for axis in spec.axes if "ladder" not in axis.tags)])
    except QloraExpError:  # too many points to plan
        return None
    configs = [point.config for point in space.points if point.config is not None]
    if len(space.points) > MAX_ESTIMATED_POINTS or not all(known_architecture(config.model) for config in configs):
        return None  # reading any other architecture imports torch
    return space.points
