"""Find the files of a folder that hold a task's rows, by split. A data file that would not be read is an error.

These are read: ``train.jsonl``, ``Test.CSV``, ``validation.jsonl.gz``; shards (``train-00000-of-00002.parquet``,
``train_0.jsonl``), all of them or none; the same in ``data/``; and every data file of ``train/``, ``test/`` ….
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from qlora_exp.data.contents import ARCHIVES, ENDINGS, OTHER_ENDINGS, ending_of, stem_of
from qlora_exp.data.items import SPLIT_NAMES
from qlora_exp.errors import DataError, QloraExpError, raise_all

SPLIT_ALIASES = {
    **dict.fromkeys(("training", "trainset"), "train"),
    **dict.fromkeys(("valid", "val", "dev", "development"), "validation"),
    **dict.fromkeys(("testing", "testset"), "test"),
    **dict.fromkeys(("eval", "evaluation", "holdout", "heldout"), "validation or test"),
}
"""What other tools call a split. Such a file is not read; the error says what to rename it to."""

_TABLE_ENDINGS: tuple[str, ...] = (
    *ARCHIVES,
    *OTHER_ENDINGS,
    *(".xlsx", ".xls", ".xlsm", ".xlsb", ".ods", ".orc", ".avro", ".psv", ".json5", ".jsonc", ".arrows"),
)
"""Endings of other files with rows. They are reported wherever a split's rows may be."""
_UNREAD_ENDINGS: tuple[str, ...] = (
    *_TABLE_ENDINGS,
    *(".txt", ".pkl", ".pickle", ".h5", ".hdf5", ".db", ".sqlite", ".sqlite3", ".tfrecord", ".tfrecords", ".xml"),
    *(".npy", ".npz", ".bin", ".dat", ".data", ".msgpack", ".conll", ".conllu", ".dta", ".rds", ".sav"),
)
"""Endings of data files that are not read. They are reported if the file has a split's name."""

_SHARD = re.compile(r"(?P<before>.*?)(?P<number>\d+)[-_. ]?of[-_. ]?(?P<count>\d+)", re.IGNORECASE)
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


def files_by_split(folder: Path) -> dict[str, list[SplitFile]]:
    """Return the files to read for each split, in the order of their rows. ``train`` is always among them.

    Raises :class:`DataError`, or :class:`Problems` for several: no train file, a missing shard, two files for one
    split, or a file that would not be read.
    """
    if (folder / "dataset_dict.json").is_file():
        return saved_splits(folder)
    if is_saved(folder):
        return {"train": saved_files(folder, "")}
    split_files: dict[str, list[SplitFile]] = {}
    split_folders: dict[str, tuple[Path, list[SplitFile]]] = {}
    errors: list[QloraExpError] = []
    unfinished: list[tuple[str | None, str]] = []
    for path, name in _entries(folder):
        split, number, count = parse_name(path)
        if path.is_dir():
            files = _data_files_in(path, name) if split is not None else []
            if split in SPLIT_NAMES and number is None and files and split not in split_folders:
                split_folders[split] = (path, files)
                errors += [
                    _unread_error(unread, folder, _unread_format_hint(folder))
                    for unread in _unread_files_in(path, name)
                ]
            elif split in SPLIT_NAMES and not files:
                errors += _empty_folder_errors(path, name, folder)
            elif split in split_folders and files:
                what = f"two sources for {split}: the folders {split_folders[split][0].relative_to(folder)} and {name}"
                errors.append(DataError(what, str(folder), "keep one of the two"))
            elif files:
                errors.append(_unread_error(f"the folder {name}", folder, _rename_hint(path)))
        elif split in SPLIT_NAMES and ending_of(path) in ENDINGS:
            split_files.setdefault(split, []).append(SplitFile(path, name, number, count))
        elif problem := _unread_file_error(path, name, folder):
            errors.append(problem)
        elif _is_unfinished(path):
            unfinished.append((parse_name(Path(path.name.split(".")[0])).split, name))
    for split, name in unfinished:
        # If the split has files that are read, this one is a backup of one of them.
        if split is not None and split not in (*split_files, *split_folders):
            hint = "finish the download or rename it, or move it out of the folder"
            errors.append(_unread_error(name, folder, hint))
    if not split_files and not split_folders:
        only = _only_data_file(folder)
        if only is not None:
            return {"train": [SplitFile(only, only.name)]}
    if "train" not in split_files and "train" not in split_folders:
        raise _no_train_error(folder, errors)
    for both in sorted(split_files.keys() & split_folders.keys()):
        what = f"two sources for {both}: {split_files[both][0].name} and the folder {split_folders[both][0].name}"
        errors.append(DataError(what, str(folder), "keep one of the two"))
    hint = "read it by itself (task.path=FOLDER), or move it out"
    errors += [_unread_error(f"the folder {path.name}", folder, hint) for path in _nested_data_sets(folder)]
    raise_all(errors)
    ordered = {split: _sort_split_files(split, files, folder) for split, files in split_files.items()}
    ordered |= {split: _sort_split_folder(path, files) for split, (path, files) in split_folders.items()}
    return {split: ordered[split] for split in SPLIT_NAMES if split in ordered}


