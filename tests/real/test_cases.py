"""Files that once gave a silently wrong result: each is read as a person means it, or refused with what to do."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.real.cases_input import (
    ASKED,
    CASES,
    LOCKERS,
    MADE,
    TALKS,
    TONES,
    Families,
    Row,
    Runs,
    asked_and_answered,
    chatml,
    path_of,
    plain,
    read,
    rows_of,
)

MESSAGES, LABEL = "task.columns.messages=messages", "task.columns.label=label"
CLASSES = ("task.kind=classification", LABEL)
THOUGHT = "<think>\n\n</think>\n\n"


def of_row(write: Callable[..., Runs] = plain) -> Callable[[Row], Runs]:
    return lambda row: write(row["prompt"], str(row.get("completion", row.get("label"))))


def of_rows(rows: list[Row]) -> list[Runs]:
    return [plain(row["prompt"], row["completion"]) for row in rows]


def of_talk(row: Row) -> Runs:
    return chatml(*row["messages"])


def of_parts(row: Row) -> Runs:
    return chatml(*({**one, "content": one["content"][0]["text"]} for one in row["messages"]))


def as_file(row: Row) -> Runs:
    return row["prompt"], f"{row['completion']}<|endoftext|>"


def gemma(row: Row) -> Runs:
    """Gemma writes the system text before the first question, and calls the assistant ``model``."""
    messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}, {"content": row["completion"]}]
    system = f"{messages[0]['content']}\n\n" if messages[0]["role"] == "system" else ""
    *asked, answer = messages[1:] if system else messages
    roles = {"user": "user", "assistant": "model"}
    turns = [f"<start_of_turn>{roles[one['role']]}\n{{}}{one['content']}<end_of_turn>\n" for one in asked]
    first = turns[0].format(system)
    others = "".join(turn.format("") for turn in turns[1:])
    return f"<bos>{first}{others}<start_of_turn>model\n", f"{answer['content']}<end_of_turn>\n"


READ: dict[str, tuple[str, str, tuple[str, ...], Callable[[Row], Runs]]] = {
    "what Qwen3 writes before an answer": (
        "01_qwen3_think/rows.jsonl",
        "qwen3_0_6b instruct",
        (),
        lambda row: asked_and_answered(row, prefix=THOUGHT),
    ),
    "contents in parts": ("04_tools_dropped/content_parts.jsonl", "instruct", (MESSAGES,), of_parts),
    "a developer's message": ("04_tools_dropped/developer_role.jsonl", "instruct", (MESSAGES,), of_talk),
    "indented code": ("05_code_indentation/rows.jsonl", "base", (), as_file),
    "a prompt that ends in indentation": (
        "05_code_indentation/prompt_ends_in_indent.jsonl",
        "base",
        (),
        lambda row: (row["prompt"].rstrip(" "), f"    {row['completion']}<|endoftext|>"),
    ),
    "a prompt that ends within a word": (
        "05_code_indentation/mid_word.jsonl",
        "base",
        ('task.separator=""',),
        as_file,
    ),
    "HTML that no token of this model is": ("07_prompt_with_control_tokens/html_strike.jsonl", "base", (), of_row()),
    "one letter": ("08_labels_prefix/true_false_letters.jsonl", "base", (), of_row()),
    "one letter in a chat": ("08_labels_prefix/true_false_letters.jsonl", "instruct", (), asked_and_answered),
    "several turns": ("09_instruction_formats/multi_turn.jsonl", "instruct", (MESSAGES,), of_talk),
    "an answer before the first question": (
        "09_instruction_formats/sharegpt_gpt_first.jsonl",
        "instruct",
        (MESSAGES,),
        of_talk,
    ),
    "two questions before an answer": ("09_instruction_formats/two_users.jsonl", "instruct", (MESSAGES,), of_talk),
    "a chat": ("12_templates/rows.jsonl", "instruct", (), asked_and_answered),
    "a chat under Gemma's template": ("12_templates/rows.jsonl", "gemma3_1b instruct", (), gemma),
    "turns": ("12_templates/multi.jsonl", "instruct", (MESSAGES,), of_talk),
    "turns under Gemma's template": ("12_templates/multi.jsonl", "gemma3_1b instruct", (MESSAGES,), gemma),
    "a system message": ("12_templates/system.jsonl", "instruct", (MESSAGES,), of_talk),
    "a system message under Gemma's template": (
        "12_templates/system.jsonl",
        "gemma3_1b instruct",
        (MESSAGES,),
        gemma,
    ),
    "reasoning in the answer": ("12_templates/think_in_answer.jsonl", "instruct", (), asked_and_answered),
    "reasoning in the answer under Qwen3's template": (
        "12_templates/think_in_answer.jsonl",
        "qwen3_0_6b instruct",
        (),
        asked_and_answered,
    ),
    "decomposed letters": ("14_nfd/nfd_free.jsonl", "base", (), of_row()),
    "a byte order mark": ("27_file_oddities/bom.jsonl", "base", (), of_row()),
    "the line ends of an old Mac": ("27_file_oddities/cr_only.jsonl", "base", (), of_row()),
    "the line ends of Windows": ("27_file_oddities/crlf.jsonl", "base", (), of_row()),
    "emoji": ("27_file_oddities/emoji.jsonl", "base", (), of_row()),
    "gzip": ("27_file_oddities/rows.jsonl.gz", "base", (), of_row()),
    "U+2028 inside a text": ("27_file_oddities/u2028.jsonl", "base", (), of_row()),
}


def named_by_case(tables: dict[str, Any]) -> list[Any]:
    """Parameters whose ids name the case and what is odd about it."""
    return [pytest.param(*values, id=f"{values[0]}: {name}") for name, values in tables.items()]


@pytest.mark.parametrize(("case", "model", "overrides", "meant"), named_by_case(READ))
def test_a_file_is_learned_as_it_is_meant(
    case: str,
    model: str,
    overrides: tuple[str, ...],
    meant: Callable[[Row], Runs],
    families: Families,
    tmp_path: Path,
) -> None:
    reading = read(path_of(case, tmp_path), families.overrides(model), *overrides)
    rows = LOCKERS if case in MADE else rows_of(case)
    assert reading.runs == [meant(row) for row in rows]
    assert reading.splits.record.dropped_rows == 0


TABLES: dict[str, tuple[str, list[Runs]]] = {
    "pandas' index": (
        "27_file_oddities/index_column.csv",
        of_rows(LOCKERS),
    ),
    "quotes within a text": (
        "27_file_oddities/quotes.csv",
        [plain(f'The sign says "slow" {n}', f"brake {n}") for n in range(1, 9)],
    ),
    "tabs": ("27_file_oddities/rows.tsv", of_rows(LOCKERS)),
    "spaces after commas": (
        "27_file_oddities/space_after_comma.csv",
        [plain(f"Locker, {n}", f"coat, {n}") for n in range(1, 9)],
    ),
    "words for a missing value": (
        "27_file_oddities/na.csv",
        [
            plain(f"Field {n} says", word)
            for n, word in enumerate(["NA", "null", "None", "nan", "N/A", "full", "NA", "None"])
        ],
    ),
    "Windows' line ends within a text": (
        "27_file_oddities/newlines.csv",
        [plain(f"verse {n}\r\ngoes on", f"ends\r\nhere {n}") for n in range(8)],
    ),
    "categories": (
        "22_parquet/categorical.parquet",
        [plain(prompt, tone) for prompt, tone in zip(ASKED, TONES, strict=True)],
    ),
    "columns of any type that are not read": (
        "22_parquet/odd_extra_columns.parquet",
        [plain(prompt, tone) for prompt, tone in zip(ASKED, TONES, strict=True)],
    ),
}


@pytest.mark.parametrize(("case", "meant"), named_by_case(TABLES))
def test_a_table_is_learned_as_it_is_meant(case: str, meant: list[Runs], families: Families, tmp_path: Path) -> None:
    reading = read(path_of(case, tmp_path), families.overrides("base"))
    assert reading.runs == meant
    notes = " ".join(reading.splits.notes)
    assert ("words for a missing value" in notes) is case.endswith("na.csv")
    assert ("Windows line breaks" in notes) is case.endswith("newlines.csv")


def test_files_put_one_behind_the_other_hold_no_byte_order_mark_within(families: Families, tmp_path: Path) -> None:
    """27_file_oddities/two_boms.jsonl"""
    reading = read(path_of("27_file_oddities/two_boms.jsonl", tmp_path), families.overrides("base"))
    assert reading.runs == of_rows(LOCKERS)
    assert reading.splits.record.dropped_reasons == {"exact duplicate": len(LOCKERS)}


@pytest.mark.parametrize("case", ["22_parquet/messages_json.parquet", "22_parquet/messages_struct.parquet"])
def test_messages_in_parquet_are_those_of_the_file(case: str, families: Families, tmp_path: Path) -> None:
    reading = read(path_of(case, tmp_path), families.overrides("instruct"), MESSAGES)
    assert reading.runs == [chatml(*talk) for talk in TALKS]


LABELS: dict[str, tuple[str, str, list[str], int]] = {
    "labels that begin others": (
        "08_labels_prefix/clinc.jsonl",
        LABEL,
        ["card_lost", "card_lost_abroad", "greeting", "order", "order_status"],
        1,
    ),
    "whole numbers": ("08_labels_prefix/int_labels.jsonl", LABEL, ["0", "1", "2"], 0),
    "letters": ("08_labels_prefix/letters.jsonl", LABEL, list("abcde"), 0),
    "ratings": ("08_labels_prefix/ratings.jsonl", LABEL, sorted(str(n) for n in range(1, 11)), 1),
    "one of two letters": ("08_labels_prefix/true_false_letters.jsonl", "", ["f", "t"], 0),
    "one label in two normal forms": ("14_nfd/mixed.jsonl", LABEL, ["pure\u0301e", "p\u00e2t\u00e9"], 0),
    "decomposed labels": ("14_nfd/nfd_labels.jsonl", LABEL, ["pa\u0302te\u0301", "pure\u0301e", "souffle\u0301"], 0),
    "named classes": ("22_parquet/classlabel.parquet", LABEL, ["bad", "good"], 0),
    "whole numbers in Parquet": ("22_parquet/int_label.parquet", "", ["0", "1", "2"], 0),
}


@pytest.mark.parametrize("model", ["base", "instruct"])
@pytest.mark.parametrize(("case", "column", "labels", "ends"), named_by_case(LABELS))
def test_labels_are_those_of_the_file_and_can_each_be_chosen(
    case: str, column: str, labels: list[str], ends: int, model: str, families: Families, tmp_path: Path
) -> None:
    settings = ["task.kind=classification", *([column] if column else [])]
    reading = read(path_of(case, tmp_path), families.overrides(model), *settings)
    splits, items = reading.splits, reading.items
    assert list(splits.labels) == labels
    assert splits.record.label_end_tokens == ends
    assert splits.record.dropped_rows == 0
    assert {item.label for item in splits.train} == set(labels)
    assert all(item.completion_ids == splits.label_ids[str(item.label)] for item in items)
    options = list(splits.option_ids.values())
    assert not any(one != other and other[: len(one)] == one for one in options for other in options)
    if case not in MADE:
        assert len(items) == len(rows_of(case))


@pytest.mark.parametrize("model", ["base", "qwen3_0_6b base"], ids=["as it is", "composed by the tokenizer"])
def test_a_decomposed_answer_is_the_answer_under_each_tokenizer(model: str, families: Families) -> None:
    """14_nfd/nfd_free.jsonl; ``read`` has checked that a perfect model's answers count as right."""
    reading = read(CASES / "14_nfd/nfd_free.jsonl", families.overrides(model))
    written = {"base": "pure\u0301e", "qwen3_0_6b base": "pur\u00e9e"}[model]
    assert reading.runs[0] == plain("Plate 1:", written)


