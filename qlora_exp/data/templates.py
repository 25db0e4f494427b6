"""Prompt and completion templates, and the settings that read common data sets.

Templates allow ``{column}`` only: no attributes, indices, conversions or formats. A written-out ``\\n`` or ``\\t`` is a
line break or a tab, because a shell and Hydra pass it on as two characters.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Collection, Sequence
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


_CONVERSATIONS = ("messages", "conversations", "conversation")
_TWO_PROMPTS = (
    *(("instruction", "input", "output"), ("instruction", "input", "response")),
    *(("instruction", "context", "output"), ("instruction", "context", "response")),
    ("context", "question", "answer"),
)
_PAIRS = (
    *(("question", "answer"), ("question", "response"), ("query", "response")),
    *(("prompt", "response"), ("prompt", "output"), ("prompt", "answer")),
    *(("input", "output"), ("input", "target"), ("source", "target")),
    *(("article", "highlights"), ("document", "summary"), ("dialogue", "summary")),
    *(("instruction", "output"), ("instruction", "response")),
)
_TEXTS = ("text", "sentence", "prompt", "review", "content", "title", "comment_text", "tweet")
_TWO_TEXTS = (
    *(("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2")),
    *(("text1", "text2"), ("question", "sentence")),
)
_LABELS = ("label", "labels", "category", "intent", "sentiment", "class", "target", "label_text")


def columns_hint(columns: Collection[str]) -> str | None:
    """Return the settings that read rows with these columns, ready to type; ``None`` if the columns are not known."""
    conversation = next((name for name in _CONVERSATIONS if name in columns), None)
    if conversation:
        return f"the rows hold messages: set task.columns.messages={conversation}"
    if {"chosen", "rejected"} <= set(columns):
        return "the rows hold preferences (chosen, rejected): write the answer to learn as text into a separate column"
    if {"data", "annotations"} <= set(columns):
        return "the rows seem to be Label Studio's JSON: export JSON-MIN or CSV there, which have a column per field"
    for first, second, answer in _TWO_PROMPTS:
        if {first, second, answer} <= set(columns):
            return f"set {_templates((first, second), answer)}"
    if {"context", "question", "answers"} <= set(columns):
        templates = _templates(("context", "question"), "answer")
        return f"write the answer to learn (answers holds several) as text into a column answer; then set {templates}"
    for prompt, completion in _PAIRS:
        if {prompt, completion} <= set(columns):
            return f"set task.columns.prompt={prompt} task.columns.completion={completion}"
    text = next((name for name in _TEXTS if name in columns), None)
    label = next((name for name in _LABELS if name in columns), None)
    texts = next((pair for pair in _TWO_TEXTS if {*pair} <= set(columns)), None)
    if texts and label:
        return f"set task.kind=classification {_template('prompt', texts)} task.columns.label={label}"
    if text and label:
        return f"set task.kind=classification task.columns.prompt={text} task.columns.label={label}"
    if list(columns) == ["text"]:
        return "the rows hold whole texts: divide each into a prompt and a completion, in two columns"
    return None


def _templates(prompt: Sequence[str], completion: str) -> str:
    """Return both templates, quoted for Hydra and again for the shell."""
    return f"{_template('prompt', prompt)} {_template('completion', [completion])}"


def _template(key: str, columns: Sequence[str]) -> str:
    text = "\\n".join(f"{{{column}}}" for column in columns)
    return f"'task.{key}=\"{text}\"'"
