"""Read rows as examples (a prompt or conversation, a completion, a label), and name each faulty row.

Only text is accepted: the user decides how a number, a date or a null should look in a prompt. There are two
exceptions. A whole number is accepted inside a template and as a class, because its text is unambiguous. An empty text
is accepted inside a template that another column fills.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_exp.config.enums import Learn, SpecialTokens, TaskKind, TaskSource
from qlora_exp.config.schema import TaskConfig
from qlora_exp.data.files import DataFile, RawRow, Unlabelled
from qlora_exp.data.items import InvalidRow, RowProblem
from qlora_exp.data.messages import Message, describe_value, read_messages, read_tools, read_variables, without_nulls
from qlora_exp.data.templates import RowTemplate, parse_template, with_line_breaks
from qlora_exp.data.texts import StrippedText, collapse_white_space, is_blank, strip_text
from qlora_exp.errors import DataError, nearest

_ARROW_FILES = (".parquet", ".arrow", ".feather")
VARIABLES_COLUMN = "chat_template_kwargs"
"""TRL's column of variables for the chat template, read together with a messages column."""


@dataclass(frozen=True)
class PlainText:
    """How the plain format writes a row: the white space around its completion in the file, and the task's settings."""

    space_before: str = ""
    space_after: str = ""
    separator: str | None = None
    """What stands between prompt and completion; ``None``: it depends on the two texts."""
    special_tokens: SpecialTokens = SpecialTokens.refuse


@dataclass(frozen=True)
class Example:
    """One valid row: the prompt (a user message, a conversation, or nothing) and the learned text."""

    file: str
    row: int
    messages: tuple[Message, ...]
    conversation: bool
    """Whether it comes from a messages column; the plain format then writes the roles out."""
    completion: str
    """The learned text, stripped; a code block keeps the indentation of its first line."""
    label: str | None
    extra: dict[str, Any]
    plain: PlainText = PlainText()
    answer: Message | None = None
    """The last message of a conversation, if it has more than a role and text (tool calls, reasoning)."""
    tools: tuple[Any, ...] | None = None
    """The tools that the assistant may call, as the chat template reads them."""
    group: str | None = None
    """The row's document or context, from ``task.columns.group``."""
    variables: Mapping[str, Any] | None = None
    """Further variables for the chat template, e.g. ``enable_thinking``."""

    @property
    def item_id(self) -> str:
        return f"{self.file}:{self.row}"

    @property
    def all_messages(self) -> tuple[Message, ...]:
        """Return the prompt's messages and the answer."""
        return (*self.messages, self.answer or Message("assistant", self.completion))

    @property
    def is_whole_text(self) -> bool:
        """Return whether the row has no prompt at all: every token of its text is learned (continued pretraining)."""
        return not self.messages

    @property
    def has_structured_answer(self) -> bool:
        """Return whether the answer is more than text: tool calls, or reasoning in a field."""
        return self.answer is not None and bool(self.answer.fields)

    @property
    def prompt_key(self) -> str:
        """Return a key that is equal for rows with the same prompt. Indentation counts, other white space doesn't.

        Whether earlier answers are learned, and whether a content is a text or a list of parts, makes no difference.
        A whole text is its own key: the same text must not be in two splits."""
        if self.is_whole_text:
            return f"text\x1f{collapse_white_space(self.completion)}"
        texts = [f"{message.role}\x1f{collapse_white_space(message.content)}" for message in self.messages]
        fields = [message.fields for message in self.messages]
        if any(fields) or self.tools or self.variables:
            texts.append(json.dumps([fields, self.tools, self.variables], sort_keys=True))
        return "\x1e".join(texts)

    @property
    def answer_key(self) -> str:
        """Return a key that is equal for rows with the same last message and the same learned answers."""
        differences: list[Any] = [self.answer.fields] if self.answer is not None and self.answer.fields else []
        differences += [number for number, message in enumerate(self.messages) if message.weight == 0]
        return f"{self.completion}\x1f{json.dumps(differences, sort_keys=True)}" if differences else self.completion


