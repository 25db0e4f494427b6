"""A run as one flat row: for tables, ``--json``, ``--csv`` and filters."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_exp.errors import ConfigError, nearest
from qlora_exp.formatting import flatten
from qlora_exp.records.labels import run_name
from qlora_exp.records.method_name import is_lora, method_name
from qlora_exp.records.model_name import model_name
from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import RunRecord, Scores

MAIN_SCORES = ("accuracy", "exact_match", "rouge_l", "loss")
"""The first of these that a run has is its main score."""

RISING_SCORES = ("accuracy", "exact_match", "rouge_l")

OTHER_NAMES = {
    "rank": "r",
    "lora.r": "r",
    "lr": "learning_rate",
    "steps": "max_steps",
    "model.family": "model",
    "model.variant": "variant",
    "quantization.mode": "quantization",
    "peak": "peak_train_bytes",
    "time": "seconds",
    "cost": "cost_usd",
    "id": "run_id",
}
"""Name that people type → field of a row."""

WHERE_SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
WHERE_PATTERN = re.compile(r"^\s*([^<>=!\s]+)\s*(<=|>=|!=|==|=|<|>)\s*(.*?)\s*$", re.DOTALL)


@dataclass(frozen=True)
class Selection:
    """Which rows of a table are shown, in which order, with which columns: the options of ``ls`` and ``trials``."""

    where: tuple[str, ...] = ()
    sort: str | None = None
    columns: str | None = None
    """Names of fields, separated by commas."""
    limit: int | None = None


def flat_run(record: RunRecord) -> dict[str, Any]:
    """Return the run's settings, scores, memory, speed and cost as a flat row; ``None`` is unknown.

    The keys are a contract: docs/json.md lists them. ``score_*`` is the main score, see :func:`main_score`; accuracy,
    exact match, ROUGE-L and losses are those after tuning. All scores are on test if the run was scored there, else on
    validation. Sizes are in bytes, times in seconds, costs in US dollars.
    """
    settings, trial = dict(flatten(record.config)), record.trial
    before, after = shown_scores(record)
    shown = after or before
    modules = settings.get("targets.modules")
    baselines, lora = record.baselines, is_lora(record.config)
    alpha = record.plan.alpha if record.plan is not None else settings.get("lora.alpha")
    return {
        "run_id": record.run_id,
        "name": run_name(record),
        "status": record.status.value,
        "study": trial.study if trial is not None else None,
        "trial": trial.number if trial is not None else None,
        "started_at": record.started_at,
        "ended_at": record.ended_at,
        "seconds": record.speed.total_seconds,
        "model": model_name(record.config.get("model") or {}),
        "variant": settings.get("model.variant"),
        "quantization": settings.get("quantization.mode"),
        "method": method_name(record.config),
        "r": settings.get("lora.r") if lora else None,
        "alpha": alpha if lora else None,
        "targets": ("+".join(map(str, modules)) if modules else settings.get("targets.set")) if lora else None,
        "learning_rate": settings.get("training.learning_rate"),
        "batch_size": settings.get("training.batch_size"),
        "max_steps": record.plan.max_steps if record.plan is not None else settings.get("training.max_steps"),
        "seed": record.seed,
        "task": record.data.task if record.data is not None else settings.get("task.name"),
        "split": shown.split if shown is not None else None,
        "score": main_score(record),
        "score_before": _main(before, record),
        "score_after": _main(after, record),
        "accuracy": after.accuracy if after else None,
        "exact_match": after.exact_match if after else None,
        "rouge_l": after.rouge_l if after else None,
        "loss": after.loss if after else None,
        "loss_per_item": after.loss_per_item if after else None,
        "majority_accuracy": baselines.majority_accuracy if baselines else None,
        "tfidf_accuracy": baselines.tfidf_accuracy if baselines else None,
        "goal": record.goal.text if record.goal else None,
        "goal_met": record.goal.answer if record.goal else None,
        "trainable_parameters": record.plan.trainable_parameters if record.plan is not None else None,
        "base_weight_bytes": base_bytes_of(record),
        "peak_train_bytes": record.memory.peak_train_bytes,
        "train_tokens": record.speed.train_tokens,
        "train_seconds": record.speed.train_seconds,
        "train_tokens_per_second": record.speed.train_tokens_per_second,
        "cost_usd": record.speed.cost_usd,
        "failure": record.failure.kind if record.failure else None,
        "synthetic": record.synthetic,
    }


def all_fields(record: RunRecord) -> dict[str, Any]:
    """Return the row and every other figure of the record by its dotted key. Settings have theirs without
    ``config.``: ``training.scheduler``."""
    plain = to_dict(record)
    trial = {key: value for key, value in flatten(plain.pop("trial", None) or {}) if key}
    axes = {key.removeprefix("params."): value for key, value in trial.items() if key.startswith("params.")}
    return {**dict(flatten(plain.pop("config"))), **axes, **dict(flatten(plain)), **flat_run(record)}


def shown_scores(record: RunRecord) -> tuple[Scores | None, Scores | None]:
    """Return the scores before and after tuning: on test if the run was scored there."""
    scores = record.scores
    return (scores.test_before, scores.test) if scores.test is not None else (scores.before, scores.after)


def main_score(record: RunRecord) -> str | None:
    """Return the name of the run's main score: accuracy, else exact match, else ROUGE-L, else loss; ``None``: the run
    has no scores."""
    before, after = shown_scores(record)
    shown = after or before
    if shown is None:
        return None
    return next((name for name in MAIN_SCORES if getattr(shown, name) is not None), None)


def _main(scores: Scores | None, record: RunRecord) -> float | None:
    name = main_score(record)
    value = getattr(scores, name) if scores is not None and name is not None else None
    return float(value) if value is not None else None


def base_bytes_of(record: RunRecord) -> int | None:
    """Return the size of the base model with its quantization state; ``None`` if neither is known."""
    parts = (record.memory.base_weight_bytes, record.memory.quantization_state_bytes)
    known = [size for size in parts if size is not None]
    return sum(known) if known else None


def field_named(name: str, rows: Sequence[Mapping[str, Any]], where: str) -> str:
    """Return the rows' key that ``name`` means: the key, another name for it, or a unique end (``scheduler``).

    Raises:
        ConfigError: no row has it; the hint names the nearest. ``where``: the option.
    """
    keys = dict.fromkeys(key for row in rows for key in row)
    name = name.removeprefix("config.").strip()
    for candidate in (name, OTHER_NAMES.get(name)):
        if candidate is not None and (candidate in keys or not rows):
            return candidate
    ends = [key for key in keys if key.endswith(f".{name}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise ConfigError(f"{name!r} is the end of {len(ends)} fields", where, f"one of {', '.join(sorted(ends)[:6])}")
    raise ConfigError(f"there is no field {name!r}", where, nearest(name, [*keys, *OTHER_NAMES]))


def selected(rows: Sequence[Mapping[str, Any]], selection: Selection) -> list[int]:
    """Return the positions of the rows to show, in order. ``limit`` keeps the first in the order of ``sort``; without
    one, the last, which are the newest.

    Raises:
        ConfigError: a condition can't be read, or no row has its field or that of ``sort``.
    """
    positions = meeting(rows, selection.where)
    if selection.sort is not None:
        positions = [positions[place] for place in in_order([rows[index] for index in positions], selection.sort)]
        return positions[: selection.limit]
    return positions[-selection.limit :] if selection.limit is not None else positions


def meeting(rows: Sequence[Mapping[str, Any]], conditions: Iterable[str]) -> list[int]:
    """Return the positions of the rows that meet all of ``conditions``, such as ``r=16``, ``accuracy>0.5``,
    ``status!=FAILED``.

    Two numbers are compared as numbers, texts without regard to case. An unknown value meets only ``FIELD=null``, and
    ``!=`` of another value.

    Raises:
        ConfigError: a condition can't be read, or no row has its field.
    """
    tests = [_condition(text, rows) for text in conditions]
    return [index for index, row in enumerate(rows) if all(test(row) for test in tests)]


def _condition(text: str, rows: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], bool]:
    parts = WHERE_PATTERN.match(text)
    if parts is None:
        hint = "FIELD=VALUE, or with !=, <, >, <=, >=, e.g. --where r=16 --where 'accuracy>0.5'"
        raise ConfigError(f"{text!r} is not a condition", "--where", hint)
    key, sign, raw = field_named(parts[1], rows, "--where"), parts[2].replace("==", "="), parts[3].strip("'\"")
    wanted = _number_or_text(raw)
    if sign in ("<", ">", "<=", ">=") and wanted is None:
        raise ConfigError(f"{raw!r} has no order", f"--where {text}", "a number or a text, or = and !=")

    def test(row: Mapping[str, Any]) -> bool:
        value = _number_or_text(row.get(key))
        if value is None or wanted is None:
            return {"=": value is wanted, "!=": value is not wanted}.get(sign, False)
        if isinstance(value, float) != isinstance(wanted, float):
            return sign == "!="
        return WHERE_SIGNS[sign](value, wanted)

    return test


def in_order(rows: Sequence[Mapping[str, Any]], sort: str) -> list[int]:
    """Return the rows' positions sorted by the field ``sort``, or by ``-FIELD`` from the largest down; unknown values
    come last."""
    down = sort.startswith("-")
    key = field_named(sort.removeprefix("-"), rows, "--sort")
    values = [_number_or_text(row.get(key)) for row in rows]
    known = [index for index, value in enumerate(values) if value is not None]
    texts = any(isinstance(values[index], str) for index in known)
    ordered = sorted(known, key=lambda i: str(values[i]) if texts else values[i], reverse=down)  # type: ignore[arg-type,return-value]
    return [*ordered, *(index for index, value in enumerate(values) if value is None)]


def _number_or_text(value: Any) -> float | str | None:
    """Return a number as float, any other value as text in lower case; ``None`` for unknown."""
    if value is None or (isinstance(value, str) and value.lower() in ("null", "none", "")):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "+".join(str(entry) for entry in value).lower()
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value).lower()
