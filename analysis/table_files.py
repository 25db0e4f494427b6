"""Rows of the table files that people have: CSV, TSV, JSON, JSON lines, Parquet, Markdown; several files are one table.

pandas isn't used: it guesses types, and an error could no longer name the line.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_exp.analysis.table_values import RANK_IN_PATH, SEED_IN_PATH, numbers_in_paths
from qlora_exp.errors import AnalysisError

FILE_COLUMN = "file"
"""With several files: which one a row comes from."""
RANK_FROM_PATH, SEED_FROM_PATH = "rank in the path", "seed in the path"
"""Columns of what a path names. They are used if no file has a column for it."""
SAMPLE_FIELDS = frozenset(("doc", "arguments", "resps", "filtered_resps", "target", "doc_hash", "prompt_hash"))
"""What lm-eval logs of a sample next to its scores."""
MAX_CELL_CHARACTERS = 100_000
"""A longer cell is not parsed as an object."""

Cells = Mapping[str, Any]


@dataclass(frozen=True)
class TableRow:
    """One row; ``cells`` has column → text, empty if there is no value."""

    file: Path
    position: str
    """Where the row is in its file, e.g. ``line 3``."""
    cells: dict[str, str]
    decimal_comma: bool = False
    """In this file a comma can't separate columns, so it is a decimal mark."""

    @property
    def where(self) -> str:
        return f"{self.file}, {self.position}"


def read_table_rows(files: Sequence[Path]) -> list[TableRow]:
    """Return every row of the files; nested objects become dotted names.

    Raises:
        AnalysisError: no such file, an unknown kind of file, one that isn't what its name says, or no row.
    """
    rows = [row for file in files for row in _rows_of(file)]
    adapters = {row.file: row.cells.pop(RANK_FROM_PATH, "") for row in rows}
    if len(files) == 1:
        return rows
    paths = _different_parts(files)
    ranks = numbers_in_paths(RANK_IN_PATH, [*adapters.values()]) or numbers_in_paths(RANK_IN_PATH, [*paths.values()])
    seeds = numbers_in_paths(SEED_IN_PATH, [*paths.values()])
    for column, numbers in ((RANK_FROM_PATH, ranks), (SEED_FROM_PATH, seeds)):
        if numbers is not None:
            by_file = dict(zip(files, numbers, strict=True))
            for row in rows:
                row.cells[column] = by_file[row.file]
    for row in rows:
        row.cells.setdefault(FILE_COLUMN, str(row.file))
    return rows


def _different_parts(files: Sequence[Path]) -> dict[Path, str]:
    """Return the paths without the folders that all share: only what differs can name a run."""
    parts = {file: file.absolute().parts for file in files}
    shared = 0
    while all(len(path) > shared + 1 for path in parts.values()) and len({p[shared] for p in parts.values()}) == 1:
        shared += 1
    return {file: "/".join(path[shared:]) for file, path in parts.items()}


def _rows_of(file: Path) -> list[TableRow]:
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Cells, bool]]]] = {
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".json": _json_rows,
        ".jsonl": _jsonl_rows,
        ".parquet": _parquet_rows,
        ".md": _markdown_rows,
        ".markdown": _markdown_rows,
        ".txt": _text_rows,
    }
    suffix = file.suffix.lower()
    if suffix not in readers:
        hint = f"valid: {', '.join(readers)}"
        raise AnalysisError(f"{suffix or 'no suffix'!r} is not a table format", str(file), hint)
    try:
        found = [(position, _texts(row), comma) for position, row, comma in readers[suffix](file)]
    except FileNotFoundError:
        raise AnalysisError("there is no such file", str(file), "give the path of a table") from None
    except UnicodeDecodeError as error:
        raise AnalysisError(f"not valid UTF-8: {error.reason}", str(file), "export the table as UTF-8") from None
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        text = (str(error).splitlines() or ["it is nested too deeply"])[0]
        raise AnalysisError(f"not readable as {suffix}: {text}", str(file), "export the table again") from None
    rows = [TableRow(file, position, cells, comma) for position, cells, comma in found if any(cells.values())]
    if not rows:
        raise AnalysisError("the table has no rows", str(file), "columns rank and score, and a row for each result")
    return rows


def _texts(row: Cells) -> dict[str, str]:
    if "doc_id" in row:
        row = {name: value for name, value in row.items() if name not in SAMPLE_FIELDS}
    texts = {}
    for name, value in row.items():
        if isinstance(value, str) and not value.lstrip().startswith("{"):
            texts[name.strip()] = value.strip()
        else:
            texts |= {nested.strip(): text for nested, text in _flat(value, str(name))}
    return texts


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted name, text) of nested objects, also of those that a cell has as text.

    Of a list of objects each key's last value is used: such a list is the log of one run (PEFT's ``metrics``).
    """
    if isinstance(value, str) and value.lstrip().startswith("{") and len(value) <= MAX_CELL_CHARACTERS:
        value = _object_of(value)
    if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        value = {key: item for entry in value for key, item in entry.items() if item is not None}
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _flat(entry, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        # Sorted, since PEFT writes target modules in no fixed order.
        yield name, ", ".join(sorted(value))
    else:
        yield name, "" if value is None else str(value).strip()


def _object_of(text: str) -> Any:
    """Return the object that a cell's text is, in JSON or as Python prints a dict; the text if it is neither."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(_FloatNames().visit(ast.parse(text.strip(), mode="eval")))
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return text


