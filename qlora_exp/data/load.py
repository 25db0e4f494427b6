"""A task's rows as token ids for one tokenizer, and a record of what was used, cut and left out."""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qlora_exp.config.enums import InvalidRows, Learn, SpecialTokens, TaskKind
from qlora_exp.config.schema import Config
from qlora_exp.data.chat_template import reads_clock
from qlora_exp.data.encoding import (
    Encoding,
    Tokenizer,
    check_tokenizer,
    date_of,
    encode_rows,
    resolve_format,
    template_tokens,
)
from qlora_exp.data.items import InvalidRow, Item, RowProblem, Splits
from qlora_exp.data.layouts import Reading
from qlora_exp.data.plain_text import Texts, plain_prompt, plain_text, unusual_space_notes
from qlora_exp.data.rows import Example
from qlora_exp.data.sources import read_general_chats, read_general_text
from qlora_exp.data.splits import (
    RawSplits,
    check_no_label_lost,
    count_reasons,
    load_rows,
    raise_problems,
    require_rows,
)
from qlora_exp.errors import DataError
from qlora_exp.records.types import Data

LOSS_IGNORE_INDEX = -100
"""torch's ``ignore_index``: a position with this label has no loss."""


def load_data(config: Config, tokenizer: Tokenizer, max_length: int, rows: RawSplits | None = None) -> Splits:
    """Return every split as token ids. The end of a sequence is cut at ``max_length`` tokens, as TRL does.

    ``rows``: the task's rows, if they have been read already.

    Raises :class:`DataError` or :class:`Problems` with file, row number, column and reason, as ``load_rows`` does.
    ``task.invalid_rows`` also covers rows that can't be tokenized, or whose completion would be cut away.
    """
    rows = rows or load_rows(config.task)
    reading = rows.reading or Reading(config.task)
    format = resolve_format(config, reading.whole_texts)
    config = replace(config, task=reading.task)
    check_tokenizer(tokenizer, format)
    if max_length < 2:
        raise DataError(f"max_length is {max_length}", "training.max_length", "at least 2: a prompt and an answer")
    uncut = config.task.kind is TaskKind.classification
    date, learns_all = date_of(config), config.task.learn is Learn.all
    if learns_all and format == "plain":
        hint = "task.learn=last, or task.format=chat"
        raise DataError("the plain format learns the last answer alone", "task.learn=all", hint)
    prefixes: set[str] = set()
    sample: Texts | None = None  # the first training row with a prefix, else the first one
    used: dict[str, list[Example]] = {}
    items: dict[str, tuple[Item, ...]] = {}
    problems: list[RowProblem] = []
    truncated: list[RowProblem] = []
    for split, examples in rows.examples.items():
        used[split], made = [], []
        every_turn = learns_all and split == "train"  # the other splits are scored on the last answer
        encodings = encode_rows(examples, tokenizer, format, date=date, every_turn=every_turn)
        for example, encoding in zip(examples, encodings, strict=True):
            if isinstance(encoding, RowProblem):
                problems.append(encoding)
                continue
            prefixes.add(encoding.texts.prefix)
            if split == "train" and (sample is None or (encoding.texts.prefix and not sample.prefix)):
                sample = encoding.texts
            try:
                item = _make_item(example, encoding, tokenizer, max_length, uncut)
            except InvalidRow as error:
                problems.append(error.at(example.file, example.row))
                continue
            used[split].append(example)
            made.append(item)
            if len(encoding.ids) > max_length:
                reason = f"truncated to training.max_length={max_length}: the end of the answer is not learned"
                truncated.append(RowProblem(example.file, example.row, None, reason, f"{len(encoding.ids)} tokens"))
        items[split] = tuple(made)
    if config.task.invalid_rows is InvalidRows.error:
        raise_problems(problems)
    left_out = (*rows.left_out, *problems)
    dropped = count_reasons(left_out)
    for split in ("train", "validation"):
        require_rows(split, items[split], problems)
    check_no_label_lost(rows.train, used["train"], problems)
    label_ids, label_end_ids = _label_ids(rows, used["train"][0], tokenizer, format, date)
    _check_labels([item for split in items.values() for item in split], label_ids, label_end_ids)
    template = tokenizer.chat_template if format == "chat" else None
    chat_date = config.task.date if reads_clock(template) else None
    read_as = [format, template, *_fingerprint_extras(chat_date, prefixes, learns_all)]
    notes = unusual_space_notes(used["train"]) if format == "plain" and config.task.separator is None else []
    fingerprint, rows_fingerprint = _fingerprints((read_as, []), config, used, rows)
    record = Data(
        task=config.task.name,
        fingerprint=fingerprint,
        train_items=len(items["train"]),
        validation_items=len(items["validation"]),
        test_items=len(items["test"]),
        dropped_rows=sum(dropped.values()),
        dropped_reasons=dropped,
        labels=tuple(rows.options),
        label_end_tokens=len(label_end_ids) if rows.options else None,
        mean_prompt_tokens=_mean([len(item.prompt_ids) for item in items["train"]]),
        mean_completion_tokens=_mean([len(item.completion_ids) for item in items["train"]]),
        template_tokens=template_tokens(tokenizer, format, date),
        template_tokens_trained=config.model.template_tokens_trained.get(config.model.variant.name)
        if format == "chat"
        else None,
        truncated_items=len(truncated),
        rows_fingerprint=rows_fingerprint,
        answer_prefix=sample.prefix or None if sample is not None else None,
        answer_prefix_variables=dict(sample.variables) if sample is not None and sample.variables else None,
        chat_date=chat_date,
        layout=reading.layout,
        layout_settings=dict(reading.settings) or None,
    )
    return Splits(
        items["train"],
        items["validation"],
        items["test"],
        tuple(rows.options),
        label_ids,
        format,
        record,
        read_general_text(),
        _general_chats(tokenizer, date) if format == "chat" else (),
        label_end_ids=label_end_ids,
        left_out=left_out,
        truncated=tuple(truncated),
        notes=(*rows.notes, *notes),
        whole_texts=reading.whole_texts,
        answer_after=reading.task.answer_after,
        read_as=reading.line,
        warnings=rows.warnings,
    )


