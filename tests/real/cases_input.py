"""The small files of ``cases/`` and how tests read them. The folders' numbers are those of the reports they stand for.

Encodings and binary files are written by the tests: their names end in what was done to the stored file, or to ROWS.
"""

from __future__ import annotations

import functools
import gzip
import io
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet

from qlora_exp.data.items import Item, Splits
from qlora_exp.evaluation.generation import check_answers
from tests.real.families import write_family
from tests.real.perfect_model import loaded

CASES = Path(__file__).parent / "cases"
Row = dict[str, Any]
Runs = tuple[str, ...]
"""An item's text in runs of tokens: without a loss, with one, without one …"""


def stored_files() -> set[str]:
    return {path.relative_to(CASES).as_posix() for path in CASES.rglob("*") if path.is_file()}


def rows_of(name: str) -> list[Row]:
    """A stored JSONL file's rows, by Python's own reader."""
    return [json.loads(line) for line in (CASES / name).read_text(encoding="utf-8").split("\n") if line]


LOCKERS = rows_of("27_file_oddities/rows.jsonl")
JSONL = (CASES / "27_file_oddities/rows.jsonl").read_bytes()


class Families:
    """Folders of small models as they are published, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @functools.cache  # noqa: B019 - one object a session
    def folder(self, name: str, variant: str) -> Path:
        return write_family(name, variant, self.root / f"{name}-{variant}")

    def overrides(self, model: str) -> list[str]:
        """``base`` and ``instruct`` are the embedded pair; any other one is a family and a variant."""
        name, _, variant = model.rpartition(" ")
        if not name:
            return [f"model.variant={variant}"]
        return ["model=local", f"model.path={self.folder(name, variant)}", f"model.variant={variant}"]


@dataclass(frozen=True)
class Reading:
    """A task as it is read: every item in the order of the file's rows, in runs of text."""

    splits: Splits
    tokenizer: Any

    @property
    def items(self) -> list[Item]:
        items = (*self.splits.train, *self.splits.validation, *self.splits.test)
        return sorted(items, key=lambda item: int(item.item_id.rpartition(":")[2]))

    @property
    def runs(self) -> list[Runs]:
        return [self.runs_of(item) for item in self.items]

    def runs_of(self, item: Item) -> Runs:
        tokens = zip(item.ids, item.completion_mask, strict=True)
        runs = [[token for token, _ in run] for _, run in itertools.groupby(tokens, key=lambda pair: pair[1])]
        return tuple(self.tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs)


def read(path: Path, model: Sequence[str], *overrides: str) -> Reading:
    """As ``validate`` reads it, its check of the answers included."""
    config, tokenizer, splits = loaded(["task=local", f"task.path={path}", *model, *overrides])
    check_answers(splits, tokenizer, config)
    return Reading(splits, tokenizer)


def plain(prompt: str, completion: str, between: str = " ") -> Runs:
    """The embedded base's plain text."""
    return prompt, f"{between}{completion}<|endoftext|>"


def chatml(*messages: Row, prefix: str = "") -> Runs:
    """The embedded instruct model's conversation, whose last answer is learned."""
    *asked, answer = messages
    turns = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in asked)
    return f"{turns}<|im_start|>assistant\n{prefix}", f"{answer['content']}<|im_end|>\n"


def asked_and_answered(row: Row, prefix: str = "") -> Runs:
    """A row of a prompt and a completion as :func:`chatml` writes it."""
    return chatml({"role": "user", "content": row["prompt"]}, {"content": row["completion"]}, prefix=prefix)


def as_parquet(table: pyarrow.Table) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue()


ASKED = [f"Tile {n} is\nTone:" for n in range(12)]
TONES = ["grey", "teal", "plum"] * 4
TALKS = [
    [
        {"role": "user", "content": f"Tile {n}?", "name": None, "tool_calls": None},
        {"role": "assistant", "content": f"laid {n}", "name": None, "tool_calls": None},
    ]
    for n in range(12)
]


def classes_in_parquet() -> bytes:
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    made = datasets.Dataset.from_dict({"prompt": ASKED, "label": [0, 1] * 6}, features=features)
    return as_parquet(made.data.table)


def odd_columns_in_parquet() -> bytes:
    frame = pandas.DataFrame({"prompt": ASKED, "completion": TONES}, index=[f"row {n}" for n in range(12)])
    table = pyarrow.Table.from_pandas(frame)
    for name, column in {
        "made": pyarrow.array([0] * 12, pyarrow.timestamp("us")),
        "cost": pyarrow.array(["2.5"] * 12).cast(pyarrow.decimal128(3, 1)),
        "raw": pyarrow.array([b"\x00\xfe"] * 12),
        "vector": pyarrow.array([[0.5, None]] * 12),
    }.items():
        table = table.append_column(name, column)
    return as_parquet(table)


def frame_in_parquet(completion: Any) -> bytes:
    return as_parquet(pyarrow.Table.from_pandas(pandas.DataFrame({"prompt": ASKED, "completion": completion})))


MADE: dict[str, Callable[[], bytes]] = {
    "22_parquet/categorical.parquet": lambda: frame_in_parquet(pandas.Categorical(TONES)),
    "22_parquet/classlabel.parquet": classes_in_parquet,
    "22_parquet/float_label.parquet": lambda: frame_in_parquet([float(n % 3) for n in range(12)]),
    "22_parquet/int_label.parquet": lambda: frame_in_parquet([n % 3 for n in range(12)]),
    "22_parquet/messages_json.parquet": lambda: as_parquet(pyarrow.table({"messages": list(map(json.dumps, TALKS))})),
    "22_parquet/messages_struct.parquet": lambda: as_parquet(pyarrow.table({"messages": TALKS})),
    "22_parquet/odd_extra_columns.parquet": odd_columns_in_parquet,
    "27_file_oddities/bom.jsonl": lambda: b"\xef\xbb\xbf" + JSONL,
    "27_file_oddities/cr_only.jsonl": lambda: JSONL.replace(b"\n", b"\r"),
    "27_file_oddities/crlf.jsonl": lambda: JSONL.replace(b"\n", b"\r\n"),
    "27_file_oddities/newlines.csv": lambda: (
        "prompt,completion\r\n" + "".join(f'"verse {n}\r\ngoes on","ends\r\nhere {n}"\r\n' for n in range(8))
    ).encode(),
    "27_file_oddities/rows.jsonl.gz": lambda: gzip.compress(JSONL),
    "27_file_oddities/two_boms.jsonl": lambda: b"".join([b"\xef\xbb\xbf" + JSONL, b"\xef\xbb\xbf" + JSONL]),
    "27_file_oddities/utf16.jsonl": lambda: JSONL.decode().encode("utf-16"),
    "27_file_oddities/utf16le_nobom.jsonl": lambda: JSONL.decode().encode("utf-16-le"),
}
"""Files that aren't stored, by the case for which they stand."""


def path_of(case: str, folder: Path) -> Path:
    """The stored file or folder of the case, or the file that is made for it."""
    if case not in MADE:
        assert (CASES / case).exists()
        return CASES / case
    path = folder / Path(case).name
    path.write_bytes(MADE[case]())
    return path
