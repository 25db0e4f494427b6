"""Samplers and pruners by name.

A sampler's randomness depends only on the study's seed and the trial's number. So a resumed study suggests what it
would have suggested without the interruption.
"""

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
from qlora_exp.study.pilot_pruner import PilotPruner
from qlora_exp.study.space import grid
from qlora_exp.study.trials import is_skipped
from qlora_exp.study.types import StudySpec

optuna.logging.set_verbosity(optuna.logging.ERROR)

SAMPLERS: dict[str, type[BaseSampler]] = {
    "grid": RandomSampler,  # each trial's point follows from its number; random after the last one
    "ladder": RandomSampler,  # never used: rank doubling sets every parameter of a trial
    "random": RandomSampler,
    "tpe": optuna.samplers.TPESampler,
    "gp": optuna.samplers.GPSampler,
    "nsga2": optuna.samplers.NSGAIISampler,
    "qmc": QMCSampler,
    "cmaes": optuna.samplers.CmaEsSampler,
}
PLAIN_TYPES = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "None": (type(None),)}
RESERVED_OPTIONS = {
    *("seed", "constraints_func", "independent_sampler", "gamma", "weights", "source_trials", "mutation", "crossover"),
    *("elite_population_selection_strategy", "child_generation_strategy", "after_trial_strategy"),
}
"""Constructor arguments that this package sets, or that can't be written in a configuration."""

EARLIER_TRIAL_NUMBER = -1
"""Number of trials from earlier studies: before any number of this study."""

SKIPS_BEFORE_RANDOM = 5
"""After this many consecutive trials that were predicted not to fit, the next one is drawn at random."""

ITEMS_ATTRIBUTE = "items:{step}"
"""Attribute with the per-item losses that a trial reported at a step, in the items' fixed order."""


def check_search(spec: StudySpec) -> None:
    """Check everything about a search that can be wrong before the first trial.

    Raises:
        ConfigError, or Problems for several.
    """
    errors: list[QloraExpError] = []
    checks: list[Callable[[], object]] = [
        *(partial(parse_objective, text) for text in spec.objectives),
        *(partial(parse_constraint, text) for text in spec.constraints),
        partial(make_sampler, spec),
        partial(make_pruner, spec),
        *([partial(grid, spec.axes)] if spec.sampler == "grid" else []),
    ]
    for check in checks:
        try:
            check()
        except QloraExpError as error:
            errors.append(error)
    if spec.ladder is not None and spec.pruner != "none":
        what = "a ladder compares runs of equal length: none may be pruned"
        errors.append(ConfigError(what, f"sweep.pruner: {spec.pruner}", "sweep.pruner=none"))
    for key in ("enqueue", "warm_start"):
        if spec.ladder is not None and getattr(spec, key):
            errors.append(ConfigError("a ladder chooses its trials itself", f"sweep.{key}", f"sweep.{key}=[]"))
    if not spec.objectives:
        errors.append(ConfigError("a study needs an objective", "sweep.objectives", "minimize FIELD"))
    raise_all([*errors, *check_enqueued(spec.axes, spec.enqueue)])


def make_sampler(spec: StudySpec, history: Sequence[FrozenTrial] = ()) -> BaseSampler:
    """Return the study's sampler. ``history``: trials of earlier studies that it also learns from (only TPE and GP do).

    Raises:
        ConfigError: no such sampler or option, or one that doesn't support the study's objectives.
    """
    if spec.sampler not in SAMPLERS:
        raise ConfigError(f"no sampler {spec.sampler}", "sweep.sampler", nearest(spec.sampler, SAMPLERS))
    if spec.sampler == "cmaes" and importlib.util.find_spec("cmaes") is None:
        raise ConfigError("CMA-ES needs the package cmaes", "sweep.sampler: cmaes", "pip install cmaes")
    if spec.sampler == "cmaes" and len(spec.objectives) > 1:
        raise ConfigError(
            "CMA-ES supports only one objective", "sweep.sampler: cmaes", "sweep.sampler=nsga2, tpe or gp"
        )
    sampler = SeededSampler(spec, history)
    kind = SAMPLERS[spec.sampler]
    _checked_construction(partial(sampler.inner, 0), kind, spec.sampler_options, "sweep.sampler_options")
    return sampler


def make_pruner(spec: StudySpec) -> BasePruner:
    """Return the study's pruner.

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
    if spec.ladder is not None and spec.ladder.stop_pilots:
        return PilotPruner()
    kind = pruners[spec.pruner]
    make = partial(kind, **spec.pruner_options)
    return cast(BasePruner, _checked_construction(make, kind, spec.pruner_options, "sweep.pruner_options"))


def _checked_construction(make: Any, kind: type, options: dict[str, Any], where: str) -> Any:
    """Return ``make()``; raise :class:`ConfigError` for options that ``kind`` doesn't have, or of another type.

    Otherwise only the first trial would fail.
    """
    parameters = inspect.signature(kind).parameters
    valid = set(parameters) - RESERVED_OPTIONS
    raise_all(
        [
            ConfigError(f"{kind.__name__} has no option {name}", f"{where}.{name}", nearest(name, valid))
            for name in options
            if name not in valid
        ]
    )
    errors = []
    for name, value in options.items():
        # The annotation is compared as text, because Optuna imports the names in it only for type checkers.
        annotation = parameters[name].annotation
        type_text = str(getattr(annotation, "__name__", annotation))
        types = [PLAIN_TYPES.get(type_name.strip()) for type_name in type_text.split("|")]
        if None not in types and not any(type(value) in plain for plain in types if plain is not None):
            what = f"{kind.__name__}'s {name} can't be {value!r}"
            errors.append(ConfigError(what, f"{where}.{name}", f"its type: {type_text}"))
    raise_all(errors)
    try:
        with _no_experimental_warnings():
            return make()
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"{kind.__name__} can't be created: {error}", where, f"options: {options}") from None


@contextlib.contextmanager
def _no_experimental_warnings() -> Iterator[None]:
    """Silence Optuna's ExperimentalWarning for conditional TPE, QMC and Wilcoxon: the user can't act on it.

    A filter set once per process would not do: any code that resets the filters would bring the warning back.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


