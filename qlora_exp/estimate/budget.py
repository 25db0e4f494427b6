"""What a run or a study may spend — seconds, tokens, US dollars, kilowatt-hours — and what that is enough for."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from qlora_exp.config.enums import DeviceChoice
from qlora_exp.config.schema import BudgetConfig, Config
from qlora_exp.errors import ConfigError
from qlora_exp.estimate.throughput import Interval
from qlora_exp.records.types import RunRecord, Spent
from qlora_exp.training.meter import has_energy_counter

if TYPE_CHECKING:
    from qlora_exp.estimate.estimator import RunEstimate
    from qlora_exp.estimate.planner import PlannedRun

LIMIT_UNITS = {"seconds": "s", "tokens": "tokens", "usd": "usd", "kwh": "kWh"}
"""Limit on what is spent → its unit. ``memory_bytes`` is different: a run must fit into it."""
STUDY_LIMITS = (*LIMIT_UNITS, "memory_bytes")
JOULES_PER_KWH = 3.6e6
RECORD_SECONDS = 1.0
"""How often a training run updates its record. If the process is killed, at most so much spending is lost."""
UNTIL_MEASURED = (
    " until qlora-exp calibrate has measured this machine, or a run with this base and quantization has ended on it"
)
"""Calibration and run must have used the same number of threads."""


def limits_of(budget: BudgetConfig) -> dict[str, float]:
    """Return the limits that are set, by name."""
    return {name: value for name in LIMIT_UNITS if (value := getattr(budget, name)) is not None}


def budget_of(raw: Any) -> BudgetConfig:
    """Return the budget of a composed but unchecked configuration."""
    budget = OmegaConf.to_object(raw.budget)
    assert isinstance(budget, BudgetConfig)
    return budget


def without_limits(config: Config) -> Config:
    """Return a trial's configuration. The study holds the budget, and trials that the budget cut short couldn't be
    compared."""
    unlimited: dict[str, Any] = dict.fromkeys(STUDY_LIMITS)
    return dataclasses.replace(config, budget=dataclasses.replace(config.budget, **unlimited))


def check_energy(budget: BudgetConfig, device: DeviceChoice) -> None:
    """Check that energy can be measured if it is limited.

    Raises:
        ConfigError: ``budget.kwh`` is set, and no energy counter is available.
    """
    if budget.kwh is not None and (device is DeviceChoice.cpu or not has_energy_counter()):
        raise ConfigError(
            "energy can't be measured here: this needs a whole NVIDIA GPU (Volta or later, no MIG) and nvidia-ml-py",
            f"budget.kwh = {budget.kwh:g}",
            "budget.kwh=null; budget.seconds=… or budget.usd=… work everywhere",
        )


# What is spent.


def spent_before(record: RunRecord) -> Spent:
    """Return what a run's earlier parts have spent. A record without this field: what its speed says."""
    speed = record.speed
    return record.spent or Spent(speed.total_seconds or 0.0, speed.train_tokens or 0, speed.energy_joules)


def amount(spent: Spent, name: str, usd_per_hour: float | None) -> float:
    """Return ``spent`` in the unit of the limit ``name``. What could not be measured counts as 0."""
    if name == "tokens":
        return spent.tokens
    if name == "kwh":
        return (spent.joules or 0.0) / JOULES_PER_KWH
    return _in_units(name, usd_per_hour, spent.seconds) or 0.0


def exhausted(budget: BudgetConfig, spent: Spent) -> str | None:
    """Return the first limit that ``spent`` reaches, or ``None``."""
    return next(
        (name for name, limit in limits_of(budget).items() if amount(spent, name, budget.usd_per_hour) >= limit), None
    )


def budget_stop_message(name: str, steps: int, of_steps: int) -> str:
    """Return the record's message for a training that its budget ended."""
    return (
        f"budget.{name} was spent after {steps} of {of_steps} steps: training stopped there, and the model was scored"
    )


# What a budget is enough for.


@dataclass(frozen=True)
class Affordable:
    """How many of ``of`` steps or trials one limit of a budget is enough for: ``minimum`` ≤ ``about`` ≤ ``maximum``;
    ``None`` is unknown. The last field is the sentence for the user."""

    limit: str
    amount: float
    """In the limit's unit: seconds, tokens, US dollars, kilowatt-hours."""
    unit: str
    """``steps`` of a run, ``trials`` of a sweep."""
    about: int | None
    minimum: int | None
    maximum: int | None
    of: int | None
    message: str


class BudgetTooSmall(ConfigError):
    """A limit of the budget is too small for one step. ``times``: the lower bound of a step's cost, divided by the
    limit."""

    def __init__(self, what: str, where: str, hint: str, times: float) -> None:
        super().__init__(what, where, hint)
        self.times = times


def check_covers_a_step(budget: BudgetConfig, estimate: RunEstimate) -> None:
    """Check each limit against the lower bound of one step's cost: the shortest rows at the fastest calibrated rate.

    Raises:
        BudgetTooSmall: a limit is too small for one step.
    """
    steps = estimate.workload.steps
    for name, limit in limits_of(budget).items():
        step = _step_cost(name, budget, estimate, estimate.time.least_train, estimate.shortest_row_tokens)
        if step is not None and step > limit:
            what = f"the budget is too small for one training step, which needs at least {step:.3g} {LIMIT_UNITS[name]}"
            hint = f"about budget.{name}={step * steps:.3g} for {steps} step{'s' if steps != 1 else ''}"
            raise BudgetTooSmall(what, f"budget.{name} = {limit:.12g}", hint, step / limit)


