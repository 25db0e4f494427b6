"""Conversations as a chat template writes them, divided into prompt, answer and end.

What the template writes by itself before the answer, such as Qwen3's empty think block or gpt-oss's channel, belongs to
the prompt. A row is refused if the template leaves out a part of it. docs/chat.md gives the rules with examples.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import jinja2

from qlora_exp.data.chat_template import REASONING_FIELDS, Rendered, render_conversation, select_template
from qlora_exp.data.items import InvalidRow
from qlora_exp.data.messages import TOOL_CALLS, Message
from qlora_exp.data.plain_text import Texts, find_special_token, special_token_error, without_field
from qlora_exp.data.rows import Example

_template_fault = functools.partial(InvalidRow, of_template=True)
_PLACEHOLDER = "907106781186547524"
"""Stands for a text. No template changes digits."""
_REASONING_SWITCHES: tuple[dict[str, Any], ...] = (
    {"enable_thinking": False},
    {"enable_thinking": True},
    {"thinking": False},
    {"thinking": True},
)
"""Variables that change the generation prompt of published templates."""
_FORMAT_HINT = "task.format=plain, or another template: model.chat_template=FILE.jinja"
_MARKS_HINT = "a template that marks answers with {% generation %}: model.chat_template=FILE.jinja; or task.learn=last"
_OTHER_TEMPLATE = "a template that writes it: model.chat_template=FILE.jinja"
_IDENTIFIERS = ("tool_call_id",)
"""Fields that link messages to each other. Many templates leave them out and rely on the messages' order."""


