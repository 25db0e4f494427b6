"""The lengths of a task's rows, counted before a model is loaded. Only GGUF files need torch for it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_exp.config.enums import InvalidRows, Learn, TaskKind, TaskSource
from qlora_exp.config.schema import Config
from qlora_exp.data.encoding import Encoding, check_tokenizer, date_of, encode_rows, resolve_format
from qlora_exp.data.items import Item, Splits
from qlora_exp.data.rows import Example
from qlora_exp.data.splits import load_rows
from qlora_exp.errors import QloraExpError
from qlora_exp.estimate.tokenizer_file import tokenizer_of
from qlora_exp.estimate.workload import RowLengths

SAMPLED_ROWS, LONGEST_ROWS = 1000, 50
"""If there are more rows, this many are sampled and counted; the longest ones by characters are counted, too, to find
the longest in tokens. Of so many validation rows only the longest are."""


@dataclass(frozen=True)
class PlannedRows:
    """Training rows in tokens, cut at ``training.max_length``. ``counted`` of ``rows`` were tokenized."""

    rows: int
    counted: int
    mean_tokens: float
    lengths: RowLengths


class RowCounter:
    """Counts the rows of the configurations' tasks, each task once per tokenizer and format."""

    def __init__(self) -> None:
        self._tokenized: dict[tuple[str, ...], _TokenizedRows | None] = {}
        self._cut: dict[tuple[Any, ...], PlannedRows | None] = {}
        self._unread: dict[tuple[str, ...], str] = {}

    def of(self, config: Config) -> PlannedRows | None:
        """Return the rows of ``config``'s task. ``None``: the data or the tokenizer isn't on this machine, or the rows
        can't be read; ``validate`` says why."""
        if config.task.source is TaskSource.hub:  # reading it may download it
            return None
        key, length = (repr(config.model), repr(config.task), resolve_format(config)), config.training.max_length
        if key not in self._tokenized:
            try:
                self._tokenized[key] = _tokenize_rows(config)
            except QloraExpError as error:
                self._tokenized[key] = None
                reason = getattr(error, "errors", (error,))[0].what
                self._unread[key] = f"the task's rows can't be read ({reason}); qlora-exp validate says what to do"
        if (key, length) not in self._cut:
            tokenized = self._tokenized[key]
            self._cut[key, length] = tokenized.cut_at(length) if tokenized is not None else None
        return self._cut[key, length]

    def warnings(self, config: Config) -> tuple[str, ...]:
        """Return the warnings on the rows of ``config``'s task, or why :meth:`of` could not read them."""
        key = (repr(config.model), repr(config.task), resolve_format(config))
        tokenized = self._tokenized.get(key)
        if key in self._unread:
            return (self._unread[key],)
        return tokenized.warnings if tokenized is not None else ()


def lengths_of(splits: Splits, limit: int) -> RowLengths:
    """Return the lengths of loaded rows, each row cut at ``limit`` tokens."""
    lengths = [min(length, limit) for length in row_lengths(splits)]
    training_rows = RowLengths.of(lengths, [sum(item.completion_mask[:limit]) for item in splits.train])
    longest_validated = max((_tokens_of(item) for item in splits.validation), default=0)
    return replace(training_rows, longest_validation_tokens=min(longest_validated, limit))


def row_lengths(splits: Splits) -> list[int]:
    """Return the tokens of each training row."""
    return [_tokens_of(item) for item in splits.train]


def _tokens_of(item: Item) -> int:
    return len(item.prompt_ids) + len(item.completion_ids) + len(item.end_ids)


@dataclass(frozen=True)
class _Row:
    """Tokens of a row. ``learned``: which of them carry a loss; ``None``: those of the completion and the end."""

    prompt: int
    completion: int
    end: int
    learned: tuple[bool, ...] | None


