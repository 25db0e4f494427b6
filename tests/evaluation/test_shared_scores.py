"""Scores that several runs share are computed by one process, even if it is killed; the others wait for them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qlora_exp.evaluation.shared_scores import Wait, cached
from qlora_exp.paths import OutputPaths
from qlora_exp.records.find import read_runs
from tests import processes
from tests.test_run import local, overrides

PROCESS = """
import json, os, sys, time
from pathlib import Path
from qlora_exp.evaluation import shared_scores
from qlora_exp.system.signals import signals_as_interrupts

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
shared_scores.SIGN_SECONDS = 0.1
signs = 0

def sign():
    global signs
    signs += 1
    (folder / f"waits.{os.getpid()}").touch()

def compute():
    (folder / f"computes.{os.getpid()}").touch()
    time.sleep(seconds)
    return {"by": os.getpid()}

def save(path, value):
    path.write_text(json.dumps(value))

wait = shared_scores.Wait(sign)
try:
    with signals_as_interrupts():
        found = shared_scores.cached(folder, "key", lambda path: json.loads(path.read_text()), compute, save, wait)
except KeyboardInterrupt:
    print(json.dumps({"interrupted": True, "waited": wait.seconds}))
else:
    print(json.dumps({**found, "waited": wait.seconds, "signs": signs}))
"""


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    return dict(json.loads(process.communicate(timeout=120)[0]))


def until(folder: Path, pattern: str, count: int = 1) -> list[Path]:
    while len(found := list(folder.glob(pattern))) < count:
        time.sleep(0.01)
    return found


def test_of_processes_that_start_at_once_one_computes_and_the_others_wait(tmp_path: Path) -> None:
    results = [result(process) for process in [start(tmp_path, 1.0) for _ in range(4)]]
    [computed] = tmp_path.glob("computes.*")
    assert {found["by"] for found in results} == {int(computed.suffix[1:])}
    waited = [found for found in results if found["waited"] > 0]
    assert len(waited) == len(list(tmp_path.glob("waits.*")))
    assert all(found["signs"] >= 1 for found in waited)


def test_a_waiting_process_takes_over_from_a_killed_one(tmp_path: Path) -> None:
    holder = start(tmp_path, 600.0)
    until(tmp_path, "computes.*")
    waiting = [start(tmp_path, 0.1) for _ in range(2)]
    until(tmp_path, "waits.*", 2)
    holder.kill()
    holder.communicate()
    by = {result(process)["by"] for process in waiting}
    assert len(by) == 1
    assert by <= {process.pid for process in waiting}


def test_a_signal_ends_the_wait_and_leaves_the_computation_alone(tmp_path: Path) -> None:
    holder = start(tmp_path, 2.0)
    until(tmp_path, "computes.*")
    waiting = start(tmp_path, 0.0)
    until(tmp_path, "waits.*")
    waiting.send_signal(signal.SIGTERM)
    stopped = result(waiting)
    assert stopped["interrupted"]
    assert stopped["waited"] > 0
    assert holder.poll() is None
    assert result(holder)["by"] == holder.pid


def test_a_damaged_result_is_computed_again(tmp_path: Path) -> None:
    (tmp_path / "key.json").write_text('{"by": 1')
    found = result(start(tmp_path, 0.0))
    assert json.loads((tmp_path / "key.json").read_text()) == {"by": found["by"]}
    assert found["waited"] == 0


def test_where_files_can_not_be_locked_each_process_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    found = cached(tmp_path, "key", lambda path: path.read_text(), lambda: "new", lambda path, text: None, Wait())
    assert found == "new"


def test_runs_that_start_at_once_score_the_base_model_once(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    task = local(tiny_models["llama"], colour_task)
    settings = ["tracking=off", "training.max_steps=1", "evaluation.generate=false", "evaluation.forgetting=false"]
    command = [sys.executable, "-m", "qlora_exp.cli", "run", *overrides(tmp_path / "outputs", *task, *settings)]
    runs = [processes.Popen([*command, f"seed={seed}"], stdout=subprocess.DEVNULL) for seed in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    speeds = [record.speed for record in read_runs(OutputPaths.of(str(tmp_path / "outputs")))[0]]
    assert sorted(speed.base_scores_cached for speed in speeds) == [False, True, True]
    for speed in speeds:
        assert speed.waiting_seconds is not None
        assert speed.total_seconds is not None
        assert (speed.base_evaluation_seconds or 0.0) + speed.waiting_seconds <= speed.total_seconds