class ChatWriter:
    """Writes conversations with one tokenizer's chat template."""

    def __init__(self, tokenizer: Any, date: datetime.date, control_tokens: Sequence[str]) -> None:
        """Take the tokenizer's template; ``date`` is its current date. No row may contain one of ``control_tokens``."""
        self._template = tokenizer.chat_template
        self._tokens = dict(tokenizer.special_tokens_map)
        self._date = date
        self._control_tokens = tuple(filter(None, control_tokens))
        self._reads_text, self._reads_parts = self._forms()
        self._parses_arguments = self._wants_parsed_arguments()
        self._checked: set[object] = set()
        self._around: dict[object, tuple[str, str, str, Mapping[str, Any] | None]] = {}

    def texts(self, example: Example, every_turn: bool = False) -> Texts:
        """Return the row as text. ``every_turn``: with the ranges of all answers. Raises :class:`InvalidRow`."""
        self._refuse_control_tokens(example)
        *messages, answer = (self._message(message) for message in example.all_messages)
        full = self._render([*messages, answer], example)
        self._refuse_unwritten(example)
        texts = self._known(example, messages, full.text) or self._divided(example, messages, full.text)
        return replace(texts, learned=self._learned_ranges(example, messages, full, texts)) if every_turn else texts

    def prompt(self, text: str) -> str:
        """Return the generation prompt after one user message."""
        example = Example("", 0, (Message("user", text),), False, _PLACEHOLDER, None, {})
        try:
            return self.texts(example).prompt
        except InvalidRow:
            return self._render([self._message(example.messages[0])], example, generation_prompt=True).text

    def _refuse_control_tokens(self, example: Example) -> None:
        """Refuse a row that contains a control token: it would end the answer early, or forge a turn of the chat."""
        hint = "take it out: the format adds the tokens it needs"
        for text in (example.completion, *(message.content for message in example.messages)):
            if token := find_special_token(text, self._control_tokens):
                raise special_token_error(token, hint)
        extras = [message.more for message in example.all_messages if message.more]
        if not extras and not example.tools and not example.variables:
            return
        text = json.dumps([extras, example.tools, example.variables], ensure_ascii=False)
        if token := find_special_token(text, self._control_tokens):
            detail = f"a message's fields or the tools hold {token!r}, which this tokenizer reads as a control token"
            raise InvalidRow("special token in the text", detail, hint)

    def _known(self, example: Example, messages: list[dict[str, Any]], full: str) -> Texts | None:
        """Return the row divided like an earlier row of the same shape, or ``None`` if that doesn't fit."""
        shape = _shape(example)
        if shape not in self._around or example.has_structured_answer:
            return None
        prefix, space, end, variables = self._around[shape]
        completion = space + example.completion
        start = len(full) - len(end) - len(completion)
        if start < 0 or full[start:] != completion + end:
            return None
        prompt = self._render(messages, example, True, None if prefix else variables).text
        if full[:start] != prompt + prefix:
            return None
        return Texts(full[:start], completion, end, prefix=prefix, variables=variables)

    def _divided(self, example: Example, messages: list[dict[str, Any]], full: str) -> Texts:
        """Divide the rendered conversation ``full`` into prompt, answer and end. Raises :class:`InvalidRow`."""
        # What the template writes before and after an answer that is only text:
        placeholder = self._message(Message("assistant", _PLACEHOLDER))
        before, mark, end = self._render([*messages, placeholder], example).text.rpartition(_PLACEHOLDER)
        if not mark:
            raise _answer_changed(example.completion)
        structured = example.has_structured_answer
        if structured and not full.endswith(end):  # then the message ends with a control token
            tokens = "|".join(map(re.escape, sorted(self._control_tokens, key=len, reverse=True)))
            match = re.search(rf"(?:{tokens})\s*\Z", full) if tokens else None
            if match is None:
                raise _no_end_of_turn("the chat template ends this message with no control token")
            end = match.group()
        start = None if structured else _start_of_answer(full, example.completion, before, end)
        for variables in (None, *self._switches(example)):
            prompt = self._render(messages, example, True, variables).text
            if not full.startswith(prompt):
                continue
            if start is None:
                prefix = before[len(prompt) :] if before.startswith(prompt) else ""
                prefix = _strip_prefix(prefix) if full.startswith(prefix, len(prompt)) else ""
            else:
                prefix = _strip_prefix(full[len(prompt) : start])
            begin, stop = len(prompt) + len(prefix), len(full) - len(end)
            if begin >= stop or (prefix and variables is not None):
                continue  # with a switch, the generation prompt must be all that comes before the answer
            if prefix:
                renders = (
                    (switch, self._render(messages, example, True, switch)) for switch in self._switches(example)
                )
                variables = next((switch for switch, rendered in renders if rendered.text == full[:begin]), None)
            if not end.strip():
                raise _no_end_of_turn("the chat template puts nothing after an answer")
            completion = full[begin:stop]
            if start == len(before) >= begin:
                self._around[_shape(example)] = (prefix, full[begin:start], end, variables)
            more = structured or example.completion not in completion
            return Texts(full[:begin], completion, end, more, prefix, variables)
        detail = "the chat template writes the prompt differently when the answer follows"
        raise _template_fault("template without a stable prompt", detail, _FORMAT_HINT)

    def _switches(self, example: Example) -> list[dict[str, Any]]:
        """Return the switches that the template reads and the row doesn't set."""
        text = select_template(self._template, example.tools)
        known = example.variables or {}
        return [switch for switch in _REASONING_SWITCHES if all(name in text and name not in known for name in switch)]

    def _learned_ranges(
        self, example: Example, messages: list[dict[str, Any]], full: Rendered, texts: Texts
    ) -> tuple[tuple[int, int], ...]:
        """Return the ranges of all learned answers in the conversation's text (``task.learn=all``).

        If the template marks answers with ``{% generation %}``, the marks decide, as under TRL's
        ``assistant_only_loss``. Otherwise the conversation is rendered turn by turn. Two things are not learned even if
        they are marked: the generation prompt, and what the template writes by itself before an answer.
        """
        turns = [number for number, message in enumerate(example.messages) if message.role == "assistant"]
        begins = []
        for number in turns:
            prompt = self._render(messages[:number], example, generation_prompt=True).text
            if not full.text.startswith(prompt) and texts.variables is not None:
                prompt = self._render(messages[:number], example, True, texts.variables).text
            if not full.text.startswith(prompt):
                raise _unstable_template("the prompt of an earlier answer")
            has_prefix = full.text.startswith(texts.prefix, len(prompt))
            begins.append(len(prompt) + (len(texts.prefix) if has_prefix else 0))
        begins.append(len(texts.prompt))
        spans: list[list[tuple[int, int]]] = []
        if full.marks:
            for begin, following in pairwise([*begins, len(full.text)]):
                spans.append([(max(start, begin), end) for start, end in full.marks if begin < end <= following])
            for number, turn in enumerate(spans, 1):
                if not turn:
                    detail = f"the chat template marks nothing of answer {number} of {len(spans)}"
                    raise _template_fault("template that leaves answers unmarked", detail, _MARKS_HINT)
            if spans[-1][-1][1] <= len(texts.prompt) + len(texts.completion):
                raise _no_end_of_turn("the chat template's marks leave out the end of the turn", _MARKS_HINT)
        else:
            for begin, number in zip(begins, turns, strict=False):
                through = self._render(messages[: number + 1], example).text
                if not full.text.startswith(through):
                    raise _unstable_template("an earlier answer")
                spans.append([(begin, len(through))])
            spans.append([(begins[-1], len(full.text))])
        learned = [*(example.messages[number].weight != 0 for number in turns), True]
        return tuple(span for turn, is_learned in zip(spans, learned, strict=True) if is_learned for span in turn)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        example: Example,
        generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> Rendered:
        try:
            return self._rendered(
                messages, example.tools, generation_prompt, {**(example.variables or {}), **(variables or {})}
            )
        except jinja2.TemplateError as error:
            hint = _FORMAT_HINT
            if example.tools or any(TOOL_CALLS in m.fields or m.role == "tool" for m in example.all_messages):
                # the plain format can't write tools and tool calls either
                hint = "the template may not know tool calls: model.chat_template=FILE.jinja gives one that does"
            elif example.messages[0].role == "system":
                hint = f"many templates take no system message: task.system=null, {_FORMAT_HINT}"
            raise _template_fault("refused by the chat template", str(error), hint) from None

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> Rendered:
        return render_conversation(
            self._template,
            messages,
            self._tokens,
            generation_prompt=generation_prompt,
            date=self._date,
            tools=list(tools) if tools is not None else None,
            variables=variables,
        )

    def _message(self, message: Message) -> dict[str, Any]:
        """Return the message as this template reads it."""
        fields = dict(message.fields)
        if self._parses_arguments and isinstance(fields.get(TOOL_CALLS), list):
            fields[TOOL_CALLS] = [_with_parsed_arguments(call) for call in fields[TOOL_CALLS]]
        if not message.has_content:
            return {"role": message.role, **fields}
        content: Any = message.content
        texts = message.parts
        if texts is not None and len(texts) > 1 and not self._reads_parts:
            detail = "the content has several parts, and the chat template reads one text"
            hint = "join each message's parts into one text"
            raise _template_fault("parts that the template doesn't read", detail, hint)
        if self._reads_parts and (texts is not None or not self._reads_text):
            content = [{"type": "text", "text": text} for text in (texts or (message.content,))]
        return {"role": message.role, "content": content, **fields}

    def _forms(self) -> tuple[bool, bool]:
        """Return whether the template writes a content that is a text, and one that is a list of parts."""
        text = self._probe([{"role": "user", "content": _PLACEHOLDER}])
        parts = self._probe([{"role": "user", "content": [{"type": "text", "text": _PLACEHOLDER}]}])
        # The list itself may be written, as Python or JSON.
        quoted = f"'{_PLACEHOLDER}'" in parts or f'"{_PLACEHOLDER}"' in parts
        return _PLACEHOLDER in text or _PLACEHOLDER not in parts, _PLACEHOLDER in parts and not quoted

    def _wants_parsed_arguments(self) -> bool:
        """Return whether call arguments given as JSON text must be parsed first.

        If not parsed, the template refuses the text, or writes it as a JSON string that contains JSON."""
        text, parsed = (
            self._probe(
                [
                    {"role": "user", "content": "x"},
                    {
                        "role": "assistant",
                        "content": "",
                        TOOL_CALLS: [
                            {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": arguments}}
                        ],
                    },
                    {"role": "tool", "content": "x", "tool_call_id": "call00000", "name": "f"},
                ]
            )
            for arguments in (f'{{"{_PLACEHOLDER}": 1}}', {_PLACEHOLDER: 1})
        )
        return (not text or f'\\"{_PLACEHOLDER}\\"' in text) and _PLACEHOLDER in parsed

    def _probe(self, messages: list[dict[str, Any]]) -> str:
        """Return the messages as text; empty if the template refuses them."""
        try:
            return self._rendered(messages).text
        except jinja2.TemplateError:
            return ""

    def _refuse_unwritten(self, example: Example) -> None:
        """Refuse a row if the template leaves out a part of it. Rows of the same shape are checked once."""
        shape = _shape(example)
        if shape in self._checked:
            return
        messages = [
            self._message(_with_placeholder(message, number)) for number, message in enumerate(example.all_messages)
        ]
        try:
            text = self._rendered(messages, example.tools, False, example.variables).text
            self._check_contents(example, messages, text)
            self._check_fields(example, messages, text)
        except jinja2.TemplateError:
            return  # the template depends on what the messages say; it has written the row itself
        self._checked.add(shape)

    def _check_contents(self, example: Example, messages: list[dict[str, Any]], text: str) -> None:
        for number, message in enumerate(example.all_messages):
            if message.content and _placeholder(number) not in text:
                if number == len(messages) - 1:
                    raise _answer_changed(example.completion)
                role = f"{message.role} with {', '.join(message.fields)}" if message.fields else message.role
                detail = f"the chat template doesn't write the content of message {number + 1} ({role})"
                hint = f"write it as a system or user message; or {_OTHER_TEMPLATE}"
                raise _template_fault("message that the template leaves out", detail, hint)
        if example.tools and text == self._rendered(messages, None, False, example.variables).text:
            detail = "the chat template doesn't write the tools"
            hint = f"task.columns.tools=null leaves them out; or {_OTHER_TEMPLATE}"
            raise _template_fault("tools that the template leaves out", detail, hint)
        for name in example.variables or {}:
            if name not in select_template(self._template, example.tools):
                detail = f"the chat template has no variable {name!r} (chat_template_kwargs)"
                raise _template_fault("variable that the template doesn't have", detail, "take it out of the column")

    def _check_fields(self, example: Example, messages: list[dict[str, Any]], text: str) -> None:
        for number, message in enumerate(messages):
            for name, value in message.items():
                is_last = number == len(messages) - 1
                if name in ("role", "content") or value == "" or _may_be_left_out(name, message, is_last):
                    continue
                aliases = REASONING_FIELDS if name in REASONING_FIELDS else (name,)
                without = {key: value for key, value in message.items() if key not in aliases}
                others = [*messages[:number], without, *messages[number + 1 :]]
                try:
                    is_written = text != self._rendered(others, example.tools, False, example.variables).text
                except jinja2.TemplateError:
                    is_written = True
                if not is_written:
                    detail = f"the chat template doesn't write the field {name!r} of message {number + 1}"
                    hint = f"{without_field(name)}; or {_OTHER_TEMPLATE}"
                    raise _template_fault(f"field {name!r} that the template leaves out", detail, hint)


def _strip_prefix(written: str) -> str:
    """Return ``written`` without trailing white space, which tokenizers join with the answer; "" if it is blank."""
    return written.rstrip(" \t") if written.strip() else ""


def _start_of_answer(full: str, answer: str, before: str, end: str) -> int:
    for written in (answer, answer.strip()):  # many templates trim what they write
        if full == before + written + end:
            return len(before)
        if full.endswith(written + end):  # the template parses the answer's reasoning and writes it back in place
            return len(full) - len(written) - len(end)
    raise _answer_changed(answer)


def _answer_changed(answer: str) -> InvalidRow:
    hint = _FORMAT_HINT
    if "</think>" in answer:
        hint = f"give the reasoning as reasoning_content of the message (task.columns.messages), {hint}"
    return _template_fault("template changes the answer", "the chat template doesn't write it as it is", hint)


def _no_end_of_turn(what: str, hint: str = _FORMAT_HINT) -> InvalidRow:
    detail = f"{what}: the model would never learn to stop"
    return _template_fault("template without an end of turn", detail, hint)


def _unstable_template(what: str) -> InvalidRow:
    detail = f"the chat template writes {what} differently when further messages follow"
    return _template_fault("template that rewrites earlier turns", detail, _MARKS_HINT)


def _shape(example: Example) -> object:
    """Return a key that is equal for rows with the same roles and fields, the same of them empty."""
    shapes = []
    for message in example.all_messages:
        fields = sorted((name, value != "") for name, value in message.fields.items())
        shapes.append((message.role, tuple(fields), bool(message.content), message.parts is None))
    variables = json.dumps(example.variables, sort_keys=True) if example.variables else None
    return tuple(shapes), bool(example.tools), variables


def _placeholder(number: int) -> str:
    return f"{_PLACEHOLDER}{number:04}"


def _with_placeholder(message: Message, number: int) -> Message:
    """Return the message with digits in place of its text."""
    if not message.content:
        return message
    parts = tuple(_placeholder(number) for _ in message.parts) if message.parts is not None else None
    return replace(message, content=_placeholder(number), parts=parts)


def _may_be_left_out(name: str, message: Mapping[str, Any], last: bool) -> bool:
    """Return whether a template may omit the field: earlier answers' reasoning, or what names a tool call again."""
    earlier_reasoning = name in REASONING_FIELDS and message["role"] == "assistant" and not last
    return earlier_reasoning or name in _IDENTIFIERS or (name == "name" and message["role"] == "tool")


def _with_parsed_arguments(call: Any) -> Any:
    """Return the tool call with its arguments as an object, if they are the JSON text of one."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_parsed_arguments(call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    return {**call, "arguments": parsed} if isinstance(parsed, dict) else call
