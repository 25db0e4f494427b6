"""Creating a study in Optuna's storage, opening it again, and making it anew from its runs' records."""

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
from qlora_exp.study.earlier_trials import earlier_trials, trials_of_records
from qlora_exp.study.identity import identity_of, keep_identity, new_identity
from qlora_exp.study.objectives import parse_objective
from qlora_exp.study.samplers import check_search, make_pruner, make_sampler
from qlora_exp.study.space import point_overrides
from qlora_exp.study.storage import check_whole, connect, damaged, set_aside, sqlite_file
from qlora_exp.study.types import StudySpec


def open_study(spec: StudySpec, paths: StudyPaths, url: str) -> tuple[optuna.Study, str]:
    """As :meth:`~qlora_exp.study.study.Study.open`; the study and its identity."""
    check_search(spec)
    paths.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(paths.lock):
        storage = connect(url, spec.name)
        held = _holds(storage, spec.name)
        if paths.created.exists() and not held:
            raise damaged(
                f"the database doesn't hold the study {spec.name} any more", url.rpartition("@")[2], spec.name
            )
        identity = identity_of(spec, paths, storage, held, url)
        study = _created(spec, storage)
        keep_identity(study, spec, identity)
        if not paths.created.exists():
            write_text(paths.created, "")
    return study, identity


def rebuild_study(spec: StudySpec, paths: StudyPaths, records: Sequence[RunRecord], url: str) -> None:
    """As :meth:`~qlora_exp.study.study.Study.rebuild`."""
    check_search(spec)
    paths.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(paths.lock):
        _clear_damage(url, spec.name)
        storage = connect(url, spec.name)
        if not _holds(storage, spec.name):
            study = _created(spec, storage)
            keep_identity(study, spec, spec.id or new_identity())
            study.add_trials(trials_of_records(spec, records))
        write_text(paths.created, "")


def _holds(storage: optuna.storages.BaseStorage, name: str) -> bool:
    try:
        storage.get_study_id_from_name(name)
    except KeyError:
        return False
    return True


def _created(spec: StudySpec, storage: optuna.storages.BaseStorage) -> optuna.Study:
    """The study in ``storage``, new or of before; raises :class:`StudyError` where it asks something else."""
    study = optuna.create_study(
        study_name=spec.name,
        storage=storage,
        sampler=make_sampler(spec, earlier_trials(spec, storage)),
        pruner=make_pruner(spec),
        directions=[parse_objective(text).direction for text in spec.objectives],
        load_if_exists=True,
    )
    asked, stored = _question(spec), study.user_attrs.get("asks")
    if stored is None:
        study.set_user_attr("asks", asked)
        return study
    # A key that only one of them has came or went with another version of this package.
    both = [key for key in asked if key in stored]
    changes = [f"{key}: {stored[key]} there, {asked[key]} now" for key in both if not _same(key, stored, asked, spec)]
    if changes:
        raise StudyError(
            f"the study {spec.name} exists and asks something else",
            "; ".join(changes),
            "go on with the same settings, or start another with sweep.name=NAME",
        )
    return study


def _same(key: str, stored: dict[str, Any], asked: dict[str, Any], spec: StudySpec) -> bool:
    """Studies of earlier versions have the text of an interpolation where its value is now."""
    return bool(stored[key] == asked[key] or stored[key] == spec.interpolated.get(key))


def _question(spec: StudySpec) -> dict[str, Any]:
    """What can't change once trials exist: later ones couldn't be compared, or would repeat earlier ones."""
    ladder = {} if spec.ladder is None else {"ladder": to_dict(spec.ladder)}
    return {
        **ladder,
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
            check_whole(file, name)
        except StudyError as error:
            if "damaged" not in error.what:
                raise
            set_aside(file)
