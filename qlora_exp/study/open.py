"""Create a study in Optuna's storage, open it again, or rebuild it from its runs' records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
from filelock import FileLock

from qlora_exp.errors import StudyError
from qlora_exp.paths import StudyPaths
from qlora_exp.records.files import write_text
from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import RunRecord
from qlora_exp.records.upgrade import stored_settings_of
from qlora_exp.study.earlier_trials import earlier_trials, trials_of_records
from qlora_exp.study.identity import identity_of, new_identity, store_identity
from qlora_exp.study.objectives import parse_objective
from qlora_exp.study.samplers import check_search, make_pruner, make_sampler
from qlora_exp.study.space import point_overrides
from qlora_exp.study.storage import check_intact, connect, damaged_error, set_aside, sqlite_file
from qlora_exp.study.types import StudySpec


def open_study(spec: StudySpec, paths: StudyPaths, url: str) -> tuple[optuna.Study, str]:
    """Return the study and its identity; see :meth:`~qlora_exp.study.study.Study.open`."""
    check_search(spec)
    paths.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(paths.lock):
        storage = connect(url, spec.name)
        exists = _exists(storage, spec.name)
        if paths.created.exists() and not exists:
            raise damaged_error(
                f"the database no longer contains the study {spec.name}", url.rpartition("@")[2], spec.name
            )
        identity = identity_of(spec, paths, storage, exists, url)
        study = _create_or_load(spec, storage)
        store_identity(study, spec, identity)
        if not paths.created.exists():
            write_text(paths.created, "")
    return study, identity


def rebuild_study(spec: StudySpec, paths: StudyPaths, records: Sequence[RunRecord], url: str) -> None:
    """See :meth:`~qlora_exp.study.study.Study.rebuild`."""
    check_search(spec)
    paths.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(paths.lock):
        _clear_damage(url, spec.name)
        storage = connect(url, spec.name)
        if not _exists(storage, spec.name):
            study = _create_or_load(spec, storage)
            store_identity(study, spec, spec.id or new_identity())
            study.add_trials(trials_of_records(spec, records))
        write_text(paths.created, "")


def _exists(storage: optuna.storages.BaseStorage, name: str) -> bool:
    try:
        storage.get_study_id_from_name(name)
    except KeyError:
        return False
    return True


def _create_or_load(spec: StudySpec, storage: optuna.storages.BaseStorage) -> optuna.Study:
    """Create the study in ``storage`` or load it; raise :class:`StudyError` if it exists with different settings."""
    study = optuna.create_study(
        study_name=spec.name,
        storage=storage,
        sampler=make_sampler(spec, earlier_trials(spec, storage)),
        pruner=make_pruner(spec),
        directions=[parse_objective(text).direction for text in spec.objectives],
        load_if_exists=True,
    )
    settings, stored_settings = _fixed_settings(spec), stored_settings_of(study.user_attrs)
    if stored_settings is None:
        study.set_user_attr("settings", settings)
        return study
    # A key that only one of them has was added or removed by another version of this package.
    shared_keys = [key for key in settings if key in stored_settings]
    changes = [
        f"{key}: {stored_settings[key]} in the study, {settings[key]} now"
        for key in shared_keys
        if not _is_unchanged(key, stored_settings, settings, spec)
    ]
    if changes:
        raise StudyError(
            f"the study {spec.name} exists with other settings",
            "; ".join(changes),
            "continue with the same settings, or start another study with sweep.name=NAME",
        )
    return study


def _is_unchanged(key: str, stored: dict[str, Any], settings: dict[str, Any], spec: StudySpec) -> bool:
    """Return whether a setting is unchanged. Earlier versions stored the text of an interpolation instead of its
    value."""
    return bool(stored[key] == settings[key] or stored[key] == spec.interpolated.get(key))


def _fixed_settings(spec: StudySpec) -> dict[str, Any]:
    """Return the settings that can't change once trials exist: later trials couldn't be compared, or would repeat
    earlier ones."""
    ladder_settings = {} if spec.ladder is None else {"ladder": to_dict(spec.ladder)}
    return {
        **ladder_settings,
        "axes": [f"{axis.key}={axis.text}" + (f" if {axis.condition}" if axis.condition else "") for axis in spec.axes],
        "objectives": list(spec.objectives),
        "constraints": list(spec.constraints),
        "enqueue": [list(point_overrides(point)) for point in spec.enqueue],
        "grid": spec.sampler == "grid",
    } | spec.settings


def _clear_damage(url: str, name: str) -> None:
    file = sqlite_file(url)
    if file is None or not file.exists():
        return
    with FileLock(f"{file}.lock"):
        try:
            check_intact(file, name)
        except StudyError as error:
            if "damaged" not in error.what:
                raise
            set_aside(file)
