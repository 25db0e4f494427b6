"""Metrics against values worked out by hand, offline."""

from __future__ import annotations

import random
from pathlib import Path

import evaluate
import pytest

from qlora_exp.errors import ConfigError
from qlora_exp.evaluation.metrics import (
    OfflineMetric,
    hub_metric,
    longest_common_subsequence,
    rouge_l_f,
    score_completions,
    token_f1,
    words,
)

# Labels 0..3; label 3 never occurs and is never predicted.
WANTED = [0, 0, 0, 0, 1, 1, 2, 2]
PREDICTED = [0, 0, 0, 1, 1, 0, 0, 0]


def test_label_metrics_have_their_values_by_hand() -> None:
    assert score_completions("accuracy", PREDICTED, WANTED) == pytest.approx(4 / 8)
    assert score_completions("balanced_accuracy", PREDICTED, WANTED) == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    # F1 of 0: 2·3/(4+6); of 1: 2·1/(2+2); of 2 and of the absent 3: 0.
    assert score_completions("macro_f1", PREDICTED, WANTED, labels=4) == pytest.approx((0.6 + 0.5 + 0 + 0) / 4)


def test_text_metrics_have_their_values_by_hand() -> None:
    generated, answers = ["  Red ", "blue", "bleu", ""], ["red", "red", "blue", "blue"]
    assert score_completions("exact_match", generated, answers) == 0.25
    assert score_completions("invalid_answer_rate", generated, answers, answers=["red", "Blue"]) == 0.5


@pytest.mark.parametrize(
    ("prediction", "reference", "rouge_l", "f1"),
    [
        ("the cat was on the mat", "the cat sat on the mat", 5 / 6, 5 / 6),
        # Lin 2004: "police killed the gunman" against two candidates with LCS 3 and 2.
        ("police kill the gunman", "police killed the gunman", 3 / 4, 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4, 3 / 4),
        ("a b", "a b c d", 2 * 1 * 0.5 / 1.5, 2 * 1 * 0.5 / 1.5),
        ("a a a", "a", 0.5, 0.5),
        ("Éclair, PLEASE!", "éclair please", 1.0, 1.0),
        ("", "something", 0.0, 0.0),
        ("...", "", 1.0, 1.0),
    ],
)
def test_overlap_has_known_values(prediction: str, reference: str, rouge_l: float, f1: float) -> None:
    assert rouge_l_f(prediction, reference) == pytest.approx(rouge_l)
    assert token_f1(prediction, reference) == pytest.approx(f1)
    assert score_completions("rouge_l", [prediction, "x"], [reference, "x"]) == pytest.approx((rouge_l + 1) / 2)
    assert score_completions("token_f1", [prediction, "x"], [reference, "x"]) == pytest.approx((f1 + 1) / 2)


def test_the_longest_common_subsequence_is_that_of_the_textbook_table() -> None:
    rng = random.Random(4)
    for _ in range(200):
        first, second = ([rng.choice("abc") for _ in range(rng.randint(0, 20))] for _ in range(2))
        table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, a in enumerate(first):
            for j, b in enumerate(second):
                table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
        assert longest_common_subsequence(first, second) == table[-1][-1]


def test_overlap_is_symmetric_and_between_zero_and_one() -> None:
    rng = random.Random(5)
    for _ in range(100):
        first, second = (" ".join(rng.choice("abcd") for _ in range(rng.randint(0, 8))) for _ in range(2))
        for measure in (rouge_l_f, token_f1):
            assert measure(first, second) == measure(second, first)
            assert 0 <= measure(first, second) <= 1
        assert rouge_l_f(first, second) <= token_f1(first, second)  # order can only cost


def test_words_are_runs_of_letters_and_digits_in_lower_case() -> None:
    assert words("Don't stop_it: 3.5 ÄPFEL") == ["don", "t", "stop", "it", "3", "5", "äpfel"]


def test_metrics_are_evaluate_metrics_that_need_no_cache_folder() -> None:
    for score in (
        "accuracy",
        "balanced_accuracy",
        "macro_f1",
        "exact_match",
        "invalid_answer_rate",
        "rouge_l",
        "token_f1",
    ):
        made = OfflineMetric(score)
        assert isinstance(made, evaluate.Metric)
        assert made.data_dir == ""
    chunks = OfflineMetric("accuracy")
    chunks.add_batch(predictions=[0, 1], references=[0, 0])
    chunks.add(prediction=2, reference=2)
    assert chunks.compute() == {"accuracy": pytest.approx(2 / 3)}


def test_a_hub_metric_offline_is_a_clear_error() -> None:
    with pytest.raises(ConfigError) as caught:
        hub_metric("sacrebleu")
    assert "sacrebleu" in caught.value.what
    assert "evaluation.metrics" in str(caught.value.where)


@pytest.mark.parametrize("name", ["somebody/metric", "./metric.py", "../x", "metric.py", "", "sacre bleu"])
def test_metrics_that_would_run_strangers_code_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="own metrics"):
        hub_metric(name)


def test_a_misspelt_hub_metric_names_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        hub_metric("sacrebleuu")
    assert "did you mean sacrebleu" in str(caught.value.hint)


def test_a_script_in_the_current_folder_never_stands_in_for_a_hub_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "meteor"
    folder.mkdir()
    (folder / "meteor.py").write_text("raise SystemExit('the script in the current folder ran')\n")
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ConfigError):
        hub_metric("meteor")
