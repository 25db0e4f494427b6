"""What a worker is doing right now, for people and for ``status``: one small JSON file per worker."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_exp.paths import slug
from qlora_exp.records.files import write_json
from qlora_exp.records.types import Process
from qlora_exp.system.environment import process_identity


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


@dataclass(frozen=True)
class WorkerState:
    """``workers/<host>-<pid>.json``. If its process isn't alive, the worker was killed."""

    worker: str
    host: str
    job: int
    process: Process
    written_at: str
    stopping: str | None
    """``gracefully``, ``now`` or ``failures``: no new trial starts."""
    slots: tuple[SlotState, ...]
    lease_seconds: float | None = None
    """A worker on another machine that has not written this file for so long is gone."""


def worker_name() -> str:
    """Return this worker's name, ``<host>-<pid>``."""
    return f"{slug(socket.gethostname(), 40)}-{os.getpid()}"


def utc_now() -> str:
    """Return the current time as ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def worker_state(
    worker: str, job: int, stopping: str | None, slots: list[SlotState], lease_seconds: float | None = None
) -> WorkerState:
    """Return the state to write, with copies of the slots' states."""
    copies = tuple(dataclasses.replace(slot) for slot in slots)
    return WorkerState(
        worker, socket.gethostname(), job, process_identity(), utc_now(), stopping, copies, lease_seconds
    )


def write_worker_state(folder: Path, state: WorkerState) -> None:
    """Write the worker's file. A full disk is reported elsewhere; the trials continue without this file."""
    with contextlib.suppress(OSError):
        write_json(folder / f"{state.worker}.json", state)


def remove_worker_state(folder: Path, worker: str) -> None:
    """Delete the worker's file."""
    with contextlib.suppress(OSError):
        (folder / f"{worker}.json").unlink()
