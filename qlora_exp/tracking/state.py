"""``tracking.json``: what MLflow has of one run or study, and why it lacks the rest. Only local files are read."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qlora_exp.config.choices import default_output_root
from qlora_exp.errors import RecordError, TrackingError
from qlora_exp.paths import OutputPaths, RunPaths, StudyPaths
from qlora_exp.records.files import read_or_none, read_record, write_json
from qlora_exp.records.redaction import REDACTED

STATE_LOCK_SECONDS = 60.0
"""How long a process waits while another one delivers (a few calls and the uploads). After that, ``qlora-exp sync``
does the rest."""

NOT_DELIVERED_YET = "not delivered yet"
"""The error in ``tracking.json`` while a delivery is under way. It stays there if the process is killed."""

REASON_CHARACTERS = 160


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

    @property
    def has_failed(self) -> bool:
        return self.error not in (None, NOT_DELIVERED_YET)


def read_state(paths: RunPaths | StudyPaths) -> TrackingState | None:
    """Return the state; ``None`` if there is none or it can't be read. The run is then delivered again, which
    duplicates nothing."""
    return read_or_none(TrackingState, paths.tracking_state)


def write_state(paths: RunPaths | StudyPaths, state: TrackingState) -> None:
    write_json(paths.tracking_state, state)


def delivered_state(paths: RunPaths) -> TrackingState | None:
    """Return the state of a run that MLflow has wholly; ``None``: something is missing."""
    state = read_state(paths)
    is_complete = state is not None and state.delivered and state.record_digest == file_digest(paths.record)
    return state if is_complete else None


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


def file_digest(*files: Path) -> str:
    """Return the SHA-256 of the files' contents, concatenated; a missing file counts as empty."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()


def not_delivered(
    output: OutputPaths, run_ids: Iterable[str], study: str | None = None, busy: bool = False
) -> str | None:
    """Return one line on the runs, and the parent run of ``study``, that MLflow lacks, with the command that delivers
    them. ``None``: MLflow has everything, or tracking is off. A run that another process is delivering doesn't count.

    ``busy``: a process works on the study and may be delivering, so only failed deliveries count.
    """
    states = [state for run_id in run_ids if (state := _missing_run(output.run(run_id), busy)) is not None]
    parent = _missing_study(output.study(study), busy) if study is not None else None
    if not states and parent is None:
        return None
    missing = [f"{len(states)} run{'s' if len(states) > 1 else ''}"] if states else []
    missing += ["the study's parent run"] if parent is not None else []
    states += [parent] if parent is not None else []
    reasons = [str(state.error) for state in states if state.has_failed]
    why = f" ({_cause(reasons[-1])})" if reasons else ""
    # No file keeps a URI's password: the user has to add it.
    redacted_uri = next((state.uri for state in states if REDACTED in state.uri), None)
    password = f" --uri {shlex.quote(redacted_uri)} (with the password in place of {REDACTED})" if redacted_uri else ""
    return f"MLflow lacks {' and '.join(missing)}{why}. To deliver: qlora-exp sync{root_option(output)}{password}"


def root_option(output: OutputPaths) -> str:
    """Return `` --output-root DIR`` for a command; "" for the default of the current folder."""
    is_default = output == OutputPaths.of(default_output_root())
    return "" if is_default else f" --output-root {shlex.quote(str(output.root))}"


def _missing_run(paths: RunPaths, busy: bool) -> TrackingState | None:
    """Return the state of an ended run that MLflow lacks wholly or in part; ``None``: nothing is missing."""
    try:
        record = read_record(paths.record)
        digest = file_digest(paths.record)
    except (OSError, RecordError):
        return None
    tracking: dict[str, Any] = record.config.get("tracking") or {}
    if not record.status.ended or not tracking.get("enabled", True):
        return None
    state = read_state(paths)
    if state is not None and state.delivered and (busy or state.record_digest == digest):
        return None
    if busy and (state is None or not state.has_failed):
        return None
    return state or TrackingState(str(tracking.get("uri") or ""), "", error=None)


def _missing_study(paths: StudyPaths, busy: bool) -> TrackingState | None:
    """Return the state of a study whose delivery failed; ``None``: nothing is missing."""
    state = read_state(paths)
    if state is None or state.delivered or state.error is None:
        return None
    return None if busy and state.error == NOT_DELIVERED_YET else state


def _cause(reason: str) -> str:
    """Return only the cause: an HTTP library's message is a paragraph that repeats the address three times."""
    for pattern in (r"\[Errno -?\d+\] ([^'\"\\)]+)", r"Caused by \w+\(['\"](.+?)['\"]\)"):
        cause = re.search(pattern, reason)
        if cause is not None:
            return cause[1].strip().lower()
    text = re.split(r" where: | do: | \[SQL: ", reason)[0].removeprefix("not delivered: ")
    text = re.sub(r"^\([\w.]+\) ", "", text)  # the driver's name for its error
    return text if len(text) <= REASON_CHARACTERS else f"{text[:REASON_CHARACTERS].rstrip()} …"
