"""Runs whose process died get the status INTERRUPTED. MLflow is imported only if there is one."""

from __future__ import annotations

from collections.abc import Set
from datetime import UTC, datetime
from pathlib import Path

from qlora_exp.errors import RecordError
from qlora_exp.paths import OutputPaths, RunPaths
from qlora_exp.records.files import read_record, write_json
from qlora_exp.records.find import run_folders
from qlora_exp.records.types import Failure, RunRecord, Status
from qlora_exp.system.environment import is_alive
from qlora_exp.system.out_of_memory import killed_for_memory


def mark_interrupted(output_root: str | Path) -> tuple[str, ...]:
    """Mark runs whose process is dead: INTERRUPTED in the record, KILLED in MLflow. Returns their run ids.

    A run of another host stays RUNNING: its process can't be checked from here. The function reads every record, and
    calls MLflow only if it changed one. If the store doesn't answer, ``sync_runs`` delivers them later.
    """
    output = OutputPaths.of(output_root)
    marked = mark_records(output)
    if marked:
        from qlora_exp.tracking.sync import deliver_folders

        deliver_folders(output, set(marked))
    return tuple(marked.values())


def mark_records(output: OutputPaths, only: Set[str] | None = None) -> dict[str, str]:
    """Mark records of dead processes, ``only`` those in these folders. Returns their run ids by folder name."""
    marked = {}
    for paths in run_folders(output):
        if only is not None and paths.folder.name not in only:
            continue
        try:
            record = read_record(paths.record)
        except RecordError:
            continue  # ls and sync report it; it can't be repaired
        if record.status is Status.RUNNING and (record.process is None or is_alive(record.process) is False):
            write_json(paths.record, _interrupted(record, paths))
            marked[paths.folder.name] = record.run_id
    return marked


def _interrupted(record: RunRecord, paths: RunPaths) -> RunRecord:
    """Return the record of a run whose process died; its end is the last modification of a file in the folder."""
    files = [file for file in (paths.record, paths.curve) if file.is_file()]
    last = datetime.fromtimestamp(max(file.stat().st_mtime for file in files), UTC).isoformat(timespec="seconds")
    process = f"process {record.process.pid}" if record.process is not None else "the process"
    return record.replace(
        status=Status.INTERRUPTED,
        ended_at=last,
        failure=killed_for_memory(record, None, None)
        or Failure(
            kind="ProcessDied",
            message=f"{process} ended without finishing the run (killed, out of memory, or the machine stopped); "
            f"its last sign of life was at {last}",
            hint="run it again with the same settings; if training.save_every_steps is set, it continues from the "
            "newest checkpoint",
        ),
    )
