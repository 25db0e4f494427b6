"""The configurations of a command line, composed once and then varied without Hydra: a thousand per second."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qlora_exp.config.checks import check
from qlora_exp.config.choices import groups
from qlora_exp.config.compose import (
    Composer,
    as_config,
    compose_raw,
    default_choices,
    policy_of_searched_alpha,
    read_choice,
)
from qlora_exp.config.enums import EvaluationSplit, Sampler
from qlora_exp.config.interpolations import resolve_outside, unresolved_texts
from qlora_exp.config.override_errors import problems_of, typed_value
from qlora_exp.config.overrides import has_interpolation, hydra_value, is_swept, override_key, override_value
from qlora_exp.config.schema import Config, SweepConfig
from qlora_exp.errors import ConfigError, Problems, QloraExpError, raise_all
from qlora_exp.paths import CONF
from qlora_exp.study.space import grid, is_grid, parse_axes, point_overrides
from qlora_exp.study.types import Axis, AxisKind

IMPLYING = ("model.", "lora.alpha", "training.epochs")
"""Beginnings of keys from which a composition concludes others: variant and checkpoints, alpha's policy, max_steps."""
MAX_POINTS = 100_000
"""More would take minutes, and nobody could read them."""


@dataclass(frozen=True)
class Candidate:
    """One point of the search space: the axes' values, and its configuration or the reason why it can't run."""

    params: dict[str, Any]
    config: Config | None
    problem: QloraExpError | None = None


@dataclass(frozen=True)
class SearchSpace:
    """The candidates of a command line. ``points``: of an interval, both ends. ``trials``: how many runs there will be;
    ``None``: the search is unbounded."""

    points: tuple[Candidate, ...]
    trials: int | None
    sampled: bool
    """The trials are sampled between the points. Otherwise the points are the trials."""
    fixed_axes: tuple[str, ...] = ()
    """Overrides that fix an axis of the sweep to one value."""


def search_space(overrides: Sequence[str]) -> SearchSpace:
    """Return the candidates of ``overrides``: one run, a grid (``lora.r=8,16``), or a sweep (``sweeps=NAME``).

    Raises:
        ConfigError, Problems: a misspelt key or choice, a wrong type, too many points.
    """
    overrides = resolve_outside(overrides)
    raise_all(problems_of(overrides, multirun=True))
    swept = {override_key(text): text.partition("=")[2] for text in overrides if is_swept(text)}
    fixed = [text for text in overrides if override_key(text) not in swept]
    raw = compose_raw(fixed)
    settings = OmegaConf.to_object(raw.sweep)
    assert isinstance(settings, SweepConfig)
    settings = replace(settings, params=unresolved_texts(raw.sweep, "params"))
    axis_texts = {**settings.params, **swept}
    _check_can_vary(axis_texts)
    # A plain value on the command line fixes an axis of the sweep's file.
    axis_texts |= {
        override_key(text): text.partition("=")[2] for text in fixed if override_key(text) in settings.params
    }
    if of_alpha := policy_of_searched_alpha(fixed, axis_texts):
        fixed = [*fixed, *of_alpha]
        raw = compose_raw(fixed)
    searched = [text for text in fixed if override_key(text) in axis_texts]
    fixed = [text for text in fixed if text not in searched]
    fixed_axes = tuple(text for text in searched if text.partition("=")[2] != settings.params[override_key(text)])
    # The axes of the sweep's file are checked like overrides of the command line.
    raise_all(problems_of([f"{key}={text}" for key, text in settings.params.items()], multirun=True))
    axes = parse_axes(axis_texts, settings.conditions, lambda group: groups()[group], tuple(swept))
    ladder = settings.sampler is Sampler.ladder
    is_listed = is_grid(axes) and not ladder and settings.sampler in (Sampler.auto, Sampler.grid)
    corners = tuple(_interval_ends(axis) for axis in axes)
    if ladder:  # its ranks are an axis, too
        corners = (*corners, *parse_axes({"lora.r": ",".join(map(str, _ranks(settings)))}, {}))
    count = math.prod(len(axis.values) for axis in corners)
    if count > MAX_POINTS:
        where = " × ".join(f"{axis.key}: {len(axis.values)}" for axis in corners)
        raise ConfigError(f"{count:,} configurations are too many to plan", where, f"at most {MAX_POINTS:,}")
    combinations = grid(corners)
    trials = settings.n_trials or None
    if not trials and ladder:
        from qlora_exp.rank_doubling.settings import ladder_of, max_trials

        trials = max_trials(ladder_of(settings, fixed, axes))
    elif not trials and is_listed:
        trials = len(combinations)
    interpolates = has_interpolation([axis.values for axis in axes]) or _has_interpolation(raw)
    factory = ConfigFactory(fixed, None if searched else raw, interpolates)
    candidates = (factory.point(params) for params in combinations)
    return SearchSpace(
        tuple(map(_scored_on_test, candidates) if ladder else candidates), trials, not is_listed, fixed_axes
    )


