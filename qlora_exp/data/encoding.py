"""Examples as token ids, in the plain or the chat format: exactly the ids that TRL 1.16's SFTTrainer would make.

TRL tokenizes the prompt and prompt + completion. The completion is what the second has after their common prefix
(``trl/trainer/sft_trainer.py``, ``_prepare_dataset.tokenize_fn``). If the prompt's tokens change when the completion
follows, TRL warns once and trains on. Here the row is refused: it would be trained and scored on different tokens.

plain: the prompt and the completion as in the file, then EOS. ``task.separator`` stands between them. Its default is
       one space, or nothing if one text has white space there or is in a script without spaces. Spaces at the prompt's
       end are learned with the completion; so is all white space there if the prompt's tokens would change otherwise.
chat:  the tokenizer's template over the messages (data/chat_encoding.py). The answer and its end are learned. What the
       template writes by itself before the answer belongs to the prompt, whereas TRL learns it.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_exp.config.schema import Config, Format, SpecialTokens, Variant
from qlora_exp.data.assistant_mask import learned_mask
from qlora_exp.data.chat_encoding import ChatWriter, refuse_chat_only_content
from qlora_exp.data.example_text import RowRefused as _Refused
from qlora_exp.data.example_text import Texts as _Texts
from qlora_exp.data.round_trip import answer_as_written
from qlora_exp.data.row_problems import RowProblem
from qlora_exp.data.rows import Example
from qlora_exp.data.texts import separator_between
from qlora_exp.errors import DataError

Tokenizer = Any
_NO_BOUNDARY = "no token boundary"


@dataclass(frozen=True)
class Encoding:
    """One example's texts and token ids, before ``max_length`` is applied."""

    prompt: str
    completion: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    answer: str = ""
    """The text that generation should give: the completion in the Unicode form that the tokenizer writes."""
    structured: bool = False
    """The completion holds more than the answer's text: tool calls, or reasoning in a field."""
    prefix: str = ""
    """The end of ``prompt`` that the chat template writes after its generation prompt."""
    variables: Mapping[str, Any] | None = None
    """Template variables that make the generation prompt end in ``prefix``; ``None``: none are needed, or none do."""
    learned: tuple[bool, ...] | None = None
    """For each token of the sequence, whether it has a loss, if earlier answers are learned, too."""


def resolve_format(config: Config) -> str:
    """Return ``chat`` or ``plain``; ``auto`` is chat for the instruct variant and plain for the base."""
    if config.task.format is Format.auto:
        return "chat" if config.model.variant is Variant.instruct else "plain"
    return config.task.format.name


def check_tokenizer(tokenizer: Tokenizer, format: str) -> None:
    """Raise :class:`DataError` if the tokenizer can't write this format."""
    if format == "chat" and not tokenizer.chat_template:
        hint = "task.format=plain, a template of your own (model.chat_template=FILE.jinja), or model.variant=instruct"
        raise DataError("the tokenizer has no chat template", "task.format=chat", hint)
    if format == "plain" and tokenizer.eos_token is None:
        hint = "add eos_token to the model's tokenizer_config.json"
        raise DataError("the tokenizer has no end-of-text token: no answer would ever end", "task.format=plain", hint)


def date_of(config: Config) -> datetime.date:
    """Return ``task.date``, which chat templates get as the current date."""
    try:
        return datetime.date.fromisoformat(config.task.date)
    except ValueError:
        hint = "year, month and day, e.g. task.date=2026-01-01"
        raise DataError("task.date is not a date", f"task.date = {config.task.date}", hint) from None


def encode_rows(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    format: str,
    *,
    date: datetime.date,
    every_turn: bool = False,
) -> list[Encoding | RowProblem]:
    """Return each example's encoding, or why it can't be encoded.

    ``date``: the current date for chat templates. ``every_turn``: add the mask of all learned answers
    (``task.learn=all``).
    """
    texts: list[_Texts | RowProblem] = []
    special_tokens = _special_tokens(tokenizer)
    writer = ChatWriter(tokenizer, date, special_tokens) if format == "chat" else None
    for example in examples:
        try:
            if writer is not None:
                _refuse_special_tokens(example, special_tokens)
                texts.append(writer.texts(example, every_turn))
            else:
                refuse_chat_only_content(example)
                texts.append(_plain_texts(example, tokenizer, special_tokens))
        except _Refused as refusal:
            texts.append(_problem(example, refusal))
    rendered = [text for text in texts if isinstance(text, _Texts)]
    encodings = iter(_encode_texts(rendered, tokenizer, plain=format == "plain"))
    results: list[Encoding | RowProblem] = []
    for example, text in zip(examples, texts, strict=True):
        if isinstance(text, RowProblem):
            results.append(text)
            continue
        encoding = next(encodings)
        try:
            if isinstance(encoding, _Refused):
                raise encoding
            full_ids = [*encoding.prompt_ids, *encoding.completion_ids, *encoding.end_ids]
            learned = learned_mask(text, full_ids, tokenizer)
            results.append(replace(encoding, answer=_expected_answer(example, encoding, tokenizer), learned=learned))
        except _Refused as refusal:
            results.append(_problem(example, refusal))
    return results


