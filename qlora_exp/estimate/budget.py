"""What a run or a study may spend — seconds, tokens, US dollars, kilowatt-hours — and what it has spent."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from qlora_exp.config.schema import BudgetConfig, Config, DeviceChoice
from qlora_exp.errors import ConfigError, RecordError
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.types import RunRecord, Spent, Status
from qlora_exp.study.types import TrialRow
from qlora_exp.training.meter import has_energy_counter

LIMITS = ("seconds", "tokens", "usd", "kwh")
"""Limits on what is spent. ``memory_bytes`` is different: a run must fit into it."""
STUDY_LIMITS = (*LIMITS, "memory_bytes")
JOULES_PER_KWH = 3.6e6
RECORD_SECONDS = 1.0
"""How often a training run updates its record. If the process is killed, at most so much spending is lost."""
MEASURED_COST = (Status.COMPLETED, Status.PRUNED)
"""Trials whose cost predicts the next one's. A failed trial spends, too, but may end at any point."""


def limits_of(budget: BudgetConfig) -> dict[str, float]:
    """Return the limits that are set, by name."""
    return {name: value for name in LIMITS if (value := getattr(budget, name)) is not None}


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
            "energy can't be measured here: this needs an NVIDIA GPU (Volta or later) and nvidia-ml-py",
            f"budget.kwh = {budget.kwh:g}",
            "budget.kwh=null; budget.seconds=… or budget.usd=… work everywhere",
        )


def spent_before(record: RunRecord) -> Spent:
    """Return what a run's earlier parts have spent. A record without this field: what its speed says."""
    speed = record.speed
    return record.spent or Spent(speed.total_seconds or 0.0, speed.train_tokens or 0, speed.energy_joules)


def amount(spent: Spent, name: str, usd_per_hour: float | None) -> float:
    """Return ``spent`` in the unit of the limit ``name``. What could not be measured counts as 0."""
    match name:
        case "seconds":
            return spent.seconds
        case "tokens":
            return spent.tokens
        case "usd":
            return spent.seconds / 3600.0 * (usd_per_hour or 0.0)
        case _:
            return (spent.joules or 0.0) / JOULES_PER_KWH


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
        return [self._usage(name, limit, rows) for name, limit in limits_of(self._budget).items()]

    def first_exhausted(self, trials: Iterable[TrialRow]) -> LimitUsage | None:
        """Return the first limit that isn't enough for one more trial next to the running ones, or ``None``."""
        return next((usage for usage in self.usages(trials) if not usage.covers_next_trial), None)

    def _usage(self, name: str, limit: float, rows: Sequence[tuple[TrialRow, Spent]]) -> LimitUsage:
        amounts = [(row, amount(spent, name, self._budget.usd_per_hour)) for row, spent in rows]
        costs = tuple(cost for row, cost in amounts if row.status in MEASURED_COST and row.skipped is None)
        expected = statistics.fmean(costs) if costs else 0.0
        held = sum(max(cost, expected) if row.state == "RUNNING" else cost for row, cost in amounts)
        return LimitUsage(name, limit, sum(cost for _, cost in amounts), held, costs)

    def _spent(self, row: TrialRow) -> Spent:
        if row.run_id is None:
            return Spent(0.0, 0, None)
        if row.run_id not in self._ended:
            try:
                spent = spent_before(read_record(self._outputs.run(row.run_id).record))
            except RecordError:
                return Spent(0.0, 0, None)
            if row.status is None:
                return spent
            self._ended[row.run_id] = spent
        return self._ended[row.run_id]
