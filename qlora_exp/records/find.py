"""The runs and studies that there are, and which of them a person means by an id, a part of one, or ``last``."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path

from qlora_exp.errors import RecordError, nearest
from qlora_exp.paths import OutputPaths, RunPaths, StudyPaths, study_name
from qlora_exp.records.files import read_record
from qlora_exp.records.types import RunRecord, Status

LAST = "last"
NEWEST = 500
"""Of the runs there are, how many are asked what the next one takes; each is read once in a process."""
TELLING = (Status.COMPLETED, Status.PRUNED)


def run_folders(outputs: OutputPaths) -> Iterator[RunPaths]:
    """Folders under ``output_root`` that hold a record, by name (ids begin with the time, so oldest first)."""
    if outputs.runs.is_dir():
        for folder in sorted(outputs.runs.iterdir()):
            paths = RunPaths(folder)
            if paths.record.is_file():
                yield paths


def read_runs(outputs: OutputPaths) -> tuple[list[RunRecord], list[RecordError]]:
    """All records in the order in which they started, and what is wrong with those that can't be read."""
    records, unreadable = [], []
    for paths in run_folders(outputs):
        try:
            records.append(read_record(paths.record))
        except RecordError as error:
            unreadable.append(error)
    return sorted(records, key=lambda record: record.started_at), unreadable


class EndedRuns:
    """What the runs under ``output_root`` that have ended say of the next one: of the :data:`NEWEST` by name (ids begin
    with the time) those that completed or were pruned. Others are read again when their file has changed."""

    def __init__(self, outputs: OutputPaths) -> None:
        self._outputs = outputs
        self._seen: dict[str, tuple[Hashable, RunRecord | None]] = {}
        """Folder → which file was read, and what; ``None``: it tells nothing."""

    def records(self) -> list[RunRecord]:
        """The newest first; a record that can't be read is left out."""
        newest = self._newest()
        self._seen = {name: self._seen[name] for name in newest if name in self._seen}
        found = [self._read(name) for name in newest]
        return [record for record in found if record is not None]

    def _newest(self) -> list[str]:
        try:
            return sorted(os.listdir(self._outputs.runs), reverse=True)[:NEWEST]
        except OSError:
            return []

    def _read(self, name: str) -> RunRecord | None:
        file_read, record = self._seen.get(name, (None, None))
        if record is not None:
            return record
        file = RunPaths(self._outputs.runs / name).record
        try:
            found = file.stat()
            if (found.st_mtime_ns, found.st_ino) != file_read:
                read = read_record(file)
                telling = read.status in TELLING and not read.synthetic
                self._seen[name] = ((found.st_mtime_ns, found.st_ino), read if telling else None)
        except (OSError, RecordError):
            return None
        return self._seen[name][1]


def find_run(run: str, outputs: OutputPaths) -> RunPaths:
    """The run that ``run`` names: an id, a unique beginning or end of one, ``last`` (the last started), or a folder.

    Raises:
        RecordError: there is no such run (the nearest ids are named), or several begin like this.
    """
    folder = Path(run).expanduser()
    if (folder / "record.json").is_file():
        return RunPaths(folder.absolute())
    folders = {paths.folder.name: paths for paths in run_folders(outputs)}
    if not folders:
        raise RecordError("there are no runs yet", str(outputs.runs), "qlora-exp run, or say --output-root DIR")
    if run == LAST:
        return _last(folders)
    if run in folders:
        return folders[run]
    fitting = [name for name in folders if name.startswith(run) or name.endswith(run)] if run else []
    if len(fitting) == 1:
        return folders[fitting[0]]
    if fitting:
        raise RecordError(f"{run!r} fits {len(fitting)} runs", str(outputs.runs), f"say more of it: {_some(fitting)}")
    raise RecordError(f"there is no run {run!r}", str(outputs.runs), _nearest_run(run, list(folders)))


def _last(folders: dict[str, RunPaths]) -> RunPaths:
    """By the record's own start; a folder whose record is torn can't say, and its name begins with the time."""
    started = {}
    for name, paths in folders.items():
        try:
            started[name] = read_record(paths.record).started_at
        except RecordError:
            started[name] = ""
    return folders[max(folders, key=lambda name: (started[name], name))]


def _nearest_run(run: str, names: list[str]) -> str:
    told = nearest(run, names)
    return told if told.startswith("did you mean") else f"the newest are {_some(names[-3:])}; qlora-exp ls runs"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def study_names(outputs: OutputPaths) -> list[str]:
    """The names of the studies under ``output_root``, the newest last."""
    return list(_studies(outputs))


def _studies(outputs: OutputPaths) -> dict[str, StudyPaths]:
    """Name → study, the newest last. One whose file can't be read goes by its folder."""
    if not outputs.studies.is_dir():
        return {}
    folders = [StudyPaths(folder) for folder in outputs.studies.iterdir()]
    there = [paths for paths in folders if paths.spec.is_file()]
    there.sort(key=lambda paths: (paths.spec.stat().st_mtime, paths.folder.name))
    return {paths.name or paths.folder.name: paths for paths in there}


def find_study(name: str, outputs: OutputPaths, whole_name: bool = False) -> StudyPaths:
    """The study of that name, a unique beginning of one unless ``whole_name``, or ``last``.

    Raises:
        RecordError: there is none, or several begin like this.
    """
    studies, name = _studies(outputs), study_name(name)
    if not studies:
        raise RecordError("there are no studies yet", str(outputs.studies), "qlora-exp sweep NAME makes one")
    names = list(studies)
    exact = [names[-1]] if name == LAST else [one for one in names if one == name]
    fitting = exact or [one for one in names if name and not whole_name and one.startswith(name)]
    if len(fitting) == 1:
        return studies[fitting[0]]
    if fitting:
        raise RecordError(f"{name!r} fits {len(fitting)} studies", str(outputs.studies), ", ".join(sorted(fitting)))
    raise RecordError(f"there is no study {name!r}", str(outputs.studies), nearest(name, names))


def tracking_uri(records: Sequence[RunRecord]) -> str | None:
    """``tracking.uri`` of the newest record; ``None``: the database beside the output root."""
    tracking = records[-1].config.get("tracking") if records else None
    uri = tracking.get("uri") if isinstance(tracking, Mapping) else None
    return str(uri) if uri is not None else None