def template_tokens(tokenizer: Tokenizer, format: str, date: datetime.date) -> int:
    """Return how many tokens the chat template adds to one user message, default system message included."""
    if format == "plain":
        return 0
    probe = "x"
    prompt = ChatWriter(tokenizer, date, _special_tokens(tokenizer)).prompt(probe)
    ids = tokenizer([prompt, probe], add_special_tokens=False)["input_ids"]
    return len(ids[0]) - len(ids[1])


def plain_prompt(example: Example) -> str:
    """Return the prompt without a template: system text and text, or a conversation with its roles written out."""
    return unstripped_prompt(example).rstrip(" \t")


def plain_text(example: Example) -> str:
    """Return prompt and completion as the plain format writes them, with what stands between them."""
    prompt, completion = unstripped_prompt(example), example.plain.space_before + example.completion
    separator = example.plain.separator
    if separator is None:
        separator = separator_between(prompt, completion)
    return prompt + separator + completion + example.plain.space_after


def unstripped_prompt(example: Example) -> str:
    """Return the same as :func:`plain_prompt`, with the white space at its end."""
    if not example.conversation:
        return "\n\n".join(message.content for message in example.messages)
    lines = [f"{message.role.capitalize()}: {message.content.strip()}" for message in example.messages]
    return "\n".join([*lines, "Assistant:"])


def _problem(example: Example, refused: _Refused) -> RowProblem:
    return RowProblem(
        example.file, example.row, None, refused.reason, refused.detail, refused.hint, refused.of_template
    )


def _special_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    added = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def _refuse_special_tokens(example: Example, special: Sequence[str]) -> None:
    """Refuse a row that contains a special token: it would end the answer early, or forge a turn of the chat."""
    for text in (example.completion, *(message.content for message in example.messages)):
        if token := _find_special_token(text, special):
            raise _special_token_refusal(token, "take it out: the format adds the tokens it needs")


def _find_special_token(text: str, special: Sequence[str]) -> str | None:
    """Return a special token that ``text`` contains."""
    return next((token for token in special if token and token in text), None)


def _special_token_refusal(token: str, hint: str) -> _Refused:
    detail = f"the text holds {token!r}, which this tokenizer reads as a control token"
    return _Refused("special token in the text", detail, hint)


def _plain_texts(example: Example, tokenizer: Tokenizer, special: Sequence[str]) -> _Texts:
    full, answer = plain_text(example), example.plain.space_before + example.completion + example.plain.space_after
    prompt = full[: len(full) - len(answer)].rstrip(" \t")
    completion = full[len(prompt) :]
    policy, token = example.plain.special_tokens, _find_special_token(full, special)
    if token and policy is SpecialTokens.refuse:
        hint = "take it out; or task.special_tokens=text (ordinary text) or token (in prompts, the token itself)"
        if tokenizer.chat_template:
            hint += "; if the prompts contain the chat template already: task.format=chat with the messages themselves"
        raise _special_token_refusal(token, hint)
    if token and policy is SpecialTokens.token:
        if in_completion := _find_special_token(completion, special):
            raise _special_token_refusal(
                in_completion, "take it out: in a completion it would end the answer; the format adds EOS"
            )
        if not _find_special_token(prompt, special):
            raise _special_token_refusal(
                token, "it begins in the prompt and ends in the completion: divide them elsewhere"
            )
    literal = token is not None and policy is SpecialTokens.text
    return _Texts(prompt, completion, str(tokenizer.eos_token), literal=literal)


def _encode_texts(texts: Sequence[_Texts], tokenizer: Tokenizer, plain: bool) -> list[Encoding | _Refused]:
    """Encode each text. If a plain prompt's tokens would change, the white space at its end is learned, too."""
    results = _divide_all(texts, tokenizer, plain)
    numbers, shorter = [], []
    for number, (text, result) in enumerate(zip(texts, results, strict=True)):
        prompt = text.prompt.rstrip()
        if plain and isinstance(result, _Refused) and result.reason == _NO_BOUNDARY and prompt not in ("", text.prompt):
            numbers.append(number)
            shorter.append(replace(text, prompt=prompt, completion=text.prompt[len(prompt) :] + text.completion))
    for number, result in zip(numbers, _divide_all(shorter, tokenizer, plain), strict=True):
        if isinstance(result, Encoding):
            results[number] = result
    return results


