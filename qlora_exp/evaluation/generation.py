"""Greedy generation in batches, after the prefill."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora_exp.config.schema import Config
from qlora_exp.evaluation.kv_cache import PrefilledBatch

if TYPE_CHECKING:
    from qlora_exp.data.items import Splits

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


def max_new_tokens(splits: Splits, config: Config) -> int:
    """Return ``evaluation.max_new_tokens``, or by default the tokens of the longest answer plus MARGIN_TOKENS.

    The longest answer is the longest label or, for free text, the longest completion in any split after truncation to
    ``max_length``.
    """
    if config.evaluation.max_new_tokens is not None:
        return config.evaluation.max_new_tokens
    items = (*splits.train, *splits.validation, *splits.test)
    expected = splits.label_ids.values() if splits.labels else [item.completion_ids for item in items]
    return max((len(ids) for ids in expected), default=0) + MARGIN_TOKENS


def stop_rule(
    model: Any, tokenizer: Any, end_ids: Iterable[Sequence[int]], answers: Iterable[str], max_new_tokens: int
) -> StopRule:
    """Return the stop rule: EOS of tokenizer and model, the task's end of turn, and a newline unless answers contain
    one.

    Args:
        model: the transformers model, or ``None`` before it is loaded.
        end_ids: end tokens of all of the task's items; all items, so that the rule is equal for every split and batch.
        answers: answers of all of the task's items.
    """
    stop_ids: set[int] = set()
    answers = list(answers)
    sources = (tokenizer, getattr(model, "generation_config", None), getattr(model, "config", None))
    for value in (getattr(source, name, None) for source in sources for name in ("eos_token_id",)):
        stop_ids.update([value] if isinstance(value, int) else value or [])
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    # Only special tokens count as end of turn; if a template ends turns with ordinary text, its newline ends an answer.
    stop_ids.update({ids[0] for ids in end_ids if ids} & special)
    indented = any(answer[:1].isspace() for answer in answers)
    return StopRule(frozenset(stop_ids), not any("\n" in answer for answer in answers), max_new_tokens, indented)


def generate(next_logits: Tensor, context: PrefilledBatch, tokenizer: Any, rule: StopRule) -> list[str]:
    """Return the greedy answer to each row's prompt as text, without special tokens, stripped according to ``rule``.

    ``next_logits`` (rows, vocabulary) and ``context`` come from :func:`~qlora_exp.evaluation.kv_cache.prefill`. Rows
    that have ended leave the batch. A row also ends at the model's last position.
    """
    answers: list[list[int]] = [[] for _ in range(len(next_logits))]
    limits = _token_limits(context, rule.max_new_tokens)
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


def _token_limits(context: PrefilledBatch, max_new_tokens: int) -> list[int]:
    """Return how many tokens each row may generate."""
    limit = context.model.max_positions
    if limit is None:
        return [max_new_tokens] * len(context.mask)
    # The last generated token isn't fed to the model, so it needs no position.
    return [min(max_new_tokens, limit - int(length) + 1) for length in context.mask.sum(dim=1).tolist()]


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
