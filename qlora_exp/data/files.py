"""JSONL, JSON, CSV and Parquet files as rows that know their file and row number.

What makes a whole file unusable is raised at once; what makes one row unusable is returned beside the good rows.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_exp.data.problems import RowProblem
from qlora_exp.errors import DataError, nearest

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
_LONGEST_FIELD = 2**31 - 1  # Python's own limit, 128 KiB, is shorter than some documents
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class RawRow:
    """One row as it stands in its file; ``number`` is 1-based, as an editor shows it."""

    file: str
    number: int
    values: dict[str, Any]


@dataclass(frozen=True)
class RawFile:
    """A file's rows, its columns (of any row, in order of appearance) and the rows that can't even be read."""

    name: str
    rows: tuple[RawRow, ...]
    columns: tuple[str, ...]
    problems: tuple[RowProblem, ...] = field(default=())


class _InvalidRow(Exception):
    """A row that can't be read: the reason (as counted), the detail and what to do."""

    def __init__(self, reason: str, detail: str, hint: str) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.hint = reason, detail, hint


def read_file(path: Path) -> RawFile:
    """Read one data file by its ending. Raises :class:`DataError` for a file that can't be read or holds no row."""
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"data files end in {', '.join(ENDINGS)}, this one in {path.suffix or 'nothing'}",
            str(path),
            _ending_hint(path.suffix.lower()),
        )
    if path.exists() and not path.is_file():
        raise DataError("this is no file: it could be read without an end", str(path), "save its rows in a file")
    content = _bytes_of(path)
    if not content.strip():
        raise DataError("the file is empty", str(path), "give a file with at least one row")
    read = reader(path, content)
    if not read.rows and not read.problems:
        raise DataError("the file holds no row", str(path), "give a file with at least one row")
    return read


def _ending_hint(ending: str) -> str:
    if ending in (".gz", ".zip", ".bz2", ".xz", ".zst"):
        return "unpack it first"
    if ending in (".xlsx", ".xls", ".ods", ".tsv"):
        return "save it as CSV with commas (UTF-8)"
    return nearest(ending, ENDINGS)


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"the file can't be read: {error.strerror}", str(path), "check its name and rights") from None


def _text_of(path: Path, content: bytes) -> str:
    """UTF-8 text; the byte order mark that spreadsheets write is taken off."""
    if content.startswith(_UTF16):
        raise DataError("the file is UTF-16, not UTF-8", str(path), f"iconv -f UTF-16 -t UTF-8 '{path.name}' > NEW")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"row {row} is not UTF-8: byte 0x{content[error.start]:02x}",
            f"{path}, row {row}",
            f"save the file as UTF-8, e.g. iconv -f WINDOWS-1252 -t UTF-8 '{path.name}' > NEW",
        ) from None


def _read_jsonl(path: Path, content: bytes) -> RawFile:
    # Not str.splitlines: it also cuts at U+2028 and other characters that may stand inside a JSON string.
    lines = _text_of(path, content).split("\n")
    rows, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(RawRow(path.name, number, _json_object(line)))
        except _InvalidRow as bad:
            problems.append(RowProblem(path.name, number, None, bad.reason, bad.detail, bad.hint))
    if not rows and problems and _is_json_array(_text_of(path, content)):
        raise DataError("the file is one JSON array, not a JSON object per line", str(path), "name it .json")
    return RawFile(path.name, tuple(rows), _columns(rows), tuple(problems))


