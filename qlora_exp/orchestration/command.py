"""Build the study that a sweep command's overrides describe, and check every point of its space."""

from __future__ import annotations

import contextlib
import copy
import datetime
import hashlib
import itertools
import math
import os
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_exp.config.choices import groups
from qlora_exp.config.compose import GRID_CHECK_LIMIT, check_candidates, compose_raw, policy_of_searched_alpha
from qlora_exp.config.enums import Engine, Method, Pruner, Sampler, Variant
from qlora_exp.config.interpolations import (
    depends_on,
    resolve_outside,
    resolve_value,
    settings_from_outside,
    unresolved_texts,
)
from qlora_exp.config.model_choice import adapter_folder, teacher_run_id, variant_by_name
from qlora_exp.config.override_errors import problems_of
from qlora_exp.config.overrides import (
    SEARCH_PATH,
    has_interpolation,
    hydra_value,
    is_hydra,
    is_swept,
    override_key,
    override_value,
)
from qlora_exp.config.schema import (
    ModelConfig,
    SweepConfig,
    TrackingConfig,
    WorkersConfig,
    absolute_path,
    absolute_store,
)
from qlora_exp.errors import ConfigError, QloraExpError, RecordError, raise_all
from qlora_exp.estimate import budget
from qlora_exp.formatting import flatten
from qlora_exp.orchestration.exchanged import without_options_of_another
from qlora_exp.paths import OutputPaths, StudyPaths, study_name
from qlora_exp.rank_doubling.settings import EDITION, continued, ladder_axes, ladder_of, max_trials
from qlora_exp.records.find import LAST
from qlora_exp.records.redaction import redact
from qlora_exp.study.open import check_warm_start
from qlora_exp.study.samplers import check_search
from qlora_exp.study.space import grid, is_grid, parse_axes, point_overrides
from qlora_exp.study.spec import STORAGE_VARIABLE, read_spec
from qlora_exp.study.types import Axis, AxisKind, LadderSpec, StudySpec

