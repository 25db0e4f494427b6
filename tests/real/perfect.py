"""A model that answers with exactly the tokens that it was trained on, as :func:`generate` sees one."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from qlora_exp.config.schema import Config
from qlora_exp.data.items import Item, Splits
from qlora_exp.data.texts import same_text
from qlora_exp.evaluation.generation import generate, stop_rule


class Perfect:
    """Stands for a context: what comes next is each row's next trained token."""

    def __init__(self, rows: Sequence[Sequence[int]], place: int, vocabulary: int) -> None:
        self.rows, self.place, self.vocabulary = rows, place, vocabulary
        self.mask = torch.ones(len(rows), 1, dtype=torch.long)
        self.ids = self.mask
        self.model = SimpleNamespace(max_positions=None)

    def logits(self) -> torch.Tensor:
        logits = torch.zeros(len(self.rows), self.vocabulary)
        for number, row in enumerate(self.rows):
            logits[number, row[min(self.place, len(row) - 1)]] = 1.0
        return logits

    def select(self, kept: Sequence[int]) -> Perfect:
        return Perfect([self.rows[number] for number in kept], self.place, self.vocabulary)

    def extend(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, Perfect]:
        following = Perfect(self.rows, self.place + 1, self.vocabulary)
        return following.logits()[:, None], following


def perfect_generations(splits: Splits, tokenizer: Any, config: Config) -> list[tuple[Item, str]]:
    """Each item with what the perfect model generates for it."""
    items = (*splits.train, *splits.validation, *splits.test)
    rows = [[*item.completion_ids, *item.end_ids] for item in items]
    start = Perfect(rows, 0, len(tokenizer))
    rule = stop_rule(splits, tokenizer, config)
    return list(zip(items, generate(start.logits(), start, tokenizer, rule), strict=True))  # type: ignore[arg-type]


def oracle_score(splits: Splits, tokenizer: Any, config: Config) -> tuple[float, float]:
    """Exact match and invalid rate of the perfect model."""
    generated = perfect_generations(splits, tokenizer, config)
    exact = sum(same_text(text, item.answer) for item, text in generated) / len(generated)
    labels = {
        tokenizer.decode(list(ids), skip_special_tokens=True).strip().casefold() for ids in splits.label_ids.values()
    }
    invalid = sum(bool(labels) and text.casefold() not in labels for _, text in generated) / len(generated)
    return exact, invalid
