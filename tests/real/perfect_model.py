"""The oracle: a model that answers each known prompt with exactly the tokens it would be trained on.

It goes through the same door as any model (``evaluate_model``), so whatever scores it below 1.0 scores every model too
low.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig

from qlora_exp.config.compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.data.items import Item, Splits
from qlora_exp.data.load import load_data
from qlora_exp.evaluation.scoring import Evaluation, evaluate_model
from qlora_exp.models.tokenizers import load_tokenizer


class PerfectModel(nn.Module):
    """Logits that name the next trained token of what was read, where it is a known prompt or goes on from one."""

    def __init__(self, folder: str, items: Sequence[Item], vocabulary: int) -> None:
        super().__init__()
        self.config = AutoConfig.from_pretrained(folder)
        self.generation_config = GenerationConfig.from_pretrained(folder)
        self.embeddings = nn.Embedding(vocabulary, 1)
        self.following = {
            item.ids[:length]: item.ids[length]
            for item in items
            for length in range(len(item.prompt_ids), len(item.ids))
        }

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> Any:
        logits = torch.zeros(*input_ids.shape, self.embeddings.num_embeddings)
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            read: tuple[int, ...] = ()
            for place, (token, seen) in enumerate(zip(ids, mask, strict=True)):
                read += (token,) * seen
                if (following := self.following.get(read)) is not None:
                    logits[row, place, following] = 50.0
        return SimpleNamespace(logits=logits)


def loaded(overrides: Sequence[str]) -> tuple[Config, Any, Splits]:
    config = compose(list(overrides))
    tokenizer = load_tokenizer(config.model)
    return config, tokenizer, load_data(config, tokenizer, config.training.max_length)


def perfect_scores(folder: str, overrides: Sequence[str]) -> Evaluation:
    """Every item of the task, answered as it is trained."""
    config, tokenizer, splits = loaded(overrides)
    items = (*splits.train, *splits.validation, *splits.test)
    model = PerfectModel(folder, items, len(tokenizer) + 256)
    return evaluate_model(model, tokenizer, items, splits, config)