STUDY_KEYS = tuple(f"budget.{name}" for name in budget.STUDY_LIMITS)
"""Budget limits that apply to the whole study; no trial has them as its own."""
NOT_SWEPT = ("sweep", "sweeps", "workers", "output_root", "tracking", "notify", *STUDY_KEYS)
IGNORED_IN_NAME = (
    *("workers", "tracking", "notify", "output_root", "sweeps", "sweep.name", "sweep.join", "sweep.storage"),
    *("sweep.n_trials", "sweep.max_failures", "sweep.max_attempts"),
    *STUDY_KEYS,
    "budget.force",
)
"""Settings that may change while a study continues: the command still means the same study."""
UNRESOLVED = (
    "tracking.uri",
    "notify",
    "sweep.name",
    "sweep.storage",
    "sweep.params",
    "sweep.enqueue",
    "sweep.conditions",
)
"""Interpolations in these settings stay unresolved: they may hold a password, or are resolved elsewhere."""
FILES, STORES = (
    ("task.path", "model.path", "model.instruct_path", "model.chat_template"),
    ("tracking.uri", "sweep.storage"),
)
"""Settings that may name a place relative to the command's working directory."""
STARTING_ADAPTER, TEACHER_RUN = "model.adapter", "distillation.teacher"
"""Settings that may name a run."""
MAX_NAME_CHARACTERS = 200
"""Optuna's databases store at most 512 bytes or characters, depending on their kind; a folder name has at most 255
bytes."""
FORBIDDEN_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories that a study's name can't have: control characters, surrogates, line separators. Others are
allowed, since emoji use them."""


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
    left_out: tuple[str, ...] = ()
    """Which options of the sweep's file don't count, and why: one line for a sampler, one for a pruner."""


def study_spec(overrides: Sequence[str], params: Mapping[str, str] | None = None) -> SweepCommand:
    """Return the study that ``overrides`` describe, with every point of its space checked as far as possible.

    ``params``: axes with the lowest precedence; ``sweep.params`` override them, the command line overrides both.

    Raises:
        ConfigError, Problems: nothing was started.
    """
    overrides, as_written = _resolve_environment(overrides)
    raise_all(problems_of(overrides, multirun=True))
    swept = {override_key(text): text.partition("=")[2] for text in overrides if is_swept(text)}
    fixed = [text for text in overrides if override_key(text) not in swept]
    raw = compose_raw(fixed)
    settings, left_out = without_options_of_another(_settings(raw), fixed)
    declared = {key: f"{key}={text}" for key, text in {**(params or {}), **settings.params}.items()}
    declared = {key: resolve_outside([text])[0].partition("=")[2] for key, text in declared.items()}
    texts = {**declared, **swept}
    # A fixed key that the sweep searches becomes an axis with one value, so that conditions can still refer to it.
    texts |= {override_key(text): text.partition("=")[2] for text in fixed if override_key(text) in texts}
    single_valued = [text for text in fixed if override_key(text) in texts]
    of_alpha = policy_of_searched_alpha(fixed, texts)
    if of_alpha:
        raw = compose_raw([*fixed, *of_alpha])
    fixed_axes = [
        text for text in fixed if text.partition("=")[2] != declared.get(override_key(text), text.partition("=")[2])
    ]
    fixed = [text for text in fixed if override_key(text) not in texts]
    name_texts = [as_written.get(text, text) for text in _with_absolute_paths(fixed, raw)]
    from_files = settings_from_outside(raw, (*UNRESOLVED, *texts))
    texts_now_fixed = _texts_replaced(as_written, raw, from_files)
    if from_files:
        fixed += point_overrides(from_files)
        raw = compose_raw([*fixed, *single_valued, *of_alpha])
    fixed = _with_absolute_paths(fixed, raw)
    narrowed = [key for key, text in declared.items() if texts[key] != text]
    axes = _axes(texts, settings, narrowed)
    raise_all([*_one_model_for_two_variants(axes, raw), *_axes_of_lora_alone(axes, raw)])
    ladder = ladder_of(settings, fixed, axes) if settings.sampler is Sampler.ladder else None
    points = grid(axes) if is_grid(axes) and ladder is None else None
    own_axes = axes
    if ladder is not None:
        axes = (*axes, *ladder_axes(ladder))
    output_root = OutputPaths.of(str(raw.output_root))
    if settings.name is not None:
        name = study_name(settings.name)
    else:
        swept_texts = {key: as_written[f"{key}={text}"].partition("=")[2] for key, text in swept.items()}
        name = _default_name(name_texts, swept_texts)
    paths = output_root.study(name)
    earlier = _existing_spec(paths, name)
    if earlier is None:
        _check_name(name)
    else:
        name = earlier.name  # as stored: the same characters may be in another Unicode normal form
        if ladder is not None and earlier.ladder is not None:
            ladder = continued(ladder, earlier.ladder, [override_key(text) for text in fixed])
            if ladder.edition < EDITION:
                axes = (*own_axes, *(axis for axis in earlier.axes if "ladder" in axis.tags))
    study_keys = ("sweep.name", "output_root", "sweep.join", "sweep.storage")
    of_trials = [text for text in fixed if override_key(text).partition(".")[0] != "notify"]  # it may hold a secret
    trial_overrides = [text for text in of_trials if override_key(text) not in study_keys]
    storage = settings.storage or os.environ.get(STORAGE_VARIABLE) or f"sqlite:///{output_root.optuna_database}"
    shared_settings, interpolated = _shared_settings(raw, axes)
    spec = StudySpec(
        name=name,
        question=settings.question,
        created_at=earlier.created_at if earlier else datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        overrides=(*trial_overrides, *point_overrides({"output_root": str(output_root.root)})),
        axes=axes,
        objectives=tuple(settings.objectives),
        constraints=tuple(settings.constraints),
        sampler=_sampler(settings.sampler, points is not None),
        sampler_options=dict(settings.sampler_options),
        pruner=settings.pruner.value,
        pruner_options=dict(settings.pruner_options),
        n_trials=_n_trials(settings, points, ladder, name),
        seed=settings.seed,
        enqueue=tuple(
            {key: _absolute_value(key, resolve_value(value, f"sweep.enqueue: {key}")) for key, value in point.items()}
            for point in settings.enqueue
        ),
        warm_start=tuple(settings.warm_start),
        storage=str(_absolute_value("sweep.storage", storage)),
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
    only_enqueued = 0 < spec.n_trials <= len(spec.enqueue)  # then no other point of the space is run
    points_to_check = map(point_overrides, spec.enqueue) if only_enqueued else _points_to_check(axes)
    check_candidates([*spec.overrides, *point] for point in points_to_check)
    if settings.pruner is not Pruner.none and raw.training.evaluate_every_steps is None:
        raise ConfigError(
            "pruning needs a validation loss during training, and none is measured",
            f"sweep.pruner={settings.pruner.value}",
            "training.evaluate_every_steps=20, or sweep.pruner=none",
        )
    check_search(spec)
    if not paths.created.exists():
        check_warm_start(spec)
    workers, tracking = typed_settings(raw.workers, WorkersConfig), typed_settings(raw.tracking, TrackingConfig)
    return SweepCommand(spec, paths, settings, workers, tracking, raw, tuple(fixed_axes), tuple(left_out))


def _resolve_environment(overrides: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return ``overrides`` with interpolations of the environment and the like resolved, and resolved → original
    text."""
    unresolved = [text for text in overrides if _is_under(text.lstrip("+~").partition("=")[0], UNRESOLVED)]
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
    of_a_run = _run_settings(spec.overrides)
    others = [text for text in spec.overrides if override_key(text) in spec.interpolated and text not in of_a_run]
    return [*search_path_texts, *of_a_run, *others, *point_overrides(params)]


