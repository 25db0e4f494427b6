"""Render chat templates exactly as transformers does, without importing transformers or torch."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

ChatTemplate = str | Mapping[str, str]
"""One template, or several by name: ``default`` and, for conversations with tools, ``tool_use``."""

CLOCK = re.compile(r"\bstrftime_now\b")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""The fields in which data sets hold a message's reasoning. Templates read the first two."""


class Generation(jinja2.ext.Extension):
    """Jinja extension for ``{% generation %}``, which marks the assistant's text in transformers' chat templates."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(marks_of=self.marks_of)
        self._blocks: list[str] | None = None
        self._marks: list[tuple[int, int]] = []

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        text = str(caller())
        if self._blocks is not None:
            start = sum(map(len, self._blocks))
            self._marks.append((start, start + len(text)))
        return text

    @contextlib.contextmanager
    def marks_of(self, blocks: list[str]) -> Iterator[list[tuple[int, int]]]:
        """Collect the marked ranges of the text whose pieces the caller appends to ``blocks`` in the meantime."""
        self._blocks, self._marks = blocks, []
        try:
            yield self._marks
        finally:
            self._blocks = None


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. ``marks``: the ranges of characters inside ``{% generation %}``, in order."""

    text: str
    marks: tuple[tuple[int, int], ...]


def reads_clock(template: ChatTemplate | None) -> bool:
    """Return whether the rendered text depends on the day."""
    texts = [template] if isinstance(template, str) else list((template or {}).values())
    return any(CLOCK.search(text) for text in texts)


def select_template(template: ChatTemplate, tools: Sequence[Any] | None) -> str:
    """Return the template that transformers would choose.

    Raises:
        jinja2.TemplateError: there are several, and none is the default.
    """
    if isinstance(template, str):
        return template
    if tools is not None and "tool_use" in template:
        return template["tool_use"]
    if "default" not in template:
        raise jinja2.TemplateError(f"none of the chat templates {', '.join(sorted(template))} is named default")
    return template["default"]


def render_conversation(
    template: ChatTemplate,
    conversation: Sequence[Mapping[str, Any]],
    tokens: Mapping[str, str],
    *,
    generation_prompt: bool,
    date: datetime.date,
    tools: Sequence[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Rendered:
    """Return ``conversation`` as ``template`` writes it. ``tokens``: ``bos_token``, ``eos_token`` …

    A template that asks for the time gets ``date``. ``variables``: further ones, e.g. ``enable_thinking``.

    Raises:
        jinja2.TemplateError: the template is not valid Jinja, or it refuses the conversation.
    """
    context = {
        "messages": [_template_message(message) for message in conversation],
        "tools": tools,
        "documents": None,
        "add_generation_prompt": generation_prompt,
        **tokens,
        **(variables or {}),
        "strftime_now": datetime.datetime.combine(date, datetime.time()).strftime,
    }
    try:
        compiled = _compiled(select_template(template, tools))
        blocks: list[str] = []
        with compiled.environment.marks_of(blocks) as marks:  # type: ignore[attr-defined]  # Generation's
            for block in compiled.generate(context):
                blocks.append(block)
        return Rendered("".join(blocks), tuple(marks))
    except (ArithmeticError, LookupError, AttributeError, RecursionError, TypeError, ValueError) as error:
        raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from None


def _template_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message without nulls, with its reasoning under both names that templates read."""
    present = {key: value for key, value in message.items() if value is not None}
    reasoning = next((present[key] for key in REASONING_FIELDS if key in present), None)
    return present if reasoning is None else {"thinking": reasoning, **present, "reasoning_content": reasoning}


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
