"""Further files of the same kinds as ``cases/``: each is read as it is meant, or refused with what to do."""

from __future__ import annotations

import bz2
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from qlora_exp.data.preview import rows_report
from qlora_exp.errors import DataError, Problems
from tests.real.cases_input import CASES, JSONL, LOCKERS, Families, Row, Runs, as_parquet, chatml, plain, read, rows_of

CSV = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in LOCKERS)
OTHERS = CSV.replace("Locker", "Drawer")
MARK = "\ufeff"
MESSAGES, CLASSES = "task.columns.messages=messages", ("task.kind=classification", "task.columns.label=label")
MEANT = [plain(row["prompt"], row["completion"]) for row in LOCKERS]
DRAWERS = [plain(row["prompt"].replace("Locker", "Drawer"), row["completion"]) for row in LOCKERS]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: str | bytes | list[Row]) -> Path:
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def refused(families: Families) -> Callable[..., str]:
    def refused(path: Path, *overrides: str, model: str = "base") -> str:
        with pytest.raises((DataError, Problems)) as error:
            read(path, families.overrides(model), *overrides)
        return str(error.value)

    return refused


def talk(number: int, **answer: Any) -> list[Row]:
    return [
        {"role": "user", "content": f"Shelf {number}?"},
        {"role": "assistant", "content": f"full, {number}", **answer},
    ]


TALKS = [talk(number) for number in range(12)]
TALKED = [chatml(*one) for one in TALKS]
READ: dict[str, tuple[str, str | bytes, list[Runs]]] = {
    "a CSV file with two byte order marks": ("a.csv", MARK + MARK + CSV, MEANT),
    "a JSON file with two": ("a.json", MARK + MARK + json.dumps(LOCKERS), MEANT),
    "two CSV files with marks, the second one without a header": (
        "a.csv",
        MARK + CSV + MARK + OTHERS.partition("\n")[2],
        MEANT + DRAWERS,
    ),
    "an old Mac's file with a newline at the end": ("a.jsonl", JSONL.replace(b"\n", b"\r")[:-1] + b"\n", MEANT),
    "zstandard": ("a.jsonl.zst", bytes(pyarrow.Codec("zstd").compress(JSONL)), MEANT),
    "two streams of bzip2": (
        "a.csv.bz2",
        bz2.compress(CSV.encode()) + bz2.compress(OTHERS[18:].encode()),
        MEANT + DRAWERS,
    ),
    "two streams of xz": (
        "a.csv.xz",
        lzma.compress(CSV.encode()) + bytes(4) + lzma.compress(OTHERS[18:].encode()),
        MEANT + DRAWERS,
    ),
}


@pytest.mark.parametrize(("name", "content", "meant"), READ.values(), ids=READ)
def test_a_file_is_learned_as_it_is_meant(
    name: str, content: str | bytes, meant: list[Runs], write: Write, families: Families
) -> None:
    assert read(write(name, content), families.overrides("base")).runs == meant


