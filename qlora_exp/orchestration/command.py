"""Build the study that a sweep command's overrides describe, and check every point of its space."""

from __future__ import annotations

import copy
import datetime
import hashlib
import itertools
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_exp.config.choices import groups
from qlora_exp.config.compose import GRID_CHECK_LIMIT, check_candidates, compose_raw
from qlora_exp.config.interpolations import (
    depends_on,
    resolve_outside,
    resolve_value,
    settings_from_outside,
    unresolved_texts,
)
from qlora_exp.config.override_errors import problems_of
from qlora_exp.config.overrides import SEARCH_PATH, has_interpolation, is_hydra, is_swept, override_key, override_value
from qlora_exp.config.schema import Engine, Pruner, Sampler, SweepConfig, TrackingConfig, WorkersConfig
from qlora_exp.errors import ConfigError, RecordError, raise_all
from qlora_exp.estimate import budget
from qlora_exp.formatting import flatten
from qlora_exp.orchestration.absolute_paths import absolute_value, with_absolute_paths, with_absolute_values
from qlora_exp.orchestration.study_names import check_name
from qlora_exp.paths import OutputPaths, StudyPaths, study_name
from qlora_exp.rank_doubling.settings import ladder_axes, ladder_of, max_trials
from qlora_exp.records.redaction import redact
from qlora_exp.study.space import grid, is_grid, parse_axes, point_overrides
from qlora_exp.study.spec import STORAGE_VARIABLE, read_spec
from qlora_exp.study.types import Axis, AxisKind, LadderSpec, StudySpec

STUDY_KEYS = tuple(f"budget.{name}" for name in budget.STUDY_LIMITS)
"""Budget limits that apply to the whole study; no trial has them as its own."""
NOT_SWEPT = ("sweep", "sweeps", "workers", "output_root", "tracking", *STUDY_KEYS)
IGNORED_IN_NAME = (
    *("workers", "tracking", "output_root", "sweeps", "sweep.name", "sweep.join", "sweep.storage"),
    *("sweep.n_trials", "sweep.max_failures", "sweep.max_attempts"),
    *STUDY_KEYS,
    "budget.force",
)
"""Settings that may change while a study continues: the command still means the same study."""
UNRESOLVED = ("tracking.uri", "sweep.name", "sweep.storage", "sweep.params", "sweep.enqueue", "sweep.conditions")
"""Interpolations in these settings stay unresolved: they may hold a password, or are resolved elsewhere."""


@dataclass(frozen=True)
class SweepCommand:
    """What a command asks for: the study, and the settings of this call."""

    spec: StudySpec
    paths: StudyPaths
    sweep: SweepConfig
    workers: WorkersConfig
    tracking: TrackingConfig
    config: DictConfig
    """Composed without the axes."""
    fixed_axes: tuple[str, ...] = ()
    """Overrides that set one value for an axis that the sweep's file searches."""


