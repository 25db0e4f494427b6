"""The finalists of a search, and the study that confirms them: fresh seeds, scored on the test split."""

from __future__ import annotations

import json
import math
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_exp.analysis.configurations import MEASURES, Measure, known_mean
from qlora_exp.analysis.margin import DEFAULT_SHARE
from qlora_exp.analysis.recommendation import LOSS_MEASURES
from qlora_exp.architecture.run_plan import EARLIER_TASK_DEFAULTS, EARLIER_TRAINING_DEFAULTS
from qlora_exp.config.choices import groups
from qlora_exp.config.compose import default_choices
from qlora_exp.config.from_record import recorded_overrides
from qlora_exp.config.overrides import escape_interpolations, hydra_value, override_key, override_value
from qlora_exp.errors import ConfigError, RecordError, StudyError, nearest
from qlora_exp.estimate.budget import STUDY_LIMITS
from qlora_exp.formatting import flatten
from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.records.files import read_record, write_json
from qlora_exp.records.schema import from_dict, to_dict
from qlora_exp.records.types import RunRecord
from qlora_exp.study.objectives import parse_objective
from qlora_exp.study.space import point_overrides
from qlora_exp.study.types import StudySpec, TrialRow

DEFAULT_TOP, DEFAULT_SEEDS = 3, 3
MAX_CONFIRM_SEEDS = 64
SEED, SPLIT = "seed", "evaluation.split"
NOT_OF_A_CONFIGURATION = (SEED, SPLIT, "name", "output_root", *(f"budget.{name}" for name in STUDY_LIMITS))
"""Keys of a trial that the study that confirms it has its own values of."""


@dataclass(frozen=True)
class Contender:
    """A configuration of a search over its seeds. ``value``: mean of the first objective."""

    row: TrialRow
    """Its first trial."""
    value: float
    seeds: int


@dataclass(frozen=True)
class ConfirmPlan:
    """``confirm.json``: what is confirmed, and how it is decided; fixed before the first run."""

    study: str
    """The search whose finalists these are."""
    study_id: str | None
    objective: str
    """Of the search, e.g. ``minimize scores.after.loss_per_item``."""
    score: str
    """Score on test that decides, e.g. ``loss_per_item``."""
    margin: str
    seeds: tuple[int, ...]
    trials: tuple[int, ...]
    """The finalists' trial numbers in the search, best first."""
    runs: tuple[str, ...]
    values: tuple[float, ...]
    """The finalists' means of the objective in the search."""
    chosen_from: int
    """Configurations of the search that had a value."""
    command: str
    """The command that continues this study, and prints its answer."""
    earlier_seeds: tuple[int, ...] = ()
    """Numbers of seeds with which an answer was given before seeds were added."""
    answer: dict[str, Any] = field(default_factory=dict)
    """``sentences``, ``verdict``, ``use`` and what the table of pairs has; empty before there is one."""

    @property
    def is_answered(self) -> bool:
        """Whether the stored answer is that of all planned runs: seeds that were added since reopen it."""
        seeds = self.answer.get("planned_seeds", self.answer.get("seeds"))
        return seeds == len(self.seeds) and not self.answer.get("pending")

    @property
    def measure(self) -> Measure:
        return Measure(self.score, MEASURES.get(self.score, self.objective.startswith("maximize")))


def confirm_name(study: str) -> str:
    return f"{study}-confirm"


def read_plan(paths: StudyPaths) -> ConfirmPlan | None:
    """Return ``confirm.json``; ``None``: this study confirms no other one, or the file can't be read."""
    try:
        return from_dict(ConfirmPlan, json.loads(paths.confirmation.read_text(encoding="utf-8")), "confirm.json")
    except (OSError, ValueError):
        return None


def write_plan(plan: ConfirmPlan, paths: StudyPaths) -> None:
    paths.folder.mkdir(parents=True, exist_ok=True)
    write_json(paths.confirmation, to_dict(plan))


def score_of(spec: StudySpec) -> str | None:
    """Return the score that the study's first objective is about, e.g. ``loss_per_item``; ``None``: it is no score."""
    parts = parse_objective(spec.objectives[0]).field.split(".")
    known = len(parts) == 3 and parts[0] == "scores" and parts[1] in ("after", "test")
    return parts[2] if known and parts[2] in MEASURES else None


def ranked(rows: Sequence[TrialRow], spec: StudySpec) -> list[Contender]:
    """Return the distinct configurations with a value of the first objective, best first; seeds are pooled."""
    by_point: dict[tuple[str, ...], list[TrialRow]] = defaultdict(list)
    for row in rows:
        if row.state == "COMPLETE" and row.feasible is not False and row.values and row.values[0] is not None:
            params = {key: value for key, value in row.params.items() if key != SEED}
            by_point[point_overrides(params)].append(row)
    found = [
        Contender(of_one[0], math.fsum(row.values[0] or 0.0 for row in of_one) / len(of_one), _seed_count(of_one))
        for of_one in by_point.values()
    ]
    sign = -1.0 if spec.objectives[0].startswith("maximize") else 1.0
    return sorted(found, key=lambda one: (sign * one.value, one.row.number))


