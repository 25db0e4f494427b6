"""Files of common layouts are read by their columns alone; what was recognised is said, and settings change it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest

from qlora_exp.cli.settings_file import combined_overrides
from qlora_exp.config.compose import compose
from qlora_exp.data.splits import RawSplits, load_rows
from qlora_exp.data.texts import final_answer
from qlora_exp.errors import DataError, Problems, QloraExpError

Configure = Callable[..., Any]
Rows = list[dict[str, Any]]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def shared(sender: str, value: str) -> dict[str, str]:
    return {"from": sender, "value": value}


def many(row: Callable[[int], dict[str, Any]]) -> Rows:
    return [row(number) for number in range(20)]


def by_row(rows: RawSplits) -> list[Any]:
    return sorted((*rows.train, *rows.validation, *rows.test), key=lambda example: example.row)


def told(config: Any) -> str:
    with pytest.raises((DataError, Problems)) as error:
        load_rows(config.task)
    return str(error.value)


ANSWERS = {"text": ["Ulm", "in Ulm"], "answer_start": [3, 0]}
LAYOUTS: dict[str, tuple[Rows, Callable[[dict[str, Any]], tuple[str, str]], str]] = {
    "Alpaca": (
        many(
            lambda n: {"instruction": f"do {n}", "input": f"{n}" if n % 2 else "", "output": f"did {n}", "text": "all"}
        ),
        lambda row: (f"{row['instruction']}\n{row['input']}", row["output"]),
        "read as Alpaca rows: prompt = {instruction}\\n{input}, completion = output; not read: text",
    ),
    "Dolly": (
        many(lambda n: {"instruction": f"do {n}", "context": "", "response": f"did {n}", "category": "qa"}),
        lambda row: (f"{row['instruction']}\n", row["response"]),
        "read as Dolly rows: prompt = {instruction}\\n{context}, completion = response; not read: category",
    ),
    "ShareGPT": (
        many(
            lambda n: {"conversations": [{"from": "human", "value": f"hi {n}"}, {"from": "gpt", "value": f"yes {n}"}]}
        ),
        lambda row: (row["conversations"][0]["value"], row["conversations"][1]["value"]),
        "read as ShareGPT conversations: messages = conversations",
    ),
    "OpenAI": (
        many(lambda n: {"id": n, "messages": [said("user", f"hi {n}"), said("assistant", f"yes {n}")]}),
        lambda row: (row["messages"][0]["content"], row["messages"][1]["content"]),
        "read as OpenAI messages: messages = messages; not read: id",
    ),
    "preferences as texts": (
        many(lambda n: {"prompt": f"q {n}", "chosen": f"good {n}", "rejected": f"bad {n}"}),
        lambda row: (row["prompt"], row["chosen"]),
        "prompt = prompt, completion = chosen; SFT on the chosen answers, rejected is not used",
    ),
    "preferences as conversations": (
        many(
            lambda n: {
                "prompt": f"q {n}",
                "chosen": [said("user", f"q {n}"), said("assistant", f"good {n}")],
                "rejected": [said("user", f"q {n}"), said("assistant", f"bad {n}")],
            }
        ),
        lambda row: (row["prompt"], row["chosen"][1]["content"]),
        "read as preference pairs: messages = chosen; SFT on the chosen answers",
    ),
    "preferences with the prompt's messages": (
        many(
            lambda n: {
                "prompt": [said("user", f"q {n}")],
                "chosen": [said("assistant", f"good {n}")],
                "rejected": [said("assistant", f"bad {n}")],
            }
        ),
        lambda row: (row["prompt"][0]["content"], row["chosen"][0]["content"]),
        "read as preference pairs: messages = prompt+chosen",
    ),
    "TRL's conversations": (
        many(lambda n: {"prompt": [said("user", f"q {n}")], "completion": [said("assistant", f"a {n}")]}),
        lambda row: (row["prompt"][0]["content"], row["completion"][0]["content"]),
        "read as prompt/completion conversations: messages = prompt+completion",
    ),
    "SQuAD": (
        many(lambda n: {"id": f"{n}", "context": f"text {n % 7}", "question": f"where {n}?", "answers": ANSWERS}),
        lambda row: (f"{row['context']}\n{row['question']}", "Ulm"),
        "the first of answers.text is learned; not read: id",
    ),
    "GSM8K": (
        many(lambda n: {"question": f"{n}+1?", "answer": f"add\n#### {n + 1}"}),
        lambda row: (row["question"], row["answer"]),
        "read as GSM8K rows: prompt = question, completion = answer; exact match compares what follows the last ####",
    ),
    "a context, a question, an answer": (
        many(lambda n: {"question": f"q {n}", "context": f"c {n}", "answer": f"a {n}"}),
        lambda row: (f"{row['context']}\n{row['question']}", row["answer"]),
        "read as question rows",
    ),
    "capital letters": (
        many(lambda n: {"Question": f"q {n}", "Answer": f"a {n}"}),
        lambda row: (row["Question"], row["Answer"]),
        "read as question/answer rows: prompt = Question, completion = Answer",
    ),
    "numbers as labels": (
        many(lambda n: {"sentence": f"s {n}", "label": n % 2}),
        lambda row: (row["sentence"], str(row["label"])),
        "read as sentence/label rows: prompt = sentence, completion = {label}",
    ),
    "an intent": (
        many(lambda n: {"text": f"s {n}", "intent": f"i {n % 3}"}),
        lambda row: (row["text"], row["intent"]),
        "read as text/intent rows",
    ),
    "names of the numbers": (
        many(lambda n: {"text": f"s {n}", "label": n % 2, "label_text": ("no", "yes")[n % 2]}),
        lambda row: (row["text"], row["label_text"]),
        "read as text/label_text rows: prompt = text, completion = label_text; not read: label",
    ),
    "two sentences": (
        many(lambda n: {"premise": f"p {n}", "hypothesis": f"h {n}", "label": f"l {n % 3}"}),
        lambda row: (f"{row['premise']}\n{row['hypothesis']}", row["label"]),
        "read as premise/hypothesis/label rows",
    ),
    "prompt and completion, with other columns": (
        many(lambda n: {"prompt": f"p {n}", "completion": f"c {n}", "answer": "x", "label": "y"}),
        lambda row: (row["prompt"], row["completion"]),
        "read as prompt/completion rows",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_common_layout_is_read_by_its_columns_and_said(name: str, tmp_path: Path, configure: Configure) -> None:
    rows, meant, line = LAYOUTS[name]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_rows(configure(tmp_path / "a.jsonl").task)
    assert [(e.messages[-1].content, e.completion) for e in by_row(found)] == [meant(row) for row in rows]
    assert found.reading is not None
    assert line in str(found.reading.line)
    assert "to change it: task." in str(found.reading.line)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "message" not in name and "conversation" not in name])
def test_a_layout_means_the_same_as_the_settings_that_it_fills_in(
    name: str, tmp_path: Path, configure: Configure
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LAYOUTS[name][0]))
    found = load_rows(configure(tmp_path / "a.jsonl").task)
    assert found.reading is not None
    settings = {}
    for key, value in found.reading.settings.items():
        name = key.removeprefix("task.")
        settings[f"{name.removeprefix('columns.')}_column" if name.startswith("columns.") else name] = value
    explicit = load_rows(configure(tmp_path / "a.jsonl", **settings).task)
    assert by_row(explicit) == by_row(found)
    assert explicit.reading is not None
    assert explicit.reading.line is None


def questions(texts: int, answers: dict[str, Any] = ANSWERS) -> Rows:
    return [
        {"context": f"text {n % texts}", "question": f"where {n}?", "answers": answers, "id": n}
        for n in range(texts * 3)
    ]


def test_rows_about_one_text_are_one_group(tmp_path: Path, configure: Configure) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(40)))
    found = load_rows(configure(tmp_path / "a.jsonl").task)
    assert {example.group for example in by_row(found)} == {f"text {n}" for n in range(40)}
    train, validation, test = ({example.group for example in split} for split in found.examples.values())
    assert not train & (validation | test)
    assert found.reading is not None
    assert "rows of one context count as one observation" in str(found.reading.line)


def test_questions_without_an_answer_are_one_message(tmp_path: Path, configure: Configure) -> None:
    rows = [*questions(10), *questions(10, {"text": [], "answer_start": []})]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = told(configure(tmp_path / "a.jsonl"))
    assert "no answer" in message
    assert "row 31, and 29 other rows" in message
    assert "task.invalid_rows=drop" in message


def test_whole_texts_have_no_prompt_and_are_their_own_duplicates(tmp_path: Path, configure: Configure) -> None:
    rows = [*many(lambda n: {"text": f"A text about {n}.", "url": "x"}), {"text": "A text about 3."}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_rows(configure(tmp_path / "a.jsonl").task)
    assert {example.messages for example in by_row(found)} == {()}
    assert [example.completion for example in by_row(found)] == [row["text"] for row in rows[:20]]
    assert found.dropped == {"exact duplicate": 1}
    assert found.reading is not None
    assert "continued pretraining: the whole text is learned and scored" in str(found.reading.line)
    again = load_rows(configure(tmp_path / "a.jsonl", prompt="", completion_column="text").task)
    assert by_row(again) == by_row(found)


def test_a_label_that_the_list_lacks_is_one_message(tmp_path: Path, configure: Configure) -> None:
    rows = many(lambda n: {"text": f"s {n}", "label": ("cat", "dog", "bird")[n % 3]})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = told(configure(tmp_path / "a.jsonl", kind="classification", labels=["cat", "dog"]))
    assert message.count("'bird' is not one of the 2 labels") == 1
    assert "and 5 other rows" in message


def test_few_distinct_completions_name_the_setting_that_reads_labels(tmp_path: Path, configure: Configure) -> None:
    rows = many(lambda n: {"text": f"s {n}", "label": ("cat", "dog")[n % 2]})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [note] = load_rows(configure(tmp_path / "a.jsonl").task).notes
    assert note.startswith("2 distinct completions in 20 rows: task.kind=classification scores them as labels")
    classified = load_rows(configure(tmp_path / "a.jsonl", kind="classification").task)
    assert list(classified.options) == ["cat", "dog"]
    assert not classified.notes


PLAIN: Rows = many(lambda n: {"question": f"q {n}", "answer": f"a {n}"})


def csv_with_index(path: Path) -> None:
    pandas.DataFrame(PLAIN).to_csv(path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.csv": csv_with_index,
    "a.parquet": lambda path: pandas.DataFrame(PLAIN, index=range(100, 120)).to_parquet(path, index=True),
    "a.tsv": lambda path: pandas.DataFrame(PLAIN).to_csv(path, sep="\t", index=False),
    "a.json": lambda path: path.write_text(json.dumps({"version": 1, "data": PLAIN})),
    "b.json": lambda path: path.write_text(json.dumps({"train": PLAIN})),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, PLAIN)).encode())),
}


@pytest.mark.parametrize("name", WRITERS)
def test_an_index_and_an_envelope_make_no_difference(name: str, tmp_path: Path, configure: Configure) -> None:
    WRITERS[name](tmp_path / name)
    found = load_rows(configure(tmp_path / name).task)
    assert [(e.messages[0].content, e.completion) for e in by_row(found)] == [
        (row["question"], row["answer"]) for row in PLAIN
    ]
    assert found.reading is not None
    assert "not read" not in str(found.reading.line)


def test_a_json_object_may_hold_the_splits(tmp_path: Path, configure: Configure) -> None:
    content = {"train": PLAIN[:14], "validation": PLAIN[14:17], "test": PLAIN[17:]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    found = load_rows(configure(tmp_path / "a.json").task)
    assert [len(split) for split in found.examples.values()] == [14, 3, 3]
    assert found.test[0].item_id == "a.json[test]:1"


def test_a_folder_with_one_data_file_is_that_file(tmp_path: Path, configure: Configure) -> None:
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "our-own-15k.jsonl").write_text("\n".join(map(json.dumps, PLAIN)))
    assert len(by_row(load_rows(configure(tmp_path).task))) == 20


def test_a_wrong_path_names_the_data_files_nearby(tmp_path: Path, configure: Configure) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "rows.jsonl").write_text("{}")
    (tmp_path / "other.csv").write_text("x")
    message = told(configure(tmp_path / "nothing.jsonl"))
    assert f"nearby: task.path={tmp_path / 'other.csv'} or task.path={tmp_path / 'deep' / 'rows.jsonl'}" in message
    assert f"nearby: task.path={tmp_path / 'deep' / 'rows.jsonl'}" in told(configure(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("text", "final"),
    [("3 * 500\n#### 1,500", "1500"), ("#### $7.", "7"), ("#### 1\n#### x y", "x y"), ("no mark", "no mark")],
)
def test_a_final_answer_follows_the_last_mark(text: str, final: str) -> None:
    assert final_answer(text, "####") == final
    assert final_answer(text, None) == text


@pytest.mark.parametrize(
    ("overrides", "steps", "epochs"),
    [
        ([], 80, None),
        (["training.epochs=3"], None, 3.0),
        (["training.epochs=0.5"], None, 0.5),
        (["training.epochs=null"], 80, None),
    ],
)
def test_epochs_replace_the_default_number_of_steps(
    overrides: list[str], steps: int | None, epochs: float | None
) -> None:
    training = compose(overrides).training
    assert (training.max_steps, training.epochs) == (steps, epochs)


@pytest.mark.parametrize("other", ["training.max_steps=7", "training.max_tokens=700"])
def test_two_lengths_of_a_training_are_refused(other: str) -> None:
    with pytest.raises(QloraExpError, match="only one of them may end the training"):
        compose(["training.epochs=3", other])


@pytest.mark.parametrize("epochs", ["0", "-1", "three"])
def test_epochs_are_a_number_above_zero(epochs: str) -> None:
    with pytest.raises(QloraExpError, match=r"training\.epochs"):
        compose([f"training.epochs={epochs}"])


@pytest.mark.parametrize(
    ("file", "typed", "steps", "tokens", "epochs"),
    [
        ("{max_steps: null, max_tokens: 100000}", ["training.max_tokens=5000"], None, 5000, None),
        ("{max_steps: 40}", ["training.epochs=null"], 40, None, None),
        ("{max_steps: 40}", ["training.epochs=3"], None, None, 3.0),
        ("{epochs: 3}", ["training.max_steps=7"], 7, None, None),
        ("{epochs: 3}", ["training.batch_size=8"], None, None, 3.0),
    ],
)
def test_a_length_on_the_command_line_replaces_that_of_a_file_and_nothing_else(
    file: str, typed: list[str], steps: int | None, tokens: int | None, epochs: float | None, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"training: {file}\n", encoding="utf-8")
    training = compose(combined_overrides(path, typed)).training
    assert (training.max_steps, training.max_tokens, training.epochs) == (steps, tokens, epochs)


def test_choices_are_not_left_out_of_a_question(tmp_path: Path, configure: Configure) -> None:
    rows = [
        {"question": f"{n} + 1?", "subject": "sums", "choices": [str(n), str(n + 1)], "answer": 1} for n in range(20)
    ]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(QloraExpError, match="prompt"):
        load_rows(configure(tmp_path / "choices.jsonl").task)
