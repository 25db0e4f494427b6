"""Samplers and pruners by name. A sampler's randomness depends on the study's seed and the trial's number alone, so
that a resumed study asks what an undisturbed one would have asked."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, WilcoxonPruner
from optuna.samplers import BaseSampler, QMCSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from qlora_exp.errors import ConfigError, QloraExpError, nearest, raise_all
from qlora_exp.study.distributions import check_enqueued, distribution
from qlora_exp.study.objectives import parse_constraint, parse_objective
from qlora_exp.study.space import grid
from qlora_exp.study.trials import is_refused
from qlora_exp.study.types import StudySpec

optuna.logging.set_verbosity(optuna.logging.ERROR)

SAMPLERS: dict[str, type[BaseSampler]] = {
    "grid": RandomSampler,  # its points are enqueued by number; random once they are all asked
    "ladder": RandomSampler,  # never asked: each trial has its point
    "random": RandomSampler,
    "tpe": optuna.samplers.TPESampler,
    "gp": optuna.samplers.GPSampler,
    "nsga2": optuna.samplers.NSGAIISampler,
    "qmc": QMCSampler,
    "cmaes": optuna.samplers.CmaEsSampler,
}
NOT_OPTIONS = {
    *("seed", "constraints_func", "independent_sampler", "gamma", "weights", "source_trials", "mutation", "crossover"),
    *("elite_population_selection_strategy", "child_generation_strategy", "after_trial_strategy"),
}
"""Constructor arguments that are ours to set, or that can't be written in a configuration."""

WARM_NUMBER = -1
"""Trials of earlier studies: older than any of this one."""

REFUSED_BEFORE_RANDOM = 5
"""Trials in a row that did not fit before one is drawn at random."""

ITEMS_ATTRIBUTE = "items:{step}"
"""Per-item losses that a trial reported at a step, in the items' fixed order."""


def check_search(spec: StudySpec) -> None:
    """Everything about a search that can be known to be wrong before the first trial.

    Raises:
        ConfigError, or Problems for several.
    """
    errors: list[QloraExpError] = []
    checks: list[Callable[[], object]] = [partial(parse_objective, text) for text in spec.objectives]
    checks += [partial(parse_constraint, text) for text in spec.constraints]
    checks += [partial(make_sampler, spec), partial(make_pruner, spec)]
    if spec.sampler == "grid":
        checks.append(partial(grid, spec.axes))
    for check in checks:
        try:
            check()
        except QloraExpError as error:
            errors.append(error)
    errors += _wrong_on_a_ladder(spec) if spec.ladder is not None else []
    if not spec.objectives:
        errors.append(ConfigError("a study needs an objective", "sweep.objectives", "minimize FIELD"))
    raise_all([*errors, *check_enqueued(spec.axes, spec.enqueue)])


def _wrong_on_a_ladder(spec: StudySpec) -> list[QloraExpError]:
    errors: list[QloraExpError] = []
    if spec.pruner != "none":
        what = "a ladder compares runs of equal length: none may be pruned"
        errors.append(ConfigError(what, f"sweep.pruner: {spec.pruner}", "sweep.pruner=none"))
    for key in ("enqueue", "warm_start"):
        if getattr(spec, key):
            errors.append(ConfigError("a ladder asks for its own trials", f"sweep.{key}", f"sweep.{key}=[]"))
    return errors


def make_sampler(spec: StudySpec, history: Sequence[FrozenTrial] = ()) -> BaseSampler:
    """The study's sampler. ``history``: trials of earlier studies that it learns from as well (TPE and GP do).

    Raises:
        ConfigError: no such sampler or option, or one that can't do what the study asks.
    """
    if spec.sampler not in SAMPLERS:
        raise ConfigError(f"no sampler {spec.sampler}", "sweep.sampler", nearest(spec.sampler, SAMPLERS))
    if spec.sampler == "cmaes" and importlib.util.find_spec("cmaes") is None:
        raise ConfigError("CMA-ES needs the package cmaes", "sweep.sampler: cmaes", "pip install cmaes")
    if spec.sampler == "cmaes" and len(spec.objectives) > 1:
        raise ConfigError("CMA-ES has one objective", "sweep.sampler: cmaes", "sweep.sampler=nsga2, tpe or gp")
    sampler = SeededSampler(spec, history)
    _constructed(partial(sampler.inner, 0), SAMPLERS[spec.sampler], spec.sampler_options, "sweep.sampler_options")
    return sampler


