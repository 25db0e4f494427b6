"""What a worker is doing right now, for people and for ``status``: one small JSON file per worker."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_exp.errors import RecordError
from qlora_exp.paths import StudyPaths, slug
from qlora_exp.records.files import write_json
from qlora_exp.records.schema import from_dict
from qlora_exp.records.types import Process
from qlora_exp.system.environment import is_alive_if_visible, process_identity
from qlora_exp.system.orchestrator_lease import age_seconds

SILENT_WORKER_SECONDS = 60.0
"""A worker on another machine that has not written its file for so long is gone, if the file has no lease."""


@dataclass
class SlotState:
    """One slot's trial, or only ``phase`` while it has none. ``started_at``: of the trial's current attempt."""

    slot: int
    phase: str = "waiting for a trial"
    host_pid: int | None = None
    trial: int | None = None
    attempt: int | None = None
    run_id: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    total: int | None = None
    loss: float | None = None
    started_at: str | None = None
    progress: str | None = None
    """How far the phase is, e.g. ``120/1,000 validation items scored``; ``None``: it isn't counted."""


def worker_name() -> str:
    """Return this worker's name, ``<host>-<pid>``."""
    return f"{slug(socket.gethostname(), 40)}-{os.getpid()}"


def utc_now() -> str:
    """Return the current time as ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_worker_state(
    paths: StudyPaths, job: int, stopping: str | None, slots: Sequence[SlotState], lease_seconds: float
) -> None:
    """Write this worker's file. A full disk is reported elsewhere; the trials continue without this file.

    Args:
        stopping: why no new trial starts, e.g. ``gracefully``, ``now`` or ``failures``.
        lease_seconds: a worker on another machine that has not written its file for so long is gone.
    """
    state = {
        "worker": worker_name(),
        "host": socket.gethostname(),
        "job": job,
        "process": process_identity(),
        "written_at": utc_now(),
        "stopping": stopping,
        "slots": slots,
        "lease_seconds": lease_seconds,
    }
    with contextlib.suppress(OSError):
        write_json(paths.workers / f"{worker_name()}.json", state)


def remove_worker_state(paths: StudyPaths) -> None:
    """Delete this worker's file."""
    with contextlib.suppress(OSError):
        (paths.workers / f"{worker_name()}.json").unlink()


def worker_files(paths: StudyPaths) -> Iterator[tuple[Path, Process, dict[str, Any]]]:
    """Yield the files of the study's workers that can be read, with process and content. A killed worker leaves its
    file."""
    for file in sorted(paths.workers.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, RecordError, KeyError, TypeError):
            content = json.loads(file.read_text(encoding="utf-8"))
            yield file, from_dict(Process, content["process"]), content


def running_slots(paths: StudyPaths) -> list[SlotState]:
    """Return what the living workers' slots are doing now; slots without a trial are left out."""
    states: list[SlotState] = []
    for file, process, content in worker_files(paths):
        with contextlib.suppress(ValueError, RecordError, KeyError, TypeError):
            is_alive = is_alive_if_visible(process)
            if is_alive is None:  # on another machine only the file, which its worker writes every second, shows that
                age = age_seconds(file)
                is_alive = age is not None and abs(age) <= float(content.get("lease_seconds") or SILENT_WORKER_SECONDS)
            if is_alive:
                slots = [from_dict(SlotState, slot) for slot in content["slots"]]
                states += [slot for slot in slots if slot.trial is not None]
    return states
