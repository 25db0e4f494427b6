"""CSV and TSV files as rows, by Python's strict reader: no value is guessed, none is read as missing."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from qlora_exp.data.files import DataFile, RawRow, check_columns, text_of
from qlora_exp.data.row_problems import RowProblem
from qlora_exp.errors import DataError

_LONGEST_FIELD = 2**31 - 1  # Python's own limit, 128 KiB, is shorter than some documents
INDEX_COLUMN = "Unnamed: 0"
"""What pandas calls its own nameless index column when it reads it back."""


def read_csv(path: Path, name: str, content: bytes) -> DataFile:
    return _read(path, name, content, ",")


def read_tsv(path: Path, name: str, content: bytes) -> DataFile:
    return _read(path, name, content, "\t")


def _read(path: Path, name: str, content: bytes, mark: str) -> DataFile:
    text = text_of(path, content)
    if "\0" in text:
        raise DataError("the file holds NUL bytes, so it is not CSV", str(path), "save it as CSV (UTF-8)")
    spaced = _has_spaces_after_commas(text)
    records = _records(path, text, mark, spaced)
    first = next(records, None)
    if first is not None and first[1] == [f"sep={mark}".rstrip(mark), ""]:  # Excel's own first line
        first = next(records, None)
    if first is None:
        raise DataError("the file holds no header", str(path), "the first row names the columns")
    rows_read = list(records)
    header = _with_index(first[1], [fields for _, fields in rows_read])
    check_columns(header, path)
    _check_mark(header, path, mark)
    sizes = {len(fields) for _, fields in rows_read if fields}
    if len(sizes) == 1 and sizes != {len(header)}:
        what = f"the first row has {len(header)} fields, and all others have {sizes.pop()}"
        raise DataError(what, f"{path}, row 1", "the first row must name the columns, and nothing may stand above it")
    rows, problems = [], []
    for number, fields in rows_read:
        if not fields:
            continue
        problem = _problem(fields, header, first[1], mark)
        if problem is None:
            rows.append(RawRow(name, number, dict(zip(header, fields, strict=True))))
        else:
            problems.append(RowProblem(name, number, None, *problem))
    if not rows and not problems:
        raise DataError("the file holds a header and no row", str(path), "give at least one row below the header")
    return DataFile(name, tuple(rows), tuple(header), tuple(problems), _notes(name, rows))


def _problem(fields: list[str], header: list[str], written: list[str], mark: str) -> tuple[str, str, str] | None:
    """Reason, detail and hint of a row that can't be read."""
    if len(fields) != len(header):
        detail = f"{len(fields)} fields under {len(header)} columns"
        separated = 'a comma in quotes: "a, b"' if mark == "," else "a tab in quotes"
        return "wrong number of fields", detail, f"put fields that hold {separated}"
    if fields == written:
        return "repeated header", "the row names the columns again", "take it out: were files put together there?"
    if mark == "\t" and any("\t" in field for field in fields):
        detail = "quotes run over a tab: without a closing quote, rows would be read as one"
        return "a tab inside a field", detail, 'close the quotes, or write a quote at the beginning of a text as """'
    quoted = next((column for column, text in zip(header, fields, strict=True) if _QUOTED_LATE.fullmatch(text)), None)
    if quoted is not None:
        detail = f"column {quoted!r} holds a space, then quotes: they would be read as part of the text"
        return "quotes after a space", detail, 'write the quote directly after the comma: a,"b"'
    return None


_QUOTED_LATE = re.compile(r'[ \t]+".*"[ \t]*', re.DOTALL)


def _has_spaces_after_commas(text: str) -> bool:
    """Whether the file's style is ``prompt, completion``: then a quote may follow the space."""
    columns = text.split("\n", 1)[0].rstrip("\r").split(",")
    return len(columns) > 1 and all(re.match(r" +[^ ]", column) for column in columns[1:])


def _with_index(header: list[str], rows: list[list[str]]) -> list[str]:
    """The header with a name for pandas' index: a first column without a name that only holds whole numbers."""
    if len(header) > 1 and not header[0].strip() and all(row[0].isdecimal() for row in rows if row):
        return [INDEX_COLUMN, *header[1:]]
    return header


def _check_mark(header: list[str], path: Path, mark: str) -> None:
    if len(header) == 1 and any(other in header[0] for other in (";", "\t", "|", ",") if other != mark):
        raise DataError(
            f"there is one column, {header[0]!r}: the file seems to be separated by another mark than a "
            f"{'comma' if mark == ',' else 'tab'}",
            f"{path}, row 1",
            "save it with commas between the columns" + (" (or name it .tsv)" if "\t" in header[0] else ""),
        )


def _notes(name: str, rows: list[RawRow]) -> tuple[str, ...]:
    count = sum(any("\r\n" in text for text in row.values.values()) for row in rows)
    if not count:
        return ()
    return (f"{name}: {count} rows hold Windows line breaks (\\r\\n) inside a field; they are learned as they are",)


def _records(path: Path, text: str, mark: str, spaced: bool) -> Iterator[tuple[int, list[str]]]:
    """(line where the record begins, its fields); a quoted field may run over several lines."""
    csv.field_size_limit(_LONGEST_FIELD)
    stream = io.StringIO(text, newline="")
    reader = csv.reader(stream, strict=True, delimiter=mark, skipinitialspace=spaced and mark == ",")
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = 'close every quote; a quote inside a quoted field is written twice: ""'
            if '\\"' in text:
                hint += '; the file writes it \\" instead'
            raise DataError(f"the file is not CSV: {error}", f"{path}, row {number}", hint) from None
        yield number, fields
