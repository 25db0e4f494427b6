"""A task's rows as the other packages see them: items as text and token ids, the splits, and rows with problems."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qlora_exp.errors import DataError
from qlora_exp.records.types import Data

SPLIT_NAMES = ("train", "validation", "test")
DROP_HINT = "mend the rows, or leave them out and count them with task.invalid_rows=drop"


@dataclass(frozen=True)
class RowProblem:
    """One row that can't be used. ``reason`` is equal for all rows with this fault; the record counts rows by it."""

    file: str
    row: int
    """1-based, as an editor shows it: a line of a text file, an element of a .json or Parquet file."""
    column: str | None
    reason: str
    detail: str
    hint: str | None = None
    of_template: bool = False
    """The chat template is at fault, so every row would have the problem: it is reported once."""

    def error(self, others: int = 0) -> DataError:
        """Return the problem as an error. ``others``: how many other rows have the same problem."""
        where = f"{self.file}, row {self.row}" + (f", and {others} other rows" if others else "")
        if self.column is not None:
            where += f", column {self.column}"
        return DataError(f"{self.reason}: {self.detail}", where, self.hint or DROP_HINT)


@dataclass(eq=False)
class InvalidRow(Exception):
    """A row can't be used. The fields are those of :class:`RowProblem`."""

    reason: str
    detail: str
    hint: str | None = None
    column: str | None = None
    of_template: bool = False

    def at(self, file: str, row: int) -> RowProblem:
        return RowProblem(file, row, self.column, self.reason, self.detail, self.hint, self.of_template)


@dataclass(frozen=True)
class Item:
    """One row, ready for training and scoring. ``prompt_ids + completion_ids + end_ids`` is the training sequence.

    The loss is on ``completion_ids + end_ids``; in training, ``learned`` may add earlier answers."""

    item_id: str
    """File and row, e.g. ``train.jsonl:17``; the same in every run on the same files."""
    prompt: str
    """The prompt as the model reads it: with the template, and all that the template writes before the answer."""
    completion: str
    """The learned text after the prompt, as tokenized: with the separating space of the plain format, without EOS or
    the template's end. If ``max_length`` cuts it, what is left."""
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    """EOS, or the template's end of turn. Empty if ``max_length`` cuts it."""
    label: str | None
    answer: str
    """The text that generation should give, stripped and never cut. If the answer has tool calls or reasoning:
    everything that the model writes, without control tokens."""
    completion_bytes: int
    """UTF-8 bytes of the stripped completion, for bits per byte; equal in the plain and the chat format."""
    extra: dict[str, Any]
    """The row's other columns."""
    group: str | None = None
    """The row's document or context; ``None`` without ``task.columns.group``."""
    learned: tuple[bool, ...] | None = None
    """For each token of ``ids``, whether it has a training loss, if earlier answers of a conversation are learned, too.
    ``None``: the completion and the end have a loss."""

    @property
    def where(self) -> str:
        """Return the item's place for an error message, e.g. ``train.jsonl, row 17``."""
        file, _, row = self.item_id.rpartition(":")
        return f"{file}, row {row}"

    @property
    def ids(self) -> tuple[int, ...]:
        """Return the whole training sequence."""
        return self.prompt_ids + self.completion_ids + self.end_ids

    @property
    def completion_mask(self) -> tuple[int, ...]:
        """Return 1 for each token of ``ids`` with a training loss, else 0."""
        if self.learned is not None:
            return tuple(int(learned) for learned in self.learned)
        return (0,) * len(self.prompt_ids) + (1,) * (len(self.completion_ids) + len(self.end_ids))


