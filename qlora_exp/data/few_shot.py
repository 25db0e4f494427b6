"""Worked examples before the prompt, to score the base model on a task by few-shot prompting.

The examples of a draw are training rows. They depend only on ``task.split_seed`` and the draw's number, so they are the
same for every model, format and run. In the chat format, each example is a user turn and its answer. In the plain
format, it is the prompt with its completion; an empty line separates examples and prompt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlora_exp.config.schema import Config
from qlora_exp.data.encoding import Tokenizer, date_of, encode_rows
from qlora_exp.data.items import Item, RowProblem, Splits
from qlora_exp.data.messages import Message
from qlora_exp.data.plain_text import plain_prompt, plain_text
from qlora_exp.data.rows import Example
from qlora_exp.data.splits import load_rows
from qlora_exp.errors import DataError


@dataclass(frozen=True)
class FewShotDraw:
    """``validation`` and ``test`` are the splits' items with the examples before each prompt."""

    number: int
    """From 1."""
    examples: tuple[str, ...]
    """Item ids of the training rows, in the order of the context. Fewer than requested if more don't fit the model."""
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
    """Return ``evaluation.few_shot_draws`` draws, each with the items of ``validation`` and ``test``.

    Before each prompt stand ``evaluation.few_shots`` training rows. If a prompt and its answer would have more tokens
    than ``positions`` (``None``: no limit is known), every prompt of the draw gets fewer, as many as fit the longest.

    Raises:
        DataError: not even one example fits, or a prompt can't be written with examples before it.
    """
    requested = config.evaluation.few_shots
    assert requested is not None
    examples = {example.item_id: example for split in load_rows(config.task).examples.values() for example in split}
    date = date_of(config)

    def after_shots(items: Sequence[Item], shots: Sequence[Example]) -> tuple[Item, ...]:
        """Return the items with ``shots`` in their prompts; what is scored stays the same."""
        with_shots = [_with_shots(examples[item.item_id], shots, splits.format) for item in items]
        changed = []
        for item, encoded in zip(items, encode_rows(with_shots, tokenizer, splits.format, date=date), strict=True):
            if isinstance(encoded, RowProblem):
                raise encoded.error()
            if encoded.completion_ids[: len(item.completion_ids)] != item.completion_ids:
                what = "the answer has other tokens after worked examples than without them"
                raise DataError(what, item.item_id, "evaluation.few_shots=null, or a prompt that ends on a colon")
            changed.append(replace(item, prompt=encoded.texts.prompt, prompt_ids=encoded.prompt_ids, learned=None))
        return tuple(changed)

    draws = []
    for number in range(1, config.evaluation.few_shot_draws + 1):
        draw = random.Random(f"few shots/{config.task.split_seed}/{number}")
        shots = [examples[item.item_id] for item in draw.sample(splits.train, requested)]
        for count in range(requested, 0, -1):
            parts = [after_shots(part, shots[:count]) for part in (validation, test)]
            needed, _ = splits.positions_for(item for part in parts for item in part)
            if positions is None or needed <= positions:
                draws.append(FewShotDraw(number, tuple(shot.item_id for shot in shots[:count]), *parts))
                break
        else:
            what = (
                f"one example and the longest prompt have {needed} tokens with the answer; the model takes {positions}"
            )
            raise DataError(what, "evaluation.few_shots", "evaluation.few_shots=null, or a model with a longer context")
    return draws


def _with_shots(example: Example, shots: Sequence[Example], format: str) -> Example:
    """Return ``example`` with this prompt: its system text, ``shots`` with their answers, its own prompt."""
    system = tuple(message for message in example.messages if message.role == "system")
    own, *before = (
        replace(row, messages=tuple(message for message in row.messages if message.role != "system"))
        for row in (example, *shots)
    )
    if format == "chat":
        turns = [message for shot in before for message in shot.all_messages]
        return replace(example, messages=(*system, *turns, *own.messages))
    texts = [plain_text(shot).rstrip() for shot in before]
    messages = tuple(Message("user", text) for text in (*texts, plain_prompt(own)))
    return replace(example, messages=(*system, *messages), conversation=False)
