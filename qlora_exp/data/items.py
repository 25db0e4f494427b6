"""What the other rooms see of the data: items as text and token ids, and a task's splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_exp.data.row_problems import RowProblem
from qlora_exp.records.types import Data


@dataclass(frozen=True)
class Item:
    """One row, ready to train and score on. ``prompt_ids + completion_ids + end_ids`` is the training sequence; the
    loss is on ``completion_ids + end_ids``, in training also where ``learned`` says so."""

    item_id: str
    """File and row, e.g. ``train.jsonl:17``: the same item in every run on the same files."""
    prompt: str
    """The final text: template included, as the model reads it, with all that the template writes before the answer."""
    completion: str
    """The text that follows the prompt and is learned, as tokenized: with the separating space of the plain format,
    without EOS or the template's end. Where ``max_length`` cuts it: what is left."""
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    """EOS, or the template's end of turn. Empty where ``max_length`` cuts it."""
    label: str | None
    answer: str
    """The text that generation should give, stripped; for a cut completion still the whole one. Where the answer has
    tool calls or reasoning: all that the model writes, without control tokens."""
    completion_bytes: int
    """UTF-8 bytes of the completion, stripped: the same in the plain and the chat format (for bits per byte)."""
    extra: dict[str, Any]
    """The row's other columns."""
    learned: tuple[bool, ...] | None = None
    """For each token of ``ids`` whether training computes its loss on it, where earlier answers of a conversation are
    learned too; ``None``: on the completion and the end."""

    @property
    def ids(self) -> tuple[int, ...]:
        """The whole training sequence."""
        return self.prompt_ids + self.completion_ids + self.end_ids

    @property
    def completion_mask(self) -> tuple[int, ...]:
        """1 for each token of ``ids`` that training computes its loss on."""
        if self.learned is not None:
            return tuple(int(learned) for learned in self.learned)
        return (0,) * len(self.prompt_ids) + (1,) * (len(self.completion_ids) + len(self.end_ids))


@dataclass(frozen=True)
class Splits:
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
    """How much of the end (EOS, the end of turn) each label's likelihood includes: as many tokens as tell apart labels
    of which one begins another. Empty for other tasks."""
    left_out: tuple[RowProblem, ...] = ()
    """Rows that are in no split, and why: invalid ones under ``task.invalid_rows=drop``, and exact duplicates."""
    truncated: tuple[RowProblem, ...] = ()
    """Rows whose answer or end ``training.max_length`` cuts."""
    notes: tuple[str, ...] = ()
    """What is read as it is in the file and may not be meant."""

    @property
    def option_ids(self) -> dict[str, tuple[int, ...]]:
        """By label, the tokens whose likelihoods are summed."""
        return {label: ids + self.label_end_ids for label, ids in self.label_ids.items()}
