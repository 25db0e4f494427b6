"""The loss mask of a conversation in which all answers of the assistant are learned (``task.learn=all``).

If the template marks answers with ``{% generation %}``, the marks decide, as under TRL's ``assistant_only_loss``.
Otherwise the conversation is rendered turn by turn. Two things are not learned even if they are marked: the generation
prompt, and what the template writes by itself before an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from qlora_exp.data.chat_template import Rendered
from qlora_exp.data.example_text import RowRefused, Texts
from qlora_exp.data.rows import Example

_HINT = "a template that marks answers with {% generation %}: model.chat_template=FILE.jinja; or task.learn=last"


def learned_ranges(
    texts: Texts, full: Rendered, example: Example, prompt_of: Callable[[int], str], through: Callable[[int], str]
) -> Texts:
    """Return ``texts`` with the ranges of all learned answers. Raises :class:`RowRefused`.

    ``prompt_of(n)`` renders the first n messages with the generation prompt, ``through(n)`` without it.
    """
    turns = [number for number, message in enumerate(example.messages) if message.role == "assistant"]
    begins = [_answer_start(full.text, prompt_of(number), texts.prefix) for number in turns] + [len(texts.prompt)]
    spans = [[(begin, len(full.text))] for begin in begins]
    if full.marks:
        spans = [
            _marks_of_answer(full.marks, begin, end)
            for begin, end in zip(begins, [*begins[1:], len(full.text)], strict=True)
        ]
        _check_marks(spans, len(texts.prompt) + len(texts.completion))
    else:
        for index, number in enumerate(turns):
            spans[index] = [(begins[index], _end_of_turn(full.text, through(number + 1)))]
    learned = [*(example.messages[number].weight != 0 for number in turns), True]
    ranges = [span for index, turn in enumerate(spans) if learned[index] for span in turn]
    return replace(texts, learned=tuple(ranges))


def _answer_start(full: str, prompt: str, prefix: str) -> int:
    if not full.startswith(prompt):
        raise _unstable_template("the prompt of an earlier answer")
    return len(prompt) + (len(prefix) if full.startswith(prefix, len(prompt)) else 0)


def _marks_of_answer(marks: Sequence[tuple[int, int]], begin: int, following: int) -> list[tuple[int, int]]:
    """Return the marks of one answer, from its ``begin``. ``following``: where the next answer begins."""
    return [(max(start, begin), end) for start, end in marks if begin < end <= following]


def _check_marks(spans: Sequence[Sequence[tuple[int, int]]], stop: int) -> None:
    for number, turn in enumerate(spans, 1):
        if not turn:
            detail = f"the chat template marks nothing of answer {number} of {len(spans)}"
            raise RowRefused("template that leaves answers unmarked", detail, _HINT, of_template=True)
    if spans[-1][-1][1] <= stop:
        detail = "the chat template's marks leave out the end of the turn: the model would never learn to stop"
        raise RowRefused("template without an end of turn", detail, _HINT, of_template=True)


def _end_of_turn(full: str, through: str) -> int:
    if not full.startswith(through):
        raise _unstable_template("an earlier answer")
    return len(through)


def _unstable_template(what: str) -> RowRefused:
    detail = f"the chat template writes {what} differently when further messages follow"
    return RowRefused("template that rewrites earlier turns", detail, _HINT, of_template=True)


def learned_mask(texts: Texts, ids: Sequence[int], tokenizer: Any) -> tuple[bool, ...] | None:
    """Return whether each of ``ids`` has a loss. Raises :class:`RowRefused` if a range ends inside a token."""
    if texts.learned is None:
        return None
    full = texts.prompt + texts.completion + texts.end
    borders = sorted({border for span in texts.learned for border in span})
    counts = dict(zip(borders, _tokens_before(full, borders, ids, tokenizer), strict=True))
    mask = [False] * len(ids)
    for begin, end in texts.learned:
        mask[counts[begin] : counts[end]] = [True] * (counts[end] - counts[begin])
    return tuple(mask)


def _tokens_before(text: str, borders: Sequence[int], ids: Sequence[int], tokenizer: Any) -> list[int]:
    parts = tokenizer([text[:border] for border in borders], add_special_tokens=False)["input_ids"]
    for border, part in zip(borders, parts, strict=True):
        if list(part) != list(ids[: len(part)]):
            detail = f"a token spans the border of an earlier answer ({text[max(0, border - 20) : border]!r})"
            raise RowRefused("no token boundary", detail, "task.learn=last, or another tokenizer or template")
    return [len(part) for part in parts]
