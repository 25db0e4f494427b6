"""Does an exported file still answer the task? The same items, by the same definitions, beside what the run said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedModel

from qlora_exp.config.schema import Config, EvaluationSplit
from qlora_exp.data.items import Item, Splits
from qlora_exp.data.load import load_data
from qlora_exp.errors import QloraExpError
from qlora_exp.evaluation.scoring import evaluate_model
from qlora_exp.export.llama_cpp import LlamaCppModel, why_not
from qlora_exp.export.results import TaskCheck
from qlora_exp.paths import RunPaths
from qlora_exp.records.types import RunRecord

METRICS = {"correct": "accuracy", "exact": "exact_match"}
"""Per-item column → metric; the first that the run has is compared."""
Z = 1.6449
"""Of a one-sided 95 % bound."""


@dataclass(frozen=True)
class Questions:
    """The items to be answered again, and what the run made of each."""

    config: Config
    splits: Splits
    split: str
    items: tuple[Item, ...]
    answers: pa.Table
    """The run's per-item results, in the items' order."""


def questions(config: Config, record: RunRecord, paths: RunPaths, tokenizer: Any, count: int) -> Questions | str:
    """The first ``count`` items of the split that the run was scored on, or why there are none."""
    if count == 0:
        return "not asked for (--check-items 0)"
    split = config.evaluation.split.value
    file = paths.items("after", split)
    try:
        answers = pq.read_table(file)
        splits = load_data(config, tokenizer, config.training.max_length)
    except QloraExpError as error:
        return f"the task's data can't be read: {error.what}"
    except (OSError, pa.ArrowException):
        return f"the run's per-item results are not there: {file.name}"
    if record.data is not None and splits.record.fingerprint != record.data.fingerprint:
        return "the task's data have changed since the run"
    all_items = splits.test if config.evaluation.split is EvaluationSplit.test else splits.validation
    place = {item_id: row for row, item_id in enumerate(answers["item_id"].to_pylist())}
    items = tuple(item for item in all_items if item.item_id in place)[:count]
    if not items:
        return "the run's per-item results are of other items"
    return Questions(config, splits, split, items, answers.take([place[item.item_id] for item in items]))


def not_checked(why: str, tolerance: float) -> TaskCheck:
    return TaskCheck(tolerance=tolerance, answer="not shown", why=why)


def check_merged(model: PreTrainedModel, tokenizer: Any, asked: Questions | str, tolerance: float) -> TaskCheck:
    """``model`` as it was read back from the exported folder, computed in fp32 by transformers."""
    if isinstance(asked, str):
        return not_checked(asked, tolerance)
    return _compared(model, tokenizer, asked, tolerance, "transformers", asked.config.evaluation.batch_size)


def check_exported_gguf(
    path: Path, like: PreTrainedModel, tokenizer: Any, asked: Questions | str, tolerance: float
) -> TaskCheck:
    """``path`` in llama.cpp; where that isn't installed, the check is not made."""
    why = asked if isinstance(asked, str) else why_not()
    if isinstance(asked, str) or why is not None:
        return not_checked(str(why), tolerance)
    model = LlamaCppModel(path, like, _longest(asked, like))
    check = _compared(model, tokenizer, asked, tolerance, "llama.cpp", batch_size=1)
    same = [model.tokenize(item.prompt) == list(item.prompt_ids) for item in asked.items]
    return replace(check, same_tokens=sum(same) / len(same))


def _longest(asked: Questions, like: PreTrainedModel) -> int:
    """Room for each prompt with its answer, with any label, and with whatever is generated."""
    new = asked.config.evaluation.max_new_tokens or 0
    labels = max((len(ids) for ids in asked.splits.option_ids.values()), default=0)
    completions = max(len(item.completion_ids) + len(item.end_ids) for item in asked.splits.train)
    answers = max(labels, completions, *(len(item.completion_ids) + len(item.end_ids) for item in asked.items))
    longest = max(len(item.prompt_ids) for item in asked.items) + max(answers, new) + 16
    positions = getattr(like.config, "max_position_embeddings", None)
    return min(longest, positions) if positions else longest


def _compared(
    model: Any, tokenizer: Any, asked: Questions, tolerance: float, engine: str, batch_size: int
) -> TaskCheck:
    config = asked.config
    # With labels accuracy is compared, and generating would be for nothing.
    generate = config.evaluation.generate and not asked.splits.labels
    settings = replace(
        config.evaluation, batch_size=batch_size, metrics=[], max_items=len(asked.items), generate=generate
    )
    marginal = {label: 1 / len(asked.splits.labels) for label in asked.splits.labels}  # spares a pass to estimate it
    found = evaluate_model(
        model,
        tokenizer,
        asked.items,
        asked.splits,
        replace(config, evaluation=settings),
        split=asked.split,
        label_marginal=marginal or None,
    ).items
    return replace(
        compare_answers(asked.answers, found, tolerance),
        engine=engine,
        split=asked.split,
        items=len(asked.items),
        run_loss_per_item=_mean(asked.answers["loss_sum_nats"].to_pylist()),
        exported_loss_per_item=_mean(found["loss_sum_nats"].to_pylist()),
    )


def compare_answers(run: pa.Table, exported: pa.Table, tolerance: float) -> TaskCheck:
    """The two tables' answers, row by row, by the first of :data:`METRICS` that both have.

    *yes*: the upper bound of run − exported is within the tolerance; *no*: the lower one is beyond it.
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


def paired_bounds(lost: int, won: int, items: int) -> tuple[float, float]:
    """One-sided 95 % bounds (each) of the difference of two paired shares, (lost − won) / items: Wald's with half a
    pair added to each of the four cells (Agresti and Min 2005), so that no change in 10 items isn't taken for proof."""
    n = items + 2
    difference = (lost - won) / n
    error = math.sqrt(lost + won + 1 - (lost - won) ** 2 / n) / n
    return difference - Z * error, difference + Z * error


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
