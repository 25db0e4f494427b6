"""Optuna's trials: the attributes that they have in addition to Optuna's, as rows for tables, and how they end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from qlora_exp.records.fit_types import SkippedTrial
from qlora_exp.records.schema import from_dict, to_dict
from qlora_exp.records.types import Failure, Status
from qlora_exp.records.upgrade import SKIPPED_TRIAL_KEYS, renamed
from qlora_exp.study.distributions import decode_params
from qlora_exp.study.types import Counts, Outcome, StudySpec, TrialRow

CLAIM, HEARTBEAT, RUN, STATUS, SECONDS, FAILURE, MEMORY_RETRIES, INTERRUPTED_ATTEMPTS = (
    *("claim", "heartbeat", "run_id", "status", "seconds", "failure", "out_of_memory_retries", "interrupted_attempts"),
)
EARLIER_INTERRUPTED_ATTEMPTS = "uncounted_attempts"
"""The name in studies of version 1."""
SKIPPED = "predicted_not_to_fit"
"""Why a trial was not started (``records.types.SkippedTrial``); also the name of the constraint that it violates."""
FIXED_PARAMS = "fixed_params"
"""Optuna's own key for the parameters that a trial was enqueued with."""

STATES = {
    Status.COMPLETED: TrialState.COMPLETE,
    Status.PRUNED: TrialState.PRUNED,
    # Samplers learn nothing from FAIL: these are PRUNED, with a violated constraint of that name.
    Status.OUT_OF_MEMORY: TrialState.PRUNED,
    Status.DIVERGED: TrialState.PRUNED,
    Status.FAILED: TrialState.FAIL,
}


def attempt_of(trial: FrozenTrial) -> int:
    """Return how often the trial has been claimed; 0 if never."""
    return int((trial.user_attrs.get(CLAIM) or {}).get("attempt", 0))


def interrupted_attempts(trial: FrozenTrial) -> int:
    """Return how many attempts ended with an interruption; they don't count against ``sweep.max_attempts``."""
    attributes = trial.user_attrs
    return int(attributes.get(INTERRUPTED_ATTEMPTS, attributes.get(EARLIER_INTERRUPTED_ATTEMPTS, 0)))


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
    failure = attributes.get(FAILURE) or {}
    return TrialRow(
        number=trial.number,
        state=trial.state.name,
        status=Status(attributes[STATUS]) if ended and STATUS in attributes else None,
        values=tuple(trial.values) if trial.state is TrialState.COMPLETE else (None,) * len(spec.objectives),
        run_id=attributes.get(RUN),
        seconds=attributes.get(SECONDS),
        params=decode_params(spec.axes, trial.params),
        attempt=attempt_of(trial),
        feasible=all(violation <= 0 for violation in trial.constraints.values()) if ended else None,
        failure=f"{failure['kind']}: {failure['message']}" if failure else None,
        out_of_memory_retries=attributes.get(MEMORY_RETRIES, 0),
        skipped=_skipped_trial(trial) if is_skipped(trial) else None,
    )


def counts_of(trials: Sequence[FrozenTrial], n_trials: int) -> Counts:
    """Return the number of trials by state."""
    by_state = Counter(trial.state for trial in trials)
    skipped = sum(map(is_skipped, trials))
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


def record_outcome(study: optuna.Study, spec: StudySpec, trial: FrozenTrial, outcome: Outcome) -> None:
    """End the trial in Optuna with its outcome, so that samplers learn from it: state, values, constraints and user
    attributes."""
    complete = outcome.status is Status.COMPLETED and None not in outcome.values
    status, failure = outcome.status, outcome.failure
    if status is Status.COMPLETED and not complete:
        status = Status.FAILED
        failure = Failure("UnknownObjective", f"the run completed without a value for {spec.objectives}")
    # ``Trial.set_constraint`` would refuse to overwrite a constraint that a killed process set.
    for name, violation in (dict.fromkeys(trial.constraints, 0.0) | violations_of(spec, outcome)).items():
        if name not in trial.constraints:
            Trial(study, trial._trial_id).set_constraint(name, violation)
        elif trial.constraints[name] != violation:
            study._storage.set_trial_system_attr(trial._trial_id, f"constraints:{name}", violation)
    attributes = {STATUS: status.value, SECONDS: outcome.seconds, FAILURE: failure and to_dict(failure)}
    attributes |= {SKIPPED: outcome.skipped and to_dict(outcome.skipped)}
    for key, value in attributes.items():
        if value is not None or key in trial.user_attrs:  # overwrite what a killed process wrote
            study._storage.set_trial_user_attr(trial._trial_id, key, value)
    if outcome.skipped is not None:
        study._storage.set_trial_user_attr(trial._trial_id, RUN, None)  # the planned run never started
    if complete:
        study.tell(trial.number, [float(value) for value in outcome.values if value is not None])
    else:
        study.tell(trial.number, state=STATES.get(status, TrialState.FAIL))


def violations_of(spec: StudySpec, outcome: Outcome) -> dict[str, float]:
    """Return the trial's constraints, name → violation; above 0 if violated."""
    violations = dict(zip(spec.constraints, outcome.violations, strict=False))
    if outcome.status in (Status.OUT_OF_MEMORY, Status.DIVERGED):
        violations[outcome.status.value.lower()] = 1.0
    if outcome.skipped is not None:
        # A trial may be skipped within the prediction's error, since a similar one that needed no more ran out of
        # memory. Its excess may then be 0 or less, but a violation must be above 0.
        fit = outcome.skipped.fit
        violations[SKIPPED] = max(fit.excess, fit.error)
    return violations