def _divide_all(texts: Sequence[_Texts], tokenizer: Tokenizer, plain: bool) -> list[Encoding | _Refused]:
    results: dict[int, Encoding | _Refused] = {}
    for literal in (False, True):
        numbers = [number for number, text in enumerate(texts) if text.literal is literal]
        group = [texts[number] for number in numbers]
        for number, text, ids in zip(numbers, group, _tokenize(group, tokenizer, plain, literal), strict=True):
            try:
                if literal:
                    _refuse_remaining_special_tokens(ids[1], tokenizer)
                results[number] = _divide(text, *ids)
            except _Refused as refusal:
                results[number] = refusal
    return [results[number] for number in range(len(texts))]


def _tokenize(
    texts: Sequence[_Texts], tokenizer: Tokenizer, special_tokens: bool, literal: bool = False
) -> list[tuple[list[int], list[int], list[int]]]:
    """Return the ids of prompt, prompt + completion and prompt + completion + end, with BOS if the tokenizer adds it.

    A chat template writes BOS itself, so nothing is added to its text, as in TRL. A plain prompt that begins with BOS
    gets no second one. ``literal``: special tokens in prompt and completion are read as ordinary text.
    """
    if not texts:
        return []
    before, after = _added_ids(tokenizer) if special_tokens else ((), ())
    settings = {"split_special_tokens": True} if literal else {}

    def ids(batch: list[str]) -> list[list[int]]:
        rows = list(tokenizer(batch, add_special_tokens=special_tokens, **settings)["input_ids"])
        count = len(before)
        return [row[count:] if count and tuple(row[: 2 * count]) == before * 2 else row for row in rows]

    prompts = [row[: len(row) - len(after)] for row in ids([text.prompt for text in texts])]
    heads = [row[: len(row) - len(after)] for row in ids([text.prompt + text.completion for text in texts])]
    if literal:
        full = [[*row, *_end_ids(text.end, tokenizer), *after] for row, text in zip(heads, texts, strict=True)]
    else:
        full = ids([text.prompt + text.completion + text.end for text in texts])
    return list(zip(prompts, heads, full, strict=True))


def _added_ids(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the tokenizer itself adds before and after any text, e.g. BOS and EOS."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    with_added = tuple(tokenizer("a")["input_ids"])
    before = next((i for i in range(len(with_added)) if with_added[i : i + len(bare)] == tuple(bare)), 0)
    return with_added[:before], with_added[before + len(bare) :]


def _end_ids(end: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of ``end`` as they are after other text; without it, they may differ."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    return list(tokenizer("a" + end, add_special_tokens=False)["input_ids"][len(bare) :])


def _refuse_remaining_special_tokens(ids: Sequence[int], tokenizer: Tokenizer) -> None:
    """Refuse special tokens in literal text: some tokenizers have them in their ordinary vocabulary, too."""
    before, _ = _added_ids(tokenizer)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for number in ids[len(before) :]:
        token = str(tokenizer.added_tokens_decoder[number].content) if number in special else None
        if token is not None and token != tokenizer.unk_token:
            detail = f"this tokenizer has no other way to write {token!r}"
            raise _Refused("special token in the text", detail, "take it out of the row")


def _expected_answer(example: Example, encoding: Encoding, tokenizer: Tokenizer) -> str:
    """Return the text that generation should give for the example."""
    settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    decoded = str(tokenizer.decode(list(encoding.completion_ids), **settings))
    answer = answer_as_written(example.completion, encoding.completion, decoded)
    if answer is None:
        lost = "".join(dict.fromkeys(character for character in encoding.completion if character not in decoded))[:10]
        detail = f"{encoding.completion.strip()[:40]!r} reads back as {decoded.strip()[:40]!r}"
        detail += f", without {lost!r}" if lost else ""
        hint = "take out what this tokenizer doesn't know, or use a model whose tokenizer keeps the text"
        raise _Refused("tokenizer changes the answer", detail, hint)
    return answer


def _divide(text: _Texts, prompt_ids: list[int], head_ids: list[int], full_ids: list[int]) -> Encoding:
    """Divide the full sequence into prompt, completion and end. ``head_ids``: prompt + completion."""
    prompt_length, head_length = len(prompt_ids), len(head_ids)
    if full_ids[:prompt_length] != prompt_ids or not prompt_ids:
        detail = f"the prompt's last tokens change when the completion follows ({text.prompt[-20:]!r})"
        raise _Refused(_NO_BOUNDARY, detail, "end the prompt on a whole word, a colon or a newline")
    if full_ids[:head_length] != head_ids or not prompt_length < head_length < len(full_ids):
        detail = f"the completion's last tokens change when the end follows ({text.completion[-20:]!r})"
        raise _Refused(_NO_BOUNDARY, detail, "use a tokenizer with a separate end token")
    return Encoding(
        text.prompt,
        text.completion,
        tuple(prompt_ids),
        tuple(full_ids[prompt_length:head_length]),
        tuple(full_ids[head_length:]),
        structured=text.structured,
        prefix=text.prefix,
        variables=text.variables,
    )
