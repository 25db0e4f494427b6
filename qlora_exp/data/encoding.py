"""Examples as token ids, in the plain or the chat format: exactly the ids that TRL 1.16's SFTTrainer would make.

TRL tokenizes the prompt and prompt + completion. The completion is what the second has after their common prefix
(``trl/trainer/sft_trainer.py``, ``_prepare_dataset.tokenize_fn``). If the prompt's tokens change when the completion
follows, TRL warns once and trains on. Here the row is refused: it would be trained and scored on different tokens.

In the plain format, all white space at the prompt's end is learned with the completion if the prompt's tokens would
change otherwise. In the chat format, what the template writes by itself before the answer belongs to the prompt,
whereas TRL learns it.
"""

from __future__ import annotations

import datetime
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_exp.config.enums import Format, Variant
from qlora_exp.config.schema import Config
from qlora_exp.data.chat_encoding import ChatWriter
from qlora_exp.data.items import InvalidRow, RowProblem
from qlora_exp.data.plain_text import Texts, plain_texts
from qlora_exp.data.rows import Example
from qlora_exp.data.texts import comparable
from qlora_exp.errors import DataError
from qlora_exp.progress import report_progress

Tokenizer = Any
_NO_BOUNDARY = "no token boundary"

CHUNK_ROWS = 1000
"""Rows that are tokenized in one call: a large file takes minutes, and its progress can be shown in between."""


@dataclass(frozen=True)
class Encoding:
    """One example's texts and token ids, before ``max_length`` is applied."""

    texts: Texts
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    answer: str = ""
    """The text that generation should give: the completion in the Unicode form that the tokenizer writes."""
    learned: tuple[bool, ...] | None = None
    """For each of ``ids``, whether it has a loss, if earlier answers are learned, too."""

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.completion_ids + self.end_ids


def resolve_format(config: Config, whole_texts: bool = False) -> str:
    """Return ``chat`` or ``plain``; ``auto`` is chat for the instruct variant and plain for the base.

    ``whole_texts``: the rows have no prompt, so ``auto`` is plain. Raises :class:`DataError` for ``chat`` then.
    """
    if whole_texts:
        if config.task.format is Format.chat:
            hint = "task.format=plain; or name a prompt: task.columns.prompt=COLUMN"
            raise DataError("whole texts have no turns for a chat template", "task.format = chat", hint)
        return "plain"
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
    special_tokens = _special_tokens(tokenizer)
    writer = ChatWriter(tokenizer, date, special_tokens) if format == "chat" else None
    texts: list[Texts | InvalidRow] = []
    for example in examples:
        try:
            if writer is not None:
                texts.append(writer.texts(example, every_turn))
            else:
                texts.append(plain_texts(example, tokenizer, special_tokens))
        except InvalidRow as error:
            texts.append(error)
    encodings = iter(_encode_texts([text for text in texts if isinstance(text, Texts)], tokenizer, writer is None))
    results: list[Encoding | RowProblem] = []
    for example, text in zip(examples, texts, strict=True):
        try:
            if isinstance(text, InvalidRow):
                raise text
            encoding = next(encodings)
            if isinstance(encoding, InvalidRow):
                raise encoding
            learned = _learned_mask(encoding, tokenizer)
            results.append(replace(encoding, answer=_expected_answer(example, encoding, tokenizer), learned=learned))
        except InvalidRow as error:
            results.append(error.at(example.file, example.row))
    return results


def template_tokens(tokenizer: Tokenizer, format: str, date: datetime.date) -> int:
    """Return how many tokens the chat template adds to one user message, default system message included."""
    if format == "plain":
        return 0
    probe = "x"
    prompt = ChatWriter(tokenizer, date, _special_tokens(tokenizer)).prompt(probe)
    ids = tokenizer([prompt, probe], add_special_tokens=False)["input_ids"]
    return len(ids[0]) - len(ids[1])


