"""CSV and TSV files as rows, by Python's strict reader. Every value is text: no type is guessed, none is missing."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from qlora_exp.data.files import DataFile, RawRow, check_columns, decode_utf8
from qlora_exp.data.row_problems import RowProblem
from qlora_exp.errors import DataError

_MAX_FIELD_SIZE = 2**31 - 1  # Python's own limit, 128 KiB, is shorter than some documents
INDEX_COLUMN = "Unnamed: 0"
"""The name that pandas gives its own nameless index column when it reads it back."""


def read_csv(path: Path, name: str, content: bytes) -> DataFile:
    return _read(path, name, content, ",")


def read_tsv(path: Path, name: str, content: bytes) -> DataFile:
    return _read(path, name, content, "\t")


def _read(path: Path, name: str, content: bytes, delimiter: str) -> DataFile:
    text = decode_utf8(path, content)
    if "\0" in text:
        raise DataError("the file holds NUL bytes, so it is not CSV", str(path), "save it as CSV (UTF-8)")
    space_after_comma = _has_spaces_after_commas(text)
    records = _records(path, text, delimiter, space_after_comma)
    header_record = next(records, None)
    # Excel may write a line "sep=," above the header.
    if header_record is not None and header_record[1] == [f"sep={delimiter}".rstrip(delimiter), ""]:
        header_record = next(records, None)
    if header_record is None:
        raise DataError("the file holds no header", str(path), "the first row names the columns")
    rows_read = list(records)
    header = _name_index_column(header_record[1], [fields for _, fields in rows_read])
    check_columns(header, path)
    _check_delimiter(header, path, delimiter)
    field_counts = {len(fields) for _, fields in rows_read if fields}
    if len(field_counts) == 1 and field_counts != {len(header)}:
        what = f"the first row has {len(header)} fields, and all others have {field_counts.pop()}"
        raise DataError(what, f"{path}, row 1", "the first row must name the columns: remove what is above it")
    rows, problems = [], []
    for number, fields in rows_read:
        if not fields:
            continue
        problem = _problem(fields, header, header_record[1], delimiter)
        if problem is None:
            rows.append(RawRow(name, number, dict(zip(header, fields, strict=True))))
        else:
            problems.append(RowProblem(name, number, None, *problem))
    if not rows and not problems:
        raise DataError("the file holds a header and no row", str(path), "give at least one row below the header")
    return DataFile(name, tuple(rows), tuple(header), tuple(problems), _notes(name, rows))


def _problem(
    fields: list[str], header: list[str], header_row: list[str], delimiter: str
) -> tuple[str, str, str] | None:
    """Return reason, detail and hint if the row can't be read, else ``None``. ``header_row``: the header as written."""
    if len(fields) != len(header):
        detail = f"{len(fields)} fields under {len(header)} columns"
        delimiter_in_quotes = 'a comma in quotes: "a, b"' if delimiter == "," else "a tab in quotes"
        return "wrong number of fields", detail, f"put fields that hold {delimiter_in_quotes}"
    if fields == header_row:
        return "repeated header", "the row names the columns again", "take it out: were files joined there?"
    if delimiter == "\t" and any("\t" in field for field in fields):
        detail = "quotes run over a tab: without a closing quote, rows would be read as one"
        return "a tab inside a field", detail, 'close the quotes, or write a quote at the beginning of a text as """'
    quoted_column = next(
        (column for column, text in zip(header, fields, strict=True) if _SPACE_BEFORE_QUOTES.fullmatch(text)), None
    )
    if quoted_column is not None:
        detail = f"column {quoted_column!r} holds a space, then quotes: they would be read as part of the text"
        return "quotes after a space", detail, 'write the quote directly after the comma: a,"b"'
    return None


_SPACE_BEFORE_QUOTES = re.compile(r'[ \t]+".*"[ \t]*', re.DOTALL)


def _has_spaces_after_commas(text: str) -> bool:
    """Return whether the header is written like ``prompt, completion``. Then a quote may follow the space."""
    columns = text.split("\n", 1)[0].rstrip("\r").split(",")
    return len(columns) > 1 and all(re.match(r" +[^ ]", column) for column in columns[1:])


def _name_index_column(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return the header with a name for pandas' index: a nameless first column that holds only whole numbers."""
    if len(header) > 1 and not header[0].strip() and all(row[0].isdecimal() for row in rows if row):
        return [INDEX_COLUMN, *header[1:]]
    return header


def _check_delimiter(header: list[str], path: Path, delimiter: str) -> None:
    if len(header) == 1 and any(
        character in header[0] for character in (";", "\t", "|", ",") if character != delimiter
    ):
        raise DataError(
            f"there is one column, {header[0]!r}: the columns seem to be separated by something other than a "
            f"{'comma' if delimiter == ',' else 'tab'}",
            f"{path}, row 1",
            "save it with commas between the columns" + (" (or name it .tsv)" if "\t" in header[0] else ""),
        )


def _notes(name: str, rows: list[RawRow]) -> tuple[str, ...]:
    count = sum(any("\r\n" in text for text in row.values.values()) for row in rows)
    if not count:
        return ()
    return (f"{name}: {count} rows hold Windows line breaks (\\r\\n) inside a field; they are learned as they are",)


def _records(path: Path, text: str, delimiter: str, space_after_comma: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield (line where the record begins, its fields). A quoted field may span several lines."""
    csv.field_size_limit(_MAX_FIELD_SIZE)
    stream = io.StringIO(text, newline="")
    reader = csv.reader(
        stream, strict=True, delimiter=delimiter, skipinitialspace=space_after_comma and delimiter == ","
    )
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = 'close every quote; a quote inside a quoted field is written twice: ""'
            if '\\"' in text:
                hint += '; the file writes it \\" instead'
            raise DataError(f"the file is not CSV: {error}", f"{path}, row {line}", hint) from None
        yield line, fields
