"""People's files through the commands: what validate says of their rows, and what a card says of a run on them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from qlora_exp.cli import main
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.model_card import model_card

SHORT = [
    *("training.device=cpu", "training.max_steps=2", "training.batch_size=4", "evaluation=quick", "tracking=off"),
    *("evaluation.max_items=4", "quantization=fp32"),
]
Told = Callable[..., str]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    def told(*arguments: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == code
        captured = capsys.readouterr()
        return captured.out if code == 0 else captured.err

    return told


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def coloured(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Colour of thing {n}?\nColour:", "completion": ("red", "green")[n % 2]}
        for n in range(start, start + count)
    ]


def test_validate_lists_rows_left_out_and_cut_with_row_and_reason(tmp_path: Path, told: Told) -> None:
    rows = coloured(40)
    long = {"prompt": "word " * 30, "completion": "and another one " * 30}
    file = tmp_path / "rows.jsonl"
    file.write_text(lines([*rows, rows[4], {"prompt": "", "completion": "x"}, *[rows[4]] * 7, long]))
    shown = told(
        "validate", "task=local", f"task.path={file}", "task.invalid_rows=drop", "training.max_length=64",
        "task.validation_fraction=0.05", "task.test_fraction=0.05",
    )  # fmt: skip
    assert "9 rows dropped" in shown
    assert "1 row left out: empty" in shown
    assert "rows.jsonl, row 42, column prompt: the text is empty" in shown
    assert "8 rows left out: exact duplicate" in shown
    assert "rows.jsonl, row 41: the same as rows.jsonl, row 5" in shown
    assert "… and 3 more" in shown
    assert "1 row kept: truncated to training.max_length=64: the end of the answer is not learned" in shown
    assert "rows.jsonl, row 50: " in shown


def test_validate_names_the_files_of_a_split(tmp_path: Path, told: Told) -> None:
    for number in range(3):
        rows = lines(coloured(10, 10 * number)).encode()
        (tmp_path / f"train-0000{number}-of-00003.jsonl.gz").write_bytes(gzip.compress(rows))
    (tmp_path / "test.jsonl").write_text(lines(coloured(5, 100)))
    shown = told("validate", "task=local", f"task.path={tmp_path}")
    assert "train rows come from 3 files: train-00000-of-00003.jsonl.gz, train-00001" in shown
    (tmp_path / "train-00001-of-00003.jsonl.gz").unlink()
    error = told("validate", "task=local", f"task.path={tmp_path}", code=2)
    assert "train has 2 of 3 shards; missing: 1" in error


def test_a_run_on_class_labels_in_parquet_and_its_card(tmp_path: Path, told: Told) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    count = 40
    columns = {"text": [f"Is {n} odd?\nAnswer:" for n in range(count)], "label": [n % 2 for n in range(count)]}
    columns["text"][7], columns["text"][9] = columns["text"][1], columns["text"][1]
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "rows.parquet")
    given = ["task=local", f"task.path={tmp_path / 'rows.parquet'}"]
    shown = told("validate", *given)
    assert "read as text/label rows: prompt = text, completion = label" in shown
    assert "2 distinct completions in 38 rows: task.kind=classification" in shown
    outputs = tmp_path / "outputs"
    told("run", *given, "task.kind=classification", *SHORT, f"output_root={outputs}")
    [folder] = OutputPaths.of(str(outputs)).runs.iterdir()
    record = read_record(folder / "record.json")
    assert record.data is not None
    assert record.data.labels == ("no", "yes")
    assert record.data.dropped_reasons == {"exact duplicate": 2}
    card = model_card(record)
    assert "2 rows of the data are in no split: 2 × exact duplicate." in card
    assert "invalid" not in card.split("## Scores")[0]
    cut = replace(record, data=replace(record.data, truncated_items=3))
    assert "3 items were longer than training.max_length" in model_card(cut)


def test_preview_shows_a_row_by_the_file_of_its_folder(tmp_path: Path, told: Told) -> None:
    for split, start in (("train", 0), ("validation", 50), ("test", 80)):
        (tmp_path / split).mkdir()
        (tmp_path / split / "data.jsonl").write_text(lines(coloured(8, start)))
    shown = told("data", "preview", "task=local", f"task.path={tmp_path}", "--split", "test", "--count", "1")
    assert "test test/data.jsonl:1:" in shown
