"""Readers of the output that are gone: the work goes on, and the exit code is the work's."""

from __future__ import annotations

import json
import os
import pty
import select
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

SLEEP = ["training.engine=sleep", "training.sleep_seconds=0.1", "tracking=off"]
PYTHON = shlex.quote(sys.executable)
DOORS = {
    "run": ["-m", "qlora_exp.cli", "run"],
    "sweep": ["-m", "qlora_exp", "-m", "lora.r=4,8", "sweep.name=piped"],
    "multirun": ["-m", "qlora_exp", "-m", "lora.r=4,8", "hydra/sweeper=basic"],
}
GONE = {
    "stderr": "2> >(true)",
    "stdout": "> >(true)",
    "both": "> >(true) 2>&1",
    "closed": ">&- 2>&-",
    "full": "> /dev/full 2>&1",
}


def statuses(folder: Path) -> list[str]:
    return [json.loads(file.read_text())["status"] for file in folder.glob("outputs/runs/*/record.json")]


@pytest.mark.parametrize(
    ("door", "gone"),
    [
        *(("sweep", gone) for gone in ("stderr", "both", "closed")),
        *(("run", gone) for gone in ("stdout", "full")),
        ("multirun", "both"),
    ],
)
def test_work_goes_on_when_its_readers_are_gone(tmp_path: Path, door: str, gone: str) -> None:
    command = f"sleep 0.2; {PYTHON} {shlex.join([*DOORS[door], *SLEEP])} {GONE[gone]}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(statuses(tmp_path)) == {"COMPLETED"}
    assert len(statuses(tmp_path)) == (1 if door == "run" else 2)
    with_study = list(tmp_path.glob("outputs/optuna.db"))
    for database in with_study:  # whole: nothing was printed into it
        with sqlite3.connect(database) as opened:
            assert opened.execute("pragma quick_check").fetchone() == ("ok",)
    assert bool(with_study) == (door == "sweep")


def test_the_exit_code_is_the_works(tmp_path: Path) -> None:
    command = f"{PYTHON} {shlex.join([*DOORS['run'], *SLEEP, 'training.sleep_fault=fail'])} > >(true) 2>&1"
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, timeout=120).returncode == 1


def test_a_verb_that_only_prints_ends_with_its_reader(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, *DOORS["sweep"], *SLEEP], cwd=tmp_path, capture_output=True, timeout=120, check=True
    )
    command = f"sleep 0.2; {PYTHON} -m qlora_exp.cli trials piped --csv > >(true)"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", ["version", "ls models", "ls runs", "status none"])
def test_a_pipe_whose_reader_is_gone_is_no_error(words: str, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "qlora_exp.cli", *words.split()]
    done = subprocess.run(command, cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    wrong_input = words == "status none"
    assert (done.returncode, bool(done.stderr)) == ((2, True) if wrong_input else (0, False)), done.stderr


@pytest.mark.parametrize("door", DOORS)
def test_a_closed_terminal_is_a_polite_end(tmp_path: Path, door: str) -> None:
    """Saved, given back, told to MLflow as ended; the exit code is that of Ctrl-C."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may have been started by nohup
        os.execv(sys.executable, [sys.executable, *DOORS[door], "training.engine=sleep", "training.sleep_seconds=60"])
    shown, until = b"", time.monotonic() + 120
    while b"train" not in shown and time.monotonic() < until:
        if select.select([terminal], [], [], 0.5)[0]:
            shown += os.read(terminal, 65536)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.WIFEXITED(status), f"ended by signal {os.WTERMSIG(status)}"
    assert os.WEXITSTATUS(status) == 130
    assert statuses(tmp_path) == ["INTERRUPTED"]
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert {status for (status,) in database.execute("select status from runs")} == {"KILLED"}
    if door == "sweep":
        with sqlite3.connect(tmp_path / "outputs" / "optuna.db") as database:
            assert database.execute("select state from trials").fetchall() == [("WAITING",)]
            uncounted = "select value_json from trial_user_attributes where key = 'interrupted_attempts'"
            assert database.execute(uncounted).fetchall() == [("1",)]
        assert not list(tmp_path.glob("outputs/studies/*/orchestrator.json"))
