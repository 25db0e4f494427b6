"""Rows read as examples — a prompt or a conversation, a completion, a label — and each fault named with its place.

Only text is accepted: what a number, a date or a null would look like in a prompt is the user's to say. The exceptions
are whole numbers inside a template and as a class, whose text is unambiguous, and an empty text inside a template that
another column fills.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qlora_exp.config import TaskConfig, TaskKind
from qlora_exp.data.files import RawFile, RawRow, Unlabelled
from qlora_exp.data.known_formats import columns_hint
from qlora_exp.data.problems import RowProblem
from qlora_exp.data.templates import Template, parse_template, with_line_breaks
from qlora_exp.errors import DataError, nearest

ROLES = ("system", "user", "assistant")
_SHAREGPT = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One valid row: what is asked (a single user message, or a conversation) and the text that is learned."""

    file: str
    row: int
    messages: tuple[Message, ...]
    conversation: bool
    """Read from a messages column (then the plain format writes the roles out)."""
    completion: str
    """Stripped of surrounding white space."""
    label: str | None
    extra: dict[str, Any]

    @property
    def item_id(self) -> str:
        return f"{self.file}:{self.row}"

    @property
    def prompt_key(self) -> str:
        """Equal for rows that ask the same thing, whatever their white space."""
        return "\x1e".join(f"{message.role}\x1f{' '.join(message.content.split())}" for message in self.messages)