def study_spec(overrides: Sequence[str], params: Mapping[str, str] | None = None) -> SweepCommand:
    """Return the study that ``overrides`` describe, with every point of its space checked as far as possible.

    ``params``: axes with the lowest precedence; ``sweep.params`` override them, the command line overrides both.

    Raises:
        ConfigError, Problems: nothing was started.
    """
    from qlora_exp.study.open import check_warm_start
    from qlora_exp.study.samplers import check_search

    overrides, as_written = _resolve_environment(overrides)
    raise_all(problems_of(overrides, multirun=True))
    swept = {override_key(text): text.partition("=")[2] for text in overrides if is_swept(text)}
    fixed = [text for text in overrides if override_key(text) not in swept]
    raw = compose_raw(fixed)
    settings = _settings(raw)
    declared = {key: _resolve_axis(key, text) for key, text in {**(params or {}), **settings.params}.items()}
    texts = {**declared, **swept}
    # A fixed key that the sweep searches becomes an axis with one value, so that conditions can still refer to it.
    texts |= {override_key(text): text.partition("=")[2] for text in fixed if override_key(text) in texts}
    single_valued = [text for text in fixed if override_key(text) in texts]
    fixed_axes = [
        text for text in fixed if text.partition("=")[2] != declared.get(override_key(text), text.partition("=")[2])
    ]
    fixed = [text for text in fixed if override_key(text) not in texts]
    name_texts = [as_written.get(text, text) for text in with_absolute_paths(fixed, raw)]
    from_files = settings_from_outside(raw, (*UNRESOLVED, *texts))
    texts_now_fixed = _texts_replaced(as_written, raw, from_files)
    if from_files:
        fixed += point_overrides(from_files)
        raw = compose_raw([*fixed, *single_valued])
    fixed = with_absolute_paths(fixed, raw)
    narrowed = [key for key, text in declared.items() if texts[key] != text]
    axes = tuple(with_absolute_values(axis) for axis in _axes(texts, settings, narrowed))
    ladder = ladder_of(settings, fixed, axes) if settings.sampler is Sampler.ladder else None
    points = grid(axes) if is_grid(axes) and ladder is None else None
    if ladder is not None:
        axes = (*axes, *ladder_axes(ladder))
    output_root = OutputPaths.of(str(raw.output_root))
    if settings.name is not None:
        name = study_name(settings.name)
    else:
        name = _default_name(name_texts, {key: _value_text(as_written[f"{key}={swept[key]}"]) for key in swept})
    paths = output_root.study(name)
    earlier = _existing_spec(paths, name)
    if earlier is None:
        check_name(name)
    else:
        name = earlier.name  # as stored: the same characters may be in another Unicode normal form
    shared_settings, interpolated = _shared_settings(raw, axes)
    spec = StudySpec(
        name=name,
        question=settings.question,
        created_at=earlier.created_at if earlier else datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        overrides=tuple(_trial_overrides(fixed, output_root)),
        axes=axes,
        objectives=tuple(settings.objectives),
        constraints=tuple(settings.constraints),
        sampler=_sampler(settings.sampler, points is not None),
        sampler_options=dict(settings.sampler_options),
        pruner=settings.pruner.value,
        pruner_options=dict(settings.pruner_options),
        n_trials=_n_trials(settings, points, ladder, name),
        seed=settings.seed,
        enqueue=tuple(_enqueued(point) for point in settings.enqueue),
        warm_start=tuple(settings.warm_start),
        storage=_storage(settings, output_root),
        output_root=str(output_root.root),
        max_failures=settings.max_failures,
        max_attempts=settings.max_attempts,
        out_of_memory_retries=settings.out_of_memory_retries,
        synthetic=raw.training.engine is Engine.sleep,
        space={axis.key: axis.text for axis in axes},
        fixed={override_key(text): override_value(text) for text in _run_settings(fixed)},
        settings=shared_settings,
        interpolated=interpolated | texts_now_fixed,
        ladder=ladder,
        id=earlier.id if earlier else None,
    )
    check_candidates([*spec.overrides, *point] for point in _points_to_check(axes))
    _check_pruner(settings, raw)
    check_search(spec)
    if not paths.created.exists():
        check_warm_start(spec)
    workers, tracking = typed_settings(raw.workers, WorkersConfig), typed_settings(raw.tracking, TrackingConfig)
    return SweepCommand(spec, paths, settings, workers, tracking, raw, tuple(fixed_axes))


