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
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from qlora_exp.config.schema import Config, EvaluationSplit
from qlora_exp.data.items import Splits
from qlora_exp.evaluation.baselines import baselines
from qlora_exp.evaluation.forgetting import DocumentLoss, answer_losses, forgetting, text_losses
from qlora_exp.evaluation.per_item import ITEM_COLUMNS
from qlora_exp.evaluation.scoring import Evaluation, evaluate_model, limit_items
from qlora_exp.paths import RunPaths
from qlora_exp.records.files import write_json
from qlora_exp.records.schema import from_dict
from qlora_exp.records.types import Baselines, Forgetting, Plan, Scores


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

    def write_items(self, paths: RunPaths) -> None:
        for split, table in self.items.items():
            write_items(table, paths.items("before", split))


def write_items(items: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    pq.write_table(items, temporary)
    temporary.replace(path)


def score_base_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    config: Config,
    plan: Plan,
    model_fingerprint: str,
    cache: Path,
) -> BaseScores:
    """Return the base model's scores, from the cache if an earlier run with the same fingerprints measured them."""
    if not config.evaluation.before:
        return BaseScores(None, None, _general_losses(model, tokenizer, splits, config), {}, cached=False)
    general = "\n".join([*splits.general_text, *(chat.prompt + chat.completion for chat in splits.general_chats)])
    key = cache_key(
        *(plan.base_fingerprint, model_fingerprint, splits.record.fingerprint, plan.compute_dtype, plan.device),
        *(general, item_names(splits)),
    )
    folder = cache / "base_scores"
    scores_file = folder / f"{key}.json"
    if not config.evaluation.cache:
        return _measure(model, tokenizer, splits, config)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder / f"{key}.lock")):
        cached = _read_cached(scores_file)
        if cached is not None:
            return cached
        measured = _measure(model, tokenizer, splits, config)
        for split, table in measured.items.items():
            write_items(table, _table_path(scores_file, split))
        write_json(
            scores_file,
            {
                "scores": measured.scores,
                "test_scores": measured.test_scores,
                "general": measured.general,
                "splits": list(measured.items),
            },
        )
    return measured


def _measure(model: Any, tokenizer: PreTrainedTokenizerBase, splits: Splits, config: Config) -> BaseScores:
    before, test = _evaluate(model, tokenizer, splits, config)
    return BaseScores(
        scores=before.scores,
        test_scores=test.scores if test else None,
        general=_general_losses(model, tokenizer, splits, config),
        items={"validation": before.items} | ({"test": test.items} if test else {}),
        cached=False,
    )


def _evaluate(
    model: Any, tokenizer: PreTrainedTokenizerBase, splits: Splits, config: Config
) -> tuple[Evaluation, Evaluation | None]:
    """Score the validation split, and the test split with ``evaluation.split=test``.

    Both use the label marginal of the validation split.
    """
    validation = evaluate_model(
        model, tokenizer, limit_items(splits.validation, config), splits, config, split="validation"
    )
    if config.evaluation.split is not EvaluationSplit.test:
        return validation, None
    test = evaluate_model(
        model,
        tokenizer,
        limit_items(splits.test, config),
        splits,
        config,
        split="test",
        label_marginal=validation.label_marginal,
    )
    return validation, test


def _general_losses(model: Any, tokenizer: PreTrainedTokenizerBase, splits: Splits, config: Config) -> GeneralLosses:
    if not config.evaluation.forgetting:
        return GeneralLosses()
    return GeneralLosses(
        tuple(text_losses(model, tokenizer, splits.general_text, config)),
        tuple(answer_losses(model, tokenizer, splits.general_chats, config)),
    )


def _table_path(facts: Path, split: str) -> Path:
    return facts.with_name(f"{facts.stem}.{split}.parquet")


def _read_cached(facts: Path) -> BaseScores | None:
    """Return the cached scores; ``None`` if there are none or they can't be read: then they are measured again."""
    try:
        raw = json.loads(facts.read_text(encoding="utf-8"))
        return BaseScores(
            scores=from_dict(Scores, raw["scores"], str(facts)),
            test_scores=from_dict(Scores, raw["test_scores"], str(facts)) if raw["test_scores"] else None,
            general=GeneralLosses(
                **{kind: tuple(DocumentLoss(*loss) for loss in losses) for kind, losses in raw["general"].items()}
            ),
            items={split: pq.read_table(_table_path(facts, split)) for split in raw["splits"]},
            cached=True,
        )
    except Exception:
        return None


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


def baselines_of(splits: Splits, config: Config, cache: Path) -> Baselines | None:
    """Return both baselines' scores on ``evaluation.split``, cached; ``None`` if the task has no labels."""
    if not config.evaluation.baselines or not splits.labels:
        return None
    split = config.evaluation.split.value
    scored = replace(
        splits, validation=tuple(limit_items(splits.validation, config)), test=tuple(limit_items(splits.test, config))
    )
    if not config.evaluation.cache:
        return baselines(scored, split)
    folder = cache / "baselines"
    sample = (str(config.evaluation.max_items), str(config.task.split_seed))
    path = folder / f"{cache_key(splits.record.fingerprint, split, *sample)}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            try:
                return from_dict(Baselines, json.loads(path.read_text(encoding="utf-8")), str(path))
            except Exception:
                path.unlink()
        scores = baselines(scored, split)
        if scores is not None:
            write_json(path, scores)
        return scores


def item_names(splits: Splits) -> str:
    """Return the ids of all items, file and row: they pair per-item results, so they belong in the cache key.

    The rows' fingerprint leaves them out. After a file is renamed, its rows have the same fingerprint, but their
    per-item results would match no earlier ids.
    """
    return "\n".join(item.item_id for split in (splits.train, splits.validation, splits.test) for item in split)


CACHE_KEY_PACKAGES = ("qlora-exp", "torch", "transformers", "bitsandbytes", "scikit-learn")
"""Packages in the cache key: an upgrade can change a score."""

DEFINITIONS_VERSION = "2"
"""Version of the scores' definitions, in the cache key. Raise it when a definition changes."""


def cache_key(*parts: str) -> str:
    """Return a cache key from ``parts`` (fingerprints), package versions, definitions and measured columns."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in CACHE_KEY_PACKAGES]
    parts = (*parts, *versions, DEFINITIONS_VERSION, *ITEM_COLUMNS.names)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
