"""Parquet and Arrow files as rows. Class numbers become class names if the file's metadata names them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_exp.data.files import DataFile, RawRow, Unlabelled, check_columns
from qlora_exp.data.row_problems import RowProblem
from qlora_exp.errors import DataError


def read_parquet(path: Path, name: str, content: bytes) -> DataFile:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"the file is not Parquet: {reason}", str(path), "write it again") from None
    return _rows_of(table, path, name)


def read_arrow(path: Path, name: str, content: bytes) -> DataFile:
    """Read Arrow's file format (Feather) or its stream format, which ``datasets`` writes."""
    import pyarrow
    import pyarrow.feather
    import pyarrow.ipc

    buffer = pyarrow.py_buffer(content)
    try:
        if content.startswith((b"ARROW1", b"FEA1")):
            table = pyarrow.feather.read_table(pyarrow.BufferReader(buffer))
        else:
            table = pyarrow.ipc.open_stream(buffer).read_all()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"the file is not Arrow: {reason}", str(path), "write it again, e.g. as Parquet") from None
    return _rows_of(table, path, name)


def class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return the class names by column, as ``datasets`` stores them in a schema's metadata."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        named = {str(column): kind["names"] for column, kind in features.items() if _is_class_label(kind)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    return {column: [str(name) for name in names] for column, names in named.items()}


def _is_class_label(kind: object) -> bool:
    return isinstance(kind, dict) and kind.get("_type") == "ClassLabel" and isinstance(kind.get("names"), list)


def with_class_names(
    row: Mapping[str, Any], names: Mapping[str, Sequence[str]], file: str, number: int
) -> dict[str, Any] | RowProblem:
    """Return the row with class names for class numbers. -1, the Hub's mark of a row without a label, gets no name."""
    named = dict(row)
    for column, classes in names.items():
        value = row.get(column)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if value >= len(classes):
            detail = f"class {value}, but the file names only {len(classes)} classes"
            return RowProblem(file, number, column, "unknown class", detail)
        named[column] = classes[value] if value >= 0 else Unlabelled(value)
    return named


def _rows_of(table: Any, path: Path, name: str) -> DataFile:
    check_columns(table.column_names, path)
    names = class_names(table.schema.metadata)
    rows, problems = [], []
    for number, values in enumerate(_table_rows(table, path), start=1):
        row = with_class_names(values, names, name, number)
        if isinstance(row, RowProblem):
            problems.append(row)
        else:
            rows.append(RawRow(name, number, row))
    classes = tuple(column for column in table.column_names if column in names)
    return DataFile(name, tuple(rows), tuple(table.column_names), tuple(problems), classes=classes)


def _table_rows(table: Any, path: Path) -> list[dict[str, Any]]:
    """Return the table's rows. A column with values that Python can't hold, e.g. dates after 9999, becomes null."""
    import pyarrow

    columns = {}
    for column in table.column_names:
        values = table.column(column)
        try:
            columns[column] = _python_values(values)
        except (ValueError, OverflowError, pyarrow.ArrowException):
            columns[column] = [None] * len(values)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _python_values(values: Any) -> list[Any]:
    """Return Python values. Arrow's maps, which Spark writes, become dictionaries if no key occurs twice."""
    try:
        return list(values.to_pylist(maps_as_pydicts="strict"))
    except KeyError:
        return list(values.to_pylist())
