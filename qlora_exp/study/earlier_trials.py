"""Trials that this database didn't create: those of earlier studies, and those of a lost database, from their runs'
records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from qlora_exp.errors import ConfigError, nearest, raise_all
from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.records.upgrade import stored_settings_of
from qlora_exp.study.distributions import contains, distribution, encode_value
from qlora_exp.study.objectives import outcome_of
from qlora_exp.study.samplers import EARLIER_TRIAL_NUMBER
from qlora_exp.study.spec import is_trial_of
from qlora_exp.study.storage import sqlite_file
from qlora_exp.study.types import Axis, StudySpec

STATES = {
    Status.COMPLETED: TrialState.COMPLETE,
    Status.PRUNED: TrialState.PRUNED,
    Status.OUT_OF_MEMORY: TrialState.PRUNED,
    Status.DIVERGED: TrialState.PRUNED,
    Status.FAILED: TrialState.FAIL,
}


def earlier_trials(spec: StudySpec, storage: optuna.storages.BaseStorage) -> list[FrozenTrial]:
    """Return finished trials of the ``warm_start`` studies in the same storage, for the sampler only.

    They have no number in this study and don't count. Parameters that aren't on an axis are dropped, as are trials
    without any.

    Raises:
        ConfigError: no such study, or one with different objectives.
    """
    if not spec.warm_start:
        return []
    studies = {study.study_name: study for study in storage.get_all_studies()}
    raise_all([error for name in spec.warm_start if (error := _warm_start_problem(name, spec, studies))])
    trials = [
        trial
        for name in spec.warm_start
        for trial in storage.get_all_trials(
            studies[name]._study_id, states=(TrialState.COMPLETE, TrialState.PRUNED), deepcopy=True
        )
    ]
    return [trial for trial in trials if _restrict_to_axes(trial, spec.axes)]


def check_warm_start(spec: StudySpec) -> None:
    """Raise :class:`ConfigError` if ``warm_start`` names studies but the database doesn't exist. Looking for them in it
    would create it."""
    file = sqlite_file(spec.storage)
    if file is not None and not file.exists():
        raise_all([error for name in spec.warm_start if (error := _warm_start_problem(name, spec, {}))])


def trials_of_records(spec: StudySpec, records: Sequence[RunRecord]) -> list[FrozenTrial]:
    """Return the study's trials by number, from the records of their runs.

    The last attempt counts. A trial without a record, or whose run hadn't ended, is WAITING.
    """
    latest: dict[int, RunRecord] = {}
    for record in records:
        if record.trial and is_trial_of(record, spec):
            previous = latest.get(record.trial.number)
            if previous is None or previous.trial is None or previous.trial.attempt <= record.trial.attempt:
                latest[record.trial.number] = record
    return [_trial_of(latest.get(number), spec) for number in range(max(latest, default=-1) + 1)]


def _warm_start_problem(name: str, spec: StudySpec, studies: Mapping[str, Any]) -> ConfigError | None:
    where = f"sweep.warm_start: {name}"
    if name not in studies or name == spec.name:
        others = set(studies) - {spec.name}
        hint = nearest(name, others) if others else "the storage holds no other study; leave sweep.warm_start out"
        return ConfigError("no earlier study of this name", where, hint)
    objectives = (stored_settings_of(studies[name].user_attrs) or {}).get("objectives")
    if objectives != list(spec.objectives):
        return ConfigError(f"its objectives differ: {objectives}", where, f"this study's: {list(spec.objectives)}")
    return None


def _restrict_to_axes(trial: FrozenTrial, axes: Sequence[Axis]) -> bool:
    """Reduce the trial to the parameters that fit the axes; return whether there are any."""
    spaces, params = _on_axes(axes, trial.params)
    trial.params, trial.distributions = params, spaces
    trial.number = EARLIER_TRIAL_NUMBER
    return bool(params)


def _trial_of(record: RunRecord | None, spec: StudySpec) -> FrozenTrial:
    if record is None or record.trial is None:
        return create_trial(state=TrialState.WAITING)
    spaces, params = _on_axes(spec.axes, record.trial.params)
    outcome = outcome_of(record, spec)
    state = STATES.get(record.status, TrialState.WAITING)
    if state is TrialState.COMPLETE and None in outcome.values:
        state = TrialState.FAIL
    constraints = dict(zip(spec.constraints, outcome.violations, strict=True))
    if record.status in (Status.OUT_OF_MEMORY, Status.DIVERGED):
        constraints[record.status.value.lower()] = 1.0
    attributes: dict[str, Any] = {"claim": {"attempt": record.trial.attempt, "owner": None}, "run_id": record.run_id}
    if state.is_finished():
        attributes |= {"status": record.status.value, "seconds": outcome.seconds}
    if record.failure is not None:
        attributes["failure"] = to_dict(record.failure)
    return create_trial(
        state=state,
        values=[value for value in outcome.values if value is not None] if state is TrialState.COMPLETE else None,
        params=params,
        distributions=spaces,
        user_attrs=attributes,
        constraints=constraints if state.is_finished() else None,
    )


def _on_axes(axes: Sequence[Axis], params: Mapping[str, Any]) -> tuple[dict[str, BaseDistribution], dict[str, Any]]:
    """Return distributions and stored values of the parameters that lie on an axis."""
    fitting = [axis for axis in axes if axis.key in params and contains(axis, encode_value(params[axis.key]))]
    spaces = {axis.key: distribution(axis) for axis in fitting}
    return spaces, {axis.key: encode_value(params[axis.key]) for axis in fitting}
