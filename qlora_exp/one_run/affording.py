"""What a run's budget will buy of its training, by what is predicted before a weight is read."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from qlora_exp.budget import limits_of
from qlora_exp.config import Config
from qlora_exp.data import Splits
from qlora_exp.errors import ConfigError
from qlora_exp.one_run.predicting import row_lengths
from qlora_exp.records import Plan

SPENT_BEFORE = "less what loading and scoring the untouched base take"


def check_budget_buys_a_step(config: Config, planned: Plan, splits: Splits) -> None:
    """By the shortest rows and the fastest that this machine is predicted to be, where that is known.

    Raises:
        ConfigError: it doesn't.
    """
    fastest = planned.predicted_train_seconds_low
    for name, limit in limits_of(config.budget).items():
        step = _of_a_step(name, config, planned, fastest, min(row_lengths(splits)))
        if step is not None and step > limit:
            what = f"the budget doesn't buy one step, which takes {step:.3g} at the least"
            raise ConfigError(what, f"budget.{name} = {limit:g}", f"budget.{name}={step * planned.max_steps:.3g} or so")


def what_it_buys(config: Config, planned: Plan, splits: Splits) -> Iterator[str]:
    """A sentence for each limit of which it is known."""
    lengths, of = row_lengths(splits), planned.max_steps
    seconds = (
        planned.predicted_train_seconds_high,
        planned.predicted_train_seconds,
        planned.predicted_train_seconds_low,
    )
    for name, limit in limits_of(config.budget).items():
        least, about, most = (_steps(limit, config, planned, name, one, statistics.fmean(lengths)) for one in seconds)
        if least is None or about is None or most is None:
            continue
        told = f"budget.{name}={limit:g} buys about {about} of {of} steps"
        if name == "tokens":
            yield f"{told}, by the mean row"
        else:
            yield f"{told} ({least} to {most}, by {planned.predicted_train_seconds_basis}), {SPENT_BEFORE}"


def _steps(
    limit: float, config: Config, planned: Plan, name: str, train_seconds: float | None, row_tokens: float
) -> int | None:
    step = _of_a_step(name, config, planned, train_seconds, row_tokens)
    return None if step is None else min(planned.max_steps, int(limit / step))


def _of_a_step(
    name: str, config: Config, planned: Plan, train_seconds: float | None, row_tokens: float
) -> float | None:
    """What one step takes of the limit ``name``; ``None`` is unknown."""
    seconds = train_seconds / planned.max_steps if train_seconds is not None else None
    match name:
        case "tokens":
            return planned.batch_size * row_tokens
        case "seconds":
            return seconds
        case "usd" if config.budget.usd_per_hour and seconds is not None:
            return seconds * config.budget.usd_per_hour / 3600.0
        case _:
            return None
