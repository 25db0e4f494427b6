"""What formats hand to tokenization: an example's texts, or why it can't be written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMAT_HINT = "task.format=plain, or another template: model.chat_template=FILE.jinja"


@dataclass(frozen=True)
class Texts:
    prompt: str
    completion: str
    end: str
    structured: bool = False
    """The completion holds more than the answer's text: tool calls, or reasoning in a field."""
    prefix: str = ""
    """The end of ``prompt`` that the chat template writes after its generation prompt."""
    variables: Mapping[str, Any] | None = None
    """Template variables with which the generation prompt ends in ``prefix``; ``None``: not needed, or none do."""
    literal: bool = False
    """Special tokens that are written out in the prompt and completion are read as ordinary text."""
    learned: tuple[tuple[int, int], ...] | None = None
    """Ranges of characters that carry a loss, where earlier answers are learned too."""


class RowRefused(Exception):
    def __init__(self, reason: str, detail: str, hint: str, of_template: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.hint, self.of_template = reason, detail, hint, of_template
