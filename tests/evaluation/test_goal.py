"""A goal is answered yes or no only where the bound over items carries it."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from qlora_exp.errors import ConfigError
from qlora_exp.evaluation.goal import answer_goal, from_confusion, ratio_bounds, wilson_bounds
from qlora_exp.evaluation.metrics import score_completions
from qlora_exp.evaluation.scoring import Evaluation
from qlora_exp.records.types import Scores


def evaluation(right: int, items: int) -> Evaluation:
    """``right`` of ``items`` correct, over two labels."""
    label = ["a" if number % 2 else "b" for number in range(items)]
    predicted = [name if number < right else ("b" if name == "a" else "a") for number, name in enumerate(label)]
    rng = np.random.default_rng(0)
    nats, tokens = rng.gamma(2.0, 1.0, items), rng.integers(2, 5, items)
    wanted, said = ([0 if name == "a" else 1 for name in side] for side in (label, predicted))
    scores = Scores(
        "test",
        items,
        loss=float(nats.sum() / tokens.sum()),
        loss_per_item=float(nats.mean()),
        perplexity=math.exp(float(nats.sum() / tokens.sum())),
        accuracy=right / items,
        macro_f1=score_completions("macro_f1", said, wanted, labels=2),
        other={"bleu": 0.3},
    )
    table = pa.table(
        {
            "label": label,
            "predicted": predicted,
            "correct": [number < right for number in range(items)],
            "loss_sum_nats": nats,
            "tokens": tokens,
        }
    )
    return Evaluation(scores, table, ("a", "b"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("accuracy >= 0.5", "yes"),
        ("accuracy > 0.5", "yes"),
        ("accuracy >= 0.6", "not shown"),
        ("accuracy <= 0.6", "not shown"),
        ("accuracy >= 0.7", "no"),
        ("accuracy <= 0.7", "yes"),
        ("accuracy < 0.5", "no"),
        ("macro_f1 >= 0.5", "yes"),
        ("macro_f1 >= 0.6", "not shown"),
        ("macro_f1 >= 0.7", "no"),
        ("loss_per_item <= 100", "yes"),
        ("loss_per_item <= 0.1", "no"),
        ("perplexity < 1000", "yes"),
        ("rouge_l >= 0.1", "not shown"),
    ],
)
def test_goals_are_answered_by_the_bound(text: str, answer: str) -> None:
    goal = answer_goal(text, evaluation(300, 500), "test")
    assert (goal.answer, goal.text, goal.split) == (answer, text, "test")


def test_few_items_show_nothing_that_many_do() -> None:
    assert answer_goal("accuracy >= 0.5", evaluation(6, 10), "test").answer == "not shown"
    assert answer_goal("accuracy >= 0.5", evaluation(600, 1000), "test").answer == "yes"


def test_wilson_bounds_by_hand() -> None:
    # 60 of 100 at z = 1.6449: centre (0.6 + z²/200)/(1 + z²/100), half-width z·sqrt(0.24/100 + z²/40000)/(1 + z²/100).
    z = 1.6448536269514722
    centre = (0.6 + z * z / 200) / (1 + z * z / 100)
    half = z * math.sqrt(0.24 / 100 + z * z / 40000) / (1 + z * z / 100)
    assert wilson_bounds([1.0] * 60 + [0.0] * 40) == pytest.approx((centre - half, centre + half))


def test_bounds_of_a_mean_are_those_of_student() -> None:
    values = [1.0, 2.0, 4.0, 7.0]
    error = float(np.std(values, ddof=1)) / 2
    low, high = ratio_bounds(values, [1.0] * 4) or (0, 0)
    assert (low, high) == pytest.approx((3.5 - 2.353363 * error, 3.5 + 2.353363 * error), rel=1e-5)
    assert ratio_bounds([1.0], [1.0]) is None


def test_bounds_miss_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    low_misses = sum(wilson_bounds(rng.random(200) < 0.7)[0] > 0.7 for _ in range(1000))
    assert 20 <= low_misses <= 80  # nominal 50
    ratio_misses = 0
    for _ in range(1000):
        sizes = rng.integers(1, 6, 200)
        ratio_misses += (ratio_bounds((rng.gamma(1.0, 1.0, 200) * sizes).tolist(), sizes.tolist()) or (0, 0))[1] < 1.0
    assert 20 <= ratio_misses <= 95


def test_bounds_of_resampled_metrics_use_the_metrics_own_definitions() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        wanted, predicted = rng.integers(0, 4, 30), rng.integers(0, 5, 30)
        macro = score_completions("macro_f1", predicted.tolist(), wanted.tolist(), labels=6)
        assert from_confusion("macro_f1", wanted, predicted, 6) == pytest.approx(macro)
        balanced = score_completions("balanced_accuracy", predicted.tolist(), wanted.tolist())
        assert from_confusion("balanced_accuracy", wanted, predicted, 6) == pytest.approx(balanced)


def test_answers_are_the_same_every_time() -> None:
    first, second = (answer_goal("macro_f1 >= 0.55", evaluation(300, 500), "test") for _ in range(2))
    assert first == second
    assert first.low is not None
    assert first.value is not None
    assert first.high is not None
    assert first.low < first.value < first.high


def test_a_goal_that_names_no_metric_is_refused() -> None:
    with pytest.raises(ConfigError):
        answer_goal("acuracy >= 0.5", evaluation(3, 5), "test")