@dataclass(frozen=True)
class _Sources:
    """The columns and templates from which one file's examples are read."""

    prompt: str | RowTemplate | None
    completion: str | RowTemplate | None
    messages: tuple[str, ...]
    """The columns whose messages form the conversation, in this order; empty: the rows hold no conversation."""
    label: str | None
    used: frozenset[str]
    """The columns that an example is made of; all others are extra."""


def read_examples(task: TaskConfig, raw: DataFile) -> tuple[list[Example], list[RowProblem]]:
    """Return the valid examples of one file, and the problems of the other rows (in row order).

    Raises :class:`DataError` if the mapping itself is wrong: a column that no row has, a malformed template.
    """
    problems = list(raw.problems)
    if not raw.rows:
        return [], problems
    sources = _find_sources(task, raw)
    check_column(task.columns.group, "task.columns.group", raw)
    for column in sorted(sources.used & set(raw.mixed_classes)):
        hint = (
            f"write all files with the same features, or write class names as text into column {column!r} of each file"
        )
        raise DataError(raw.mixed_classes[column], f"task.path={task.path}", hint)
    examples = []
    for row in raw.rows:
        try:
            examples.append(_read_example(row, sources, task))
        except InvalidRow as error:
            problems.append(error.at(row.file, row.number))
    return examples, sorted(problems, key=lambda problem: problem.row)


def _find_sources(task: TaskConfig, raw: DataFile) -> _Sources:
    if re.search(r"\\[nrt]", task.separator or ""):
        what = f"the separator {task.separator!r} holds a backslash and a letter, not a newline or a tab"
        raise DataError(what, "task.separator", "in a shell: $'task.separator=\"\\n\"'; or in a file given with --from")
    label = task.columns.label if task.kind is TaskKind.classification else None
    messages = task.columns.messages
    if messages:
        if task.prompt or task.completion:
            raise DataError(
                "both a messages column and a template are given",
                "task.columns.messages, task.prompt, task.completion",
                "give one of them: task.columns.messages=null, or task.prompt=null task.completion=null",
            )
        columns = message_columns(messages, raw.columns)
        for column in columns:
            check_column(column, "task.columns.messages", raw)
        check_column(label, "task.columns.label", raw)
        optional = {column for column in raw.columns if column in (task.columns.tools, VARIABLES_COLUMN)}
        used = {*columns, *optional, *([label] if label else [])}
        return _Sources(None, None, columns, label, frozenset(used))
    completion_column = task.columns.completion
    if label and not task.completion and completion_column not in raw.columns:
        completion_column = label  # the label is the answer
    no_prompt = task.prompt == "" and task.columns.prompt is None
    prompt = None if no_prompt else _text_source("prompt", task.prompt, task.columns.prompt, raw)
    completion = _text_source("completion", task.completion, completion_column, raw)
    check_column(label, "task.columns.label", raw)
    used = {label} if label else set()
    for source in (prompt, completion):
        used |= set(source.columns) if isinstance(source, RowTemplate) else {source} if source else set()
    return _Sources(prompt, completion, (), label, frozenset(used))


def message_columns(name: str, columns: Sequence[str]) -> tuple[str, ...]:
    """Return the columns that ``task.columns.messages`` names; ``prompt+chosen`` joins two."""
    return (name,) if name in columns or "+" not in name else tuple(name.split("+"))


def _text_source(name: str, template: str | None, column: str | None, raw: DataFile) -> str | RowTemplate:
    if template is not None:
        try:
            return parse_template(template, f"task.{name}", raw.columns)
        except DataError as error:
            raise DataError(error.what, f"{error.where}; columns of {raw.name}", error.hint) from None
    if column is None:
        raise DataError(
            f"no setting says which text is the {name}",
            f"task.{name}, task.columns.{name}",
            f"task.columns.{name}=COLUMN, or 'task.{name}=\"{{COLUMN}}\"'; columns: {', '.join(raw.columns)}",
        )
    check_column(column, f"task.columns.{name}", raw)
    return column