def _is_json_array(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        return False


def _json_object(text: str) -> dict[str, Any]:
    one_a_line = 'write one JSON object per line, e.g. {"prompt": "…", "completion": "…"}'
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        detail = f"{error.msg} at character {error.pos + 1}"
        raise _InvalidRow("invalid JSON", detail, one_a_line) from None
    except (RecursionError, ValueError) as error:  # ValueError: a number of more than 4300 digits
        detail = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise _InvalidRow("invalid JSON", detail, one_a_line) from None
    if not isinstance(value, dict):
        raise _InvalidRow("not a JSON object", f"found {_kind(value)}", one_a_line)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if repeated:
        raise _InvalidRow("duplicate key", f"{repeated[0]!r} stands twice in the object", "keep one of the two")
    return dict(pairs)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _read_json(path: Path, content: bytes) -> RawFile:
    text = _text_of(path, content)
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except _InvalidRow as bad:
        raise DataError(f"{bad.reason}: {bad.detail}", str(path), bad.hint) from None
    except (ValueError, RecursionError) as error:
        line = f", row {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        hint = "name it .jsonl if it holds one object per line" if "Extra data" in str(error) else "mend the JSON there"
        raise DataError(f"the file is not JSON: {error}", f"{path}{line}", hint) from None
    if not isinstance(value, list):
        raise DataError(f"the file holds {_kind(value)}, not a list of objects", str(path), "write [{…}, {…}]")
    rows, problems = [], []
    for number, entry in enumerate(value, start=1):
        if isinstance(entry, dict):
            rows.append(RawRow(path.name, number, entry))
        else:
            detail = f"found {_kind(entry)}"
            problems.append(RowProblem(path.name, number, None, "not a JSON object", detail, "write [{…}, {…}]"))
    return RawFile(path.name, tuple(rows), _columns(rows), tuple(problems))


def _read_csv(path: Path, content: bytes) -> RawFile:
    text = _text_of(path, content)
    if "\0" in text:
        raise DataError("the file holds NUL bytes: it is no CSV text", str(path), "save it as CSV (UTF-8)")
    records = _csv_records(path, text)
    first = next(records, None)
    if first is None:
        raise DataError("the file holds no header", str(path), "the first row names the columns")
    header = first[1]
    _check_columns(header, path)
    if len(header) == 1 and any(mark in header[0] for mark in (";", "\t", "|")):
        raise DataError(
            f"there is one column, {header[0]!r}: the file seems to be separated by another mark than a comma",
            f"{path}, row 1",
            "save it with commas between the columns",
        )
    rows, problems = [], []
    for number, fields in records:
        if not fields:
            continue
        if len(fields) == len(header):
            rows.append(RawRow(path.name, number, dict(zip(header, fields, strict=True))))
            continue
        detail = f"{len(fields)} fields under {len(header)} columns"
        hint = 'put fields that hold a comma in quotes: "a, b"'
        problems.append(RowProblem(path.name, number, None, "wrong number of fields", detail, hint))
    if not rows and not problems:
        raise DataError("the file holds a header and no row", str(path), "give at least one row below the header")
    return RawFile(path.name, tuple(rows), tuple(header), tuple(problems))


def _csv_records(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """(line where the record begins, its fields); a quoted field may run over several lines."""
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = 'close every quote; a quote inside a quoted field is written twice: ""'
            raise DataError(f"the file is not CSV: {error}", f"{path}, row {number}", hint) from None
        yield number, fields


def _check_columns(columns: Sequence[str], path: Path) -> None:
    twice = [column for column, count in Counter(columns).items() if count > 1]
    if twice:
        raise DataError(f"column {twice[0]!r} stands twice", f"{path}, row 1", "rename one of the two")
    if any(not column.strip() for column in columns):
        at = [bool(column.strip()) for column in columns].index(False) + 1
        raise DataError(f"column number {at} has no name", f"{path}, row 1", "name every column in the first row")


def _read_parquet(path: Path, content: bytes) -> RawFile:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"the file is not Parquet: {reason}", str(path), "write it again") from None
    _check_columns(table.column_names, path)
    rows = [RawRow(path.name, number, values) for number, values in enumerate(table.to_pylist(), start=1)]
    return RawFile(path.name, tuple(rows), tuple(table.column_names))


def _columns(rows: Sequence[RawRow]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(column for row in rows for column in row.values))
