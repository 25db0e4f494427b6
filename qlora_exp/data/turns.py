"""Which tokens of a conversation carry a loss where all of the assistant's answers are learned (``task.learn=all``).

Where the template marks answers with ``{% generation %}``, the marks decide, as under TRL's ``assistant_only_loss``;
elsewhere the conversation is rendered turn by turn. Two things that TRL's marks may hold are not learned: the
generation prompt, and what the template writes by itself before an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from qlora_exp.chat_templates import Rendered
from qlora_exp.data.refusals import Refused, Texts
from qlora_exp.data.rows import Example

_HINT = "a template that marks answers with {% generation %}: model.chat_template=FILE.jinja; or task.learn=last"


def learned_ranges(
    texts: Texts, full: Rendered, example: Example, prompt_of: Callable[[int], str], through: Callable[[int], str]
) -> Texts:
    """``texts`` with the ranges of all answers that are learned. Raises :class:`Refused`.

    ``prompt_of(n)``: the first n messages with the generation prompt; ``through(n)``: without one.
    """
    turns = [number for number, message in enumerate(example.messages) if message.role == "assistant"]
    stop = len(texts.prompt) + len(texts.completion)
    last = (len(texts.prompt), len(full.text))
    marks = list(full.marks)
    if marks:
        if len(marks) != len(turns) + 1:
            detail = f"the chat template marks {len(marks)} answers of {len(turns) + 1}"
            raise Refused("template that marks other answers", detail, _HINT, of_template=True)
        last = (max(last[0], marks[-1][0]), marks[-1][1])
        if last[1] <= stop:
            detail = "the chat template's marks leave out the end of the turn: the model would never learn to stop"
            raise Refused("template without an end of turn", detail, _HINT, of_template=True)
    ranges = []
    for index, number in enumerate(turns):
        prompt = prompt_of(number)
        if not full.text.startswith(prompt):
            raise _unstable("the prompt of an earlier answer")
        mark = marks[index] if marks else (0, _end_of_turn(full.text, through(number + 1)))
        begin = max(mark[0], len(prompt))
        if texts.prefix and full.text.startswith(texts.prefix, begin):
            begin += len(texts.prefix)
        if example.messages[number].weight != 0:
            ranges.append((begin, mark[1]))
    return replace(texts, learned=(*ranges, last))


def _end_of_turn(full: str, through: str) -> int:
    if not full.startswith(through):
        raise _unstable("an earlier answer")
    return len(through)


def _unstable(what: str) -> Refused:
    detail = f"the chat template writes {what} otherwise when further messages follow"
    return Refused("template that rewrites earlier turns", detail, _HINT, of_template=True)


def learned_mask(texts: Texts, ids: Sequence[int], tokenizer: Any) -> tuple[bool, ...] | None:
    """For each of ``ids`` whether it carries a loss. Raises :class:`Refused` where a range ends within a token."""
    if texts.learned is None:
        return None
    whole = texts.prompt + texts.completion + texts.end
    places = sorted({place for span in texts.learned for place in span})
    counts = dict(zip(places, _tokens_before(whole, places, ids, tokenizer), strict=True))
    mask = [False] * len(ids)
    for begin, end in texts.learned:
        mask[counts[begin] : counts[end]] = [True] * (counts[end] - counts[begin])
    return tuple(mask)


def _tokens_before(text: str, places: Sequence[int], ids: Sequence[int], tokenizer: Any) -> list[int]:
    parts = tokenizer([text[:place] for place in places], add_special_tokens=False)["input_ids"]
    for place, part in zip(places, parts, strict=True):
        if list(part) != list(ids[: len(part)]):
            detail = f"a token spans the border of an earlier answer ({text[max(0, place - 20) : place]!r})"
            raise Refused("no token boundary", detail, "task.learn=last, or another tokenizer or template")
    return [len(part) for part in parts]
