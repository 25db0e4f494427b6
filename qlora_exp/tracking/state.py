"""``tracking.json``: what the tracking store has of one run or study, and why not all of it."""

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
"""A delivery takes a few calls, and the time of its uploads; who waits longer leaves the rest to ``qlora-exp sync``."""


@dataclass(frozen=True)
class TrackingState:
    """``uri`` is redacted. ``record_digest`` is the SHA-256 of the record.json that was delivered last as a whole
    (of a study: study.json and summary.json)."""

    uri: str
    experiment: str
    experiment_id: str | None = None
    mlflow_run_id: str | None = None
    delivered: bool = False
    record_digest: str | None = None
    error: str | None = None


def read_state(paths: RunPaths | StudyPaths) -> TrackingState | None:
    """The state, or ``None`` where there is none or it can't be read: then the run is delivered (again), which the
    store takes without doubling anything."""
    try:
        return from_dict(TrackingState, json.loads(paths.tracking_state.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecordError):
        return None


def write_state(paths: RunPaths | StudyPaths, state: TrackingState) -> None:
    write_json(paths.tracking_state, state)


@contextlib.contextmanager
def delivery_lock(lock: Path, patience_seconds: float = STATE_LOCK_SECONDS) -> Iterator[None]:
    """One process at a time tells a store of what ``lock`` stands for: a run, a study. A run's host, an orchestrator
    whose sweep has ended and ``qlora-exp sync`` may come at once, and a store has no way to say "make this run unless
    it is there"; nor does it take the same new tag from two at a time.

    Raises :class:`TrackingError` after ``patience_seconds``, and for a folder that can't be written.
    """
    held = FileLock(lock)
    try:
        held.acquire(timeout=patience_seconds)
    except OSError as error:
        what = f"the folder can't be written: {error.strerror or error}"
        if isinstance(error, Timeout):
            what = f"another process has been delivering this for {patience_seconds:.0f} s"
        raise TrackingError(what, str(lock), "qlora-exp sync tries again") from None
    try:
        yield
    finally:
        held.release()


def record_digest(paths: RunPaths) -> str:
    return file_digest(paths.record)


def file_digest(*files: Path) -> str:
    """SHA-256 over the files' contents; one that is missing counts as empty."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()
