"""Create a study in Optuna's storage, open it again, read it, or rebuild it from its runs' records.

Each study has a unique identity; its name is for people. Two output roots may share a storage, and a root may be
deleted and created again: a study of the same name is then a different study. The identity is created once, under the
study's lock. The storage has it first, then ``study.json``.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from qlora_exp.errors import ConfigError, StudyError, nearest, raise_all
from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.records.files import write_text
from qlora_exp.records.schema import from_dict, to_dict
from qlora_exp.records.types import RunRecord
from qlora_exp.records.upgrade import stored_settings_of
from qlora_exp.study.distributions import contains, distribution, encode_value
from qlora_exp.study.objectives import outcome_of, parse_objective
from qlora_exp.study.samplers import EARLIER_TRIAL_NUMBER, check_search, make_pruner, make_sampler
from qlora_exp.study.space import point_overrides
from qlora_exp.study.spec import is_trial_of
from qlora_exp.study.storage import (
    check_intact,
    connect,
    connect_read_only,
    damaged_error,
    set_aside,
    sqlite_file,
)
from qlora_exp.study.trials import CLAIM, FAILURE, RUN, SECONDS, STATES, STATUS, violations_of
from qlora_exp.study.types import Axis, LadderSpec, StudySpec

IDENTITY, OUTPUT_ROOT = "identity", "output_root"
"""User attributes of a study in Optuna's storage."""


EARLIER_DEFAULTS = (("task.columns.prompt", "prompt", None), ("task.columns.completion", "completion", None))
"""(key, its default in an earlier version, the present one) where both read the same rows."""


def open_study(spec: StudySpec, paths: StudyPaths, url: str) -> tuple[optuna.Study, str]:
    """Return the study and its identity; see :meth:`~qlora_exp.study.study.Study.open`."""
    check_search(spec)
    paths.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(paths.lock):
        storage = connect(url, spec.name)
        study_id = _stored_id(storage, spec.name)
        if paths.created.exists() and study_id is None:
            raise _lost_error(spec, url)
        identity = _identity_of(spec, paths, storage, study_id, url)
        study = _create_or_load(spec, storage, identity)
        if not paths.created.exists():
            write_text(paths.created, "")
    return study, identity


def read_study(spec: StudySpec, url: str) -> optuna.Study:
    """Return the study, opened without writing anything; see :meth:`~qlora_exp.study.study.Study.read`."""
    storage = connect_read_only(url, spec.name)
    study_id = _stored_id(storage, spec.name)
    if study_id is None:
        raise _lost_error(spec, url)
    attributes = storage.get_study_user_attrs(study_id)
    if None not in (spec.id, attributes.get(IDENTITY)) and attributes[IDENTITY] != spec.id:
        raise _different_study_error(spec, url, attributes)
    return optuna.load_study(study_name=spec.name, storage=storage)


def rebuild_study(spec: StudySpec, paths: StudyPaths, records: Sequence[RunRecord], url: str) -> None:
    """Rebuild the study from its runs' records after its database was damaged or lost.

    A damaged file is kept as ``….damaged-N``. Trials without a record will run again under their numbers. An existing
    study stays as it is.

    Raises:
        as :meth:`~qlora_exp.study.study.Study.open`.
    """
    check_search(spec)
    paths.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(paths.lock):
        file = sqlite_file(url)
        if file is not None and file.exists():
            with FileLock(f"{file}.lock"):
                try:
                    check_intact(file, spec.name)
                except StudyError as error:
                    if "damaged" not in error.what:
                        raise
                    set_aside(file)
        storage = connect(url, spec.name)
        if _stored_id(storage, spec.name) is None:
            study = _create_or_load(spec, storage, spec.id or _new_identity())
            study.add_trials(_trials_of_records(spec, records))
        write_text(paths.created, "")
    open_study(spec, paths, url)


def _stored_id(storage: optuna.storages.BaseStorage, name: str) -> int | None:
    """Return the storage's number of the study of this name; ``None`` if it has none."""
    try:
        return storage.get_study_id_from_name(name)
    except KeyError:
        return None


def _lost_error(spec: StudySpec, url: str) -> StudyError:
    what = f"the database no longer contains the study {spec.name}"
    return damaged_error(what, url.rpartition("@")[2], spec.name)


