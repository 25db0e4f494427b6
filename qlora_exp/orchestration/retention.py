"""Which files of a study's runs may be deleted: checkpoints first, then the adapters of all but the best trials.

Records, per-item results and curves stay, because a report needs them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_exp.errors import ConfigError, RecordError
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.types import Status
from qlora_exp.study.types import TrialRow


@dataclass(frozen=True)
class Deletable:
    """A folder that may be deleted, and its size in bytes."""

    folder: Path
    size_bytes: int


def kept_numbers(keep: str, best_first: Sequence[int], rows: Sequence[TrialRow]) -> set[int]:
    """Return the trials whose adapters stay, for ``all`` or ``best:K``.

    Raises:
        ConfigError: ``keep`` is neither.
    """
    if keep == "all":
        return {row.number for row in rows}
    match = re.fullmatch(r"best:([0-9]+)", keep)
    if match is None:
        raise ConfigError(f"--keep must be best:K or all, got {keep!r}", "--keep", "--keep best:3, or --keep all")
    return set(best_first[: int(match[1])])


def deletable(rows: Sequence[TrialRow], kept: set[int], outputs: OutputPaths) -> list[Deletable]:
    """Return the checkpoints of ended runs, then the adapters of trials that are not ``kept``.

    A run that can still be resumed keeps everything.
    """
    ended = [row for row in rows if row.run_id is not None and row.status is not None and _ended(row.run_id, outputs)]
    runs = [(row.number, outputs.run(str(row.run_id))) for row in ended]
    folders = [paths.checkpoints for _, paths in runs]
    folders += [paths.weights for number, paths in runs if number not in kept]
    return [Deletable(folder, _size(folder)) for folder in folders if folder.is_dir()]


def best_runs_first(rows: Sequence[TrialRow], front: Sequence[TrialRow], maximize: bool) -> list[int]:
    """Return the numbers of the trials with a value: the best trial or Pareto front, then the rest by the first
    objective."""
    known = [row for row in rows if row.values and row.values[0] is not None and row.feasible is not False]
    ranked = sorted(known, key=lambda row: (-1 if maximize else 1) * (row.values[0] or 0.0))
    numbers = [row.number for row in front]
    return [*numbers, *(row.number for row in ranked if row.number not in numbers)]


def delete(folders: Sequence[Deletable]) -> int:
    """Delete the folders and return the number of bytes freed."""
    for folder in folders:
        shutil.rmtree(folder.folder)
    return sum(folder.size_bytes for folder in folders)


def _ended(run_id: str, outputs: OutputPaths) -> bool:
    try:
        return read_record(outputs.run(run_id).record).status not in (Status.RUNNING, Status.INTERRUPTED)
    except RecordError:
        return False


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
