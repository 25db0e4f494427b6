"""Items as text and token ids, and a task's splits: the data as the other packages see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_exp.data.row_problems import RowProblem
from qlora_exp.records.types import Data


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
    learned: tuple[bool, ...] | None = None
    """For each token of ``ids``, whether it has a training loss, if earlier answers of a conversation are learned, too.
    ``None``: the completion and the end have a loss."""

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

    @property
    def option_ids(self) -> dict[str, tuple[int, ...]]:
        """Return, by label, the tokens whose log-likelihoods are summed."""
        return {label: ids + self.label_end_ids for label, ids in self.label_ids.items()}
