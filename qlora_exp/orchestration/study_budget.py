"""A study's budget: what its trials have spent, and how many trials it is enough for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_exp.config.overrides import is_hydra, override_key
from qlora_exp.config.schema import BudgetConfig
from qlora_exp.errors import QloraExpError, RecordError
from qlora_exp.estimate.budget import (
    affordable_trials_at,
    all_rows_counted,
    amount,
    budget_of,
    limits_of,
    planned_cost,
    spent_before,
    without_limits,
)
from qlora_exp.estimate.throughput import Interval
from qlora_exp.formatting import bytes_text
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.types import Spent, Status
from qlora_exp.study.types import StudySpec, TrialRow

if TYPE_CHECKING:
    from qlora_exp.estimate.candidates import Candidate
    from qlora_exp.estimate.planner import PlannedRun
    from qlora_exp.orchestration.command import SweepCommand

MEASURED_COST = (Status.COMPLETED, Status.PRUNED)
"""Trials whose cost predicts the next one's. A failed trial spends, too, but may end at any point."""
MAX_ESTIMATED_POINTS = 1000
"""Estimating more points would delay the first trial."""


@dataclass(frozen=True)
class LimitUsage:
    """The state of one limit of a study. ``held``: what its trials have spent, and what the running ones are expected
    to spend."""

    name: str
    limit: float
    spent: float
    held: float
    costs: tuple[float, ...]
    """The cost of each finished trial."""

    @property
    def cost(self) -> float | None:
        """The mean cost of a finished trial; ``None`` before the first."""
        return statistics.fmean(self.costs) if self.costs else None

    @property
    def covers_next_trial(self) -> bool:
        """Whether the rest is enough for one more trial; before the first has finished, whether anything is left."""
        remaining = self.limit - self.held
        return remaining > 0 and (self.cost is None or self.cost <= remaining)

    @property
    def larger(self) -> str:
        """An override that leaves room for further trials: twice what was spent and held so far, and one trial more."""
        limit = 2 * max(self.limit, self.held) + (self.cost or 0.0)
        return f"budget.{self.name}={math.ceil(limit) if self.name == 'tokens' else f'{limit:.3g}'}"

    def __str__(self) -> str:
        message = f"budget.{self.name}={self.limit:g}: {self.spent:.3g} spent"
        return f"{message}, a trial takes {self.cost:.3g}" if self.cost is not None else message


class StudyBudget:
    """A study's budget. Seconds are added up over its runs: two trials at once spend them twice as fast."""

    def __init__(self, budget: BudgetConfig, outputs: OutputPaths) -> None:
        self._budget, self._outputs = budget, outputs
        self._ended: dict[str, Spent] = {}

    def usages(self, trials: Iterable[TrialRow]) -> list[LimitUsage]:
        """Return the usage of each limit, from the records of all trials, failed attempts included."""
        rows = [(row, self._spent(row)) for row in trials]
        usages = []
        for name, limit in limits_of(self._budget).items():
            amounts = [(row, amount(spent, name, self._budget.usd_per_hour)) for row, spent in rows]
            costs = tuple(cost for row, cost in amounts if row.status in MEASURED_COST and row.skipped is None)
            expected = statistics.fmean(costs) if costs else 0.0
            held = sum(max(cost, expected) if row.state == "RUNNING" else cost for row, cost in amounts)
            usages.append(LimitUsage(name, limit, sum(cost for _, cost in amounts), held, costs))
        return usages

    def first_exhausted(self, trials: Iterable[TrialRow]) -> LimitUsage | None:
        """Return the first limit that isn't enough for one more trial next to the running ones, or ``None``."""
        return next((usage for usage in self.usages(trials) if not usage.covers_next_trial), None)

    def _spent(self, row: TrialRow) -> Spent:
        nothing = Spent(0.0, 0, None)
        if row.run_id is None:
            return nothing
        if row.run_id not in self._ended:
            try:
                spent = spent_before(read_record(self._outputs.run(row.run_id).record))
            except RecordError:
                return nothing
            if row.status is None:
                return spent
            self._ended[row.run_id] = spent
        return self._ended[row.run_id]


def affordable_trials_message(command: SweepCommand, opened: Any, budget: StudyBudget) -> Iterator[str]:
    """Yield a sentence for each limit of the budget, printed at the sweep's start."""
    counts, memory_bytes = opened.counts(), budget_of(command.config).memory_bytes
    limits = budget.usages(opened.trials())
    to_come = counts.waiting + counts.to_ask + counts.running
    runs = None
    if memory_bytes is not None or any(not limit.costs for limit in limits):
        runs = _estimates(command.spec, memory_bytes)
    for limit in limits:
        if limit.costs:
            count = len(limit.costs)
            basis = f"{count} finished trial{'s' if count > 1 else ''}"
            cost: Interval | None = Interval(min(limit.costs), statistics.fmean(limit.costs), max(limit.costs), basis)
        else:
            cost = planned_cost(runs or (), limit.name)
        yield affordable_trials_at(limit.name, limit.limit, limit.limit - limit.spent, cost, to_come).message
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


def check_memory(command: SweepCommand) -> None:
    """Check that some base model of the search fits into ``budget.memory_bytes``.

    Raises:
        ConfigError: no quantization of any of them does.
    """
    from qlora_exp.estimate.planner import Planner
    from qlora_exp.estimate.preflight import check_a_base_fits

    memory_bytes = budget_of(command.config).memory_bytes
    if memory_bytes is not None:
        configs = [point.config for point in _candidates(command.spec) or () if point.config is not None]
        check_a_base_fits(Planner(), configs, memory_bytes)


def _estimates(spec: StudySpec, memory_bytes: int | None) -> list[PlannedRun] | None:
    """Return an estimate for each point of the space; ``None`` as in :func:`_candidates`.

    The rates are those of runs that have ended here, else of the machine's calibration.
    """
    from qlora_exp.estimate.planner import Planner
    from qlora_exp.estimate.tokens import RowCounter
    from qlora_exp.records.find import EndedRuns

    points = _candidates(spec)
    if points is None:
        return None
    records = EndedRuns(OutputPaths.of(spec.output_root)).records()
    planner = Planner(records=records, counter=RowCounter(), hosts=True)
    runs = []
    for point in points:
        if point.config is not None:  # a trial runs without the study's budget, except for the memory limit
            config = without_limits(point.config)
            point = replace(point, config=replace(config, budget=replace(config.budget, memory_bytes=memory_bytes)))
        runs.append(planner.plan(point))
    return runs


def _candidates(spec: StudySpec) -> Sequence[Candidate] | None:
    """Return the space's points (of an interval, its ends).

    ``None``: nothing is trained, there are too many points, or a model's architecture isn't known without torch.
    """
    if spec.synthetic:
        return None
    from qlora_exp.architecture.families import known_architecture
    from qlora_exp.estimate.candidates import listed_space, search_space

    fixed = [text for text in spec.overrides if not is_hydra(override_key(text))]
    try:
        if len(spec.enqueue) >= spec.n_trials:  # no other point is run
            return listed_space(fixed, spec.enqueue[: spec.n_trials]).points
        space = search_space([*fixed, *(f"{axis.key}={axis.text}" for axis in spec.axes if "ladder" not in axis.tags)])
    except QloraExpError:  # too many points to plan
        return None
    configs = [point.config for point in space.points if point.config is not None]
    if len(space.points) > MAX_ESTIMATED_POINTS or not all(known_architecture(config.model) for config in configs):
        return None  # reading any other architecture imports torch
    return space.points
