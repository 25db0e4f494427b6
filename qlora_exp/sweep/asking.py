"""What a sweep command means: the study that its overrides ask for, every point of its space checked beforehand."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_exp import budget, compose, rank_doubling, study
from qlora_exp.config import Engine, Pruner, Sampler, SweepConfig, TrackingConfig, WorkersConfig
from qlora_exp.errors import ConfigError, RecordError, raise_all
from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.redaction import redact
from qlora_exp.study.spec_file import STORAGE_VARIABLE, read_spec
from qlora_exp.study.types import Axis, AxisKind, LadderSpec, StudySpec
from qlora_exp.sweep.places import absolute, with_absolute_places, with_absolute_places_on
from qlora_exp.tables import flat

OF_THE_STUDY = tuple(f"budget.{name}" for name in budget.OF_THE_STUDY)
"""What a study may spend, and what its trials must fit into, is no trial's own."""
NOT_SWEPT = ("sweep", "sweeps", "workers", "output_root", "tracking", *OF_THE_STUDY)
NOT_NAMING = (
    *("workers", "tracking", "output_root", "sweeps", "sweep.name", "sweep.join", "sweep.storage"),
    *("sweep.n_trials", "sweep.max_failures", "sweep.max_attempts"),
    *OF_THE_STUDY,
    "budget.force",
)
"""What may change while a study goes on: the command still means the same study."""


@dataclass(frozen=True)
class Asked:
    """What a command asks for: the study, and how this time it is worked on."""

    spec: StudySpec
    paths: StudyPaths
    sweep: SweepConfig
    workers: WorkersConfig
    tracking: TrackingConfig
    config: DictConfig
    """Composed without the axes."""


def ask(overrides: Sequence[str], params: Mapping[str, str] | None = None) -> Asked:
    """The study that ``overrides`` mean, every point of its space checked as far as that can be done beforehand.

    ``params``: axes of lowest precedence; ``sweep.params`` go before them, the command line before both.

    Raises:
        ConfigError, Problems: nothing was started.
    """
    raise_all(compose.problems_of(overrides, multirun=True))
    swept = {compose.key_of(text): text.partition("=")[2] for text in overrides if compose.is_swept(text)}
    fixed = [text for text in overrides if compose.key_of(text) not in swept]
    raw = compose.compose_raw(fixed)
    settings = settings_of(raw.sweep, SweepConfig)
    if settings.name is not None and not settings.name.strip():
        raise ConfigError("a study's name can't be empty", "sweep.name", "sweep.name=NAME, or null: by its command")
    declared = {**(params or {}), **settings.params}
    texts = {**declared, **swept}
    # A fixed key that the sweep searches is an axis of one value: conditions can still refer to it.
    texts |= {compose.key_of(text): text.partition("=")[2] for text in fixed if compose.key_of(text) in texts}
    fixed = [text for text in fixed if compose.key_of(text) not in texts]
    fixed = with_absolute_places(fixed, raw)
    narrowed = [key for key, text in declared.items() if texts[key] != text]
    axes = tuple(with_absolute_places_on(axis) for axis in _axes(texts, settings, narrowed))
    ladder = rank_doubling.ladder_of(settings, fixed, axes) if settings.sampler is Sampler.ladder else None
    points = study.grid(axes) if study.is_grid(axes) and ladder is None else None
    if ladder is not None:
        axes = (*axes, *study.own_axes(ladder))
    output_root = OutputPaths.of(str(raw.output_root))
    name = settings.name or _name(fixed, swept)
    paths = output_root.study(name)
    earlier = _earlier(paths, name)
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
        enqueue=tuple({key: absolute(key, value) for key, value in point.items()} for point in settings.enqueue),
        warm_start=tuple(settings.warm_start),
        storage=_storage(settings, output_root),
        output_root=str(output_root.root),
        max_failures=settings.max_failures,
        max_attempts=settings.max_attempts,
        out_of_memory_retries=settings.out_of_memory_retries,
        synthetic=raw.training.engine is Engine.sleep,
        space={axis.key: axis.text for axis in axes},
        fixed={compose.key_of(text): compose.value_of(text) for text in _of_a_run(fixed)},
        settings=_alike(raw, axes),
        ladder=ladder,
    )
    compose.check_points([*spec.overrides, *point] for point in _points_to_check(axes))
    _check_pruner(settings, raw)
    study.check_search(spec)
    if not paths.created.exists():
        study.check_earlier(spec)
    workers, tracking = settings_of(raw.workers, WorkersConfig), settings_of(raw.tracking, TrackingConfig)
    return Asked(spec, paths, settings, workers, tracking, raw)


def run_overrides(spec: StudySpec, params: Mapping[str, Any]) -> list[str]:
    """What ``qlora-exp run`` needs to run a trial's configuration by itself, wherever it is called."""
    searched = [text for text in spec.overrides if compose.key_of(text) == compose.SEARCH_PATH]
    return [*searched, *_of_a_run(spec.overrides), *study.overrides_of(params)]


def _of_a_run(overrides: Sequence[str]) -> list[str]:
    return [
        text
        for text in overrides
        if not _belongs(compose.key_of(text), ("sweep", "workers", "output_root", *OF_THE_STUDY))
    ]


