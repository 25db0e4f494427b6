"""A study as MLflow shows it on its parent run: params, metrics, a note, two files. Pure functions."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from qlora_exp.formatting import figure
from qlora_exp.records.labels import label
from qlora_exp.records.redaction import redact, redact_overrides
from qlora_exp.records.types import Process, Status
from qlora_exp.tracking.fields import MAX_TAG_LENGTH, param_key, shown_text

STUDY_TAG = "qlora_exp.study"
"""The study's name. Only parent runs have this tag."""

STUDY_ID_TAG = "qlora_exp.study_id"
"""The study's identity, by which the parent run is found; names are for people. Only parent runs have this tag."""

SHOWN_TRIALS = 10
BEST_TAG = "qlora_exp.best"
"""What is best so far, in a few words; :data:`qlora_exp.tracking.ui.VIEW_COLUMNS` shows it in the runs table."""

BEST_METRICS = (
    *("score/accuracy", "score_before/accuracy", "score/exact_match", "score/rouge_l", "score/loss_per_item"),
    *("memory/peak_train_mib", "speed/train_tokens_per_second"),
)
"""Metrics of the best trial's run that the parent run has, too: in the runs table it stands for its folded trials."""

ANSWER_TAGS = (
    *("decision", "recommended_rank", "use_rank", "regret_bound", "regret_rank", "margin_text", "margin_units"),
    *("lr_policy", "lost_runs", "would_settle", "settle_command"),
)
"""Fields of a ladder's answer that the parent run has as tags; ladder.json, its artifact, has all."""


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

    @property
    def objective_paths(self) -> list[str]:
        """The objectives without their directions."""
        return [objective.split(maxsplit=1)[-1] for objective in self.objectives]


@dataclass(frozen=True)
class SummaryTrial:
    """One trial of ``summary.json``: ``values`` in the order of the objectives (empty if it was not scored), ``params``
    by swept key."""

    number: int
    status: Status
    values: tuple[float | None, ...] = ()
    params: dict[str, Any] = field(default_factory=dict)
    run_id: str | None = None
    seconds: float | None = None

    def value(self, index: int) -> float | None:
        return self.values[index] if index < len(self.values) else None


@dataclass(frozen=True)
class StudySummary:
    """``summary.json``: the study's state. ``best``: numbers of the best trials, best first; several if there are
    several objectives. ``process``: the running sweep's."""

    status: Status
    updated_at: str
    best: tuple[int, ...] = ()
    trials: tuple[SummaryTrial, ...] = ()
    process: Process | None = None

    @property
    def best_trials(self) -> list[SummaryTrial]:
        by_number = {trial.number: trial for trial in self.trials}
        return [by_number[number] for number in self.best if number in by_number]