def choose_finalists(
    rows: Sequence[TrialRow], spec: StudySpec, top: int, trials: Sequence[int], records: Mapping[str, RunRecord]
) -> list[Contender]:
    """Return the finalists, best first.

    They are the best ``top`` distinct configurations by the first objective. If more than ``top`` are nearly equal to
    the best (within 0.25 % of a loss), the best and the cheapest of these are taken. ``trials`` names others.

    Raises:
        ConfigError: a number in ``trials`` is no completed trial, or the same configuration is named twice.
        StudyError: nothing has a score yet, or the study has no single order of its trials.
    """
    name = shlex.quote(spec.name)
    contenders = ranked(rows, spec)
    if trials:
        return _named(rows, contenders, spec, trials)
    if len(spec.objectives) > 1:
        numbers = ",".join(str(one.row.number) for one in contenders[:top]) or "0,1"
        raise StudyError(
            "a Pareto front has no single best: which of its trials to confirm is your choice",
            f"study {spec.name}: {', '.join(spec.objectives)}",
            f"qlora-exp best {name} lists the front; then qlora-exp confirm {name} --trials {numbers}",
        )
    if not contenders:
        raise StudyError("no trial has a score yet", f"study {spec.name}", f"qlora-exp status {name}")
    best = contenders[0]
    tolerance = DEFAULT_SHARE * abs(best.value) if score_of(spec) in LOSS_MEASURES else 0.0
    near = [one for one in contenders if abs(one.value - best.value) <= tolerance]
    if len(near) <= top:
        return contenders[:top]
    cheap = sorted(near[1:], key=lambda one: _cost(records.get(one.row.run_id or "")))[: top - 1]
    return [one for one in near if one is best or one in cheap]


def best_of_each(contenders: Sequence[Contender], axis: str, study: str) -> list[Contender]:
    """Return the best configuration for each value of ``axis``, e.g. of each ``method`` the one with the best learning
    rate; best first.

    Raises:
        ConfigError: the study has no such axis, or fewer than two of its values have a score.
    """
    axes = sorted({key for one in contenders for key in _without_seed(one.row)})
    if axis not in axes:
        hint = nearest(axis, axes) if axes else f"qlora-exp status {shlex.quote(study)}"
        raise ConfigError(f"the study has no axis {axis!r}", f"--each {axis}", hint)
    best: dict[str, Contender] = {}
    for one in contenders:
        best.setdefault(repr(one.row.params.get(axis)), one)
    if len(best) < 2:
        what = f"{len(best)} value of {axis} has a score: there is nothing to compare"
        raise ConfigError(what, f"--each {axis}", f"qlora-exp status {shlex.quote(study)}")
    return list(best.values())


def _named(
    rows: Sequence[TrialRow], contenders: Sequence[Contender], spec: StudySpec, trials: Sequence[int]
) -> list[Contender]:
    chosen: list[Contender] = []
    completed = {row.number: row for row in rows if row.state == "COMPLETE"}
    for number in trials:
        row = completed.get(number)
        if row is None:
            hint = f"qlora-exp trials {shlex.quote(spec.name)} lists them; completed: {', '.join(map(str, completed))}"
            raise ConfigError(f"trial {number} isn't a completed trial", f"--trials {number}", hint)
        params = _without_seed(row)
        contender = next((one for one in contenders if _without_seed(one.row) == params), None)
        if contender is None:
            raise ConfigError(f"trial {number} has no score", f"--trials {number}", "leave it out")
        if contender in chosen:
            what = f"trial {number} has the configuration of trial {contender.row.number}"
            raise ConfigError(what, f"--trials {number}", "name each configuration once")
        chosen.append(contender)
    return chosen


def _without_seed(row: TrialRow) -> dict[str, Any]:
    return {key: value for key, value in row.params.items() if key != SEED}


def _seed_count(rows: Sequence[TrialRow]) -> int:
    return len({row.params.get(SEED) for row in rows})


def _cost(record: RunRecord | None) -> tuple[float, float]:
    """Return memory and training time, infinite if unknown."""
    if record is None:
        return math.inf, math.inf
    memory, seconds = record.memory.model_state_bytes, record.speed.train_seconds
    return math.inf if memory is None else memory, math.inf if seconds is None else seconds


