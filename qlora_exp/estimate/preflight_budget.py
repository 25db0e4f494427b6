"""What a run's budget will buy of its training, by what is predicted before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_exp.config.schema import Config
from qlora_exp.estimate.affordable_steps import StepCost, affordable_steps, check_buys_a_step
from qlora_exp.estimate.budget import limits_of
from qlora_exp.estimate.duration import Interval
from qlora_exp.estimate.run_estimate import row_lengths
from qlora_exp.runs.prepare import Prepared


def check_budget_buys_a_step(config: Config, prepared: Prepared) -> None:
    """By the shortest rows and the fastest that this machine is calibrated to be, where it is.

    Raises:
        ConfigError: it doesn't.
    """
    check_buys_a_step(limits_of(config.budget), config.budget.usd_per_hour, _pace(prepared))


def affordable_steps_message(config: Config, prepared: Prepared) -> Iterator[str]:
    """A sentence for each limit; a training ends after the step that reaches it."""
    for bought in affordable_steps(limits_of(config.budget), config.budget.usd_per_hour, _pace(prepared)):
        yield bought.told


def _pace(prepared: Prepared) -> StepCost:
    predicted = prepared.predicted
    return StepCost(
        extent=predicted.extent,
        shortest_row_tokens=min(row_lengths(prepared.splits)),
        seconds=_train_seconds(prepared),
        least_seconds=predicted.least_train_seconds,
        before_seconds=predicted.before_seconds,
    )


def _train_seconds(prepared: Prepared) -> Interval | None:
    planned = prepared.plan
    low, middle = planned.predicted_train_seconds_low, planned.predicted_train_seconds
    high, basis = planned.predicted_train_seconds_high, planned.predicted_train_seconds_basis
    if low is None or middle is None or high is None:
        return None
    return Interval(low, middle, high, basis or "")
