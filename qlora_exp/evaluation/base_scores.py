"""Scores to beat: the base model's scores before tuning and the baselines, cached by fingerprint."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from qlora_exp.config.schema import Config
from qlora_exp.data.items import Splits
from qlora_exp.evaluation.baselines import baselines
from qlora_exp.evaluation.forgetting import DocumentLoss, answer_losses, forgetting, text_losses
from qlora_exp.evaluation.item_texts import write_parquet
from qlora_exp.evaluation.per_item import ITEM_COLUMNS, without_texts
from qlora_exp.evaluation.scoring import Evaluation, evaluate_splits, limit_items
from qlora_exp.evaluation.shared_scores import Wait, cached
from qlora_exp.paths import RunPaths
from qlora_exp.records.files import write_json
from qlora_exp.records.schema import from_dict
from qlora_exp.records.types import Baselines, Forgetting, Plan, Scores

CACHE_KEY_PACKAGES = ("qlora-exp", "torch", "transformers", "bitsandbytes", "scikit-learn")
"""Packages in the cache key: an upgrade can change a score."""

DEFINITIONS_VERSION = "2"
"""Version of the scores' definitions, in the cache key. Raise it when a definition changes."""


@dataclass(frozen=True)
class GeneralLosses:
    """Loss on general held-out text by document; empty if it isn't measured."""

    text: tuple[DocumentLoss, ...] = ()
    chat: tuple[DocumentLoss, ...] = ()
    """On the answers of chats; only for runs in the chat format."""


@dataclass(frozen=True)
class BaseScores:
    """Scores of the base model before tuning; ``None`` with ``evaluation.before=false``."""

    scores: Scores | None
    test_scores: Scores | None
    general: GeneralLosses
    items: dict[str, pa.Table]
    """Per-item results by split."""
    cached: bool

    def write_items(self, paths: RunPaths, keep_texts: bool) -> None:
        for split, table in self.items.items():
            write_items(table, paths.items("before", split), keep_texts)


def score_base_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    config: Config,
    plan: Plan,
    model_fingerprint: str,
    cache: Path,
    wait: Wait | None = None,
) -> BaseScores:
    """Return the base model's scores, from the cache if another run with the same fingerprints measured them.

    ``wait`` gets the seconds of waiting for a run that measures them now.
    """
    if not config.evaluation.before:
        return BaseScores(None, None, _general_losses(model, tokenizer, splits, config), {}, cached=False)
    general = "\n".join([*splits.general_text, *(chat.prompt + chat.completion for chat in splits.general_chats)])
    key = cache_key(
        *(plan.base_fingerprint, model_fingerprint, splits.record.fingerprint, plan.compute_dtype, plan.device),
        *(general, item_names(splits)),
        *([plan.kernels] if plan.kernels != "none" else []),
        *texts_key(config),
    )

    def compute() -> BaseScores:
        before, test = _evaluate(model, tokenizer, splits, config)
        general_losses = _general_losses(model, tokenizer, splits, config)
        items = {"validation": before.items} | ({"test": test.items} if test else {})
        return BaseScores(before.scores, test.scores if test else None, general_losses, items, cached=False)

    def save(path: Path, scores: BaseScores) -> None:
        for split, table in scores.items.items():
            write_items(table, table_path(path, split), config.evaluation.keep_texts)
        values = {name: getattr(scores, name) for name in ("scores", "test_scores", "general")}
        write_json(path, {**values, "splits": list(scores.items)})

    return cached(cache / "base_scores" if config.evaluation.cache else None, key, _load, compute, save, wait)


def _load(path: Path) -> BaseScores:
    raw = json.loads(path.read_text(encoding="utf-8"))
    general = {kind: tuple(DocumentLoss(*loss) for loss in losses) for kind, losses in raw["general"].items()}
    return BaseScores(
        scores=from_dict(Scores, raw["scores"], str(path)),
        test_scores=from_dict(Scores, raw["test_scores"], str(path)) if raw["test_scores"] else None,
        general=GeneralLosses(**general),
        items={split: pq.read_table(table_path(path, split)) for split in raw["splits"]},
        cached=True,
    )


