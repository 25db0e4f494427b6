"""How many training steps a run's budget is enough for, predicted before any weights are read."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_exp.config.schema import Config
from qlora_exp.estimate.affordable_steps import StepCost, affordable_steps, check_covers_a_step
from qlora_exp.estimate.budget import limits_of
from qlora_exp.estimate.duration import Interval
from qlora_exp.estimate.run_estimate import row_lengths
from qlora_exp.runs.prepare import Prepared


def check_budget_covers_a_step(config: Config, prepared: Prepared) -> None:
    """Check each limit against the lower bound of one step's cost: the shortest rows at the fastest calibrated rate.

    Raises:
        ConfigError: a limit is too small for one step.
    """
    check_covers_a_step(limits_of(config.budget), config.budget.usd_per_hour, _step_cost(prepared))


def affordable_steps_message(config: Config, prepared: Prepared) -> Iterator[str]:
    """Yield a sentence for each limit. A training ends after the step that reaches the limit."""
    for affordable in affordable_steps(limits_of(config.budget), config.budget.usd_per_hour, _step_cost(prepared)):
        yield affordable.message


def _step_cost(prepared: Prepared) -> StepCost:
    predicted = prepared.predicted
    return StepCost(
        extent=predicted.extent,
        shortest_row_tokens=min(row_lengths(prepared.splits)),
        seconds=_train_seconds(prepared),
        least_seconds=predicted.least_train_seconds,
        before_seconds=predicted.before_seconds,
    )


def _train_seconds(prepared: Prepared) -> Interval | None:
    plan = prepared.plan
    low, middle = plan.predicted_train_seconds_low, plan.predicted_train_seconds
    high, basis = plan.predicted_train_seconds_high, plan.predicted_train_seconds_basis
    if low is None or middle is None or high is None:
        return None
    return Interval(low, middle, high, basis or "")
