"""Examples as token ids, in the plain or the chat format: exactly the ids that TRL 1.16's SFTTrainer would make.

TRL tokenizes the prompt and prompt + completion, and takes the longer one's tokens after their common prefix as the
completion (``trl/trainer/sft_trainer.py``, ``_prepare_dataset.tokenize_fn``). Where the prompt's tokens change when the
completion follows, TRL warns once and trains on; here the row is refused, for it would be scored on other tokens than
it was trained on.

plain: ``prompt + " " + completion + EOS``. Spaces at the prompt's end are taken off; no space is put after a newline.
chat:  the tokenizer's template over [system?, user, assistant]; what follows the generation prompt is learned.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from qlora_exp.config import Config, Format, Variant
from qlora_exp.data.problems import RowProblem
from qlora_exp.data.rows import Example, Message
from qlora_exp.errors import DataError

Tokenizer = Any
_FORMAT_HINT = "task.format=plain, or another template: model.chat_template=FILE.jinja"


@dataclass(frozen=True)
class Encoding:
    """One example's texts and token ids, before ``max_length`` is applied."""

    prompt: str
    completion: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    end_ids: tuple[int, ...]


@dataclass(frozen=True)
class _Texts:
    prompt: str
    completion: str
    end: str


class _Refused(Exception):
    def __init__(self, reason: str, detail: str, hint: str, of_template: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.hint, self.of_template = reason, detail, hint, of_template


def resolve_format(config: Config) -> str:
    """``chat`` or ``plain``; ``auto`` is chat for the instruct variant and plain for the base."""
    if config.task.format is Format.auto:
        return "chat" if config.model.variant is Variant.instruct else "plain"
    return config.task.format.name


def check_tokenizer(tokenizer: Tokenizer, format: str) -> None:
    """:class:`DataError` where the tokenizer can't write this format."""
    if format == "chat" and not tokenizer.chat_template:
        hint = "task.format=plain, a template of your own (model.chat_template=FILE.jinja), or model.variant=instruct"
        raise DataError("the tokenizer has no chat template", "task.format=chat", hint)
    if format == "plain" and tokenizer.eos_token is None:
        hint = "add eos_token to the model's tokenizer_config.json"
        raise DataError("the tokenizer has no end-of-text token: no answer would ever end", "task.format=plain", hint)


def encode(examples: Sequence[Example], tokenizer: Tokenizer, format: str) -> list[Encoding | RowProblem]:
    """The encoding of each example, or why it can't be encoded."""
    texts: list[_Texts | RowProblem] = []
    special = _special_tokens(tokenizer)
    for example in examples:
        try:
            _refuse_special(example, special, format)
            texts.append(_chat_texts(example, tokenizer) if format == "chat" else _plain_texts(example, tokenizer))
        except _Refused as refused:
            texts.append(_problem(example, refused))
    rendered = [text for text in texts if isinstance(text, _Texts)]
    encodings = iter(_tokenized(rendered, tokenizer, special_tokens=format == "plain"))
    results: list[Encoding | RowProblem] = []
    for example, text in zip(examples, texts, strict=True):
        if isinstance(text, RowProblem):
            results.append(text)
            continue
        prompt_ids, head_ids, full_ids = next(encodings)
        try:
            results.append(_divided(text, prompt_ids, head_ids, full_ids))
        except _Refused as refused:
            results.append(_problem(example, refused))
    return results


def template_tokens(tokenizer: Tokenizer, format: str) -> int:
    """How many tokens the chat template adds to a prompt of one user message (a default system message included)."""
    if format == "plain":
        return 0
    probe = "x"
    rendered = _render((Message("user", probe),), tokenizer, generation_prompt=True)
    both = tokenizer([rendered, probe], add_special_tokens=False)["input_ids"]
    return len(both[0]) - len(both[1])


def plain_prompt(example: Example) -> str:
    """A prompt without a template: the text after the system text, or a conversation with its roles written out."""
    if not example.conversation:
        return "\n\n".join(message.content for message in example.messages).rstrip(" \t")
    lines = [f"{message.role.capitalize()}: {message.content.strip()}" for message in example.messages]
    return "\n".join([*lines, "Assistant:"])


def _problem(example: Example, refused: _Refused) -> RowProblem:
    return RowProblem(
        example.file, example.row, None, refused.reason, refused.detail, refused.hint, refused.of_template
    )


def _special_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    added = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def _refuse_special(example: Example, special: Sequence[str], format: str) -> None:
    """A special token written out in a row would end the answer early, or forge a turn of the chat."""
    texts = [example.completion]
    if format == "chat":
        texts += [message.content for message in example.messages]
    for token in special:
        if token and any(token in text for text in texts):
            detail = f"the text holds {token!r}, which this tokenizer reads as a control token"
            raise _Refused("special token in the text", detail, "take it out: the format adds the tokens it needs")


def _plain_texts(example: Example, tokenizer: Tokenizer) -> _Texts:
    prompt = plain_prompt(example)
    separator = "" if prompt.endswith(("\n", "\r")) else " "
    return _Texts(prompt, separator + example.completion, str(tokenizer.eos_token))


def _chat_texts(example: Example, tokenizer: Tokenizer) -> _Texts:
    prompt = _render(example.messages, tokenizer, generation_prompt=True)
    messages = (*example.messages, Message("assistant", example.completion))
    full = _render(messages, tokenizer, generation_prompt=False)
    if not full.startswith(prompt):
        detail = "the chat template writes the prompt otherwise when the answer follows"
        raise _Refused("template without a stable prompt", detail, _FORMAT_HINT, of_template=True)
    end = _answer_end(full, example, tokenizer)
    if end is None or end - len(example.completion) < len(prompt):
        raise _Refused(
            "template changes the answer", "the chat template doesn't write it as it is", _FORMAT_HINT, of_template=True
        )
    if not full[end:].strip():
        detail = "the chat template puts nothing after an answer: the model would never learn to stop"
        raise _Refused("template without an end of turn", detail, _FORMAT_HINT, of_template=True)
    return _Texts(prompt, full[len(prompt) : end], full[end:])


def _answer_end(full: str, example: Example, tokenizer: Tokenizer) -> int | None:
    """Where the answer ends in ``full``, the example as the template writes it. ``None``: the answer isn't there.

    A second rendering, with another answer, shows what the template writes after an answer. A search for the text would
    find a short answer in the template's own words: "d" in ``<|im_end|>``.
    """
    probe = next(word for number in itertools.count() if (word := f"Answer{number}") not in full)
    shown = _render((*example.messages, Message("assistant", probe)), tokenizer, generation_prompt=False)
    _, found, after = shown.rpartition(probe)
    if not found or not full.endswith(example.completion + after):
        return None
    return len(full) - len(after)


def _render(messages: Sequence[Message], tokenizer: Tokenizer, generation_prompt: bool) -> str:
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=generation_prompt)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        hint = _FORMAT_HINT
        if messages[0].role == "system":
            hint = f"many templates take no system message: task.system=null, {hint}"
        raise _Refused("refused by the chat template", str(error), hint, of_template=True) from None
    return str(text)