def make_pruner(spec: StudySpec) -> BasePruner:
    """The study's pruner.

    Raises:
        ConfigError: no such pruner or option, or several objectives.
    """
    pruners: dict[str, type[BasePruner]] = {
        "none": optuna.pruners.NopPruner,
        "median": optuna.pruners.MedianPruner,
        "asha": optuna.pruners.SuccessiveHalvingPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
        "wilcoxon": ItemPruner,
    }
    if spec.pruner not in pruners:
        raise ConfigError(f"no pruner {spec.pruner}", "sweep.pruner", nearest(spec.pruner, pruners))
    if spec.pruner != "none" and len(spec.objectives) > 1:
        raise ConfigError(
            "pruning needs a single objective", f"sweep.pruner: {spec.pruner}", "sweep.pruner=none, or one objective"
        )
    kind = pruners[spec.pruner]
    make = partial(kind, **spec.pruner_options)
    return cast(BasePruner, _constructed(make, kind, spec.pruner_options, "sweep.pruner_options"))


def _constructed(make: Any, kind: type, options: dict[str, Any], where: str) -> Any:
    valid = set(inspect.signature(kind).parameters) - NOT_OPTIONS
    raise_all(
        [
            ConfigError(f"{kind.__name__} has no option {name}", f"{where}.{name}", nearest(name, valid))
            for name in options
            if name not in valid
        ]
    )
    raise_all(
        [
            ConfigError(f"{kind.__name__}'s {name} can't be {value!r}", f"{where}.{name}", f"its type: {told}")
            for name, value in options.items()
            if (told := _other_type(kind, name, value))
        ]
    )
    try:
        with _may_be_experimental():
            return make()
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"{kind.__name__} can't be made: {error}", where, f"options: {options}") from None


PLAIN_TYPES = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "None": (type(None),)}


def _other_type(kind: type, name: str, value: Any) -> str | None:
    """The type that an option should have, where ``value`` isn't of it: the first trial would be the one to find out.
    Read as it is written: Optuna imports the names in it for type checkers alone."""
    annotation = inspect.signature(kind).parameters[name].annotation
    told = str(getattr(annotation, "__name__", annotation))
    names = [one.strip() for one in told.split("|")]
    if not all(one in PLAIN_TYPES for one in names):
        return None
    return None if any(type(value) in PLAIN_TYPES[one] for one in names) else told


