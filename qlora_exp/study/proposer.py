"""What decides a study's trials: a plan, or, for rank doubling, the results of the trials so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

from qlora_exp.study.objectives import parse_objective
from qlora_exp.study.space import grid
from qlora_exp.study.types import StudySpec, TrialRow

TrialPoint = dict[str, Any]
"""Axis → value of one trial. The sampler chooses the values of axes that are left out."""
Trials = Callable[[], list[TrialRow]]
"""Reads the study's trials. A proposer that doesn't need them saves the time."""


class Proposer(Protocol):
    """Decides which trials a study has, and which of them are its result."""

    replaces_skipped: bool
    """Whether a trial that was predicted not to fit is replaced by another one. Otherwise it is one of ``n_trials``."""

    def planned_point(self, number: int) -> TrialPoint:
        """Return the values that follow from the trial's number alone, so that no kill can lose or repeat them."""
        ...

    def next_point(self, trials: Trials) -> TrialPoint | None:
        """Return the values that a trial must be created with; ``None``: no trial can start now."""
        ...

    def is_done(self, trials: Trials) -> bool:
        """Return whether the study needs no further trial, even if it has fewer than ``n_trials``."""
        ...

    def best(self, trials: Sequence[TrialRow]) -> list[TrialRow]:
        """Return the best trials."""
        ...


class PlannedProposer:
    """Enqueued configurations, then the remaining points of a grid, then the sampler's suggestions."""

    def __init__(self, spec: StudySpec) -> None:
        # If every trial is enqueued, the sampler has nothing to replace one with.
        self.replaces_skipped = spec.sampler != "grid" and spec.n_trials > len(spec.enqueue)
        self._spec = spec

    @cached_property
    def _points(self) -> list[TrialPoint]:
        points = grid(self._spec.axes) if self._spec.sampler == "grid" else []
        return [*self._spec.enqueue, *(point for point in points if point not in self._spec.enqueue)]

    def planned_point(self, number: int) -> TrialPoint:
        return self._points[number] if number < len(self._points) else {}

    def next_point(self, trials: Trials) -> TrialPoint:
        return {}

    def is_done(self, trials: Trials) -> bool:
        return False

    def best(self, trials: Sequence[TrialRow]) -> list[TrialRow]:
        """Return the completed feasible trials that no other dominates; only one for a single objective."""
        directions = [parse_objective(text).direction for text in self._spec.objectives]
        losses = {
            row.number: tuple(
                value if direction == "minimize" else -value
                for value, direction in zip(row.values, directions, strict=True)
                if value is not None
            )
            for row in trials
            if row.state == "COMPLETE" and row.feasible
        }
        if len(directions) == 1:
            front = sorted(losses, key=lambda number: (losses[number], number))[:1]
        else:
            front = [
                number for number in losses if not any(_dominates(other, losses[number]) for other in losses.values())
            ]
        by_number = {row.number: row for row in trials}
        return [by_number[number] for number in front]


def _dominates(losses: Sequence[float], other_losses: Sequence[float]) -> bool:
    return losses != other_losses and all(own <= other for own, other in zip(losses, other_losses, strict=True))
