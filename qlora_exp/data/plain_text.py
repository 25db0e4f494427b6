"""Examples as text in the plain format: prompt, completion and EOS without a template.

The prompt and the completion stand as in the file. ``task.separator`` stands between them. Its default is one space, or
nothing if one text has white space there or is in a script without spaces. Spaces at the prompt's end are learned with
the completion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_exp.config.enums import SpecialTokens
from qlora_exp.data.items import InvalidRow
from qlora_exp.data.messages import TOOL_CALLS
from qlora_exp.data.rows import Example
from qlora_exp.data.texts import separator_between

LOSS_FIELDS = ("train", "training", "trainable", "loss", "mask", "masked")
"""Fields in which other trainers say whether an answer is learned."""
_OPENING, _CLOSING = tuple("([{“‘«„$/\\_"), tuple(",.;:!?)]}%”’»")
"""Characters that people usually write no space after (``_OPENING``) or before (``_CLOSING``)."""


@dataclass(frozen=True)
class Texts:
    """One example as text: the model is trained on ``prompt + completion + end``."""

    prompt: str
    completion: str
    end: str
    structured: bool = False
    """The completion holds more than the answer's text: tool calls, or reasoning in a field."""
    prefix: str = ""
    """The end of ``prompt`` that the chat template writes after its generation prompt."""
    variables: Mapping[str, Any] | None = None
    """Template variables that make the generation prompt end in ``prefix``; ``None``: none are needed, or none do."""
    literal: bool = False
    """The tokenizer reads special tokens in the prompt and completion as ordinary text."""
    learned: tuple[tuple[int, int], ...] | None = None
    """Ranges of characters with a loss, if earlier answers are learned, too."""


def plain_texts(example: Example, tokenizer: Any, special_tokens: Sequence[str]) -> Texts:
    """Return the row as text. Raises :class:`InvalidRow` if it holds special tokens, or what only a chat template can
    write."""
    _refuse_chat_only_content(example)
    full, answer = plain_text(example), example.plain.space_before + example.completion + example.plain.space_after
    prompt = full[: len(full) - len(answer)].rstrip(" \t")
    completion = full[len(prompt) :]
    policy, token = example.plain.special_tokens, find_special_token(full, special_tokens)
    if token and policy is SpecialTokens.refuse:
        hint = "take it out; or task.special_tokens=text (ordinary text) or token (in prompts, the token itself)"
        if tokenizer.chat_template:
            hint += "; if the prompts contain the chat template already: task.format=chat with the messages themselves"
        raise special_token_error(token, hint)
    if token and policy is SpecialTokens.token:
        if in_completion := find_special_token(completion, special_tokens):
            hint = "take it out: in a completion it would end the answer; the format adds EOS"
            raise special_token_error(in_completion, hint)
        if not find_special_token(prompt, special_tokens):
            hint = "it begins in the prompt and ends in the completion: divide them elsewhere"
            raise special_token_error(token, hint)
    literal = token is not None and policy is SpecialTokens.text
    return Texts(prompt, completion, str(tokenizer.eos_token), literal=literal)


def plain_text(example: Example) -> str:
    """Return prompt and completion as the plain format writes them, with what stands between them."""
    prompt, completion = plain_prompt(example), example.plain.space_before + example.completion
    separator = "" if example.is_whole_text else example.plain.separator
    if separator is None:
        separator = separator_between(prompt, completion)
    return prompt + separator + completion + example.plain.space_after


def plain_prompt(example: Example) -> str:
    """Return the prompt without a template: system text and text, or a conversation with its roles written out. White
    space at its end is kept."""
    if not example.conversation:
        return "\n\n".join(message.content for message in example.messages)
    lines = [f"{message.role.capitalize()}: {message.content.strip()}" for message in example.messages]
    return "\n".join([*lines, "Assistant:"])


def find_special_token(text: str, special_tokens: Sequence[str]) -> str | None:
    """Return the first of ``special_tokens`` that ``text`` contains."""
    return next((token for token in special_tokens if token and token in text), None)


def special_token_error(token: str, hint: str) -> InvalidRow:
    detail = f"the text holds {token!r}, which this tokenizer reads as a control token"
    return InvalidRow("special token in the text", detail, hint)


def _refuse_chat_only_content(example: Example) -> None:
    messages = [*example.messages, *([example.answer] if example.answer else [])]
    names = [name for message in messages for name, value in message.fields.items() if value != ""]
    roles = {"tool": "take the calls and their results out", "developer": "name the role system"}
    unsupported = [
        (f"the field {name!r}", roles["tool"] if name == TOOL_CALLS else without_field(name)) for name in names
    ]
    unsupported += [(f"a message of the role {m.role}", roles[m.role]) for m in messages if m.role in roles]
    unsupported += [("tools", "task.columns.tools=null leaves them out")] if example.tools else []
    unsupported += [("chat_template_kwargs", "take the column out")] if example.variables else []
    if unsupported:
        what, instead = unsupported[0]
        raise InvalidRow("not for the plain format", f"the row has {what}", f"task.format=chat; or {instead}")


def without_field(name: str) -> str:
    """Return the hint for a field of a message that the format can't write."""
    ignored = f"task.ignore_fields=[{name}] leaves it out"
    if name in LOSS_FIELDS:
        return f"if it says whether the answer is learned, write it as weight: 0 or 1; else {ignored}"
    return ignored


def unusual_space_notes(examples: Sequence[Example]) -> list[str]:
    """Return a note on rows where the plain format puts a space that nobody would write, as in ``( a)``."""
    suspicious = [example for example in examples if not example.conversation and _needs_no_space(example)]
    if not suspicious:
        return []
    first = suspicious[0]
    begin, end = plain_prompt(first)[-20:], first.completion[:20]
    count = "1 row has" if len(suspicious) == 1 else f"{len(suspicious)} rows have"
    return [
        f"{count} a space between prompt and completion that may be a mistake, e.g. {first.file}, row {first.row}: "
        f"{begin!r} + {end!r}; 'task.separator=\"\"' joins all rows without one"
    ]


def _needs_no_space(example: Example) -> bool:
    """Return whether prompt and completion seem to belong together without a space."""
    prompt, completion = plain_prompt(example), example.plain.space_before + example.completion
    if separator_between(prompt, completion) != " ":
        return False
    opens = prompt.endswith(_OPENING) or (prompt.endswith('"') and prompt.count('"') % 2 == 1)
    return opens or completion.startswith(_CLOSING)
