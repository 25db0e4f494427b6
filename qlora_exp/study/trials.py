"""Optuna's trials as rows for tables and reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

from qlora_exp.records.schema import from_dict
from qlora_exp.records.types import SkippedTrial, Status
from qlora_exp.study.distributions import decode_params
from qlora_exp.study.heartbeats import MEMORY_RETRIES, SKIPPED, attempt_of
from qlora_exp.study.types import Counts, StudySpec, TrialRow


def counts(trials: Sequence[FrozenTrial], n_trials: int) -> Counts:
    """Return the number of trials by state."""
    by_state = Counter(trial.state for trial in trials)
    refused = count_skipped(trials)
    return Counts(
        total=max(n_trials, len(trials)),
        completed=by_state[TrialState.COMPLETE],
        pruned=by_state[TrialState.PRUNED] - refused,
        failed=by_state[TrialState.FAIL],
        running=by_state[TrialState.RUNNING],
        waiting=by_state[TrialState.WAITING],
        to_ask=max(n_trials - len(trials), 0),
        refused=refused,
    )


def count_skipped(trials: Sequence[FrozenTrial]) -> int:
    """Return how many trials were not started because they were predicted not to fit."""
    return sum(is_skipped(trial) for trial in trials)


def is_skipped(trial: FrozenTrial, bound_bytes: int | None = None) -> bool:
    """Return whether the trial was predicted not to fit, into a limit of at least ``bound_bytes`` if that is given."""
    refusal = trial.user_attrs.get(SKIPPED)
    if trial.state is not TrialState.PRUNED or refusal is None:
        return False
    return bound_bytes is None or bool(refusal["fit"]["bound_bytes"] >= bound_bytes)


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
        refusal=from_dict(SkippedTrial, attributes[SKIPPED]) if is_skipped(trial) else None,
    )
