"""A study as MLflow shows it on its parent run: params, metrics, a note, two files. Pure functions."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import yaml

from qlora_exp.records.redaction import redact, redact_overrides
from qlora_exp.records.types import Process, Status
from qlora_exp.tracking.fields import MAX_TAG_LENGTH, param_key, shown_figure, shown_text

STUDY_TAG = "qlora_exp.study"
"""The study's name. Only parent runs have this tag."""

STUDY_ID_TAG = "qlora_exp.study_id"
"""The study's identity, by which the parent run is found; names are for people. Only parent runs have this tag."""

SHOWN_TRIALS = 10


@dataclass(frozen=True)
class StudyDefinition:
    """``study.json``: the question, the search space and the number of trials.

    An objective reads ``minimize PATH`` or ``maximize PATH``, a path into the record. ``space`` has each swept key's
    range as text.
    """

    name: str
    question: str | None = None
    space: dict[str, str] = field(default_factory=dict)
    objectives: tuple[str, ...] = ()
    sampler: str | None = None
    pruner: str | None = None
    n_trials: int | None = None
    created_at: str | None = None
    overrides: tuple[str, ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)
    """Settings that all trials share, in addition to the swept keys: key → value."""
    id: str | None = None
    """``None``: an earlier version created the study, without an identity."""


@dataclass(frozen=True)
class TrialRow:
    """One trial: ``values`` in the order of the objectives (empty if it was not scored), ``params`` by swept key."""

    number: int
    status: Status
    values: tuple[float | None, ...] = ()
    params: dict[str, Any] = field(default_factory=dict)
    run_id: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class StudySummary:
    """``summary.json``: the study's state. ``best``: numbers of the best trials, best first; several if there are
    several objectives. ``process``: the running sweep's."""

    status: Status
    updated_at: str
    best: tuple[int, ...] = ()
    trials: tuple[TrialRow, ...] = ()
    process: Process | None = None

    @property
    def best_trials(self) -> list[TrialRow]:
        by_number = {trial.number: trial for trial in self.trials}
        return [by_number[number] for number in self.best if number in by_number]

    def count(self, *statuses: Status) -> int:
        counts = Counter(trial.status for trial in self.trials)
        return sum(counts[status] for status in statuses)


def study_params(definition: StudyDefinition) -> dict[str, str]:
    values = {
        "sampler": definition.sampler,
        "pruner": definition.pruner,
        "objective": ", ".join(definition.objectives) or None,
    }
    return {key: shown_text(value) for key, value in values.items() if value is not None}


def study_tags(definition: StudyDefinition) -> dict[str, str]:
    return {
        STUDY_TAG: shown_text(definition.name),
        **({STUDY_ID_TAG: definition.id} if definition.id is not None else {}),
        # Not a param: MLflow never changes one, and a resumed study may have more trials.
        **({"qlora_exp.n_trials": str(definition.n_trials)} if definition.n_trials is not None else {}),
        "mlflow.source.name": "qlora-exp sweep",
        "mlflow.source.type": "LOCAL",
    }


def study_metrics(definition: StudyDefinition, summary: StudySummary) -> dict[str, float]:
    """Return the numbers of trials by result, and the best value of each objective."""
    metrics: dict[str, float] = {
        "trials_finished": summary.count(Status.COMPLETED),
        "trials_pruned": summary.count(Status.PRUNED),
        "trials_failed": summary.count(Status.FAILED, Status.OUT_OF_MEMORY, Status.DIVERGED),
    }
    for index, objective in enumerate(definition.objectives):
        value = _best_value(summary, index, objective)
        if value is not None:
            metrics[f"best/{param_key(_objective_path(objective))}"] = value
    return metrics


def study_note(definition: StudyDefinition, summary: StudySummary, answers: Sequence[str] = ()) -> str:
    """Return the study in Markdown. The first line, which the UI shows while the note is folded, has rank doubling's
    answers or else the best trial so far."""
    lines = [
        "\n\n".join(answers) or _headline(definition, summary),
        "",
        *([definition.question, ""] if definition.question else []),
        f"- {_progress(definition, summary)}",
        f"- objective: {', '.join(definition.objectives) or 'none'}",
        *(f"- `{key}`: {text}" for key, text in redact(definition.space).items()),
        *([f"- all trials: `{' '.join(redact_overrides(definition.overrides))}`"] if definition.overrides else []),
        "",
        *_table(definition, summary),
    ]
    return shown_text("\n".join(lines).strip(), MAX_TAG_LENGTH)


