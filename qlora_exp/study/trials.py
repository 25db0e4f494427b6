"""Optuna's trials as rows for tables and reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

from qlora_exp.records.schema import from_dict
from qlora_exp.records.types import SkippedTrial, Status
from qlora_exp.records.upgrade import SKIPPED_TRIAL_KEYS, renamed
from qlora_exp.study.distributions import decode_params
from qlora_exp.study.heartbeats import MEMORY_RETRIES, SKIPPED, attempt_of
from qlora_exp.study.types import Counts, StudySpec, TrialRow


def counts(trials: Sequence[FrozenTrial], n_trials: int) -> Counts:
    """Return the number of trials by state."""
    by_state = Counter(trial.state for trial in trials)
    skipped = count_skipped(trials)
    return Counts(
        total=max(n_trials, len(trials)),
        completed=by_state[TrialState.COMPLETE],
        pruned=by_state[TrialState.PRUNED] - skipped,
        failed=by_state[TrialState.FAIL],
        running=by_state[TrialState.RUNNING],
        waiting=by_state[TrialState.WAITING],
        to_ask=max(n_trials - len(trials), 0),
        skipped=skipped,
    )


def count_skipped(trials: Sequence[FrozenTrial]) -> int:
    """Return how many trials were not started because they were predicted not to fit."""
    return sum(is_skipped(trial) for trial in trials)


def is_skipped(trial: FrozenTrial, limit_bytes: int | None = None) -> bool:
    """Return whether the trial was predicted not to fit, into a limit of at least ``limit_bytes`` if that is given."""
    skipped = trial.user_attrs.get(SKIPPED)
    if trial.state is not TrialState.PRUNED or skipped is None:
        return False
    return limit_bytes is None or _skipped_trial(trial).fit.limit_bytes >= limit_bytes


def _skipped_trial(trial: FrozenTrial) -> SkippedTrial:
    return from_dict(SkippedTrial, renamed(trial.user_attrs[SKIPPED], SKIPPED_TRIAL_KEYS))


def trial_row(trial: FrozenTrial, spec: StudySpec) -> TrialRow:
    """Return the trial as one row."""
    attributes = trial.user_attrs
    ended = trial.state.is_finished()
    complete = trial.state is TrialState.COMPLETE
    failure = attributes.get("failure") or {}
    return TrialRow(
        number=trial.number,
        state=trial.state.name,
        status=Status(attributes["status"]) if ended and "status" in attributes else None,
        values=tuple(trial.values) if complete else (None,) * len(spec.objectives),
        run_id=attributes.get("run_id"),
        seconds=attributes.get("seconds"),
        params=decode_params(spec.axes, trial.params),
        attempt=attempt_of(trial),
        feasible=all(violation <= 0 for violation in trial.constraints.values()) if ended else None,
        failure=f"{failure['kind']}: {failure['message']}" if failure else None,
        out_of_memory_retries=attributes.get(MEMORY_RETRIES, 0),
        skipped=_skipped_trial(trial) if is_skipped(trial) else None,
    )


def best_rows(rows: Sequence[TrialRow], directions: Sequence[str]) -> list[TrialRow]:
    """Return the completed feasible trials that no other dominates; only one for a single objective."""
    candidates = [row for row in rows if row.state == "COMPLETE" and row.feasible]
    losses = {row.number: _losses(row, directions) for row in candidates}
    if len(directions) == 1:
        return sorted(candidates, key=lambda row: (losses[row.number], row.number))[:1]
    return [row for row in candidates if not any(_dominates(loss, losses[row.number]) for loss in losses.values())]


def _losses(row: TrialRow, directions: Sequence[str]) -> tuple[float, ...]:
    known = [value for value in row.values if value is not None]
    return tuple(
        value if direction == "minimize" else -value for value, direction in zip(known, directions, strict=True)
    )


def _dominates(losses: Sequence[float], other_losses: Sequence[float]) -> bool:
    return losses != other_losses and all(own <= other for own, other in zip(losses, other_losses, strict=True))