def _only_data_file(folder: Path) -> Path | None:
    """Return the folder's data file if it has exactly one, and no folder with others; else ``None``.

    Many data sets of the Hub are one file and a README, e.g. ``databricks-dolly-15k.jsonl``.
    """
    entries = [path for path, _ in _entries(folder)]
    files = [path for path in entries if not path.is_dir() and ending_of(path) in ENDINGS and not _is_metadata(path)]
    others = [path for path in entries if path not in files and ending_of(path) in (*_TABLE_ENDINGS, *ENDINGS)]
    others = [path for path in others if not _is_metadata(path)]
    if len(files) != 1 or others or _nested_data_sets(folder) or _is_unfinished(files[0]):
        return None
    return files[0] if parse_name(files[0]).split is None else None


def check_not_a_shard(path: Path) -> None:
    """Raise :class:`DataError` if the file is one of several shards."""
    shard = _SHARD.search(stem_of(path))
    if shard and int(shard["count"]) > 1:
        what = f"{path.name} is one of {int(shard['count'])} shards: the other rows would not be read"
        raise DataError(
            what, f"task.path={path}", f"task.path={path.parent} reads all; a copy under another name is read by itself"
        )


class ParsedName(NamedTuple):
    """What the name of a file or folder says: the split (our name or another tool's), shard number and count."""

    split: str | None
    shard: int | None
    shards: int | None


def parse_name(path: Path) -> ParsedName:
    """``train-00000-of-00002.parquet`` gives ``("train", 0, 2)``; other names give ``(None, None, None)``."""
    match = _NAME.fullmatch(stem_of(path) if ending_of(path) in ENDINGS or not path.is_dir() else path.name)
    word = match["word"].lower() if match else None
    if match is None or word not in {*SPLIT_NAMES, *SPLIT_ALIASES}:
        return ParsedName(None, None, None)
    number, count = (int(match[key]) if match[key] else None for key in ("number", "count"))
    return ParsedName(word, number, count)


def _rename_hint(path: Path) -> str:
    """Return what to do about a file or folder with rows whose name is not read."""
    split = parse_name(path).split
    if split not in SPLIT_ALIASES:
        return "name it train, validation or test, move it out of the folder, or give task.path=FILE"
    names = [f"{ours}{path.name[len(split) :]}" for ours in SPLIT_ALIASES[split].split(" or ")]
    return f"rename it to {' or to '.join(names)}"


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except PermissionError:
        if parse_name(folder).split is None:  # e.g. lost+found at the root of a disk
            return []
        raise DataError("the folder can't be read", str(folder), "check its permissions") from None


