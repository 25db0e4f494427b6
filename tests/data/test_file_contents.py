"""What a data file holds is read as a person means it, or refused with a remedy that works when it is followed."""

from __future__ import annotations

import datetime
import decimal
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from qlora_exp.config.compose import compose
from qlora_exp.config.enums import InvalidRows
from qlora_exp.data.hub import rows_of_dataset
from qlora_exp.data.layouts import recognise
from qlora_exp.data.rows import read_examples
from qlora_exp.data.splits import RawSplits, load_rows
from qlora_exp.errors import DataError, Problems

Configure = Callable[..., Any]
ROWS = [{"prompt": f"what is {n}?", "completion": f"it is {n}"} for n in range(20)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "prompt,completion\n" + "".join(f"what is {n}?,it is {n}\n" for n in range(20))
CLASSES = {"kind": "classification", "label_column": "label"}


def examples(rows: RawSplits) -> list[Any]:
    return sorted((*rows.train, *rows.validation, *rows.test), key=lambda example: example.row)


def read(path: Path, configure: Configure, **task: Any) -> list[Any]:
    return examples(load_rows(configure(path, **task).task))


def refused(path: Path, configure: Configure, **task: Any) -> str:
    with pytest.raises((DataError, Problems)) as error:
        load_rows(configure(path, **task).task)
    return str(error.value)


ODD_BUT_CLEAR = {
    "a byte order mark": ("a.jsonl", ("\ufeff" + JSONL).encode()),
    "a byte order mark in the middle": (
        "a.jsonl",
        JSONL.replace('{"prompt": "what is 7', '\ufeff{"prompt": "what is 7'),
    ),
    "Windows line ends": ("a.jsonl", JSONL.replace("\n", "\r\n")),
    "the line ends of an old Mac": ("a.jsonl", JSONL.replace("\n", "\r")),
    "CSV of an old Mac": ("a.csv", CSV.replace("\n", "\r")),
    "a pandas index": ("a.csv", pandas.DataFrame(ROWS).to_csv()),
    "spaces after commas": ("a.csv", CSV.replace(",", ", ").replace("it is 3\n", '"it is 3"\n')),
    "Excel's line of the separator": ("a.csv", "sep=,\r\n" + CSV.replace("\n", "\r\n")),
    "tabs": ("a.tsv", CSV.replace(",", "\t")),
    "pandas' Parquet of categories": ("a.parquet", pandas.DataFrame(ROWS).astype("category").to_parquet()),
    "Parquet packed by zstandard": ("a.parquet", pandas.DataFrame(ROWS).to_parquet(compression="zstd")),
    "pandas' JSON lines": ("a.jsonl", pandas.DataFrame(ROWS).to_json(orient="records", lines=True)),
    "pandas' records": ("a.json", pandas.DataFrame(ROWS).to_json(orient="records")),
}


@pytest.mark.parametrize(("name", "content"), ODD_BUT_CLEAR.values(), ids=ODD_BUT_CLEAR)
def test_odd_files_are_read_as_they_are_meant(
    name: str, content: str | bytes, tmp_path: Path, configure: Configure
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    found = read(tmp_path / name, configure)
    assert [(e.messages[0].content, e.completion) for e in found] == [(r["prompt"], r["completion"]) for r in ROWS]


def test_a_file_that_datasets_writes_is_read_as_it_was(tmp_path: Path, configure: Configure) -> None:
    """Quotes, commas, line breaks, U+2028 and an emoji."""
    rows = [
        {"prompt": f'He said "{n}",\nthen \\"left\\"', "completion": f"A, \u2028 \U0001f469\u200d\U0001f467 {n}"}
        for n in range(20)
    ]
    made = datasets.Dataset.from_list(rows)
    made.to_json(tmp_path / "lines.jsonl")
    made.to_json(tmp_path / "list.json", lines=False)
    made.to_csv(tmp_path / "rows.csv")
    made.to_parquet(tmp_path / "rows.parquet")
    made.to_json(tmp_path / "lines.jsonl.gz", compression="gzip")
    for name in ("lines.jsonl", "list.json", "rows.csv", "rows.parquet", "lines.jsonl.gz"):
        found = read(tmp_path / name, configure)
        assert [(e.messages[0].content, e.completion) for e in found] == [(r["prompt"], r["completion"]) for r in rows]


NOT_A_TABLE = {
    "semicolons": ("a.csv", CSV.replace(",", ";"), "something other than a comma"),
    "Excel's semicolons": ("a.csv", "sep=;\n" + CSV.replace(",", ";"), "something other than a comma"),
    "tabs in CSV": ("a.csv", CSV.replace(",", "\t"), "name it .tsv"),
    "commas in TSV": ("a.tsv", CSV, "something other than a tab"),
    "backslashes before quotes": ("a.csv", CSV + '"a \\"quoted\\" word",b\n', 'writes it \\" instead'),
    "UTF-16 without a mark": ("a.jsonl", JSONL.encode("utf-16-le"), "iconv -f UTF-16LE"),
    "UTF-16, the other one": ("a.csv", CSV.encode("utf-16-be"), "iconv -f UTF-16BE"),
    "pandas' columns": ("a.json", pandas.DataFrame(ROWS).to_json(), "orient='records'"),
    "one object with a split of another name": (
        "a.json",
        json.dumps({"train": ROWS, "dev": ROWS}),
        "name the splits train, validation and test",
    ),
    "a line above the header": ("a.csv", "# exported on Monday\n" + CSV, "the first row must name the columns"),
    "pandas' split": ("a.json", pandas.DataFrame(ROWS).to_json(orient="split"), "[{"),
    "a pandas index without whole numbers": ("a.csv", ",prompt,completion\nx,a,b\ny,c,d\n", "number 1 has no name"),
}


@pytest.mark.parametrize(("name", "content", "says"), NOT_A_TABLE.values(), ids=NOT_A_TABLE)
def test_what_can_be_read_in_two_ways_is_refused(
    name: str, content: str | bytes, says: str, tmp_path: Path, configure: Configure
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert says in refused(tmp_path / name, configure)


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("a.csv", 'a, "b"\n', "quotes after a space"),
        ("a.csv", "prompt,completion\n", "repeated header"),
        ("a.tsv", '"an open quote\tb\nanother row"\tc\n', "a tab inside a field"),
        ("a.jsonl", '{"prompt": "a", "completion": "b"},\n', "take the comma off the end"),
        ("a.jsonl", '{"prompt": "a", "completion": NaN}\n', "marks a missing value"),
        ("a.jsonl", '{"prompt": "a", "completion": 3.0}\n', 'write it as text, "3" (pandas makes floats'),
        ("a.jsonl", '{"prompt": "a", "completion": {"text": ["b"]}}\n', "it holds text: make the one you mean"),
    ],
)
def test_a_row_that_would_be_learned_wrongly_is_named(
    name: str, row: str, says: str, tmp_path: Path, configure: Configure
) -> None:
    good = JSONL if name.endswith("l") else CSV.replace(",", "\t") if name.endswith(".tsv") else CSV
    (tmp_path / name).write_text(good + row, encoding="utf-8")
    told = refused(tmp_path / name, configure)
    assert says in told
    assert f"row {len(ROWS) + (1 if name.endswith('l') else 2)}" in told
    left = load_rows(configure(tmp_path / name, invalid_rows=InvalidRows.drop).task)
    assert [problem.row for problem in left.left_out] == [len(ROWS) + (1 if name.endswith("l") else 2)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n".join(json.dumps(row, indent=2) for row in ROWS)),
        ("a.json", json.dumps({"version": 1, "data": ROWS, "old": ROWS[:1]})),
    ],
)
def test_the_command_that_mends_a_file_does(name: str, content: str, tmp_path: Path, configure: Configure) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    told = refused(tmp_path / name, configure)
    command = told[told.index("python -c") :]
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    [mended] = tmp_path.glob("NEW.*")
    assert len(read(mended, configure)) == len(ROWS)


