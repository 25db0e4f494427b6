"""Checks of the task and its goal."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import re
import typing
from collections.abc import Iterator

from qlora_exp.config.allowed_values import config_error, one_of
from qlora_exp.config.enums import Format, Learn, TaskKind, TaskSource
from qlora_exp.config.schema import Config, TaskConfig
from qlora_exp.errors import ConfigError, nearest
from qlora_exp.records.types import Scores

GOAL_PATTERN = re.compile(r"\s*([A-Za-z_]\w*)\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")

CLASSIFICATION_METRICS = (
    "accuracy", "accuracy_calibrated", "accuracy_normalized", "accuracy_pmi", "balanced_accuracy", "macro_f1",
    "invalid_answer_rate",
)  # fmt: skip
FREE_TEXT_METRICS = ("rouge_l", "token_f1")
GENERATED_METRICS = ("exact_match", "invalid_answer_rate", *FREE_TEXT_METRICS)
SHARE_METRICS = (*CLASSIFICATION_METRICS, *FREE_TEXT_METRICS, "exact_match", "token_accuracy")


@functools.cache
def goal_metrics() -> tuple[str, ...]:
    """Return the metrics that ``task.goal`` can name: the numbers of :class:`~qlora_exp.records.types.Scores`."""
    hints = typing.get_type_hints(Scores)
    return tuple(field.name for field in dataclasses.fields(Scores) if hints[field.name] == (float | None))


def _goal_override(text: str) -> str:
    """Return the override as it is written in a shell: Hydra needs quotes around spaces and signs, too."""
    return f"'task.goal=\"{text}\"'"


def parse_goal(text: str) -> tuple[str, str, float]:
    """Parse a goal: ``"accuracy >= 0.6"`` gives ``("accuracy", ">=", 0.6)``.

    Raises:
        ConfigError: it isn't METRIC >= NUMBER, or there is no such metric.
    """
    where = f"task.goal = {text}"
    match = GOAL_PATTERN.fullmatch(text)
    if not match:
        hint = f"write METRIC >= NUMBER, e.g. {_goal_override('accuracy >= 0.6')}"
        raise ConfigError("the goal can't be read", where, hint)
    metric, sign, threshold = match[1], match[2], float(match[3])
    if metric not in goal_metrics():
        raise ConfigError(f"there is no metric called {metric}", where, nearest(metric, goal_metrics()))
    if metric in SHARE_METRICS and not 0 <= threshold <= 1:
        what = f"{metric} is a share, between 0 and 1"
        likely = threshold / 100 if 1 < threshold <= 100 else 0.5
        raise ConfigError(what, where, f"e.g. {_goal_override(f'{metric} {sign} {likely:g}')}")
    return metric, sign, threshold


def task_problems(task: TaskConfig) -> Iterator[ConfigError]:
    if task.source is TaskSource.local and not task.path:
        yield config_error("a local task needs a file", "task.path", task.path, "task.path=FILE.jsonl")
    if task.source is TaskSource.hub and not task.hub_id:
        yield config_error("a Hub task needs a data set's id", "task.hub_id", task.hub_id, "task.hub_id=OWNER/NAME")
    for source, key, value in ((TaskSource.local, "path", task.path), (TaskSource.hub, "hub_id", task.hub_id)):
        if value and task.source is not source:
            hint = f"task={source.value} task.{key}={value}"
            yield config_error(f"task.{key} is only for task={source.value}", f"task.{key}", value, hint)
    if task.source is TaskSource.hub and "train" not in task.splits:
        yield config_error("the task has no training split", "task.splits", task.splits, "task.splits.train=train")
    for name in task.splits:
        yield from one_of("task.splits", name, ("train", "validation", "test"))
    if not task.validation_fraction + task.test_fraction < 1:
        what = "validation and test together leave no rows for training"
        total = f"{task.validation_fraction} + {task.test_fraction}"
        yield config_error(what, "task.validation_fraction + task.test_fraction", total, "their sum must be below 1")
    yield from _chat_problems(task)
    if task.labels is not None and (len(task.labels) < 2 or len(set(task.labels)) < len(task.labels)):
        what = "labels must be two or more, all different"
        yield config_error(what, "task.labels", task.labels, "task.labels=[yes,no]")
    if task.labels is not None and task.kind is not TaskKind.classification:
        yield config_error("labels are for classification", "task.kind", task.kind.value, "task.kind=classification")


def _chat_problems(task: TaskConfig) -> Iterator[ConfigError]:
    try:
        datetime.date.fromisoformat(task.date)
    except ValueError:
        hint = "year, month and day: task.date=2026-01-01"
        yield config_error("task.date is not a date", "task.date", task.date, hint)
    text_is_set = any((task.prompt, task.completion, task.columns.prompt, task.columns.completion))
    if task.learn is Learn.all and not task.columns.messages and text_is_set:
        what = "only conversations have several answers to learn"
        yield config_error(what, "task.learn", "all", "task.columns.messages=messages, or task.learn=last")
    if task.learn is Learn.all and task.format is Format.plain:
        hint = "task.format=chat, or task.learn=last"
        yield config_error("the plain format learns the last answer alone", "task.learn", "all", hint)


def goal_problems(config: Config) -> Iterator[ConfigError]:
    task, text = config.task, config.task.goal
    if text is None:
        return
    try:
        metric, _, _ = parse_goal(text)
    except ConfigError as problem:
        yield problem
        return
    unavailable = {TaskKind.classification: FREE_TEXT_METRICS, TaskKind.generation: CLASSIFICATION_METRICS}[task.kind]
    if metric in unavailable:
        what = f"{metric} isn't measured for task.kind={task.kind.value}"
        hint = f"task.goal=null, or another metric, e.g. {_goal_override('exact_match >= 0.5')}"
        yield config_error(what, "task.goal", text, hint)
    elif metric in GENERATED_METRICS and not config.evaluation.generate:
        yield config_error(f"{metric} needs generated answers", "task.goal", text, "evaluation.generate=true")
