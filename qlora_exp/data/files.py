"""JSONL, JSON, CSV, TSV, Parquet and Arrow files as rows that know their file and row number.

A problem of the whole file is raised at once. Problems of single rows are returned with the good rows.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_exp.data.compression import (
    ARCHIVES,
    COMPRESSED,
    ENDINGS,
    OTHER_ENDINGS,
    check_content,
    decompress,
    ending_of,
)
from qlora_exp.data.json_text import DuplicateKey, unique_keys
from qlora_exp.data.row_problems import RowProblem
from qlora_exp.data.split_names import SPLIT_NAMES
from qlora_exp.errors import DataError, nearest

_UTF32 = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BYTE_ORDER_MARKS = re.compile("(?:^|(?<=[\n\r]))\ufeff+")


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


class _InvalidRow(Exception):
    """A row that can't be read: the reason (rows are counted by it), the detail and what to do."""

    def __init__(self, reason: str, detail: str, hint: str) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.hint = reason, detail, hint


def read_file(path: Path, name: str | None = None) -> DataFile:
    """Read one data file by its ending. ``name`` (default: the file's own name) becomes part of its rows' ids.

    Raises :class:`DataError` for a file that can't be read or holds no row.
    """
    ending, name = ending_of(path), name or path.name
    if ending not in ENDINGS:
        raise DataError(
            f"data files end in {', '.join(ENDINGS)}, this one in {ending or 'nothing'}",
            str(path),
            _ending_hint(path.suffix.lower()),
        )
    if path.exists() and not path.is_file():
        raise DataError("this is not a regular file: reading it might never end", str(path), "save its rows in a file")
    content = decompress(path, _read_bytes(path))
    if not content.strip():
        raise DataError("the file is empty", str(path), "give a file with at least one row")
    check_content(path, content)
    file = _reader(ending)(path, name, content)
    if not file.rows and not file.problems:
        raise DataError("the file holds no row", str(path), "give a file with at least one row")
    return file


def _reader(ending: str) -> Callable[[Path, str, bytes], DataFile]:
    from qlora_exp.data import (
        arrow_files,  # here because they import this module
        csv_files,
    )

    readers = {
        ".json": _read_json,
        ".csv": csv_files.read_csv,
        ".tsv": csv_files.read_tsv,
        ".parquet": arrow_files.read_parquet,
    }
    if ending in (".arrow", ".feather"):
        return arrow_files.read_arrow
    return readers.get(ending, _read_jsonl)


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


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the file can't be read: {error.strerror}", str(path), "check its name and permissions"
        ) from None


def decode_utf8(path: Path, content: bytes) -> str:
    """Return the UTF-8 text without byte order marks. Spreadsheets write one; concatenated files have several."""
    for marks, encoding in ((_UTF32, "UTF-32"), (_UTF16, "UTF-16")):
        if content.startswith(marks):
            hint = f"iconv -f {encoding} -t UTF-8 '{path.name}' > NEW"
            raise DataError(f"the file is {encoding}, not UTF-8", str(path), hint)
    if wide := _guess_utf16(content[:1000]):
        hint = f"iconv -f {wide} -t UTF-8 '{path.name}' > NEW"
        raise DataError("the file holds NUL bytes: it seems to be UTF-16, not UTF-8", str(path), hint)
    try:
        text = content.decode("utf-8")
        return _BYTE_ORDER_MARKS.sub("", text) if "\ufeff" in text else text
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"row {row} is not UTF-8: byte 0x{content[error.start]:02x}",
            f"{path}, row {row}",
            f"save the file as UTF-8: iconv -f ENCODING -t UTF-8 '{path.name}' > NEW, where ENCODING is its "
            "present one: WINDOWS-1252 in western Europe, SHIFT_JIS in Japan, GB18030 in China; "
            "then look at a few rows",
        ) from None