@dataclass(frozen=True)
class Splits:
    """A task's items by split, its labels, and the texts on which forgetting is measured."""

    train: tuple[Item, ...]
    validation: tuple[Item, ...]
    test: tuple[Item, ...]
    labels: tuple[str, ...]
    """The options of a classification task; empty for generation."""
    label_ids: dict[str, tuple[int, ...]]
    """Completion ids by label, tokenized after a prompt of this task in this format."""
    format: str
    """``chat`` or ``plain``."""
    record: Data
    general_text: tuple[str, ...]
    """Untemplated documents on which forgetting is measured, the same for every task and model."""
    general_chats: tuple[Item, ...] = ()
    """Held-out chats in the model's own template, the last answer as the completion; empty for the plain format."""
    label_end_ids: tuple[int, ...] = ()
    """The tokens of the end (EOS, end of turn) that each label's likelihood includes: as many as distinguish two labels
    if one begins the other, else none."""
    left_out: tuple[RowProblem, ...] = ()
    """Rows that are in no split, with the reason: invalid ones (``task.invalid_rows=drop``) and exact duplicates."""
    truncated: tuple[RowProblem, ...] = ()
    """Rows whose answer or end ``training.max_length`` cuts."""
    notes: tuple[str, ...] = ()
    """Remarks on rows that are read as they are in the file but may hold a mistake."""
    whole_texts: bool = False
    """Whether rows have no prompt (continued pretraining): nothing is generated, and every token is scored."""
    read_as: str | None = None
    """Which layout was recognised, and how to change it; ``None``: the task's settings say how rows are read."""
    answer_after: str | None = None
    """Exact match compares what follows the last occurrence of this mark (``task.answer_after``)."""
    warnings: tuple[str, ...] = ()
    """What makes the answers less sure than they seem: rows that share a context without a group column."""

    @property
    def items(self) -> tuple[Item, ...]:
        """Return the items of all splits."""
        return self.train + self.validation + self.test

    @property
    def option_ids(self) -> dict[str, tuple[int, ...]]:
        """Return, by label, the tokens whose log-likelihoods are summed."""
        return {label: ids + self.label_end_ids for label, ids in self.label_ids.items()}

    def positions_for(self, items: Iterable[Item]) -> tuple[int, Item]:
        """Return the positions that the longest of ``items`` takes in a model, and that item.

        An item takes the tokens of its sequence, or of its prompt with the longest label.
        """
        option = max(map(len, self.option_ids.values()), default=0)
        sizes = ((max(len(item.ids), len(item.prompt_ids) + option), item) for item in items)
        return max(sizes, key=lambda size: size[0])


def check_positions(splits: Splits, positions: int | None) -> None:
    """Raise :class:`DataError` if an item, or its prompt with the longest label, has more tokens than ``positions``.

    The error names the longest item's row. ``None``: the model's limit is not known. Generation needs no check: it ends
    at the limit."""
    if positions is None:
        return
    needed, item = splits.positions_for(splits.items)
    if needed <= positions:
        return
    prompt = len(item.prompt_ids)
    what = f"the prompt has {prompt} tokens and the answer up to {needed - prompt}; the model takes {positions}"
    hint = "a shorter row, or a model with a longer context"
    if not splits.labels and prompt < positions:
        hint = f"training.max_length={positions} cuts such answers; or {hint}"
    raise DataError(what, item.where, hint)


def check_vocabulary(splits: Splits, tokenizer: Any, vocabulary_size: int) -> None:
    """Raise :class:`DataError` if an item, a label or the padding has a token without an embedding in the model.

    The tokenizer may have such tokens as long as none occurs."""
    if len(tokenizer) <= vocabulary_size:
        return
    hint = "use the folder that the tokenizer came with, whose model has a row for each of its tokens"
    outside = f"; the model's vocabulary ends at {vocabulary_size - 1}"
    if (tokenizer.pad_token_id or 0) >= vocabulary_size:
        raise DataError(f"padding is token {tokenizer.pad_token_id}{outside}", "the model's tokenizer", hint)
    for label, ids in splits.label_ids.items():
        if max(ids, default=0) >= vocabulary_size:
            raise DataError(f"the label {label!r} has token {max(ids)}{outside}", "the task's labels", hint)
    item = max(splits.items, key=lambda item: max(item.ids, default=0))
    if max(item.ids, default=0) >= vocabulary_size:
        raise DataError(f"the row has token {max(item.ids)}{outside}", item.where, hint)
