"""How long a task's training rows are, counted before a model (or torch) is loaded."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_exp.config import Config, TaskSource
from qlora_exp.data import Example, load_rows, resolve_format
from qlora_exp.data.formatting import Encoding, check_tokenizer, encode
from qlora_exp.errors import QloraExpError
from qlora_exp.planning.tokenizer_file import FileTokenizer, tokenizer_of

DRAWN, LONGEST = 1000, 50
"""Of more rows, so many are drawn and counted, and as many of the longest by characters for the longest in tokens."""


@dataclass(frozen=True)
class PlannedRows:
    """Training rows in tokens, as ``training.max_length`` leaves them. ``counted`` of ``rows`` were tokenized;
    ``loss_share`` is the share of tokens that carry a loss."""

    rows: int
    counted: int
    mean_tokens: float
    shortest_tokens: int
    longest_tokens: int
    loss_share: float


class RowCounter:
    """Counts the rows of configurations' tasks, each task once for each tokenizer and format."""

    def __init__(self) -> None:
        self._counted: dict[tuple[str, ...], _Counted | None] = {}

    def of(self, config: Config) -> PlannedRows | None:
        """``None``: the data or the tokenizer isn't on this machine, or the rows can't be read; ``validate`` says
        why."""
        if config.task.source is TaskSource.hub:  # reading it may mean to download it
            return None
        model = config.model
        which = (model.family, model.variant.value, model.path or "", model.revision or "", model.chat_template or "")
        key = (*which, repr(config.task), resolve_format(config))
        if key not in self._counted:
            try:
                self._counted[key] = _counted(config)
            except QloraExpError:
                self._counted[key] = None
        counted = self._counted[key]
        return counted.cut_at(config.training.max_length) if counted is not None else None


@dataclass(frozen=True)
class _Counted:
    """Tokens of each row: all of them, and of these its completion and end. ``drawn`` rows of a larger file stand for
    all, ``longest`` for its longest."""

    rows: int
    drawn: tuple[tuple[int, int], ...]
    longest: tuple[tuple[int, int], ...]

    def cut_at(self, max_length: int) -> PlannedRows:
        lengths = [min(whole, max_length) for whole, _ in self.drawn]
        ends = [min(whole, max_length) for whole, _ in self.longest]
        return PlannedRows(
            rows=self.rows,
            counted=len(self.drawn) + len(self.longest),
            mean_tokens=statistics.fmean(lengths),
            shortest_tokens=min(lengths),
            longest_tokens=max([*lengths, *ends]),
            loss_share=sum(scored for _, scored in self.drawn) / sum(whole for whole, _ in self.drawn),
        )


def _counted(config: Config) -> _Counted | None:
    tokenizer = tokenizer_of(config.model)
    if tokenizer is None:
        return None
    format = resolve_format(config)
    check_tokenizer(tokenizer, format)
    rows = load_rows(config.task).train
    drawn: Sequence[Example] = rows
    longest: Sequence[Example] = ()
    if len(rows) > DRAWN + LONGEST:
        drawn = random.Random(0).sample(rows, DRAWN)
        longest = sorted(rows, key=_characters)[-LONGEST:]
    counted = _Counted(len(rows), _tokens(drawn, tokenizer, format), _tokens(longest, tokenizer, format))
    return counted if counted.drawn else None


def _characters(example: Example) -> int:
    return sum(len(message.content) for message in example.messages) + len(example.completion)


def _tokens(examples: Sequence[Example], tokenizer: FileTokenizer, format: str) -> tuple[tuple[int, int], ...]:
    encodings = [one for one in encode(examples, tokenizer, format) if isinstance(one, Encoding)]
    scored = [len(one.completion_ids) + len(one.end_ids) for one in encodings]
    return tuple((len(one.prompt_ids) + each, each) for one, each in zip(encodings, scored, strict=True))