def _entries(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield what is in the folder and in its ``data/``, where data sets of the Hub have their files."""
    for path in _visible(folder):
        if path.name.lower() == "data" and path.is_dir():
            yield from ((inner, f"{path.name}/{inner.name}") for inner in _visible(path))
        else:
            yield path, path.name


def _data_files_in(folder: Path, name: str) -> list[SplitFile]:
    """Return the data files in a split's own folder and below."""
    files = [(path, inner) for path, inner in _files_below(folder, name) if ending_of(path) in ENDINGS]
    return [SplitFile(path, inner) for path, inner in files if not _is_metadata(path)]


def _files_below(folder: Path, name: str, above: tuple[Path, ...] = ()) -> Iterator[tuple[Path, str]]:
    """Yield every file in the folder and below. Links to folders are followed unless they lead back up."""
    real = folder.resolve()
    for path in _visible(folder) if real not in above else []:
        if path.is_dir():
            yield from _files_below(path, f"{name}/{path.name}", (*above, real))
        else:
            yield path, f"{name}/{path.name}"


def _unread_files_in(folder: Path, name: str) -> list[str]:
    """Return files with rows in a split's own folder that are not read, except backups of files that are read."""
    unread = []
    for path, inner in _files_below(folder, name):
        # a.jsonl for both a.jsonl.bak and a.jsonl~
        original = path.with_name(path.name.rstrip("~") if path.name.endswith("~") else path.stem)
        is_data = path.suffix.lower() in _TABLE_ENDINGS or (_is_unfinished(path) and not original.exists())
        if is_data and ending_of(path) not in ENDINGS:
            unread.append(inner)
    return unread


def _empty_folder_errors(folder: Path, name: str, task_folder: Path) -> list[QloraExpError]:
    """Return the error for a split's folder that is empty or holds only files of other kinds."""
    files = [path for path, _ in _files_below(folder, name)]
    data = [path for path in files if path.suffix.lower() in _UNREAD_ENDINGS or _is_unfinished(path)]
    if files and (not data or any(path.suffix == ".py" for path in files)):
        return []  # e.g. a program's tests
    if not files and any(folder.iterdir()):
        return []  # e.g. .gitkeep: the folder is empty on purpose
    what = f"the folder {name} holds no file that is read" if files else f"the folder {name} is empty"
    return [DataError(what, str(task_folder), f"{_unread_format_hint(task_folder)}; or remove the folder")]


def _is_unfinished(path: Path) -> bool:
    """Return whether it is a cut-off download or a backup, e.g. ``validation.jsonl.part``, ``validation.jsonl~``."""
    suffixes = [suffix.lower().rstrip("~") for suffix in path.suffixes]
    return ending_of(path) not in ENDINGS and any(suffix in ENDINGS for suffix in suffixes)


def _nested_data_sets(folder: Path) -> list[Path]:
    """Return subfolders that hold splits themselves, e.g. the configurations of a Hub data set."""

    def is_split(path: Path) -> bool:
        split = parse_name(path).split
        if path.is_dir():
            return split in SPLIT_NAMES and bool(_data_files_in(path, path.name))
        return ending_of(path) in ENDINGS and split is not None

    folders = [path for path, _ in _entries(folder) if path.is_dir() and parse_name(path).split is None]
    return [path for path in folders if any(is_split(inner) for inner, _ in _entries(path))]


def _unread_file_error(path: Path, name: str, folder: Path) -> DataError | None:
    """Return the error for a file that seems to hold rows and would not be read, else ``None``."""
    split = parse_name(path).split
    if ending_of(path) in ENDINGS:
        return None if _is_metadata(path) else _unread_error(name, folder, _rename_hint(path))
    foreign = ending_of(path) in _UNREAD_ENDINGS or path.suffix.lower() in _UNREAD_ENDINGS
    if split is None or not foreign:
        return None
    if read_ending := OTHER_ENDINGS.get(path.suffix.lower()):
        return _unread_error(name, folder, f"rename it to {path.stem}{read_ending}")
    return _unread_error(name, folder, _unread_format_hint(folder))


def _unread_format_hint(folder: Path) -> str:
    return f"save it as JSONL, CSV or Parquet, or move it out of {folder}"


def _unread_error(name: str, folder: Path, hint: str) -> DataError:
    return DataError(f"{name} would not be read", str(folder), hint)


def _is_metadata(path: Path) -> bool:
    """Return whether a .json file without a split's name describes data: it holds neither a list of objects nor one
    object per line."""
    if path.suffix.lower() != ".json" or parse_name(path).split is not None:
        return False
    try:
        with path.open("rb") as stream:
            begin = stream.read(2**16).removeprefix(b"\xef\xbb\xbf").strip()
    except OSError:  # a broken link, or no permission to read it
        return False
    if begin.startswith(b"["):
        return not begin[1:].lstrip().startswith(b"{")
    lines = begin.split(b"\n")
    return not (len(lines) > 1 and lines[0].rstrip().endswith(b"}") and lines[1].startswith(b"{"))


def _no_train_error(folder: Path, errors: Sequence[QloraExpError]) -> QloraExpError:
    names = [path.name for path, _ in _entries(folder) if ending_of(path) in ENDINGS and not path.is_dir()]
    hint = f"name it train{{{','.join(ENDINGS)}}}, or give task.path=FILE; here: {', '.join(names) or 'no data file'}"
    if sets := _nested_data_sets(folder):
        hint = f"task.path={' or task.path='.join(map(str, sets))}"
    elif renamed := next((error.hint for error in errors if "to train" in (error.hint or "")), None):
        hint = f"{renamed}; here: {', '.join(names)}"
    return DataError("the folder holds no train file", str(folder), hint)


def _sort_split_folder(folder: Path, files: Sequence[SplitFile]) -> list[SplitFile]:
    """Return the files of a split's own folder in order, after checking that each set of shards is complete."""
    endings = sorted({ending_of(file.path) for file in files})
    if len(endings) > 1:
        what = f"the folder {folder.name} holds {' and '.join(endings)} files: the same rows might be read twice"
        raise DataError(what, str(folder), "keep one kind")
    sets: dict[tuple[str, str], list[SplitFile]] = {}
    for file in files:
        if shard := _SHARD.search(stem_of(file.path)):
            numbered = replace(file, number=int(shard["number"]), count=int(shard["count"]))
            sets.setdefault((str(file.path.parent), shard["before"]), []).append(numbered)
    for shards in sets.values():
        _check_shards(folder.name, shards, folder)

    def natural_order(file: SplitFile) -> list[tuple[int, str]]:  # part2 before part10
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name)]

    return sorted(files, key=natural_order)


