"""Records as tables of pandas: one flat row a run."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from qlora_exp.errors import ConfigError, nearest
from qlora_exp.formatting import flatten
from qlora_exp.paths import OutputPaths
from qlora_exp.records.find import find_study, read_runs
from qlora_exp.records.types import RunRecord, Scores
from qlora_exp.study.spec import is_trial_of, read_spec

LEFT_OUT_KEYS = ("sweep.", "workers.", "output_root.", "name.")
"""Beginnings of keys of a configuration that don't describe the run; a dot ends a key."""
SCORES = tuple(field.name for field in dataclasses.fields(Scores) if field.name not in ("split", "items", "other"))
MEMORY = ("peak_train_bytes", "base_weight_bytes", "quantization_state_bytes", "adapter_bytes", "optimizer_bytes")
SPEED = ("total_seconds", "train_seconds", "steps", "train_tokens", "train_tokens_per_second", "energy_joules")
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
CONDITION = re.compile(r"\s*([\w.]+)\s*(==|!=|<=|>=|=|<|>)\s*(.*?)\s*")


def runs_frame(output_root: str | Path, study: str | None, where: str | Sequence[str]) -> pd.DataFrame:
    """See :func:`qlora_exp.runs`."""
    outputs = OutputPaths.of(output_root)
    spec = read_spec(find_study(study, outputs)) if study is not None else None
    records, _ = read_runs(outputs)
    return frame_of(record for record in records if spec is None or is_trial_of(record, spec)).pipe(matching, where)


def frame_of(records: Iterable[RunRecord]) -> pd.DataFrame:
    """Return one row a record. Its columns are there without records, too, except for the settings'."""
    rows = [run_row(record) for record in records]
    return pd.DataFrame(rows, columns=None if rows else list(_figures(None)))


def run_row(record: RunRecord) -> dict[str, Any]:
    """Return a record as a flat row: the main figures, then every setting under its key."""
    settings = {key: value for key, value in flatten(record.config) if not f"{key}.".startswith(LEFT_OUT_KEYS)}
    return {**_figures(record), **settings}


def _figures(record: RunRecord | None) -> dict[str, Any]:
    """Return the columns that every run has; ``None`` for all of them without a record."""
    on_test = record is not None and record.scores.test is not None
    table = record.scores if record is not None else None
    after = table and (table.test if on_test else table.after)
    before = table and (table.test_before if on_test else table.before)
    row: dict[str, Any] = {name: getattr(record, name, None) for name in ("run_id", "name")}
    row["status"] = record.status.value if record is not None else None
    row |= {"study": record and record.trial and record.trial.study}
    row |= {"trial": record and record.trial and record.trial.number, "started_at": record and record.started_at}
    scored = after or before
    row |= {"split": scored and scored.split, "items": scored and scored.items}
    for name in SCORES:
        row |= {name: getattr(after, name, None), f"{name}_before": getattr(before, name, None)}
    row |= {"goal": record and record.goal and record.goal.answer}
    row |= {name: getattr(record and record.memory, name, None) for name in MEMORY}
    row |= {name: getattr(record and record.speed, name, None) for name in SPEED}
    row |= {"cost_usd": record and record.speed.cost_usd}
    row |= {"trainable_parameters": record and record.plan and record.plan.trainable_parameters}
    return row


def matching(frame: pd.DataFrame, where: str | Sequence[str]) -> pd.DataFrame:
    """Return the rows for which all conditions hold. A missing value meets only ``!=``.

    Raises:
        ConfigError: a condition is not ``COLUMN OPERATOR VALUE``, or names no column.
    """
    for condition in [where] if isinstance(where, str) else where:
        match = CONDITION.fullmatch(condition)
        if match is None:
            raise ConfigError("this is not a condition", condition, "COLUMN=VALUE, or != < <= > >=: lora.r>=16")
        column, sign, text = match.groups()
        if column not in frame.columns:
            raise ConfigError(f"there is no column {column!r}", condition, nearest(column, map(str, frame.columns)))
        values = frame[column]
        number = pd.to_numeric(pd.Series([text]), errors="coerce")[0]
        if pd.isna(number) or (sign in ("=", "==", "!=") and not pd.api.types.is_numeric_dtype(values)):
            chosen = COMPARISONS[sign](values.map(_text), text)
        else:
            chosen = COMPARISONS[sign](pd.to_numeric(values, errors="coerce"), number)
        frame = frame[chosen]
    return frame.reset_index(drop=True)


def _text(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