def _run_settings(overrides: Sequence[str]) -> list[str]:
    others = ("sweep", "workers", "output_root", "notify", *STUDY_KEYS)
    return [text for text in overrides if not _is_under(override_key(text), others)]


def typed_settings(node: Any, kind: type[Any]) -> Any:
    """Return the node as an instance of its dataclass ``kind``."""
    try:
        built = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0], kind.__name__, "qlora-exp validate …") from None
    assert isinstance(built, kind)
    return built


def _axes(texts: Mapping[str, str], settings: SweepConfig, narrowed: Sequence[str]) -> tuple[Axis, ...]:
    hint = "an axis must be a setting of the run, not of the sweep or its workers"
    wrong = {key: text for key, text in texts.items() if _is_under(key, NOT_SWEPT)}
    raise_all([ConfigError(f"{key} can't be an axis", f"{key}={text}", hint) for key, text in wrong.items()])
    raise_all(problems_of([f"{key}={text}" for key, text in texts.items()], multirun=True))
    raise_all(_last_as_an_axis(texts))
    axes: list[Axis] = []
    for axis in parse_axes(texts, settings.conditions, lambda group: groups()[group], narrowed):
        values = tuple(_absolute_value(axis.key, value) for value in axis.values)
        same = values == axis.values
        axes.append(axis if same else replace(axis, values=values, text=",".join(map(hydra_value, values))))
    return tuple(axes)


def _last_as_an_axis(texts: Mapping[str, str]) -> list[ConfigError]:
    """Return the errors for ``model.adapter=null,last`` and the like: it would be another run in each trial."""
    where = [(key, text) for key in (STARTING_ADAPTER, TEACHER_RUN) if LAST in (text := texts.get(key, "")).split(",")]
    what, named = "last would mean another run in each trial", "the run's id: "
    return [ConfigError(what, f"{key}={text}", f"{named}{key}={text.replace(LAST, 'RUN')}") for key, text in where]


def _one_model_for_two_variants(axes: Sequence[Axis], raw: DictConfig) -> list[ConfigError]:
    """Return the error for an axis of both variants of a single model: its weights are the same in both."""
    variants = next((axis for axis in axes if axis.key == "model.variant" and len(axis.values) > 1), None)
    second = {"hub": "instruct_id", "local": "instruct_path"}.get(str(raw.model.family))
    if variants is None or second is None or raw.model[second] or any(axis.key == f"model.{second}" for axis in axes):
        return []
    example = "OWNER/NAME" if second == "instruct_id" else "PATH"
    hint = f"model.{second}={example} for a pair, or a single model.variant (task.format=plain,chat compares formats)"
    return [ConfigError("base and instruct would be the same model", f"model.variant={variants.text}", hint)]


def _axes_of_lora_alone(axes: Sequence[Axis], raw: DictConfig) -> list[ConfigError]:
    """Return an error for each axis ``lora.*`` of a search without ``method=lora``: all its trials would be equal."""
    methods = next(([str(value) for value in axis.values] for axis in axes if axis.key == "method"), None)
    methods = [str(raw.method.kind)] if methods is None else methods
    if Method.lora.value in methods:
        return []
    name = ",".join(methods)
    what, hint = f"method={name} has no LoRA adapters", f"method=lora, or an axis that method={name} reads"
    return [
        ConfigError(f"{what}: trials that differ in {axis.key} would be equal", f"{axis.key}={axis.text}", hint)
        for axis in axes
        if axis.key.startswith("lora.") and len(axis.values) != 1
    ]


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
        shared[key] = _absolute_value(key, value)
    if shared.get("model.variant") == Variant.auto.name and not any(_is_under(key, ("model",)) for key in searched):
        # What auto means now: earlier versions had a default here, and the meaning of auto may change.
        with contextlib.suppress(QloraExpError, OmegaConfBaseException):
            shared["model.variant"] = variant_by_name(typed_settings(raw.model, ModelConfig)).name
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