def _create_or_load(spec: StudySpec, storage: optuna.storages.BaseStorage, identity: str) -> optuna.Study:
    """Create the study in ``storage`` or load it; raise :class:`StudyError` if it exists with different settings."""
    study = optuna.create_study(
        study_name=spec.name,
        storage=storage,
        sampler=make_sampler(spec, _warm_start_trials(spec, storage)),
        pruner=make_pruner(spec),
        directions=[parse_objective(text).direction for text in spec.objectives],
        load_if_exists=True,
    )
    # These can't change once trials exist: later trials couldn't be compared, or would repeat earlier ones.
    settings = {} if spec.ladder is None else {"ladder": to_dict(spec.ladder)}
    settings |= {
        "axes": [f"{axis.key}={axis.text}" + (f" if {axis.condition}" if axis.condition else "") for axis in spec.axes],
        "objectives": list(spec.objectives),
        "constraints": list(spec.constraints),
        "enqueue": [list(point_overrides(point)) for point in spec.enqueue],
        "grid": spec.sampler == "grid",
    }
    settings |= spec.settings
    attributes, raised_settings = study.user_attrs, None
    stored_settings = stored_settings_of(attributes)
    if stored_settings is not None and stored_settings.get("ladder"):
        # Fields that its version didn't have get their defaults, which are what that version did.
        stored_ladder = from_dict(LadderSpec, stored_settings["ladder"], "ladder")
        stored_settings["ladder"] = to_dict(stored_ladder)
        if spec.ladder is not None and _only_more_seeds(stored_ladder, spec.ladder):
            stored_settings["ladder"] = settings["ladder"]
            raised_settings = dict(stored_settings)
    if stored_settings is not None and _only_more_enqueued(stored_settings, settings, study):
        stored_settings["enqueue"] = settings["enqueue"]
        raised_settings = dict(stored_settings)
    if stored_settings is None:
        study.set_user_attr("settings", settings)
    # A key that only one of them has was added or removed by another version of this package. Earlier versions stored
    # the text of an interpolation instead of its value.
    changes = [
        text
        for key, value in settings.items()
        if stored_settings is not None
        and key in stored_settings
        and stored_settings[key] not in (value, spec.interpolated.get(key))
        and (key, stored_settings[key], value) not in EARLIER_DEFAULTS
        for text in _changes(key, stored_settings[key], value)
    ]
    if changes:
        raise StudyError(
            f"the study {spec.name} exists with other settings",
            "; ".join(changes),
            "continue with the same settings, or start another study with sweep.name=NAME",
        )
    if raised_settings is not None:
        study.set_user_attr("settings", raised_settings)
    for key, new_value in ((IDENTITY, identity), (OUTPUT_ROOT, spec.output_root)):
        if attributes.get(key) != new_value:
            study.set_user_attr(key, new_value)
    return study


def _only_more_seeds(stored: LadderSpec, now: LadderSpec) -> bool:
    """Return whether the two differ in nothing but a larger ``max_seeds`` now: more seeds settle what was undecided."""
    as_stored = replace(now, max_seeds=stored.max_seeds, raised_from=stored.raised_from)
    return as_stored == stored and now.max_seeds > stored.max_seeds and now.raised_from != stored.raised_from


def _only_more_enqueued(stored: Mapping[str, Any], now: Mapping[str, Any], study: optuna.Study) -> bool:
    """Return whether points are only added to the end of ``sweep.enqueue``, before any trial has another point: each
    trial's point follows from its number, so that no trial is lost or repeated."""
    earlier, later = stored.get("enqueue") or [], now["enqueue"]
    grows = len(later) > len(earlier) and later[: len(earlier)] == earlier
    return grows and len(study.get_trials(deepcopy=False)) <= len(earlier)


def _changes(key: str, stored: Any, now: Any) -> list[str]:
    """Return a text for each changed part of a setting that differs."""
    if isinstance(stored, dict) and isinstance(now, dict):
        return [
            f"{key}.{name}: {stored.get(name)} in the study, {value} now"
            for name, value in now.items()
            if stored.get(name) != value
        ]
    return [f"{key}: {stored} in the study, {now} now"]


# Which study is it?


def _identity_of(
    spec: StudySpec, paths: StudyPaths, storage: optuna.storages.BaseStorage, study_id: int | None, url: str
) -> str:
    """Return the study's identity, a new one if it has none. ``study_id``: of the storage's study of this name.

    Raises:
        StudyError: the stored study is a different one.
    """
    file = _study_file(paths)
    local = file.get("id")
    attributes = storage.get_study_user_attrs(study_id) if study_id is not None else {}
    stored = attributes.get(IDENTITY)
    own = url == f"sqlite:///{OutputPaths.of(spec.output_root).optuna_database}"
    if local is not None and _is_copy(file, paths):
        if not own:
            raise _different_study_error(spec, url, attributes)
        # Original and copy continue as two studies. A copy that has already run has its identity in its storage.
        return str(stored) if attributes.get(OUTPUT_ROOT) == spec.output_root and stored != local else _new_identity()
    if (
        stored is not None
        and local in (stored, None)
        and (local or own or _belongs_to_folder(spec, paths, storage, study_id))
    ):
        return str(stored)
    if stored is None and (own or _belongs_to_folder(spec, paths, storage, study_id)):
        return str(local or _new_identity())
    raise _different_study_error(spec, url, attributes)


