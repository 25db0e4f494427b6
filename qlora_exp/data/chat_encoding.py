"""Conversations as a chat template writes them, divided into prompt, answer and end.

What the template writes by itself before the answer, such as Qwen3's empty think block or gpt-oss's channel, belongs to
the prompt. A row is refused if the template leaves out a part of it. docs/chat.md gives the rules with examples.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2

from qlora_exp.data.assistant_mask import learned_ranges
from qlora_exp.data.chat_template import REASONING_FIELDS, Rendered, render_conversation, select_template
from qlora_exp.data.example_text import FORMAT_HINT, RowRefused, Texts
from qlora_exp.data.messages import TOOL_CALLS, Message
from qlora_exp.data.rows import Example

PLACEHOLDER = "907106781186547524"
"""Stands for a text. No template changes digits."""
REASONING_SWITCHES: tuple[dict[str, Any], ...] = (
    {"enable_thinking": False},
    {"enable_thinking": True},
    {"thinking": False},
    {"thinking": True},
)
"""Variables that change the generation prompt of published templates."""
OTHER_TEMPLATE = "a template that writes it: model.chat_template=FILE.jinja"
IDENTIFIERS = ("tool_call_id",)
"""Fields that link messages to each other. Many templates leave them out and rely on the messages' order."""


LOSS_FIELDS = ("train", "training", "trainable", "loss", "mask", "masked")
"""Fields in which other trainers say whether an answer is learned."""