ROWS_OF_TWO_FORMS = [row if n % 2 else {"messages": talk(n)} for n, row in enumerate(LOCKERS)]
TWICE = json.dumps(talk(1)).replace('"content": "full', '"content": "empty", "content": "full')
REFUSED: dict[str, tuple[str, str | bytes | list[Row], tuple[str, ...], tuple[str, ...]]] = {
    "two CSV files with marks and headers": (
        "a.csv",
        MARK + CSV + MARK + OTHERS,
        (),
        ("repeated header", "a.csv, row 10", "were files joined"),
    ),
    "two TSV files with marks and headers": (
        "a.tsv",
        (MARK + CSV + MARK + OTHERS).replace(",", "\t"),
        (),
        ("repeated header", "a.tsv, row 10"),
    ),
    "a mark and semicolons": (
        "a.csv",
        MARK + CSV.replace(",", ";"),
        (),
        ("separated by something other than a comma", "commas"),
    ),
    "rows of two forms": (
        "a.jsonl",
        ROWS_OF_TWO_FORMS,
        (),
        ("'completion' is not in this row", "this row has messages: give all rows the same columns"),
    ),
    "rows of two forms, read as messages": (
        "a.jsonl",
        ROWS_OF_TWO_FORMS,
        (MESSAGES,),
        ("'messages' is not in this row", "this row has prompt, completion: give all rows the same columns"),
    ),
    "spaces around the columns' names": (
        "a.csv",
        CSV.replace("prompt,completion", "prompt ,completion "),
        ("task.columns.prompt=prompt",),
        ("the file names it 'prompt ': write 'prompt' there",),
    ),
    "a key twice within JSON text": (
        "a.jsonl",
        [{"messages": TWICE}] * 12,
        (MESSAGES,),
        ("duplicate key: 'content' occurs twice", "row 1, column messages"),
    ),
    "messages that pandas wrote as Python": (
        "a.csv",
        pandas.DataFrame({"messages": TALKS}).to_csv(index=False),
        (MESSAGES,),
        ("the text is not JSON", "df['messages'].map(json.dumps) before df.to_csv"),
    ),
    "a weight of 0 within JSON text": (
        "a.jsonl",
        [{"messages": json.dumps(talk(n, weight=0))} for n in range(12)],
        (MESSAGES,),
        ("the last answer has the weight 0",),
    ),
    "invisible answers": (
        "a.jsonl",
        [{"prompt": f"Shelf {n}", "completion": "\u200b"} for n in range(12)],
        (),
        ("empty: the text holds invisible characters only: '\\u200b'", "row 1, column completion"),
    ),
    "labels with an invisible character": (
        "a.jsonl",
        [{"prompt": f"Shelf {n}", "label": ("full", "empty", "full\u200b")[n % 3]} for n in range(12)],
        CLASSES,
        ("'full' and 'full\\u200b' differ in white space or invisible characters only", "task.labels=[…]"),
    ),
    "labels with other spaces": (
        "a.csv",
        "prompt,label\n" + "".join(f"Shelf {n},{('top left', 'top  left', 'low')[n % 3]}\n" for n in range(12)),
        CLASSES,
        ("'top  left' and 'top left' differ in white space or invisible characters only",),
    ),
    "labels that are true or false": (
        "a.jsonl",
        [{"prompt": f"Shelf {n}", "label": n % 2 == 0} for n in range(12)],
        CLASSES,
        ("found bool true", 'write it as text, e.g. "yes"'),
    ),
    "labels that are true or false in Parquet": (
        "a.parquet",
        as_parquet(pyarrow.table({"prompt": [f"Shelf {n}" for n in range(12)], "label": [True, False] * 6})),
        CLASSES,
        ("found bool true",),
    ),
    "prompts that are numbers": (
        "a.jsonl",
        [{"prompt": n, "completion": "odd" if n % 2 else "even"} for n in range(12)],
        (),
        ("found int 0", "'task.KEY=\"{prompt}\"', where KEY is prompt or completion"),
    ),
    "UTF-32": ("a.jsonl", JSONL.decode().encode("utf-32"), (), ("is UTF-32, not UTF-8", "iconv -f UTF-32 -t")),
    "Chinese in UTF-16 without a mark": (
        "a.csv",
        ("prompt,completion\n" + "问题问题问题,答案答案答案\n" * 30).encode("utf-16-le"),
        (),
        ("seems to be UTF-16", "iconv -f UTF-16LE -t"),
    ),
    "Japanese in its older encoding": (
        "a.csv",
        ("prompt,completion\n" + "問題,答え\n" * 12).encode("shift-jis"),
        (),
        ("row 2 is not UTF-8", "SHIFT_JIS in Japan", "look at a few rows"),
    ),
    "a second stream of bzip2 that is damaged": (
        "a.jsonl.bz2",
        bz2.compress(JSONL) + b"damaged" + bz2.compress(JSONL),
        (),
        ("can't be unpacked as .bz2", "copied whole"),
    ),
    "a second stream of xz that is damaged": (
        "a.jsonl.xz",
        lzma.compress(JSONL) + b"damaged" + lzma.compress(JSONL),
        (),
        ("can't be unpacked as .xz",),
    ),
    "a second stream that is cut off": (
        "a.jsonl.bz2",
        bz2.compress(JSONL) + bz2.compress(JSONL)[:-4],
        (),
        ("the file ends before its end-of-stream marker",),
    ),
}


@pytest.mark.parametrize(("name", "content", "overrides", "says"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_could_be_learned_wrongly_is_refused_with_what_to_do(
    name: str,
    content: str | bytes | list[Row],
    overrides: tuple[str, ...],
    says: tuple[str, ...],
    write: Write,
    refused: Callable[..., str],
) -> None:
    message = refused(write(name, content), *overrides)
    for part in says:
        assert part in message


def dictionary_encoded() -> pyarrow.Array:
    names = ["role", "content"]
    columns = [pyarrow.array([one[name] for talk in TALKS for one in talk]).dictionary_encode() for name in names]
    turns = pyarrow.StructArray.from_arrays(columns, names)
    return pyarrow.ListArray.from_arrays(pyarrow.array(range(0, 25, 2), pyarrow.int32()), turns)


def as_maps() -> pyarrow.Array:
    pairs = [[list(one.items()) for one in talk] for talk in TALKS]
    return pyarrow.array(pairs, pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.string())))


COLUMNS: dict[str, Callable[[], pyarrow.Array]] = {
    "dictionary-encoded texts": dictionary_encoded,
    "Spark's maps": as_maps,
    "lists of two": lambda: pyarrow.array(TALKS, pyarrow.list_(pyarrow.array(TALKS[0]).type, 2)),
    "large lists": lambda: pyarrow.array(TALKS, pyarrow.large_list(pyarrow.array(TALKS[0]).type)),
}


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_messages_in_parquet_are_read_whatever_their_types_are(
    column: Callable[[], pyarrow.Array], write: Write, families: Families
) -> None:
    path = write("a.parquet", as_parquet(pyarrow.table({"messages": column()})))
    assert read(path, families.overrides("instruct"), MESSAGES).runs == TALKED


