"""The configurations that a command line means, composed once and varied without Hydra: a thousand in a second."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qlora_exp.config.checks import check
from qlora_exp.config.compose import Composer, built, compose_raw
from qlora_exp.config.group_files import default_choices, read_choice
from qlora_exp.config.groups import groups
from qlora_exp.config.interpolations import texts_of, without_outside
from qlora_exp.config.override_values import has_interpolation, hydra_value
from qlora_exp.config.overrides import is_swept, override_key, override_value
from qlora_exp.config.problems import problems_of, typed_value
from qlora_exp.config.schema import Config, EvaluationSplit, Sampler, SweepConfig
from qlora_exp.errors import ConfigError, Problems, QloraExpError, raise_all
from qlora_exp.paths import CONF
from qlora_exp.study.space import grid, is_grid, parse_axes, point_overrides
from qlora_exp.study.types import Axis, AxisKind

MOST_POINTS = 100_000
"""More can't be looked at by anybody, and would take minutes."""


@dataclass(frozen=True)
class Candidate:
    """One configuration: the axes' values, and either its configuration or why it can't be run."""

    params: dict[str, Any]
    config: Config | None
    problem: QloraExpError | None = None


@dataclass(frozen=True)
class SearchSpace:
    """``trials``: how many runs there will be; ``None`` where the search has no end of its own. Of an interval,
    ``points`` has both ends."""

    points: tuple[Candidate, ...]
    trials: int | None
    sampled: bool
    """Whether the points stand for a search between them, rather than being the trials."""
    fixed_axes: tuple[str, ...] = ()
    """Overrides that give one value to what the sweep searches."""


def search_space(overrides: Sequence[str]) -> SearchSpace:
    """What ``overrides`` mean: one run, a grid (``lora.r=8,16``), or a sweep (``sweeps=NAME``).

    Raises:
        ConfigError, Problems: a misspelt key or choice, a wrong type, too many points.
    """
    overrides = without_outside(overrides)
    raise_all(problems_of(overrides, multirun=True))
    swept = {override_key(text): text.partition("=")[2] for text in overrides if is_swept(text)}
    fixed = [text for text in overrides if override_key(text) not in swept]
    raw = compose_raw(fixed)
    first = _settings(raw)
    texts = {**first.params, **swept}
    texts |= {override_key(text): text.partition("=")[2] for text in fixed if override_key(text) in first.params}
    searched = [text for text in fixed if override_key(text) in texts]
    fixed = [text for text in fixed if text not in searched]
    fixed_axes = tuple(text for text in searched if text.partition("=")[2] != first.params[override_key(text)])
    raise_all(problems_of([f"{key}={text}" for key, text in first.params.items()], multirun=True))
    axes = parse_axes(texts, first.conditions, lambda group: groups()[group], tuple(swept))
    ladder = first.sampler is Sampler.ladder
    listed = is_grid(axes) and not ladder and first.sampler in (Sampler.auto, Sampler.grid)
    corners = tuple(_interval_ends(axis) for axis in axes)
    if ladder:
        corners = (*corners, *parse_axes({"lora.r": ",".join(map(str, _ranks(first)))}, {}))
    _refuse_too_many(corners)
    found = grid(corners)
    trials = first.n_trials or (_most_trials(first, fixed, axes) if ladder else len(found) if listed else None)
    follows = has_interpolation([axis.values for axis in axes]) or _has_interpolation(raw)
    variants = ConfigFactory(fixed, None if searched else raw, follows)
    points = (variants.point(params) for params in found)
    return SearchSpace(tuple(map(_scored_on_test, points) if ladder else points), trials, not listed, fixed_axes)


