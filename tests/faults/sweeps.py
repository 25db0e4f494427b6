"""Sweeps as a person starts them: a command, its processes, and what is left when they are killed."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

SLEEP = ("training.engine=sleep", "training.sleep_seconds=0.3", "tracking=off")
PATIENCE_SECONDS = 240.0
"""How long a command may take on a busy machine before a test calls it hung."""


def multirun(root: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "qlora_exp", "-m", f"output_root={root}", *overrides]


def verb(root: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "qlora_exp.cli", *arguments, "--output-root", str(root)]


def finish(command: Sequence[str], code: int | None = 0) -> str:
    """Run a command to its end and return what it printed; its exit code must be ``code`` (``None``: any)."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert code is None or done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


class Sweep:
    """A command that runs in a session of its own, so that its processes can be found and killed."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def hosts(self) -> list[psutil.Process]:
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [child for child in children if "qlora_exp.orchestration.trial_main" in _command_of(child)]

    def kill(self) -> None:
        """SIGKILL for the controller alone: its children must notice by themselves."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=30)

    def wait(self) -> tuple[int, str]:
        try:
            text, _ = self.process.communicate(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        return self.process.returncode, text


def _command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return ""


def survivors(root: Path) -> list[str]:
    """Command lines of live processes that work under ``root``: as an argument, or by an open file."""
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        text = _command_of(process)
        if str(root) in text or ("qlora_exp.orchestration.trial_main" in text and _opened(process, root)):
            found.append(text)
    return found


def _opened(process: psutil.Process, root: Path) -> bool:
    try:
        return any(file.path.startswith(str(root)) for file in process.open_files())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def wait_until(condition: Any, what: str, seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.05)


def trials(root: Path, study: str) -> list[dict[str, str]]:
    """The study's trials as ``qlora-exp trials --csv`` prints them."""
    return list(csv.DictReader(io.StringIO(finish(verb(root, "trials", study, "--csv")))))


def what_counts(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Trials without what differs between two honest sweeps: names and durations."""
    return [{key: value for key, value in row.items() if key not in ("run_id", "seconds")} for row in rows]


def records(root: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(root.glob("runs/*/record.json"))]


def optuna_states(root: Path) -> list[str]:
    """States in the study's storage, read as any other tool would."""
    with sqlite3.connect(f"file:{root / 'optuna.db'}?mode=ro", uri=True) as database:
        return [state for (state,) in database.execute("select state from trials order by number")]


def mlflow_statuses(root: Path) -> list[str]:
    with sqlite3.connect(f"file:{root.parent / 'mlflow.db'}?mode=ro", uri=True) as database:
        return [status for (status,) in database.execute("select status from runs")]
