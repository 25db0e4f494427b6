"""Whatever is wrong in a data file gives one message: what, where (file and row), and what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qlora_exp.config.enums import InvalidRows, Learn
from qlora_exp.data.splits import load_rows
from qlora_exp.errors import DataError, Problems, QloraExpError

GOOD = [{"prompt": f"what is {n}?", "completion": f"it is {n}"} for n in range(1, 13)]


def jsonl(*rows: Any) -> bytes:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows).encode("utf-8", "surrogatepass")


def after_good(*rows: Any) -> bytes:
    """Twelve good rows, so that the first bad one is row 13."""
    return jsonl(*GOOD, *rows)


def message(role: Any, content: Any = "hello there") -> dict[str, Any]:
    return {"role": role, "content": content}


def chat(*roles: Any) -> bytes:
    return jsonl(*[{"messages": [message("user", f"hi {n}"), message("assistant")]} for n in range(12)]) + jsonl(
        {"messages": [message(role, f"text {n}") for n, role in enumerate(roles)]}
    )


def parquet(columns: dict[str, list[Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return bytes(sink.getvalue().to_pybytes())


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


@dataclass
class Bad:
    name: str
    content: bytes
    says: tuple[str, ...]
    """Parts that the message must hold; its place among them."""
    file: str = "data.jsonl"
    task: dict[str, Any] = field(default_factory=dict)


MESSAGES = {"messages_column": "messages"}
CLASSES = {"kind": "classification", "labels": ["cat", "dog", "bird"], "label_column": "label"}
LABELLED = [{"prompt": f"noise {n}?", "label": ("cat", "dog")[n % 2]} for n in range(12)]

BAD_ROWS = [
    Bad("missing column in one row", after_good({"prompt": "a"}), ("missing column", "row 13", "completion")),
    Bad(
        "a misspelt column in one row", after_good({"promt": "a", "completion": "b"}), ("row 13", "did you mean promt")
    ),
    Bad("empty completion", after_good({"prompt": "a", "completion": ""}), ("empty", "row 13", "completion")),
    Bad("white space only", after_good({"prompt": " \n\t", "completion": "b"}), ("empty", "row 13", "column prompt")),
    Bad("null", after_good({"prompt": "a", "completion": None}), ("not text", "found null", "row 13")),
    Bad("a whole number", after_good({"prompt": "a", "completion": 5}), ("not text", "row 13", '"5"')),
    Bad("a fraction", after_good({"prompt": "a", "completion": 0.5}), ("not text", "row 13", "float 0.5", "as text")),
    Bad("a boolean", after_good({"prompt": True, "completion": "b"}), ("not text", "row 13", "bool true")),
    Bad("a list", after_good({"prompt": ["a"], "completion": "b"}), ("not text", "row 13", "list")),
    Bad("an object", after_good({"prompt": {"a": 1}, "completion": "b"}), ("not text", "row 13", "dict")),
    Bad(
        "a fraction in a template",
        after_good({"prompt": 1.5, "completion": "b"}),
        ("not text", "row 13", "column prompt"),
        task={"prompt": "Q: {prompt}"},
    ),
    Bad("invalid JSON line", after_good('{"prompt": "a", }'), ("invalid JSON", "row 13", "character")),
    Bad("a half-written last line", after_good('{"prompt": "a", "compl'), ("invalid JSON", "row 13")),
    Bad("a line that is no object", after_good('["a", "b"]'), ("not a JSON object", "found a list", "row 13")),
    Bad("a line nested too deeply", after_good(deep(100_000)), ("invalid JSON", "nested too deeply", "row 13")),
    Bad("a key twice", after_good('{"prompt": "a", "prompt": "b", "completion": "c"}'), ("duplicate key", "row 13")),
    Bad("a number without end", after_good('{"prompt": ' + "9" * 5000 + "}"), ("invalid JSON", "4300", "row 13")),
    Bad("half a surrogate pair", after_good('{"prompt": "\\ud83d", "completion": "b"}'), ("broken Unicode", "row 13")),
    Bad(
        "too few CSV fields",
        b"prompt,completion\n" + b"".join(b"a%d,b\n" % n for n in range(11)) + b"lonely\n",
        ("wrong number of fields", "row 13", "1 fields under 2 columns"),
        "data.csv",
    ),
    Bad(
        "too many CSV fields below a field of two lines",
        b'prompt,completion\n"a\nb",c\n' + b"".join(b"a%d,b\n" % n for n in range(9)) + b"a, b,c\n",
        ("wrong number of fields", "row 13", "quotes"),
        "data.csv",
    ),
    Bad(
        "null in Parquet",
        parquet({"prompt": [*map(str, range(12)), None], "completion": ["b"] * 13}),
        ("not text", "row 13", "column prompt"),
        "data.parquet",
    ),
    Bad("a string among JSON objects", json.dumps([*GOOD, "x"]).encode(), ("not a JSON object", "row 13"), "data.json"),
    Bad("roles of another format", chat("human", "assistant"), ("role 'human'", "row 13", "mean user"), task=MESSAGES),
    Bad("a role that is a list", chat(["user"], "assistant"), ("role ['user']", "row 13"), task=MESSAGES),
    Bad(
        "no answer at the end",
        chat("user", "assistant", "user"),
        ("roles are", "row 13", "after the last"),
        task=MESSAGES,
    ),
    Bad("only an answer", chat("assistant"), ("the roles are", "row 13"), task=MESSAGES),
    Bad("only a system message", chat("system"), ("the roles are", "row 13"), task=MESSAGES),
    Bad("no messages", chat(), ("empty list", "row 13", "messages"), task=MESSAGES),
    Bad(
        "messages that are a text",
        chat("user", "assistant") + jsonl({"messages": "hello"}),
        ("invalid messages", "row 14", "not JSON"),
        task=MESSAGES,
    ),
    Bad(
        "an empty message",
        chat("user", "assistant") + jsonl({"messages": [message("user", " "), message("assistant")]}),
        ("empty", "row 14", "messages[1]"),
        task=MESSAGES,
    ),
    Bad(
        "a message without a text",
        chat("user", "assistant") + jsonl({"messages": [{"from": "human", "text": "x"}]}),
        ("invalid messages", "row 14", "no role and content"),
        task=MESSAGES,
    ),
    Bad(
        "unknown label",
        jsonl(*LABELLED, {"prompt": "miaow", "label": "cats"}),
        ("unknown label", "'cats'", "row 13", "did you mean cat"),
        task=CLASSES,
    ),
    Bad(
        "a label with two completions",
        jsonl(
            *[{**row, "completion": f"a {row['label']}"} for row in LABELLED],
            {"prompt": "woof", "label": "dog", "completion": "the dog"},
        ),
        ("ambiguous label", "'the dog'", "row 13"),
        task=CLASSES,
    ),
]

BAD_SOURCES = [
    Bad("empty file", b"", ("empty", "data.jsonl", "at least one row")),
    Bad("blank lines only", b"\n \n\n", ("empty", "data.jsonl")),
    Bad("an empty JSON list", b"[]", ("no row", "data.json"), "data.json"),
    Bad("header-only CSV", b"prompt,completion\n", ("a header and no row", "data.csv"), "data.csv"),
    Bad("duplicate CSV columns", b"prompt,prompt\na,b\n", ("'prompt' occurs twice", "row 1", "rename"), "data.csv"),
    Bad("a CSV column without a name", b"prompt,,completion\na,b,c\n", ("number 2", "row 1"), "data.csv"),
    Bad(
        "semicolons",
        b"prompt;completion\na;b\n",
        ("separated by something other than a comma", "row 1", "commas"),
        "data.csv",
    ),
    Bad("an unclosed quote", b'prompt,completion\na,b\n"c,d\n', ("not CSV", "row 3", "close every quote"), "data.csv"),
    Bad("NUL bytes", b"prompt,completion\na,\0b\n", ("NUL", "data.csv"), "data.csv"),
    Bad("Windows-1252", jsonl(*GOOD) + b'{"prompt": "caf\xe9"}\n', ("not UTF-8", "row 13", "0xe9", "iconv")),
    Bad("UTF-16", json.dumps(GOOD[0]).encode("utf-16"), ("UTF-16", "data.jsonl", "iconv")),
    Bad("JSON cut off", b'[{"prompt": "a"},\n', ("not JSON", "row 2", "mend"), "data.json"),
    Bad("JSON that is JSONL", jsonl(*GOOD), ("not JSON", "name it .jsonl"), "data.json"),
    Bad("JSONL that is JSON", json.dumps(GOOD, indent=1).encode(), ("one JSON array", "name it .json")),
    Bad("JSON of one object", b'{"data": []}', ("holds an object", "data.json", "[{"), "data.json"),
    Bad("no Parquet", b"PAR1 not really PAR1", ("not Parquet", "data.parquet"), "data.parquet"),
    Bad("an unknown ending", b"x", (".jsonl, .json, .csv, .parquet", "data.txt"), "data.txt"),
    Bad("a packed file", b"x", ("unpack", "data.jsonl.gz"), "data.jsonl.gz"),
    Bad("a spreadsheet", b"x", ("as CSV", "data.xlsx"), "data.xlsx"),
    Bad(
        "a column no row has",
        jsonl(*[{"question": "a", "completion": "b"}]),
        ("no row has a column 'quest'", "did you mean question", "data.jsonl"),
        task={"prompt_column": "quest"},
    ),
    Bad(
        "a layout that can be read in two ways",
        jsonl({"question": "a", "answer": "b", "response": "c"}),
        ("in 2 ways", "choose one", "task.columns.completion=answer", "task.columns.completion=response", "data.jsonl"),
    ),
    Bad(
        "columns that are no layout",
        jsonl({"left": "a", "right": "b"}),
        ("which text is the prompt", "columns: left, right", "task.columns.prompt=COLUMN"),
    ),
    Bad(
        "a completion by one of two columns",
        jsonl({"left": "a", "answer": "b", "response": "c"}),
        ("which text is the completion", "task.columns.completion=answer or task.columns.completion=response"),
        task={"prompt_column": "left"},
    ),
    Bad(
        "preferences without a prompt",
        jsonl({"chosen": "a", "rejected": "b"}),
        ("hold preferences without a prompt", "two columns"),
    ),
    Bad(
        "whole texts as a classification",
        jsonl(*[{"text": f"a text {n}"} for n in range(12)]),
        ("whole texts, which have no label", "task.kind=generation"),
        task={"kind": "classification"},
    ),
    Bad(
        "answers of whole texts",
        jsonl(*[{"text": f"a text {n}"} for n in range(12)]),
        ("only conversations have several answers", "task.learn=last"),
        task={"learn": Learn.all},
    ),
    Bad(
        "messages and a template",
        chat("user", "assistant"),
        ("both", "task.columns.messages=null"),
        task={**MESSAGES, "prompt": "{messages}"},
    ),
    Bad("one row", jsonl(GOOD[0]), ("1 distinct rows", "data.jsonl", "give more rows")),
    Bad("nothing but duplicates", jsonl(*GOOD[:1] * 50), ("1 distinct rows", "data.jsonl")),
    Bad(
        "one label",
        jsonl(*[{"prompt": f"{n}", "label": "cat"} for n in range(12)]),
        ("one label only", "at least two"),
        task={**CLASSES, "labels": None},
    ),
    Bad(
        "free text as labels",
        jsonl(*[{"prompt": f"{n}", "label": f"answer {n}"} for n in range(30)]),
        ("30 distinct labels", "task.kind=generation"),
        task={**CLASSES, "labels": None},
    ),
    Bad(
        "labels that differ in case",
        jsonl(*[{"prompt": f"{n}", "label": ("Yes", "yes", "no")[n % 3]} for n in range(12)]),
        ("'Yes' and 'yes'", "use one spelling"),
        task={**CLASSES, "labels": None},
    ),
    Bad("a label named twice", jsonl(*LABELLED), ("'cat' is named twice",), task={**CLASSES, "labels": ["cat", "cat"]}),
    Bad("an empty label", jsonl(*LABELLED), ("a label is empty",), task={**CLASSES, "labels": ["cat", " "]}),
    Bad(
        "all held out",
        jsonl(*GOOD),
        ("nothing would be left",),
        task={"test_fraction": 0.5, "validation_fraction": 0.5},
    ),
    Bad("a negative fraction", jsonl(*GOOD), ("task.test_fraction",), task={"test_fraction": -0.1}),
    Bad("no validation rows", jsonl(*GOOD), ("no row for validation",), task={"validation_fraction": 0.0}),
    Bad("a limit of no items", jsonl(*GOOD), ("task.max_train_items", "at least 1"), task={"max_train_items": 0}),
]

BAD_TEMPLATES = [
    ("{question}", ("'question' that doesn't exist", "task.prompt", "prompt")),
    ("{promt}", ("did you mean prompt",)),
    ("{prompt.__class__}", ("'prompt.__class__' that doesn't exist",)),
    ("{prompt[0]}", ("'prompt[0]' that doesn't exist",)),
    ("{prompt!r}", ("formats 'prompt'", "only plain")),
    ("{prompt:>99999999}", ("formats 'prompt'", "only plain")),
    ("{prompt:{completion}}", ("formats 'prompt'",)),
    ("{}", ("that doesn't exist",)),
    ("{prompt", ("can't be read", "{{")),
    ("prompt}", ("can't be read", "{{")),
    ("Answer:", ("names no column",)),
]


def caught(config: Any) -> QloraExpError:
    with pytest.raises((DataError, Problems)) as error:
        load_rows(config.task)
    return error.value


@pytest.mark.parametrize("bad", BAD_ROWS, ids=lambda bad: bad.name)
def test_a_bad_row_is_named_with_file_row_and_remedy(bad: Bad, tmp_path: Path, configure: Callable[..., Any]) -> None:
    (tmp_path / bad.file).write_bytes(bad.content)
    told = str(caught(configure(tmp_path / bad.file, **bad.task)))
    for part in (*bad.says, bad.file, "do:  ", "task.invalid_rows=drop"):
        assert part in told


@pytest.mark.parametrize("bad", BAD_ROWS, ids=lambda bad: bad.name)
def test_a_bad_row_is_dropped_and_counted_where_asked(bad: Bad, tmp_path: Path, configure: Callable[..., Any]) -> None:
    (tmp_path / bad.file).write_bytes(bad.content)
    rows = load_rows(configure(tmp_path / bad.file, **bad.task, invalid_rows=InvalidRows.drop).task)
    assert list(rows.dropped.values()) == [1]
    assert next(iter(rows.dropped)) in str(caught(configure(tmp_path / bad.file, **bad.task)))
    assert len(rows.train) + len(rows.validation) + len(rows.test) >= 10


@pytest.mark.parametrize("bad", BAD_SOURCES, ids=lambda bad: bad.name)
def test_a_bad_file_is_named_with_what_to_do(bad: Bad, tmp_path: Path, configure: Callable[..., Any]) -> None:
    (tmp_path / bad.file).write_bytes(bad.content)
    told = str(caught(configure(tmp_path / bad.file, **bad.task)))
    for part in (*bad.says, "where:", "do:  "):
        assert part in told


@pytest.mark.parametrize(("template", "says"), BAD_TEMPLATES)
def test_a_template_takes_plain_columns_only(
    template: str, says: tuple[str, ...], tmp_path: Path, configure: Callable[..., Any]
) -> None:
    (tmp_path / "data.jsonl").write_bytes(jsonl(*GOOD))
    told = str(caught(configure(tmp_path / "data.jsonl", prompt=template)))
    for part in (*says, "task.prompt", "do:  "):
        assert part in told


def test_a_missing_file_is_told_with_the_nearest_name(tmp_path: Path, configure: Callable[..., Any]) -> None:
    (tmp_path / "questions.jsonl").write_bytes(jsonl(*GOOD))
    told = str(caught(configure(tmp_path / "question.jsonl")))
    assert "did you mean questions.jsonl" in told
    assert "task.path=" in told


def test_what_could_be_read_without_an_end_is_refused(tmp_path: Path, configure: Callable[..., Any]) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zeros.jsonl").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "zeros.jsonl"):
        assert "this is not a regular file" in str(caught(configure(tmp_path / name)))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "no train file"),
        (["data.jsonl", "more.jsonl"], "here: data.jsonl, more.jsonl"),
        (["train.jsonl", "valid.jsonl"], "rename it to validation.jsonl"),
        (["train.jsonl", "dev.jsonl"], "rename it to validation.jsonl"),
        (["train.jsonl", "train.json"], "two files for train"),
    ],
)
def test_a_folder_says_which_file_it_lacks_or_would_ignore(
    names: list[str], says: str, tmp_path: Path, configure: Callable[..., Any]
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(jsonl(*GOOD))
    assert says in str(caught(configure(tmp_path)))


def test_many_bad_rows_are_told_together_with_their_number(tmp_path: Path, configure: Callable[..., Any]) -> None:
    rows = [{"prompt": "a", "completion": ""}] * 30 + [{"prompt": "a"}] * 7
    (tmp_path / "data.jsonl").write_bytes(after_good(*rows))
    error = caught(configure(tmp_path / "data.jsonl"))
    assert isinstance(error, Problems)
    assert len(error.errors) == 11
    assert [f"row {n}," in str(e) for n, e in enumerate(error.errors[:10], start=13)] == [True] * 10
    assert "37 rows can't be used: 30 × empty, 7 × missing column" in str(error.errors[-1])


def test_no_row_left_after_dropping_is_an_error(tmp_path: Path, configure: Callable[..., Any]) -> None:
    (tmp_path / "data.jsonl").write_bytes(jsonl(*[{"prompt": "", "completion": "x"}] * 5))
    told = str(caught(configure(tmp_path / "data.jsonl", invalid_rows=InvalidRows.drop)))
    assert "no usable row is left for train: 5 rows were refused" in told
    assert "data.jsonl, row 1" in told