def _guess_utf16(start: bytes) -> str | None:
    """Return the kind of UTF-16 that the text seems to be, if any: each ASCII character has a NUL byte on one side."""
    even_nuls, odd_nuls = start[::2].count(0), start[1::2].count(0)
    few_nuls = even_nuls + odd_nuls <= len(start) // 4
    if few_nuls and (max(even_nuls, odd_nuls) < 8 or min(even_nuls, odd_nuls) > max(even_nuls, odd_nuls) // 4):
        return None
    return "UTF-16BE" if even_nuls > odd_nuls else "UTF-16LE"


def _read_jsonl(path: Path, name: str, content: bytes) -> DataFile:
    # Not str.splitlines: it also cuts at U+2028 and other characters that a JSON string may contain.
    text = decode_utf8(path, content)
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    rows, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(RawRow(name, number, _json_object(line)))
        except _InvalidRow as error:
            problems.append(RowProblem(name, number, None, error.reason, error.detail, error.hint))
    if problems:
        _check_layout(path, text)
    return DataFile(name, tuple(rows), columns_of(rows), tuple(problems))


def _check_layout(path: Path, text: str) -> None:
    """Raise :class:`DataError` if the rows aren't one per line: a JSON array, or objects that span several lines."""
    if _is_json_array(text):
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


def _is_json_array(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        return False


def _json_object(text: str) -> dict[str, Any]:
    hint = 'write one JSON object per line, e.g. {"prompt": "…", "completion": "…"}'
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except DuplicateKey as duplicate:
        raise _InvalidRow("duplicate key", str(duplicate), "keep one of the two") from None
    except json.JSONDecodeError as error:
        detail = f"{error.msg} at character {error.pos + 1}"
        if error.msg == "Extra data" and text.rstrip().endswith("},"):
            hint = "take the comma off the end of each line"
        raise _InvalidRow("invalid JSON", detail, hint) from None
    except (RecursionError, ValueError) as error:  # ValueError: a number with more than 4300 digits
        detail = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise _InvalidRow("invalid JSON", detail, hint) from None
    if not isinstance(value, dict):
        raise _InvalidRow("not a JSON object", f"found {_json_type(value)}", hint)
    return value


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _read_json(path: Path, name: str, content: bytes) -> DataFile:
    text = decode_utf8(path, content)
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except DuplicateKey as duplicate:
        raise DataError(f"duplicate key: {duplicate}", str(path), "keep one of the two") from None
    except (ValueError, RecursionError) as error:
        line = f", row {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        hint = "name it .jsonl if it holds one object per line" if "Extra data" in str(error) else "mend the JSON there"
        raise DataError(f"the file is not JSON: {error}", f"{path}{line}", hint) from None
    if not isinstance(value, list):
        hint = _list_hint(path, value) if isinstance(value, dict) else "write [{…}, {…}]"
        raise DataError(f"the file holds {_json_type(value)}, not a list of objects", str(path), hint)
    rows, problems = [], []
    for number, entry in enumerate(value, start=1):
        if isinstance(entry, dict):
            rows.append(RawRow(name, number, entry))
        else:
            detail = f"found {_json_type(entry)}"
            problems.append(RowProblem(name, number, None, "not a JSON object", detail, "write [{…}, {…}]"))
    return DataFile(name, tuple(rows), columns_of(rows), tuple(problems))


def _list_hint(path: Path, value: dict[str, Any]) -> str:
    """Return how to turn one object into a list of objects: take the list inside it, or write pandas' rows."""
    if any(isinstance(value.get(split), list) for split in SPLIT_NAMES):
        return f"write each of {', '.join(value)} to a separate file in one folder, and give the folder"
    inner = next((k for k, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict)), None)
    if inner is not None:
        script = f"import json,sys; json.dump(json.load(sys.stdin)[{inner!r}], sys.stdout)"
        return f"its rows seem to be under {inner!r}: python -c {shlex.quote(script)} < {path.name} > NEW.json"
    if value and all(isinstance(entry, dict) for entry in value.values()):
        return f"written by pandas? df.to_json({path.name!r}, orient='records')"
    return "write [{…}, {…}]"


def check_columns(columns: Sequence[str], path: Path) -> None:
    """Raise :class:`DataError` if a column has no name, or two have the same."""
    repeated = [column for column, count in Counter(columns).items() if count > 1]
    if repeated:
        raise DataError(f"column {repeated[0]!r} occurs twice", f"{path}, row 1", "rename one of the two")
    if any(not column.strip() for column in columns):
        number = [bool(column.strip()) for column in columns].index(False) + 1
        raise DataError(f"column number {number} has no name", f"{path}, row 1", "name every column in the first row")


def columns_of(rows: Sequence[RawRow]) -> tuple[str, ...]:
    """Return the columns of all rows, in order of appearance."""
    return tuple(dict.fromkeys(column for row in rows for column in row.values))
