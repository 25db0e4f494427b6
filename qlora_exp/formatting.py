"""Numbers as text, and the table that all commands print. Rich is imported only to print."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

UNKNOWN_CELL = "–"

COLUMN_GAP = 2
"""Spaces between two columns of :func:`fitted_table`."""

FOLDED_WIDTH = 34
"""Characters a line of a cell that may be folded, if there is no room for more."""

TEXT_WIDTH = 98
"""Columns of text on a terminal that is wider: longer lines are hard to read."""

LOG_WIDTH = 4000
"""Table width in columns where there is no terminal: lines in a log must not be cut or wrapped."""


def print_table(renderable: RenderableType, stream: TextIO | None = None) -> None:
    """Print to ``stream`` (standard output by default), without line breaks unless it is a terminal."""
    from rich.console import Console

    file = stream if stream is not None else sys.stdout
    width = None if file.isatty() or os.environ.get("COLUMNS", "").isdigit() else LOG_WIDTH
    Console(file=file, width=width, highlight=False, soft_wrap=False).print(renderable, markup=False)


def table_width(stream: TextIO | None = None) -> int:
    """Return how many columns :func:`print_table` has on ``stream``."""
    from rich.console import Console

    file = stream if stream is not None else sys.stdout
    return Console(file=file).width if file.isatty() or os.environ.get("COLUMNS", "").isdigit() else LOG_WIDTH


def print_wrapped(lines: Iterable[str]) -> None:
    """Print lines of text, broken between words on a terminal; in a log each stays one line."""
    width = min(table_width(), TEXT_WIDTH)
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        shown = textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        print("\n".join(shown) if table_width() < LOG_WIDTH else line)


@dataclass(frozen=True)
class TableColumn:
    """A column of :func:`fitted_table`.

    ``text`` makes a cell of a value that is known; by default :func:`cell_text`. ``priority`` 0 is always shown; of the
    others, the highest go first where the terminal is too narrow.
    """

    key: str
    heading: str | None = None
    text: Callable[[Any], Any] | None = None
    """May return rich's ``Text`` with a style."""
    priority: int = 0
    fold: bool = False
    """Long cells may take several lines: the column needs no more than :data:`FOLDED_WIDTH`."""
    cut: bool = False
    """The same, but long cells are cut, so that each row is one line."""

    @property
    def shown_heading(self) -> str:
        return self.heading if self.heading is not None else self.key


def fitted_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[TableColumn], width: int
) -> tuple[Table, list[TableColumn]]:
    """Return a table of at most ``width`` columns, one line per row if possible, and the columns that it lacks.

    Numbers are right-aligned. Only columns with ``fold`` are broken into lines, and only those with ``cut`` are cut.
    """
    from rich.cells import cell_len

    def cell(row: Mapping[str, Any], column: TableColumn) -> Any:
        value = row.get(column.key)
        return UNKNOWN_CELL if value is None else (column.text or (lambda known: cell_text(column.key, known)))(value)

    cells = {column.key: [cell(row, column) for row in rows] for column in columns}
    needed: dict[str, int] = {}
    for column in columns:
        widest = max((cell_len(str(text)) for text in cells[column.key]), default=0)
        widest = min(widest, FOLDED_WIDTH) if column.fold or column.cut else widest
        needed[column.key] = COLUMN_GAP + max(cell_len(column.shown_heading), widest)
    shown = list(columns)
    while sum(needed[column.key] for column in shown) - COLUMN_GAP > width:
        least = max(shown, key=lambda column: column.priority)
        if least.priority == 0:
            break
        shown.remove(least)
    table = simple_table(*(column.shown_heading for column in shown))
    table.padding = (0, COLUMN_GAP - 1, 0, 0)  # rich adds a divider, which is a space here
    can_fold = any(column.fold or column.cut for column in shown)
    left = width + COLUMN_GAP - sum(needed[column.key] for column in shown)
    for column, drawn in zip(shown, table.columns, strict=True):
        values = [row.get(column.key) for row in rows]
        is_number = all(isinstance(value, int | float | None) and not isinstance(value, bool) for value in values)
        drawn.justify = "right" if is_number and column is not shown[0] else "left"
        drawn.no_wrap = column is shown[0] or (can_fold and not column.fold)
        if column.cut:
            drawn.overflow, drawn.max_width = "ellipsis", needed[column.key] - COLUMN_GAP + max(left, 0)
    for index in range(len(rows)):
        table.add_row(*(cells[column.key][index] for column in shown))
    return table, [column for column in columns if column not in shown]


def cell_text(key: str, value: Any) -> str:
    """Return a value as a cell, by the unit at the end of its key; a list's entries are joined by ``+``."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "+".join(cell_text("", entry) for entry in value)
    if not isinstance(value, int | float):
        return str(value)
    if key.endswith("_bytes"):
        return bytes_text(value)
    if key.endswith("seconds"):
        return f"{value:,.1f} s" if abs(value) < 100 else f"{value:,.0f} s"
    if key.endswith("usd"):
        return f"${value:,.2f}" if abs(value) >= 0.01 or value == 0 else f"${value:.2g}"
    return f"{value:,}" if isinstance(value, int) else figure(value) if abs(value) < 1e4 else f"{value:,.0f}"


def plain_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table of text cells."""
    table = simple_table(*headings)
    for row in rows:
        table.add_row(*row)
    return table


def flatten(value: Any, prefix: str = "", mappings: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested mappings. Lists, empty mappings in them and those of the keys ``mappings``
    are values."""
    if isinstance(value, Mapping) and (value or not prefix) and prefix not in mappings:
        for key, entry in value.items():
            yield from flatten(entry, f"{prefix}.{key}" if prefix else str(key), mappings)
    else:
        yield prefix, value


def bytes_text(size: float | None) -> str:
    """Return ``size`` bytes in decimal units, as disks and model cards use: 1 MB is 10⁶ bytes."""
    if size is None:
        return UNKNOWN_CELL
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= factor:
            return f"{size / factor:.3g} {unit}" if abs(size) < 999.5 * factor else f"{size / factor:,.0f} {unit}"
    return f"{size:.0f} B"


def number(value: float | None, digits: int = 3) -> str:
    return UNKNOWN_CELL if value is None else f"{value:,.{digits}f}"


def figure(value: float | None) -> str:
    """Return ``value`` with four significant digits."""
    return UNKNOWN_CELL if value is None else f"{value:.4g}"


def clock_text(seconds: float) -> str:
    """Return a duration as minutes and seconds, ``1:05``, or with hours, ``2:01:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def simple_table(*columns: str) -> Table:
    """Return an empty table in the style of all commands; the first column is bold."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, overflow="fold", style="bold" if position == 0 else "")
    return table