def check_column(column: str | None, key: str, raw: DataFile) -> None:
    """Raise :class:`DataError` with the nearest columns if no row has ``column``, which the setting ``key`` names."""
    if column is None or column in raw.columns:
        return
    written = next((name for name in raw.columns if name.strip(" \t\ufeff'\"`") == column), None)
    if written is not None:  # only quotes or invisible characters are added to the name
        hint = f"the file names it {written!r}: write {column!r} there"
    else:
        hint = f"{nearest(column, raw.columns)}; set {key}=COLUMN"
    raise DataError(f"missing column: no row has a column {column!r}", f"{raw.name} ({key})", hint)


def _read_example(row: RawRow, sources: _Sources, task: TaskConfig) -> Example:
    label, classifies = None, task.kind is TaskKind.classification
    if classifies and sources.label:
        label = _column_text(row, sources.label, whole_numbers=True).strip()
    group = _column_text(row, task.columns.group, whole_numbers=True).strip() if task.columns.group else None
    extra = {column: value for column, value in row.values.items() if column not in sources.used}
    if sources.messages:
        example = _read_conversation(row, sources.messages, task)
        label = example.completion if classifies and label is None else label
        return replace(example, messages=_with_system(example.messages, task), label=label, extra=extra, group=group)
    text = _text(row, sources.completion, is_class=classifies)
    answer = strip_text(text)
    if classifies:  # a label is a name: it has no indentation, and white space after it means nothing
        answer = StrippedText(text[: len(text) - len(text.lstrip())], text.strip(), "")
    messages: tuple[Message, ...] = ()
    if sources.prompt is not None:
        messages = _with_system((Message("user", _text(row, sources.prompt)),), task)
    plain = PlainText(answer.before, answer.after, task.separator, task.special_tokens)
    label = answer.text if classifies and label is None else label
    return Example(row.file, row.number, messages, False, answer.text, label, extra, plain, group=group)


def _with_system(messages: tuple[Message, ...], task: TaskConfig) -> tuple[Message, ...]:
    """Return ``messages`` with the task's system message first, unless they have one."""
    if task.system and messages[0].role not in ("system", "developer"):
        return (Message("system", with_line_breaks(task.system)), *messages)
    return messages


def _text(row: RawRow, source: str | RowTemplate | None, is_class: bool = False) -> str:
    if isinstance(source, RowTemplate):
        several = len(source.columns) > 1
        texts = {column: _column_text(row, column, whole_numbers=True, empty=several) for column in source.columns}
        if not any(text.strip() for text in texts.values()):
            detail = "all columns of the template are empty or only white space"
            raise InvalidRow("empty", detail, column=next(iter(texts)))
        return source.render(texts)
    assert source is not None
    return _column_text(row, source, whole_numbers=is_class)


def _column_text(row: RawRow, column: str, whole_numbers: bool, empty: bool = False) -> str:
    """Return the column's text. ``empty``: it may be empty, as another column may fill the template."""
    empty_hint = f'write "{column}": "" where it is empty (pandas: df.fillna(""))' if empty else None
    value = _value(row, column, f"; or {empty_hint}" if empty_hint else "")
    if isinstance(value, Mapping) and "answer_start" in value and isinstance(value.get("text"), list | tuple):
        value = _first_answer(value["text"], column)
    if isinstance(value, Unlabelled):
        raise InvalidRow("no label", f"the class is {value:d}, which marks a row without a label", column=column)
    if whole_numbers and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None and empty_hint:
        raise InvalidRow("not text", "found null", empty_hint, column)
    return value if empty and isinstance(value, str) and not value.strip() else _checked_text(value, column)


def _first_answer(texts: Sequence[object], column: str) -> object:
    """Return the first text of SQuAD's ``answers``: ``{"text": ["Ulm", …], "answer_start": [17, …]}``."""
    if not texts:
        detail = "the question has no answer in its context (SQuAD 2)"
        raise InvalidRow("no answer", detail, column=column)
    return texts[0]


def _value(row: RawRow, column: str, more_hint: str = "") -> object:
    """Return the value of a column that other rows have. Raises :class:`InvalidRow` if this row doesn't have it."""
    if column not in row.values:
        columns = list(row.values)
        if difflib.get_close_matches(column, columns, n=1, cutoff=0.6):
            hint = nearest(column, columns)
        else:
            hint = f"this row has {', '.join(columns) or 'no column'}: give all rows the same columns"
        raise InvalidRow("missing column", f"{column!r} is not in this row", hint + more_hint, column)
    return row.values[column]


