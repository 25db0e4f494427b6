"""Reopen trials that ended badly, so that they run again under their numbers.

Optuna has no call for this: its storage doesn't change a trial that has ended. So this module writes the tables itself,
all trials in one transaction, while no process works on the study.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

from filelock import FileLock
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState

from qlora_exp.errors import ConfigError, RecordError, StudyError
from qlora_exp.paths import StudyPaths
from qlora_exp.records.files import read_record, write_json
from qlora_exp.records.types import Status
from qlora_exp.study.open import open_study
from qlora_exp.study.trials import (
    CLAIM,
    FAILURE,
    INTERRUPTED_ATTEMPTS,
    MEMORY_RETRIES,
    RUN,
    SKIPPED,
    STATUS,
    attempt_of,
    is_skipped,
)
from qlora_exp.study.types import StudySpec

DOES_NOT_FIT_CHOICE = "does_not_fit"
RETRY_CHOICES = ("failed", "out_of_memory", DOES_NOT_FIT_CHOICE)
"""Allowed values of ``--retry``: a trial's displayed status, in lower case."""


def retry_trials(spec: StudySpec, paths: StudyPaths, what: str, url: str) -> list[int]:
    """Make the study's trials that ended as ``what`` claimable again, with their attempts reset; return their numbers.

    A run with a checkpoint continues from it. The record keeps the failure among its earlier ones.

    Raises:
        StudyError: the study can't be opened, or its storage doesn't support this.
        ConfigError: the study's sampler replaces trials that don't fit by other trials.
    """
    if what == DOES_NOT_FIT_CHOICE and spec.sampler not in ("grid", "ladder"):
        raise ConfigError(
            f"the sampler {spec.sampler} replaces trials that don't fit by other trials",
            f"--retry {what}",
            "leave --retry out: resume continues with trials that fit, with --force with all",
        )
    opened, _ = open_study(spec, paths, url)
    storage = opened._storage
    backend = getattr(storage, "_backend", storage)
    if not isinstance(backend, RDBStorage):
        raise StudyError("trials in this storage can't be reopened", spec.name, "start another study: sweep.name=…")
    study_id = storage.get_study_id_from_name(spec.name)
    with FileLock(paths.lock):
        trials = [trial for trial in storage.get_all_trials(study_id) if _ended_as(trial, what)]
        # Records first: if a trial were claimed while its record still says that it ended, it would not run again.
        run_ids = [run_id for trial in trials if (run_id := trial.user_attrs.get(RUN)) is not None]
        for file in (paths.outputs.run(run_id).record for run_id in run_ids):
            with contextlib.suppress(RecordError):  # it failed before it had a record
                record = read_record(file)
                if record.status is not Status.COMPLETED:
                    write_json(file, record.replace(status=Status.INTERRUPTED, process=None))
        with _create_scoped_session(backend.scoped_session) as session:
            for trial in trials:
                _set_waiting(trial, session)
    return [trial.number for trial in trials]


def _ended_as(trial: FrozenTrial, what: str) -> bool:
    """Return whether the trial ended as ``what``. A trial that another tool ended has no status of ours."""
    if what == DOES_NOT_FIT_CHOICE:
        return is_skipped(trial)
    unfinished = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)
    return trial.state not in unfinished and trial.user_attrs.get(STATUS) == Status[what.upper()].value


def _set_waiting(trial: FrozenTrial, session: Any) -> None:
    row = models.TrialModel.find_or_raise_by_id(trial._trial_id, session, for_update=True)
    row.state, row.datetime_complete = TrialState.WAITING, None
    attempt = attempt_of(trial)
    new_attributes = {CLAIM: {"attempt": attempt, "owner": None}, INTERRUPTED_ATTEMPTS: attempt, MEMORY_RETRIES: 0}
    new_attributes |= dict.fromkeys((FAILURE, SKIPPED))
    for key, value in new_attributes.items():
        attribute = models.TrialUserAttributeModel.find_by_trial_and_key(row, key, session)
        if attribute is None:
            session.add(models.TrialUserAttributeModel(trial_id=row.trial_id, key=key, value_json=json.dumps(value)))
        else:
            attribute.value_json = json.dumps(value)