def _new_identity() -> str:
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
    if paths.created.exists() or study_id is None:
        return True
    outputs = OutputPaths.of(spec.output_root)
    run_ids = [trial.user_attrs.get(RUN) for trial in storage.get_all_trials(study_id, deepcopy=False)]
    known_run_ids = [str(run_id) for run_id in run_ids if run_id is not None]
    if known_run_ids:
        return any(outputs.run(run_id).folder.is_dir() for run_id in known_run_ids)
    return bool(storage.get_study_user_attrs(study_id).get(OUTPUT_ROOT, spec.output_root) == spec.output_root)


def _different_study_error(spec: StudySpec, url: str, attributes: dict[str, Any]) -> StudyError:
    original_root = attributes.get(OUTPUT_ROOT)
    return StudyError(
        f"the storage has a different study named {spec.name}",
        url.rpartition("@")[2] + (f", created under {original_root}" if original_root else ""),
        "choose another name with sweep.name=OTHER, or delete the stored study with optuna delete-study",
    )


# Trials that this database didn't create: those of earlier studies, and those of a lost database.


def check_warm_start(spec: StudySpec) -> None:
    """Raise :class:`ConfigError` if ``warm_start`` names studies but the database doesn't exist. Looking for them in it
    would create it."""
    file = sqlite_file(spec.storage)
    if file is not None and not file.exists():
        raise_all([error for name in spec.warm_start if (error := _warm_start_problem(name, spec, {}))])


def _warm_start_trials(spec: StudySpec, storage: optuna.storages.BaseStorage) -> list[FrozenTrial]:
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
    for trial in trials:
        trial.distributions, trial.params = _on_axes(spec.axes, trial.params)
        trial.number = EARLIER_TRIAL_NUMBER
    return [trial for trial in trials if trial.params]


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


def _trials_of_records(spec: StudySpec, records: Sequence[RunRecord]) -> list[FrozenTrial]:
    """Return the study's trials by number, from the records of their runs.

    The last attempt counts. A trial without a record, or whose run hadn't ended, is WAITING.
    """
    latest: dict[int, FrozenTrial] = {}
    attempts: dict[int, int] = {}
    for record in records:
        if record.trial and is_trial_of(record, spec):
            number, attempt = record.trial.number, record.trial.attempt
            if attempt >= attempts.get(number, attempt):
                attempts[number] = attempt
                latest[number] = _trial_of(record, record.trial.params, attempt, spec)
    return [
        latest.get(number) or create_trial(state=TrialState.WAITING) for number in range(max(latest, default=-1) + 1)
    ]


def _trial_of(record: RunRecord, params: Mapping[str, Any], attempt: int, spec: StudySpec) -> FrozenTrial:
    distributions, stored_params = _on_axes(spec.axes, params)
    outcome = outcome_of(record, spec)
    state = STATES.get(record.status, TrialState.WAITING)
    if state is TrialState.COMPLETE and None in outcome.values:
        state = TrialState.FAIL
    attributes: dict[str, Any] = {CLAIM: {"attempt": attempt, "owner": None}, RUN: record.run_id}
    if state.is_finished():
        attributes |= {STATUS: record.status.value, SECONDS: outcome.seconds}
    if record.failure is not None:
        attributes[FAILURE] = to_dict(record.failure)
    pilot_loss = record.training.pilot_loss if record.training is not None else None
    return create_trial(
        state=state,
        values=[value for value in outcome.values if value is not None] if state is TrialState.COMPLETE else None,
        params=stored_params,
        distributions=distributions,
        user_attrs=attributes,
        intermediate_values=None if pilot_loss is None else {pilot_loss.step: pilot_loss.loss},
        constraints=violations_of(spec, outcome) if state.is_finished() else None,
    )


def _on_axes(axes: Sequence[Axis], params: Mapping[str, Any]) -> tuple[dict[str, BaseDistribution], dict[str, Any]]:
    """Return distributions and stored values of the parameters that lie on an axis."""
    fitting = [axis for axis in axes if axis.key in params and contains(axis, encode_value(params[axis.key]))]
    distributions = {axis.key: distribution(axis) for axis in fitting}
    return distributions, {axis.key: encode_value(params[axis.key]) for axis in fitting}