@dataclass(frozen=True)
class LadderAnswer:
    """One ladder of ``ladder.json``. ``fields``: the whole object; versions differ in what it has."""

    axes: dict[str, Any]
    sentence: str
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The sentence, preceded by the axes that distinguish the ladder."""
        axes = ", ".join(f"{key}={value}" for key, value in self.axes.items())
        return f"{axes}: {self.sentence}" if axes else self.sentence


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


def best_tag(
    definition: StudyDefinition, summary: StudySummary, answers: Sequence[LadderAnswer] = ()
) -> dict[str, str]:
    """Return the rank to use, or the best trial's name and values, e.g. ``r16 lr0.0028: loss_per_item 2.082``.

    Empty if there is neither.
    """
    ranks = [
        " ".join([*(f"{value}:" for value in answer.axes.values()), f"use r = {answer.fields['use_rank']}"])
        for answer in answers
        if answer.fields.get("use_rank") is not None
    ]
    if ranks:
        return {BEST_TAG: shown_text("; ".join(ranks))}
    if (confirmed := next((answer.fields["use"] for answer in answers if answer.fields.get("use")), None)) is not None:
        return {BEST_TAG: shown_text(str(confirmed))}
    if answers or not summary.best_trials:
        return {}
    best = summary.best_trials[0]
    values = ", ".join(
        f"{path.rsplit('.', 1)[-1]} {figure(best.value(index))}"
        for index, path in enumerate(definition.objective_paths)
    )
    return {BEST_TAG: shown_text(f"{label(redact(best.params))}: {values}")}


def ladder_tags(answers: Sequence[LadderAnswer]) -> dict[str, str]:
    """Return the answer's fields as tags, by which runs can be searched: ``qlora_exp.use_rank``. Of several ladders,
    each with the axes that distinguish it: ``qlora_exp.use_rank/model.variant:base``. ``null``: unknown."""
    tags: dict[str, str] = {}
    for answer in answers:
        axes = " ".join(f"{key}:{value}" for key, value in answer.axes.items())
        for name in ANSWER_TAGS:
            if name in answer.fields:
                value = answer.fields[name]
                text = "null" if value is None else value if isinstance(value, str) else json.dumps(value)
                tags[param_key(f"qlora_exp.{name}/{axes}" if axes else f"qlora_exp.{name}")] = shown_text(text)
    return tags


def study_metrics(definition: StudyDefinition, summary: StudySummary) -> dict[str, float]:
    """Return the numbers of trials by result, and the best value of each objective."""
    counts = Counter(trial.status for trial in summary.trials)
    metrics: dict[str, float] = {
        "trials_finished": counts[Status.COMPLETED],
        "trials_pruned": counts[Status.PRUNED],
        "trials_failed": counts[Status.FAILED] + counts[Status.OUT_OF_MEMORY] + counts[Status.DIVERGED],
    }
    for index, (objective, path) in enumerate(zip(definition.objectives, definition.objective_paths, strict=True)):
        values = [value for trial in summary.best_trials if (value := trial.value(index)) is not None]
        if values:
            metrics[f"best/{param_key(path)}"] = max(values) if objective.startswith("maximize") else min(values)
    return metrics


def study_note(definition: StudyDefinition, summary: StudySummary, answers: Sequence[LadderAnswer] = ()) -> str:
    """Return the study in Markdown. The first line, which the UI shows while the note is folded, has rank doubling's
    answers or else the best trial so far."""
    headline = (
        "\n\n".join(answer.text for answer in answers) or f"**{summary.status.value.lower()}**, no best trial yet"
    )
    if summary.best_trials and not answers:
        best = summary.best_trials[0]
        settings = ", ".join(f"{key}={value}" for key, value in redact(best.params).items())
        headline = f"best so far: **{_values_text(definition, best)}** with {settings} (trial {best.number})"
    number = "no fixed number of" if definition.n_trials is None else str(definition.n_trials)
    algorithms = f"sampler {definition.sampler or 'none'}, pruner {definition.pruner or 'none'}"
    counts = sorted(Counter(trial.status for trial in summary.trials).items())
    results = ", ".join(f"{count} {status.value.lower().replace('_', ' ')}" for status, count in counts)
    lines = [
        headline,
        "",
        *([definition.question, ""] if definition.question else []),
        f"- {number} trials, {algorithms}; so far {results or 'none'}",
        f"- objective: {', '.join(definition.objectives) or 'none'}",
        *(f"- `{key}`: {text}" for key, text in redact(definition.space).items()),
        *([f"- all trials: `{' '.join(redact_overrides(definition.overrides))}`"] if definition.overrides else []),
        "",
        *_table(definition, summary),
    ]
    return shown_text("\n".join(lines).strip(), MAX_TAG_LENGTH)


def trials_csv(definition: StudyDefinition, summary: StudySummary) -> str:
    """Return all trials as CSV, one column a swept key; each of several objectives has a column ``value_FIELD``.

    A cell has ``null`` if the value is unset, and is empty if the trial doesn't have the key.
    """
    keys, paths = _swept_keys(definition, summary), definition.objective_paths
    values = [f"value_{path}" for path in paths] if len(paths) > 1 else ["value"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["number", "status", *values, "run_id", "seconds", *keys])
    for trial in summary.trials:
        cells = {
            key: "null" if value is None else str(value).lower() if isinstance(value, bool) else value
            for key, value in redact(trial.params).items()
        }
        row = [trial.number, trial.status.value, *(trial.value(index) for index in range(len(values)))]
        writer.writerow([*row, trial.run_id, trial.seconds, *(cells.get(key) for key in keys)])
    return text.getvalue()


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


def _values_text(definition: StudyDefinition, trial: SummaryTrial) -> str:
    return ", ".join(f"{path} {figure(trial.value(index))}" for index, path in enumerate(definition.objective_paths))


def _swept_keys(definition: StudyDefinition, summary: StudySummary) -> list[str]:
    return list(dict.fromkeys([*definition.space, *(key for trial in summary.trials for key in trial.params)]))


def _table(definition: StudyDefinition, summary: StudySummary) -> Iterator[str]:
    """Yield the best trials in the order of ``best``, then the other completed ones by the first objective."""
    others = [t for t in summary.trials if t.status is Status.COMPLETED and t.number not in summary.best]
    maximize = bool(definition.objectives) and definition.objectives[0].startswith("maximize")

    def order(trial: SummaryTrial) -> float:
        value = trial.value(0)
        return math.inf if value is None else (-value if maximize else value)

    shown = [*summary.best_trials, *sorted(others, key=order)][:SHOWN_TRIALS]
    if not shown:
        return
    keys = _swept_keys(definition, summary)
    heads = ["trial", *definition.objective_paths, *keys, "run"]
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for trial in shown:
        values = [figure(trial.value(index)) for index in range(len(definition.objectives))]
        params = redact(trial.params)
        cells = [f"{trial.number}", *values, *(f"{params.get(key, '–')}" for key in keys), trial.run_id or "–"]
        yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
