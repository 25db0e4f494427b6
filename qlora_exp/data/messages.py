"""The messages of a conversation as a data file holds them, with tool calls, reasoning and weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_exp.data.contents import DuplicateKey, parse_json
from qlora_exp.data.items import InvalidRow
from qlora_exp.errors import nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
    **dict.fromkeys(("function", "observation"), "tool"),
}
"""ShareGPT's roles, and ours."""
_STANDARD_FIELDS = ("role", "content", "weight")
TOOL_CALLS = "tool_calls"


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: str
    content: str
    """The message's text; empty if it has none, e.g. if it only calls a tool."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further fields as they are in the file, e.g. ``tool_calls``, without nulls, empty lists and empty objects."""
    parts: tuple[str, ...] | None = None
    """The texts of the parts, if the file gives the content as a list of parts."""
    weight: float | None = None
    """0: the answer isn't learned. 1: it is learned. ``None``: the file doesn't say."""
    has_content: bool = True
    """False if the content is null or missing."""

    def without_nulls(self) -> Message:
        return replace(self, fields=without_nulls(dict(self.fields)))

    def with_text(self, text: str) -> Message:
        """Return the message with ``text``, which is its own text without white space at the ends."""
        parts = self.parts
        if parts is not None:
            parts = (text,) if len(parts) == 1 else (parts[0].lstrip(), *parts[1:-1], parts[-1].rstrip())
        return replace(self, content=text, parts=parts)

    @property
    def more(self) -> dict[str, Any]:
        """Return what the message has in addition to its role and text."""
        parts = {"parts": list(self.parts)} if self.parts is not None else {}
        weight = {"weight": self.weight} if self.weight is not None else {}
        return {**self.fields, **parts, **weight}


def read_messages(
    value: object,
    column: str,
    ignored_fields: Sequence[str],
    checked_text: Callable[[object, str], str],
    every_turn: bool,
) -> list[Message]:
    """Return the conversation, which ends with the learned answer. Raises :class:`InvalidRow`.

    ``checked_text`` reads and checks one text. ``every_turn``: earlier answers are learned, too.
    """
    shape = 'write [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'
    entries = _list(value, column, "messages", shape)
    if not entries:
        raise InvalidRow("invalid messages", "expected a list of messages, found an empty list", shape, column)
    messages = [
        _read_message(entry, number, f"{column}[{number}]", ignored_fields, checked_text)
        for number, entry in enumerate(entries, 1)
    ]
    roles = [message.role for message in messages]
    if roles[-1] != "assistant" or len(roles) == 1:  # the chat template checks the other roles
        hint = "the last message is the assistant's, and another one comes before it"
        if "assistant" in roles[1:]:
            hint = "take out the messages after the last answer, which are not learned; " + hint
        raise InvalidRow("invalid messages", f"the roles are {', '.join(roles)}", hint, column)
    if messages[-1].weight == 0:
        hint = "leave the row out, or end the conversation on an answer that is learned"
        raise InvalidRow("an answer that isn't learned", "the last answer has the weight 0", hint, column)
    for number, message in enumerate(messages[:-1], 1):
        if message.role == "assistant" and message.weight == 1 and not every_turn:
            detail = f"message {number} has the weight 1, and task.learn=last learns the last answer alone"
            raise InvalidRow("an answer that would not be learned", detail, "task.learn=all", column)
    return messages


def read_tools(value: object, column: str) -> tuple[Any, ...] | None:
    """Return the tools that the assistant may call, from a list of JSON schemas or its JSON text; ``None`` if none."""
    if _is_missing(value):
        return None
    shape = 'write [{"type": "function", "function": {"name": "…", "parameters": {…}}}]; or task.columns.tools=null'
    tools = _list(value, column, "tools", shape)
    for number, tool in enumerate(tools, 1):
        if not isinstance(tool, dict):
            detail = f"tool {number} is {describe_value(tool)}, not an object"
            raise InvalidRow("invalid tools", detail, shape, column)
    _check_json(tools, column, "task.columns.tools=null")
    return tuple(tools) or None


def read_variables(value: object, column: str) -> Mapping[str, Any] | None:
    """Return the variables for the chat template, from an object or its JSON text; ``None`` if there are none."""
    if _is_missing(value):
        return None
    shape = 'write {"enable_thinking": false}'
    if isinstance(value, str):
        value = _parsed(value, column, "variables", shape)
    if not isinstance(value, dict):
        detail = f"expected an object, found {describe_value(value)}"
        raise InvalidRow("invalid variables", detail, shape, column)
    _check_json(value, column, "take it out of the column")
    return {name: item for name, item in value.items() if item is not None} or None


