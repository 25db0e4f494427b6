"""Wide tables become long ones: a row for each rank, seed or measure in place of a column for each."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qlora_exp.analysis.table_columns import ALIASES, CONFIGURATION, bare_name, direction, name_words, names_a_rank
from qlora_exp.analysis.table_files import FILE_COLUMN, RANK_FROM_PATH, SEED_FROM_PATH, TableRow
from qlora_exp.analysis.table_values import is_missing, read_number

MEASURE_COLUMNS = ("metric", "measure", "metric_name", "score_name")
"""Columns whose text names the score that is in the column ``value``."""
VALUE = "value"
"""A score of which the table doesn't have the name."""
HEADS = {
    "rank": r"(?:(?:q|do|rs)?lora[\s_-]*)?(?:rank|r)[\s_]*[=:_-]?[\s_]*(?P<key>\d+)",
    "seed": r"seed[\s_]*[=:_#-]?[\s_]*(?P<key>\d+)",
}
SEPARATORS = " _-./@(),:|$*"


@dataclass(frozen=True)
class LongTable:
    """Rows with a column for each meaning."""

    rows: tuple[TableRow, ...]
    configuration: tuple[str, ...]
    """Columns of a wide table that are left: texts that tell its rows apart."""
    notes: tuple[str, ...]


def to_long(rows: Sequence[TableRow], rank_column: str | None = None) -> LongTable:
    """Return the rows of a long table; those of a long one as they are."""
    notes: list[str] = []
    known = {bare_name(name) for name in _names(rows)}
    long, wide = tuple(rows), False
    for meaning in ("rank", "seed"):
        if known & set(ALIASES[meaning]) or (meaning == "rank" and rank_column is not None):
            continue
        heads = _heads(_names(long), meaning)
        if meaning == "rank" and any(names_a_rank(name) for name in _names(long) if name not in heads):
            continue
        if len({key for key, _ in heads.values()}) >= 2:
            long, wide = _melted(long, meaning, heads), True
    if not wide:
        long, wide = _grid(long, known, rank_column is not None, notes)
    long = _named_measures(long)
    return LongTable(long, _texts_left(long) if wide else (), tuple(notes))


def _names(rows: Sequence[TableRow]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.cells))


def _heads(names: Sequence[str], meaning: str) -> dict[str, tuple[str, str]]:
    """Return column → (rank or seed, measure) of the columns called like ``r = 8``, ``loss_r8`` or ``r=8.loss``."""
    pattern = re.compile(rf"(?P<before>|.*[^a-z0-9]){HEADS[meaning]}(?P<after>|[^a-z0-9].*)", re.IGNORECASE)
    found = {}
    for name in names:
        plain = re.sub(r"[$`]|\*\*", "", name).strip()
        if name not in (RANK_FROM_PATH, SEED_FROM_PATH) and (match := pattern.fullmatch(plain)):
            parts = [match[part].strip(SEPARATORS) for part in ("before", "after")]
            found[name] = (match["key"], " ".join(part for part in parts if part) or VALUE)
    return found


def _melted(
    rows: Sequence[TableRow], meaning: str, heads: dict[str, tuple[str, str]], kept: Callable[[str], str] = str
) -> tuple[TableRow, ...]:
    """Return a row for each row and key of ``heads``; ``kept`` renames the other columns."""
    keys = list(dict.fromkeys(key for key, _ in heads.values()))
    long = []
    for row in rows:
        others = {kept(name): text for name, text in row.cells.items() if name not in heads}
        for key in keys:
            scores = {measure: row.cells.get(name, "") for name, (of, measure) in heads.items() if of == key}
            column = next(name for name, (of, _) in heads.items() if of == key)
            cells = {**others, meaning: key, **scores}
            long.append(replace(row, position=f"{row.position}, column {column}", cells=cells))
    return tuple(long)


def _grid(
    rows: Sequence[TableRow], known: set[str], has_rank: bool, notes: list[str]
) -> tuple[tuple[TableRow, ...], bool]:
    r"""Return the long form of a grid with numbers for column names, and whether it is one.

    The first column's name has both axes, e.g. ``lr \ rank``. If it has the rows' only, the columns are the ranks.
    """
    names = [name for name in _names(rows) if name not in (FILE_COLUMN, RANK_FROM_PATH, SEED_FROM_PATH)]
    numbers = [name for name in names if read_number(name) is not None]
    if len(numbers) < 2:
        return tuple(rows), False
    corner = next((name for name in names if name not in numbers), "")
    axes = re.fullmatch(r"(?P<rows>.*\w.*?)\s*(?:\\+|/|\||×)\s*(?P<columns>.*\w.*)", corner)
    heads = {name: (name, VALUE) for name in numbers}
    if axes:
        return _melted(
            rows, axes["columns"].strip(), heads, lambda name: axes["rows"].strip() if name == corner else name
        ), True
    ranked = has_rank or bool(known & set(ALIASES["rank"])) or any("rank" in name_words(name) for name in names)
    if ranked or not all(name.isdigit() and int(name) >= 1 for name in numbers):
        return tuple(rows), False
    notes.append(f"The columns {', '.join(numbers)} are read as ranks: no column has the rank.")
    return _melted(rows, "rank", heads), True


def _named_measures(rows: tuple[TableRow, ...]) -> tuple[TableRow, ...]:
    """Return the rows with a column for each measure, if one column names the measures and ``value`` has the scores."""
    names = _names(rows)
    measure = next((name for name in names if bare_name(name) in MEASURE_COLUMNS), None)
    value = next((name for name in names if name.lower() == VALUE), None)
    if measure is None or value is None or any(is_missing(row.cells.get(measure, "")) for row in rows):
        return rows
    merged: dict[tuple[tuple[str, str], ...], TableRow] = {}
    for row in rows:
        others = {name: text for name, text in row.cells.items() if name not in (measure, value)}
        key = (("", str(row.file)), *sorted(others.items()))
        name, text = row.cells[measure], row.cells.get(value, "")
        if key in merged and name not in merged[key].cells:
            merged[key] = replace(merged[key], cells={**merged[key].cells, name: text})
        else:
            # A second value of a measure stays a row: two scores of one run are an error that names both.
            key = key if key not in merged else (("", row.where), *key)
            merged[key] = replace(row, cells={**others, name: text})
    return tuple(merged.values())


def _texts_left(rows: Sequence[TableRow]) -> tuple[str, ...]:
    special = {alias for aliases in ALIASES.values() for alias in aliases}
    left = []
    for name in _names(rows):
        texts = [text for row in rows if not is_missing(text := row.cells.get(name, ""))]
        numeric = all(read_number(text, True) is not None for text in texts)
        bare = bare_name(name)
        if texts and not numeric and bare not in special | set(CONFIGURATION) and direction(name) is None:
            left.append(name)
    return tuple(name for name in left if name not in (FILE_COLUMN, RANK_FROM_PATH, SEED_FROM_PATH))