class SeededSampler(BaseSampler):
    """Creates a new inner sampler for each trial (and, for independent sampling, each axis), seeded by the trial's
    number.

    An axis's independent draw doesn't depend on which axes were drawn before it. So a trial whose process died during
    sampling gets the same values when it is sampled again.
    """

    def __init__(self, spec: StudySpec, history: Sequence[FrozenTrial] = ()) -> None:
        self._spec = spec
        self._history = tuple(history)
        self._asked: dict[int, BaseSampler] = {}

    def inner(self, number: int, axis: str = "") -> BaseSampler:
        """Return a new inner sampler for the trial (and axis)."""
        seed = _seed(self._spec.seed, number, axis)
        kind, options = SAMPLERS[self._spec.sampler], dict(self._spec.sampler_options)
        with _no_experimental_warnings():
            if self._spec.sampler == "qmc":
                return NumberedQmc(self._spec, number, RandomSampler(seed))
            if self._spec.sampler == "nsga2":
                return RepeatableNsga2(seed=seed, **options)
            if self._spec.sampler == "tpe" and any(axis.condition for axis in self._spec.axes):
                options = {"group": True, "multivariate": True} | options
            if self._spec.sampler != "tpe" and "warn_independent_sampling" in inspect.signature(kind).parameters:
                options = {"warn_independent_sampling": False} | options
            return kind(seed=seed, **options)  # type: ignore[call-arg]

    def _sampler_for(self, study: optuna.Study, number: int, axis: str = "") -> BaseSampler:
        """Return the trial's sampler: a random one if the trials before it were predicted not to fit.

        GP learns only from completed trials, so it would suggest nearly the same point again.
        """
        before = range(number - SKIPS_BEFORE_RANDOM, number)
        if before.start >= 0:
            pruned = study._storage.get_all_trials(study._study_id, deepcopy=False, states=(TrialState.PRUNED,))
            if set(before) <= {trial.number for trial in pruned if is_skipped(trial)}:
                return RandomSampler(_seed(self._spec.seed, number, axis))
        return self.inner(number, axis)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        sampler = self._asked[trial.number] = self._sampler_for(study, trial.number)
        return sampler.infer_relative_search_space(self._view(study, trial), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._asked.pop(trial.number).sample_relative(self._view(study, trial), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        inner = self._sampler_for(study, trial.number, param_name)
        return inner.sample_independent(self._view(study, trial), trial, param_name, param_distribution)

    def _view(self, study: optuna.Study, trial: FrozenTrial) -> optuna.Study:
        return _StudyForSampler(study, self._history, trial.number)


class NumberedQmc(QMCSampler):
    """Uses point n of one scrambled sequence for trial n.

    Optuna's own QMC sampler counts in the storage, where a kill loses a point and a race uses one twice.
    """

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
    """NSGA-II with parents in a fixed order.

    Optuna returns a generation's parents sorted by fitness to its first trial and by number to every later one, but
    crossover picks parents by position. So a trial that is sampled again after a kill would get other values.
    """

    def select_parent(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)


class ItemPruner(WilcoxonPruner):
    """Wilcoxon signed-rank test on per-item losses: this trial against the best one, same items at the same step."""

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        key = ITEMS_ATTRIBUTE.format(step=trial.last_step)
        try:
            best = study.best_trial
        except ValueError:
            return False
        if key not in trial.user_attrs or key not in best.user_attrs:
            return False
        view = SimpleNamespace(best_trial=_trial_of_losses(best.user_attrs[key]), direction=StudyDirection.MINIMIZE)
        return super().prune(cast(optuna.Study, view), _trial_of_losses(trial.user_attrs[key]))


class _StudyForSampler(optuna.Study):
    """The study that the sampler sees for one trial: trials of earlier studies included, the trial itself excluded.

    GP treats running trials as points already measured. A trial that is sampled again after a kill would avoid its own
    values.
    """

    def __init__(self, study: optuna.Study, history: tuple[FrozenTrial, ...], number: int) -> None:
        super().__init__(study.study_name, study._storage, study.sampler, study.pruner)
        self._seen, self._history, self._number = study, history, number

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        earlier = [trial for trial in self._history if states is None or trial.state in states]
        own = self._seen._get_trials(deepcopy, states, use_cache)
        return earlier + [trial for trial in own if trial.number != self._number]


def _trial_of_losses(losses: Sequence[float]) -> FrozenTrial:
    return create_trial(state=TrialState.RUNNING, intermediate_values=dict(enumerate(losses)))


def _seed(seed: int, number: int, axis: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}:{axis}".encode()).digest()[:4])