def _special_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    added = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def _encode_texts(texts: Sequence[Texts], tokenizer: Tokenizer, plain: bool) -> list[Encoding | InvalidRow]:
    """Encode each text. If a plain prompt's tokens would change, the white space at its end is learned, too."""
    results = _divide_all(texts, tokenizer, plain)
    numbers, shorter = [], []
    for number, (text, result) in enumerate(zip(texts, results, strict=True)):
        prompt = text.prompt.rstrip()
        no_boundary = isinstance(result, InvalidRow) and result.reason == _NO_BOUNDARY
        if plain and no_boundary and prompt not in ("", text.prompt):
            numbers.append(number)
            shorter.append(replace(text, prompt=prompt, completion=text.prompt[len(prompt) :] + text.completion))
    for number, result in zip(numbers, _divide_all(shorter, tokenizer, plain), strict=True):
        if isinstance(result, Encoding):
            results[number] = result
    return results


def _divide_all(texts: Sequence[Texts], tokenizer: Tokenizer, plain: bool) -> list[Encoding | InvalidRow]:
    results: dict[int, Encoding | InvalidRow] = {}
    for literal in (False, True):
        numbers = [number for number, text in enumerate(texts) if text.literal is literal]
        group = [texts[number] for number in numbers]
        for number, text, ids in zip(numbers, group, _tokenize(group, tokenizer, plain, literal), strict=True):
            try:
                if literal:
                    _refuse_remaining_special_tokens(ids[1], tokenizer)
                if not text.prompt and not ids[0]:  # a whole text, and a tokenizer that adds no BOS
                    start = _start_ids(tokenizer)
                    ids = (start, start + ids[1], start + ids[2])
                results[number] = _divide(text, *ids)
            except InvalidRow as refusal:
                results[number] = refusal
    return [results[number] for number in range(len(texts))]


def _tokenize(
    texts: Sequence[Texts], tokenizer: Tokenizer, special_tokens: bool, literal: bool = False
) -> list[tuple[list[int], list[int], list[int]]]:
    """Return the ids of prompt, prompt + completion and prompt + completion + end, with BOS if the tokenizer adds it.

    A chat template writes BOS itself, so nothing is added to its text, as in TRL. A plain prompt that begins with BOS
    gets no second one. ``literal``: special tokens in prompt and completion are read as ordinary text.
    """
    if not texts:
        return []
    before, after = _added_ids(tokenizer) if special_tokens else ((), ())
    settings = {"split_special_tokens": True} if literal else {}
    if hasattr(tokenizer, "model_input_names"):  # transformers' own; the mask is built in Python, one list a row
        settings["return_attention_mask"] = False

    def ids(batch: list[str]) -> list[list[int]]:
        rows: list[list[int]] = []
        for start in range(0, len(batch), CHUNK_ROWS):
            chunk = batch[start : start + CHUNK_ROWS]
            rows += tokenizer(chunk, add_special_tokens=special_tokens, **settings)["input_ids"]
            if len(batch) > CHUNK_ROWS:
                report_progress(len(rows), len(batch), "rows tokenized")
        count = len(before)
        return [row[count:] if count and tuple(row[: 2 * count]) == before * 2 else row for row in rows]

    prompts = [row[: len(row) - len(after)] for row in ids([text.prompt for text in texts])]
    heads = [row[: len(row) - len(after)] for row in ids([text.prompt + text.completion for text in texts])]
    if literal:
        full = [[*row, *_end_ids(text.end, tokenizer), *after] for row, text in zip(heads, texts, strict=True)]
    elif (end_id := _separate_end_id({text.end for text in texts}, tokenizer)) is not None:
        full = [[*row, end_id, *after] for row in heads]
    else:
        full = ids([text.prompt + text.completion + text.end for text in texts])
    return list(zip(prompts, heads, full, strict=True))


def _separate_end_id(ends: set[str], tokenizer: Tokenizer) -> int | None:
    """Return the id of the end that all texts share if it is one added token that every tokenizer splits off first, so
    that it can't change the tokens before it; else ``None``."""
    if len(ends) != 1:
        return None
    end = next(iter(ends))
    for number, token in tokenizer.added_tokens_decoder.items():
        if str(token.content) == end:
            plain = token.special and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
            return int(number) if plain else None
    return None


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
            raise InvalidRow("special token in the text", detail, "take it out of the row")