FOLDERS: dict[str, tuple[str, dict[str, list[int]]]] = {
    "capitals": ("capital", {"train": [*range(6)], "validation": [6, 7, 8], "test": [9, 10, 11]}),
    "a compressed split": ("gz_validation", {"validation": [6, 7, 8]}),
    "shards as the Hub names them": ("hub_shards", {"test": [9, 10, 11]}),
    "a folder a split": ("subfolders", {"test": [9, 10, 11]}),
}


@pytest.mark.parametrize(("folder", "meant"), named_by_case(FOLDERS))
def test_each_file_of_a_folder_is_read_as_the_split_of_its_name(
    folder: str, meant: dict[str, list[int]], families: Families, tmp_path: Path
) -> None:
    """15_folder_of_shards"""
    path = shutil.copytree(CASES / "15_folder_of_shards" / folder, tmp_path / folder)
    if folder == "gz_validation":
        rows = (CASES / "15_folder_of_shards/capital/Validation.jsonl").read_bytes()
        (path / "validation.jsonl.gz").write_bytes(gzip.compress(rows))
    splits = read(path, families.overrides("base")).splits
    numbers = {name: [int(item.answer.split()[1]) for item in getattr(splits, name)] for name in meant}
    assert numbers == meant
    whole = {"capital": 12, "gz_validation": 9, "hub_shards": 11, "subfolders": 9}[folder]
    assert len(splits.train) + len(splits.validation) + len(splits.test) == whole
