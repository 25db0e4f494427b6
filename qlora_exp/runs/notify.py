"""Notifications: a command and a webhook that get a JSON object when a run or a sweep has ended.

A notification never changes how the run or the sweep ends: what goes wrong is one line on standard error.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_exp.config.schema import NotifyConfig
from qlora_exp.records.redaction import redact, redact_text
from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import RunRecord
from qlora_exp.version import __version__

RUN_ENDED, SWEEP_ENDED = "run_ended", "sweep_ended"
VARIABLES = ("event", "name", "status", "exit_code", "text", "path")
"""Keys that the command gets in its environment, too: QLORA_EXP_EVENT, QLORA_EXP_NAME …"""
SHOWN_CHARACTERS = 500
"""Of a command's error output."""


def run_notification(record: RunRecord, folder: Path, exit_code: int) -> dict[str, Any]:
    """Return what a notification says about an ended run; unknown values are ``None``."""
    scores = record.scores.test or record.scores.after
    before = record.scores.test_before if record.scores.test is not None else record.scores.before
    names = ("split", "items", "loss", "accuracy", "exact_match")
    changes = [
        f"{name} {getattr(before, name):.3f} → {getattr(scores, name):.3f}"
        for name in ("accuracy", "exact_match", "loss")
        if getattr(scores, name, None) is not None and getattr(before, name, None) is not None
    ]
    reason = record.failure.message.splitlines()[0] if record.failure is not None and record.failure.message else None
    return {
        "event": RUN_ENDED,
        "name": record.name,
        "status": record.status.value,
        "exit_code": exit_code,
        "text": f"run {record.name}: {record.status.value}{_after_colon(reason or ', '.join(changes[:1]))}",
        "run_id": record.run_id,
        "seconds": record.speed.total_seconds,
        "scores": {name: getattr(scores, name) for name in names} if scores is not None else None,
        "scores_before": {name: getattr(before, name) for name in names} if before is not None else None,
        "goal": to_dict(record.goal),
        "failure": reason,
        "path": str(folder),
        "host": socket.gethostname(),
        "version": __version__,
    }


def sweep_notification(
    name: str,
    status: str,
    exit_code: int | None,
    seconds: float,
    trials: Mapping[str, int],
    best: Mapping[str, Any] | None,
    folder: Path,
    report: Path | None,
    next_command: str,
) -> dict[str, Any]:
    """Return what a notification says about an ended sweep.

    ``trials``: how many have completed, failed …; ``best``: run id, values and settings of the best trial so far;
    ``report``: the report's file, if there is one already.
    """
    known = {key: value for key, value in ((best or {}).get("values") or {}).items() if value is not None}
    values = ", ".join(f"{key} {value:.4g}" for key, value in known.items())
    settings = " ".join(f"{key}={value}" for key, value in ((best or {}).get("params") or {}).items())
    counts = f"{trials['completed']} of {trials['total']} trials completed"
    return {
        "event": SWEEP_ENDED,
        "name": name,
        "status": status,
        "exit_code": exit_code,
        "text": f"sweep {name}: {status}, {counts}{_after_colon(f'best {settings}: {values}' if values else '')}",
        "seconds": seconds,
        "trials": dict(trials),
        "best": dict(best) if best is not None else None,
        "path": str(folder),
        "report": str(report) if report is not None else None,
        "next_command": next_command,
        "host": socket.gethostname(),
        "version": __version__,
    }


def notify(config: NotifyConfig | None, notification: Mapping[str, Any]) -> None:
    """Send ``notification`` to the configured command and webhook, without secrets; print what failed."""
    if config is None or (config.command is None and config.webhook is None):
        return
    content = _finite(redact(dict(notification)))
    body = json.dumps(content, ensure_ascii=False, allow_nan=False, default=str).encode("utf-8", "replace")
    with contextlib.suppress(KeyboardInterrupt):  # the second Ctrl-C: without the notification
        for key, problem in (
            ("notify.command", _run_command(config, body, content)),
            ("notify.webhook", _post(config, body)),
        ):
            if problem is not None:
                print(f"{key}: not notified: {redact_text(problem)}", file=sys.stderr, flush=True)


def _finite(value: Any) -> Any:
    """Return ``value`` with ``None`` for numbers that JSON doesn't have: a diverged loss is NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def _run_command(config: NotifyConfig, body: bytes, content: Mapping[str, Any]) -> str | None:
    """Run the command with ``body`` on standard input; return what went wrong."""
    if config.command is None:
        return None
    values = {f"QLORA_EXP_{name.upper()}": content.get(name) for name in VARIABLES}
    variables = {name: "" if value is None else str(value) for name, value in values.items()}
    try:
        # Standard output belongs to the run's results.
        process = subprocess.Popen(
            config.command,
            shell=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, **variables},
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return f"the command can't be started: {error}"
    try:
        _, errors = process.communicate(body, timeout=config.timeout_seconds)
    except subprocess.TimeoutExpired:
        _end_session(process)
        return f"the command took longer than notify.timeout_seconds={config.timeout_seconds:g}, and was ended"
    except BaseException:
        _end_session(process)
        raise
    if process.returncode == 0:
        return None
    shown = errors.decode("utf-8", "replace").strip()[-SHOWN_CHARACTERS:]
    return f"the command ended with exit code {process.returncode}{_after_colon(shown)}"


def _end_session(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stderr is not None:
        process.stderr.close()


def _post(config: NotifyConfig, body: bytes) -> str | None:
    """POST ``body`` to the webhook; return what went wrong. The URL is not part of the answer: it may be a secret."""
    url = config.webhook
    if url is None:
        return None
    problems: list[str] = []

    def post() -> None:
        headers = {"Content-Type": "application/json; charset=utf-8", "User-Agent": f"qlora-exp/{__version__}"}
        try:
            request = urllib.request.Request(url, body, headers, method="POST")
            with urllib.request.urlopen(request, timeout=config.timeout_seconds):
                pass
        except urllib.error.HTTPError as error:
            problems.append(f"the server answered {error.code} {error.reason}")
            error.close()
        except http.client.InvalidURL:
            problems.append("the URL is not valid")  # the error's text has it
        except (OSError, ValueError, http.client.HTTPException) as error:
            problems.append(str(getattr(error, "reason", error)) or type(error).__name__)

    # urllib's limit holds for each read alone: a server that sends a byte now and then would hold the run.
    thread = threading.Thread(target=post, name="webhook", daemon=True)
    thread.start()
    thread.join(config.timeout_seconds)
    if thread.is_alive():
        return f"no answer within notify.timeout_seconds={config.timeout_seconds:g}"
    return problems[0] if problems else None


def _after_colon(text: str) -> str:
    return f": {text}" if text else ""