class ChatWriter:
    """Writes conversations with one tokenizer's chat template."""

    def __init__(self, tokenizer: Any, date: datetime.date, control_tokens: Sequence[str]) -> None:
        """Take the tokenizer's template; ``date`` is its current date. No row may contain one of ``control_tokens``."""
        self._template = tokenizer.chat_template
        self._tokens = dict(tokenizer.special_tokens_map)
        self._date = date
        self._control_tokens = tuple(token for token in control_tokens if token)
        self._reads_text, self._reads_parts = self._forms()
        self._parses_arguments = self._wants_parsed_arguments()
        self._checked: set[object] = set()
        self._around: dict[object, tuple[str, str, str, Mapping[str, Any] | None]] = {}

    def texts(self, example: Example, every_turn: bool = False) -> Texts:
        """Return the row as text. ``every_turn``: with the ranges of all answers. Raises :class:`RowRefused`."""
        self._refuse_control_tokens(example)
        messages = [self._message(message) for message in example.messages]
        answer = self._message(example.answer or Message("assistant", example.completion))
        full = self._render([*messages, answer], example)
        self._refuse_unwritten(example)
        texts = self._known(example, messages, full.text) or self._divided(example, messages, full.text)
        if not every_turn:
            return texts

        def prompt_of(count: int) -> str:
            default = self._render(messages[:count], example, generation_prompt=True).text
            if full.text.startswith(default) or texts.variables is None:
                return default
            return self._render(messages[:count], example, True, texts.variables).text

        def through(count: int) -> str:
            return self._render(messages[:count], example).text

        return learned_ranges(texts, full, example, prompt_of, through)

    def prompt(self, text: str) -> str:
        """Return the generation prompt after one user message."""
        example = Example("", 0, (Message("user", text),), False, PLACEHOLDER, None, {})
        try:
            return self.texts(example).prompt
        except RowRefused:
            return self._render([self._message(example.messages[0])], example, generation_prompt=True).text

    def _known(self, example: Example, messages: list[dict[str, Any]], full: str) -> Texts | None:
        """Return the row divided like an earlier row of the same shape, or ``None`` if that doesn't fit."""
        shape = _shape(example)
        if shape not in self._around or _has_structured_answer(example):
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
        """Divide the rendered conversation ``full`` into prompt, answer and end. Raises :class:`RowRefused`."""
        before, end = self._around_answer(example, messages)
        structured = _has_structured_answer(example)
        if structured and not full.endswith(end):
            end = self._last_control_token(full)
        start = None if structured else _start_of_answer(full, example.completion, before, end)
        for variables, prompt in self._prompts(example, messages):
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
                variables = self._switch_for(example, messages, full[:begin])
            if not end.strip():
                raise _no_end_of_turn("puts nothing after an answer")
            completion = full[begin:stop]
            if start == len(before) >= begin:
                self._around[_shape(example)] = (prefix, full[begin:start], end, variables)
            more = structured or example.completion not in completion
            return Texts(full[:begin], completion, end, more, prefix, variables)
        detail = "the chat template writes the prompt differently when the answer follows"
        raise RowRefused("template without a stable prompt", detail, FORMAT_HINT, of_template=True)

    def _prompts(
        self, example: Example, messages: list[dict[str, Any]]
    ) -> Iterator[tuple[Mapping[str, Any] | None, str]]:
        """Yield the generation prompt, then those that the template's known variables give."""
        yield None, self._render(messages, example, generation_prompt=True).text
        for switch in self._switches(example):
            yield switch, self._render(messages, example, True, switch).text

    def _switches(self, example: Example) -> list[dict[str, Any]]:
        """Return the switches that the template reads and the row doesn't set."""
        text = select_template(self._template, example.tools)
        known = example.variables or {}
        return [switch for switch in REASONING_SWITCHES if all(name in text and name not in known for name in switch)]

    def _switch_for(self, example: Example, messages: list[dict[str, Any]], prompt: str) -> Mapping[str, Any] | None:
        for switch in self._switches(example):
            if self._render(messages, example, True, switch).text == prompt:
                return switch
        return None

    def _around_answer(self, example: Example, messages: list[dict[str, Any]]) -> tuple[str, str]:
        """Return what the template writes before and after an answer that is only text."""
        text = self._render([*messages, self._message(Message("assistant", PLACEHOLDER))], example).text
        before, mark, end = text.rpartition(PLACEHOLDER)
        if not mark:
            raise _answer_changed(example)
        return before, end

    def _last_control_token(self, full: str) -> str:
        tokens = "|".join(map(re.escape, sorted(self._control_tokens, key=len, reverse=True)))
        match = re.search(rf"(?:{tokens})\s*\Z", full) if tokens else None
        if match is None:
            raise _no_end_of_turn("ends this message with no control token")
        return match.group()

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
            hint = _refusal_hint(example)
            raise RowRefused("refused by the chat template", str(error), hint, of_template=True) from None

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
        if self._parses_arguments and TOOL_CALLS in fields:
            fields[TOOL_CALLS] = _with_parsed_arguments(fields[TOOL_CALLS])
        if not message.has_content:
            return {"role": message.role, **fields}
        content: Any = message.content
        texts = message.parts
        if texts is not None and len(texts) > 1 and not self._reads_parts:
            detail = "the content has several parts, and the chat template reads one text"
            hint = "join each message's parts into one text"
            raise RowRefused("parts that the template doesn't read", detail, hint, of_template=True)
        if self._reads_parts and (texts is not None or not self._reads_text):
            content = [{"type": "text", "text": text} for text in (texts or (message.content,))]
        return {"role": message.role, "content": content, **fields}

    def _forms(self) -> tuple[bool, bool]:
        """Return whether the template writes a content that is a text, and one that is a list of parts."""
        text, parts = self._probe(PLACEHOLDER), self._probe([{"type": "text", "text": PLACEHOLDER}])
        quoted = (
            f"'{PLACEHOLDER}'" in parts or f'"{PLACEHOLDER}"' in parts
        )  # the list itself is written, as Python or JSON
        return PLACEHOLDER in text or PLACEHOLDER not in parts, PLACEHOLDER in parts and not quoted

    def _probe(self, content: Any) -> str:
        try:
            return self._rendered([{"role": "user", "content": content}]).text
        except jinja2.TemplateError:
            return ""

    def _wants_parsed_arguments(self) -> bool:
        """Return whether call arguments given as JSON text must be parsed first.

        If not parsed, the template refuses the text, or writes it as a JSON string that contains JSON."""
        text = self._probe_call(f'{{"{PLACEHOLDER}": 1}}')
        return (not text or f'\\"{PLACEHOLDER}\\"' in text) and PLACEHOLDER in self._probe_call({PLACEHOLDER: 1})

    def _probe_call(self, arguments: Any) -> str:
        call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": arguments}}
        user = {"role": "user", "content": "x"}
        assistant = {"role": "assistant", "content": "", TOOL_CALLS: [call]}
        tool = {"role": "tool", "content": "x", "tool_call_id": "call00000", "name": "f"}
        try:
            return self._rendered([user, assistant, tool]).text
        except jinja2.TemplateError:
            return ""

    def _refuse_control_tokens(self, example: Example) -> None:
        """Refuse a control token in a field or a tool: like one in a text, it would forge a turn."""
        messages = [*example.messages, *([example.answer] if example.answer else [])]
        extras = [message.more for message in messages if message.more]
        if not extras and not example.tools and not example.variables:
            return
        text = json.dumps([extras, example.tools, example.variables], ensure_ascii=False)
        for token in self._control_tokens:
            if token in text:
                detail = (
                    f"a message's fields or the tools hold {token!r}, which this tokenizer reads as a control token"
                )
                raise RowRefused(
                    "special token in the text", detail, "take it out: the format adds the tokens it needs"
                )

    def _refuse_unwritten(self, example: Example) -> None:
        """Refuse a row if the template leaves out a part of it. Rows of the same shape are checked once."""
        shape = _shape(example)
        if shape in self._checked:
            return
        last = example.answer or Message("assistant", example.completion)
        messages = [
            self._message(_with_placeholder(message, number))
            for number, message in enumerate((*example.messages, last))
        ]
        try:
            self._check_contents(example, last, messages)
            self._check_fields(example, messages)
        except jinja2.TemplateError:
            return  # the template depends on what the messages say; it has written the row itself
        self._checked.add(shape)

    def _check_contents(self, example: Example, last: Message, messages: list[dict[str, Any]]) -> None:
        text = self._again(example, messages)
        for number, message in enumerate((*example.messages, last)):
            if message.content and _placeholder(number) not in text:
                if number == len(messages) - 1:
                    raise _answer_changed(example)
                detail = (
                    f"the chat template doesn't write the content of message {number + 1} ({_describe_role(message)})"
                )
                hint = f"write it as a system or user message; or {OTHER_TEMPLATE}"
                raise RowRefused("message that the template leaves out", detail, hint, of_template=True)
        if example.tools and text == self._rendered(messages, None, False, example.variables).text:
            detail = "the chat template doesn't write the tools"
            hint = f"task.columns.tools=null leaves them out; or {OTHER_TEMPLATE}"
            raise RowRefused("tools that the template leaves out", detail, hint, of_template=True)
        for name in example.variables or {}:
            if name not in select_template(self._template, example.tools):
                detail = f"the chat template has no variable {name!r} (chat_template_kwargs)"
                hint = "take it out of the column"
                raise RowRefused("variable that the template doesn't have", detail, hint, of_template=True)

    def _check_fields(self, example: Example, messages: list[dict[str, Any]]) -> None:
        text = self._again(example, messages)
        for number, message in enumerate(messages):
            for name in message:
                if name in ("role", "content") or _may_be_left_out(name, message, number == len(messages) - 1):
                    continue
                if message[name] == "":  # it has no text that could be missing
                    continue
                without = {key: value for key, value in message.items() if key not in _aliases(name)}
                try:
                    changed = text != self._again(example, [*messages[:number], without, *messages[number + 1 :]])
                except jinja2.TemplateError:
                    changed = True
                if not changed:
                    detail = f"the chat template doesn't write the field {name!r} of message {number + 1}"
                    hint = f"{_without_field(name)}; or {OTHER_TEMPLATE}"
                    raise RowRefused(f"field {name!r} that the template leaves out", detail, hint, of_template=True)

    def _again(self, example: Example, messages: Sequence[Mapping[str, Any]]) -> str:
        return self._rendered(messages, example.tools, False, example.variables).text