def trials_csv(definition: StudyDefinition, summary: StudySummary) -> str:
    """Return all trials as CSV, one column a swept key; each of several objectives has a column ``value_FIELD``."""
    keys = _swept_keys(definition, summary)
    several = len(definition.objectives) > 1
    values = [f"value_{_objective_path(objective)}" for objective in definition.objectives] if several else ["value"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["number", "status", *values, "run_id", "seconds", *keys])
    for trial in summary.trials:
        params = redact(trial.params)
        row = [trial.number, trial.status.value, *(_value(trial, index) for index in range(len(values)))]
        writer.writerow([*row, trial.run_id, trial.seconds, *(_cell(params, key) for key in keys)])
    return text.getvalue()


def _cell(params: dict[str, Any], key: str) -> Any:
    """Return a CSV cell: ``null`` if the value is unset, empty if the trial doesn't have the key."""
    value = params.get(key)
    if value is None:
        return "null" if key in params else None
    return str(value).lower() if isinstance(value, bool) else value


def best_yaml(definition: StudyDefinition, summary: StudySummary) -> str | None:
    """Return the best trial's settings as a file for ``qlora-exp run --from``; ``None`` if there is no best trial
    yet."""
    if not summary.best_trials:
        return None
    best = summary.best_trials[0]
    lines = [f"# Trial {best.number} of {definition.name}: {_values_text(definition, best)}"]
    if best.run_id is not None:
        lines.append(f"# To repeat this run: qlora-exp rerun {best.run_id}")
    settings = redact({**definition.fixed, **best.params})
    return shown_text("\n".join(lines), None) + "\n" + yaml.safe_dump(settings, allow_unicode=True)


def milliseconds(moment: str) -> int:
    return round(datetime.fromisoformat(moment).timestamp() * 1000)


def _headline(definition: StudyDefinition, summary: StudySummary) -> str:
    if not summary.best_trials:
        return f"**{summary.status.value.lower()}**, no best trial yet"
    best = summary.best_trials[0]
    settings = ", ".join(f"{key}={value}" for key, value in redact(best.params).items())
    return f"best so far: **{_values_text(definition, best)}** with {settings} (trial {best.number})"


def _progress(definition: StudyDefinition, summary: StudySummary) -> str:
    counts = Counter(trial.status for trial in summary.trials)
    counts_text = ", ".join(
        f"{count} {status.value.lower().replace('_', ' ')}" for status, count in sorted(counts.items())
    )
    algorithms = f"sampler {definition.sampler or 'none'}, pruner {definition.pruner or 'none'}"
    budget = "no fixed number of" if definition.n_trials is None else str(definition.n_trials)
    return f"{budget} trials, {algorithms}; so far {counts_text or 'none'}"


def _table(definition: StudyDefinition, summary: StudySummary) -> Iterator[str]:
    shown = _leading_trials(definition, summary)
    if not shown:
        return
    keys = _swept_keys(definition, summary)
    heads = ["trial", *(_objective_path(objective) for objective in definition.objectives), *keys, "run"]
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for trial in shown:
        values = [shown_figure(_value(trial, index)) for index in range(len(definition.objectives))]
        params = redact(trial.params)
        cells = [f"{trial.number}", *values, *(f"{params.get(key, '–')}" for key in keys), trial.run_id or "–"]
        yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _leading_trials(definition: StudyDefinition, summary: StudySummary) -> list[TrialRow]:
    """Return the best trials in the order of ``best``, then the other completed ones by the first objective."""
    others = [t for t in summary.trials if t.status is Status.COMPLETED and t.number not in summary.best]
    maximize = bool(definition.objectives) and definition.objectives[0].startswith("maximize")

    def order(trial: TrialRow) -> float:
        value = _value(trial, 0)
        return math.inf if value is None else (-value if maximize else value)

    return [*summary.best_trials, *sorted(others, key=order)][:SHOWN_TRIALS]


def _best_value(summary: StudySummary, index: int, objective: str) -> float | None:
    values = [value for trial in summary.best_trials if (value := _value(trial, index)) is not None]
    return (max if objective.startswith("maximize") else min)(values, default=None)


def _value(trial: TrialRow, index: int) -> float | None:
    return trial.values[index] if index < len(trial.values) else None


def _values_text(definition: StudyDefinition, trial: TrialRow) -> str:
    texts = (
        f"{_objective_path(objective)} {shown_figure(_value(trial, index))}"
        for index, objective in enumerate(definition.objectives)
    )
    return ", ".join(texts)


def _objective_path(objective: str) -> str:
    """Return the objective's path, without its direction."""
    return objective.split(maxsplit=1)[-1]


def _swept_keys(definition: StudyDefinition, summary: StudySummary) -> list[str]:
    return list(dict.fromkeys([*definition.space, *(key for trial in summary.trials for key in trial.params)]))
