"""``tracking.json``: what the tracking store has of one run or study, and why not all of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from qlora_exp.errors import RecordError
from qlora_exp.paths import RunPaths, StudyPaths
from qlora_exp.records import from_dict, write_json


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


def record_digest(paths: RunPaths) -> str:
    return file_digest(paths.record)


def file_digest(*files: Path) -> str:
    """SHA-256 over the files' contents; one that is missing counts as empty."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()
