"""``tracking.json``: what the tracking store has of one run or study, and why it lacks the rest."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from qlora_exp.errors import RecordError, TrackingError
from qlora_exp.paths import RunPaths, StudyPaths
from qlora_exp.records.files import write_json
from qlora_exp.records.schema import from_dict

STATE_LOCK_SECONDS = 60.0
"""How long a process waits while another one delivers (a few calls and the uploads). After that, ``qlora-exp sync``
does the rest."""


@dataclass(frozen=True)
class TrackingState:
    """``uri`` is redacted. ``record_digest``: SHA-256 of the last record.json that was delivered completely; for a
    study, of its files (``study_digest``)."""

    uri: str
    experiment: str
    experiment_id: str | None = None
    mlflow_run_id: str | None = None
    delivered: bool = False
    record_digest: str | None = None
    error: str | None = None


def read_state(paths: RunPaths | StudyPaths) -> TrackingState | None:
    """Return the state; ``None`` if there is none or it can't be read. The run is then delivered again, which
    duplicates nothing."""
    try:
        return from_dict(TrackingState, json.loads(paths.tracking_state.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecordError):
        return None


def write_state(paths: RunPaths | StudyPaths, state: TrackingState) -> None:
    write_json(paths.tracking_state, state)


@contextlib.contextmanager
def delivery_lock(lock: Path, patience_seconds: float = STATE_LOCK_SECONDS) -> Iterator[None]:
    """Let one process at a time deliver the run or study that ``lock`` belongs to.

    A trial process, the orchestrator of an ended sweep and ``qlora-exp sync`` may deliver at once. MLflow has no call
    that creates a run only if it is missing. It also fails if two processes set the same new tag at once.

    Raises:
        TrackingError: the lock is still held after ``patience_seconds``, or the folder can't be written.
    """
    file_lock = FileLock(lock)
    try:
        file_lock.acquire(timeout=patience_seconds)
    except OSError as error:
        problem = f"the folder can't be written: {error.strerror or error}"
        if isinstance(error, Timeout):
            problem = f"another process has been delivering this for {patience_seconds:.0f} s"
        raise TrackingError(problem, str(lock), "qlora-exp sync tries again") from None
    try:
        yield
    finally:
        file_lock.release()


def record_digest(paths: RunPaths) -> str:
    return file_digest(paths.record)


def file_digest(*files: Path) -> str:
    """Return the SHA-256 of the files' contents, concatenated; a missing file counts as empty."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()
