"""Scores of one model on one split, and its per-item results."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from qlora_exp.config.enums import EvaluationSplit, TaskSource
from qlora_exp.config.schema import Config
from qlora_exp.data.texts import normal_form
from qlora_exp.evaluation.generation import StopRule, as_answer, decode_completions, generate, stop_rule
from qlora_exp.evaluation.kv_cache import CausalModel, batches, prefill, scoring_mode, start_token
from qlora_exp.evaluation.likelihood import (
    OptionTrie,
    completion_scores,
    domain_prompt,
    option_log_likelihoods,
    option_priors,
)
from qlora_exp.evaluation.metrics import hub_metric
from qlora_exp.evaluation.per_item import ItemResult, item_table, option_matrix, scores_of
from qlora_exp.progress import report_progress
from qlora_exp.records.types import Scores

if TYPE_CHECKING:
    from qlora_exp.data.items import Item, Splits


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model on one split. ``items``: one row per item, with columns ``per_item.ITEM_COLUMNS``."""

    scores: Scores
    items: pa.Table
    labels: tuple[str, ...] = ()
    """All of the task's labels, also those without items."""
    label_marginal: dict[str, float] | None = None
    """Mean predicted probability of each option over the validation items; calibration divides by it."""


def evaluate_model(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    splits: Splits,
    config: Config,
    *,
    split: str = "validation",
    label_marginal: Mapping[str, float] | None = None,
) -> Evaluation:
    """Score ``items`` of ``split`` by likelihood and, with ``evaluation.generate``, by greedy generation.

    ``label_marginal`` comes from an evaluation of the validation split. By default it is estimated: from ``items`` if
    they are the validation split, else from another pass over the validation items.

    Model and tokenizer are unchanged afterwards. Scores don't depend on the batch size, except for rounding. With int8
    they do: LLM.int8() picks outlier columns over a whole batch, and rounds inputs to 8 bits.

    Raises:
        ConfigError: a metric of ``evaluation.metrics`` isn't available; raised before scoring. These metrics need
            generated answers (:mod:`qlora_exp.config.checks` checks ``evaluation.generate``).
    """
    hub_metrics = {name: hub_metric(name) for name in config.evaluation.metrics}
    trie = OptionTrie.of([splits.option_ids[label] for label in splits.labels]) if splits.labels else None
    with scoring_mode(model):
        causal = CausalModel(model)
        generates = config.evaluation.generate and not splits.whole_texts
        rule = stop_rule(splits, tokenizer, config, causal.base) if generates else None
        unit = f"{split} items scored"
        results = score_items(causal, tokenizer, items, trie, rule, config.evaluation.batch_size, unit)
        if trie is not None and label_marginal is None and items:
            reference = results
            if split != "validation":
                validation = limit_items(splits.validation, config)
                reference = score_items(causal, tokenizer, validation, trie, None, config.evaluation.batch_size)
            label_marginal = dict(zip(splits.labels, marginal(option_matrix(reference)).tolist(), strict=True))
        priors = None
        if trie is not None:
            prompt = domain_prompt([item.prompt_ids for item in splits.train]) or (start_token(tokenizer),)
            priors = option_priors(causal, prompt, trie)
    option_texts = [decode_completions(splits.label_ids[label], tokenizer).strip() for label in splits.labels]
    table = item_table(items, results, splits, label_marginal, priors, option_texts)
    scores = scores_of(split, table, splits.labels, option_texts)
    if rule is not None:
        scores = replace(scores, max_new_tokens=rule.max_new_tokens)
    if hub_metrics and items:
        scores.other.update(_hub_scores(hub_metrics, table))
    return Evaluation(scores, table, tuple(splits.labels), dict(label_marginal) if label_marginal else None)


def evaluate_splits(
    model: Any,
    tokenizer: Any,
    validation: Sequence[Item],
    test: Sequence[Item],
    splits: Splits,
    config: Config,
) -> tuple[Evaluation, Evaluation | None]:
    """Score the validation items and, with ``evaluation.split=test``, the test items.

    Both use the label marginal of the validation items.
    """
    scored = evaluate_model(model, tokenizer, validation, splits, config, split="validation")
    if config.evaluation.split is not EvaluationSplit.test:
        return scored, None
    marginal = scored.label_marginal
    return scored, evaluate_model(model, tokenizer, test, splits, config, split="test", label_marginal=marginal)


def limit_items(items: Sequence[Item], config: Config) -> Sequence[Item]:
    """Return ``evaluation.max_items`` of ``items``, in their order.

    They are sampled with ``task.split_seed``, because a file may be sorted by label. A smaller sample is part of any
    larger one. The embedded task is already shuffled, so its first items are taken.
    """
    limit = config.evaluation.max_items
    if limit is None or config.task.source is TaskSource.embedded:
        return items[:limit]
    order = list(range(len(items)))
    random.Random(f"max_items/{config.task.split_seed}").shuffle(order)
    return [items[index] for index in sorted(order[:limit])]


def marginal(log_likelihoods: np.ndarray) -> np.ndarray:
    """Return the mean over items of the softmax over options: (items, options) → (options,).

    It estimates the model's preference for each option regardless of the item (batch calibration, Zhou et al. 2023).
    """
    shifted = np.exp(log_likelihoods - log_likelihoods.max(axis=1, keepdims=True))
    mean: np.ndarray = (shifted / shifted.sum(axis=1, keepdims=True)).mean(axis=0)
    return mean


def score_items(
    model: CausalModel,
    tokenizer: Any,
    items: Sequence[Item],
    trie: OptionTrie | None,
    rule: StopRule | None,
    batch_size: int,
    unit: str = "items scored",
) -> list[ItemResult]:
    """Return results in the items' order. Each prompt is prefilled once, for completion, options and generation.

    ``unit``: what the progress is counted in. A batch takes about as long as it has tokens; the longest come first.
    """
    results: dict[int, ItemResult] = {}
    read, total = 0, sum(len(item.ids) for item in items)
    report_progress(0, len(items), unit)
    for batch in batches([len(item.ids) for item in items], batch_size):
        chosen = [items[index] for index in batch]
        next_logits, context = prefill(model, [item.prompt_ids or (start_token(tokenizer),) for item in chosen])
        completions = completion_scores(
            next_logits, context, [item.completion_ids for item in chosen], [item.end_ids for item in chosen]
        )
        options = option_log_likelihoods(next_logits, context, trie).numpy() if trie else None
        texts = generate(next_logits, context, tokenizer, rule) if rule else None
        if texts and rule and rule.keep_indentation:
            expected = [decode_completions(item.completion_ids, tokenizer) for item in chosen]
            rows = zip(texts, expected, chosen, strict=True)
            texts = [as_answer(text, completion, item.answer) for text, completion, item in rows]
        for row, index in enumerate(batch):
            results[index] = ItemResult(
                completions[row], None if options is None else options[row], texts[row] if texts else None
            )
        read += sum(len(item.ids) for item in chosen)
        report_progress(len(results), len(items), unit, read / max(total, 1))
    return [results[index] for index in range(len(items))]


def _hub_scores(metrics: Mapping[str, Any], table: pa.Table) -> dict[str, float]:
    """Return all numbers of the Hub metrics for the generated answers, as ``NAME`` or ``NAME_KEY``."""
    values: dict[str, float] = {}
    for name, metric in metrics.items():
        texts = {name: [normal_form(text) for text in table[name].to_pylist()] for name in ("generated", "answer")}
        result = metric.compute(predictions=texts["generated"], references=texts["answer"])
        for key, value in result.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                values[name if key in (name, "score") else f"{name}_{key}"] = float(value)
    return values