class ConfigFactory:
    """Configurations that differ from one another in axes' values only. ``fixed``: the overrides of all of them;
    ``raw``: what Hydra makes of those, where that is known; ``follows``: whether a setting may be an interpolation,
    which has another value at each point: Hydra then composes each of them."""

    def __init__(self, fixed: Sequence[str], raw: DictConfig | None = None, follows: bool = False) -> None:
        self._fixed = tuple(fixed)
        self._composer = Composer() if follows else None
        self._groups = frozenset(groups())
        self._bases: dict[tuple[tuple[str, str], ...], Config | QloraExpError] = {}
        self._nodes: dict[tuple[str, str], Any] = {}
        self._values: dict[tuple[str, str], Any] = {}
        if raw is not None and not follows:
            with contextlib.suppress(QloraExpError):  # a value may be missing that an axis gives
                self._begin(built(raw))

    def point(self, params: Mapping[str, Any]) -> Candidate:
        """``params``: axis (key or group) → value."""
        shown = dict(params)
        try:
            config = self._config(params)
        except QloraExpError as error:
            return Candidate(shown, None, error)
        problems = check(config)
        return Candidate(shown, None, Problems(problems)) if problems else Candidate(shown, config)

    def _begin(self, base: Config) -> None:
        """Remember what conf/config.yaml chose for ``base``, as far as no sweep's file chose otherwise."""
        chosen = default_choices().items()
        alike = [(group, name) for group, name in chosen if self._node(group, name) == getattr(base, group)]
        self._bases[tuple(alike)] = base

    def _config(self, params: Mapping[str, Any]) -> Config:
        if self._composer is not None:
            return built(self._composer.raw([*self._fixed, *point_overrides(params)]))
        chosen = {key: str(value) for key, value in params.items() if key in self._groups}
        base = self._base(chosen)
        values = {key: self._value(key, value) for key, value in params.items() if key not in self._groups}
        config = copy.copy(base)
        own: set[str] = set()  # sections of its own: those on the way to a value; it shares the rest with its base
        for key, value in values.items():
            path = key.split(".")[:-1]
            for depth in range(len(path)):
                place = ".".join(path[: depth + 1])
                if place not in own:
                    own.add(place)
                    _set(config, place, copy.copy(_at(config, path[: depth + 1])))
            _set(config, key, value)
        return config

    def _value(self, key: str, value: Any) -> Any:
        known = (key, hydra_value(value))
        if known not in self._values:
            self._values[known] = typed_value(key, value)
        return self._values[known]

    def _base(self, chosen: Mapping[str, str]) -> Config:
        key = tuple(chosen.items())
        if key not in self._bases:
            try:
                self._bases[key] = self._varied(chosen) or self._composed(chosen)
            except QloraExpError as error:
                self._bases[key] = error
        found = self._bases[key]
        if isinstance(found, QloraExpError):
            raise found
        return found

    def _composed(self, chosen: Mapping[str, str]) -> Config:
        return built(compose_raw([*self._fixed, *point_overrides(chosen)]))

    def _varied(self, chosen: Mapping[str, str]) -> Config | None:
        """An already composed configuration with other groups' files in the place of its own; ``None`` where only Hydra
        can say what a choice changes."""
        for other, base in self._bases.items():
            if isinstance(base, QloraExpError):
                continue
            own = dict(other)
            changed = {group: name for group, name in chosen.items() if own.get(group) != name}
            if all(self._replaceable(base, group, own.get(group), name) for group, name in changed.items()):
                return replace(base, **{group: self._node(group, name) for group, name in changed.items()})
        return None

    def _replaceable(self, base: Config, group: str, own: str | None, name: str) -> bool:
        """Whether ``base`` has in ``group`` just what the file ``own`` says, so that ``name``'s may take its place."""
        if own is None:
            return False
        overlays = (CONF / f"{group}_training" / f"{one}.yaml" for one in (own, name))
        if not hasattr(base, group) or any(file.is_file() for file in overlays):
            return False
        return self._node(group, own) == getattr(base, group) and self._node(group, name) is not None

    def _node(self, group: str, name: str) -> Any:
        """A group's file read without Hydra, with the values that are fixed; ``None`` where its defaults are more than
        files of its own folder, or where a value is still to be given."""
        if (group, name) not in self._nodes:
            node = read_choice(group, name)
            for text in self._fixed if node is not None else ():
                first, _, rest = override_key(text).partition(".")
                if first == group and rest and not text.startswith("~"):
                    _set(node, rest, typed_value(f"{group}.{rest}", override_value(text)))
            self._nodes[group, name] = node
        return self._nodes[group, name]


def _settings(raw: DictConfig) -> SweepConfig:
    """What a composed configuration says about the search."""
    found = OmegaConf.to_object(raw.sweep)
    assert isinstance(found, SweepConfig)
    return replace(found, params=texts_of(raw.sweep, "params"))


def _has_interpolation(raw: DictConfig) -> bool:
    plain = OmegaConf.to_container(raw, resolve=False)
    assert isinstance(plain, dict)
    return any(has_interpolation(value) for key, value in plain.items() if key not in ("sweep", "workers"))


def _set(config: Any, key: str, value: Any) -> None:
    *path, last = key.split(".")
    node = _at(config, path)
    if isinstance(node, dict):
        node[last] = value
    else:
        setattr(node, last, value)


def _at(config: Any, path: Sequence[str]) -> Any:
    node = config
    for part in path:
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    return node


def _interval_ends(axis: Axis) -> Axis:
    if axis.values:
        return axis
    ends = (axis.low, axis.high)
    return replace(axis, kind=AxisKind.CHOICE, values=ends, low=None, high=None, step=None, log=False)


def _scored_on_test(point: Candidate) -> Candidate:
    """As a ladder scores its trials: on both splits, but for its pilots, which take less than they are counted for."""
    if point.config is None:
        return point
    evaluation = replace(point.config.evaluation, split=EvaluationSplit.test)
    return replace(point, config=replace(point.config, evaluation=evaluation))


def _ranks(settings: SweepConfig) -> Iterator[int]:
    rank = settings.ladder.r_start
    while rank <= settings.ladder.r_max:
        yield rank
        rank *= 2


def _most_trials(settings: SweepConfig, fixed: Sequence[str], axes: tuple[Axis, ...]) -> int:
    from qlora_exp.rank_doubling.ladder_sweep import ladder_of
    from qlora_exp.rank_doubling.settings import most_trials

    return most_trials(ladder_of(settings, fixed, axes))


def _refuse_too_many(axes: Sequence[Axis]) -> None:
    count = math.prod(len(axis.values) for axis in axes)
    if count > MOST_POINTS:
        where = " × ".join(f"{axis.key}: {len(axis.values)}" for axis in axes)
        raise ConfigError(f"{count:,} configurations are too many to plan", where, f"at most {MOST_POINTS:,}")
