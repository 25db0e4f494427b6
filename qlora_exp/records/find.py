"""Finds runs and studies by id, by a unique beginning or end of it, or by ``last``."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path

from qlora_exp.errors import RecordError, nearest
from qlora_exp.paths import OutputPaths, RunPaths, StudyPaths, study_name
from qlora_exp.records.files import read_record
from qlora_exp.records.types import RunRecord, Status

LAST = "last"
MAX_ENDED_RUNS = 500
"""How many of the newest runs are used to predict the next one; a process reads each record once."""
USABLE_STATUSES = (Status.COMPLETED, Status.PRUNED)


def run_folders(outputs: OutputPaths) -> Iterator[RunPaths]:
    """Yield folders under ``output_root`` with a record, sorted by name (ids begin with the time: oldest first)."""
    if outputs.runs.is_dir():
        for folder in sorted(outputs.runs.iterdir()):
            paths = RunPaths(folder)
            if paths.record.is_file():
                yield paths


def read_runs(outputs: OutputPaths) -> tuple[list[RunRecord], list[RecordError]]:
    """Return all records in order of their start, and the errors of records that can't be read."""
    records, unreadable = [], []
    for paths in run_folders(outputs):
        try:
            records.append(read_record(paths.record))
        except RecordError as error:
            unreadable.append(error)
    return sorted(records, key=lambda record: record.started_at), unreadable


class EndedRuns:
    """Ended runs under ``output_root``, from which the next run is predicted.

    These are the completed and pruned runs among the newest :data:`MAX_ENDED_RUNS` (ids begin with the time). The
    record of any other run is read again when its file has changed.
    """

    def __init__(self, outputs: OutputPaths) -> None:
        self._outputs = outputs
        self._seen: dict[str, tuple[Hashable, RunRecord | None]] = {}
        """Folder → (modification time and inode of the file that was read, record); ``None``: not usable."""

    def records(self) -> list[RunRecord]:
        """Return the records, newest first; a record that can't be read is left out."""
        try:
            newest = sorted(os.listdir(self._outputs.runs), reverse=True)[:MAX_ENDED_RUNS]
        except OSError:
            newest = []
        self._seen = {name: self._seen[name] for name in newest if name in self._seen}
        records = [self._read(name) for name in newest]
        return [record for record in records if record is not None]

    def _read(self, name: str) -> RunRecord | None:
        stamp, record = self._seen.get(name, (None, None))
        if record is not None:
            return record
        file = RunPaths(self._outputs.runs / name).record
        try:
            stat = file.stat()
            if (stat.st_mtime_ns, stat.st_ino) != stamp:
                new_record = read_record(file)
                usable = new_record.status in USABLE_STATUSES and not new_record.synthetic
                self._seen[name] = ((stat.st_mtime_ns, stat.st_ino), new_record if usable else None)
        except (OSError, RecordError):
            return None
        return self._seen[name][1]


def find_run(run: str, outputs: OutputPaths) -> RunPaths:
    """Return the run with this id, unique beginning or end of an id, ``last`` (the last started), or folder.

    Example: ``find_run("3f2a", outputs)`` finds ``20261130-120000-embedded-base-nf4-r8-3f2a``.

    Raises:
        RecordError: there is no such run (the hint names the nearest ids), or several match.
    """
    folder = Path(run).expanduser()
    if (folder / "record.json").is_file():
        return RunPaths(folder.absolute())
    folders = {paths.folder.name: paths for paths in run_folders(outputs)}
    if not folders:
        raise RecordError("there are no runs yet", str(outputs.runs), "qlora-exp run, or say --output-root DIR")
    if run == LAST:
        return folders[max(folders, key=lambda name: (_started_at(folders[name]), name))]
    if run in folders:
        return folders[run]
    matches = [name for name in folders if name.startswith(run) or name.endswith(run)] if run else []
    if len(matches) == 1:
        return folders[matches[0]]
    if matches:
        first = ", ".join(matches[:4]) + (", …" if len(matches) > 4 else "")
        raise RecordError(f"{run!r} matches {len(matches)} runs", str(outputs.runs), f"type more: {first}")
    hint = nearest(run, list(folders))
    if not hint.startswith("did you mean"):
        hint = f"the newest are {', '.join(list(folders)[-3:])}; qlora-exp ls runs"
    raise RecordError(f"there is no run {run!r}", str(outputs.runs), hint)


def _started_at(paths: RunPaths) -> str:
    """Return when the run started; "" for a damaged record: such runs count as the oldest."""
    try:
        return read_record(paths.record).started_at
    except RecordError:
        return ""


def study_names(outputs: OutputPaths) -> list[str]:
    """Return the names of the studies under ``output_root``, the newest last."""
    return list(_studies(outputs))


def _studies(outputs: OutputPaths) -> dict[str, StudyPaths]:
    """Return name → study, the newest last. A study whose file can't be read is named after its folder."""
    if not outputs.studies.is_dir():
        return {}
    folders = [StudyPaths(folder) for folder in outputs.studies.iterdir()]
    studies = [paths for paths in folders if paths.spec.is_file()]
    studies.sort(key=lambda paths: (paths.spec.stat().st_mtime, paths.folder.name))
    return {paths.name or paths.folder.name: paths for paths in studies}


def find_study(name: str, outputs: OutputPaths, whole_name: bool = False) -> StudyPaths:
    """Return the study with this name, or with a unique beginning of it unless ``whole_name``, or ``last``.

    Raises:
        RecordError: there is no such study, or several match.
    """
    studies, name = _studies(outputs), study_name(name)
    if not studies:
        raise RecordError("there are no studies yet", str(outputs.studies), "qlora-exp sweep NAME makes one")
    names = list(studies)
    exact = [names[-1]] if name == LAST else [known for known in names if known == name]
    matches = exact or [known for known in names if name and not whole_name and known.startswith(name)]
    if len(matches) == 1:
        return studies[matches[0]]
    if matches:
        raise RecordError(f"{name!r} matches {len(matches)} studies", str(outputs.studies), ", ".join(sorted(matches)))
    raise RecordError(f"there is no study {name!r}", str(outputs.studies), nearest(name, names))


def tracking_uri(records: Sequence[RunRecord]) -> str | None:
    """Return ``tracking.uri`` of the newest record; ``None``: the database next to the output root."""
    tracking = records[-1].config.get("tracking") if records else None
    uri = tracking.get("uri") if isinstance(tracking, Mapping) else None
    return str(uri) if uri is not None else None