def fresh_seeds(rows: Sequence[TrialRow], spec: StudySpec, count: int) -> tuple[int, ...]:
    """Return ``count`` seeds that no trial of the search used, in a row."""
    used = [row.params[SEED] for row in rows if SEED in row.params] + [spec.settings.get(SEED)]
    first = max((seed for seed in used if isinstance(seed, int)), default=0) + 1
    return tuple(range(first, first + count))


# The study that confirms.


@dataclass(frozen=True)
class ConfirmPoints:
    """What the runs share, and what each finalist adds, as overrides."""

    shared: tuple[str, ...]
    points: tuple[dict[str, Any], ...]
    """One a finalist: axis → value."""
    axes: dict[str, list[Any]]


def confirm_points(records: Sequence[RunRecord]) -> ConfirmPoints:
    """Return the configurations of the finalists' runs, exactly as they were run, split into what they share and what
    differs.

    A group's choice (``quantization=nf4``) is one value. The search's own file isn't needed any more.

    Raises:
        ConfigError: they differ in a setting that can't be an axis.
    """
    of_runs = [configuration_overrides(record) for record in records]
    texts = [{override_key(text): text for text in overrides} for overrides in of_runs]
    keys = list(dict.fromkeys(key for text in texts for key in text))
    flat = [dict(flatten(record.config)) for record in records]
    defaults = default_choices()
    shared, axes = [], {}
    points: list[dict[str, Any]] = [{} for _ in records]
    for key in keys:
        own = [text.get(key) for text in texts]
        if None not in own and len(set(own)) == 1:
            shared.append(str(own[0]))
            continue
        if any(text is not None and text.startswith("+") for text in own):
            what = f"the finalists differ in {key}, which can't be an axis"
            hint = "confirm them in separate studies: --trials N, sweep.name=NAME"
            raise ConfigError(what, ", ".join(map(str, own)), hint)
        values = [
            override_value(text) if text is not None else defaults.get(key) if key in groups()
            else escape_interpolations(recorded.get(key))
            for text, recorded in zip(own, flat, strict=True)
        ]  # fmt: skip
        if len(set(map(hydra_value, values))) == 1:  # written in one of them, and the default of the other
            shared.append(f"{key}={hydra_value(values[0])}")
            continue
        for point, value in zip(points, values, strict=True):
            point[key] = value
        axes[key] = list({hydra_value(value): value for value in values}.values())
    return ConfirmPoints(tuple(shared), tuple(points), axes)


def configuration_overrides(record: RunRecord) -> list[str]:
    """Return the overrides that give the run's configuration, without seed, split, and settings of its study."""
    training = {**EARLIER_TRAINING_DEFAULTS, **(record.config.get("training") or {})}
    task = {**EARLIER_TASK_DEFAULTS, **(record.config.get("task") or {})}
    overrides = recorded_overrides(record.replace(config={**record.config, "training": training, "task": task}))
    return [text for text in overrides if override_key(text.lstrip("+")) not in NOT_OF_A_CONFIGURATION]


def enqueued(points: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return each finalist with each seed, seed by seed: after any number of whole rounds the finalists are paired."""
    return [{**point, SEED: seed} for seed in seeds for point in points]


def confirm_overrides(plan: ConfirmPlan, points: ConfirmPoints, name: str, outputs: OutputPaths) -> list[str]:
    """Return the overrides of the sweep that confirms."""
    first = plan.seeds[0]
    direction = plan.objective.split(maxsplit=1)[0]
    axes = [f"{key}={','.join(map(hydra_value, values))}" for key, values in points.axes.items()]
    return [
        *points.shared,
        *axes,
        f"{SEED}=int(interval({first},{first + MAX_CONFIRM_SEEDS - 1}))",
        f"{SPLIT}=test",
        *enqueue_overrides(points.points, plan.seeds),
        "sweep.sampler=random",
        f"sweep.objectives={hydra_value([f'{direction} scores.test.{plan.score}'])}",
        f"sweep.question={hydra_value(escape_interpolations(f'Which finalist of {plan.study} is the best?'))}",
        f"sweep.name={hydra_value(escape_interpolations(name))}",
        f"output_root={hydra_value(str(outputs.root))}",
    ]


def enqueue_overrides(points: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[str]:
    trials = enqueued(points, seeds)
    return [f"sweep.enqueue={hydra_value(trials)}", f"sweep.n_trials={len(trials)}"]


def finalist_records(contenders: Sequence[Contender], outputs: OutputPaths) -> list[RunRecord]:
    """Return the records of the finalists' first runs.

    Raises:
        RecordError: one can't be read.
    """
    records = []
    for contender in contenders:
        if contender.row.run_id is None:
            raise RecordError("the trial has no run", f"trial {contender.row.number}", "choose others with --trials")
        records.append(read_record(outputs.run(contender.row.run_id).record))
    return records


def mean_seconds(contenders: Sequence[Contender]) -> float | None:
    return known_mean(contender.row.seconds for contender in contenders)
