"""What a person reads of a run's items, besides their scores: prompts, and a few answers that no score needs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_exp.config.enums import EvaluationSplit
from qlora_exp.config.schema import Config
from qlora_exp.evaluation.generation import stop_rule
from qlora_exp.evaluation.kv_cache import CausalModel, scoring_mode
from qlora_exp.evaluation.scoring import limit_items, score_items
from qlora_exp.paths import RunPaths

if TYPE_CHECKING:
    from qlora_exp.data.items import Item, Splits

SAMPLES = 5
"""Answers that are generated only to be shown."""
MAX_PROMPT_CHARACTERS = 4_000
"""Longest prompt that is kept whole; of a longer one the middle is left out."""
MAX_FILE_CHARACTERS = 20_000_000
"""Of all prompts of a split together: with more than 5,000 items, each may have fewer characters."""
MIDDLE_MARK = " … "

TEXT_COLUMNS_SCHEMA = pa.schema(
    [("item_id", pa.string()), ("prompt", pa.string()), ("base_generated", pa.string()), ("generated", pa.string())]
)
"""Columns of ``texts_SPLIT.parquet``; the answers are null but for the samples."""


@dataclass
class ItemTexts:
    """Texts of the scored items, by split.

    If a task has free answers and the evaluation generates none (``evaluation.generate=false``), :data:`SAMPLES` items
    get one each before and after tuning, so that there is something to read.
    """

    items: dict[str, Sequence[Item]]
    """The scored items by split."""
    samples: dict[str, dict[str, str]] = field(default_factory=dict)
    """Column → item id → generated text, of the split that the run answers for."""

    @classmethod
    def of(cls, splits: Splits, config: Config) -> ItemTexts:
        items = {"validation": limit_items(splits.validation, config)}
        if config.evaluation.split is EvaluationSplit.test:
            items["test"] = limit_items(splits.test, config)
        return cls(items)

    def add_samples(self, column: str, model: Any, tokenizer: Any, splits: Splits, config: Config) -> None:
        """Generate the sample answers of ``model``: ``base_generated`` or ``generated``.

        The items are the same in every run on them.
        """
        items = self.items[config.evaluation.split.value]
        chosen = sorted(items, key=lambda item: hashlib.sha256(item.item_id.encode()).digest())[:SAMPLES]
        if not chosen:
            return
        with scoring_mode(model):
            causal = CausalModel(model)
            rule = stop_rule(splits, tokenizer, config, causal.base)
            results = score_items(causal, tokenizer, chosen, None, rule, min(SAMPLES, config.evaluation.batch_size))
        self.samples[column] = {
            item.item_id: result.generated or "" for item, result in zip(chosen, results, strict=True)
        }

    def write(self, paths: RunPaths) -> None:
        """Write ``texts_SPLIT.parquet`` for each split."""
        for split, items in self.items.items():
            limit = min(MAX_PROMPT_CHARACTERS, MAX_FILE_CHARACTERS // max(len(items), 1))
            rows = [
                {
                    "item_id": item.item_id,
                    "prompt": without_middle(item.prompt, limit),
                    **{column: answers.get(item.item_id) for column, answers in self.samples.items()},
                }
                for item in items
            ]
            write_parquet(pa.Table.from_pylist(rows, schema=TEXT_COLUMNS_SCHEMA), paths.texts(split))


def needs_samples(splits: Splits, config: Config) -> bool:
    """Return whether the run has no answer to show: it generates none, and there are no labels to choose from."""
    return config.evaluation.keep_texts and not config.evaluation.generate and not splits.labels


def without_middle(text: str, limit: int) -> str:
    """Return ``text`` with at most ``limit`` characters: its beginning and its end, which has the question itself."""
    if len(text) <= limit:
        return text
    kept = max(limit - len(MIDDLE_MARK), 2)
    return text[: (kept + 1) // 2] + MIDDLE_MARK + text[len(text) - kept // 2 :]


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a table; another process sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    pq.write_table(table, temporary)
    temporary.replace(path)