def to_training_dataset(items: Sequence[Item], numbered: bool = False) -> Any:
    """Return a ``datasets.Dataset`` of ``input_ids`` and ``labels`` (-100: no loss); ``numbered``: and ``item``, the
    row's place among the items.

    So SFTTrainer has nothing to prepare. Each of its passes over 8,000 rows would take 0.3 s in every trial."""
    import datasets

    columns: dict[str, list[Any]] = {
        "input_ids": [list(item.ids) for item in items],
        "labels": [
            [
                token if learned else LOSS_IGNORE_INDEX
                for token, learned in zip(item.ids, item.completion_mask, strict=True)
            ]
            for item in items
        ],
    }
    if numbered:
        columns["item"] = list(range(len(items)))
    return datasets.Dataset.from_dict(columns)


def _make_item(example: Example, encoding: Encoding, tokenizer: Tokenizer, max_length: int, uncut: bool) -> Item:
    """Return the item, cut at ``max_length`` tokens. ``uncut``: the completion is an option and can't be cut.

    Raises :class:`InvalidRow` if no token of the completion would be left.
    """
    prompt_ids, completion_ids = encoding.prompt_ids, encoding.completion_ids
    room = max_length - len(prompt_ids)
    if room <= 0 or (uncut and room < len(completion_ids)):
        lengths = f"the prompt has {len(prompt_ids)} tokens, the completion {len(completion_ids)}"
        hint = f"training.max_length={len(encoding.ids)} or a shorter row"
        raise InvalidRow("completion truncated away", f"{lengths}, and max_length is {max_length}", hint)
    answer, completion, scored_text = encoding.answer, encoding.texts.completion, example.completion
    if encoding.texts.structured:
        settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        answer, scored_text = str(tokenizer.decode(completion_ids, **settings)).strip(), completion
    if room < len(completion_ids):
        completion = scored_text = str(tokenizer.decode(completion_ids[:room], clean_up_tokenization_spaces=False))
    return Item(
        item_id=example.item_id,
        prompt=encoding.texts.prompt,
        completion=completion,
        prompt_ids=prompt_ids,
        completion_ids=completion_ids[:room],
        end_ids=encoding.end_ids[: max(0, room - len(completion_ids))],
        label=example.label,
        answer=answer,
        completion_bytes=len(scored_text.strip().encode("utf-8")),
        extra=example.extra,
        group=example.group,
        learned=encoding.learned[:max_length] if encoding.learned is not None else None,
    )


def _general_chats(tokenizer: Tokenizer, date: datetime.date) -> tuple[Item, ...]:
    """Return the general chats that this tokenizer's template can write, uncut. Many take no system message."""
    examples = read_general_chats()
    encodings = zip(examples, encode_rows(examples, tokenizer, "chat", date=date), strict=True)
    return tuple(
        _make_item(example, encoding, tokenizer, sys.maxsize, uncut=False)
        for example, encoding in encodings
        if isinstance(encoding, Encoding)
    )


def _label_ids(
    rows: RawSplits, context: Example, tokenizer: Tokenizer, format: str, date: datetime.date
) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """Return each option's completion ids, and the tokens of the end that are needed to distinguish the options.

    The ids are those after the prompt of ``context``, because the boundary may change a label's first token."""
    label_ids: dict[str, tuple[int, ...]] = {}
    first: Encoding | None = None
    examples = [
        replace(context, completion=completion, label=label, answer=None) for label, completion in rows.options.items()
    ]
    for example, result in zip(examples, encode_rows(examples, tokenizer, format, date=date), strict=True):
        label = str(example.label)
        if isinstance(result, RowProblem):
            raise DataError(f"the label {label!r} can't be tokenized: {result.detail}", "task.labels", result.hint)
        first = first or result
        if (result.prompt_ids, result.end_ids) != (first.prompt_ids, first.end_ids):
            what = (
                f"the prompt ends in different tokens before the label {label!r} than before {next(iter(label_ids))!r}"
            )
            raise DataError(what, "task.labels", "let the prompt end on a word or a colon")
        label_ids[label] = result.completion_ids
    label_by_ids: dict[tuple[int, ...], str] = {}
    for label, ids in label_ids.items():
        if label_by_ids.setdefault(ids, label) != label:
            what = f"the labels {label_by_ids[ids]!r} and {label!r} have the same tokens"
            raise DataError(what, "task.labels", "use labels that this tokenizer can tell apart")
    return label_ids, _distinguishing_end(label_by_ids, first.end_ids if first is not None else ())