def _points_to_check(axes: tuple[Axis, ...]) -> Iterator[Sequence[str]]:
    """Yield the overrides of every point if they are few, else each axis's values with the other axes at their first.

    Intervals are checked at both ends, a ladder's first seed alone.
    """
    listed: list[Axis] = []
    for axis in axes:
        if axis.kind is not AxisKind.CHOICE:
            known = [end for end in (axis.low, axis.high) if end is not None]
            ends = tuple(known if axis.kind is AxisKind.FLOAT else map(int, known))
            axis = replace(axis, kind=AxisKind.CHOICE, values=ends, low=None, high=None, step=None, log=False)
        is_ladders_seed = axis.key == "seed" and "ladder" in axis.tags
        listed.append(replace(axis, values=axis.values[:1]) if is_ladders_seed else axis)
    spaces = [listed]
    if math.prod(len(axis.values) for axis in listed) > GRID_CHECK_LIMIT:
        first = [replace(axis, values=axis.values[:1]) for axis in listed]
        spaces = [[*first[:i], axis, *first[i + 1 :]] for i, axis in enumerate(listed)]
    points = (point_overrides(params) for space in spaces for params in grid(space))
    return itertools.islice(points, GRID_CHECK_LIMIT)


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


def _existing_spec(paths: StudyPaths, name: str) -> StudySpec | None:
    """Return the existing study of this name; ``None``: there is none, or it can't be read."""
    try:
        earlier = read_spec(paths)
    except RecordError:
        return None
    return earlier if study_name(earlier.name) == name else None


def _check_name(name: str) -> None:
    """Raise :class:`ConfigError` if a new study can't have this name: a terminal, a command or a database would misread
    it."""
    hint = "sweep.name=NAME, or null for a name made from the command"
    problems = []
    if not name.strip():
        problems.append("a study's name can't be empty")
    if len(name) > MAX_NAME_CHARACTERS:
        problems.append(f"a study's name has at most {MAX_NAME_CHARACTERS} characters, not {len(name)}")
    if any(unicodedata.category(character) in FORBIDDEN_CATEGORIES for character in name):
        problems.append("a study's name can't hold control characters")
    if name.startswith("-"):
        problems.append("a study's name can't begin with -, which begins an option")
    if name == LAST:
        problems.append(f"a study can't be called {LAST}, which means the newest one")
    raise_all([ConfigError(what, f"sweep.name={name!a}", hint) for what in problems])


def _with_absolute_paths(fixed: Sequence[str], raw: DictConfig) -> list[str]:
    """Return ``fixed`` with absolute paths, including those that a file of sweeps/ sets, so that they mean the same
    place from every folder."""
    places = {key: _text_as_written(raw, key) for key in (*FILES, *STORES, STARTING_ADAPTER, TEACHER_RUN)}
    absolute = {key: _absolute_value(key, value) for key, value in places.items()}
    if (adapter := places[STARTING_ADAPTER]) and not has_interpolation(
        adapter
    ):  # last is the run that is the last one now
        absolute[STARTING_ADAPTER] = adapter_folder(adapter, str(raw.output_root))
    absolute[TEACHER_RUN] = teacher_run_id(places[TEACHER_RUN], str(raw.output_root))
    changed = {key: value for key, value in absolute.items() if value != places[key]}
    return [*(text for text in fixed if override_key(text) not in changed), *point_overrides(changed)]


def _text_as_written(raw: DictConfig, key: str) -> Any:
    """Return the setting's text as written, since an axis may change what an interpolation in it refers to.

    If it begins with an interpolation that gives a relative path, ``./`` is put before it.
    """
    section, _, name = key.rpartition(".")
    value = unresolved_texts(raw[section], name) if raw[section] is not None else None
    if isinstance(value, str) and value.startswith("${") and key in FILES:
        try:
            resolved = OmegaConf.select(raw, key)
        except OmegaConfBaseException:
            return value
        return value if resolved == _absolute_value(key, resolved) else f"./{value}"
    return value


def _absolute_value(key: str, value: Any) -> Any:
    """Return ``value`` of the setting ``key`` as an absolute path. A path that begins with an interpolation stays as it
    is."""
    if not isinstance(value, str) or value.startswith("${"):
        return value
    if key in FILES and has_interpolation(value):
        return os.path.join(os.getcwd(), os.path.expanduser(value.removeprefix("./")))
    if key in FILES:
        return absolute_path(value)
    return absolute_store(value) if key in STORES else value
