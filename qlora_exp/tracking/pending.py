"""One line about what MLflow has not received, with the command that delivers it. Reads local files, not MLflow.

It covers a study's runs and its parent run. A run that another process is delivering now doesn't count.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qlora_exp.errors import RecordError
from qlora_exp.paths import OutputPaths, RunPaths, StudyPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.redaction import REDACTED
from qlora_exp.tracking.state import TrackingState, read_state, record_digest

DEFAULT_OUTPUT_ROOT = "outputs"
NOT_DELIVERED_YET = "not delivered yet"
"""The error in ``tracking.json`` while a delivery is under way. It stays there if the process is killed."""
REASON_CHARACTERS = 160


def not_delivered(
    output: OutputPaths, run_ids: Iterable[str], study: str | None = None, busy: bool = False
) -> str | None:
    """Return one line for the user; ``None``: MLflow has everything, or tracking is off.

    ``busy``: a process works on the study and may be delivering, so only failed deliveries count.
    """
    states = [state for run_id in run_ids if (state := _missing_run(output.run(run_id), busy)) is not None]
    parent = _missing_study(output.study(study), busy) if study is not None else None
    if not states and parent is None:
        return None
    missing = [f"{len(states)} run{'s' if len(states) > 1 else ''}"] if states else []
    missing += ["the study's parent run"] if parent is not None else []
    reasons = [
        state.error for state in (*states, parent) if state is not None and state.error not in (None, NOT_DELIVERED_YET)
    ]
    why = f" ({_cause(str(reasons[-1]))})" if reasons else ""
    uris = [state.uri for state in (*states, parent) if state is not None]
    return f"MLflow lacks {' and '.join(missing)}{why}. To deliver: {sync_command(output, uris)}"


def sync_command(output: OutputPaths, uris: Iterable[str] = ()) -> str:
    """Return the command for the current folder. The user has to add a URI's password, which no file keeps."""
    redacted_uri = next((uri for uri in uris if REDACTED in uri), None)
    uri_option = (
        f" --uri {shlex.quote(redacted_uri)} (with the password in place of {REDACTED})" if redacted_uri else ""
    )
    return f"qlora-exp sync{root_option(output)}{uri_option}"


def root_option(output: OutputPaths) -> str:
    """Return `` --output-root DIR``, or "" for the default of the current folder."""
    default = output.root == Path(DEFAULT_OUTPUT_ROOT).absolute()
    return "" if default else f" --output-root {shlex.quote(str(output.root))}"


def _missing_run(paths: RunPaths, busy: bool) -> TrackingState | None:
    """Return the state of an ended run that MLflow lacks wholly or in part; ``None``: nothing is missing."""
    try:
        record = read_record(paths.record)
        digest = record_digest(paths)
    except (OSError, RecordError):
        return None
    tracking: dict[str, Any] = record.config.get("tracking") or {}
    if not record.status.ended or not tracking.get("enabled", True):
        return None
    state = read_state(paths)
    if state is not None and state.delivered and (busy or state.record_digest == digest):
        return None
    failed = state is not None and state.error not in (None, NOT_DELIVERED_YET)
    if busy and not failed:
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
