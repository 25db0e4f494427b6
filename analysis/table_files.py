"""Read the rows of a table file (CSV, TSV, JSON, JSON lines, Parquet), each with its position for messages."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_exp.errors import AnalysisError

TableRow = tuple[str, dict[str, Any]]
"""Position (``line 3``), and column → value."""


def read_table_rows(file: Path) -> list[TableRow]:
    """Return (position, column → value) of every row; nested JSON becomes dotted names.

    Raises:
        AnalysisError: no such file, an unknown kind of file, one that isn't what its name says, or no row.
    """
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".json": _json_rows, ".jsonl": _jsonl_rows}
    readers[".parquet"] = _parquet_rows
    suffix = file.suffix.lower()
    if suffix not in readers:
        raise AnalysisError(
            f"{suffix or 'no suffix'!r} is not a table format", str(file), f"valid: {', '.join(readers)}"
        )
    try:
        rows = list(readers[suffix](file))
    except FileNotFoundError:
        raise AnalysisError("there is no such file", str(file), "give the path of a table") from None
    except UnicodeDecodeError as error:
        raise AnalysisError(f"not valid UTF-8: {error.reason}", str(file), "export the table as UTF-8") from None
    except (OSError, ValueError, csv.Error) as error:
        text = str(error).splitlines()[0]
        raise AnalysisError(f"not readable as {suffix}: {text}", str(file), "export the table again") from None
    if not rows:
        raise AnalysisError("the table has no rows", str(file), "columns rank and score, and a row for each result")
    return rows


def _csv_rows(file: Path) -> Iterator[TableRow]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        head = stream.readline()
        stream.seek(0)
        delimiter = max("\t;,", key=head.count)
        reader = csv.DictReader(stream, delimiter=delimiter, skipinitialspace=True)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} doesn't have the {len(reader.fieldnames or ())} columns")
            yield f"line {reader.line_num}", {str(name).strip(): value for name, value in row.items()}


def _json_rows(file: Path) -> Iterator[TableRow]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list) and value]
        rows = [value for value in lists if all(isinstance(entry, dict) for entry in value)]
        if len(lists) == len(content) and not rows and len({len(value) for value in lists}) == 1:
            rows = [[dict(zip(content, values, strict=True)) for values in zip(*lists, strict=True)]]
        content = rows[0] if rows else None
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError("expected a list of objects, or an object of lists of equal length")
    yield from ((f"row {number}", dict(_flat(row))) for number, row in enumerate(content, start=1))


def _jsonl_rows(file: Path) -> Iterator[TableRow]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not an object")
            yield f"line {number}", dict(_flat(row))


def _parquet_rows(file: Path) -> Iterator[TableRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(file).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(str(error)) from None
    yield from ((f"row {number}", dict(_flat(row))) for number, row in enumerate(rows, start=1))


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
