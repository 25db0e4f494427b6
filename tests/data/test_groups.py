"""Rows of one document: the group column, how it divides rows, and the warning where it isn't set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_exp import run
from qlora_exp.analysis.item_groups import item_groups
from qlora_exp.cli import main
from qlora_exp.data.splits import RawSplits, load_rows
from qlora_exp.errors import DataError, Problems
from qlora_exp.paths import OutputPaths

Configure = Callable[..., Any]
RowsFile = Callable[..., Path]
DOCUMENTS = 20
TEXTS = [f"{number} {'bears and foxes live in forest ' * 6}{number}" for number in range(DOCUMENTS)]


def rows_on_documents(prompt: str = "{text}\nQuestion {part}?", **columns: str) -> list[dict[str, Any]]:
    """Five questions on each document; ``columns``: further ones, as templates."""
    rows = []
    for part in range(5):
        for number, text in enumerate(TEXTS):
            values = {"text": text, "part": part, "number": number}
            row = {"prompt": prompt.format(**values), "completion": f"answer {part}"}
            rows.append(row | {column: written.format(**values) for column, written in columns.items()})
    return rows


def documents(rows: RawSplits, split: str) -> set[str | None]:
    return {example.group for example in getattr(rows, split)}


def test_rows_of_a_group_are_in_one_split_and_keep_their_group(rows_file: RowsFile, configure: Configure) -> None:
    path = rows_file(rows_on_documents("Question {part} on {number}?", document="d{number}"))
    rows = load_rows(configure(path, group_column="document").task)
    splits = [documents(rows, split) for split in ("train", "validation", "test")]
    assert [len(groups) for groups in splits] == [16, 2, 2]
    assert len(set().union(*splits)) == DOCUMENTS
    assert {len([e for e in rows.test if e.group == group]) for group in splits[2]} == {5}
    assert rows.test[0].extra == {"document": rows.test[0].group}, "the other settings see the column as before"


def test_rows_that_share_a_prompt_stay_together_across_groups(rows_file: RowsFile, configure: Configure) -> None:
    rows = [{"prompt": f"p{n // 2}", "completion": f"c{n}", "document": f"d{(n + 1) // 2}"} for n in range(8)]
    rows += [{"prompt": f"q{n}", "completion": "c", "document": f"e{n}"} for n in range(8)]
    read = load_rows(configure(rows_file(rows), group_column="document").task)
    chained = [
        [example.completion for example in getattr(read, split) if example.group.startswith("d")]
        for split in ("train", "validation", "test")
    ]
    assert sorted(map(len, chained)) == [0, 0, 8]


def test_whole_numbers_are_groups(rows_file: RowsFile, configure: Configure) -> None:
    rows = [{"prompt": f"p{n}", "completion": "c", "document": n // 3} for n in range(90)]
    read = load_rows(configure(rows_file(rows), group_column="document").task)
    assert documents(read, "train") < {str(n) for n in range(30)}


@pytest.mark.parametrize(
    ("column", "rows", "message"),
    [
        ("document", [{"document": "one"}] * 30, "rows are of one group, 'one'"),
        ("dokument", [{"document": f"d{n}"} for n in range(30)], "no row has a column 'dokument'"),
        ("document", [{"document": f"d{n}" if n else None} for n in range(30)], "not text"),
        ("document", [{"document": f"d{n % 2}"} for n in range(30)], "2 groups can't be divided"),
    ],
)
def test_a_group_column_that_groups_nothing_is_refused(
    column: str, rows: list[dict[str, Any]], message: str, rows_file: RowsFile, configure: Configure
) -> None:
    numbered = [{"prompt": f"p{n}", "completion": "c", **row} for n, row in enumerate(rows)]
    path = rows_file(numbered)
    if message.startswith("rows"):  # in a test file alone, the rows need not be divided
        rows_file(numbered, "folder/test.jsonl")
        others = [{**row, "prompt": f"train {n}", "document": f"d{n}"} for n, row in enumerate(numbered)]
        path = rows_file(others, "folder/train.jsonl").parent
    with pytest.raises((DataError, Problems)) as error:
        load_rows(configure(path, group_column=column).task)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "columns", "remedy"),
    [
        ("{text}\nQuestion {part}?", {}, "add a column that names each row's document"),
        ("Answer on the text.\n{text}\nQ{part}", {}, "task.columns.group=COLUMN"),
        ("Question {part}?\nThe text: {text}", {}, "task.columns.group=COLUMN"),
        ("{part} {number}", {"document_id": "d{number}"}, "task.columns.group=document_id"),
        ("{text} {part}", {"Context": "{text}"}, "task.columns.group=Context"),
    ],
)
def test_rows_that_share_a_context_are_warned_of(
    prompt: str, columns: dict[str, str], remedy: str, rows_file: RowsFile, configure: Configure
) -> None:
    rows = load_rows(configure(rows_file(rows_on_documents(prompt, **columns)), test_fraction=0.4).task)
    (warning,) = rows.warnings
    assert remedy in warning
    assert "of 40 test rows share a context" in warning
    assert "data.jsonl, row " in warning


@pytest.mark.parametrize(
    ("prompt", "columns"),
    [
        (f"{'Read carefully, then answer the question. ' * 5}{{number}} {{part}}", {}),  # an instruction of all rows
        ("{number} {part}", {"source": "wiki"}),  # all from one source
        ("{number} {part}", {"topic": "d{number}"}),  # no name of a source
        ("{number} {part}", {"document_id": "d{number}{part}"}),  # a different one each
    ],
)
def test_independent_rows_are_not_warned_of(
    prompt: str, columns: dict[str, str], rows_file: RowsFile, configure: Configure
) -> None:
    rows = load_rows(configure(rows_file(rows_on_documents(prompt, **columns)), test_fraction=0.4).task)
    assert rows.warnings == ()


def test_a_group_column_ends_the_warning(rows_file: RowsFile, configure: Configure) -> None:
    path = rows_file(rows_on_documents(document="d{number}"))
    assert load_rows(configure(path, group_column="document").task).warnings == ()


def test_validate_and_plan_say_that_rows_share_a_context(
    rows_file: RowsFile, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ["task=local", f"task.path={rows_file(rows_on_documents(page='p{number}'))}"]
    for command in (["validate", *task], ["plan", *task]):
        assert main(command) == 0
        assert "of 10 test rows share a context in column 'page'" in capsys.readouterr().out.replace("\n", " ")
    assert main(["validate", *task, "task.columns.group=page"]) == 0
    assert "share a context" not in capsys.readouterr().out
    assert main(["validate", *task, "task.columns.group=pages"]) == 2
    assert "did you mean page" in capsys.readouterr().err


def test_groups_travel_to_the_per_item_file(
    rows_file: RowsFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = rows_file(rows_on_documents("Question {part} on {number}?", document="d{number}"))
    shared = [f"task.path={path}", "task=local", "training.max_steps=1", "quantization=fp32", "tracking.enabled=false"]
    shared += ["evaluation=quick", "evaluation.before=false"]
    grouped = run(*shared, "task.columns.group=document", "evaluation.split=test")
    items = OutputPaths.of(tmp_path / "outputs").run(grouped.run_id)
    groups = item_groups(items.items("after", "test"))
    assert groups is not None
    assert sorted(Counter(groups.values()).values()) == [5, 5]
    ungrouped = run(*shared)
    assert item_groups(OutputPaths.of(tmp_path / "outputs").run(ungrouped.run_id).items("after", "validation")) is None
    assert [text for text in ungrouped.warnings if "task.columns.group=document" in text]