class _InvalidRow(Exception):
    def __init__(self, reason: str, detail: str, column: str | None, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.column, self.hint = reason, detail, column, hint


@dataclass(frozen=True)
class _Mapping:
    """How the columns of one file become an example."""

    prompt: str | Template | None
    completion: str | Template | None
    messages: str | None
    label: str | None
    system: str | None
    columns: tuple[str, ...]

    @cached_property
    def used(self) -> set[str]:
        used: set[str] = set()
        for source in (self.prompt, self.completion, self.messages, self.label):
            used |= set(source.columns) if isinstance(source, Template) else {source} if source else set()
        return used


def read_examples(task: TaskConfig, raw: RawFile) -> tuple[list[Example], list[RowProblem]]:
    """The valid examples of one file, and the problems of the other rows (in row order).

    Raises :class:`DataError` when the mapping itself can't be meant: a column that no row has, a malformed template.
    """
    problems = list(raw.problems)
    if not raw.rows:
        return [], problems
    mapping = _mapping(task, raw)
    examples = []
    for row in raw.rows:
        try:
            examples.append(_example(row, mapping, task.kind))
        except _InvalidRow as bad:
            problems.append(RowProblem(row.file, row.number, bad.column, bad.reason, bad.detail, bad.hint))
    return examples, sorted(problems, key=lambda problem: problem.row)


def _mapping(task: TaskConfig, raw: RawFile) -> _Mapping:
    columns, classifies = raw.columns, task.kind is TaskKind.classification
    system = with_line_breaks(task.system) if task.system else task.system
    if task.columns.messages:
        if task.prompt or task.completion:
            raise DataError(
                "both a messages column and a template are given",
                "task.columns.messages, task.prompt, task.completion",
                "give one of them: task.columns.messages=null, or task.prompt=null task.completion=null",
            )
        label = task.columns.label if classifies else None
        for key, column in (("messages", task.columns.messages), ("label", label)):
            _check_column(column, f"task.columns.{key}", raw)
        return _Mapping(None, None, task.columns.messages, label, system, columns)
    label = task.columns.label if classifies else None
    completion_column = task.columns.completion
    if label and not task.completion and completion_column not in columns:
        completion_column = label  # the label is what is to be answered
    prompt = _source("prompt", task.prompt, task.columns.prompt, raw)
    completion = _source("completion", task.completion, completion_column, raw)
    _check_column(label, "task.columns.label", raw)
    return _Mapping(prompt, completion, None, label, system, columns)


def _source(name: str, template: str | None, column: str | None, raw: RawFile) -> str | Template:
    if template is not None:
        try:
            return parse_template(template, f"task.{name}", raw.columns)
        except DataError as error:
            raise DataError(error.what, f"{error.where}; columns of {raw.name}", error.hint) from None
    if column is None:
        raise DataError(
            f"nothing says which text is the {name}",
            f"task.{name}, task.columns.{name}",
            f"task.columns.{name}=COLUMN, or 'task.{name}=\"{{COLUMN}}\"'; columns: {', '.join(raw.columns)}",
        )
    _check_column(column, f"task.columns.{name}", raw)
    return column


def _check_column(column: str | None, key: str, raw: RawFile) -> None:
    if column is None or column in raw.columns:
        return
    hint = f"{nearest(column, raw.columns)}; set {key}=COLUMN"
    if not key.endswith("messages"):
        hint = columns_hint(raw.columns) or hint
    raise DataError(f"missing column: no row has a column {column!r}", f"{raw.name} ({key})", hint)


def _example(row: RawRow, mapping: _Mapping, kind: TaskKind) -> Example:
    if mapping.messages:
        messages, completion = _conversation(row, mapping)
    else:
        prompt = _text(row, mapping.prompt)
        completion = _text(row, mapping.completion, is_class=kind is TaskKind.classification).strip()
        messages = (Message("user", prompt),)
    if mapping.system and messages[0].role != "system":
        messages = (Message("system", mapping.system), *messages)
    label = None
    if kind is TaskKind.classification:
        label = _column_text(row, mapping.label, whole_numbers=True).strip() if mapping.label else completion
    extra = {column: value for column, value in row.values.items() if column not in mapping.used}
    return Example(row.file, row.number, messages, mapping.messages is not None, completion, label, extra)


def _text(row: RawRow, source: str | Template | None, is_class: bool = False) -> str:
    if isinstance(source, Template):
        several = len(source.columns) > 1
        texts = {column: _column_text(row, column, whole_numbers=True, empty=several) for column in source.columns}
        if not any(text.strip() for text in texts.values()):
            raise _InvalidRow("empty", "all columns of the template are empty or only white space", next(iter(texts)))
        return source.render(texts)
    assert source is not None
    return _column_text(row, source, whole_numbers=is_class)


def _column_text(row: RawRow, column: str, whole_numbers: bool, empty: bool = False) -> str:
    """``empty``: whether another column may fill the text, so that this one may be empty."""
    written = f'write "{column}": "" where it is empty (pandas: df.fillna(""))' if empty else None
    if column not in row.values:
        hint = nearest(column, row.values) + (f"; or {written}" if written else "")
        raise _InvalidRow("missing column", f"{column!r} is not in this row", column, hint)
    value = row.values[column]
    if isinstance(value, Unlabelled):
        raise _InvalidRow("no label", f"the class is {value:d}, which marks a row without a label", column)
    if whole_numbers and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None and written:
        raise _InvalidRow("not text", "found null", column, written)
    return value if empty and isinstance(value, str) and not value.strip() else _checked_text(value, column)


def _checked_text(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise _InvalidRow("not text", f"found {_described(value)}", column, _text_hint(value, column))
    if not value.strip():
        raise _InvalidRow("empty", "the text is empty or only white space", column)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        detail = "it holds half of a surrogate pair, which no tokenizer can read"
        raise _InvalidRow("broken Unicode", detail, column) from None
    return value


def _described(value: object) -> str:
    if value is None:
        return "null"
    try:
        shown = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        shown = "nested too deeply"
    return f"{type(value).__name__} {shown[:60]}{'…' if len(shown) > 60 else ''}"


def _text_hint(value: object, column: str) -> str | None:
    if isinstance(value, bool):
        return f'write it as text, e.g. "{"yes" if value else "no"}"'
    if isinstance(value, int):
        return f"write it as text, \"{value}\", or use a template, which writes whole numbers out: '{{{column}}}'"
    if isinstance(value, float) and math.isnan(value):
        return "it marks a missing value: give the row a text, or leave it out with task.invalid_rows=drop"
    if isinstance(value, float) and value.is_integer():
        return f'write it as text, "{value:.0f}" (pandas makes floats of whole numbers where one is missing)'
    if isinstance(value, float):
        return f'write it as text, with the digits that you want to be learned: "{value}"'
    if isinstance(value, Mapping) and value:
        return f"it holds {', '.join(map(str, list(value)[:5]))}: make the one you mean a column with text"
    if isinstance(value, Mapping | Sequence | bytes):
        return "make it a column with text"
    return None if value is None else f'write it as text, e.g. "{value}"'


def _conversation(row: RawRow, mapping: _Mapping) -> tuple[tuple[Message, ...], str]:
    """All messages before the last, and the last (the assistant's) one's text."""
    column = mapping.messages
    assert column is not None
    if column not in row.values:
        raise _InvalidRow("missing column", f"{column!r} is not in this row", column, nearest(column, row.values))
    messages = [_message(entry, number, column) for number, entry in enumerate(_list(row.values[column], column), 1)]
    _check_roles([message.role for message in messages], column)
    return tuple(messages[:-1]), messages[-1].content.strip()


def _list(value: object, column: str) -> list[Any]:
    shape = 'write [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'
    if isinstance(value, str):  # a CSV file can hold messages only as JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise _InvalidRow("invalid messages", f"the text is not JSON: {error}", column, shape) from None
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else _described(value)
        raise _InvalidRow("invalid messages", f"expected a list of messages, found {found}", column, shape)
    return value


def _message(entry: object, number: int, column: str) -> Message:
    where = f"{column}[{number}]"
    if not isinstance(entry, dict) or "role" not in entry or "content" not in entry:
        hint = 'each message is {"role": "…", "content": "…"}'
        if isinstance(entry, dict) and {"from", "value"} <= set(entry):
            hint = "rename from to role and value to content, human to user and gpt to assistant"
        raise _InvalidRow("invalid messages", f"message {number} has no role and content", where, hint)
    role = entry["role"]
    if not isinstance(role, str) or role not in ROLES:
        hint = f"did you mean {_SHAREGPT[str(role)]}?" if str(role) in _SHAREGPT else nearest(str(role), ROLES)
        raise _InvalidRow("invalid messages", f"message {number} has the role {role!r}", where, hint)
    return Message(role, _checked_text(entry["content"], where))


def _check_roles(roles: Sequence[str], column: str) -> None:
    """An optional system message, then user and assistant in turn, the assistant last."""
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or list(turns) != expected:
        detail = f"the roles are {', '.join(roles)}"
        hint = "an optional system message, then user and assistant in turn; the last one is the assistant's"
        raise _InvalidRow("invalid messages", detail, column, hint)
