"""The straight line of a sweep: what is asked, the study, its parent run, the workers, the conclusion."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_exp import compose, rank_doubling, study
from qlora_exp.app import EXIT_COMPLETED, EXIT_INTERRUPTED, EXIT_RUN_FAILED, EXIT_WRONG_INPUT, Ended, tell
from qlora_exp.config import Engine, Pruner, Sampler, SweepConfig, TrackingConfig, WorkersConfig, absolute_path
from qlora_exp.environment import alive, process_identity
from qlora_exp.errors import ConfigError, QloraExpError, RecordError, StudyError, raise_all
from qlora_exp.overrides import hydra_value
from qlora_exp.paths import OutputPaths, StudyPaths, make_folder
from qlora_exp.records import Process, Status, from_dict, to_dict, write_json
from qlora_exp.redaction import redact, redact_overrides, redact_text
from qlora_exp.standing import (
    STORAGE_VARIABLE,
    Watch,
    best_table,
    read_spec,
    running,
    show_progress,
    storage_of,
    tracked,
)
from qlora_exp.study.types import Axis, AxisKind, Counts, LadderSpec, StudySpec
from qlora_exp.tables import flat

Launch = Callable[[list[list[str]]], Sequence[Any]]
"""Takes the overrides of each job, returns when all have ended; the results have Hydra's ``return_value``."""