@pytest.mark.parametrize("nothing", ["", "null"])
def test_an_empty_cell_of_tools_or_variables_gives_none(nothing: str, write: Write, families: Families) -> None:
    cells = {"messages": [json.dumps(one) for one in TALKS], "tools": nothing, "chat_template_kwargs": nothing}
    path = write("a.csv", pandas.DataFrame(cells).to_csv(index=False))
    assert read(path, families.overrides("instruct"), MESSAGES).runs == TALKED


def test_a_field_that_other_trainers_read_as_a_weight_is_refused_with_the_weight(
    write: Write, refused: Callable[..., str]
) -> None:
    path = write("a.jsonl", [{"messages": [*talk(n, train=False), *talk(n + 50)]} for n in range(12)])
    for model in ("base", "instruct"):
        message = refused(path, MESSAGES, model=model)
        assert "the field 'train'" in message
        assert "if it says whether the answer is learned, write it as weight: 0 or 1" in message


def classes(folder: Path, name: str, start: int, names: list[str] | None) -> None:
    numbers = range(start, start + 12)
    data = {"prompt": [f"Shelf {n}" for n in numbers], "label": [n % 2 for n in numbers]}
    if names is None:
        pyarrow.parquet.write_table(pyarrow.table(data), folder / name)
        return
    features = datasets.Features({"prompt": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    pyarrow.parquet.write_table(datasets.Dataset.from_dict(data, features).data.table, folder / name)


@pytest.mark.parametrize("second", ["train-00001-of-00002.parquet", "validation-00000-of-00001.parquet"])
def test_classes_that_only_one_file_names_are_refused(
    second: str, tmp_path: Path, refused: Callable[..., str], families: Families
) -> None:
    """Read as they are, a task of two classes would have four: empty, full, 0 and 1."""
    first = f"train-00000-of-0000{2 if second.startswith('train') else 1}.parquet"
    classes(tmp_path, first, 0, ["empty", "full"])
    classes(tmp_path, second, 12, None)
    for settings in (CLASSES, ('task.completion="It is {label}."',)):
        message = refused(tmp_path, *settings)
        assert f"{first} names the classes of 'label', and {second} holds numbers" in message
    assert f"{first} names the classes of 'label'" in refused(tmp_path)  # label is the completion, by its name


def test_classes_in_another_order_are_read_by_their_names(tmp_path: Path, families: Families) -> None:
    classes(tmp_path, "train.parquet", 0, ["empty", "full"])
    classes(tmp_path, "validation.parquet", 12, ["full", "empty"])
    splits = read(tmp_path, families.overrides("base"), *CLASSES, "task.test_fraction=0").splits
    assert [item.label for item in splits.train[:2]] == ["empty", "full"]
    assert [item.label for item in splits.validation[:2]] == ["full", "empty"]


JOINED: dict[str, tuple[Callable[[int], tuple[str, str]], bool]] = {
    "an open JSON string": (lambda n: (f'{{"no": {n}, "city": "', f'town{n}"}}'), True),
    "an open bracket": (lambda n: (f"area({n}", f"* {n})"), False),
    "a call": (lambda n: (f"area{n}(", "width)"), True),
    "punctuation first": (lambda n: (f"He left {n}", ", then came back."), True),
    "a closed quote": (lambda n: (f'He said "{n}"', "and left"), False),
    "a question": (lambda n: (f"How many, {n}?", "none"), False),
    "Chinese": (lambda n: (f"（{n}", "天气）"), False),
}


@pytest.mark.parametrize(("row", "noted"), JOINED.values(), ids=JOINED)
def test_a_space_within_a_word_is_noted_and_can_be_left_out(
    row: Callable[[int], tuple[str, str]], noted: bool, write: Write, families: Families
) -> None:
    rows = [dict(zip(("prompt", "completion"), row(n), strict=True)) for n in range(12)]
    path = write("a.jsonl", rows)
    notes = rows_report(read(path, families.overrides("base")).splits)
    assert any("may be a mistake, e.g. a.jsonl, row 1: " in note for note in notes) is noted
    if noted:
        assert any("'task.separator=\"\"'" in note for note in notes)
        joined = read(path, families.overrides("base"), 'task.separator=""')
        assert ["".join(runs) for runs in joined.runs] == [
            f"{one['prompt']}{one['completion']}<|endoftext|>" for one in rows
        ]
        assert not rows_report(joined.splits)
    assert not rows_report(read(path, families.overrides("instruct")).splits)


def test_the_space_in_the_given_case_is_noted(families: Families) -> None:
    """05_code_indentation/mid_word.jsonl, by default"""
    reading = read(CASES / "05_code_indentation/mid_word.jsonl", families.overrides("base"))
    assert reading.runs == [
        plain(row["prompt"], row["completion"]) for row in rows_of("05_code_indentation/mid_word.jsonl")
    ]
    assert any("a space between prompt and completion" in note for note in rows_report(reading.splits))
