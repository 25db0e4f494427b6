"""The bar to clear: majority by hand, words where words tell, and nothing of the prompt's frame."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest

from qlora_exp.evaluation.baselines import CANDIDATES_OF_C, baselines, common_template

TOPICS = {"animal": ["fur", "paw", "tail"], "plant": ["leaf", "root", "stem"], "time": ["day", "hour", "year"]}


@pytest.fixture
def topics(make_item: Callable[..., Any], make_splits: Callable[..., Any]) -> Any:
    rng = random.Random(0)
    items = []
    for number in range(150):
        label = rng.choices(sorted(TOPICS), weights=[3, 2, 1])[0]
        text = " ".join([rng.choice(["a", "the", "some"]), rng.choice(TOPICS[label]), rng.choice(["of", "or", "in"])])
        items.append(make_item(str(number), f"Definition: {text}\nCategory:", label, label))
    return make_splits(items[:90], items[90:120], items[120:], ("animal", "plant", "rare", "time"))


def test_majority_is_the_training_splits_most_frequent_label(topics: Any) -> None:
    found = baselines(topics, "validation")
    share = sum(item.label == "animal" for item in topics.validation) / len(topics.validation)
    assert found is not None
    assert found.majority_label == "animal"
    assert found.majority_accuracy == pytest.approx(share)
    assert found.majority_balanced_accuracy == pytest.approx(1 / 3)  # three of the four labels occur
    assert found.split == "validation"


def test_words_that_tell_the_label_are_learnt(topics: Any) -> None:
    found = baselines(topics, "test")
    assert found is not None
    assert found.tfidf_accuracy is not None
    assert found.tfidf_accuracy > 0.9
    assert found.tfidf_macro_f1 is not None
    assert 0.6 < found.tfidf_macro_f1 <= 3 / 4  # the label that never occurs counts as 0
    assert found.tfidf_c in CANDIDATES_OF_C


def test_baselines_are_the_same_in_every_format_and_every_time(topics: Any) -> None:
    def chat(item: Any) -> Any:
        return dataclasses.replace(item, prompt=f"<|user|> plant day {item.prompt} <|assistant|>")

    templated = dataclasses.replace(
        topics, **{split: tuple(map(chat, getattr(topics, split))) for split in ("train", "validation", "test")}
    )
    assert baselines(templated, "validation") == baselines(topics, "validation")


def test_shuffled_labels_are_not_learnt(topics: Any) -> None:
    labels = [item.label for item in topics.train]
    random.Random(1).shuffle(labels)
    train = tuple(dataclasses.replace(item, label=label) for item, label in zip(topics.train, labels, strict=True))
    found = baselines(dataclasses.replace(topics, train=train), "validation")
    assert found is not None
    assert found.tfidf_accuracy is not None
    assert found.tfidf_accuracy < 0.75


def test_the_frame_is_cut_at_whole_words() -> None:
    assert common_template(["Say: cat now.", "Say: cow now."]) == ("Say: ", " now.")
    assert common_template(["same", "same"]) == ("", "")
    assert common_template(["x", "y"]) == ("", "")
    assert common_template(["a a", "a a a"]) == ("a ", "")


def test_tasks_without_labels_have_no_baselines(topics: Any) -> None:
    assert baselines(dataclasses.replace(topics, labels=()), "validation") is None
    assert baselines(dataclasses.replace(topics, test=()), "test") is None


def test_one_label_in_training_leaves_the_majority_alone(topics: Any) -> None:
    only = tuple(item for item in topics.train if item.label == "plant")
    found = baselines(dataclasses.replace(topics, train=only), "validation")
    assert found is not None
    assert found.majority_label == "plant"
    assert found.tfidf_accuracy is None
    assert found.tfidf_c is None


def test_a_label_rarer_than_the_folds_is_no_obstacle(topics: Any) -> None:
    seen = dict.fromkeys(TOPICS, 0)
    few = []
    for item in topics.train:
        seen[item.label] += 1
        if item.label != "time" or seen["time"] == 1:
            few.append(item)
    found = baselines(dataclasses.replace(topics, train=tuple(few)), "validation")
    assert found is not None
    assert found.tfidf_accuracy is not None
    assert found.tfidf_accuracy > found.majority_accuracy  # type: ignore[operator]
