"""Checks whether an exported file still solves the task: the same items and metrics, compared with the run's
answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_exp.analysis.paired_shares import paired_bounds
from qlora_exp.config.enums import EvaluationSplit
from qlora_exp.config.schema import Config
from qlora_exp.data.items import Item, Splits
from qlora_exp.data.load import load_data
from qlora_exp.errors import QloraExpError
from qlora_exp.evaluation.scoring import evaluate_model
from qlora_exp.export.llama_cpp import LlamaCppModel
from qlora_exp.export.results import TaskCheck
from qlora_exp.paths import RunPaths
from qlora_exp.records.types import RunRecord

METRICS = {"correct": "accuracy", "exact": "exact_match"}
"""Per-item column → metric. The first one that the run has is compared."""


@dataclass(frozen=True)
class CheckItems:
    """The items to answer again, and the run's result for each."""

    config: Config
    tokenizer: Any
    splits: Splits
    items: tuple[Item, ...]
    answers: pa.Table
    """The run's per-item results, in the items' order."""
    tolerance: float


def items_to_check(
    config: Config, record: RunRecord, paths: RunPaths, tokenizer: Any, count: int, tolerance: float
) -> CheckItems | TaskCheck:
    """Return the first ``count`` items of the split that the run was scored on, or a check without a result."""
    if count == 0:
        return not_checked("not asked for (--check-items 0)", tolerance)
    file = paths.items("after", config.evaluation.split.value)
    try:
        answers = pq.read_table(file)
        splits = load_data(config, tokenizer, config.training.max_length)
    except QloraExpError as error:
        return not_checked(f"the task's data can't be read: {error.what}", tolerance)
    except (OSError, pa.ArrowException):
        return not_checked(f"the run's per-item results are not there: {file.name}", tolerance)
    if record.data is not None and splits.record.fingerprint != record.data.fingerprint:
        return not_checked("the task's data have changed since the run", tolerance)
    all_items = splits.test if config.evaluation.split is EvaluationSplit.test else splits.validation
    row_of = {item_id: row for row, item_id in enumerate(answers["item_id"].to_pylist())}
    items = tuple(item for item in all_items if item.item_id in row_of)[:count]
    if not items:
        return not_checked("the run's per-item results are of other items", tolerance)
    answers = answers.take([row_of[item.item_id] for item in items])
    return CheckItems(config, tokenizer, splits, items, answers, tolerance)


def not_checked(why: str, tolerance: float) -> TaskCheck:
    """Return a check without a result, with the reason ``why``."""
    return TaskCheck(tolerance=tolerance, answer="not shown", why=why)


def check_merged(folder: Path, questions: CheckItems) -> TaskCheck:
    """Compare the answers of the model in ``folder``, computed by transformers in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return _compare(model, questions, "transformers", questions.config.evaluation.batch_size)


def check_exported_gguf(path: Path, like: PreTrainedModel, questions: CheckItems) -> TaskCheck:
    """Compare the answers of ``path`` in llama.cpp. ``like``: the merged model, for its configuration."""
    model = LlamaCppModel(path, like, _longest(questions, like))
    check = _compare(model, questions, "llama.cpp", batch_size=1)
    same = [model.tokenize(item.prompt) == list(item.prompt_ids) for item in questions.items]
    return replace(check, same_tokens=sum(same) / len(same))


def _longest(questions: CheckItems, like: PreTrainedModel) -> int:
    """Return the tokens of the longest sequence: a prompt with its answer, any label, or generated tokens."""
    generated = questions.config.evaluation.max_new_tokens or 0
    labels = max((len(ids) for ids in questions.splits.option_ids.values()), default=0)
    completions = max(len(item.completion_ids) + len(item.end_ids) for item in questions.splits.train)
    answers = max(labels, completions, *(len(item.completion_ids) + len(item.end_ids) for item in questions.items))
    longest = max(len(item.prompt_ids) for item in questions.items) + max(answers, generated) + 16
    positions = getattr(like.config, "max_position_embeddings", None)
    return min(longest, positions) if positions else longest


def answer_items(model: Any, questions: CheckItems, batch_size: int) -> pa.Table:
    """Return the per-item results of ``model`` on the items, in their order (``per_item.ITEM_COLUMNS``)."""
    config, splits = questions.config, questions.splits
    settings = replace(
        config.evaluation,
        batch_size=batch_size,
        metrics=[],
        max_items=len(questions.items),
        # With labels, accuracy is compared and generated text isn't needed.
        generate=config.evaluation.generate and not splits.labels,
    )
    # A uniform marginal saves the pass that would estimate it.
    marginal = {label: 1 / len(splits.labels) for label in splits.labels}
    return evaluate_model(
        model,
        questions.tokenizer,
        questions.items,
        splits,
        replace(config, evaluation=settings),
        split=config.evaluation.split.value,
        label_marginal=marginal or None,
    ).items


def _compare(model: Any, questions: CheckItems, engine: str, batch_size: int) -> TaskCheck:
    exported = answer_items(model, questions, batch_size)
    return replace(
        compare_answers(questions.answers, exported, questions.tolerance),
        engine=engine,
        split=questions.config.evaluation.split.value,
        items=len(questions.items),
        run_loss_per_item=_mean(questions.answers["loss_sum_nats"].to_pylist()),
        exported_loss_per_item=_mean(exported["loss_sum_nats"].to_pylist()),
    )


def compare_answers(run: pa.Table, exported: pa.Table, tolerance: float) -> TaskCheck:
    """Compare the two tables' answers, row by row, by the first of :data:`METRICS` that both have.

    *yes*: the upper bound of run − exported is within the tolerance. *no*: the lower bound is above it.
    """
    for column, metric in METRICS.items():
        before, after = run[column].to_pylist(), exported[column].to_pylist()
        if None in before or None in after:
            continue
        lost = sum(a and not b for a, b in zip(before, after, strict=True))
        won = sum(b and not a for a, b in zip(before, after, strict=True))
        low, high = paired_bounds(lost, won, len(before))
        answer = "yes" if high <= tolerance else "no" if low > tolerance else "not shown"
        return TaskCheck(
            tolerance=tolerance,
            answer=answer,
            metric=metric,
            run=_mean(before),
            exported=_mean(after),
            lost_items=lost,
            won_items=won,
            low=low,
            high=high,
        )
    return not_checked("the run measured neither accuracy nor exact match", tolerance)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