def _sort_split_files(split: str, files: Sequence[SplitFile], folder: Path) -> list[SplitFile]:
    """Return a split's single file, or its complete shards in order."""
    if len(files) == 1 and files[0].number is None:
        return list(files)
    if whole := next((file for file in files if file.number is None), None):
        other = next(file for file in files if file is not whole)
        what = f"two files for {split}: {whole.name} and {other.name}"
        raise DataError(what, str(folder), "keep one of the two")
    _check_shards(split, files, folder)
    return sorted(files, key=lambda file: file.number or 0)


def _check_shards(split: str, shards: Sequence[SplitFile], folder: Path) -> None:
    """Raise :class:`DataError` unless the shards are complete: numbered from 0 or 1 without gaps or repeats."""
    numbers = sorted(file.number for file in shards if file.number is not None)
    counts = {file.count for file in shards}
    names = ", ".join(file.name for file in sorted(shards, key=lambda file: file.name)[:4])
    if len(counts) > 1:
        raise DataError(f"the shards of {split} belong to different sets: {names}", str(folder), "keep one set")
    [count] = counts
    for number, following in pairwise(numbers):
        if number == following:
            repeated = " and ".join(file.name for file in shards if file.number == number)
            raise DataError(f"two files for {split}, shard {number}: {repeated}", str(folder), "keep one of the two")
    first = 1 if 0 not in numbers and (count is None or numbers[-1] == count) else 0
    expected = range(first, first + (count if count is not None else len(numbers)))
    missing = [str(number) for number in expected if number not in numbers]
    if count is None and missing:
        what = f"the files of {split} aren't numbered from 0 or 1 without a gap: {names}"
        raise DataError(what, str(folder), "if all are shards of one split, number them so; else move the others out")
    if missing:
        missing_text = ", ".join(missing[:10]) + (", …" if len(missing) > 10 else "")
        what = f"{split} has {len(numbers)} of {count} shards; missing: {missing_text}"
        raise DataError(what, str(folder), f"add the missing files; here: {names}")
    if len(numbers) > len(expected):
        raise DataError(f"{split} has more shards than their names say: {names}", str(folder), "keep one set")


def is_saved(folder: Path) -> bool:
    """Return whether the folder is one saved ``Dataset``."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def saved_splits(folder: Path) -> dict[str, list[SplitFile]]:
    """Return the Arrow files of each split of a saved ``DatasetDict``.

    Raises :class:`DataError` for a split with an unknown name, which would not be read, and for a missing split.
    """
    names = [str(name) for name in _json(folder / "dataset_dict.json").get("splits", [])]
    for name in names:
        if name not in SPLIT_NAMES:
            hint = (
                f"save it again: d = datasets.load_from_disk({str(folder)!r}); d['validation'] = d.pop({name!r}) "
                f"(or del d[{name!r}]); d.save_to_disk('NEW')"
            )
            raise DataError(f"the split {name!r} would not be read", str(folder), hint)
    if "train" not in names:
        raise DataError("the saved data set has no split 'train'", str(folder), f"here: {', '.join(names) or 'none'}")
    for name in names:
        if not is_saved(folder / name):
            raise DataError(f"the split {name!r} is missing", str(folder / name), "copy the whole folder")
    return {name: saved_files(folder / name, f"{name}/") for name in SPLIT_NAMES if name in names}


def saved_files(folder: Path, prefix: str) -> list[SplitFile]:
    """Return the Arrow files of one saved ``Dataset``, in order. Other Arrow files in the folder are caches.

    Raises :class:`DataError` if one is missing.
    """
    names = [str(entry["filename"]) for entry in _json(folder / "state.json").get("_data_files", [])]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        what = f"{len(missing)} of {len(names)} files of the saved data set are missing: {', '.join(missing[:3])}"
        raise DataError(what if names else "the saved data set names no file", str(folder), "copy the whole folder")
    return [SplitFile(folder / name, f"{prefix}{name}") for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"the file can't be read: {error}", str(path), "copy the whole folder again") from None
    return value if isinstance(value, dict) else {}