def affordable_steps(budget: BudgetConfig, estimate: RunEstimate) -> Iterator[Affordable]:
    """Yield how many steps of a run each limit is enough for. A training ends after the step that reaches the limit."""
    steps, time = estimate.workload.steps, estimate.time
    slow_to_fast = (time.train.high, time.train.middle, time.train.low) if time.train is not None else (None,) * 3
    for name, limit in limits_of(budget).items():
        message = f"budget.{name}={limit:.12g}"
        costs = [_step_cost(name, budget, estimate, seconds, estimate.workload.row.tokens) for seconds in slow_to_fast]
        known = [cost for cost in costs if cost is not None]
        if not known:
            message = f"{message}: the cost of a step is unknown{'' if name == 'kwh' else UNTIL_MEASURED}"
            yield Affordable(name, limit, "steps", None, None, None, steps, message)
            continue
        remaining = limit - (_in_units(name, budget.usd_per_hour, time.before or 0.0) or 0.0)
        minimum, about, maximum = (min(steps, max(1, math.ceil(remaining / cost))) for cost in known)
        message = f"{message} is enough for about {about} of {steps} steps"
        if name == "tokens" or time.train is None:
            message = f"{message}, from the mean row length"
        else:
            without_overhead = "" if time.before is not None else ", not counting the time before training"
            message = f"{message} ({minimum}–{maximum}, from {time.train.basis}){without_overhead}"
        yield Affordable(name, limit, "steps", about, minimum, maximum, steps, message)


def affordable_trials(runs: Sequence[PlannedRun], budget: BudgetConfig, trials: int | None) -> tuple[Affordable, ...]:
    """Return what each limit is enough for in a sweep that starts, from the points that can be run. ``trials``: how
    many the sweep has; ``None``: it is unbounded."""
    counted = [run for run in runs if run.memory is not None]
    return tuple(
        affordable_trials_at(name, limit, limit, planned_cost(counted, name), trials)
        for name, limit in limits_of(budget).items()
    )


def affordable_trials_at(
    name: str, limit: float, left: float, cost: Interval | None, to_come: int | None
) -> Affordable:
    """Return how many of the remaining trials ``to_come`` the rest ``left`` of ``limit`` is enough for. ``cost``: of
    one trial."""
    message = f"budget.{name}={limit:.12g}"
    if cost is None:
        message = f"{message}: the cost of a trial is unknown until the first has ended"
        return Affordable(name, limit, "trials", None, None, None, to_come, message)
    maximum, about, minimum = (int(max(left, 0.0) / max(end, 1e-12)) for end in (cost.low, cost.middle, cost.high))
    if to_come is not None:
        minimum, about, maximum = min(minimum, to_come), min(about, to_come), min(maximum, to_come)
    among = f"of {to_come} trials" if to_come is not None else "trials"
    message = f"{message} is enough for about {about} {among} ({minimum}–{maximum}, from {cost.basis})"
    return Affordable(name, limit, "trials", about, minimum, maximum, to_come, message)


def planned_cost(runs: Sequence[PlannedRun], name: str) -> Interval | None:
    """Return the cost of one trial in the unit of the limit ``name``; ``None`` if that of any run is unknown.

    It is the mean over ``runs`` (the points of a search; of an interval, its ends), with the smallest and the largest.
    """
    basis = "the task's row lengths" if all_rows_counted(runs) else "rows of training.max_length tokens"
    costs: list[Interval | None] = [None]
    if name == "tokens":
        costs = [Interval(run.tokens, run.tokens, run.tokens, "") if run.tokens is not None else None for run in runs]
    elif name in ("seconds", "usd"):
        with_other = sum(run.other_seconds is not None for run in runs)
        which = "" if with_other == len(runs) else " where known"
        basis = f"training times predicted from {basis}{f', plus loading and scoring{which}' if with_other else ''}"
        costs = [run.usd for run in runs]
        if name == "seconds":
            costs = [run.seconds.plus(run.other_seconds) if run.seconds is not None else None for run in runs]
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs) or not known:
        return None
    middle = statistics.fmean(cost.middle for cost in known)
    return Interval(min(cost.low for cost in known), middle, max(cost.high for cost in known), basis)


def all_rows_counted(runs: Sequence[PlannedRun]) -> bool:
    """Return whether the task's rows were counted for every run that can be run."""
    return all(run.rows is not None for run in runs if run.memory is not None)


def _step_cost(
    name: str, budget: BudgetConfig, estimate: RunEstimate, train_seconds: float | None, row_tokens: float
) -> float | None:
    """Return the cost of one step in the unit of the limit ``name``; ``None`` is unknown."""
    workload = estimate.workload
    if name == "tokens":
        return workload.step_rows * row_tokens
    return _in_units(name, budget.usd_per_hour, train_seconds / workload.steps) if train_seconds is not None else None


def _in_units(name: str, usd_per_hour: float | None, seconds: float) -> float | None:
    """Return ``seconds`` in the unit of the limit ``name``; ``None`` if the limit isn't about time."""
    if name == "usd":
        return seconds * usd_per_hour / 3600.0 if usd_per_hour else None
    return seconds if name == "seconds" else None