@contextlib.contextmanager
def _may_be_experimental() -> Iterator[None]:
    """Optuna calls conditional TPE, QMC and Wilcoxon experimental each time one is made; nobody at the terminal can do
    anything about it. Said here and not once for the process: whoever resets the filters would bring it back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


class SeededSampler(BaseSampler):
    """Asks a fresh inner sampler for each trial (and, independently, each axis), seeded by the trial's number.

    An axis's independent draw doesn't depend on which axes were drawn before it, so a trial whose process died while
    it was asked gets the values that it would have got.
    """

    def __init__(self, spec: StudySpec, history: Sequence[FrozenTrial] = ()) -> None:
        self._spec = spec
        self._history = tuple(history)
        self._asked: dict[int, BaseSampler] = {}

    def inner(self, number: int, axis: str = "") -> BaseSampler:
        with _may_be_experimental():
            return self._inner(number, axis)

    def _asking(self, study: optuna.Study, number: int, axis: str = "") -> BaseSampler:
        """A random draw where several trials before this one were predicted not to fit: GP looks at completed trials
        alone, and would ask for much the same again."""
        if _all_refused(study, range(number - REFUSED_BEFORE_RANDOM, number)):
            return RandomSampler(_seed(self._spec.seed, number, axis))
        return self.inner(number, axis)

    def _inner(self, number: int, axis: str) -> BaseSampler:
        seed = _seed(self._spec.seed, number, axis)
        kind, options = SAMPLERS[self._spec.sampler], dict(self._spec.sampler_options)
        conditional = any(axis.condition for axis in self._spec.axes)
        if self._spec.sampler == "tpe" and conditional:
            options = {"group": True, "multivariate": True} | options
        if self._spec.sampler == "qmc":
            return NumberedQmc(self._spec, number, RandomSampler(seed))
        if self._spec.sampler == "nsga2":
            return RepeatableNsga2(seed=seed, **options)
        if "warn_independent_sampling" in inspect.signature(kind).parameters and self._spec.sampler != "tpe":
            options = {"warn_independent_sampling": False} | options
        return kind(seed=seed, **options)  # type: ignore[call-arg]

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        sampler = self._asked[trial.number] = self._asking(study, trial.number)
        return sampler.infer_relative_search_space(self._view(study, trial), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._asked.pop(trial.number).sample_relative(self._view(study, trial), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        inner = self._asking(study, trial.number, param_name)
        return inner.sample_independent(self._view(study, trial), trial, param_name, param_distribution)

    def _view(self, study: optuna.Study, trial: FrozenTrial) -> optuna.Study:
        return _SeenByTrial(study, self._history, trial.number)


class NumberedQmc(QMCSampler):
    """Point n of one scrambled sequence for trial n: Optuna's own counts in the storage, where a kill loses a point and
    a race doubles one."""

    def __init__(self, spec: StudySpec, number: int, independent: BaseSampler) -> None:
        options = {"scramble": True, "warn_independent_sampling": False} | spec.sampler_options
        super().__init__(seed=spec.seed, independent_sampler=independent, **options)
        self._number = number
        spaces = {axis.key: distribution(axis) for axis in spec.axes if axis.condition is None}
        self._space = {key: space for key, space in spaces.items() if not space.single()}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space

    def _find_sample_id(self, study: optuna.Study, search_space: dict[str, BaseDistribution]) -> int:
        return self._number


class RepeatableNsga2(optuna.samplers.NSGAIISampler):
    """NSGA-II whose parents stand in one order.

    Optuna hands the first trial of a generation its parents by fitness and every later one, from the storage, by
    number; crossover draws parents by their place. So a trial that is asked again after a kill would get others.
    """

    def select_parent(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)


class ItemPruner(WilcoxonPruner):
    """Wilcoxon's signed-rank test over per-item losses of the same items at the same step, against the best trial's."""

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        key = ITEMS_ATTRIBUTE.format(step=trial.last_step)
        try:
            best = study.best_trial
        except ValueError:
            return False
        if key not in trial.user_attrs or key not in best.user_attrs:
            return False
        view = SimpleNamespace(best_trial=_of_items(best.user_attrs[key]), direction=StudyDirection.MINIMIZE)
        return super().prune(cast(optuna.Study, view), _of_items(trial.user_attrs[key]))


class _SeenByTrial(optuna.Study):
    """A study as a sampler sees it that is asked for a trial: with trials of earlier studies, without that trial. GP
    takes running trials as points already measured: a trial asked again after a kill would avoid its own values."""

    def __init__(self, study: optuna.Study, history: tuple[FrozenTrial, ...], number: int) -> None:
        super().__init__(study.study_name, study._storage, study.sampler, study.pruner)
        self._seen, self._history, self._number = study, history, number

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        earlier = [trial for trial in self._history if states is None or trial.state in states]
        own = self._seen._get_trials(deepcopy, states, use_cache)
        return earlier + [trial for trial in own if trial.number != self._number]


def _all_refused(study: optuna.Study, numbers: range) -> bool:
    """Whether the trials of these numbers exist and were all predicted not to fit."""
    if numbers.start < 0:
        return False
    trials = study._storage.get_all_trials(study._study_id, deepcopy=False, states=(TrialState.PRUNED,))
    return set(numbers) <= {trial.number for trial in trials if is_refused(trial)}


def _of_items(losses: Sequence[float]) -> FrozenTrial:
    return create_trial(state=TrialState.RUNNING, intermediate_values=dict(enumerate(losses)))


def _seed(seed: int, number: int, axis: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}:{axis}".encode()).digest()[:4])
