"""Record a trial's outcome in Optuna, so that samplers learn from it."""

from __future__ import annotations

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import Failure, Status
from qlora_exp.study.heartbeats import FAILURE, RUN, SECONDS, SKIPPED, STATUS
from qlora_exp.study.types import Outcome, StudySpec

INFEASIBLE = (Status.OUT_OF_MEMORY, Status.DIVERGED)
"""Recorded as PRUNED with a violated constraint of that name: samplers learn nothing from FAIL."""


def record_outcome(study: optuna.Study, spec: StudySpec, trial: FrozenTrial, outcome: Outcome) -> None:
    """End the trial in Optuna with its outcome: state, values, constraints and user attributes."""
    complete = outcome.status is Status.COMPLETED and None not in outcome.values
    failure = outcome.failure
    if outcome.status is Status.COMPLETED and not complete:
        failure = Failure("UnknownObjective", f"the run completed without a value for {spec.objectives}")
    status = Status.FAILED if failure and not complete and outcome.status is Status.COMPLETED else outcome.status
    _set_constraints(study, spec, trial, outcome)
    attributes = {STATUS: status.value, SECONDS: outcome.seconds, FAILURE: failure and to_dict(failure)}
    attributes |= {SKIPPED: outcome.skipped and to_dict(outcome.skipped)}
    for key, value in attributes.items():
        if value is not None or key in trial.user_attrs:  # overwrite what a killed process wrote
            study._storage.set_trial_user_attr(trial._trial_id, key, value)
    if outcome.skipped is not None:
        study._storage.set_trial_user_attr(trial._trial_id, RUN, None)  # the planned run never started
    if complete:
        study.tell(trial.number, [float(value) for value in outcome.values if value is not None])
    elif status in (Status.PRUNED, *INFEASIBLE):
        study.tell(trial.number, state=TrialState.PRUNED)
    else:
        study.tell(trial.number, state=TrialState.FAIL)


def _set_constraints(study: optuna.Study, spec: StudySpec, trial: FrozenTrial, outcome: Outcome) -> None:
    """Set the trial's constraints, overwriting those that a killed process set: ``Trial.set_constraint`` would
    refuse."""
    violations = dict.fromkeys(trial.constraints, 0.0) | dict(zip(spec.constraints, outcome.violations, strict=False))
    if outcome.status in INFEASIBLE:
        violations[outcome.status.value.lower()] = 1.0
    if outcome.skipped is not None:
        # A trial may be skipped within the prediction's error, since a similar one that needed no more ran out of
        # memory. Its excess may then be 0 or less, but a violation must be above 0.
        fit = outcome.skipped.fit
        violations[SKIPPED] = max(fit.excess, fit.error)
    if violations:
        handle = Trial(study, trial._trial_id)
        for name, violation in violations.items():
            if name not in trial.constraints:
                handle.set_constraint(name, violation)
            elif trial.constraints[name] != violation:
                study._storage.set_trial_system_attr(trial._trial_id, f"constraints:{name}", violation)
