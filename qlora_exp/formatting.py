"""Numbers as text, and the table that all commands print. Rich is imported only to print."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

UNKNOWN_CELL = "–"

LOG_WIDTH = 4000
"""Table width in columns where there is no terminal: lines in a log must not be cut or wrapped."""


def print_table(renderable: RenderableType, stream: TextIO | None = None) -> None:
    """Print to ``stream`` (standard output by default), without line breaks unless it is a terminal."""
    from rich.console import Console

    file = stream if stream is not None else sys.stdout
    width = None if file.isatty() or os.environ.get("COLUMNS", "").isdigit() else LOG_WIDTH
    Console(file=file, width=width, highlight=False, soft_wrap=False).print(renderable, markup=False)


def plain_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table of text cells."""
    table = simple_table(*headings)
    for row in rows:
        table.add_row(*row)
    return table


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested mappings; lists and empty mappings in them are values."""
    if isinstance(value, Mapping) and (value or not prefix):
        for key, entry in value.items():
            yield from flatten(entry, f"{prefix}.{key}" if prefix else str(key))
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


def simple_table(*columns: str) -> Table:
    """Return an empty table in the style of all commands; the first column is bold."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, overflow="fold", style="bold" if position == 0 else "")
    return table
