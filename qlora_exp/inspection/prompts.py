"""What an inspection starts from: a scored item, or a prompt of one's own in the run's format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_exp.config.enums import EvaluationSplit
from qlora_exp.config.schema import Config
from qlora_exp.data.encoding import date_of, encode_rows
from qlora_exp.data.items import Item, RowProblem, Splits
from qlora_exp.data.load import load_data
from qlora_exp.data.messages import Message
from qlora_exp.data.rows import Example
from qlora_exp.errors import ConfigError, DataError, RecordError, nearest
from qlora_exp.evaluation.generation import StopRule, stop_rule
from qlora_exp.evaluation.scoring import limit_items
from qlora_exp.records.types import RunRecord

PLACEHOLDER = "x"
"""An answer for prompts without one: the encoding needs a completion."""


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt. ``item``: the scored item that it is of. ``options``: label → its tokens."""

    text: str
    ids: tuple[int, ...]
    stop: StopRule
    item: Item | None = None
    options: dict[str, tuple[int, ...]] | None = None


def item_prompt(config: Config, record: RunRecord, tokenizer: Any, name: str) -> Prompt:
    """Return the prompt of an item of the split on which the run was scored.

    ``name``: its id (``test.jsonl:17``), as ``qlora-exp show RUN --items N --json`` has it, or its number from 0.

    Raises:
        DataError: the data can't be read. RecordError: there is no such item, or the data have changed.
    """
    splits = _data(config, record, tokenizer)
    items = splits.test if config.evaluation.split is EvaluationSplit.test else splits.validation
    item = _find(limit_items(items, config), name)
    options = {label: tuple(splits.option_ids[label]) for label in splits.labels} or None
    return Prompt(item.prompt, item.prompt_ids, stop_rule(splits, tokenizer, config), item, options)


def prompt_format(record: RunRecord | None, tokenizer: Any) -> str:
    """Return the format of prompts, ``chat`` or ``plain``: the run's; without a run, chat if there is a template."""
    if record is None:
        return "chat" if tokenizer.chat_template else "plain"
    return record.plan.format if record.plan is not None else "plain"


def own_prompt(
    config: Config,
    record: RunRecord | None,
    tokenizer: Any,
    turns: Sequence[tuple[str, str]],
    stop: StopRule | None = None,
) -> Prompt:
    """Return the prompt of a conversation, ``(role, text)`` for each message, the last one of the user.

    In the plain format the user's text is the whole prompt. ``stop``: when an answer ends, if it is known already; else
    it is read from the task's data, or without a run (``record=None``) from tokenizer and template.

    Raises:
        DataError: the template or the tokenizer can't write it. ConfigError: the text is empty.
    """
    if not turns or not turns[-1][1].strip():
        raise ConfigError("the prompt is empty", "PROMPT", "qlora-exp inspect RUN 'a prompt', or --item N")
    chat = prompt_format(record, tokenizer) == "chat"
    messages = tuple(Message(role, text) for role, text in turns)
    if chat and config.task.system and turns[0][0] != "system":
        messages = (Message("system", config.task.system), *messages)
    example = Example("prompt", 1, messages, len(turns) > 1, PLACEHOLDER, None, {})
    (encoding,) = encode_rows([example], tokenizer, "chat" if chat else "plain", date=date_of(config))
    if isinstance(encoding, RowProblem):
        raise DataError(f"the prompt can't be encoded: {encoding.reason}", "PROMPT", encoding.hint or "another prompt")
    text = tokenizer.decode(list(encoding.prompt_ids), skip_special_tokens=False)
    return Prompt(text, encoding.prompt_ids, stop or _stop_of(config, record, tokenizer, encoding.end_ids))


def _data(config: Config, record: RunRecord, tokenizer: Any) -> Splits:
    splits = load_data(config, tokenizer, config.training.max_length)
    if record.data is not None and splits.record.fingerprint != record.data.fingerprint:
        raise RecordError(
            "the task's data have changed since the run", config.task.name, "restore them, or give a PROMPT"
        )
    return splits


def _find(items: Sequence[Item], name: str) -> Item:
    if name.isdecimal() and int(name) < len(items):
        return items[int(name)]
    found = [item for item in items if item.item_id == name]
    if found:
        return found[0]
    ids = [item.item_id for item in items]
    hint = f"0 to {len(items) - 1}" if name.isdecimal() else nearest(name, ids)
    raise RecordError(f"the run was scored on no item {name!r}", f"--item {name}", hint)


def _stop_of(config: Config, record: RunRecord | None, tokenizer: Any, end_ids: Sequence[int]) -> StopRule:
    """Return when an answer ends: with a task whose data can be read as in the run, else at the end tokens."""
    if record is not None:
        try:
            return stop_rule(_data(config, record, tokenizer), tokenizer, config)
        except (DataError, RecordError):
            pass  # the data are gone: any prompt can still be answered
    ends = {tokenizer.eos_token_id, *end_ids[:1]} - {None}
    return StopRule(frozenset(ends), False, config.evaluation.max_new_tokens or 64, False)
