"""Files that can be meant in two ways: ``validate`` names the place and what to do, and what it offers works."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest

from qlora_exp.cli import main
from tests.real.cases_input import (
    ASKED,
    CASES,
    LOCKERS,
    MADE,
    Families,
    Row,
    Runs,
    chatml,
    path_of,
    plain,
    read,
    rows_of,
    stored_files,
)

MESSAGES, LABEL = "task.columns.messages=messages", "task.columns.label=label"
CLASSES = ("task.kind=classification", LABEL)
Refusal = Callable[..., str]


@pytest.fixture
def refusal(families: Families, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """What ``validate`` says of a file that it refuses: one message, exit code 2."""

    def of(path: Path, model: str, *overrides: str) -> str:
        capsys.readouterr()
        assert main(["validate", "task=local", f"task.path={path}", *families.overrides(model), *overrides]) == 2
        captured = capsys.readouterr()
        assert "valid\n" not in captured.out
        assert "Traceback" not in captured.err
        assert "do: " in captured.err
        return captured.err

    return of


REFUSED: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "a call under a template without tools": (
        "04_tools_dropped/tool_role.jsonl",
        "instruct",
        (MESSAGES,),
        ("row 1, and 7 other rows", "the template may not know tool calls: model.chat_template=FILE.jinja"),
    ),
    "a call in plain text": (
        "04_tools_dropped/tool_role.jsonl",
        "base",
        (MESSAGES,),
        ("not for the plain format: the row has the field 'tool_calls'", "task.format=chat"),
    ),
    "tools under a template without them": (
        "04_tools_dropped/tools_column.jsonl",
        "instruct",
        (MESSAGES,),
        ("the chat template doesn't write the tools", "task.columns.tools=null leaves them out"),
    ),
    "a developer's message in plain text": (
        "04_tools_dropped/developer_role.jsonl",
        "base",
        (MESSAGES,),
        ("a message of the role developer", "task.format=chat"),
    ),
    "answers that aren't learned": (
        "04_tools_dropped/weight0.jsonl",
        "instruct",
        (MESSAGES,),
        ("the last answer has the weight 0", "leave the row out, or end the conversation on an answer"),
    ),
    "a tag that is a token": (
        "07_prompt_with_control_tokens/html_strike.jsonl",
        "mistral_7b base",
        (),
        ("the text holds '<s>', which this tokenizer reads as a control token", "task.special_tokens=text"),
    ),
    "a file name that is a token": (
        "07_prompt_with_control_tokens/smollm_filename.jsonl",
        "smollm2_135m instruct",
        (),
        ("the text holds '<filename>'", "row 1"),
    ),
    "a prompt that is templated already": (
        "07_prompt_with_control_tokens/templated_prompt.jsonl",
        "mistral_7b instruct",
        (),
        ("the text holds '<s>'", "take it out: the format adds the tokens it needs"),
    ),
    "labels that differ in case": (
        "08_labels_prefix/case.jsonl",
        "base",
        CLASSES,
        ("'IT' and 'it' differ in upper and lower case only", "name all labels: task.labels=[…]"),
    ),
    "no answer at the end": (
        "09_instruction_formats/ends_on_user.jsonl",
        "instruct",
        (MESSAGES,),
        ("the roles are user, assistant, user", "take out the messages after the last answer"),
    ),
    "one shard of two beside the whole": (
        "15_folder_of_shards/extra_shard",
        "base",
        (),
        ("two files for train: train.jsonl and train-00001-of-00002.jsonl", "keep one of the two"),
    ),
    "splits under other names": (
        "15_folder_of_shards/other_names",
        "base",
        (),
        ("holdout.jsonl would not be read", "testing.jsonl would not be read", "rename it to test.jsonl"),
    ),
    "fractions as answers": (
        "22_parquet/float_label.parquet",
        "base",
        (),
        ("found float 0.0", 'write it as text, "0" (pandas makes floats of whole numbers'),
    ),
    "fractions as labels": (
        "22_parquet/float_label.parquet",
        "base",
        ("task.kind=classification",),
        ("found float 0.0", 'write it as text, "0"'),
    ),
    "numbers as answers": (
        "22_parquet/int_label.parquet",
        "base",
        (),
        ("found int 0", "task.kind=classification"),
    ),
    "backslashes before quotes": (
        "27_file_oddities/backslash_quotes.csv",
        "base",
        (),
        ("the file is not CSV", "backslash_quotes.csv, row 2", 'the file writes it \\" instead'),
    ),
    "NaN": ("27_file_oddities/nan.jsonl", "base", (), ("4 rows can't be used: 4 × not text", "marks a missing value")),
    "commas at the ends": (
        "27_file_oddities/trailing_comma.jsonl",
        "base",
        (),
        ("trailing_comma.jsonl, row 1", "take the comma off the end of each line"),
    ),
    "UTF-16": ("27_file_oddities/utf16.jsonl", "base", (), ("the file is UTF-16", "iconv -f UTF-16 -t UTF-8")),
    "UTF-16 without a mark": (
        "27_file_oddities/utf16le_nobom.jsonl",
        "base",
        (),
        ("seems to be UTF-16", "iconv -f UTF-16LE -t UTF-8"),
    ),
}


@pytest.mark.parametrize(
    ("case", "model", "overrides", "says"),
    [pytest.param(*values, id=f"{values[0]}: {name}") for name, values in REFUSED.items()],
)
def test_a_file_that_could_be_learned_wrongly_is_refused_with_what_to_do(
    case: str, model: str, overrides: tuple[str, ...], says: tuple[str, ...], refusal: Refusal, tmp_path: Path
) -> None:
    message = refusal(path_of(case, tmp_path), model, *overrides)
    for part in says:
        assert part in message


def of_talk(row: Row) -> Runs:
    return chatml(*row["messages"])


def of_shared_talk(row: Row) -> Runs:
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    return chatml(*({"role": roles[one["from"]], "content": one["value"]} for one in row["conversations"]))


def of_chosen(row: Row) -> Runs:
    return chatml(*row["chosen"])


KNOWN: dict[str, Callable[[Row], Runs]] = {
    "08_labels_prefix/int_labels.jsonl": lambda row: plain(row["prompt"], str(row["label"])),
    "09_instruction_formats/alpaca.json": lambda row: plain(
        f"{row['instruction']}\n{row['input']}", row["output"], " " if row["input"] else ""
    ),
    "09_instruction_formats/alpaca.jsonl": lambda row: plain(
        f"{row['instruction']}\n{row['input']}", row["output"], " " if row["input"] else ""
    ),
    "09_instruction_formats/dolly.jsonl": lambda row: plain(
        f"{row['instruction']}\n{row['context']}", row["response"], " " if row["context"] else ""
    ),
    "09_instruction_formats/gsm8k.jsonl": lambda row: plain(row["question"], row["answer"]),
    "09_instruction_formats/sharegpt.jsonl": of_shared_talk,
    "09_instruction_formats/dpo.jsonl": of_chosen,
    "09_instruction_formats/squad.jsonl": lambda row: plain(
        f"{row['context']}\n{row['question']}", row["answers"]["text"][0]
    ),
    "09_instruction_formats/text_only.jsonl": lambda row: ("<|endoftext|>", f"{row['text']}<|endoftext|>"),
    "12_templates/multi.jsonl": of_talk,
    "09_instruction_formats/multi_turn.jsonl": of_talk,
    "14_nfd/nfd_labels.jsonl": lambda row: plain(row["prompt"], row["label"]),
}


@pytest.mark.parametrize("case", KNOWN)
def test_a_file_of_a_common_layout_is_read_as_it_is_meant_by_its_columns(case: str, families: Families) -> None:
    model = "instruct" if KNOWN[case] in (of_talk, of_shared_talk, of_chosen) else "base"
    rows = rows_of(case.replace(".json", ".jsonl") if case.endswith(".json") else case)
    reading = read(CASES / case, families.overrides(model))
    assert reading.runs == [KNOWN[case](row) for row in rows]
    assert reading.splits.read_as is not None


def test_labels_that_differ_in_case_are_read_where_they_are_named(families: Families) -> None:
    """08_labels_prefix/case.jsonl"""
    named = "task.labels=[IT,it,polish,Polish]"
    reading = read(CASES / "08_labels_prefix/case.jsonl", families.overrides("base"), *CLASSES, named)
    assert reading.runs == [plain(row["prompt"], row["label"]) for row in rows_of("08_labels_prefix/case.jsonl")]


@pytest.mark.parametrize(
    ("case", "model"),
    [
        ("html_strike.jsonl", "mistral_7b base"),
        ("templated_prompt.jsonl", "mistral_7b base"),
        ("smollm_filename.jsonl", "smollm2_135m base"),
    ],
)
def test_control_tokens_are_read_as_text_on_request(case: str, model: str, families: Families) -> None:
    """07_prompt_with_control_tokens: one BOS where the tokenizer adds it, and the words of the file."""
    case = f"07_prompt_with_control_tokens/{case}"
    reading = read(CASES / case, families.overrides(model), "task.special_tokens=text")
    special = set(reading.tokenizer.all_special_ids)
    bos = [reading.tokenizer.bos_token_id] if model.startswith("mistral") else []
    for item, row in zip(reading.items, rows_of(case), strict=True):
        *inner, end = item.ids[len(bos) :]
        assert [*item.ids[: len(bos)], end] == [*bos, reading.tokenizer.eos_token_id]
        assert not special & set(inner)
        assert reading.tokenizer.decode(inner).strip() == f"{row['prompt']} {row['completion']}"


def test_a_templated_prompt_is_read_as_its_tokens_on_request_with_one_bos(families: Families) -> None:
    case = "07_prompt_with_control_tokens/templated_prompt.jsonl"
    reading = read(CASES / case, families.overrides("mistral_7b base"), "task.special_tokens=token")
    for item in reading.items:
        names = reading.tokenizer.convert_ids_to_tokens(item.ids)
        assert [name for name in names if name in ("<s>", "[INST]", "[/INST]", "</s>")] == [
            *("<s>", "[INST]", "[/INST]", "</s>")
        ]
        assert item.ids[0] == reading.tokenizer.bos_token_id


@pytest.mark.parametrize("case", ["tool_role.jsonl", "tools_column.jsonl"])
def test_tools_and_calls_are_read_under_a_template_that_writes_them(case: str, families: Families) -> None:
    """04_tools_dropped: the whole text is transformers' own, and the answer alone is learned."""
    case = f"04_tools_dropped/{case}"
    reading = read(CASES / case, families.overrides("qwen3_0_6b instruct"), MESSAGES)
    for runs, row in zip(reading.runs, rows_of(case), strict=True):
        whole = reading.tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False)
        assert "".join(runs) == whole
        assert "read_gauge" in runs[0]
        assert runs[1] == f"{row['messages'][-1]['content']}<|im_end|>\n"


