"""JSONL, JSON, CSV, TSV, Parquet and Arrow files as rows that know their file and row number.

A problem of the whole file is raised at once. Problems of single rows are returned with the good rows.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qlora_exp.data.contents import (
    ARCHIVES,
    COMPRESSED,
    ENDINGS,
    OTHER_ENDINGS,
    DuplicateKey,
    decode_utf8,
    ending_of,
    parse_json,
    read_content,
)
from qlora_exp.data.items import SPLIT_NAMES, InvalidRow, RowProblem
from qlora_exp.errors import DataError, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class RawRow:
    """One row as it is in its file; ``number`` is 1-based, as an editor shows it. ``file`` is relative to the task's
    folder if it lies in a subfolder."""

    file: str
    number: int
    values: dict[str, Any]


@dataclass(frozen=True)
class DataFile:
    """A file's rows, its columns (of any row, in order of appearance) and the problems of rows that can't be read."""

    name: str
    rows: tuple[RawRow, ...]
    columns: tuple[str, ...]
    problems: tuple[RowProblem, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
    """Remarks on rows that are read as they are but may hold a mistake; ``validate`` shows them."""
    classes: tuple[str, ...] = field(default=())
    """The columns whose class numbers were replaced by class names."""
    mixed_classes: Mapping[str, str] = field(default_factory=dict)
    """By column, why its classes can't be used: one file of the task names them, another one doesn't."""


class Unlabelled(int):
    """-1 in a column of class labels: the row has no label. In another column, -1 is an ordinary number."""


def read_file(path: Path, name: str | None = None) -> DataFile:
    """Read one data file by its ending. ``name`` (default: the file's own name) becomes part of its rows' ids.

    Raises :class:`DataError` for a file that can't be read or holds no row.
    """
    ending, name = ending_of(path), name or path.name
    if ending not in ENDINGS:
        what = f"data files end in {', '.join(ENDINGS)}, this one in {ending or 'nothing'}"
        raise DataError(what, str(path), _ending_hint(path.suffix.lower()))
    if path.exists() and not path.is_file():
        raise DataError("this is not a regular file: reading it might never end", str(path), "save its rows in a file")
    file = _READERS[ending](path, name, read_content(path))
    if not file.rows and not file.problems:
        raise DataError("the file holds no row", str(path), "give a file with at least one row")
    return file


def _ending_hint(ending: str) -> str:
    if ending in ARCHIVES:
        return "unpack it first"
    if ending in COMPRESSED:
        return "add the ending of its content to the name, e.g. rows.jsonl.gz"
    if ending in (".xlsx", ".xls", ".ods"):
        return "save it as CSV with commas (UTF-8)"
    if ending in OTHER_ENDINGS:
        return f"name it {OTHER_ENDINGS[ending]}"
    return nearest(ending, ENDINGS)


def rows_and_problems(
    file: str, entries: Iterable[tuple[int, T]], read: Callable[[T], dict[str, Any]]
) -> tuple[tuple[RawRow, ...], tuple[RowProblem, ...]]:
    """Return the rows that ``read`` makes of the numbered entries, and the problems of the others.

    ``read`` raises :class:`InvalidRow` for an entry that can't be read.
    """
    rows, problems = [], []
    for number, entry in entries:
        try:
            rows.append(RawRow(file, number, read(entry)))
        except InvalidRow as error:
            problems.append(error.at(file, number))
    return tuple(rows), tuple(problems)


def _columns_of(rows: Iterable[RawRow]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(column for row in rows for column in row.values))


def _check_columns(columns: Sequence[str], path: Path) -> None:
    """Raise :class:`DataError` if a column has no name, or two have the same."""
    for column, count in Counter(columns).items():
        if count > 1:
            raise DataError(f"column {column!r} occurs twice", f"{path}, row 1", "rename one of the two")
    for number, column in enumerate(columns, start=1):
        if not column.strip():
            what = f"column number {number} has no name"
            raise DataError(what, f"{path}, row 1", "name every column in the first row")


def _read_jsonl(path: Path, name: str, content: bytes) -> DataFile:
    # Not str.splitlines: it also cuts at U+2028 and other characters that a JSON string may contain.
    text = decode_utf8(path, content)
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    entries = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    rows, problems = rows_and_problems(name, entries, _read_json_line)
    if problems:
        _check_layout(path, text)
    return DataFile(name, rows, _columns_of(rows), problems)


def _read_json_line(line: str) -> dict[str, Any]:
    hint = 'write one JSON object per line, e.g. {"prompt": "…", "completion": "…"}'
    try:
        value = parse_json(line)
    except DuplicateKey as duplicate:
        raise InvalidRow("duplicate key", str(duplicate), "keep one of the two") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and line.rstrip().endswith("},"):
            hint = "take the comma off the end of each line"
        raise InvalidRow("invalid JSON", f"{error.msg} at character {error.pos + 1}", hint) from None
    except RecursionError:
        raise InvalidRow("invalid JSON", "nested too deeply", hint) from None
    except ValueError as error:  # a number with more than 4300 digits
        raise InvalidRow("invalid JSON", str(error), hint) from None
    return _json_object(value, hint)


def _json_object(value: object, hint: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRow("not a JSON object", f"found {_json_type(value)}", hint)
    return value


def _check_layout(path: Path, text: str) -> None:
    """Raise :class:`DataError` if the rows aren't one per line: a JSON array, or objects that span several lines."""
    try:
        is_array = isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        is_array = False
    if is_array:
        raise DataError("the file is one JSON array, not a JSON object per line", str(path), "name it .json")
    begin, decoder = text.lstrip(), json.JSONDecoder()
    try:
        first, end = decoder.raw_decode(begin)
    except (ValueError, RecursionError):
        return
    if isinstance(first, dict) and "\n" in begin[:end]:
        script = (
            "import json,sys; s=sys.stdin.read(); d=json.JSONDecoder(); i=0\n"
            "while s[i:].strip(): i=len(s)-len(s[i:].lstrip()); v,i=d.raw_decode(s,i); print(json.dumps(v))"
        )
        hint = f"python -c {shlex.quote(script)} < {shlex.quote(path.name)} > NEW.jsonl"
        raise DataError("the objects run over several lines; one JSON object per line is read", str(path), hint)


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _read_json(path: Path, name: str, content: bytes) -> DataFile:
    text = decode_utf8(path, content)
    try:
        value = parse_json(text)
    except DuplicateKey as duplicate:
        raise DataError(f"duplicate key: {duplicate}", str(path), "keep one of the two") from None
    except (ValueError, RecursionError) as error:
        line = f", row {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        hint = "name it .jsonl if it holds one object per line" if "Extra data" in str(error) else "mend the JSON there"
        raise DataError(f"the file is not JSON: {error}", f"{path}{line}", hint) from None
    if isinstance(value, dict) and (key := _rows_key(value)) is not None:
        value = value[key]
    if not isinstance(value, list):
        hint = _list_hint(path, value) if isinstance(value, dict) else "write [{…}, {…}]"
        raise DataError(f"the file holds {_json_type(value)}, not a list of objects", str(path), hint)
    return _rows_of_list(value, name)


def _rows_of_list(value: Sequence[Any], name: str) -> DataFile:
    rows, problems = rows_and_problems(
        name, enumerate(value, start=1), lambda entry: _json_object(entry, "write [{…}, {…}]")
    )
    return DataFile(name, rows, _columns_of(rows), problems)


def _rows_key(value: Mapping[str, Any]) -> str | None:
    """Return the only key that holds a list of objects, e.g. ``data`` of ``{"version": 1, "data": [{…}, …]}``."""
    keys = [key for key, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    return keys[0] if len(keys) == 1 else None


def read_splits(path: Path) -> dict[str, DataFile]:
    """Return the splits of one file: ``train`` alone, or those of a JSON object ``{"train": [{…}, …], "test": […]}``.

    Raises :class:`DataError` as :func:`read_file` does.
    """
    if ending_of(path) == ".json" and path.is_file():
        content = read_content(path)
        try:
            value = parse_json(decode_utf8(path, content))
        except (DuplicateKey, ValueError, RecursionError):
            value = None  # read_file says why
        lists = [split for split in SPLIT_NAMES if isinstance(value, dict) and isinstance(value.get(split), list)]
        if "train" in lists and len(lists) > 1:
            return {split: _rows_of_list(value[split], f"{path.name}[{split}]") for split in lists if value[split]}
    return {"train": read_file(path)}


def _list_hint(path: Path, value: dict[str, Any]) -> str:
    """Return how to turn one object into a list of objects: choose a list inside it, or write pandas' rows."""
    lists = [key for key, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    if any(split in lists for split in SPLIT_NAMES):
        return f"name the splits train, validation and test; or write each of {', '.join(lists)} to a file"
    if lists:
        script = f"import json,sys; json.dump(json.load(sys.stdin)[{lists[0]!r}], sys.stdout)"
        rows = f"its rows may be under {' or '.join(map(repr, lists))}"
        return f"{rows}: python -c {shlex.quote(script)} < {path.name} > NEW.json"
    if value and all(isinstance(entry, dict) for entry in value.values()):
        return f"written by pandas? df.to_json({path.name!r}, orient='records')"
    return "write [{…}, {…}]"


_MAX_FIELD_CHARACTERS = 2**31 - 1  # Python's own limit, 128 KiB, is shorter than some documents
INDEX_COLUMN = "Unnamed: 0"
"""The name that pandas gives its own nameless index column when it reads it back."""
IGNORED_COLUMNS = frozenset((INDEX_COLUMN, "__index_level_0__"))
"""pandas' index, as CSV and Parquet files hold it: never a text of the task."""
_SPACE_BEFORE_QUOTES = re.compile(r'[ \t]+".*"[ \t]*', re.DOTALL)


def _read_csv(path: Path, name: str, content: bytes, delimiter: str = ",") -> DataFile:
    """Read by Python's strict reader. Every value is text: no type is guessed, none is missing."""
    text = decode_utf8(path, content)
    if "\0" in text:
        raise DataError("the file holds NUL bytes, so it is not CSV", str(path), "save it as CSV (UTF-8)")
    records = list(_csv_records(path, text, delimiter))
    if records and records[0][1] == [f"sep={delimiter}".rstrip(delimiter), ""]:
        del records[0]  # Excel may write a line "sep=," above the header
    if not records:
        raise DataError("the file holds no header", str(path), "the first row names the columns")
    (_, header_row), *entries = records
    header = header_row
    if len(header) > 1 and not header[0].strip() and all(row[0].isdecimal() for _, row in entries if row):
        header = [INDEX_COLUMN, *header[1:]]  # pandas' index: nameless, and only whole numbers
    _check_columns(header, path)
    if len(header) == 1 and any(mark in header[0] for mark in (";", "\t", "|", ",") if mark != delimiter):
        raise DataError(
            f"there is one column, {header[0]!r}: the columns seem to be separated by something other than a "
            f"{'comma' if delimiter == ',' else 'tab'}",
            f"{path}, row 1",
            "save it with commas between the columns" + (" (or name it .tsv)" if "\t" in header[0] else ""),
        )
    field_counts = {len(fields) for _, fields in entries if fields}
    if len(field_counts) == 1 and field_counts != {len(header)}:
        what = f"the first row has {len(header)} fields, and all others have {field_counts.pop()}"
        raise DataError(what, f"{path}, row 1", "the first row must name the columns: remove what is above it")

    def read(fields: list[str]) -> dict[str, Any]:
        _check_fields(fields, header, header_row, delimiter)
        return dict(zip(header, fields, strict=True))

    rows, problems = rows_and_problems(name, ((number, fields) for number, fields in entries if fields), read)
    if not rows and not problems:
        raise DataError("the file holds a header and no row", str(path), "give at least one row below the header")
    notes: tuple[str, ...] = ()
    if count := sum(any("\r\n" in text for text in row.values.values()) for row in rows):
        what = "rows hold Windows line breaks (\\r\\n) inside a field; they are learned as they are"
        notes = (f"{name}: {count} {what}",)
    return DataFile(name, rows, tuple(header), problems, notes)


def _csv_records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line where the record begins, its fields). A quoted field may span several lines."""
    # With a header like ``prompt, completion``, a quote may follow the space.
    columns = text.split("\n", 1)[0].rstrip("\r").split(",")
    spaces = delimiter == "," and len(columns) > 1 and all(re.match(r" +[^ ]", column) for column in columns[1:])
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    stream = io.StringIO(text, newline="")
    reader = csv.reader(stream, strict=True, delimiter=delimiter, skipinitialspace=spaces)
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


def _check_fields(fields: list[str], header: list[str], header_row: list[str], delimiter: str) -> None:
    """Raise :class:`InvalidRow` if the row can't be read. ``header_row``: the header as written."""
    if len(fields) != len(header):
        detail = f"{len(fields)} fields under {len(header)} columns"
        delimiter_in_quotes = 'a comma in quotes: "a, b"' if delimiter == "," else "a tab in quotes"
        raise InvalidRow("wrong number of fields", detail, f"put fields that hold {delimiter_in_quotes}")
    if fields == header_row:
        detail = "the row names the columns again"
        raise InvalidRow("repeated header", detail, "take it out: were files joined there?")
    if delimiter == "\t" and any("\t" in field for field in fields):
        detail = "quotes run over a tab: without a closing quote, rows would be read as one"
        hint = 'close the quotes, or write a quote at the beginning of a text as """'
        raise InvalidRow("a tab inside a field", detail, hint)
    for column, text in zip(header, fields, strict=True):
        if _SPACE_BEFORE_QUOTES.fullmatch(text):
            detail = f"column {column!r} holds a space, then quotes: they would be read as part of the text"
            raise InvalidRow("quotes after a space", detail, 'write the quote directly after the comma: a,"b"')


def _read_parquet(path: Path, name: str, content: bytes) -> DataFile:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"the file is not Parquet: {reason}", str(path), "write it again") from None
    return _rows_of_table(table, path, name)


def _read_arrow(path: Path, name: str, content: bytes) -> DataFile:
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
    return _rows_of_table(table, path, name)


def _rows_of_table(table: Any, path: Path, name: str) -> DataFile:
    _check_columns(table.column_names, path)
    names = _class_names(table.schema.metadata)
    columns = [_python_values(table.column(column)) for column in table.column_names]
    entries = (dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True))
    rows, problems = rows_and_problems(name, enumerate(entries, start=1), lambda row: with_class_names(row, names))
    classes = tuple(column for column in table.column_names if column in names)
    return DataFile(name, rows, tuple(table.column_names), problems, classes=classes)


def _python_values(column: Any) -> list[Any]:
    """Return the column's values. If Python can't hold one, e.g. a date after 9999, all of the column are null."""
    import pyarrow

    try:
        try:
            return list(column.to_pylist(maps_as_pydicts="strict"))  # Spark writes maps
        except KeyError:  # a key occurs twice in a map
            return list(column.to_pylist())
    except (ValueError, OverflowError, pyarrow.ArrowException):
        return [None] * len(column)


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return the class names by column, as ``datasets`` stores them in a schema's metadata."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"].items()
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    return {
        str(column): [str(name) for name in feature["names"]]
        for column, feature in features
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
    }


def with_class_names(row: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the row with class names for class numbers. -1, the Hub's mark of a row without a label, gets no name."""
    named = dict(row)
    for column, classes in names.items():
        value = row.get(column)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if value >= len(classes):
            detail = f"class {value}, but the file names only {len(classes)} classes"
            raise InvalidRow("unknown class", detail, column=column)
        named[column] = classes[value] if value >= 0 else Unlabelled(value)
    return named


_READERS: dict[str, Callable[[Path, str, bytes], DataFile]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": functools.partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
}
"""Each of ``ENDINGS``, with its reader."""