def _evaluate(
    model: Any, tokenizer: PreTrainedTokenizerBase, splits: Splits, config: Config
) -> tuple[Evaluation, Evaluation | None]:
    validation, test = (limit_items(items, config) for items in (splits.validation, splits.test))
    return evaluate_splits(model, tokenizer, validation, test, splits, config)


def _general_losses(model: Any, tokenizer: PreTrainedTokenizerBase, splits: Splits, config: Config) -> GeneralLosses:
    if not config.evaluation.forgetting:
        return GeneralLosses()
    return GeneralLosses(
        tuple(text_losses(model, tokenizer, splits.general_text, config)),
        tuple(answer_losses(model, tokenizer, splits.general_chats, config)),
    )


@dataclass(frozen=True)
class ForgettingScores:
    """Change of the loss on general text and chats by tuning; ``None`` if it isn't measured."""

    text: Forgetting | None
    chat: Forgetting | None


def score_splits(
    model: Any, tokenizer: PreTrainedTokenizerBase, splits: Splits, config: Config, base_scores: BaseScores
) -> tuple[Evaluation, Evaluation | None, ForgettingScores]:
    """Return the tuned model's scores: validation, test (``evaluation.split=test``), and the loss on general text."""
    after, test = _evaluate(model, tokenizer, splits, config)
    before, current = base_scores.general, _general_losses(model, tokenizer, splits, config)
    return (
        after,
        test,
        ForgettingScores(
            text=forgetting(before.text, current.text, "general text") if before.text else None,
            chat=forgetting(before.chat, current.chat, "answers in general chats") if before.chat else None,
        ),
    )


def baselines_of(splits: Splits, config: Config, cache: Path, wait: Wait | None = None) -> Baselines | None:
    """Return both baselines' scores on ``evaluation.split``, cached; ``None`` if the task has no labels."""
    if not config.evaluation.baselines or not splits.labels:
        return None
    split = config.evaluation.split.value
    scored = replace(
        splits, validation=tuple(limit_items(splits.validation, config)), test=tuple(limit_items(splits.test, config))
    )
    sample = (str(config.evaluation.max_items), str(config.task.split_seed))
    found: Baselines | None = cached(
        cache / "baselines" if config.evaluation.cache else None,
        cache_key(splits.record.fingerprint, split, *sample),
        lambda path: from_dict(Baselines, json.loads(path.read_text(encoding="utf-8")), str(path)),
        lambda: baselines(scored, split),
        write_json,
        wait,
    )
    return found


def table_path(path: Path, name: str | int) -> Path:
    """Return the Parquet file that belongs to a cached result."""
    return path.with_name(f"{path.stem}.{name}.parquet")


def write_items(items: pa.Table, path: Path, keep_texts: bool) -> None:
    """Write a per-item table, without answers unless ``keep_texts``; another process sees all of it or none."""
    write_parquet(items if keep_texts else without_texts(items), path)


def texts_key(config: Config) -> tuple[str, ...]:
    """Return what tells the cached results without texts from those with texts."""
    return () if config.evaluation.keep_texts else ("without texts",)


def item_names(splits: Splits) -> str:
    """Return the ids of all items, file and row: they pair per-item results, so they belong in the cache key.

    The rows' fingerprint leaves them out. After a file is renamed, its rows have the same fingerprint, but their
    per-item results would match no earlier ids.
    """
    return "\n".join(item.item_id if item.group is None else f"{item.item_id}\t{item.group}" for item in splits.items)


def cache_key(*parts: str) -> str:
    """Return a cache key from ``parts`` (fingerprints), package versions, definitions and measured columns."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in CACHE_KEY_PACKAGES]
    parts = (*parts, *versions, DEFINITIONS_VERSION, *ITEM_COLUMNS.names)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
