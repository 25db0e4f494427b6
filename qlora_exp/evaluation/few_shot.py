"""The base model's few-shot scores (worked examples before each prompt), cached by fingerprint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from qlora_exp.config.schema import Config, EvaluationSplit
from qlora_exp.data.few_shot import FewShotDraw, few_shot_draws
from qlora_exp.data.items import Splits
from qlora_exp.evaluation.base_scores import cache_key, item_names, write_items
from qlora_exp.evaluation.kv_cache import max_positions
from qlora_exp.evaluation.scoring import evaluate_model, limit_items
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

    def write_items(self, paths: RunPaths) -> None:
        for draw, table in zip(self.draws, self.items, strict=True):
            write_items(table, paths.items(moment(draw.draw), self.split))

    def warning(self) -> str | None:
        """Return a warning if prompts had fewer examples than ``evaluation.few_shots``; else ``None``."""
        cut = [draw for draw in self.draws if len(draw.examples) < draw.requested]
        if not cut:
            return None
        shown = ", ".join(f"{len(draw.examples)} in draw {draw.draw}" for draw in cut)
        return f"evaluation.few_shots={cut[0].requested} doesn't fit into the model's context; examples used: {shown}"


def moment(draw: int) -> str:
    """Return the ``moment`` of a draw's per-item results: see :meth:`qlora_exp.paths.RunPaths.items`."""
    return f"few_shot_{draw}"


def few_shot_scores(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    config: Config,
    plan: Plan,
    model_fingerprint: str,
    cache: Path,
) -> FewShotScores:
    """Return the scores of every draw, from the cache if an earlier run with the same fingerprints measured them.

    Without ``evaluation.few_shots`` there are no draws.

    Raises:
        DataError: one example and the longest prompt are longer than the model's context.
    """
    evaluation = config.evaluation
    if evaluation.few_shots is None:
        return FewShotScores((), (), evaluation.split.value)
    if not evaluation.cache:
        return _measure(model, tokenizer, splits, config)
    shots = f"{evaluation.few_shots} × {evaluation.few_shot_draws}"
    key = cache_key(
        *(plan.base_fingerprint, model_fingerprint, splits.record.fingerprint, plan.compute_dtype, plan.device),
        *(shots, item_names(splits)),
    )
    folder = cache / "few_shot"
    folder.mkdir(parents=True, exist_ok=True)
    scores_file = folder / f"{key}.json"
    with FileLock(str(folder / f"{key}.lock")):
        cached = _read(scores_file, evaluation.split.value)
        if cached is not None:
            return cached
        measured = _measure(model, tokenizer, splits, config)
        for draw, table in zip(measured.draws, measured.items, strict=True):
            write_items(table, _table_path(scores_file, draw.draw))
        write_json(scores_file, {"draws": measured.draws})
    return measured


def _measure(model: Any, tokenizer: PreTrainedTokenizerBase, splits: Splits, config: Config) -> FewShotScores:
    on_test = config.evaluation.split is EvaluationSplit.test
    validation = limit_items(splits.validation, config)
    test = limit_items(splits.test, config) if on_test else ()
    draws = few_shot_draws(config, tokenizer, splits, validation, test, max_positions(model))
    scored = [_score_draw(draw, model, tokenizer, splits, config, on_test) for draw in draws]
    few_shots, items = zip(*scored, strict=True)
    return FewShotScores(tuple(few_shots), tuple(items), config.evaluation.split.value)


def _score_draw(
    draw: FewShotDraw, model: Any, tokenizer: PreTrainedTokenizerBase, splits: Splits, config: Config, on_test: bool
) -> tuple[FewShot, pa.Table]:
    """Score one draw. Calibration uses the label marginal of the validation split with the same examples."""
    validation = evaluate_model(model, tokenizer, draw.validation, splits, config, split="validation")
    test = None
    if on_test:
        marginal = validation.label_marginal
        test = evaluate_model(model, tokenizer, draw.test, splits, config, split="test", label_marginal=marginal)
    shots = config.evaluation.few_shots
    assert shots is not None
    few_shot = FewShot(draw.number, shots, draw.examples, validation.scores, test.scores if test else None)
    return few_shot, (test or validation).items


def _table_path(facts: Path, draw: int) -> Path:
    return facts.with_name(f"{facts.stem}.{draw}.parquet")


def _read(facts: Path, split: str) -> FewShotScores | None:
    """Return the cached scores; ``None`` if there are none or they can't be read: then they are measured again."""
    try:
        raw = json.loads(facts.read_text(encoding="utf-8"))["draws"]
        draws = tuple(from_dict(FewShot, draw, str(facts)) for draw in raw)
        return FewShotScores(draws, tuple(pq.read_table(_table_path(facts, draw.draw)) for draw in draws), split)
    except Exception:
        return None
