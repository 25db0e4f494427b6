"""Offline metrics as ``evaluate.Metric``, and metrics from the Hub.

``evaluate.load("exact_match")`` downloads a script from the Hub, so the metrics of every run are defined here. Text
metrics and the per-item table use the same plain functions, so that they always agree.
"""

from __future__ import annotations

import logging
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import evaluate

# evaluate is defined in terms of datasets' features and re-exports them; datasets itself has one importer, data/.
from evaluate.module import Features, Value
from sklearn.metrics import f1_score

from qlora_exp.data.texts import comparable, same_text
from qlora_exp.errors import ConfigError, nearest

# The evaluate library's metrics that score one text against one reference, to suggest a name for a misspelt one.
HUB_TEXT_METRICS = (
    *("bertscore", "bleu", "bleurt", "character", "charcut_mt", "chrf", "cer", "exact_match", "google_bleu"),
    *("meteor", "nist_mt", "rouge", "sacrebleu", "ter", "wer"),
)


def words(text: str) -> list[str]:
    """Return the lower-case runs of letters and digits, in any script. On ASCII text this equals rouge-score's
    tokenizer."""
    return re.findall(r"[^\W_]+", comparable(text))


def rouge_l_f(prediction: str, reference: str) -> float:
    """Return the ROUGE-L F-measure with beta = 1 (Lin 2004): 2·LCS / (words of prediction + words of reference).

    1.0 if neither text has words, 0.0 if only one has.
    """
    first, second = words(prediction), words(reference)
    if not first or not second:
        return float(first == second)
    return 2.0 * longest_common_subsequence(first, second) / (len(first) + len(second))


def token_f1(prediction: str, reference: str) -> float:
    """Return the harmonic mean of word precision and recall, ignoring order (as SQuAD, but with articles).

    1.0 if neither text has words, 0.0 if only one has.
    """
    first, second = words(prediction), words(reference)
    if not first or not second:
        return float(first == second)
    return 2.0 * (Counter(first) & Counter(second)).total() / (len(first) + len(second))


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by bit-parallel dynamic programming (Hyyrö 2004)."""
    occurrences: dict[str, int] = {}
    for index, word in enumerate(first):
        occurrences[word] = occurrences.get(word, 0) | 1 << index
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matched = row & occurrences.get(word, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(first) - row.bit_count()


def _mean_over_items(measure: Callable[..., float]) -> Callable[..., float]:
    def compute(predictions: Sequence[Any], references: Sequence[Any], **inputs: Any) -> float:
        return _mean([measure(a, b, **inputs) for a, b in zip(predictions, references, strict=True)])

    return compute


def _balanced_accuracy(predictions: Sequence[int], references: Sequence[int]) -> float:
    total = Counter(references)
    right = Counter(b for a, b in zip(predictions, references, strict=True) if a == b)
    return sum(right[label] / count for label, count in total.items()) / len(total)


def _macro_f1(predictions: Sequence[int], references: Sequence[int], labels: int) -> float:
    return float(f1_score(references, predictions, labels=list(range(labels)), average="macro", zero_division=0))


def _invalid_answer_rate(
    predictions: Sequence[str], references: Sequence[str], answers: Sequence[str], fold_case: bool = True
) -> float:
    valid = {comparable(answer.strip(), fold_case) for answer in answers}
    return _mean([comparable(text.strip(), fold_case) not in valid for text in predictions])


def _mean(values: Sequence[float]) -> float:
    return float(sum(values)) / len(values)


_OF_LABELS: dict[str, tuple[Callable[..., float], str]] = {
    "accuracy": (_mean_over_items(operator.eq), "Share of items whose predicted label is the right one."),
    "balanced_accuracy": (
        _balanced_accuracy,
        "Mean over the labels that occur among the references of the share of their items that are right.",
    ),
    "macro_f1": (
        _macro_f1,
        "Mean F1 over all of the task's labels (compute(labels=count)); 0 for a label never predicted or absent.",
    ),
}
"""Scores whose predictions and references are indices into the task's labels, and their meanings."""
_OF_TEXTS: dict[str, tuple[Callable[..., float], str]] = {
    "exact_match": (
        _mean_over_items(same_text),
        "Share of texts equal to their reference: stripped, in Unicode NFC, case-folded (compute(fold_case=…)).",
    ),
    "invalid_answer_rate": (
        _invalid_answer_rate,
        "Share of texts that are none of the task's answers (compute(answers=[…])), right or wrong.",
    ),
    "rouge_l": (_mean_over_items(rouge_l_f), "Mean ROUGE-L F-measure over items."),
    "token_f1": (_mean_over_items(token_f1), "Mean F1 of words over items, order ignored."),
}
"""Scores whose predictions and references are texts, and their meanings."""


class OfflineMetric(evaluate.Metric):  # type: ignore[misc]
    """An ``evaluate.Metric`` that keeps its inputs in memory and needs neither network nor cache folder."""

    def __init__(self, score: str) -> None:
        self.score = score
        self.function, self.meaning = (_OF_LABELS | _OF_TEXTS)[score]
        super().__init__(keep_in_memory=True)

    def _build_data_dir(self) -> str:
        return ""  # the library would make a folder under the home directory, which may be read-only

    def _info(self) -> evaluate.MetricInfo:
        value = Value("int64" if self.score in _OF_LABELS else "string")
        return evaluate.MetricInfo(
            description=self.meaning,
            citation="",
            inputs_description="predictions and references of equal length.",
            features=Features({"predictions": value, "references": value}),
        )

    def _compute(self, **inputs: Any) -> dict[str, float]:
        return {self.score: self.function(**inputs)}


def score_completions(score: str, predictions: Sequence[Any], references: Sequence[Any], **inputs: Any) -> float:
    """Return the value of a score, e.g. ``macro_f1``. ``inputs`` are the arguments that its meaning names, e.g.
    ``labels``."""
    metric = OfflineMetric(score)
    return float(metric.compute(predictions=list(predictions), references=list(references), **inputs)[score])


def hub_metric(name: str) -> Any:
    """Return a metric of the evaluate library by its Hub name, e.g. ``sacrebleu``. Needs network or the Hub's cache.

    Community metrics (``OWNER/NAME``) and scripts on disk are refused: loading one runs its code.

    Raises:
        ConfigError: the name isn't one of the library's, or the Hub can't be reached.
    """
    where = f"evaluation.metrics={name}"
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        what = f"{name!r} is not the name of one of the evaluate library's own metrics"
        raise ConfigError(what, where, nearest(name, HUB_TEXT_METRICS))
    try:
        # With the owner, because evaluate looks for a bare name as a script in the current directory first.
        return evaluate.load(f"evaluate-metric/{name}", keep_in_memory=True)
    except ImportError as error:
        raise ConfigError(f"the metric {name!r} needs a package that isn't installed: {error}", where) from None
    except Exception as error:  # the library raises OSError, FileNotFoundError, HTTP and parsing errors
        logging.getLogger(__name__).debug("evaluate.load failed", exc_info=True)
        hint = "go online once (HF_HUB_OFFLINE unset), or leave it out"
        if name not in HUB_TEXT_METRICS:
            hint = f"{nearest(name, HUB_TEXT_METRICS)} If it is that name: {hint}"
        what = f"the metric {name!r} can't be loaded from the Hub ({type(error).__name__})"
        raise ConfigError(what, where, hint) from None
