"""Prompt and completion templates.

Templates allow ``{column}`` only: no attributes, indices, conversions or formats. A written-out ``\\n`` or ``\\t`` is a
line break or a tab, because a shell and Hydra pass it on as two characters.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_exp.errors import DataError, nearest


@dataclass(frozen=True)
class RowTemplate:
    """A parsed template. Each of ``parts`` is a literal text and the column that follows it (``None``: no column)."""

    key: str
    """The configuration key of the template, for error messages."""
    parts: tuple[tuple[str, str | None], ...]

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """Return the columns that the template reads, each once."""
        return tuple(dict.fromkeys(column for _, column in self.parts if column is not None))

    def render(self, texts: dict[str, str]) -> str:
        """Return the template filled in; braces inside the texts stay as they are."""
        return "".join(text + (texts[column] if column is not None else "") for text, column in self.parts)


_WRITTEN_OUT = {"\\n": "\n", "\\t": "\t", "\\\\n": "\\n", "\\\\t": "\\t"}


def with_line_breaks(text: str) -> str:
    """Return ``text`` with a line break for a written-out ``\\n``, a tab for ``\\t``; ``\\\\n`` keeps one backslash."""
    return re.sub(r"\\{1,2}[nt]", lambda match: _WRITTEN_OUT[match[0]], text)


def parse_template(text: str, key: str, columns: Sequence[str]) -> RowTemplate:
    """Parse a template over ``columns``. A :class:`DataError` names the key, the fault and the nearest columns."""
    brace_hint = "write {column} for a column's text, and {{ or }} for a brace"
    try:
        pieces = list(string.Formatter().parse(with_line_breaks(text)))
    except ValueError as error:
        raise DataError(f"the template {text!r} can't be read: {error}", key, brace_hint) from None
    parts: list[tuple[str, str | None]] = []
    for literal, column, format_spec, conversion in pieces:
        if column is None:
            parts.append((literal, None))
            continue
        if format_spec or conversion:
            raise DataError(f"the template {text!r} formats {column!r}", key, "only plain {column} is allowed")
        if column not in columns:
            hint = f"{nearest(column, columns)} ({brace_hint})" if column else brace_hint
            raise DataError(f"the template names a column {column!r} that doesn't exist", key, hint)
        parts.append((literal, column))
    template = RowTemplate(key, tuple(parts))
    if not template.columns:
        raise DataError(f"the template {text!r} names no column: all rows would have the same text", key, brace_hint)
    return template


def template_setting(key: str, value: str) -> str:
    """Return the setting ``task.KEY`` as it is typed: a template is quoted for Hydra and again for the shell.

    Example: ``prompt`` and ``{question}`` give ``'task.prompt="{question}"'``.
    """
    if re.fullmatch(r"[\w+.-]+", value):
        return f"task.{key}={value}"
    text = value.replace("\n", "\\n")
    return f"'task.{key}=\"{text}\"'"