def _storage(settings: SweepConfig, outputs: OutputPaths) -> str:
    chosen = settings.storage or os.environ.get(STORAGE_VARIABLE) or f"sqlite:///{outputs.optuna_database}"
    return str(absolute("sweep.storage", chosen))


def settings_of(node: Any, kind: type[Any]) -> Any:
    try:
        built = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0], kind.__name__, "qlora-exp validate …") from None
    assert isinstance(built, kind)
    return built


def _axes(texts: Mapping[str, str], settings: SweepConfig, narrowed: Sequence[str]) -> tuple[Axis, ...]:
    raise_all(
        [
            ConfigError(f"{key} can't be an axis", f"{key}={text}", "search what a run is, not how runs are run")
            for key, text in texts.items()
            if _belongs(key, NOT_SWEPT)
        ]
    )
    raise_all(compose.problems_of([f"{key}={text}" for key, text in texts.items()], multirun=True))
    axes: tuple[Axis, ...] = study.parse_axes(
        texts, settings.conditions, lambda group: compose.groups()[group], narrowed
    )
    return axes


def _belongs(key: str, names: Sequence[str]) -> bool:
    return compose.is_hydra(key) or any(key == name or key.startswith(f"{name}.") for name in names)


def _alike(raw: DictConfig, axes: Sequence[Axis]) -> dict[str, Any]:
    """What every trial has alike, key → value, as far as it can change a trial's result."""
    free = (*NOT_SWEPT, "budget", "name", *(axis.key for axis in axes))
    plain = OmegaConf.to_container(raw, enum_to_str=True)
    return {key: absolute(key, value) for key, value in flat(redact(plain)) if not _belongs(key, free)}


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
        return study.most_trials(ladder)
    if points is None or settings.sampler not in (Sampler.auto, Sampler.grid):
        raise ConfigError("this search has no end of its own", f"study {name}", "say how many: sweep.n_trials=20")
    return len(points)


def _check_pruner(settings: SweepConfig, raw: Any) -> None:
    if settings.pruner is not Pruner.none and raw.training.evaluate_every_steps is None:
        raise ConfigError(
            "pruning looks at the validation loss during training, and none is measured",
            f"sweep.pruner={settings.pruner.value}",
            "training.evaluate_every_steps=20, or sweep.pruner=none",
        )


def _points_to_check(axes: tuple[Axis, ...]) -> Iterator[Sequence[str]]:
    """Overrides of every point where they are few; else each axis's values with the others at their first. Of an
    interval, both ends."""
    corners = tuple(_corners(axis) for axis in axes)
    corners = tuple(replace(axis, values=axis.values[:1]) if _is_ladders_seed(axis) else axis for axis in corners)
    if math.prod(len(axis.values) for axis in corners) <= compose.GRID_CHECK_LIMIT:
        spaces = [corners]
    else:
        first = [replace(axis, values=axis.values[:1]) for axis in corners]
        spaces = [tuple(axis if axis is one else first[i] for i, axis in enumerate(corners)) for one in corners]
    points = (study.overrides_of(params) for space in spaces for params in study.grid(space))
    return itertools.islice(points, compose.GRID_CHECK_LIMIT)


def _is_ladders_seed(axis: Axis) -> bool:
    return axis.key == "seed" and "ladder" in axis.tags


def _corners(axis: Axis) -> Axis:
    if axis.kind is AxisKind.CHOICE:
        return axis
    assert axis.low is not None
    assert axis.high is not None
    ends = (axis.low, axis.high) if axis.kind is AxisKind.FLOAT else (int(axis.low), int(axis.high))
    return replace(axis, kind=AxisKind.CHOICE, values=ends, low=None, high=None, step=None, log=False)


def _name(fixed: Sequence[str], swept: Mapping[str, str]) -> str:
    """The same command, the same study: the sweep's name where nothing else is said, else with a digest of the rest."""
    chosen = [text.partition("=")[2] for text in fixed if compose.key_of(text) == "sweeps"]
    naming = [text for text in fixed if not _belongs(compose.key_of(text), NOT_NAMING)]
    naming += [f"{key}={text}" for key, text in swept.items()]
    if chosen and not naming:
        return chosen[0]
    digest = hashlib.sha256("\n".join(sorted(naming)).encode()).hexdigest()[:8]
    return f"{chosen[0] if chosen else 'multirun'}-{digest}"


def _trial_overrides(fixed: Sequence[str], outputs: OutputPaths) -> Iterator[str]:
    not_theirs = ("sweep.name", "output_root", "sweep.join", "sweep.storage")
    yield from (text for text in fixed if compose.key_of(text) not in not_theirs)
    yield from study.overrides_of({"output_root": str(outputs.root)})


def _earlier(paths: StudyPaths, name: str) -> StudySpec | None:
    """What was asked before under this name; ``None``: nothing, or it can't be read."""
    try:
        earlier = read_spec(paths)
    except RecordError:
        return None
    if earlier.name != name:  # folders have letters, digits, - and _ alone
        raise ConfigError(
            f"the study {earlier.name!r} has the folder that {name!r} would have", str(paths.folder), "sweep.name=OTHER"
        )
    return earlier