class _FloatNames(ast.NodeTransformer):
    """Python prints a dict's floats as ``nan`` and ``inf``, which it doesn't read."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(node.id) if node.id in ("nan", "inf") else node


def _csv_rows(file: Path) -> Iterator[tuple[str, Cells, bool]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        head = stream.readline()
        stream.seek(0)
        delimiter = max("\t;,", key=head.count)
        reader = csv.DictReader(stream, delimiter=delimiter, skipinitialspace=True)
        reader.fieldnames = _named(list(reader.fieldnames or ()))
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} doesn't have the {len(reader.fieldnames or ())} columns")
            yield f"line {reader.line_num}", row, delimiter != ","


def _named(names: Sequence[str]) -> list[str]:
    """Return the column names; a column without one is called by its number.

    Raises:
        ValueError: two columns have the same name.
    """
    named = [name.strip() or f"column {number}" for number, name in enumerate(names, start=1)]
    if twice := [name for name in named if named.count(name) > 1]:
        raise ValueError(f"two columns are called {twice[0]}")
    return named


def _text_rows(file: Path) -> Iterator[tuple[str, Cells, bool]]:
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    yield from _markdown_rows(file) if any(line.lstrip().startswith("|") for line in lines) else _csv_rows(file)


def _markdown_rows(file: Path) -> Iterator[tuple[str, Cells, bool]]:
    """Yield the rows of a Markdown file's table. Tables with the same columns are one.

    Raises:
        ValueError: no table, tables with different columns, or a row with other columns than its head.
    """
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    heads: list[list[str]] = []
    tables: list[list[tuple[str, Cells, bool]]] = []
    number = 0
    while number < len(lines):
        below = _markdown_cells(lines[number + 1]) if number + 1 < len(lines) and "|" in lines[number] else []
        if not below or not all(re.fullmatch(r":?-+:?", cell) for cell in below):
            number += 1
            continue
        names = _named([re.sub(r"\*\*|`", "", cell) for cell in _markdown_cells(lines[number])])
        rows: list[tuple[str, Cells, bool]] = []
        number += 2
        while number < len(lines) and "|" in lines[number]:
            cells = _markdown_cells(lines[number])
            number += 1
            if len(cells) != len(names):
                raise ValueError(f"line {number} doesn't have the {len(names)} columns")
            rows.append((f"line {number}", dict(zip(names, cells, strict=True)), False))
        heads.append(names)
        tables.append(rows)
    if not tables:
        raise ValueError("it has no table (a head, a line of |---|, and rows)")
    if any(head != heads[0] for head in heads):
        raise ValueError(f"its {len(heads)} tables have different columns: keep the one with the ranks")
    yield from (row for rows in tables for row in rows)


def _markdown_cells(line: str) -> list[str]:
    inner = line.strip().removeprefix("|")
    inner = inner.removesuffix("|") if not inner.endswith("\\|") else inner
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", inner)]


def _json_rows(file: Path) -> Iterator[tuple[str, Cells, bool]]:
    text = file.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        yield from _jsonl_rows(file)
        return
    if isinstance(content, dict) and isinstance(content.get("results"), dict) and "versions" in content:
        rows: Any = list(_lm_eval_rows(content))
    elif isinstance(content, dict):
        rows = _object_rows(content)
    else:
        rows = content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of objects, an object of lists of equal length, or one run's object")
    yield from ((f"row {number}", row, False) for number, row in enumerate(rows, start=1))


def _object_rows(content: dict[str, Any]) -> Any:
    """Return the rows of an object: it has a list of rows, lists or indexed objects as columns, or is one run."""
    if isinstance(content.get("columns"), list) and isinstance(content.get("data"), list):
        # pandas' orient="split" and W&B's tables.
        return [dict(zip(map(str, content["columns"]), row, strict=True)) for row in content["data"]]
    lists = [value for value in content.values() if isinstance(value, list) and value]
    for value in lists:
        if all(isinstance(entry, dict) for entry in value):
            return value
    if lists and len(lists) == len(content) and len({len(value) for value in lists}) == 1:
        return [dict(zip(content, values, strict=True)) for values in zip(*lists, strict=True)]
    inner = list(content.values())
    if inner and all(isinstance(value, dict) and value for value in inner):
        keys = list(inner[0])
        if all(list(value) == keys for value in inner) and [*map(str, range(len(keys)))] == keys:
            # pandas' to_json(): column → row number → value.
            return [{name: value[key] for name, value in content.items()} for key in keys]
        if list(content) == [*map(str, range(len(content)))]:
            return inner
    return [content]


def _lm_eval_rows(content: dict[str, Any]) -> Iterator[Cells]:
    """Yield a row for each task of lm-eval's results file; a group's subtasks are left out.

    The file doesn't have the adapter's rank or its training seed. The rank is read from the path of the adapter; the
    seeds in the file are those of the evaluation.
    """
    config = content.get("config") or {}
    arguments = config.get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(part.partition("=")[::2] for part in arguments.split(",") if "=" in part)
    adapter = next((arguments[key] for key in ("peft", "lora_local_path", "pretrained") if arguments.get(key)), "")
    subtasks = {task for tasks in (content.get("group_subtasks") or {}).values() for task in tasks}
    for task, scores in content["results"].items():
        if task in subtasks or not isinstance(scores, dict):
            continue
        row = {"task": task, **{name: value for name, value in scores.items() if name not in ("alias", "name")}}
        row["n-shot"] = (content.get("n-shot") or {}).get(task)
        row["limit"] = config.get("limit")
        row["pretrained"] = arguments.get("pretrained") if arguments.get("peft") else None
        row[RANK_FROM_PATH] = str(adapter)
        yield row


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Cells, bool]]:
    # Not splitlines(): a JSON text may contain other characters that it takes for the end of a line.
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not an object")
            yield f"line {number}", row, False


def _parquet_rows(file: Path) -> Iterator[tuple[str, Cells, bool]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(file).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(str(error)) from None
    yield from ((f"row {number}", row, False) for number, row in enumerate(rows, start=1))
