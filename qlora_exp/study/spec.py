"""``study.json``: a study's definition, written without secrets and read back for the folder that it is in now."""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import replace

from qlora_exp.config.overrides import hydra_value
from qlora_exp.errors import RecordError, StudyError
from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.records.files import write_json
from qlora_exp.records.redaction import REDACTED, redact, redact_overrides, redact_text
from qlora_exp.records.schema import from_dict
from qlora_exp.records.types import RunRecord
from qlora_exp.records.upgrade import upgrade_study
from qlora_exp.study.types import StudySpec

STORAGE_VARIABLE = "QLORA_EXP_STORAGE"
"""Environment variable with the storage's URL: keeps a password off command lines and out of files."""


def write_spec(spec: StudySpec, paths: StudyPaths) -> None:
    """Write ``study.json``, without secrets."""
    write_json(paths.spec, without_secrets(spec))


def without_secrets(spec: StudySpec) -> StudySpec:
    """Return the spec as it may be written to files and MLflow."""
    return replace(
        spec,
        overrides=tuple(redact_overrides(spec.overrides)),
        fixed=redact(spec.fixed),
        storage=redact_text(spec.storage),
    )


def read_spec(paths: StudyPaths) -> StudySpec:
    """Return the spec in ``study.json``, with paths adjusted if the folder was moved.

    Raises:
        RecordError: it can't be read, or was moved without its database.
    """
    try:
        spec = from_dict(StudySpec, upgrade_study(json.loads(paths.spec.read_text(encoding="utf-8"))), str(paths.spec))
    except (OSError, ValueError) as error:
        raise RecordError(f"the study can't be read: {error}", str(paths.spec), "start the sweep again") from None
    return _at_current_root(spec, paths)


def is_trial_of(record: RunRecord, spec: StudySpec) -> bool:
    """Return whether the run is a trial of this study, rather than of an earlier study of the same name."""
    trial = record.trial
    if trial is None or trial.study != spec.name:
        return False
    if trial.study_id is None and spec.id is not None:  # written by a version without identities
        return _unix_seconds(record.started_at) >= _unix_seconds(spec.created_at)
    return trial.study_id == spec.id or spec.id is None


def _unix_seconds(text: str) -> float:
    """Return the time in Unix seconds; a time without a zone is UTC."""
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        return 0.0
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def _at_current_root(spec: StudySpec, paths: StudyPaths) -> StudySpec:
    """Return the spec for the output root that its folder is in now: output roots are moved, copied and mounted
    elsewhere."""
    outputs, recorded_outputs = OutputPaths(paths.folder.absolute().parent.parent), OutputPaths.of(spec.output_root)
    if outputs == recorded_outputs or (recorded_outputs.root.exists() and outputs.root.samefile(recorded_outputs.root)):
        return spec
    is_default_storage = spec.storage == f"sqlite:///{recorded_outputs.optuna_database}"
    if is_default_storage and recorded_outputs.optuna_database.exists() and not outputs.optuna_database.exists():
        what = f"the study {spec.name} was moved without its database and its runs"
        hint = f"move all of {recorded_outputs.root} together: runs/, studies/ and optuna.db"
        raise RecordError(what, f"{paths.folder}, and {recorded_outputs.optuna_database}", hint)
    other_overrides = [text for text in spec.overrides if not text.startswith("output_root=")]
    return replace(
        spec,
        output_root=str(outputs.root),
        overrides=(*other_overrides, f"output_root={hydra_value(str(outputs.root))}"),
        storage=f"sqlite:///{outputs.optuna_database}" if is_default_storage else spec.storage,
    )


def storage_of(spec: StudySpec, requested: str | None = None) -> str:
    """Return the URL of the study's storage: ``requested``, else that of ``study.json``.

    If the password was removed from the URL in ``study.json``, :data:`STORAGE_VARIABLE` is used instead.

    Raises:
        StudyError: the password is nowhere.
    """
    hidden = REDACTED in spec.storage
    url = requested or (os.environ.get(STORAGE_VARIABLE) if hidden else None) or spec.storage
    if REDACTED in url:
        hint = f"--storage URL, or {STORAGE_VARIABLE}=URL in the environment"
        raise StudyError("study.json doesn't contain the storage's password", spec.storage, hint)
    return url
