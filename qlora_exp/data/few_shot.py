"""Worked examples before the prompt: what the untouched model makes of a task that it is shown in its context.

The examples of a draw are rows of the training split, the same ones for every model, format and run: a draw depends on
``task.split_seed`` and its own number alone. In the chat format each example is a turn of the user and its answer; in
the plain format it is the prompt with its completion, examples and prompt divided by an empty line.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlora_exp.config.schema import Config
from qlora_exp.data.encoding import Tokenizer, date_of, encode_rows, plain_text, written_prompt
from qlora_exp.data.items import Item, Splits
from qlora_exp.data.messages import Message
from qlora_exp.data.row_problems import RowProblem
from qlora_exp.data.rows import Example
from qlora_exp.data.splits import load_rows
from qlora_exp.errors import DataError


@dataclass(frozen=True)
class FewShotDraw:
    """``validation`` and ``test`` are the splits' items with the examples before each prompt."""

    number: int
    """From 1."""
    examples: tuple[str, ...]
    """Item ids of the training rows, in the order in which they are shown; fewer than were asked for where more don't
    fit the model."""
    validation: tuple[Item, ...]
    test: tuple[Item, ...]


def few_shot_draws(
    config: Config,
    tokenizer: Tokenizer,
    splits: Splits,
    validation: Sequence[Item],
    test: Sequence[Item],
    positions: int | None,
) -> list[FewShotDraw]:
    """``evaluation.few_shot_draws`` draws of ``evaluation.few_shots`` training rows before the items of ``validation``
    and ``test``.

    Where a prompt and its answer would have more tokens than the model has ``positions`` (``None``: no limit is
    known), every prompt of the draw shows fewer examples, as many as fit the longest.

    Raises:
        DataError: not one example fits, or a prompt can't be written with examples before it.
    """
    assert config.evaluation.few_shots is not None
    rows = load_rows(config.task)
    known = {example.item_id: example for part in (rows.train, rows.validation, rows.test) for example in part}
    draws = []
    for number in range(1, config.evaluation.few_shot_draws + 1):
        draw = random.Random(f"few shots/{config.task.split_seed}/{number}")
        shots = [known[item.item_id] for item in draw.sample(splits.train, config.evaluation.few_shots)]
        draws.append(_fitting(number, shots, known, tokenizer, splits, validation, test, positions, date_of(config)))
    return draws


def _fitting(
    number: int,
    shots: list[Example],
    known: dict[str, Example],
    tokenizer: Tokenizer,
    splits: Splits,
    validation: Sequence[Item],
    test: Sequence[Item],
    positions: int | None,
    date: datetime.date,
) -> FewShotDraw:
    longest_label = max((len(ids) for ids in splits.option_ids.values()), default=0)
    while shots:
        parts = [_with_examples(part, known, shots, tokenizer, splits.format, date) for part in (validation, test)]
        needed = max(max(len(i.ids), len(i.prompt_ids) + longest_label) for part in parts for i in part)
        if positions is None or needed <= positions:
            return FewShotDraw(number, tuple(shot.item_id for shot in shots), *parts)
        shots = shots[:-1]
    what = f"one example and the longest prompt have {needed} tokens with the answer; the model takes {positions}"
    raise DataError(what, "evaluation.few_shots", "evaluation.few_shots=null, or a model with a longer context")


def _with_examples(
    items: Sequence[Item],
    known: dict[str, Example],
    shots: Sequence[Example],
    tokenizer: Tokenizer,
    format: str,
    date: datetime.date,
) -> tuple[Item, ...]:
    """The items with another prompt; what is scored stays as it is."""
    shown = [_shown(known[item.item_id], shots, format) for item in items]
    changed = []
    for item, encoded in zip(items, encode_rows(shown, tokenizer, format, date=date), strict=True):
        if isinstance(encoded, RowProblem):
            raise encoded.error()
        if encoded.completion_ids[: len(item.completion_ids)] != item.completion_ids:
            what = "the answer has other tokens after worked examples than without them"
            raise DataError(what, item.item_id, "evaluation.few_shots=null, or a prompt that ends on a colon")
        changed.append(replace(item, prompt=encoded.prompt, prompt_ids=encoded.prompt_ids, learned=None))
    return tuple(changed)


def _shown(example: Example, shots: Sequence[Example], format: str) -> Example:
    """The system text once and first, then the examples with their answers, then what is asked."""
    system = tuple(message for message in example.messages if message.role == "system")
    own = _without_system(example)
    before = [_without_system(shot) for shot in shots]
    if format == "chat":
        turns = [m for shot in before for m in (*shot.messages, shot.answer or Message("assistant", shot.completion))]
        return replace(example, messages=(*system, *turns, *own.messages))
    texts = [plain_text(shot).rstrip() for shot in before]
    messages = tuple(Message("user", text) for text in (*texts, written_prompt(own)))
    return replace(example, messages=(*system, *messages), conversation=False)


def _without_system(example: Example) -> Example:
    return replace(example, messages=tuple(m for m in example.messages if m.role != "system"))