def refuse_chat_only_content(example: Example) -> None:
    """Raise :class:`RowRefused` if a row holds something that only a chat template can write."""
    messages = [*example.messages, *([example.answer] if example.answer else [])]
    names = [name for message in messages for name, value in message.fields.items() if value != ""]
    roles = {"tool": "take the calls and their results out", "developer": "name the role system"}
    unsupported = [
        (f"the field {name!r}", roles["tool"] if name == TOOL_CALLS else _without_field(name)) for name in names
    ]
    unsupported += [(f"a message of the role {m.role}", roles[m.role]) for m in messages if m.role in roles]
    unsupported += [("tools", "task.columns.tools=null leaves them out")] if example.tools else []
    unsupported += [("chat_template_kwargs", "take the column out")] if example.variables else []
    if unsupported:
        what, instead = unsupported[0]
        raise RowRefused("not for the plain format", f"the row has {what}", f"task.format=chat; or {instead}")


def _without_field(name: str) -> str:
    ignored = f"task.ignore_fields=[{name}] leaves it out"
    if name in LOSS_FIELDS:
        return f"if it says whether the answer is learned, write it as weight: 0 or 1; else {ignored}"
    return ignored


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


def _answer_changed(answer: Example | str) -> RowRefused:
    text = answer if isinstance(answer, str) else answer.completion
    hint = FORMAT_HINT
    if "</think>" in text:
        hint = f"give the reasoning as reasoning_content of the message (task.columns.messages), {hint}"
    return RowRefused(
        "template changes the answer", "the chat template doesn't write it as it is", hint, of_template=True
    )


