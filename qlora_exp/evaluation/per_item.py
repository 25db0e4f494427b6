"""The per-item table, and the scores computed from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from qlora_exp.analysis.item_groups import GROUP_COLUMN
from qlora_exp.data.texts import comparable, final_answer, same_text
from qlora_exp.evaluation.likelihood import CompletionScore
from qlora_exp.evaluation.metrics import rouge_l_f, score_completions, token_f1
from qlora_exp.records.types import Scores

if TYPE_CHECKING:
    from qlora_exp.data.items import Item, Splits

ITEM_COLUMNS = pa.schema(
    [
        ("item_id", pa.string()),
        ("label", pa.string()),
        ("answer", pa.string()),
        ("loss_sum_nats", pa.float64()),  # over completion and end tokens
        ("tokens", pa.int64()),  # those tokens
        ("completion_nats", pa.float64()),  # without the end tokens
        ("completion_tokens", pa.int64()),
        ("completion_bytes", pa.int64()),
        ("tokens_correct", pa.int64()),  # of completion_tokens
        ("predicted", pa.string()),
        ("predicted_calibrated", pa.string()),
        ("predicted_normalized", pa.string()),
        ("predicted_pmi", pa.string()),
        ("correct", pa.bool_()),
        ("correct_calibrated", pa.bool_()),
        ("correct_normalized", pa.bool_()),
        ("correct_pmi", pa.bool_()),
        ("generated", pa.string()),
        ("exact", pa.bool_()),
        ("invalid", pa.bool_()),
        ("rouge_l", pa.float64()),
        ("token_f1", pa.float64()),
    ]
)
GROUP_FIELD = pa.field(GROUP_COLUMN, pa.string())
"""Last column of the table if the data have groups, see :mod:`qlora_exp.analysis.item_groups`."""

TEXT_COLUMNS = ("label", "answer", "predicted", "predicted_calibrated", "predicted_normalized", "predicted_pmi",
                "generated")  # fmt: skip
"""Columns with right or given answers; null with ``evaluation.keep_texts=false``."""


@dataclass(frozen=True)
class ItemResult:
    """The model's results on one item. ``options``: log-likelihood of each label option, float64."""

    completion: CompletionScore
    options: np.ndarray | None
    generated: str | None


def ignores_case(option_texts: Sequence[str]) -> bool:
    """Return whether answers are compared case-insensitively: False if two options differ only in case."""
    return len({comparable(text) for text in option_texts}) == len({comparable(text, False) for text in option_texts})


def option_matrix(results: Sequence[ItemResult]) -> np.ndarray:
    """Return the options' log-likelihoods, shape (items, options)."""
    return np.array([result.options for result in results])


def item_table(
    items: Sequence[Item],
    results: Sequence[ItemResult],
    splits: Splits,
    label_marginal: Mapping[str, float] | None,
    priors: np.ndarray | None,
    option_texts: Sequence[str],
) -> pa.Table:
    """Return a table with one row per item, in order. Its columns are :data:`ITEM_COLUMNS` and, with
    ``task.columns.group``, ``group``; unmeasured values are null."""
    predictions = (
        _predictions(option_matrix(results), splits, label_marginal, priors) if splits.labels and results else {}
    )
    fold_case = ignores_case(option_texts)
    valid = {comparable(text, fold_case) for text in option_texts}
    rows: list[dict[str, Any]] = []
    for number, (item, result) in enumerate(zip(items, results, strict=True)):
        completion = result.completion
        row: dict[str, Any] = {
            "item_id": item.item_id,
            "label": item.label,
            "answer": item.answer,
            "loss_sum_nats": completion.completion_nats + completion.end_nats,
            "tokens": len(item.completion_ids) + len(item.end_ids),
            "completion_nats": completion.completion_nats,
            "completion_tokens": len(item.completion_ids),
            "completion_bytes": item.completion_bytes,
            "tokens_correct": completion.tokens_correct,
        }
        for suffix, predicted in predictions.items():
            row[f"predicted{suffix}"] = predicted[number]
            row[f"correct{suffix}"] = predicted[number] == item.label
        if result.generated is not None:
            row["generated"] = result.generated
            generated, answer = (final_answer(text, splits.answer_after) for text in (result.generated, item.answer))
            row["exact"] = same_text(generated, answer, fold_case)
            row["rouge_l"] = rouge_l_f(result.generated, item.answer)
            row["token_f1"] = token_f1(result.generated, item.answer)
            if valid:
                row["invalid"] = comparable(result.generated, fold_case) not in valid
        rows.append(row)
    table = pa.Table.from_pylist(rows, schema=ITEM_COLUMNS)
    groups = [item.group for item in items]
    return table if not groups or None in groups else table.append_column(GROUP_FIELD, pa.array(groups, pa.string()))


