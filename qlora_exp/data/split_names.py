"""Names of files and folders that hold a split: ours, and those of other tools."""

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
"""What other tools call a split. Such a file is not read; the error says what to rename it to."""

_NAME = re.compile(
    r"(?P<word>[a-z]+)(?:[-_. ]?(?P<number>\d+)(?:[-_. ]?of[-_. ]?(?P<count>\d+))?(?:-[0-9a-f]{8,40})?)?", re.IGNORECASE
)


@dataclass(frozen=True)
class SplitFile:
    """A file of a split. ``name`` is relative to the task's folder. ``number`` and ``count`` are those of a shard."""

    path: Path
    name: str
    number: int | None = None
    count: int | None = None


def parse_name(path: Path) -> tuple[str | None, int | None, int | None]:
    """Return the split (our name or another tool's), shard number and shard count that a file or folder name gives.

    ``train-00000-of-00002.parquet`` gives ``("train", 0, 2)``; other names give ``(None, None, None)``.
    """
    match = _NAME.fullmatch(stem_of(path) if ending_of(path) in ENDINGS or not path.is_dir() else path.name)
    word = match["word"].lower() if match else None
    if match is None or word not in {*SPLIT_NAMES, *SPLIT_ALIASES}:
        return None, None, None
    number, count = (int(match[key]) if match[key] else None for key in ("number", "count"))
    return word, number, count


def rename_hint(path: Path) -> str:
    """Return what to do about a file or folder with rows whose name is not read."""
    split, _, _ = parse_name(path)
    if split not in SPLIT_ALIASES:
        return "name it train, validation or test, move it out of the folder, or give task.path=FILE"
    names = [f"{ours}{path.name[len(split) :]}" for ours in SPLIT_ALIASES[split].split(" or ")]
    return f"rename it to {' or to '.join(names)}"