def _checked_text(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise InvalidRow("not text", f"found {describe_value(value)}", _text_hint(value, column), column)
    if not value.strip():
        raise InvalidRow("empty", "the text is empty or only white space", column=column)
    if is_blank(value):
        raise InvalidRow("empty", f"the text holds invisible characters only: {value[:10]!r}", column=column)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        detail = "it holds half of a surrogate pair, which no tokenizer can read"
        raise InvalidRow("broken Unicode", detail, column=column) from None
    return value


def _text_hint(value: object, column: str) -> str | None:
    """Return what to do about a value that isn't text."""
    if isinstance(value, bool):
        return f'write it as text, e.g. "{"yes" if value else "no"}"'
    if isinstance(value, int):
        as_text = f'write it as text, "{value}"; or set \'task.KEY="{{{column}}}"\', where KEY is prompt or completion'
        return f"{as_text}; task.kind=classification reads whole numbers as labels"
    if isinstance(value, float) and math.isnan(value):
        return "it marks a missing value: give the row a text, or leave it out with task.invalid_rows=drop"
    if isinstance(value, float) and value.is_integer():
        return f'write it as text, "{value:.0f}" (pandas makes floats of whole numbers where one is missing)'
    if isinstance(value, float):
        return f'write it as text, with the digits that you want to be learned: "{value}"'
    if isinstance(value, Mapping) and value:
        return f"it holds {', '.join(map(str, list(value)[:5]))}: make the one you mean a column with text"
    if isinstance(value, list) and value and isinstance(value[0], Mapping) and "role" in value[0]:
        return "join prompt and completion into one column of messages: task.columns.messages=COLUMN"
    if isinstance(value, Mapping | Sequence | bytes):
        return "make it a column with text"
    return None if value is None else f'write it as text, e.g. "{value}"'


def _read_conversation(row: RawRow, columns: Sequence[str], task: TaskConfig) -> Example:
    every_turn, column = task.learn is Learn.all, columns[-1]
    value = _value(row, column) if len(columns) == 1 else _joined_messages(row, columns)
    *messages, last = read_messages(value, column, task.ignore_fields, _checked_text, every_turn)
    fields = [name for name, value in last.fields.items() if value != ""]
    if task.kind is TaskKind.classification and fields:
        detail = f"the last message has {', '.join(fields)}, and a label is text alone"
        raise InvalidRow("invalid messages", detail, "task.kind=generation", column)
    tools_column = task.columns.tools or ""
    tools = read_tools(row.values.get(tools_column), tools_column)
    variables = read_variables(row.values.get(VARIABLES_COLUMN), VARIABLES_COLUMN)
    if task.source is TaskSource.hub or row.file.lower().endswith(_ARROW_FILES):
        *messages, last = (message.without_nulls() for message in (*messages, last))
        tools = tuple(without_nulls(list(tools))) if tools is not None else None
    last = last.with_text(strip_text(last.content).text)
    separator = task.separator
    if separator is None and not last.content[:1].isspace():
        separator = " "  # the same as after earlier turns' roles, in every script
    return Example(
        *(row.file, row.number, tuple(messages), True, last.content, None, {}),
        plain=PlainText(separator=separator, special_tokens=task.special_tokens),
        answer=last if last.more else None,
        tools=tools,
        variables=variables,
    )


def _joined_messages(row: RawRow, columns: Sequence[str]) -> list[object]:
    """Return the messages of all ``columns``. A text is the user's message, in the last column the assistant's."""
    joined: list[object] = []
    for column in columns:
        value = _value(row, column)
        if isinstance(value, str):
            role = "assistant" if column == columns[-1] else "user"
            joined.append({"role": role, "content": value})
        elif isinstance(value, list):
            joined += value
        else:
            detail = f"expected messages or a text, found {describe_value(value)}"
            raise InvalidRow("invalid messages", detail, column=column)
    return joined
