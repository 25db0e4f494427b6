"""Greedy generation in batches after the prefill, its stop rule, and a check that right answers can be generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora_exp.config.schema import Config
from qlora_exp.data.texts import same_text
from qlora_exp.errors import DataError
from qlora_exp.evaluation.kv_cache import PrefilledBatch

if TYPE_CHECKING:
    from qlora_exp.data.items import Item, Splits

# Tokens beyond the longest expected answer: without them, an answer that is too long would be cut and count as correct.
MARGIN_TOKENS = 4


@dataclass(frozen=True)
class StopRule:
    """When an answer ends: at one of ``token_ids``, at the first newline after its first word if ``at_newline``, or
    after ``max_new_tokens`` tokens."""

    token_ids: frozenset[int]
    at_newline: bool
    max_new_tokens: int
    keep_indentation: bool = False
    """Whether answers keep the white space before their first word, because some answers of the task are indented."""


def stop_rule(splits: Splits, tokenizer: Any, config: Config, model: Any = None) -> StopRule:
    """Return the stop rule: EOS of tokenizer and model, the task's end of turn, and a newline unless answers contain
    one.

    It follows from all of the task's items, so that it is equal for every split and batch. The token limit is
    ``evaluation.max_new_tokens``, or the tokens of the longest answer plus MARGIN_TOKENS: of the longest label or, for
    free text, of the longest completion in any split after truncation to ``training.max_length``. ``model``: the
    transformers model, or ``None`` before it is loaded.
    """
    stop_ids: set[int] = set()
    for source in (tokenizer, getattr(model, "generation_config", None), getattr(model, "config", None)):
        value = getattr(source, "eos_token_id", None)
        stop_ids.update([value] if isinstance(value, int) else value or [])
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    # Only special tokens count as end of turn; if a template ends turns with ordinary text, its newline ends an answer.
    stop_ids.update({item.end_ids[0] for item in splits.items if item.end_ids} & special)
    limit = config.evaluation.max_new_tokens
    if limit is None:
        expected = splits.label_ids.values() if splits.labels else [item.completion_ids for item in splits.items]
        limit = max(map(len, expected), default=0) + MARGIN_TOKENS
    answers = [item.answer for item in splits.items]
    indented = any(answer[:1].isspace() for answer in answers)
    return StopRule(frozenset(stop_ids), not any("\n" in answer for answer in answers), limit, indented)


def generate(next_logits: Tensor, context: PrefilledBatch, tokenizer: Any, rule: StopRule) -> list[str]:
    """Return the greedy answer to each row's prompt as text, without special tokens, stripped according to ``rule``.

    ``next_logits`` (rows, vocabulary) and ``context`` come from :func:`~qlora_exp.evaluation.kv_cache.prefill`. Rows
    that have ended leave the batch. A row also ends at the model's last position.
    """
    answers: list[list[int]] = [[] for _ in range(len(next_logits))]
    limits = [rule.max_new_tokens] * len(answers)
    if (positions := context.model.max_positions) is not None:
        # The last generated token isn't fed to the model, so it needs no position.
        lengths = context.mask.sum(dim=1).tolist()
        limits = [min(rule.max_new_tokens, positions - int(length) + 1) for length in lengths]
    open_rows = [row for row in range(len(answers)) if limits[row] > 0]
    slots = list(range(len(answers)))  # which row each row of the context belongs to
    chosen = next_logits.argmax(dim=-1).tolist()
    while open_rows:
        still_open = []
        for slot, row in enumerate(slots):
            if row in open_rows and chosen[slot] not in rule.token_ids:
                answers[row].append(chosen[slot])
                if len(answers[row]) < limits[row] and not _line_ended(answers[row], tokenizer, rule):
                    still_open.append(row)
        open_rows = still_open
        if not open_rows:
            break
        if len(open_rows) < len(slots):
            places = [slot for slot, row in enumerate(slots) if row in open_rows]
            context, slots, chosen = context.select(places), [slots[k] for k in places], [chosen[k] for k in places]
        ids = torch.tensor(chosen, device=context.ids.device)[:, None]
        logits, context = context.extend(ids, torch.ones_like(ids))
        chosen = logits[:, -1].argmax(dim=-1).tolist()
    return [answer_text(ids, tokenizer, rule) for ids in answers]


def _line_ended(ids: list[int], tokenizer: Any, rule: StopRule) -> bool:
    if not rule.at_newline or "\n" not in tokenizer.decode(ids[-1:]):
        return False
    return "\n" in decode_completions(ids, tokenizer).lstrip()


def decode_completions(ids: Sequence[int], tokenizer: Any) -> str:
    """Return the text of ``ids`` without special tokens, with spaces unchanged."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def as_answer(text: str, completion: str, answer: str) -> str:
    """Return a generated ``text`` as it is compared with ``answer``: stripped.

    If ``answer`` is indented and ``text`` has the indentation of ``completion`` (the answer's decoded tokens), the text
    gets the answer's indentation.
    """
    indentation = answer[: len(answer) - len(answer.lstrip())]
    if indentation and _last_line_start(text) == _last_line_start(completion):
        return indentation + text.strip()
    return text.strip()


def _last_line_start(text: str) -> str:
    """Return the white space before a text's first word, without empty lines."""
    return text[: len(text) - len(text.lstrip())].rpartition("\n")[2]


def answer_text(ids: list[int], tokenizer: Any, rule: StopRule) -> str:
    """Return generated tokens as the answer that is scored."""
    text = decode_completions(ids, tokenizer)
    indentation = text[: len(text) - len(text.lstrip())] if rule.keep_indentation else ""
    text = text.strip()
    return indentation + (text.split("\n", 1)[0].strip() if rule.at_newline else text)


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

    Exact match and the invalid rate would then measure the format, not the model. Causes are a tokenizer that doesn't
    restore a text, or an answer that contains the end of a turn. Answers that ``training.max_length`` or
    ``evaluation.max_new_tokens`` truncates aren't checked.
    """
    rule = stop_rule(splits, tokenizer, config)
    limit = config.evaluation.max_new_tokens
    items = [item for item in splits.items if item.end_ids and (limit is None or len(item.completion_ids) < limit)]
    wrong = [
        (item, answer)
        for item, answer in zip(items, perfect_answers(items, tokenizer, rule), strict=True)
        if not same_text(answer, item.answer)
    ]
    if not wrong:
        return
    item, answer = wrong[0]
    what = (
        f"{len(wrong)} of {len(items)} answers would be scored as wrong even for a perfect model: "
        f"it generates {_short(answer)} where {_short(item.answer)} is expected"
    )
    hint = "change these answers, or measure without generating: evaluation.generate=false"
    raise DataError(what, item.where, hint)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
