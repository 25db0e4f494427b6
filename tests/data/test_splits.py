"""Rows into splits: sources, division by seed, leaks, limits, counts."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from qlora_exp.config.compose import compose
from qlora_exp.config.enums import InvalidRows
from qlora_exp.data.hub import rows_of_dataset
from qlora_exp.data.splits import RawSplits, load_rows
from qlora_exp.errors import DataError, Problems

SPLITS = ("train", "validation", "test")
Configure = Callable[..., Any]
RowsFile = Callable[..., Path]


def prompts(rows: RawSplits, split: str) -> list[str]:
    return [example.messages[-1].content for example in getattr(rows, split)]


def all_prompts(rows: RawSplits) -> list[str]:
    return [prompt for split in SPLITS for prompt in prompts(rows, split)]


def test_every_file_kind_gives_the_same_rows(
    tmp_path: Path, configure: Configure, good_rows: list[dict[str, Any]]
) -> None:
    good_rows[1]["prompt"] = "a long document " * 20_000
    good_rows[0]["prompt"] = 'two\nlines, "quoted", with U+2028 \u2028 and é'
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in good_rows))
    (tmp_path / "a.json").write_text(json.dumps(good_rows, indent=2))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(good_rows), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(good_rows)
    read = [load_rows(configure(tmp_path / f"a.{kind}").task) for kind in ("jsonl", "json", "parquet", "csv")]
    for rows in read:
        assert [prompts(rows, split) for split in SPLITS] == [prompts(read[0], split) for split in SPLITS]
    assert good_rows[0]["prompt"] in all_prompts(read[0])


def test_row_numbers_are_those_of_an_editor(tmp_path: Path, configure: Configure) -> None:
    lines = ["prompt,completion", '"first\nof two lines",a', "second,b", "", "third,c", "fourth,d"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    rows = load_rows(configure(tmp_path / "a.csv").task)
    numbers = {e.messages[0].content.split()[0]: e.row for split in SPLITS for e in getattr(rows, split)}
    assert numbers == {"first": 2, "second": 4, "third": 6, "fourth": 7}


def test_division_is_exhaustive_disjoint_and_decided_by_the_seed(
    configure: Configure, rows_file: RowsFile, good_rows: list[dict[str, Any]]
) -> None:
    path = rows_file(good_rows)
    rows, again = (load_rows(configure(path, validation_fraction=0.2).task) for _ in range(2))
    assert rows == again
    assert [len(prompts(rows, split)) for split in SPLITS] == [21, 6, 3]
    assert sorted(all_prompts(rows)) == sorted(row["prompt"] for row in good_rows)
    other = load_rows(configure(path, validation_fraction=0.2, split_seed=1).task)
    assert prompts(other, "test") != prompts(rows, "test")


def test_exact_duplicates_are_removed_before_dividing_and_counted(
    configure: Configure, rows_file: RowsFile, good_rows: list[dict[str, Any]]
) -> None:
    rows = load_rows(configure(rows_file(good_rows * 3)).task)
    assert rows.dropped == {"exact duplicate": 60}
    assert len(all_prompts(rows)) == len(set(all_prompts(rows))) == 30


def test_rows_that_ask_the_same_never_stand_in_two_splits(configure: Configure, rows_file: RowsFile) -> None:
    path = rows_file([{"prompt": f"ask {n % 10}", "completion": f"answer {n}"} for n in range(60)])
    for seed in range(10):
        rows = load_rows(configure(path, split_seed=seed, validation_fraction=0.3, test_fraction=0.3).task)
        asked = [set(prompts(rows, split)) for split in SPLITS]
        assert all(asked)
        assert not asked[0] & asked[1]
        assert not asked[0] & asked[2]
        assert not asked[1] & asked[2]


def test_a_folder_keeps_its_splits_and_gets_the_missing_one_out_of_train(
    tmp_path: Path, configure: Configure, rows_file: RowsFile, good_rows: list[dict[str, Any]]
) -> None:
    rows_file(good_rows[:20], "train.jsonl")
    rows_file(good_rows[20:], "test.jsonl")
    rows = load_rows(configure(tmp_path).task)
    assert prompts(rows, "test") == [row["prompt"] for row in good_rows[20:]]
    assert len(rows.validation) == 2
    assert len(rows.train) == 18


@pytest.mark.parametrize(("first", "second"), [("train", "test"), ("train", "validation"), ("validation", "test")])
def test_a_row_in_two_splits_is_refused_and_the_later_split_keeps_it(
    first: str, second: str, tmp_path: Path, configure: Configure, rows_file: RowsFile, good_rows: list[dict[str, Any]]
) -> None:
    files = {"train": good_rows[:10], "validation": good_rows[10:20], "test": good_rows[20:]}
    leaked = {"prompt": files[second][3]["prompt"].replace(" ", "  "), "completion": "other"}
    files[first] = [*files[first], leaked]
    for split, content in files.items():
        rows_file(content, f"{split}.jsonl")
    with pytest.raises(DataError) as error:
        load_rows(configure(tmp_path).task)
    assert "leak between splits" in str(error.value)
    assert f"{first}.jsonl, row 11" in str(error.value)
    assert f"{second}.jsonl, row 4" in str(error.value)
    rows = load_rows(configure(tmp_path, invalid_rows=InvalidRows.drop).task)
    assert rows.dropped == {"leak between splits": 1}
    assert [len(prompts(rows, split)) for split in SPLITS] == [10, 10, 10]
    assert files[second][3]["prompt"] in prompts(rows, second)


def test_limits_draw_by_seed_and_a_small_draw_is_part_of_a_large_one(
    tmp_path: Path, configure: Configure, rows_file: RowsFile
) -> None:
    for split in SPLITS:
        rows_file([{"prompt": f"{split} {n}", "completion": "x"} for n in range(50)], f"{split}.jsonl")
    few, more = (
        load_rows(configure(tmp_path, max_train_items=n, max_validation_items=n, max_test_items=n).task)
        for n in (5, 20)
    )
    for split in SPLITS:
        assert len(prompts(few, split)) == 5
        assert set(prompts(few, split)) < set(prompts(more, split))
        assert prompts(more, split) == sorted(prompts(more, split), key=lambda text: int(text.split()[1]))
    other = load_rows(configure(tmp_path, max_train_items=5, split_seed=1).task)
    assert prompts(other, "train") != prompts(few, "train")


def test_several_reasons_are_counted_apart(
    configure: Configure, rows_file: RowsFile, good_rows: list[dict[str, Any]]
) -> None:
    bad = [{"prompt": "a"}, {"prompt": "", "completion": "b"}, {"prompt": " ", "completion": "b"}]
    path = rows_file([*good_rows, *bad, good_rows[0]])
    rows = load_rows(configure(path, invalid_rows=InvalidRows.drop).task)
    assert rows.dropped == {"empty": 2, "exact duplicate": 1, "missing column": 1}


def test_templates_fill_in_texts_and_whole_numbers_verbatim(configure: Configure, rows_file: RowsFile) -> None:
    path = rows_file([{"the text": f"{{b}} {n}", "year": n, "b": "no"} for n in range(5)])
    task = configure(path, prompt="{{{the text}}} ({year}):", completion="{b}").task
    assert sorted(all_prompts(load_rows(task))) == [f"{{{{b}} {n}}} ({n}):" for n in range(5)]


def test_labels_are_the_options_and_a_label_column_alone_is_answered(configure: Configure, rows_file: RowsFile) -> None:
    path = rows_file([{"prompt": f"noise {n}", "label": ("dog", " cat")[n % 2], "id": n} for n in range(12)])
    rows = load_rows(configure(path, kind="classification", label_column="label").task)
    assert rows.options == {"cat": "cat", "dog": "dog"}
    assert {(example.label, example.completion) for example in rows.train} == {("cat", "cat"), ("dog", "dog")}
    assert all(set(example.extra) == {"id"} for example in rows.train)


def test_a_rare_label_that_falls_into_a_held_out_split_is_still_known(
    configure: Configure, rows_file: RowsFile
) -> None:
    data = [{"prompt": f"n {n}", "label": "rare" if n == 0 else ("a", "b")[n % 2]} for n in range(20)]
    path = rows_file(data)
    for seed in range(10):
        task = configure(path, kind="classification", label_column="label", split_seed=seed, test_fraction=0.4).task
        assert set(load_rows(task).options) == {"a", "b", "rare"}


def test_messages_and_messages_written_as_json_are_read_alike(tmp_path: Path, configure: Configure) -> None:
    chats = [
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"first {n}"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "second"},
            {"role": "assistant", "content": " the answer \n"},
        ]
        for n in range(6)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["messages"], *[[json.dumps(chat)] for chat in chats]])
    both = [load_rows(configure(tmp_path / name, messages_column="messages").task) for name in ("a.jsonl", "a.csv")]
    for rows in both:
        assert all(e.completion == "the answer" and len(e.messages) == 4 for e in rows.train)
    assert [e.messages for e in both[0].train] == [e.messages for e in both[1].train]


def test_class_labels_of_a_hub_data_set_become_their_names() -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    loaded = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    rows = rows_of_dataset(loaded, "owner/name/train")
    assert [row.values["label"] for row in rows.rows] == ["pos", "neg", -1]
    assert [row.number for row in rows.rows] == [1, 2, 3]
    assert rows.columns == ("text", "label")


def test_a_hub_data_set_without_a_network_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    task = compose(["task=hub", "task.hub_id=nobody/no-such-set", "task.prompt='{q}'", "task.completion='{a}'"]).task
    with pytest.raises(DataError) as error:
        load_rows(task)
    for part in ("the Hub can't be reached", "hub data set nobody/no-such-set, split train", "task=local"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hub_id": "../secret"}, "not the name of a Hub data set"),
        ({"hub_id": ""}, "not the name of a Hub data set"),
        ({"splits": {"train": "train", "dev": "dev"}}, "there is no split 'dev'"),
        ({"splits": {"test": "test"}}, "no training split"),
    ],
)
def test_a_hub_task_is_checked_before_the_network(changes: dict[str, Any], says: str) -> None:
    task = compose(["task=hub", "task.hub_id=owner/name", "task.prompt='{q}'", "task.completion='{a}'"]).task
    for key, value in changes.items():
        setattr(task, key, value)
    with pytest.raises(DataError, match=says):
        load_rows(task)


def test_the_embedded_task_has_no_fault() -> None:
    rows = load_rows(compose([]).task)
    assert [len(getattr(rows, split)) for split in SPLITS] == [8000, 500, 1000]
    assert rows.dropped == {}
    assert len(rows.options) == 24
    assert {"lemma", "synset", "has_training_sibling", "contains_label"} <= set(rows.test[0].extra)


def test_reading_rows_loads_neither_torch_nor_datasets() -> None:
    code = (
        "import sys; from qlora_exp.config.compose import compose; from qlora_exp.data.splits import load_rows;"
        "load_rows(compose([]).task);"
        "sys.exit(', '.join({'torch', 'datasets', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_problems_of_all_files_are_told_at_once(
    tmp_path: Path, configure: Configure, rows_file: RowsFile, good_rows: list[dict[str, Any]]
) -> None:
    for split in SPLITS:
        rows_file([{**good_rows[0], "prompt": f"{split}?"}, {"prompt": "x"}], f"{split}.jsonl")
    with pytest.raises(Problems) as error:
        load_rows(configure(tmp_path).task)
    for split in SPLITS:
        assert f"{split}.jsonl, row 2" in str(error.value)
