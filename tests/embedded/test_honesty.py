"""A score on the embedded task means what it says: the splits, checked against the texts the models were trained on.

One rule is not checked here: that shuffled labels train to chance needs the training pipeline, and stands in its tests.
"""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from qlora_exp.embedded.build.card import label_tokens, nearest_neighbour_accuracy
from qlora_exp.embedded.build.near_duplicates import character_grams, normalise, units, word_grams
from qlora_exp.embedded.build.splits import CATEGORIES
from qlora_exp.paths import EMBEDDED

from .texts import HELD_OUT, SPLITS, close, copies, rows, task, trained, training_texts

# the group is the word asked about
ALLOWED_QUESTIONS = [
    r"What does (.+) mean\?",
    r"Define the word (.+)\.",
    r"What is the meaning of (.+)\?",
    r"Give a definition of (.+)\.",
    r"Give a synonym for (.+)\.",
    r"Name another word for (.+)\.",
    r"What is a synonym of (.+)\?",
    r"Use (.+) in a sentence\.",
    r"Give an example sentence with the word (.+)\.",
    r"Write a sentence that uses (.+)\.",
    r'Which part of speech is (.+) in ".+"\?',
    r'".+" Is (.+) a noun, a verb, an adjective or an adverb here\?',
    r"What is the opposite of (.+)\?",
    r"Give an antonym of (.+)\.",
    r"Which letter does (.+) begin with\?",
    r"What is the first letter of (.+)\?",
    r'How many words are there in "(.+)"\?',
]


def definitions(*splits: str) -> list[str]:
    return [row["definition"] for split in splits for row in task(split)]


def held_out_words() -> set[str]:
    return {word.lower() for split in HELD_OUT for row in task(split) for word in (row["lemma"], *row["synonyms"])}


def test_the_task_has_the_published_sizes_and_no_row_twice() -> None:
    assert {split: len(task(split)) for split in SPLITS} == {"train": 8000, "validation": 500, "test": 1000}
    assert len({row["synset"] for split in SPLITS for row in task(split)}) == 9500


# 1. exact copies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_no_part_of_a_gloss_of_the_task_is_in_any_training_text(split: str) -> None:
    """Parts of every length count, "used informally" too: a gloss with a common part is simply no item."""
    assert copies(definitions(split), trained()) == set()


def test_no_part_of_a_gloss_stands_in_two_items() -> None:
    owners = Counter(unit for text in definitions(*SPLITS) for unit in units(text))
    assert [unit for unit, n in owners.items() if n > 1] == []


def test_a_planted_copy_is_found() -> None:
    planted = training_texts().entries[5000].definition
    assert copies([f"something new; {planted.upper()}!"], trained())


# 2. near duplicates ----------------------------------------------------------------------------------------------


def test_no_item_is_nearly_a_training_text() -> None:
    assert close(definitions(*SPLITS), trained(), word_grams) == []


@pytest.mark.long
def test_no_held_out_item_is_nearly_a_training_text_by_characters_either() -> None:
    assert close(definitions(*HELD_OUT), trained(), character_grams) == []


@pytest.mark.parametrize("grams", [word_grams, character_grams])
def test_no_held_out_item_is_nearly_another_item(grams) -> None:
    everything = {unit for text in definitions(*SPLITS) for unit in units(text)}
    own = {unit: row["synset"] for split in SPLITS for row in task(split) for unit in units(row["definition"])}
    assert [(a, b) for a, b in close(definitions(*HELD_OUT), everything, grams) if own[a] != own[b]] == []


@pytest.mark.parametrize("grams", [word_grams, character_grams])
def test_a_planted_near_duplicate_is_found(grams) -> None:
    planted = max((entry.definition for entry in training_texts().entries), key=len)
    assert close([planted + " and so on"], units(planted), grams)


# 3. kind-of lines ------------------------------------------------------------------------------------------------


def test_no_held_out_word_is_on_either_side_of_a_kind_of_line() -> None:
    in_lines = {word.lower() for entry in training_texts().entries for pair in entry.kinds for word in pair}
    assert len(in_lines) > 10_000
    assert in_lines & held_out_words() == set()


