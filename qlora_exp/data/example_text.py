"""An example as text, ready to be tokenized, or the reason why its format can't write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMAT_HINT = "task.format=plain, or another template: model.chat_template=FILE.jinja"


@dataclass(frozen=True)
class Texts:
    """One example as text: the model is trained on ``prompt + completion + end``."""

    prompt: str
    completion: str
    end: str
    structured: bool = False
    """The completion holds more than the answer's text: tool calls, or reasoning in a field."""
    prefix: str = ""
    """The end of ``prompt`` that the chat template writes after its generation prompt."""
    variables: Mapping[str, Any] | None = None
    """Template variables that make the generation prompt end in ``prefix``; ``None``: none are needed, or none do."""
    literal: bool = False
    """The tokenizer reads special tokens in the prompt and completion as ordinary text."""
    learned: tuple[tuple[int, int], ...] | None = None
    """Ranges of characters with a loss, if earlier answers are learned, too."""


class RowRefused(Exception):
    """The format can't write the row. ``of_template``: the chat template is at fault, so every row would be refused."""

    def __init__(self, reason: str, detail: str, hint: str, of_template: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.hint, self.of_template = reason, detail, hint, of_template