def test_an_answer_of_weight_0_is_read_and_not_learned_within_a_conversation(
    families: Families, tmp_path: Path
) -> None:
    """04_tools_dropped/weight0.jsonl, with a good answer after each bad one; the messages as JSON text in CSV."""
    talks = [
        [*row["messages"], {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": f"the Aare, {n}"}]
        for n, row in enumerate(rows_of("04_tools_dropped/weight0.jsonl"))
    ]
    path = tmp_path / "talks.csv"
    pandas.DataFrame({"messages": [json.dumps(talk) for talk in talks]}).to_csv(path, index=False)
    reading = read(path, families.overrides("instruct"), MESSAGES, "task.learn=all")
    for item in reading.splits.train:
        asked, answer = chatml(*talks[int(item.item_id.rpartition(":")[2]) - 2])
        assert "a wrong river" in asked
        assert reading.runs_of(item) == (asked, answer.rstrip(), "\n")  # the template marks no line break as learned


def test_the_command_that_a_message_prints_mends_the_file(refusal: Refusal, families: Families, tmp_path: Path) -> None:
    """27_file_oddities/pretty.jsonl"""
    path = tmp_path / "pretty.jsonl"
    path.write_bytes((CASES / "27_file_oddities/pretty.jsonl").read_bytes())
    message = refusal(path, "base")
    assert "the objects run over several lines" in message
    command = re.sub(r"\n +while", "\nwhile", message[message.index("python -c") :])
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    runs = read(tmp_path / "NEW.jsonl", families.overrides("base")).runs
    assert runs == [plain(row["prompt"], row["completion"]) for row in LOCKERS]


@pytest.mark.parametrize(("case", "encoding"), [("utf16.jsonl", "UTF-16"), ("utf16le_nobom.jsonl", "UTF-16LE")])
def test_a_file_in_utf_16_is_read_once_it_is_converted(
    case: str, encoding: str, refusal: Refusal, families: Families, tmp_path: Path
) -> None:
    path = path_of(f"27_file_oddities/{case}", tmp_path)
    command = re.search(r"iconv .*NEW", refusal(path, "base"))
    assert command is not None
    assert f"-f {encoding} " in command.group()
    subprocess.run(["bash", "-c", f"{command.group()}.jsonl"], cwd=tmp_path, check=True)
    assert len(read(tmp_path / "NEW.jsonl", families.overrides("base")).items) == len(LOCKERS)


def test_rows_that_mark_a_missing_value_can_be_left_out(families: Families, tmp_path: Path) -> None:
    """27_file_oddities/nan.jsonl"""
    reading = read(CASES / "27_file_oddities/nan.jsonl", families.overrides("base"), "task.invalid_rows=drop")
    assert reading.runs == [plain(f"Cell {n}", "full") for n in (2, 4, 6, 8)]
    assert reading.splits.record.dropped_reasons == {"not text": 4}
    table = path_of("22_parquet/int_label.parquet", tmp_path)
    numbers = read(table, families.overrides("base"), "task.kind=classification")
    assert numbers.runs == [plain(prompt, str(n % 3)) for n, prompt in enumerate(ASKED)]


def test_every_stored_file_is_the_input_of_a_test() -> None:
    here = Path(__file__).parent
    source = "".join((here / name).read_text(encoding="utf-8") for name in ("test_cases.py", "test_refused_cases.py"))
    source += (here / "cases_input.py").read_text(encoding="utf-8")
    for name in stored_files():
        folder, _, rest = name.partition("/")
        file = rest.split("/")[0] if folder == "15_folder_of_shards" else rest
        assert f'"{name}"' in source or f'"{file}"' in source or f'"{folder}/{file}"' in source, name
    assert all(f'"{name}"' in source or f'"{name.partition("/")[2]}"' in source for name in MADE)