def _resolve_environment(overrides: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return ``overrides`` with interpolations of the environment and the like resolved, and resolved → original
    text."""
    unresolved = [text for text in overrides if _is_under(_key_text(text), UNRESOLVED)]
    values = resolve_outside([text for text in overrides if text not in unresolved])
    next_value = iter(values)
    resolved = [text if text in unresolved else next(next_value) for text in overrides]
    return resolved, dict(zip(resolved, overrides, strict=True))


def _texts_replaced(as_written: Mapping[str, str], raw: DictConfig, from_files: Collection[str]) -> dict[str, str]:
    """Return key → text of each setting whose interpolation was replaced by its value."""
    settings = dict(flatten(OmegaConf.to_container(raw, enum_to_str=True))) if from_files else {}
    changed = [text for now, text in as_written.items() if now != text and not is_swept(text)]
    on_command_line = {override_key(text): str(override_value(text)) for text in changed}
    texts: dict[str, str] = redact({key: str(settings[key]) for key in from_files} | on_command_line)
    return texts


def _key_text(text: str) -> str:
    return text.lstrip("+~").partition("=")[0]


def _value_text(text: str) -> str:
    return text.partition("=")[2]


def _resolve_axis(key: str, text: str) -> str:
    [now] = resolve_outside([f"{key}={text}"])
    return _value_text(now)


def _enqueued(point: Mapping[str, Any]) -> dict[str, Any]:
    return {key: absolute_value(key, resolve_value(value, f"sweep.enqueue: {key}")) for key, value in point.items()}


def _settings(raw: DictConfig) -> SweepConfig:
    """Return the ``sweep`` settings of a composed configuration.

    Axes and enqueued points stay as written: they may refer to an axis, so that each trial has another value.
    """
    params, enqueue = unresolved_texts(raw.sweep, "params"), unresolved_texts(raw.sweep, "enqueue")
    plain = copy.deepcopy(raw)
    OmegaConf.update(plain, "sweep.params", {}, merge=False)
    OmegaConf.update(plain, "sweep.enqueue", [], merge=False)
    settings: SweepConfig = typed_settings(plain.sweep, SweepConfig)
    return replace(settings, params=params, enqueue=enqueue)


def run_overrides(spec: StudySpec, params: Mapping[str, Any]) -> list[str]:
    """Return the overrides with which ``qlora-exp run`` runs a trial's configuration, from any folder."""
    search_path_texts = [text for text in spec.overrides if override_key(text) == SEARCH_PATH]
    # A file of sweeps/ may read from the environment what a run doesn't use. Without its value Hydra can't compose.
    others = [text for text in spec.overrides if override_key(text) in spec.interpolated]
    of_a_run = _run_settings(spec.overrides)
    others = [text for text in others if text not in of_a_run]
    return [*search_path_texts, *of_a_run, *others, *point_overrides(params)]


def _run_settings(overrides: Sequence[str]) -> list[str]:
    return [
        text
        for text in overrides
        if not _is_under(override_key(text), ("sweep", "workers", "output_root", *STUDY_KEYS))
    ]


def _storage(settings: SweepConfig, outputs: OutputPaths) -> str:
    chosen = settings.storage or os.environ.get(STORAGE_VARIABLE) or f"sqlite:///{outputs.optuna_database}"
    return str(absolute_value("sweep.storage", chosen))


def typed_settings(node: Any, kind: type[Any]) -> Any:
    """Return the node as an instance of its dataclass ``kind``."""
    try:
        built = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0], kind.__name__, "qlora-exp validate …") from None
    assert isinstance(built, kind)
    return built


def _axes(texts: Mapping[str, str], settings: SweepConfig, narrowed: Sequence[str]) -> tuple[Axis, ...]:
    raise_all(
        [
            ConfigError(
                f"{key} can't be an axis",
                f"{key}={text}",
                "an axis must be a setting of the run, not of the sweep or its workers",
            )
            for key, text in texts.items()
            if _is_under(key, NOT_SWEPT)
        ]
    )
    raise_all(problems_of([f"{key}={text}" for key, text in texts.items()], multirun=True))
    axes: tuple[Axis, ...] = parse_axes(texts, settings.conditions, lambda group: groups()[group], narrowed)
    return axes


def _is_under(key: str, names: Sequence[str]) -> bool:
    return is_hydra(key) or any(key == name or key.startswith(f"{name}.") for name in names)


