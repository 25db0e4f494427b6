"""The base model's few-shot scores (worked examples before each prompt), cached by fingerprint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from qlora_exp.config.enums import EvaluationSplit
from qlora_exp.config.schema import Config
from qlora_exp.data.few_shot import few_shot_draws
from qlora_exp.data.items import Splits
from qlora_exp.evaluation.base_scores import cache_key, item_names, table_path, texts_key, write_items
from qlora_exp.evaluation.kv_cache import CausalModel
from qlora_exp.evaluation.scoring import evaluate_splits, limit_items
from qlora_exp.evaluation.shared_scores import Wait, cached
from qlora_exp.paths import RunPaths
from qlora_exp.records.files import write_json
from qlora_exp.records.schema import from_dict
from qlora_exp.records.types import FewShot, Plan


@dataclass(frozen=True)
class FewShotScores:
    """Few-shot scores of all draws. ``items``: per-item results of each draw on ``evaluation.split``."""

    draws: tuple[FewShot, ...]
    items: tuple[pa.Table, ...]
    split: str

    def write_items(self, paths: RunPaths, keep_texts: bool) -> None:
        for draw, table in zip(self.draws, self.items, strict=True):
            write_items(table, paths.items(f"few_shot_{draw.draw}", self.split), keep_texts)

    def warning(self) -> str | None:
        """Return a warning if prompts had fewer examples than ``evaluation.few_shots``; else ``None``."""
        cut = [draw for draw in self.draws if len(draw.examples) < draw.requested]
        if not cut:
            return None
        shown = ", ".join(f"{len(draw.examples)} in draw {draw.draw}" for draw in cut)
        return f"evaluation.few_shots={cut[0].requested} doesn't fit into the model's context; examples used: {shown}"


def few_shot_scores(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    config: Config,
    plan: Plan,
    model_fingerprint: str,
    cache: Path,
    wait: Wait | None = None,
) -> FewShotScores:
    """Return the scores of every draw, from the cache if another run with the same fingerprints measured them.

    ``wait`` gets the seconds of waiting for a run that measures them now. Without ``evaluation.few_shots`` there are no
    draws.

    Raises:
        DataError: one example and the longest prompt are longer than the model's context.
    """
    evaluation = config.evaluation
    if evaluation.few_shots is None:
        return FewShotScores((), (), evaluation.split.value)
    shots, split = evaluation.few_shots, evaluation.split.value
    key = cache_key(
        *(plan.base_fingerprint, model_fingerprint, splits.record.fingerprint, plan.compute_dtype, plan.device),
        *(f"{shots} × {evaluation.few_shot_draws}", item_names(splits)),
        *([plan.kernels] if plan.kernels != "none" else []),
        *texts_key(config),
    )

    def compute() -> FewShotScores:
        validation = limit_items(splits.validation, config)
        test = limit_items(splits.test, config) if evaluation.split is EvaluationSplit.test else ()
        draws, tables = [], []
        positions = CausalModel(model).max_positions
        for draw in few_shot_draws(config, tokenizer, splits, validation, test, positions):
            on_validation, on_test = evaluate_splits(model, tokenizer, draw.validation, draw.test, splits, config)
            test_scores = on_test.scores if on_test else None
            draws.append(FewShot(draw.number, shots, draw.examples, on_validation.scores, test_scores))
            tables.append((on_test or on_validation).items)
        return FewShotScores(tuple(draws), tuple(tables), split)

    def load(path: Path) -> FewShotScores:
        raw = json.loads(path.read_text(encoding="utf-8"))["draws"]
        draws = tuple(from_dict(FewShot, draw, str(path)) for draw in raw)
        return FewShotScores(draws, tuple(pq.read_table(table_path(path, draw.draw)) for draw in draws), split)

    def save(path: Path, scores: FewShotScores) -> None:
        for draw, table in zip(scores.draws, scores.items, strict=True):
            write_items(table, table_path(path, draw.draw), evaluation.keep_texts)
        write_json(path, {"draws": scores.draws})

    return cached(cache / "few_shot" if evaluation.cache else None, key, load, compute, save, wait)
