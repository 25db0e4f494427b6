"""Greedy generation in batches, over prompts that were already read."""

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

# Room beyond the longest expected answer: an answer that goes on must be seen to go on, or cut it would count as right.
MARGIN_TOKENS = 4


@dataclass(frozen=True)
class StopRule:
    """When an answer ends: at one of ``token_ids``, at the newline after its first word, or after so many tokens."""

    token_ids: frozenset[int]
    at_newline: bool
    max_new_tokens: int
    keep_indentation: bool = False
    """Answers keep the white space before their first word: one of the task's answers begins with an indentation."""


def max_new_tokens(splits: Splits, config: Config) -> int:
    """``evaluation.max_new_tokens``, or where it isn't given the tokens of the longest label (for free text: of the
    longest completion of any split, as ``max_length`` leaves it) and MARGIN_TOKENS more."""
    if config.evaluation.max_new_tokens is not None:
        return config.evaluation.max_new_tokens
    known = (*splits.train, *splits.validation, *splits.test)
    expected = splits.label_ids.values() if splits.labels else [item.completion_ids for item in known]
    return max((len(ids) for ids in expected), default=0) + MARGIN_TOKENS


def stop_rule(
    model: Any, tokenizer: Any, end_ids: Iterable[Sequence[int]], answers: Iterable[str], max_new_tokens: int
) -> StopRule:
    """EOS of tokenizer and model, the end of turn that the task trains on, and a newline unless answers hold one.

    ``model`` is the transformers model itself, or ``None`` before one is loaded; ``end_ids`` and ``answers`` are those
    of all of the task's items, so that the rule is the same for every split and batch.
    """
    found: set[int] = set()
    answers = list(answers)
    sources = (tokenizer, getattr(model, "generation_config", None), getattr(model, "config", None))
    for value in (getattr(source, name, None) for source in sources for name in ("eos_token_id",)):
        found.update([value] if isinstance(value, int) else value or [])
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    # An end of turn is a token of its own; a template that ends turns with ordinary text is caught by its newline.
    found.update({ids[0] for ids in end_ids if ids} & special)
    indented = any(answer[:1].isspace() for answer in answers)
    return StopRule(frozenset(found), not any("\n" in answer for answer in answers), max_new_tokens, indented)


def generate(next_logits: Tensor, context: PrefilledBatch, tokenizer: Any, rule: StopRule) -> list[str]:
    """The greedy answer to each row's prompt, as text without special tokens, stripped as ``rule`` says.

    ``next_logits`` (rows, vocabulary) and ``context`` are what :func:`read` gave for the prompts. Rows that ended leave
    the batch. A row also ends where the model has no further positions.
    """
    answers: list[list[int]] = [[] for _ in range(len(next_logits))]
    room = _room(context, rule.max_new_tokens)
    alive = [row for row in range(len(answers)) if room[row] > 0]
    slots = list(range(len(answers)))  # which row each row of the context belongs to
    chosen = next_logits.argmax(dim=-1).tolist()
    while alive:
        continued = []
        for slot, row in enumerate(slots):
            if row in alive and chosen[slot] not in rule.token_ids:
                answers[row].append(chosen[slot])
                if len(answers[row]) < room[row] and not _line_ended(answers[row], tokenizer, rule):
                    continued.append(row)
        alive = continued
        if not alive:
            break
        if len(alive) < len(slots):
            kept = [slot for slot, row in enumerate(slots) if row in alive]
            context, slots, chosen = context.select(kept), [slots[k] for k in kept], [chosen[k] for k in kept]
        ids = torch.tensor(chosen, device=context.ids.device)[:, None]
        logits, context = context.extend(ids, torch.ones_like(ids))
        chosen = logits[:, -1].argmax(dim=-1).tolist()
    return [answer_text(ids, tokenizer, rule) for ids in answers]


def _room(context: PrefilledBatch, max_new_tokens: int) -> list[int]:
    limit = context.model.max_positions
    if limit is None:
        return [max_new_tokens] * len(context.mask)
    # The last generated token is never read back, so it needs no position.
    return [min(max_new_tokens, limit - int(length) + 1) for length in context.mask.sum(dim=1).tolist()]


def _line_ended(ids: list[int], tokenizer: Any, rule: StopRule) -> bool:
    if not rule.at_newline or "\n" not in tokenizer.decode(ids[-1:]):
        return False
    return "\n" in decode_completions(ids, tokenizer).lstrip()


def decode_completions(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of ``ids`` without special tokens, its spaces as they are."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def as_answer(text: str, completion: str, answer: str) -> str:
    """A generated ``text`` as it is compared with ``answer``: without white space around it.

    An answer that begins with an indentation keeps it: the text keeps it, too, where it is indented as ``completion``,
    the answer's own tokens as text.
    """
    indentation = answer[: len(answer) - len(answer.lstrip())]
    if indentation and _last_line_start(text) == _last_line_start(completion):
        return indentation + text.strip()
    return text.strip()


def _last_line_start(text: str) -> str:
    """The white space before a text's first word, without empty lines."""
    return text[: len(text) - len(text.lstrip())].rpartition("\n")[2]


def answer_text(ids: list[int], tokenizer: Any, rule: StopRule) -> str:
    """Generated tokens as the answer that is scored."""
    text = decode_completions(ids, tokenizer)
    before = text[: len(text) - len(text.lstrip())] if rule.keep_indentation else ""
    text = text.strip()
    return before + (text.split("\n", 1)[0].strip() if rule.at_newline else text)