def _tokenized(
    texts: Sequence[_Texts], tokenizer: Tokenizer, special_tokens: bool
) -> list[tuple[list[int], list[int], list[int]]]:
    """Ids of prompt, prompt + completion and prompt + completion + end, with the tokenizer's BOS where it adds one.

    A chat template writes BOS itself, so nothing is added to its text; TRL does the same.
    """
    if not texts:
        return []

    def ids(batch: list[str]) -> list[list[int]]:
        return list(tokenizer(batch, add_special_tokens=special_tokens)["input_ids"])

    appended = _appended_tokens(tokenizer) if special_tokens else 0
    prompts = [row[: len(row) - appended] for row in ids([text.prompt for text in texts])]
    heads = [row[: len(row) - appended] for row in ids([text.prompt + text.completion for text in texts])]
    full = ids([text.prompt + text.completion + text.end for text in texts])
    return list(zip(prompts, heads, full, strict=True))


def _appended_tokens(tokenizer: Tokenizer) -> int:
    """How many tokens (an EOS) the tokenizer itself puts behind any text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    before = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
    return len(dressed) - before - len(bare)


def _divided(text: _Texts, prompt_ids: list[int], head_ids: list[int], full_ids: list[int]) -> Encoding:
    prompt_length, head_length = len(prompt_ids), len(head_ids)
    if full_ids[:prompt_length] != prompt_ids or not prompt_ids:
        detail = f"the prompt's last tokens change when the completion follows ({text.prompt[-20:]!r})"
        raise _Refused("no token boundary", detail, "end the prompt on a whole word, a colon or a newline")
    if full_ids[:head_length] != head_ids or not prompt_length < head_length < len(full_ids):
        detail = f"the completion's last tokens change when the end follows ({text.completion[-20:]!r})"
        raise _Refused("no token boundary", detail, "use a tokenizer that has an end token of its own")
    return Encoding(
        text.prompt,
        text.completion,
        tuple(prompt_ids),
        tuple(full_ids[prompt_length:head_length]),
        tuple(full_ids[head_length:]),
    )