def _shared_settings(raw: DictConfig, axes: Sequence[Axis]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings that all trials share, key → value, as far as they can change a trial's result.

    The second mapping has the texts of those that are written as interpolations, key → text.
    """
    searched = [axis.key for axis in axes]
    free = (*NOT_SWEPT, "budget", "name", *searched)
    names = [*searched, *(["training"] if "model" in searched else [])]  # conf/model_training/ follows the model
    settings = OmegaConf.to_container(raw, enum_to_str=True)
    shared, interpolated = {}, {}
    for key, value in flatten(redact(settings)):
        if _is_under(key, free):
            continue
        if has_interpolation(value):
            interpolated[key] = str(value)
            value = value if depends_on(raw, value, names) else redact(_resolved(raw, key))
        shared[key] = absolute_value(key, value)
    return shared, interpolated


def _resolved(raw: DictConfig, key: str) -> Any:
    try:
        value = OmegaConf.select(raw, key)
    except OmegaConfBaseException as error:
        what = str(error).splitlines()[0]
        raise ConfigError(what, key, f"{key}=VALUE, without ${{…}}") from None
    value = OmegaConf.to_container(value, resolve=True, enum_to_str=True) if OmegaConf.is_config(value) else value
    return value.name if isinstance(value, Enum) else value


def _sampler(sampler: Sampler, grid: bool) -> str:
    if sampler is Sampler.grid and not grid:
        raise ConfigError("a grid needs lists of values, not intervals", "sweep.sampler=grid", "sweep.sampler=tpe")
    if sampler is not Sampler.auto:
        return str(sampler.value)
    return str((Sampler.grid if grid else Sampler.tpe).value)


def _n_trials(settings: SweepConfig, points: Sequence[Any] | None, ladder: LadderSpec | None, name: str) -> int:
    if settings.n_trials is not None:
        return settings.n_trials
    if ladder is not None:
        return max_trials(ladder)
    if points is None or settings.sampler not in (Sampler.auto, Sampler.grid):
        raise ConfigError("the search is unbounded", f"study {name}", "set the number of trials: sweep.n_trials=20")
    return len(points)


def _check_pruner(settings: SweepConfig, raw: Any) -> None:
    if settings.pruner is not Pruner.none and raw.training.evaluate_every_steps is None:
        raise ConfigError(
            "pruning needs a validation loss during training, and none is measured",
            f"sweep.pruner={settings.pruner.value}",
            "training.evaluate_every_steps=20, or sweep.pruner=none",
        )


def _points_to_check(axes: tuple[Axis, ...]) -> Iterator[Sequence[str]]:
    """Yield the overrides of every point if they are few, else each axis's values with the other axes at their first.

    Intervals are checked at both ends.
    """
    with_ends = tuple(_interval_ends(axis) for axis in axes)
    with_ends = tuple(replace(axis, values=axis.values[:1]) if _is_ladders_seed(axis) else axis for axis in with_ends)
    if math.prod(len(axis.values) for axis in with_ends) <= GRID_CHECK_LIMIT:
        spaces = [with_ends]
    else:
        first = [replace(axis, values=axis.values[:1]) for axis in with_ends]
        spaces = [
            tuple(axis if axis is varied else first[i] for i, axis in enumerate(with_ends)) for varied in with_ends
        ]
    points = (point_overrides(params) for space in spaces for params in grid(space))
    return itertools.islice(points, GRID_CHECK_LIMIT)


def _is_ladders_seed(axis: Axis) -> bool:
    return axis.key == "seed" and "ladder" in axis.tags


def _interval_ends(axis: Axis) -> Axis:
    if axis.kind is AxisKind.CHOICE:
        return axis
    assert axis.low is not None
    assert axis.high is not None
    ends = (axis.low, axis.high) if axis.kind is AxisKind.FLOAT else (int(axis.low), int(axis.high))
    return replace(axis, kind=AxisKind.CHOICE, values=ends, low=None, high=None, step=None, log=False)


def _default_name(fixed: Sequence[str], swept: Mapping[str, str]) -> str:
    """Return the same name for the same command: the sweep's name if nothing else is set, else with a digest of the
    rest."""
    chosen = [text.partition("=")[2] for text in fixed if override_key(text) == "sweeps"]
    name_texts = [text for text in fixed if not _is_under(override_key(text), IGNORED_IN_NAME)]
    name_texts += [f"{key}={text}" for key, text in swept.items()]
    if chosen and not name_texts:
        return chosen[0]
    digest = hashlib.sha256("\n".join(sorted(name_texts)).encode()).hexdigest()[:8]
    return f"{chosen[0] if chosen else 'multirun'}-{digest}"


def _trial_overrides(fixed: Sequence[str], outputs: OutputPaths) -> Iterator[str]:
    study_keys = ("sweep.name", "output_root", "sweep.join", "sweep.storage")
    yield from (text for text in fixed if override_key(text) not in study_keys)
    yield from point_overrides({"output_root": str(outputs.root)})


def _existing_spec(paths: StudyPaths, name: str) -> StudySpec | None:
    """Return the existing study of this name; ``None``: there is none, or it can't be read."""
    try:
        earlier = read_spec(paths)
    except RecordError:
        return None
    return earlier if study_name(earlier.name) == name else None
