"""Each study has a unique identity; its name is for people.

Two output roots may share a storage, and a root may be deleted and created again: a study of the same name is then a
different study. The identity is created once, under the study's lock. The storage has it first, then ``study.json``.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import optuna

from qlora_exp.errors import StudyError
from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.study.heartbeats import RUN
from qlora_exp.study.types import StudySpec

IDENTITY, OUTPUT_ROOT = "identity", "output_root"
"""User attributes of a study in Optuna's storage."""


def identity_of(spec: StudySpec, paths: StudyPaths, storage: optuna.storages.BaseStorage, held: bool, url: str) -> str:
    """Return the study's identity, a new one if it has none. ``held``: whether the storage has a study of this name.

    Raises:
        StudyError: the stored study is a different one.
    """
    file = _study_file(paths)
    local = file.get("id")
    study_id = storage.get_study_id_from_name(spec.name) if held else None
    attributes = storage.get_study_user_attrs(study_id) if study_id is not None else {}
    stored = attributes.get(IDENTITY)
    own = url == f"sqlite:///{OutputPaths.of(spec.output_root).optuna_database}"
    if local is not None and _is_copy(file, paths):
        if not own:
            raise different_study_error(spec, url, attributes)
        # Original and copy continue as two studies. A copy that has already run has its identity in its storage.
        return str(stored) if attributes.get(OUTPUT_ROOT) == spec.output_root and stored != local else new_identity()
    if (
        stored is not None
        and local in (stored, None)
        and (local or own or _belongs_to_folder(spec, paths, storage, study_id))
    ):
        return str(stored)
    if stored is None and (own or _belongs_to_folder(spec, paths, storage, study_id)):
        return str(local or new_identity())
    raise different_study_error(spec, url, attributes)


def store_identity(study: optuna.Study, spec: StudySpec, identity: str) -> None:
    """Write the identity and the output root into the storage, as far as they are new."""
    attributes = study.user_attrs
    for key, value in ((IDENTITY, identity), (OUTPUT_ROOT, spec.output_root)):
        if attributes.get(key) != value:
            study.set_user_attr(key, value)


def new_identity() -> str:
    """Return a new random identity."""
    return uuid.uuid4().hex


def _study_file(paths: StudyPaths) -> dict[str, Any]:
    try:
        raw = json.loads(paths.spec.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _is_copy(file: dict[str, Any], paths: StudyPaths) -> bool:
    """Return whether ``study.json`` was copied here from an output root that still has it."""
    own_root, original_root = paths.folder.absolute().parent.parent, Path(str(file.get("output_root")))
    if own_root == original_root or not original_root.is_dir() or original_root.samefile(own_root):
        return False
    return _study_file(StudyPaths(original_root / "studies" / paths.folder.name)).get("id") == file.get("id")


def _belongs_to_folder(
    spec: StudySpec, paths: StudyPaths, storage: optuna.storages.BaseStorage, study_id: int | None
) -> bool:
    """Return whether the storage's study belongs to this folder, although the folder doesn't say so (any more)."""
    outputs = OutputPaths.of(spec.output_root)
    if paths.created.exists() or study_id is None:
        return True
    run_ids = [trial.user_attrs.get(RUN) for trial in storage.get_all_trials(study_id, deepcopy=False)]
    known_run_ids = [str(run) for run in run_ids if run is not None]
    creation_root = storage.get_study_user_attrs(study_id).get(OUTPUT_ROOT, spec.output_root)
    return (
        any(outputs.run(run).folder.is_dir() for run in known_run_ids)
        if known_run_ids
        else bool(creation_root == spec.output_root)
    )


def different_study_error(spec: StudySpec, url: str, attributes: dict[str, Any]) -> StudyError:
    """Return the error for a study of the same name that is a different study."""
    original_root = attributes.get(OUTPUT_ROOT)
    location = url.rpartition("@")[2]
    return StudyError(
        f"the storage has a different study named {spec.name}",
        f"{location}" + (f", created under {original_root}" if original_root else ""),
        "choose another name with sweep.name=OTHER, or delete the stored study with optuna delete-study",
    )