def test_answers_that_read_like_a_missing_value_are_text_and_noted(tmp_path: Path, configure: Configure) -> None:
    words = ["NA", "null", "None", "Namibia"] * 6
    (tmp_path / "a.csv").write_text("prompt,completion\n" + "".join(f"q {n},{w}\n" for n, w in enumerate(words)))
    rows = load_rows(configure(tmp_path / "a.csv").task)
    assert [e.completion for e in examples(rows)] == words
    note, few = rows.notes
    assert "4 distinct completions in 24 rows: task.kind=classification" in few
    assert "'NA' (6), 'None' (6), 'null' (6)" in note


def test_line_breaks_of_windows_inside_a_field_are_kept_and_noted(tmp_path: Path, configure: Configure) -> None:
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\r\n" + b'"a\r\nb","c\r\nd"\r\n' + CSV.encode()[18:])
    rows = load_rows(configure(tmp_path / "a.csv").task)
    assert examples(rows)[0].completion == "c\r\nd"
    assert "1 rows hold Windows line breaks" in rows.notes[0]


LABELS: dict[str, list[Any]] = {
    "whole numbers": [0, 1, 2],
    "ratings below zero": [-1, 0, 1],
    "texts": ["a", "b", "c"],
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("column", ["label", "completion"])
def test_labels_are_the_same_in_every_kind_of_file(
    labels: list[Any], ending: str, column: str, tmp_path: Path, configure: Configure
) -> None:
    frame = pandas.DataFrame({"prompt": [f"q {n}" for n in range(24)], column: labels * 8})
    write = {
        ".jsonl": lambda path: frame.to_json(path, orient="records", lines=True),
        ".json": lambda path: frame.to_json(path, orient="records"),
        ".csv": lambda path: frame.to_csv(path, index=False),
        ".parquet": lambda path: frame.to_parquet(path),
    }
    write[ending](tmp_path / f"a{ending}")
    rows = load_rows(
        configure(
            tmp_path / f"a{ending}", kind="classification", label_column="label" if column == "label" else None
        ).task
    )
    assert list(rows.options) == sorted(map(str, labels))
    assert [e.completion for e in examples(rows)] == [str(label) for label in labels * 8]


def class_labels(values: list[int | None], names: list[str]) -> datasets.Dataset:
    features = datasets.Features({"prompt": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"prompt": [f"q {n}" for n in range(len(values))], "label": values}, features)


def test_class_labels_in_parquet_are_their_names(tmp_path: Path, configure: Configure) -> None:
    class_labels([0, 1] * 12, ["neg", "pos"]).to_parquet(tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", configure, **CLASSES)
    assert [e.label for e in found] == ["neg", "pos"] * 12
    templated = read(tmp_path / "a.parquet", configure, prompt="{prompt}", completion="It is {label}.")
    assert [e.completion for e in templated[:2]] == ["It is neg.", "It is pos."]


def test_a_row_without_a_class_is_no_class(tmp_path: Path, configure: Configure) -> None:
    made = class_labels([0, 1] * 12 + [-1, None], ["neg", "pos"])
    made.to_parquet(tmp_path / "a.parquet")
    told = refused(tmp_path / "a.parquet", configure, **CLASSES)
    assert "no label: the class is -1" in told
    assert "row 25" in told
    assert "row 26" in told
    rows = load_rows(configure(tmp_path / "a.parquet", invalid_rows=InvalidRows.drop, **CLASSES).task)
    assert set(rows.options) == {"neg", "pos"}
    found = rows_of_dataset(made, "owner/name")
    _, problems = read_examples(recognise(configure(tmp_path / "x", **CLASSES).task, found).task, found)
    assert [problem.row for problem in problems] == [25, 26]


def test_a_class_that_the_metadata_does_not_name_is_refused(tmp_path: Path, configure: Configure) -> None:
    table = class_labels([0, 1] * 12, ["neg", "pos"]).data.table
    odd = table.set_column(1, "label", pyarrow.array([0, 1] * 11 + [0, 7])).replace_schema_metadata(
        table.schema.metadata
    )
    pyarrow.parquet.write_table(odd, tmp_path / "a.parquet")
    assert "unknown class: class 7, but the file names only 2 classes" in refused(
        tmp_path / "a.parquet", configure, **CLASSES
    )


def test_columns_that_no_text_is_taken_from_may_hold_anything(tmp_path: Path, configure: Configure) -> None:
    count = len(ROWS)
    table = pyarrow.table(
        {
            "prompt": pyarrow.array([row["prompt"] for row in ROWS], pyarrow.large_string()),
            "completion": pyarrow.array([row["completion"] for row in ROWS]).dictionary_encode(),
            "when": pyarrow.array([1] * count, pyarrow.timestamp("ns")),
            "far": pyarrow.array([10**15] * count, pyarrow.timestamp("ms")),
            "day": [datetime.date(2020, 1, 1)] * count,
            "price": [decimal.Decimal("1.5")] * count,
            "blob": [b"\xff\x00"] * count,
            "vector": [[1.0, None]] * count,
            "nothing": pyarrow.nulls(count),
            "flag": [True] * count,
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert len(read(tmp_path / "a.parquet", configure)) == count
    for column in ("when", "far", "day", "price", "blob", "vector", "nothing", "flag"):
        assert "not text" in refused(tmp_path / "a.parquet", configure, completion_column=column)


ALPACA = [
    {"instruction": f"do {n}", "input": "" if n % 2 else f"with {n}", "output": f"done {n}", "text": ""}
    for n in range(20)
]


def test_a_template_may_have_an_empty_column_but_not_only_empty_ones(tmp_path: Path, configure: Configure) -> None:
    rows = [*ALPACA, {"instruction": " ", "input": "", "output": "x"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = refused(tmp_path / "a.jsonl", configure, prompt="Do: {instruction}\n{input}", completion="{output}")
    assert "empty: all columns of the template are empty" in told
    assert "row 21" in told


@pytest.mark.parametrize(
    "row", [{"instruction": "do", "input": None, "output": "x"}, {"instruction": "do", "output": "x"}]
)
def test_nothing_in_a_column_of_a_template_is_not_read_as_empty(
    row: dict[str, Any], tmp_path: Path, configure: Configure
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*ALPACA, row]))
    told = refused(tmp_path / "a.jsonl", configure, prompt="{instruction}\n{input}", completion="{output}")
    assert "row 21" in told
    assert 'write "input": "" where it is empty' in told


def test_labels_that_are_one_number_are_refused(tmp_path: Path, configure: Configure) -> None:
    labels = ["1", "2", "1.0"] * 8
    (tmp_path / "a.csv").write_text("prompt,label\n" + "".join(f"q {n},{one}\n" for n, one in enumerate(labels)))
    assert "'1' and '1.0' are one number" in refused(tmp_path / "a.csv", configure, **CLASSES)


def test_a_written_out_line_break_is_one(tmp_path: Path, configure: Configure) -> None:
    (tmp_path / "a.jsonl").write_text(JSONL)
    typed = compose(["task=local", f"task.path={tmp_path / 'a.jsonl'}", 'task.prompt="Q:\\n{prompt}\\tA:"'])
    assert typed.task.prompt == "Q:\\n{prompt}\\tA:"
    assert examples(load_rows(typed.task))[0].messages[0].content == "Q:\nwhat is 0?\tA:"
    kept = read(tmp_path / "a.jsonl", configure, prompt="\\\\nabla {prompt}", system="Be\\nbrief.")
    assert [message.content for message in kept[0].messages] == ["Be\nbrief.", "\\nabla what is 0?"]


def test_rows_left_out_are_known_with_row_and_reason(tmp_path: Path, configure: Configure) -> None:
    rows = [*ROWS, ROWS[3], {"prompt": "", "completion": "x"}, ROWS[3]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_rows(configure(tmp_path / "a.jsonl", invalid_rows=InvalidRows.drop).task)
    assert [(one.row, one.reason, one.detail) for one in found.left_out] == [
        (22, "empty", "the text is empty or only white space"),
        (21, "exact duplicate", "the same as a.jsonl, row 4"),
        (23, "exact duplicate", "the same as a.jsonl, row 4"),
    ]
    assert found.dropped == {"empty": 1, "exact duplicate": 2}