def _check_can_vary(axis_texts: Mapping[str, str]) -> None:
    """Refuse axes that a sweep would refuse. A plan may vary budgets: it says what each is enough for."""
    hint = "an axis must be a setting of the run, not of the sweep or its workers; plan one value at a time"
    errors = [
        ConfigError(f"{key} can't be an axis", f"{key}={text}", hint)
        for key, text in axis_texts.items()
        if key.partition(".")[0] in ("sweep", "sweeps", "workers", "output_root", "tracking")
    ]
    raise_all(errors)


def listed_space(overrides: Sequence[str], points: Sequence[Mapping[str, Any]]) -> SearchSpace:
    """Return the candidates at ``points`` (axis → value), which are all trials that there will be, as enqueued ones
    are.

    Args:
        overrides: what they share, without axes.
    """
    factory = ConfigFactory(resolve_outside(overrides))
    return SearchSpace(tuple(map(factory.point, points)), len(points), sampled=False)


class ConfigFactory:
    """Makes configurations that differ only in the axes' values.

    ``fixed``: the overrides that they share. ``raw``: what Hydra composes from those, if it is known. ``follows``:
    whether a setting may be an interpolation. Its value then differs per point, so Hydra composes each of them.
    """

    def __init__(self, fixed: Sequence[str], raw: DictConfig | None = None, follows: bool = False) -> None:
        self._fixed = tuple(fixed)
        self._follows, self._composer = follows, Composer()
        self._groups = frozenset(groups())
        self._bases: dict[tuple[tuple[str, str], ...], Config | QloraExpError] = {}
        self._nodes: dict[tuple[str, str], Any] = {}
        self._values: dict[tuple[str, str], Any] = {}
        if raw is not None and not follows:
            with contextlib.suppress(QloraExpError):  # a value may be missing because an axis sets it
                base = as_config(raw)
                # The group choices of conf/config.yaml, except where a sweep's file overrides them.
                chosen = [(group, name) for group, name in default_choices().items() if hasattr(base, group)]
                unchanged = [(group, name) for group, name in chosen if self._node(group, name) == getattr(base, group)]
                self._bases[tuple(unchanged)] = base

    def point(self, params: Mapping[str, Any]) -> Candidate:
        """Return the candidate at ``params``: axis (key or group) → value."""
        axis_values = dict(params)
        try:
            config = self._config(params)
        except QloraExpError as error:
            return Candidate(axis_values, None, error)
        problems = check(config)
        return Candidate(axis_values, None, Problems(problems)) if problems else Candidate(axis_values, config)

    def _config(self, params: Mapping[str, Any]) -> Config:
        """Return the configuration at ``params``: a copy of the base with the same group choices, with the values
        set."""
        if self._follows or any(key.startswith(IMPLYING) for key in params):
            return as_config(self._composer.raw([*self._fixed, *point_overrides(params)]))
        chosen = {key: str(value) for key, value in params.items() if key in self._groups}
        base = self._base(chosen)
        values = {}
        for key, value in params.items():
            if key not in self._groups:
                cache_key = (key, hydra_value(value))
                if cache_key not in self._values:
                    self._values[cache_key] = typed_value(key, value)
                values[key] = self._values[cache_key]
        config = copy.copy(base)
        # Sections on the way to a value are copied, once; all others are shared with the base.
        copied: set[str] = set()
        for key, value in values.items():
            path = key.split(".")[:-1]
            for depth in range(len(path)):
                section = ".".join(path[: depth + 1])
                if section not in copied:
                    copied.add(section)
                    _set(config, section, copy.copy(_at(config, path[: depth + 1])))
            _set(config, key, value)
        return config

    def _base(self, chosen: Mapping[str, str]) -> Config:
        """Return the configuration with these group choices and no axis values, from the cache if possible."""
        key = tuple(chosen.items())
        if key not in self._bases:
            try:
                overrides = [*self._fixed, *point_overrides(chosen)]
                self._bases[key] = self._varied(chosen) or as_config(compose_raw(overrides))
            except QloraExpError as error:
                self._bases[key] = error
        base = self._bases[key]
        if isinstance(base, QloraExpError):
            raise base
        return base

    def _varied(self, chosen: Mapping[str, str]) -> Config | None:
        """Return an already composed configuration with other groups' files swapped in; ``None`` if only Hydra can say
        what a choice changes."""
        for base_key, base in self._bases.items():
            if isinstance(base, QloraExpError):
                continue
            base_choices = dict(base_key)
            changed = {group: name for group, name in chosen.items() if base_choices.get(group) != name}
            if all(self._replaceable(base, group, base_choices.get(group), name) for group, name in changed.items()):
                return replace(base, **{group: self._node(group, name) for group, name in changed.items()})
        return None

    def _replaceable(self, base: Config, group: str, base_name: str | None, name: str) -> bool:
        """Return whether ``base`` has in ``group`` exactly what the file ``base_name`` says, so that ``name``'s file
        can replace it."""
        if base_name is None:
            return False
        overlays = (CONF / f"{group}_training" / f"{choice}.yaml" for choice in (base_name, name))
        if not hasattr(base, group) or any(file.is_file() for file in overlays):
            return False
        return self._node(group, base_name) == getattr(base, group) and self._node(group, name) is not None

    def _node(self, group: str, name: str) -> Any:
        """Return a group's file, read without Hydra, with the fixed values; ``None`` if its defaults go beyond files of
        its own folder, or if a value is still missing."""
        if (group, name) not in self._nodes:
            node = read_choice(group, name)
            for text in self._fixed if node is not None else ():
                first, _, rest = override_key(text).partition(".")
                if first == group and rest and not text.startswith("~"):
                    _set(node, rest, typed_value(f"{group}.{rest}", override_value(text)))
            self._nodes[group, name] = node
        return self._nodes[group, name]


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
    """Return an axis with the two ends of an interval as its values; an axis with values as it is."""
    if axis.values:
        return axis
    ends = (axis.low, axis.high)
    return replace(axis, kind=AxisKind.CHOICE, values=ends, low=None, high=None, step=None, log=False)


def _scored_on_test(point: Candidate) -> Candidate:
    """Return ``point`` as a ladder scores its trials: on both splits. Pilot runs are scored on one, so this
    overestimates them."""
    if point.config is None:
        return point
    evaluation = replace(point.config.evaluation, split=EvaluationSplit.test)
    return replace(point, config=replace(point.config, evaluation=evaluation))


def _ranks(settings: SweepConfig) -> Iterator[int]:
    rank = settings.ladder.r_start
    while rank <= settings.ladder.r_max:
        yield rank
        rank *= 2