def without_nulls(value: Any) -> Any:
    """Return lists and objects without nulls: Arrow writes one for every key that only other rows have."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def describe_value(value: object) -> str:
    """Return a value as an error message shows it: its type and how it begins."""
    if value is None:
        return "null"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        text = "nested too deeply"
    return f"{type(value).__name__} {text[:60]}{'…' if len(text) > 60 else ''}"


def _list(value: object, column: str, name: str, shape: str) -> list[Any]:
    if isinstance(value, str):  # a CSV file can hold a list only as JSON
        value = _parsed(value, column, name, shape)
    if not isinstance(value, list):
        detail = f"expected a list of {name}, found {describe_value(value)}"
        raise InvalidRow(f"invalid {name}", detail, shape, column)
    return value


def _parsed(text: str, column: str, name: str, shape: str) -> Any:
    try:
        return parse_json(text)
    except DuplicateKey as duplicate:
        raise InvalidRow("duplicate key", str(duplicate), "keep one of the two", column) from None
    except (ValueError, RecursionError) as error:
        if _PYTHON_LIST.match(text):
            shape = f"str() wrote it, not json.dumps: df[{column!r}] = df[{column!r}].map(json.dumps) before df.to_csv"
        raise InvalidRow(f"invalid {name}", f"the text is not JSON: {error}", shape, column) from None


_PYTHON_LIST = re.compile(r"\s*[\[(]?\s*\{\s*'")
"""How ``str()`` of a list of dictionaries begins, or of a numpy array of them."""


def _is_missing(value: object) -> bool:
    """Return whether the value is missing: null, or in a CSV file an empty cell or the word null."""
    return value is None or (isinstance(value, str) and value.strip() in ("", "null"))


def _read_message(
    entry: object, number: int, where: str, ignored: Sequence[str], checked_text: Callable[[object, str], str]
) -> Message:
    if isinstance(entry, dict) and entry.get("role") is None and {"from", "value"} <= set(entry):
        sender = entry["from"]
        others = {key: value for key, value in entry.items() if key not in ("from", "value", "role", "content")}
        entry = {"role": _SHAREGPT.get(str(sender), sender), "content": entry["value"], **others}
    if not isinstance(entry, dict) or "role" not in entry:
        hint = 'each message is {"role": "…", "content": "…"}'
        raise InvalidRow("invalid messages", f"message {number} has no role and content", hint, where)
    role = entry["role"]
    if not isinstance(role, str) or role not in ROLES:
        hint = f"did you mean {_SHAREGPT[str(role)]}?" if str(role) in _SHAREGPT else nearest(str(role), ROLES)
        raise InvalidRow("invalid messages", f"message {number} has the role {role!r}", hint, where)
    fields = {
        name: value
        for name, value in entry.items()
        if name not in _STANDARD_FIELDS and name not in ignored and value is not None and value not in ([], {})
    }
    for name, value in fields.items():
        _check_json(value, where, f"write it as text; or leave it out: task.ignore_fields=[{name}]")
    weight = entry.get("weight") if "weight" not in ignored else None
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (is_number and weight in (0, 1)):
        detail = f"message {number} has the weight {describe_value(weight)}"
        raise InvalidRow("invalid messages", detail, "0: not learned; 1, or no weight: learned", where)
    weight = None if weight is None else float(weight)
    content = entry.get("content")
    if role == "assistant" and TOOL_CALLS in fields and (content is None or content == ""):
        return Message(role, "", fields, None, weight, has_content=content is not None)
    if role == "tool" and content == "":  # the tool returned nothing
        return Message(role, "", fields, None, weight)
    if "content" not in entry:
        raise InvalidRow("invalid messages", f"message {number} has no content", 'add "content": "…"', where)
    if isinstance(content, list):
        parts = tuple(_part(part, number, where, checked_text) for part in content)
        if not parts:
            raise InvalidRow("invalid messages", f"message {number} has no parts", "write its text", where)
        return Message(role, "".join(parts), fields, parts, weight)
    return Message(role, checked_text(content, where), fields, None, weight)


def _part(part: object, number: int, where: str, checked_text: Callable[[object, str], str]) -> str:
    hint = 'write each part as {"type": "text", "text": "…"}; images, sounds and videos can\'t be trained on'
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = repr(part.get("type")) if isinstance(part, dict) else describe_value(part)
        raise InvalidRow("invalid messages", f"message {number} has a part of the type {kind}", hint, where)
    unread = [name for name, value in part.items() if name not in ("type", "text") and value is not None]
    if unread:
        detail = f"a part of message {number} has the field {unread[0]!r}, which no template reads"
        raise InvalidRow("invalid messages", detail, hint, where)
    return checked_text(part.get("text"), where)


def _check_json(value: object, where: str, hint: str) -> None:
    """Raise :class:`InvalidRow` unless ``value`` is JSON, which templates write. Parquet also holds dates."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except TypeError:
        raise InvalidRow("invalid messages", f"{describe_value(value)} is not a JSON value", hint, where) from None
    except UnicodeEncodeError:
        detail = "it holds half of a surrogate pair, which no tokenizer can read"
        raise InvalidRow("broken Unicode", detail, column=where) from None
    except RecursionError:
        raise InvalidRow("invalid messages", "a field is nested too deeply", column=where) from None
