"""Read a task's rows from their source: the embedded task, a file or folder on disk, or the Hub."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path

from qlora_exp.config.enums import TaskSource
from qlora_exp.config.schema import TaskConfig
from qlora_exp.data.contents import ARCHIVES, COMPRESSED, ENDINGS, ending_of
from qlora_exp.data.files import DataFile, read_file, read_splits
from qlora_exp.data.folders import check_not_a_shard, files_by_split, parse_name
from qlora_exp.data.messages import Message
from qlora_exp.data.rows import Example
from qlora_exp.errors import DataError, QloraExpError
from qlora_exp.paths import EMBEDDED

MAX_NEARBY = 5
"""Data files that an error names if ``task.path`` doesn't exist."""


def read_sources(task: TaskConfig) -> dict[str, DataFile]:
    """Return the task's rows by split. A source without splits gives ``train`` only; the other two may be absent.

    Raises :class:`DataError` for a missing, unreadable or empty source.
    """
    if task.source is TaskSource.embedded:
        return _read_folder(EMBEDDED / "task")
    if task.source is TaskSource.hub:
        from qlora_exp.data.hub import read_hub  # here because its HTTP client takes 0.1 s to import

        return read_hub(task)
    if not task.path:
        raise DataError("no data file is named", "task.path", "task.path=FILE.jsonl")
    path = Path(task.path).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise DataError(f"there is no {path.name!r}", f"task.path={task.path}", _missing_path_hint(path))
    check_not_a_shard(path)
    splits = read_splits(path)
    train = splits["train"]
    return {**splits, "train": replace(train, notes=(*train.notes, *_unread_splits_note(path)))}


def _unread_splits_note(path: Path) -> list[str]:
    """Return a note if the folder of a single train file holds other splits, too."""
    if parse_name(path).split != "train":
        return []
    others = [file for file in sorted(path.parent.iterdir()) if ending_of(file) in ENDINGS and file.is_file()]
    names = [file.name for file in others if parse_name(file).split in ("validation", "test")]
    return [f"not read: {', '.join(names)}; task.path={path.parent} reads them as splits"] if names else []


def state_of_files(path: str) -> Hashable:
    """Return names, sizes and modification times of a local task's files. While they are equal, so are its rows."""
    root = Path(path).expanduser()
    files = [root]
    if root.is_dir():
        try:
            files = [file.path for split in files_by_split(root).values() for file in split]
        except QloraExpError:
            return "unreadable"
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists())


def read_general_text() -> tuple[str, ...]:
    """Return the fixed documents on which forgetting is measured, the same for every model and task."""
    return tuple(str(row.values["text"]) for row in read_file(EMBEDDED / "general_text.jsonl").rows)


def read_general_chats() -> tuple[Example, ...]:
    """Return the fixed chats on which forgetting is measured in the chat format. The last answer is the completion."""
    chats = []
    for row in read_file(EMBEDDED / "general_chat.jsonl").rows:
        *prompt, answer = (Message(message["role"], message["content"]) for message in row.values["messages"])
        chats.append(Example(row.file, row.number, tuple(prompt), True, answer.content, None, {}))
    return tuple(chats)


def _missing_path_hint(path: Path) -> str:
    """Return a hint for a path that doesn't exist."""
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {str(folder)!r} either; relative paths start where the command is called"
    if path.is_symlink():
        return f"it is a link to {str(path.readlink())!r}, which isn't there"
    if any(mark in path.name for mark in "*?["):
        return f"patterns aren't supported; a folder is read with all of its shards: task.path={folder}"
    known = (*ENDINGS, *COMPRESSED, *ARCHIVES)
    here = sorted(entry for entry in folder.iterdir() if entry.is_dir() or ending_of(entry) in known)
    if close := difflib.get_close_matches(path.name, [entry.name for entry in here], n=1, cutoff=0.6):
        return f"did you mean {close[0]}? task.path={folder / close[0]}"
    files = [entry for entry in here if not entry.is_dir()]
    inside = [entry for entry in here if entry.is_dir() and not entry.name.startswith((".", "_"))]
    files += [file for entry in inside for file in _data_files(entry)]
    if not files:
        return f"there is no data file in {folder.resolve()}; data files end in {', '.join(ENDINGS)}"
    named = [file for file in files if file.name == path.name] or files
    shown = " or ".join(f"task.path={file}" for file in named[:MAX_NEARBY])
    return f"nearby: {shown}{f' … ({len(named)} files)' if len(named) > MAX_NEARBY else ''}"


def _data_files(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if ending_of(file) in ENDINGS and file.is_file())
    except OSError:  # no permission to read it
        return []


def _read_folder(folder: Path) -> dict[str, DataFile]:
    shards = {
        split: [read_file(file.path, file.name) for file in files] for split, files in files_by_split(folder).items()
    }
    mixed = _mixed_classes([file for files in shards.values() for file in files])
    return {split: replace(_merge_shards(files), mixed_classes=mixed) for split, files in shards.items()}


def _mixed_classes(files: Sequence[DataFile]) -> dict[str, str]:
    """Return columns whose classes are named in one file's metadata and are bare numbers in another file."""
    named = {column: file.name for file in reversed(files) for column in file.classes}
    return {
        column: f"{naming_file} names the classes of {column!r}, and {file.name} holds numbers"
        for column, naming_file in named.items()
        for file in files
        if column not in file.classes and any(str(row.values.get(column)).isdecimal() for row in file.rows)
    }


def _merge_shards(files: Sequence[DataFile]) -> DataFile:
    """Return the shards of a split as one file."""
    if len(files) == 1:
        return files[0]
    return DataFile(
        name=f"{files[0].name} and {len(files) - 1} other files",
        rows=tuple(row for file in files for row in file.rows),
        columns=tuple(dict.fromkeys(column for file in files for column in file.columns)),
        problems=tuple(problem for file in files for problem in file.problems),
        notes=tuple(note for file in files for note in file.notes),
    )