def without_texts(table: pa.Table) -> pa.Table:
    """Return the per-item table with nulls in :data:`TEXT_COLUMNS`; whether an answer is right stays."""
    for name in TEXT_COLUMNS:
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), pa.nulls(table.num_rows, pa.string()))
    return table


def _predictions(
    summed: np.ndarray, splits: Splits, label_marginal: Mapping[str, float] | None, priors: np.ndarray | None
) -> dict[str, list[str]]:
    """Return the predicted labels of each scoring rule, by column suffix; of equal options the first wins.

    The plain rule takes the option with the largest summed log-likelihood. ``_normalized`` divides it by the option's
    tokens, ``_calibrated`` subtracts the log of the label marginal, and ``_pmi`` subtracts the prior without an item.
    """
    lengths = np.array([len(splits.option_ids[label]) for label in splits.labels])
    rules = {"": summed, "_normalized": summed / lengths}
    if label_marginal is not None:
        # The floor avoids log(0): an option with probability 0 everywhere would win.
        shares = np.maximum([label_marginal[label] for label in splits.labels], np.finfo(float).tiny)
        rules["_calibrated"] = summed - np.log(shares)
    if priors is not None:
        rules["_pmi"] = summed - priors
    return {suffix: [splits.labels[best] for best in scores.argmax(axis=1)] for suffix, scores in rules.items()}


def scores_of(split: str, table: pa.Table, labels: Sequence[str], option_texts: Sequence[str]) -> Scores:
    """Return the scores defined in docs/measures.md, from the per-item table. ``option_texts``: the valid answers."""
    if table.num_rows == 0:
        return Scores(split=split, items=0)
    column = {name: table[name].to_pylist() for name in table.column_names}
    nats, tokens = math.fsum(column["loss_sum_nats"]), sum(column["tokens"])
    completion_nats, completion_tokens = math.fsum(column["completion_nats"]), sum(column["completion_tokens"])
    completion_bytes = sum(column["completion_bytes"])
    loss = nats / tokens if tokens else None
    return Scores(
        split=split,
        items=table.num_rows,
        loss=loss,
        loss_per_item=nats / table.num_rows,
        perplexity=None if loss is None else math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=completion_nats / math.log(2) / completion_bytes if completion_bytes else None,
        token_accuracy=sum(column["tokens_correct"]) / completion_tokens if completion_tokens else None,
        **(_label_scores(column, labels) if labels else {}),
        **(_answer_scores(column, option_texts) if column["generated"][0] is not None else {}),
    )


def _label_scores(column: Mapping[str, list[Any]], labels: Sequence[str]) -> dict[str, Any]:
    index = {label: number for number, label in enumerate(labels)}
    references = [index[label] for label in column["label"]]
    predicted = {
        suffix: [index[label] for label in column[f"predicted{suffix}"]]
        for suffix in ("", "_calibrated", "_normalized", "_pmi")
    }
    return {
        **{f"accuracy{suffix}": score_completions("accuracy", said, references) for suffix, said in predicted.items()},
        "balanced_accuracy": score_completions("balanced_accuracy", predicted[""], references),
        "macro_f1": score_completions("macro_f1", predicted[""], references, labels=len(labels)),
    }


def _answer_scores(column: Mapping[str, list[Any]], option_texts: Sequence[str]) -> dict[str, Any]:
    def score(name: str, **inputs: Any) -> float:
        return score_completions(name, column["generated"], column["answer"], **inputs)

    fold_case = ignores_case(option_texts)
    scores = {"exact_match": score("exact_match", fold_case=fold_case)}
    if option_texts:
        return scores | {"invalid_answer_rate": score("invalid_answer_rate", answers=option_texts, fold_case=fold_case)}
    return scores | {"rouge_l": score("rouge_l"), "token_f1": score("token_f1")}
