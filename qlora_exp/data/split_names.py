"""What files and folders are called that hold a split, ours and others' names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qlora_exp.data.compression import ENDINGS, ending_of, stem_of

SPLIT_NAMES = ("train", "validation", "test")
SPLIT_ALIASES = {
    **dict.fromkeys(("training", "trainset"), "train"),
    **dict.fromkeys(("valid", "val", "dev", "development"), "validation"),
    **dict.fromkeys(("testing", "testset"), "test"),
    **dict.fromkeys(("eval", "evaluation", "holdout", "heldout"), "validation or test"),
}
"""What others call a split: the file is not read, and the message says what to rename it to."""

_NAME = re.compile(
    r"(?P<word>[a-z]+)(?:[-_. ]?(?P<number>\d+)(?:[-_. ]?of[-_. ]?(?P<count>\d+))?(?:-[0-9a-f]{8,40})?)?", re.IGNORECASE
)


@dataclass(frozen=True)
class DataFile:
    """``name`` is relative to the task's folder: it names rows. ``number`` and ``count`` are those of a shard."""

    path: Path
    name: str
    number: int | None = None
    count: int | None = None


def parse_name(path: Path) -> tuple[str | None, int | None, int | None]:
    """Split (ours, or what others call one), shard number and number of shards of a file or folder:
    ``train-00000-of-00002.parquet`` gives ``("train", 0, 2)``, any other name ``(None, None, None)``."""
    match = _NAME.fullmatch(stem_of(path) if ending_of(path) in ENDINGS or not path.is_dir() else path.name)
    word = match["word"].lower() if match else None
    if match is None or word not in {*SPLIT_NAMES, *SPLIT_ALIASES}:
        return None, None, None
    number, count = (int(match[key]) if match[key] else None for key in ("number", "count"))
    return word, number, count


def rename_hint(path: Path) -> str:
    """What to do about a file or folder that holds rows under a name that is not read."""
    split, _, _ = parse_name(path)
    if split not in SPLIT_ALIASES:
        return "name it train, validation or test, move it out of the folder, or give task.path=FILE"
    names = [f"{other}{path.name[len(split) :]}" for other in SPLIT_ALIASES[split].split(" or ")]
    return f"rename it to {' or to '.join(names)}"