def _distinguishing_end(label_by_ids: dict[tuple[int, ...], str], end: tuple[int, ...]) -> tuple[int, ...]:
    """Return as much of ``end`` as each label's likelihood must include: nothing, unless one label begins another.

    Without the end, the shorter label would be at least as likely as the longer one after any prompt."""
    for length in range(len(end) + 1):
        options = {ids + end[:length]: label for ids, label in label_by_ids.items()}
        ambiguous = [
            (ids, label) for ids, label in options.items() if any(ids[:n] in options for n in range(1, len(ids)))
        ]
        if not ambiguous:
            return end[:length]
    ids, label = ambiguous[0]
    shorter = next(options[ids[:n]] for n in range(1, len(ids)) if ids[:n] in options)
    what = f"the tokens of the label {shorter!r} and its end begin those of {label!r}, which could then never be chosen"
    hint = "rename one of them in the data; or task.kind=generation, which compares generated answers"
    raise DataError(what, "task.labels, or the labels of the training rows", hint)


def _check_labels(items: Sequence[Item], label_ids: dict[str, tuple[int, ...]], label_end_ids: tuple[int, ...]) -> None:
    """Raise :class:`DataError` unless each label has the same tokens after every prompt.

    Otherwise its likelihoods could not be compared between items. ``label_end_ids`` must be in each row, too."""
    for item in items:
        if item.label is not None and item.completion_ids != label_ids[item.label]:
            raise DataError(
                f"the label {item.label!r} has other tokens after this prompt than after the first one",
                item.where,
                "end all prompts in the same way, with the same white space before each label, e.g. by a template: "
                "$'task.prompt=\"{COLUMN}\\nLabel:\"'",
            )
        if item.label is not None and item.end_ids[: len(label_end_ids)] != label_end_ids:
            what = "training.max_length cuts the end of the label, which tells it from a label that begins with it"
            longest = len(item.prompt_ids) + len(item.completion_ids) + len(label_end_ids)
            raise DataError(what, item.where, f"training.max_length={longest}, or a shorter row")


def _fingerprint_extras(date_read: str | None, prefixes: set[str], learns_all: bool) -> list[str]:
    """Return what the fingerprint holds in addition to format and template, only if it differs from the default.

    So other data sets keep the fingerprints that earlier versions gave them."""
    date = [f"date: {date_read}"] if date_read is not None else []
    written = [f"answer prefix: {prefix}" for prefix in sorted(prefixes) if prefix]
    return [*date, *written, *(["learn: all"] if learns_all else [])]


def _fingerprints(
    read_as: Sequence[list[str | None]], config: Config, used: dict[str, list[Example]], rows: RawSplits
) -> list[str]:
    """Return, for each of ``read_as`` (format and chat template; an empty list leaves them out), the SHA-256 of all
    used rows in order, the task's templates and ``read_as``.

    File names and row numbers make no difference."""
    task = config.task
    digests = [(hashlib.sha256(), ways[:1] != ["chat"]) for ways in read_as]

    def add(value: object, plain_only: bool = False) -> None:
        line = json.dumps(value, ensure_ascii=False, sort_keys=True).encode("utf-8") + b"\n"
        for digest, plain in digests:
            if plain or not plain_only:
                digest.update(line)

    for (digest, _), ways in zip(digests, read_as, strict=True):
        head = [*ways, task.prompt, task.completion, task.system, list(rows.options.items())]
        digest.update(json.dumps(head, ensure_ascii=False, sort_keys=True).encode("utf-8") + b"\n")
    if task.special_tokens is not SpecialTokens.refuse:
        add(["special_tokens", task.special_tokens.value], plain_only=True)
    for split, examples in used.items():
        for example in examples:
            messages = [
                [message.role, message.content, *([message.more] if message.more else [])]
                for message in example.messages
            ]
            answer = [example.answer.more] if example.answer is not None else []
            around = [part for part in (example.tools, example.variables) if part]
            add([split, messages, example.completion, example.label, *answer, *around])
            if plain_text(example) != _text_with_one_space(example):
                add(["text", plain_text(example)], plain_only=True)
    return [digest.hexdigest() for digest, _ in digests]


def _text_with_one_space(example: Example) -> str:
    """Return the row as earlier versions wrote it in the plain format: equal texts keep their recorded fingerprint."""
    prompt = plain_prompt(example).rstrip(" \t")
    return prompt + ("" if prompt.endswith(("\n", "\r")) else " ") + example.completion


def _mean(lengths: Sequence[int]) -> float | None:
    return sum(lengths) / len(lengths) if lengths else None