def _no_end_of_turn(what: str) -> RowRefused:
    detail = f"the chat template {what}: the model would never learn to stop"
    return RowRefused("template without an end of turn", detail, FORMAT_HINT, of_template=True)


def _has_structured_answer(example: Example) -> bool:
    return example.answer is not None and bool(example.answer.fields)


def _shape(example: Example) -> object:
    """Return a key that is equal for rows with the same roles and fields, the same of them empty."""
    messages = (*example.messages, example.answer or Message("assistant", example.completion))
    shapes = [(m.role, _filled(m.fields), bool(m.content), m.parts is None) for m in messages]
    variables = json.dumps(example.variables, sort_keys=True) if example.variables else None
    return tuple(shapes), bool(example.tools), variables


def _filled(fields: Mapping[str, Any]) -> tuple[tuple[str, bool], ...]:
    return tuple(sorted((name, value != "") for name, value in fields.items()))


def _placeholder(number: int) -> str:
    return f"{PLACEHOLDER}{number:04}"


def _with_placeholder(message: Message, number: int) -> Message:
    """Return the message with digits in place of its text."""
    if not message.content:
        return message
    parts = tuple(_placeholder(number) for _ in message.parts) if message.parts is not None else None
    return Message(message.role, _placeholder(number), message.fields, parts, message.weight, message.has_content)


def _refusal_hint(example: Example) -> str:
    """Return what to do if the template raises an error. The plain format can't write tools and tool calls either."""
    answer = example.answer or Message("assistant", example.completion)
    if example.tools or any(TOOL_CALLS in m.fields or m.role == "tool" for m in (*example.messages, answer)):
        return "the template may not know tool calls: model.chat_template=FILE.jinja gives one that does"
    if example.messages[0].role == "system":
        return f"many templates take no system message: task.system=null, {FORMAT_HINT}"
    return FORMAT_HINT


def _describe_role(message: Message) -> str:
    return f"{message.role} with {', '.join(message.fields)}" if message.fields else message.role


def _aliases(name: str) -> tuple[str, ...]:
    return REASONING_FIELDS if name in REASONING_FIELDS else (name,)


def _may_be_left_out(name: str, message: Mapping[str, Any], last: bool) -> bool:
    """Return whether a template may omit the field: earlier answers' reasoning, or what names a tool call again."""
    earlier_reasoning = name in REASONING_FIELDS and message["role"] == "assistant" and not last
    return earlier_reasoning or name in IDENTIFIERS or (name == "name" and message["role"] == "tool")


def _with_parsed_arguments(calls: Any) -> Any:
    return [_with_parsed(call) for call in calls] if isinstance(calls, list) else calls


def _with_parsed(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_parsed(call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    return {**call, "arguments": parsed} if isinstance(parsed, dict) else call
