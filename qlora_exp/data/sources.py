"""Where a task's rows come from: the package, a file or folder on disk, or the Hub."""

from __future__ import annotations

from pathlib import Path

from qlora_exp.config import TaskConfig, TaskSource
from qlora_exp.data.files import ENDINGS, RawFile, RawRow, read_file
from qlora_exp.data.messages import Message
from qlora_exp.data.rows import Example
from qlora_exp.errors import DataError, nearest
from qlora_exp.paths import EMBEDDED

SPLIT_NAMES = ("train", "validation", "test")
_OTHER_NAMES = {"valid": "validation", "val": "validation", "dev": "validation", "eval": "validation"}


def read_sources(task: TaskConfig) -> dict[str, RawFile]:
    """The task's rows by split. A source without splits gives ``train`` alone; the other two may be absent.

    Raises :class:`DataError` for a missing, unreadable or empty source.
    """
    if task.source is TaskSource.embedded:
        return _read_folder(EMBEDDED / "task")
    if task.source is TaskSource.hub:
        from qlora_exp.data.hub import read_hub  # with a client for HTTP, which takes a tenth of a second

        return read_hub(task)
    if not task.path:
        raise DataError("no data file is named", "task.path", "task.path=FILE.jsonl")
    path = Path(task.path).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise DataError(f"there is no {path.name!r}", f"task.path={task.path}", _nearby(path))
    return {"train": read_file(path)}


def read_general_text() -> tuple[str, ...]:
    """The fixed documents on which forgetting is measured, the same for every model and task."""
    rows = read_file(EMBEDDED / "general_text.jsonl").rows
    return tuple(str(row.values["text"]) for row in rows)


def read_general_chats() -> tuple[Example, ...]:
    """The fixed chats on which forgetting is measured in the chat format; the last answer is the completion."""
    file = read_file(EMBEDDED / "general_chat.jsonl")
    return tuple(_chat(file.name, row) for row in file.rows)


def _chat(file: str, row: RawRow) -> Example:
    *asked, answer = (Message(message["role"], message["content"]) for message in row.values["messages"])
    return Example(file, row.number, tuple(asked), True, answer.content, None, {})


def _nearby(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {str(folder)!r} either; relative paths start where the command is called"
    if path.is_symlink():
        return f"it is a link to {str(path.readlink())!r}, which isn't there"
    names = [entry.name for entry in folder.iterdir() if entry.is_dir() or entry.suffix.lower() in ENDINGS]
    return nearest(path.name, names)


def _read_folder(folder: Path) -> dict[str, RawFile]:
    found: dict[str, Path] = {}
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS) if folder.is_dir() else []
    for path in files:
        if path.stem in _OTHER_NAMES:
            name = _OTHER_NAMES[path.stem]
            raise DataError(f"{path.name} would not be read", str(folder), f"rename it to {name}{path.suffix}")
        if path.stem in SPLIT_NAMES:
            if path.stem in found:
                both = f"{found[path.stem].name} and {path.name}"
                raise DataError(f"two files for {path.stem}: {both}", str(folder), "keep one of the two")
            found[path.stem] = path
    if "train" not in found:
        names = ", ".join(path.name for path in files) or "no data file"
        hint = f"name it train{{{','.join(ENDINGS)}}}, or give task.path=FILE; here: {names}"
        raise DataError("the folder holds no train file", str(folder), hint)
    return {split: read_file(found[split]) for split in SPLIT_NAMES if split in found}
