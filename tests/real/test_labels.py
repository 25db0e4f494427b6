"""Labels as people write them: one letter, ratings, labels that begin other labels, one label in two normal forms."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qlora_exp.config.compose import compose
from qlora_exp.data.load import load_data
from qlora_exp.data.splits import load_rows
from qlora_exp.errors import DataError
from qlora_exp.evaluation.likelihood import CompletionScore
from qlora_exp.evaluation.per_item import ItemResult, item_table, scores_of
from qlora_exp.evaluation.scoring import evaluate_model
from qlora_exp.paths import EMBEDDED

TURN_ENDS = {
    "chatml": "<|im_end|>\n",
    "gemma": "<end_of_turn>\n",
    "llama3": "<|eot_id|>",
    "llama2": " </s>",
    "worded": "\nEnd of the answer.\n",
}


def template(end: str) -> str:
    written = end.replace("\n", "\\n")
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ':\\n' + message['content'] | trim + '"
        + written
        + "' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:\\n' }}{% endif %}"
    )


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: Sequence[dict[str, Any]]) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def instruct() -> Any:
    return AutoTokenizer.from_pretrained(str(EMBEDDED / "instruct"))


@pytest.mark.parametrize("end", TURN_ENDS.values(), ids=TURN_ENDS)
def test_a_one_letter_answer_is_itself_and_never_a_letter_of_the_template(
    end: str, instruct: Any, write_rows: Callable[..., Path]
) -> None:
    answers = [*string.ascii_letters, *string.digits, ".", "End", "|", ">"]
    rows = [{"prompt": f"Question {n}:", "completion": answer} for n, answer in enumerate(answers)]
    path = write_rows(rows)
    instruct.chat_template = template(end)
    options = ["task=local", f"task.path={path}", "task.format=chat", "task.test_fraction=0"]
    splits = load_data(compose(options), instruct, 512)
    items = (*splits.train, *splits.validation)
    assert len(items) == len(rows)
    for item in items:
        assert item.completion == item.answer
        assert instruct.decode(item.end_ids) == end


LETTERS = {"true or false": "tf", "choices": "abcde", "letters of the end of turn": "imend"}


def load(rows: Sequence[dict[str, Any]], write_rows: Callable[..., Path], format: str, *options: str) -> Any:
    path = write_rows(rows)
    variant = "instruct" if format == "chat" else "base"
    tokenizer = AutoTokenizer.from_pretrained(str(EMBEDDED / variant))
    named = ["task=local", f"task.path={path}", "task.kind=classification", f"task.format={format}"]
    return load_data(compose([*named, "task.test_fraction=0", *options]), tokenizer, 512), tokenizer


def labelled(labels: Sequence[Any], column: str = "label", rows: int = 60) -> list[dict[str, Any]]:
    return [{"prompt": f"Text {n}: it is number {n}\nTag:", column: labels[n % len(labels)]} for n in range(rows)]


@pytest.mark.parametrize("format", ["plain", "chat"])
@pytest.mark.parametrize("letters", LETTERS.values(), ids=LETTERS)
def test_every_letter_stays_a_label(letters: str, format: str, write_rows: Callable[..., Path]) -> None:
    rows = labelled(letters, "completion")
    splits, _ = load(rows, write_rows, format, "task.invalid_rows=drop")
    assert splits.labels == tuple(sorted(letters))
    assert splits.record.dropped_rows == 0
    assert {item.label for item in splits.train} == set(letters)


@pytest.mark.parametrize("format", ["plain", "chat"])
def test_numbers_are_labels(format: str, write_rows: Callable[..., Path]) -> None:
    splits, _ = load(labelled([0, 1, 2, 3]), write_rows, format, "task.columns.label=label")
    assert splits.labels == ("0", "1", "2", "3")
    assert {item.answer for item in splits.train} == set(splits.labels)


BEGIN = {
    "intents": ["credit_limit", "credit_limit_change", "insurance", "insurance_change", "balance"],
    "ratings": [str(number) for number in range(1, 11)],
    "words": ["book", "book hotel", "book hotel now"],
}


@pytest.mark.parametrize("format", ["plain", "chat"])
@pytest.mark.parametrize("labels", BEGIN.values(), ids=BEGIN)
def test_labels_that_begin_other_labels_are_told_apart_by_their_end(
    labels: list[str], format: str, write_rows: Callable[..., Path]
) -> None:
    splits, _ = load(labelled(labels), write_rows, format, "task.columns.label=label")
    options = splits.option_ids
    assert set(splits.labels) == set(labels)
    assert splits.record.label_end_tokens == len(splits.label_end_ids) == 1
    for label, ids in options.items():
        assert ids == splits.label_ids[label] + splits.train[0].end_ids[:1]
        assert not any(other != label and more[: len(ids)] == ids for other, more in options.items())


def test_labels_that_begin_no_other_are_scored_without_the_end(write_rows: Callable[..., Path]) -> None:
    splits, _ = load(labelled(["red", "green"]), write_rows, "plain", "task.columns.label=label")
    assert splits.option_ids == splits.label_ids
    assert splits.record.label_end_tokens == 0


def test_a_label_whose_end_is_cut_away_is_refused(write_rows: Callable[..., Path]) -> None:
    path = write_rows(labelled(BEGIN["words"]))
    tokenizer = AutoTokenizer.from_pretrained(str(EMBEDDED / "base"))
    named = ["task=local", f"task.path={path}", "task.kind=classification", "task.columns.label=label"]
    splits = load_data(compose(named), tokenizer, 512)
    longest = max(len(item.ids) for item in splits.train)
    with pytest.raises(DataError, match="max_length cuts the end of the label"):
        load_data(compose(named), tokenizer, longest - 1)


def test_dropping_invalid_rows_never_takes_a_label_away(write_rows: Callable[..., Path]) -> None:
    rows = labelled(["yes", "no", "maybe"])
    named = ("task.columns.label=label", "task.invalid_rows=drop")
    for prompt in ("", "word " * 600 + "{n}"):
        broken = [
            row | {"prompt": prompt.replace("{n}", str(n))} if row["label"] == "maybe" else row
            for n, row in enumerate(rows)
        ]
        with pytest.raises(DataError, match="no training row of the label 'maybe'"):
            load(broken, write_rows, "plain", *named)
        splits, _ = load(broken, write_rows, "plain", *named, "task.labels=[yes,no]")
        assert splits.labels == ("yes", "no")
        assert splits.record.dropped_rows == 20


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize("format", ["plain", "chat"])
def test_one_label_in_two_normal_forms_is_one_label(format: str, write_rows: Callable[..., Path]) -> None:
    for first, second in ((COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)):
        splits, _ = load(labelled([first, "th\u00e9", second]), write_rows, format, "task.columns.label=label")
        assert splits.labels == tuple(sorted((first, "th\u00e9")))
        assert {item.label for item in (*splits.train, *splits.validation)} == set(splits.labels)
    splits, _ = load(
        labelled([DECOMPOSED, "tea"]), write_rows, format, "task.columns.label=label", f'task.labels=["{COMPOSED}",tea]'
    )
    assert len(splits.train) + len(splits.validation) == 60


def test_a_question_in_two_normal_forms_stands_in_one_split_only(write_rows: Callable[..., Path]) -> None:
    rows = [{"prompt": f"{form} {n}", "completion": f"x {n}"} for n in range(30) for form in (COMPOSED, DECOMPOSED)]
    path = write_rows(rows)
    rows_read = load_rows(compose(["task=local", f"task.path={path}", "task.validation_fraction=0.3"]).task)
    numbers = [{example.completion for example in part} for part in (rows_read.train, rows_read.validation)]
    assert not numbers[0] & numbers[1]


def test_labels_that_differ_in_case_only_must_be_named_and_are_then_compared_by_case(
    write_rows: Callable[..., Path],
) -> None:
    rows = labelled(["US", "us", "may", "May"])
    with pytest.raises(DataError, match="upper and lower case only"):
        load(rows, write_rows, "plain", "task.columns.label=label")
    splits, tokenizer = load(rows, write_rows, "plain", "task.columns.label=label", "task.labels=[US,us,may,May]")
    texts = [tokenizer.decode(ids).strip() for ids in splits.label_ids.values()]
    item = splits.train[0]
    answers = {item.answer: True, item.answer.swapcase(): False}
    for answer, exact in answers.items():
        result = ItemResult(CompletionScore(0.0, 0.0, 0), np.zeros(4), answer)
        table = item_table([item], [result], splits, dict.fromkeys(splits.labels, 0.25), np.zeros(4), texts)
        assert table["exact"].to_pylist() == [exact]
        assert scores_of("validation", table, splits.labels, texts).exact_match == exact


def test_the_chosen_label_is_the_likeliest_with_its_end(write_rows: Callable[..., Path]) -> None:
    """Against one full pass for each item and label, with a random model."""
    splits, tokenizer = load(labelled(BEGIN["words"]), write_rows, "plain", "task.columns.label=label")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=1.0, **shape)).eval()
    items, end = splits.train[:12], splits.train[0].end_ids[:1]
    with torch.no_grad():  # an end that is unlikely after the shortest label
        shortest = torch.tensor([[*items[0].prompt_ids, *splits.label_ids["book"]]])
        model.lm_head.weight[end[0]] = -5 * model.model(shortest).last_hidden_state[0, -1]
    config = compose(["evaluation.generate=false"])
    table = evaluate_model(model, tokenizer, items, splits, config, split="train", label_marginal=None).items
    for item, predicted in zip(items, table["predicted"].to_pylist(), strict=True):
        sums = {}
        for label, ids in splits.label_ids.items():
            whole = torch.tensor([[*item.prompt_ids, *ids, *end]])
            with torch.no_grad():
                nats = model(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])
            sums[label] = float(nats[-len(ids) - 1 :].sum())
        assert predicted == max(sums, key=lambda label: sums[label])
    assert "book" not in table["predicted"].to_pylist()
