"""Whether ``task.goal`` is met, by one-sided 95 % bounds over items."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import binomtest

from qlora_exp.config.checks_task import parse_goal
from qlora_exp.evaluation.forgetting import ratio_half_width
from qlora_exp.evaluation.scoring import Evaluation
from qlora_exp.records.types import Goal

GOAL_CONFIDENCE = 0.95
RESAMPLES = 2_000

GoalBounds = tuple[float, float] | None

# Metric → per-item column. Shares of items get Wilson bounds, means of numbers t bounds.
_SHARES = {
    "accuracy": "correct",
    "accuracy_calibrated": "correct_calibrated",
    "accuracy_normalized": "correct_normalized",
    "accuracy_pmi": "correct_pmi",
    "exact_match": "exact",
    "invalid_answer_rate": "invalid",
}
_MEANS = {"loss_per_item": "loss_sum_nats", "rouge_l": "rouge_l", "token_f1": "token_f1"}
# Metric → per-item numerator, denominator, and a transform of their ratio (increasing, so that it keeps bounds).
_RATIOS: dict[str, tuple[str, str, Callable[[float], float]]] = {
    "loss": ("loss_sum_nats", "tokens", float),
    "perplexity": ("loss_sum_nats", "tokens", lambda value: math.exp(min(value, 700.0))),
    "bits_per_byte": ("completion_nats", "completion_bytes", lambda value: value / math.log(2)),
    "token_accuracy": ("tokens_correct", "completion_tokens", float),
}


def answer_goal(text: str, evaluation: Evaluation, split: str) -> Goal:
    """Return whether a goal ``METRIC >= NUMBER`` (or ``>``, ``<=``, ``<``) is met: ``yes``, ``no`` or ``not shown``.

    ``low`` and ``high`` are one-sided 95 % bounds. *yes*: both bounds meet the goal; *no*: neither does; else *not
    shown*. A metric that wasn't measured, or has no per-item values, is *not shown*. The bounds are over items only:
    they don't include the variance between training seeds.

    Example: ``accuracy >= 0.8`` with bounds 0.81 and 0.87 is *yes*.

    Raises:
        ConfigError: the goal has a wrong form.
    """
    metric, operator, threshold = parse_goal(text)
    value = getattr(evaluation.scores, metric, None)
    bounds = _bounds(metric, evaluation) if value is not None else None
    if value is None or bounds is None:
        return Goal(text=text, split=split, value=value, low=None, high=None, answer="not shown")
    low, high = bounds
    # At a bound equal to the threshold, >= and <= are met, > and < are not.
    if operator in (">=", ">"):
        met = low >= threshold if operator == ">=" else low > threshold
        failed = high < threshold if operator == ">=" else high <= threshold
    else:
        met = high <= threshold if operator == "<=" else high < threshold
        failed = low > threshold if operator == "<=" else low >= threshold
    return Goal(text, split, value, low, high, answer="yes" if met else "no" if failed else "not shown")


def _bounds(metric: str, evaluation: Evaluation) -> GoalBounds:
    def column(name: str) -> list[float]:
        return [float(value) for value in evaluation.items[name].to_pylist()]

    if metric in _SHARES:
        return wilson_bounds(column(_SHARES[metric]))
    if metric in _MEANS:
        values = column(_MEANS[metric])
        return ratio_bounds(values, [1.0] * len(values))
    if metric in _RATIOS:
        numerator, denominator, transform = _RATIOS[metric]
        bounds = ratio_bounds(column(numerator), column(denominator))
        return None if bounds is None else (transform(bounds[0]), transform(bounds[1]))
    if metric in ("macro_f1", "balanced_accuracy"):
        return _bootstrap_bounds(metric, evaluation)
    return None


def wilson_bounds(outcomes: Sequence[float]) -> tuple[float, float]:
    """Return one-sided 95 % Wilson bounds of a share (Wilson 1927): those of the two-sided 90 % interval."""
    interval = binomtest(int(sum(outcomes)), len(outcomes)).proportion_ci(2 * GOAL_CONFIDENCE - 1, method="wilson")
    return float(interval.low), float(interval.high)


def ratio_bounds(numerators: Sequence[float], denominators: Sequence[float]) -> GoalBounds:
    """Return one-sided 95 % bounds of Σ numerators / Σ denominators over items.

    With denominators of 1 they are the t bounds of a mean. ``None`` for fewer than two items or a sum of denominators
    of 0.
    """
    n, total = len(numerators), float(sum(denominators))
    if n < 2 or total == 0:
        return None
    ratio = sum(numerators) / total
    half_width = ratio_half_width(ratio, np.array(numerators), np.array(denominators), GOAL_CONFIDENCE)
    return ratio - half_width, ratio + half_width


def _bootstrap_bounds(metric: str, evaluation: Evaluation) -> GoalBounds:
    """Return the 5th and 95th percentile over 2,000 bootstrap resamples of the items, with a fixed seed."""
    index = {label: number for number, label in enumerate(evaluation.labels)}
    references = np.array([index[label] for label in evaluation.items["label"].to_pylist()])
    predicted = np.array([index[label] for label in evaluation.items["predicted"].to_pylist()])
    if len(references) < 2:
        return None
    generator = np.random.default_rng(0)
    values = []
    for _ in range(RESAMPLES):
        rows = generator.integers(0, len(references), len(references))
        values.append(from_confusion(metric, references[rows], predicted[rows], len(index)))
    low, high = np.quantile(values, [1 - GOAL_CONFIDENCE, GOAL_CONFIDENCE])
    return float(low), float(high)


def from_confusion(metric: str, references: np.ndarray, predicted: np.ndarray, labels: int) -> float:
    """Return ``macro_f1`` or ``balanced_accuracy`` from label indices, by counts, as the metrics define them."""
    correct = np.bincount(references[references == predicted], minlength=labels)
    true_counts, predicted_counts = np.bincount(references, minlength=labels), np.bincount(predicted, minlength=labels)
    if metric == "balanced_accuracy":
        return float((correct[true_counts > 0] / true_counts[true_counts > 0]).mean())
    return float((2 * correct / np.maximum(true_counts + predicted_counts, 1)).mean())
