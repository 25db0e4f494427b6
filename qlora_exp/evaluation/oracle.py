"""Checks the answers' format with an oracle: a model that generates exactly the trained tokens must score as correct.

If it doesn't, exact match and the invalid rate would measure the format, not the model. Causes are a tokenizer that
doesn't restore a text, or an answer that contains the end of a turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qlora_exp.config.schema import Config
from qlora_exp.data.texts import same_text
from qlora_exp.errors import DataError
from qlora_exp.evaluation.generation import (
    StopRule,
    answer_text,
    as_answer,
    decode_completions,
    max_new_tokens,
    stop_rule,
)

if TYPE_CHECKING:
    from qlora_exp.data.items import Item, Splits


def stop_rule_of(splits: Splits, tokenizer: Any, config: Config, model: Any = None) -> StopRule:
    """Return the task's stop rule; without ``model``, from the tokenizer and the rows alone."""
    items = (*splits.train, *splits.validation, *splits.test)
    limit = max_new_tokens(splits, config)
    return stop_rule(model, tokenizer, [item.end_ids for item in items], [item.answer for item in items], limit)


def perfect_answers(items: Sequence[Item], tokenizer: Any, rule: StopRule) -> list[str]:
    """Return the generated answers of an oracle whose most likely tokens are the trained ones."""
    answers = []
    for item in items:
        ids = [*item.completion_ids, *item.end_ids]
        stop = next((place for place, token in enumerate(ids) if token in rule.token_ids), len(ids))
        text = answer_text(ids[: min(stop, rule.max_new_tokens)], tokenizer, rule)
        if rule.keep_indentation:
            text = as_answer(text, decode_completions(item.completion_ids, tokenizer), item.answer)
        answers.append(text)
    return answers


def check_answers(splits: Splits, tokenizer: Any, config: Config) -> None:
    """Raise :class:`DataError` with the first row whose answer would be scored as wrong even for a perfect model.

    Answers that ``training.max_length`` or ``evaluation.max_new_tokens`` truncates aren't checked.
    """
    rule = stop_rule_of(splits, tokenizer, config)
    items = [item for item in (*splits.train, *splits.validation, *splits.test) if _is_untruncated(item, rule, config)]
    wrong = [
        (item, answer)
        for item, answer in zip(items, perfect_answers(items, tokenizer, rule), strict=True)
        if not same_text(answer, item.answer)
    ]
    if not wrong:
        return
    item, answer = wrong[0]
    file, _, row = item.item_id.rpartition(":")
    what = (
        f"{len(wrong)} of {len(items)} answers would be scored as wrong even for a perfect model: "
        f"it generates {_short(answer)} where {_short(item.answer)} is expected"
    )
    hint = "change these answers, or measure without generating: evaluation.generate=false"
    raise DataError(what, f"{file}, row {row}", hint)


def _is_untruncated(item: Item, rule: StopRule, config: Config) -> bool:
    if not item.end_ids:
        return False
    return config.evaluation.max_new_tokens is None or len(item.completion_ids) < rule.max_new_tokens


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
