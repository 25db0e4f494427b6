"""Records and choices as tables: as wide as the terminal, or as wide as needed in a file or a pipe."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.text import Text

from qlora_exp.config.choices import Choice
from qlora_exp.formatting import (
    TableColumn,
    clock_text,
    fitted_table,
    flatten,
    number,
    print_table,
    table_width,
)
from qlora_exp.records.flat_rows import field_named, flat_run
from qlora_exp.records.labels import labels, short_id
from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import RunRecord

STATUS_STYLES = {"COMPLETED": "green", "RUNNING": "cyan", "PRUNED": "yellow", "WAITING": "dim"}

UNMENTIONED = 9
"""Priority of a column that a narrow table leaves out without a word."""


def print_rows(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[TableColumn],
    as_json: bool = False,
    as_csv: bool = False,
    header: str = "",
) -> None:
    """Print one row per mapping: as a table within the terminal's width, as JSON, or as CSV.

    JSON is a list of flat objects with all keys of the rows, numbers unrounded, unknown values ``null``. CSV has the
    same keys as columns; unknown values are empty. The table has only ``columns``, and ``header`` above it.

    Example: ``print_rows([{"run_id": "3f2a", "peak_bytes": 12}], [TableColumn("run_id"), TableColumn("peak_bytes")])``
    """
    if as_json:
        print_json([flat_row(row) for row in rows])
    elif as_csv:
        keys = list(dict.fromkeys(key for row in rows for key in flat_row(row)))
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(keys)
        for row in map(flat_row, rows):
            writer.writerow([_csv_cell(row.get(key)) for key in keys])
    else:
        table, missing = fitted_table(rows, columns, table_width())
        if header:
            print(header)
        print_table(table)
        names = [column.shown_heading for column in missing if column.priority < UNMENTIONED]
        if names:
            print(f"not shown for lack of width: {', '.join(names)}")


def select(
    rows: Sequence[Mapping[str, Any]],
    fields: Sequence[Mapping[str, Any]],
    columns: str | None,
    defaults: Sequence[TableColumn],
) -> tuple[Sequence[Mapping[str, Any]], list[TableColumn]]:
    """Return the rows and columns to print: ``defaults``, or with ``--columns`` the first of them and these fields.

    ``fields``: per row, everything that ``columns`` may name.

    Raises:
        ConfigError: no row has such a field.
    """
    if columns is None or not rows:
        return rows, list(defaults)
    names = [name for name in map(str.strip, columns.split(",")) if name]
    keys = {field_named(name, fields, "--columns"): name for name in names}
    identity = next((key for key in ("number", "run_id") if key in rows[0]), defaults[0].key)
    kept = list(dict.fromkeys([identity, defaults[0].key, *keys]))
    by_key = {column.key: column for column in defaults}
    shown = [
        {key: known[key] if key in known else row.get(key) for key in kept}
        for row, known in zip(rows, fields, strict=True)
    ]
    listed = dict.fromkeys([defaults[0].key, *keys])
    return shown, [by_key.get(key, TableColumn(key, keys.get(key))) for key in listed]


def print_json(value: Any) -> None:
    """Print JSON. NaN and infinities are ``null``: JSON has neither."""
    print(json.dumps(_json_value(value), indent=1, ensure_ascii=False, allow_nan=False))


def flat_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with dotted keys in place of nested mappings."""
    return dict(flatten(row))


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


def _csv_cell(value: Any) -> Any:
    value = _json_value(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def runs_columns(rows: Sequence[Mapping[str, Any]]) -> list[TableColumn]:
    """Return the columns of ``ls runs``: what varies, the main score before → after, memory, speed, time, status. The
    score's name and split are in the heading if all runs have the same."""
    names, splits = ({row[key] for row in rows if row[key] is not None} for key in ("score", "split"))
    heading = names.pop() if len(names) == 1 else "score"
    if len(splits) == 1:
        heading += f" on {splits.pop()}"
    studies = {row["study"] for row in rows}
    return [
        TableColumn("short_id", "run"),
        TableColumn("label", "settings", cut=True),
        *([TableColumn("study", priority=3)] if len(studies) > 1 else []),
        TableColumn("quality", heading),
        TableColumn("peak_train_bytes", "peak", priority=1),
        TableColumn("train_tokens_per_second", "tokens/s", lambda value: number(value, 0), priority=4),
        TableColumn("seconds", "time", clock_text, priority=2),
        TableColumn("status", text=status_cell),
    ]


def runs_rows(records: Sequence[RunRecord], everybody: Iterable[str]) -> list[dict[str, Any]]:
    """Return one row per run: :func:`~qlora_exp.records.flat_rows.flat_run` with ``short_id`` (unique among the ids
    ``everybody``) and ``label``."""
    ids = list(everybody)
    plain = [{"config": record.config, "trial": to_dict(record.trial)} for record in records]
    return [
        {"run_id": record.run_id, "short_id": short_id(record.run_id, ids), "label": text} | flat_run(record)
        for record, text in zip(records, labels(plain), strict=True)
    ]


def status_cell(status: str) -> Text:
    return Text(status, style=STATUS_STYLES.get(status, "red"))


def with_quality(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with ``quality``, the text of the score column: ``0.186 → 0.502``.

    The score's name and split are in it if they differ among the runs; the split is then not in ``label``.
    """
    names, splits = ({row[key] for row in rows if row[key] is not None} for key in ("score", "split"))
    result = []
    for row in rows:
        values = f"{number(row['score_before'])} → {number(row['score_after'])}"
        parts = (row["score"] if len(names) > 1 else "", values, row["split"] if len(splits) > 1 else "")
        text = " ".join(part for part in parts if part) if row["score"] is not None else None
        label = row["label"].removesuffix(f" {row['split']}") if len(splits) > 1 else row["label"]
        result.append({**row, "label": label, "quality": text})
    return result


def choices_rows(choices: Iterable[Choice], keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return one row per choice: name, the ``keys`` (dotted) of its file, meaning, cost if any choice has one, and
    command."""
    listed = list(choices)
    costs = any(choice.cost is not None for choice in listed)
    rows = []
    for choice in listed:
        settings = dict(flatten(choice.keys))
        row = {"name": choice.name, **{key: settings.get(key) for key in keys}, "meaning": choice.meaning or None}
        rows.append(row | ({"cost": choice.cost} if costs else {}) | {"command": choice.command})
    return rows


def choices_columns(rows: Sequence[Mapping[str, Any]]) -> list[TableColumn]:
    """Return the columns of ``ls models`` and so on; the command is the first to go."""
    priorities = {"name": 0, "meaning": 0, "cost": 0, "checkpoints.instruct": 2, "command": UNMENTIONED}
    folded = ("meaning", "cost")
    return [
        TableColumn(key, key.rsplit(".", 1)[-1], priority=priorities.get(key, 1), fold=key in folded)
        for key in dict.fromkeys(key for row in rows for key in row)
    ]
