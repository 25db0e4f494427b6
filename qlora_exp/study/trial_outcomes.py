"""How a trial's end is told to Optuna, so that samplers learn from it."""

from __future__ import annotations

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import Failure, Status
from qlora_exp.study.types import Outcome, StudySpec
from qlora_exp.study.user_attributes import FAILURE, REFUSED, RUN, SECONDS, STATUS

INFEASIBLE = (Status.OUT_OF_MEMORY, Status.DIVERGED)
"""Told as PRUNED with a broken constraint of that name: samplers learn nothing from FAIL."""


def record_outcome(study: optuna.Study, spec: StudySpec, trial: FrozenTrial, outcome: Outcome) -> None:
    complete = outcome.status is Status.COMPLETED and None not in outcome.values
    failure = outcome.failure
    if outcome.status is Status.COMPLETED and not complete:
        failure = Failure("UnknownObjective", f"the run completed without a value for {spec.objectives}")
    status = Status.FAILED if failure and not complete and outcome.status is Status.COMPLETED else outcome.status
    _constrain(study, spec, trial, outcome)
    told = {STATUS: status.value, SECONDS: outcome.seconds, FAILURE: failure and to_dict(failure)}
    told |= {REFUSED: outcome.refusal and to_dict(outcome.refusal)}
    for key, value in told.items():
        if value is not None or key in trial.user_attrs:  # of a telling that was cut short
            study._storage.set_trial_user_attr(trial._trial_id, key, value)
    if outcome.refusal is not None:
        study._storage.set_trial_user_attr(trial._trial_id, RUN, None)  # the run that was to be never began
    if complete:
        study.tell(trial.number, [float(value) for value in outcome.values if value is not None])
    elif status in (Status.PRUNED, *INFEASIBLE):
        study.tell(trial.number, state=TrialState.PRUNED)
    else:
        study.tell(trial.number, state=TrialState.FAIL)


def _constrain(study: optuna.Study, spec: StudySpec, trial: FrozenTrial, outcome: Outcome) -> None:
    """Set the trial's constraints; those of an earlier telling that was cut short are overwritten, which
    ``Trial.set_constraint`` refuses."""
    wanted = dict.fromkeys(trial.constraints, 0.0) | dict(zip(spec.constraints, outcome.violations, strict=False))
    if outcome.status in INFEASIBLE:
        wanted[outcome.status.value.lower()] = 1.0
    if outcome.refusal is not None:
        fit = outcome.refusal.fit  # refused within its error: one of its kin ran out of memory with no more
        wanted[REFUSED] = max(fit.excess, fit.error)
    if wanted:
        handle = Trial(study, trial._trial_id)
        for name, violation in wanted.items():
            if name not in trial.constraints:
                handle.set_constraint(name, violation)
            elif trial.constraints[name] != violation:
                study._storage.set_trial_system_attr(trial._trial_id, f"constraints:{name}", violation)