NOT_SWEPT = ("sweep", "sweeps", "workers", "output_root", "tracking")
NOT_NAMING = (
    *("workers", "tracking", "output_root", "sweeps", "sweep.name", "sweep.join", "sweep.storage"),
    *("sweep.n_trials", "sweep.max_failures", "sweep.max_attempts"),
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


def sweep_for_hydra(config: DictConfig, arguments: Sequence[str], params: Mapping[str, str], launcher: Any) -> None:
    """Hydra's door: ``arguments`` are the command line's overrides, ``params`` those of ``hydra.sweeper.params``.

    Leaves by :class:`~qlora_exp.app.Ended`: Hydra drops what a sweeper returns.
    """
    hydra = [text for text in config.hydra.overrides.hydra if not text.startswith(("hydra.mode=", compose.SEARCH_PATH))]
    given = [text for text in config.hydra.overrides.hydra if text.startswith(compose.SEARCH_PATH)]
    own = compose.search_folders(given)[1:]
    if own:
        hydra.append(compose.search_path(own))
    try:
        asked = ask([*arguments, *hydra], params)
        code = sweep(asked, lambda jobs: launcher.launch(jobs, initial_job_idx=0))
    except QloraExpError as error:
        tell(error)
        code = EXIT_WRONG_INPUT
    raise Ended(code)


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
    settings = _settings(raw.sweep, SweepConfig)
    declared = {**(params or {}), **settings.params}
    texts = {**declared, **swept}
    # A fixed key that the sweep searches is an axis of one value: conditions can still refer to it.
    texts |= {compose.key_of(text): text.partition("=")[2] for text in fixed if compose.key_of(text) in texts}
    fixed = [text for text in fixed if compose.key_of(text) not in texts]
    fixed = _with_absolute_places(fixed, raw)
    narrowed = [key for key, text in declared.items() if texts[key] != text]
    axes = tuple(_with_absolute_places_on(axis) for axis in _axes(texts, settings, narrowed))
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
        enqueue=tuple({key: _absolute(key, value) for key, value in point.items()} for point in settings.enqueue),
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
    workers, tracking = _settings(raw.workers, WorkersConfig), _settings(raw.tracking, TrackingConfig)
    return Asked(spec, paths, settings, workers, tracking)


def sweep(asked: Asked, launch: Launch) -> int:
    """Work on the study until it is complete, stopped or has failed too often, and tell what came of it.

    Exit codes: 0 complete; 1 ``sweep.max_failures`` reached, no trial completed, or a worker failed; 130 interrupted.

    Raises:
        QloraExpError: another process orchestrates the study (and ``sweep.join`` is false), or the study can't be
            opened, or was begun with another space; nothing was started.
    """
    spec, paths = asked.spec, asked.paths
    with _orchestrating(paths, spec.name, asked.sweep.join) as first:
        opened = study.Study.open(spec, paths, spec.storage)
        _write_spec(spec, paths)
        if _is_complete(opened.counts()):
            print(f"study {spec.name} is complete; sweep.n_trials=… goes on with it, sweep.name=… starts another")
            with _tracked(asked, opened, first and not _end_is_told(paths)) as tracker:
                if tracker is not None:
                    tracker.update(tracked(opened.trials()), [row.number for row in opened.best()])
                return _conclude(opened, spec, paths)
        print(_announcement(asked, opened.counts()), file=sys.stderr, flush=True)
        if spec.ladder is not None:
            rank_doubling.announce(spec, asked.sweep.ladder)
        with _tracked(asked, opened, first) as tracker:
            with Watch(spec, opened, paths, tracker):
                code = _launch(launch, _jobs(asked), spec.name)
            return code or _conclude(opened, spec, paths)


def work(raw: Any, overrides: Sequence[str]) -> Any:
    """One launcher job: a worker that runs trials until nothing is left. Needs only the study's name and place, so
    that any launcher can carry it to another machine that shares the folder."""
    from qlora_exp.workers import run_worker

    paths = OutputPaths.of(str(raw.output_root)).study(str(raw.sweep.name))
    spec, workers = read_spec(paths), _settings(raw.workers, WorkersConfig)
    # The file holds no secrets; the command line that brought this job here does.
    own = [text for text in overrides if not text.startswith(("workers.job=", "sweep.name=", "sweep.storage="))]
    kept = [text for text in spec.overrides if compose.is_hydra(compose.key_of(text))]
    try:
        spec = replace(spec, overrides=(*own, *kept), storage=storage_of(spec, raw.sweep.storage))
        return run_worker(spec, paths, workers, int(raw.workers.job))
    except QloraExpError as error:
        tell(error)
        raise Ended(error.exit_code) from None


FILES, STORES = ("task.path", "model.path", "model.chat_template"), ("tracking.uri", "sweep.storage")
"""Settings that may name a place relative to the folder that the command was given in."""


def _with_absolute_places(fixed: Sequence[str], raw: DictConfig) -> list[str]:
    """``fixed``, and what a file of sweeps/ sets, so that they mean the same places from every folder."""
    places = {key: OmegaConf.select(raw, key) for key in (*FILES, *STORES)}
    changed = {key: _absolute(key, value) for key, value in places.items() if value != _absolute(key, value)}
    return [*(text for text in fixed if compose.key_of(text) not in changed), *study.overrides_of(changed)]


def _with_absolute_places_on(axis: Axis) -> Axis:
    values = tuple(_absolute(axis.key, value) for value in axis.values)
    return axis if values == axis.values else replace(axis, values=values, text=",".join(map(hydra_value, values)))


def _absolute(key: str, value: Any) -> Any:
    if key in FILES and isinstance(value, str):
        return absolute_path(value)
    if key not in STORES or not isinstance(value, str):
        return value
    scheme, found, name = value.partition("sqlite:///")
    relative = found and not scheme and name and not name.startswith(("/", ":", "file:"))
    return f"sqlite:///{Path(name).absolute()}" if relative else value


def _storage(settings: SweepConfig, outputs: OutputPaths) -> str:
    chosen = settings.storage or os.environ.get(STORAGE_VARIABLE) or f"sqlite:///{outputs.optuna_database}"
    return str(_absolute("sweep.storage", chosen))


def _settings(node: Any, kind: type[Any]) -> Any:
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
    return {key: _absolute(key, value) for key, value in flat(redact(plain)) if not _belongs(key, free)}


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


def _write_spec(spec: StudySpec, paths: StudyPaths) -> None:
    write_json(paths.spec, _shown(spec))


def _shown(spec: StudySpec) -> StudySpec:
    return replace(
        spec,
        overrides=tuple(redact_overrides(spec.overrides)),
        fixed=redact(spec.fixed),
        storage=redact_text(spec.storage),
    )


def _jobs(asked: Asked) -> list[list[str]]:
    spec = asked.spec
    own = [text for text in spec.overrides if not compose.is_hydra(compose.key_of(text))]
    named: dict[str, Any] = {"sweep.name": spec.name}
    if asked.sweep.storage is not None:
        named["sweep.storage"] = spec.storage
    return [[*own, *study.overrides_of(named), f"workers.job={job}"] for job in range(asked.workers.jobs)]


@contextlib.contextmanager
def _orchestrating(paths: StudyPaths, name: str, join: bool) -> Iterator[bool]:
    """Hold the study, or share it; yields whether this process is the one that holds it.

    Raises:
        RecordError: a living process holds it, and this one doesn't want to share.
    """
    from filelock import FileLock

    make_folder(paths.folder)
    me = process_identity()
    with FileLock(paths.lock):
        holder = orchestrator(paths)
        if holder is not None and not join:
            raise RecordError(
                f"study {name} is being worked on",
                f"process {holder.pid} ({paths.orchestrator})",
                "wait for it, share the work (--join, or sweep.join=true), or qlora-exp stop it",
            )
        if holder is None:
            write_json(paths.orchestrator, me)
            paths.stop.unlink(missing_ok=True)
    try:
        yield holder is None
    finally:
        if holder is None:
            paths.orchestrator.unlink(missing_ok=True)


def orchestrator(paths: StudyPaths) -> Process | None:
    """The process that orchestrates the study now; ``None`` where none does, or it has died. One on another machine
    counts as living: it can't be seen from here."""
    try:
        holder = from_dict(Process, json.loads(paths.orchestrator.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecordError):
        return None
    return None if alive(holder) is False else holder


def _launch(launch: Launch, jobs: list[list[str]], name: str) -> int:
    """Run the jobs to their end. An exit code other than 0: a worker that could not work at all, or was killed."""
    code = EXIT_COMPLETED
    try:
        results = launch(jobs)
    except Ended as ended:
        return ended.code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:  # every launcher has its own for a job that was killed
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        hint = f"qlora-exp resume {name} goes on with it"
        tell(StudyError(f"the launcher lost a worker: {reason}", f"study {name}", hint))
        return EXIT_RUN_FAILED
    for result in results:
        try:
            _ = result.return_value
        except QloraExpError as error:
            tell(error)
            code = error.exit_code
    return code


@contextlib.contextmanager
def _tracked(asked: Asked, opened: Any, wanted: bool) -> Iterator[Any]:
    """The study's tracker, told of the end however that comes; what killed hosts could not deliver goes before it."""
    if not (wanted and asked.tracking.enabled):
        yield None
        return
    from qlora_exp import tracking

    outputs = OutputPaths(asked.paths.folder.parent.parent)
    tracker = tracking.StudyTracker(asked.tracking, outputs, asked.spec.name)
    try:
        tracker.start(from_dict(tracking.StudyDefinition, to_dict(_shown(asked.spec))))
        yield tracker
    finally:
        told = [row.run_id for row in opened.trials() if row.run_id is not None and row.status is not None]
        tracking.deliver_runs(outputs, told, asked.tracking.uri)
        tracker.finish(_status(opened.counts()))


def _end_is_told(paths: StudyPaths) -> bool:
    from qlora_exp.tracking import read_state

    state = read_state(paths)
    return state is not None and state.delivered


def _is_complete(counts: Counts) -> bool:
    return counts.running + counts.waiting + counts.to_ask == 0


def _status(counts: Counts) -> Status:
    if not _is_complete(counts):
        return Status.INTERRUPTED
    return Status.COMPLETED if counts.completed else Status.FAILED


def _announcement(asked: Asked, counts: Counts) -> str:
    spec = asked.spec
    synthetic = "SYNTHETIC " if spec.synthetic else ""
    gone_on = f", {counts.finished} of them done" if counts.finished else ""
    axes = " × ".join(f"{axis.key}={axis.text}" for axis in spec.axes) or "no axes"
    search = f"{spec.sampler}, pruner {spec.pruner}"
    at_most = "at most " if spec.ladder is not None else ""
    return f"{synthetic}study {spec.name}: {at_most}{spec.n_trials} trials{gone_on} ({search})\n  {axes}"


def _conclude(opened: Any, spec: StudySpec, paths: StudyPaths) -> int:
    from qlora_exp.tables import show

    counts, best = opened.counts(), opened.best()
    if spec.ladder is not None:
        rank_doubling.conclude(opened, spec, paths)
    elif best:
        show(best_table(best, spec))
    print(("SYNTHETIC " if spec.synthetic else "") + show_progress(counts))
    outputs = OutputPaths(paths.folder.parent.parent)
    option = "" if outputs == OutputPaths.of("outputs") else f" --output-root {shlex.quote(str(outputs.root))}"
    name = shlex.quote(spec.name)
    if not _is_complete(counts):
        failed = opened.failures_reached()
        why = f"sweep.max_failures={spec.max_failures:g} is reached" if failed else "not complete"
        allow = " sweep.max_failures=null" if failed else ""
        print(f"{why}: qlora-exp resume {name}{allow}{option}")
        return EXIT_RUN_FAILED if failed else EXIT_INTERRUPTED
    if best:
        print(f"  qlora-exp best {name}{option}")
    print(f"  qlora-exp trials {name} --csv{option}")
    return EXIT_COMPLETED if counts.completed and not opened.failures_reached() else EXIT_RUN_FAILED


def request_stop(paths: StudyPaths, name: str, now: bool) -> str:
    """Ask the workers to stop, ``gracefully`` or ``now`` (also where the first has been asked for before); which.

    Raises:
        RecordError: nobody works on the study.
    """
    if orchestrator(paths) is None and not running(paths):
        raise RecordError(
            "nobody works on the study", f"study {name}", f"qlora-exp resume {shlex.quote(name)} goes on with it"
        )
    mode = "now" if now or paths.stop.is_file() else "gracefully"
    write_json(paths.stop, {"mode": mode})
    return mode


def run_overrides(spec: StudySpec, params: Mapping[str, Any]) -> list[str]:
    """What ``qlora-exp run`` needs to run a trial's configuration by itself, wherever it is called."""
    searched = [text for text in spec.overrides if compose.key_of(text) == compose.SEARCH_PATH]
    return [*searched, *_of_a_run(spec.overrides), *study.overrides_of(params)]


def _of_a_run(overrides: Sequence[str]) -> list[str]:
    return [text for text in overrides if not _belongs(compose.key_of(text), ("sweep", "workers", "output_root"))]