# 4. and 5. what accuracy can be split by -------------------------------------------------------------------------


def test_the_sibling_flag_is_true_exactly_where_a_training_item_shares_a_direct_hypernym() -> None:
    children = Counter(parent for row in task("train") for parent in row["hypernyms"])
    for split in SPLITS:
        itself = int(split == "train")
        for row in task(split):
            assert row["has_training_sibling"] == any(children[p] > itself for p in row["hypernyms"]), row
    assert 100 <= sum(row["has_training_sibling"] for row in task("test")) <= 900  # both sides can be scored


def test_the_label_flag_is_true_exactly_where_the_gloss_holds_the_label_or_its_plural() -> None:
    for split in SPLITS:
        for row in task(split):
            found = re.search(rf"\b{row['category']}s?\b", normalise(row["definition"])) is not None
            assert row["contains_label"] == found, row
    assert 0 < sum(row["contains_label"] for row in task("test")) < 250


# 6. and 7. labels and classes ------------------------------------------------------------------------------------


def test_the_labels_first_tokens_are_distinct_and_their_lengths_published() -> None:
    tokens = label_tokens(EMBEDDED / "base" / "tokenizer.json")
    assert tokens == label_tokens(EMBEDDED / "instruct" / "tokenizer.json")
    assert len({pieces[0] for pieces in tokens.values()}) == len(CATEGORIES) == 24
    card = (EMBEDDED / "MODEL_CARD.md").read_text("utf-8")
    for category, pieces in tokens.items():
        assert f"| {category} | {len(pieces)} |" in card


def test_every_class_has_at_least_twenty_test_items_and_none_is_most_of_them() -> None:
    counts = Counter(row["category"] for row in task("test"))
    assert set(counts) == set(CATEGORIES) == {row["category"] for row in task("train")}
    assert min(counts.values()) >= 20
    assert max(counts.values()) <= 100


# 9. what copying would give --------------------------------------------------------------------------------------


def test_the_nearest_training_gloss_gives_the_published_accuracy_and_not_much() -> None:
    accuracy = nearest_neighbour_accuracy(task("train"), task("test"))
    published = json.loads((EMBEDDED / "build.json").read_text("utf-8"))["card"]["one_nearest_neighbour_accuracy"]
    assert accuracy == pytest.approx(published, abs=0.002)
    assert accuracy < 0.6


# 10. the instruct mix --------------------------------------------------------------------------------------------


def questions(chats: list[list[dict[str, str]]]) -> list[str]:
    return [message["content"] for chat in chats for message in chat if message["role"] == "user"]


def asked_words(question: str) -> list[str]:
    """The word that a question is about; empty where the question is not one of the allowed ones."""
    return [found[1].lower() for shape in ALLOWED_QUESTIONS if (found := re.fullmatch(shape, question))]


def test_the_chats_ask_nothing_that_is_nearly_the_task() -> None:
    asked = questions(training_texts().chats)
    assert len(asked) > 30_000
    assert [question for question in asked if not asked_words(question)] == []


def test_no_chat_asks_about_a_held_out_word() -> None:
    named = {word for question in questions(training_texts().chats) for word in asked_words(question)}
    assert len(named) > 20_000
    assert named & held_out_words() == set()


# the texts for forgetting ----------------------------------------------------------------------------------------


def test_the_general_text_is_in_no_training_text() -> None:
    sentences = [line for row in rows("general_text") for line in row["text"].split("\n")]
    assert len(sentences) > 5_000
    assert copies(sentences, trained()) == set()
    assert close(sentences, trained(), word_grams) == []


def test_the_definitions_in_the_general_chats_are_in_no_training_text() -> None:
    answers = [m["content"] for row in rows("general_chat") for m in row["messages"] if m["role"] == "assistant"]
    long = [answer for answer in answers if len(normalise(answer).split()) >= 4]
    assert len(long) > 50
    assert copies(long, trained()) == set()