def _start_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the token that stands before a whole text, so that its first token has a loss, too: BOS, or else EOS."""
    names = tokenizer.special_tokens_map  # check_tokenizer refuses the plain format without EOS
    return list(tokenizer(str(names.get("bos_token") or names["eos_token"]), add_special_tokens=False)["input_ids"][:1])


def _divide(text: Texts, prompt_ids: list[int], head_ids: list[int], full_ids: list[int]) -> Encoding:
    """Divide the full sequence into prompt, completion and end. ``head_ids``: prompt + completion."""
    prompt_length, head_length = len(prompt_ids), len(head_ids)
    if full_ids[:prompt_length] != prompt_ids or not prompt_ids:
        detail = f"the prompt's last tokens change when the completion follows ({text.prompt[-20:]!r})"
        raise InvalidRow(_NO_BOUNDARY, detail, "end the prompt on a whole word, a colon or a newline")
    if full_ids[:head_length] != head_ids or not prompt_length < head_length < len(full_ids):
        detail = f"the completion's last tokens change when the end follows ({text.completion[-20:]!r})"
        raise InvalidRow(_NO_BOUNDARY, detail, "use a tokenizer with a separate end token")
    completion_ids, end_ids = full_ids[prompt_length:head_length], full_ids[head_length:]
    return Encoding(text, tuple(prompt_ids), tuple(completion_ids), tuple(end_ids))


def _learned_mask(encoding: Encoding, tokenizer: Tokenizer) -> tuple[bool, ...] | None:
    """Return whether each token has a loss. Raises :class:`InvalidRow` if a learned range ends inside a token."""
    texts, ids = encoding.texts, encoding.ids
    if texts.learned is None:
        return None
    full = texts.prompt + texts.completion + texts.end
    borders = sorted({border for span in texts.learned for border in span})
    counts = {}
    parts = tokenizer([full[:border] for border in borders], add_special_tokens=False)["input_ids"]
    for border, part in zip(borders, parts, strict=True):
        if tuple(part) != ids[: len(part)]:
            detail = f"a token spans the border of an earlier answer ({full[max(0, border - 20) : border]!r})"
            raise InvalidRow(_NO_BOUNDARY, detail, "task.learn=last, or another tokenizer or template")
        counts[border] = len(part)
    mask = [False] * len(ids)
    for begin, end in texts.learned:
        mask[counts[begin] : counts[end]] = [True] * (counts[end] - counts[begin])
    return tuple(mask)


def _expected_answer(example: Example, encoding: Encoding, tokenizer: Tokenizer) -> str:
    """Return the example's answer as the tokenizer writes it, to compare generated answers with.

    Comparisons ignore case and use the Unicode form NFC anyway. The form NFKC ("①" becomes "1") and the spaces of a
    one-line answer are taken from the decoded tokens.

    Raises :class:`InvalidRow` if the tokenizer changes the answer: no generated answer could equal it.
    """
    settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    decoded = str(tokenizer.decode(list(encoding.completion_ids), **settings))
    answer, completion = example.completion, encoding.texts.completion
    written, read_back = completion.strip(), decoded.strip()
    if comparable(read_back) == comparable(written):
        return answer
    first, second = (comparable(unicodedata.normalize("NFKC", text)) for text in (read_back, written))
    one_line = "\n" not in written and answer == answer.strip()
    if first == second or (one_line and "".join(first.split()) == "".join(second.split())):
        return read_back if written == answer.strip() else answer
    lost = "".join(dict.fromkeys(character for character in completion if character not in decoded))[:10]
    detail = f"{written[:40]!r} reads back as {read_back[:40]!r}" + (f", without {lost!r}" if lost else "")
    hint = "take out what this tokenizer doesn't know, or use a model whose tokenizer keeps the text"
    raise InvalidRow("tokenizer changes the answer", detail, hint)
