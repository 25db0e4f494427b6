"""Records and choices as tables: as wide as the terminal, or as wide as needed in a file or a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from qlora_exp.config.choices import Choice
from qlora_exp.formatting import UNKNOWN_CELL, bytes_text, flatten, number, simple_table
from qlora_exp.records.model_name import model_name
from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import RunRecord, Status

STATUS_STYLES = {Status.COMPLETED: "green", Status.RUNNING: "cyan", Status.PRUNED: "yellow"}
NOT_COMPARED = ("run_id.", "name.", "started_at.", "ended_at.", "process.", "config.name.", "config.output_root.")
"""Beginnings of the keys that differ between any two runs and explain nothing; a dot ends a key."""


def runs_table(records: Sequence[RunRecord]) -> Table:
    """Return one row per run: its settings, scores and cost."""
    table = simple_table("run", "model", "variant", "quantization", "r", "targets")
    for heading in ("quality before → after", "base weights", "peak memory", "tokens/s", "status"):
        table.add_column(heading, justify="right" if heading in ("base weights", "peak memory", "tokens/s") else "left")
    for record in records:
        settings, memory = dict(flatten(record.config)), record.memory
        names = ("model.variant", "quantization.mode", "lora.r")
        modules = settings.get("targets.modules")
        weights = [size for size in (memory.base_weight_bytes, memory.quantization_state_bytes) if size is not None]
        table.add_row(
            record.run_id,
            model_name(record.config.get("model") or {}),
            *(_plain(settings.get(name)) for name in names),
            "+".join(map(str, modules)) if modules else _plain(settings.get("targets.set")),
            quality(record),
            bytes_text(sum(weights) if weights else None),
            bytes_text(memory.peak_train_bytes),
            number(record.speed.train_tokens_per_second, 0),
            Text(record.status.value, style=STATUS_STYLES.get(record.status, "red")),
        )
    return table


def quality(record: RunRecord) -> str:
    """Return the run's main score before → after: accuracy, else exact match, else ROUGE-L, else loss. On test if the
    run was scored there."""
    before, after = record.scores.before, record.scores.after
    if record.scores.test is not None:
        before, after = record.scores.test_before, record.scores.test
    shown = after or before
    if shown is None:
        return UNKNOWN_CELL
    name = next((n for n in ("accuracy", "exact_match", "rouge_l", "loss") if getattr(shown, n) is not None), "loss")
    split = f" ({shown.split})" if shown.split != "validation" else ""
    values = [number(getattr(scores, name) if scores is not None else None) for scores in (before, after)]
    return f"{name} {' → '.join(values)}{split}"


def choices_table(choices: Iterable[Choice], keys: Sequence[str] = ()) -> Table:
    """Return name, meaning, the ``keys`` (dotted) of each file, its cost if any file has one, and the command."""
    rows = list(choices)
    costs = any(choice.cost is not None for choice in rows)
    columns = (*(key.rsplit(".", 1)[-1] for key in keys), "meaning", *(["cost"] if costs else []))
    table = simple_table("name", *columns, "command")
    for choice in rows:
        settings = dict(flatten(choice.keys))
        values = [_plain(settings.get(key)) for key in keys]
        cost = [choice.cost or UNKNOWN_CELL] if costs else []
        table.add_row(choice.name, *values, choice.meaning or UNKNOWN_CELL, *cost, choice.command or UNKNOWN_CELL)
    return table


def record_table(record: RunRecord) -> Table:
    """Return everything known of a run, one figure per row; unknown figures are left out."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column("key", style="bold", no_wrap=True)
    table.add_column("value", overflow="fold")
    for key, value in flatten(to_dict(record)):
        if value is not None and value != {} and value != []:
            table.add_row(key, _value(key, value))
    return table


def difference_table(left: RunRecord, right: RunRecord) -> Table:
    """Return what differs, in the record's order: settings, environment and figures, with the change if both are
    numbers."""
    table = simple_table("key")
    for heading in (left.run_id, right.run_id, "change"):
        table.add_column(heading, overflow="fold", justify="right")
    before, after = dict(flatten(to_dict(left))), dict(flatten(to_dict(right)))
    for key in before | after:
        first, second = before.get(key), after.get(key)
        if first != second and not f"{key}.".startswith(NOT_COMPARED):
            table.add_row(key, _value(key, first), _value(key, second), _change(key, first, second))
    return table


def _plain(value: Any) -> str:
    if value is None:
        return UNKNOWN_CELL
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _value(key: str, value: Any) -> str:
    """Return a figure as text, by the unit in its key's name; anything else as it is."""
    if not _is_number(value):
        return _plain(value)
    if key.endswith("_bytes"):
        return f"{bytes_text(value)} ({value:,.0f})" if abs(value) >= 1000 else bytes_text(value)
    if key.endswith("_seconds"):
        return f"{value:.3f} s"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else f"{value:.6g}"


def _change(key: str, first: Any, second: Any) -> str:
    if key.startswith("config.") or not (_is_number(first) and _is_number(second)):
        return ""
    difference = second - first
    share = f" ({difference / abs(first):+.1%})" if first else ""
    if key.endswith("_bytes"):
        return f"{'+' if difference > 0 else ''}{bytes_text(difference)}{share}"
    return f"{difference:+.6g}{share}"
