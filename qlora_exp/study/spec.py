"""``study.json``: what a study asks, written without secrets and read back where its folder is now."""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import replace

from qlora_exp.config.override_values import hydra_value
from qlora_exp.errors import RecordError, StudyError
from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.records.files import write_json
from qlora_exp.records.redaction import REDACTED, redact, redact_overrides, redact_text
from qlora_exp.records.schema import from_dict
from qlora_exp.records.types import RunRecord
from qlora_exp.study.types import StudySpec

STORAGE_VARIABLE = "QLORA_EXP_STORAGE"
"""Environment variable with the URL of the storage: a password stays off command lines and out of files."""


def write_spec(spec: StudySpec, paths: StudyPaths) -> None:
    """``study.json``: without secrets."""
    write_json(paths.spec, without_secrets(spec))


def without_secrets(spec: StudySpec) -> StudySpec:
    """As it is written and told."""
    return replace(
        spec,
        overrides=tuple(redact_overrides(spec.overrides)),
        fixed=redact(spec.fixed),
        storage=redact_text(spec.storage),
    )


def read_spec(paths: StudyPaths) -> StudySpec:
    """``study.json``, its places those where it is now.

    Raises:
        RecordError: it can't be read, or was moved without its database.
    """
    try:
        spec = from_dict(StudySpec, json.loads(paths.spec.read_text(encoding="utf-8")), str(paths.spec))
    except (OSError, ValueError) as error:
        raise RecordError(f"the study can't be read: {error}", str(paths.spec), "start the sweep again") from None
    return _where_it_is(spec, paths)


def is_trial_of(record: RunRecord, spec: StudySpec) -> bool:
    """Whether the run is a trial of this study, and not of another that had its name before."""
    trial = record.trial
    if trial is None or trial.study != spec.name:
        return False
    if trial.study_id is None and spec.id is not None:  # begun by a version that gave no identities
        return _moment(record.started_at) >= _moment(spec.created_at)
    return trial.study_id == spec.id or spec.id is None


def _moment(text: str) -> float:
    """Seconds; a time without a zone is UTC."""
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        return 0.0
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def _where_it_is(spec: StudySpec, paths: StudyPaths) -> StudySpec:
    """The study under the output root that its folder is in now: outputs are moved, copied and mounted elsewhere."""
    here, there = OutputPaths(paths.folder.absolute().parent.parent), OutputPaths.of(spec.output_root)
    if here == there or (there.root.exists() and here.root.samefile(there.root)):
        return spec
    own = spec.storage == f"sqlite:///{there.optuna_database}"
    if own and there.optuna_database.exists() and not here.optuna_database.exists():
        what = f"the study {spec.name} was moved without its database and its runs"
        hint = f"move all of {there.root} together: runs/, studies/ and optuna.db"
        raise RecordError(what, f"{paths.folder}, and {there.optuna_database}", hint)
    kept = [text for text in spec.overrides if not text.startswith("output_root=")]
    return replace(
        spec,
        output_root=str(here.root),
        overrides=(*kept, f"output_root={hydra_value(str(here.root))}"),
        storage=f"sqlite:///{here.optuna_database}" if own else spec.storage,
    )


def storage_of(spec: StudySpec, given: str | None = None) -> str:
    """The URL of a study's storage: ``given``, else that of ``study.json``; where this one was stripped of its
    password, the one of the environment.

    Raises:
        StudyError: the password is nowhere.
    """
    hidden = REDACTED in spec.storage
    url = given or (os.environ.get(STORAGE_VARIABLE) if hidden else None) or spec.storage
    if REDACTED in url:
        hint = f"--storage URL, or {STORAGE_VARIABLE}=URL in the environment"
        raise StudyError("the study's file doesn't keep its storage's password", spec.storage, hint)
    return url
