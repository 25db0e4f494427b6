"""Folders written by ``datasets``' ``save_to_disk``: which Arrow files hold their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_exp.data.split_names import SPLIT_NAMES, SplitFile
from qlora_exp.errors import DataError


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