@dataclass(frozen=True)
class _TokenizedRows:
    """The tokenized rows of a task. Of a large file, ``drawn`` is a sample, and ``longest`` are its longest rows.
    ``refused``: the sampled rows that can't be encoded. ``validated``: validation rows; of many, the longest."""

    rows: int
    refused: int
    drawn: tuple[_Row, ...]
    longest: tuple[_Row, ...]
    validated: tuple[_Row, ...]
    options: bool
    """The completions are options, which can't be cut."""
    drop: bool
    warnings: tuple[str, ...]

    def cut_at(self, max_length: int) -> PlannedRows | None:
        drawn = [cut for row in self.drawn if (cut := _cut_lengths(row, max_length, self.options)) is not None]
        longest = [cut for row in self.longest if (cut := _cut_lengths(row, max_length, self.options)) is not None]
        counted = (*drawn, *longest)
        if not drawn or (not self.drop and (self.refused or len(counted) < len(self.drawn) + len(self.longest))):
            return None  # the run will refuse them
        validated = [cut for row in self.validated if (cut := _cut_lengths(row, max_length, self.options)) is not None]
        rows = round(self.rows * len(drawn) / (len(self.drawn) + self.refused))
        lengths = replace(
            RowLengths.of([tokens for tokens, _ in drawn], [scored for _, scored in drawn]),
            rows=rows,
            longest_tokens=max(tokens for tokens, _ in counted),
            row_max_loss_tokens=max(scored for _, scored in counted),
            longest_validation_tokens=max((tokens for tokens, _ in validated), default=0),
        )
        return PlannedRows(rows, len(counted), lengths.mean_tokens, lengths)


def _cut_lengths(row: _Row, max_length: int, options: bool) -> tuple[int, int] | None:
    """Return a row's tokens and those with a loss, cut as ``load_data`` cuts; ``None``: ``load_data`` refuses the
    row."""
    room = max_length - row.prompt
    if room <= 0 or (options and room < row.completion):
        return None
    answered = min(row.completion + row.end, room)
    scored = answered if row.learned is None else sum(row.learned[:max_length])
    return row.prompt + answered, scored


def _tokenize_rows(config: Config) -> _TokenizedRows | None:
    tokenizer: Any
    if Path(config.model.variant_path or "").suffix == ".gguf":
        from qlora_exp.models.tokenizers import load_tokenizer

        tokenizer = load_tokenizer(config.model)  # transformers makes it, and has read the file's layers by then
    else:
        tokenizer = tokenizer_of(config.model)
    if tokenizer is None:
        return None
    splits = load_rows(config.task)
    format = resolve_format(config, splits.reading is not None and splits.reading.whole_texts)
    check_tokenizer(tokenizer, format)
    rows = splits.train
    drawn: Sequence[Example] = rows
    longest: Sequence[Example] = ()
    if len(rows) > SAMPLED_ROWS + LONGEST_ROWS:
        drawn = random.Random(0).sample(rows, SAMPLED_ROWS)
        longest = _longest_by_characters(rows)
    validated: Sequence[Example] = splits.validation
    if len(validated) > SAMPLED_ROWS + LONGEST_ROWS:
        validated = _longest_by_characters(validated)
    tokens = _tokens(drawn, tokenizer, format, config)
    read_as = splits.reading.line if splits.reading is not None else None
    return _TokenizedRows(
        rows=len(rows),
        refused=len(drawn) - len(tokens),
        drawn=tokens,
        longest=_tokens(longest, tokenizer, format, config),
        validated=_tokens(validated, tokenizer, format, config),
        options=config.task.kind is TaskKind.classification,
        drop=config.task.invalid_rows is InvalidRows.drop,
        warnings=(*([read_as] if read_as is not None else []), *splits.warnings),
    )


def _longest_by_characters(rows: Sequence[Example]) -> Sequence[Example]:
    return sorted(rows, key=_characters)[-LONGEST_ROWS:]


def _characters(example: Example) -> int:
    messages = [*example.messages, *([example.answer] if example.answer is not None else [])]
    fields = [message.fields for message in messages if message.fields]
    fields_length = len(json.dumps([fields, example.tools])) if fields or example.tools else 0
    return sum(len(message.content) for message in example.messages) + len(example.completion) + fields_length


def _tokens(examples: Sequence[Example], tokenizer: Any, format: str, config: Config) -> tuple[_Row, ...]:
    every_turn = config.task.learn is Learn.all
    encodings = encode_rows(examples, tokenizer, format, date=date_of(config), every_turn=every_turn)
    return tuple(
        _Row(len(encoding.prompt_ids), len(encoding.completion_ids), len(encoding.end_ids), encoding.learned)
        for encoding in encodings
        if isinstance(encoding, Encoding)
    )
