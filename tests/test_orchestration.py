"""Who holds a study, when nobody can be asked: holders on other machines, in other containers, with other clocks."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_exp.cli import main
from qlora_exp.orchestration.command import SweepCommand, study_spec
from qlora_exp.orchestration.orchestrator import orchestrating
from qlora_exp.orchestration.sweep import run_sweep
from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.records.files import write_json
from qlora_exp.records.types import Process
from qlora_exp.study.spec import read_spec, write_spec
from qlora_exp.system.environment import is_alive, process_identity
from qlora_exp.system.orchestrator_lease import Lease, read_lease, write_lease
from tests.workers.small_study import workers_of

SLEEP = ["training.engine=sleep", "training.sleep_seconds=0.1", "tracking=off"]
COMMAND = ["lora.r=4,8", "sweep.name=held", *SLEEP, "workers.lease_seconds=5", "workers.heartbeat_seconds=0.5"]
ELSEWHERE = Process(12, 1, "another boot", "pod-a")
SKEWS = {"right": 0.0, "an hour fast": 3600.0, "an hour slow": -3600.0}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def hydra(*arguments: str) -> int:
    from qlora_exp.orchestration.hydra_app import main as application

    return application(["-m", *arguments])


def held_by(process: Process = ELSEWHERE, lease_seconds: float = 1.0, heartbeat_seconds: float = 0.2) -> StudyPaths:
    paths = OutputPaths.of("outputs").study("held")
    write_lease(paths.orchestrator, Lease(process, lease_seconds, heartbeat_seconds))
    return paths


@contextlib.contextmanager
def beating(paths: StudyPaths, skew_seconds: float = 0.0) -> Iterator[None]:
    """A holder that lives, its machine's clock wrong by ``skew_seconds``."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.1):
            moment = time.time() + skew_seconds
            os.utime(paths.orchestrator, (moment, moment))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("skew_seconds", SKEWS.values(), ids=SKEWS)
def test_a_holder_elsewhere_that_gives_no_sign_of_life_is_replaced_by_the_same_command(
    skew_seconds: float, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = held_by()
    moment = time.time() + skew_seconds
    os.utime(paths.orchestrator, (moment, moment))
    assert hydra(*COMMAND) == 0
    assert "2 of 2 trials done" in capsys.readouterr().out
    assert not paths.orchestrator.exists()


@pytest.mark.parametrize("skew_seconds", SKEWS.values(), ids=SKEWS)
def test_a_holder_elsewhere_that_lives_keeps_its_study_whatever_its_clock_says(
    skew_seconds: float, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = held_by()
    with beating(paths, skew_seconds):
        assert hydra(*COMMAND) == 2
    told = capsys.readouterr().err
    assert "process 12 on pod-a" in told
    assert "--join" in told
    lease = read_lease(paths.orchestrator)
    assert lease is not None
    assert lease.process == ELSEWHERE


def test_stop_and_join_lead_out_of_a_study_whose_holder_is_gone(capsys: pytest.CaptureFixture[str]) -> None:
    paths = held_by()
    write_json(paths.stop, {"mode": "gracefully"})  # somebody has asked the dead holder to stop
    assert hydra(*COMMAND, "sweep.join=true") == 0
    assert "2 of 2 trials done" in capsys.readouterr().out
    assert not paths.orchestrator.exists()


def test_a_study_that_is_being_stopped_is_not_joined(capsys: pytest.CaptureFixture[str]) -> None:
    paths = held_by()
    write_json(paths.stop, {"mode": "gracefully"})
    with beating(paths):
        assert hydra(*COMMAND, "sweep.join=true") == 2
    assert "is being stopped" in capsys.readouterr().err


def test_whoever_shares_a_study_concludes_it_when_the_holder_is_gone() -> None:
    paths = held_by(lease_seconds=1.0)
    command = [text for text in COMMAND if text != "tracking=off"]
    assert hydra(*command, "sweep.join=true") == 0
    with sqlite3.connect("mlflow.db") as database:
        assert [status for (status,) in database.execute("select status from runs")] == ["FINISHED"] * 3
    assert not paths.orchestrator.exists()


def test_status_and_stop_tell_a_holder_that_is_gone_from_one_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra(*COMMAND, "sweep.n_trials=1") == 0
    paths = held_by(lease_seconds=60.0)
    write_spec(replace(read_spec(paths), n_trials=2), paths)  # one is left to do
    capsys.readouterr()
    assert main(["status", "held"]) == 0
    assert "worked on by process 12 on pod-a" in capsys.readouterr().out
    assert main(["stop", "held"]) == 0
    paths.stop.unlink()
    earlier = time.time() - 61.0
    os.utime(paths.orchestrator, (earlier, earlier))
    capsys.readouterr()
    assert main(["status", "held"]) == 0
    assert "no process works on it" in capsys.readouterr().out
    assert main(["stop", "held"]) == 2
    assert "no process works on the study" in capsys.readouterr().err


def test_a_holder_that_was_replaced_while_it_slept_leaves_the_study_to_its_successor() -> None:
    paths = OutputPaths.of("outputs").study("held")
    workers = workers_of(heartbeat_seconds=0.05, lease_seconds=0.2)
    with orchestrating(paths, "held", join=False, workers=workers) as duty:
        assert duty.held
        held_by(replace(process_identity(), pid=os.getppid(), start_ticks=None))
        until = time.monotonic() + 10
        while duty.held and time.monotonic() < until:
            time.sleep(0.02)
        assert not duty.held
    lease = read_lease(paths.orchestrator)
    assert lease is not None
    assert lease.process.pid == os.getppid()


def test_a_process_of_another_container_with_this_host_name_cannot_be_seen() -> None:
    me = process_identity()
    assert is_alive(me)
    assert is_alive(replace(me, pid_namespace="pid:[1]")) is None


class WorkerLost(Exception):
    """As joblib's and submitit's for a job that was killed."""


def then_lost(asked: SweepCommand) -> Callable[[list[list[str]]], Sequence[Any]]:
    from qlora_exp.orchestration.worker import run_worker

    def launch(jobs: list[list[str]]) -> Sequence[Any]:
        run_worker(asked.spec, asked.paths, asked.workers)
        raise WorkerLost("a worker process was terminated: SIGKILL(-9)")

    return launch


def test_a_study_that_is_complete_although_a_worker_was_lost_ends_with_its_conclusion(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = study_spec(COMMAND)
    assert run_sweep(asked, then_lost(asked)) == 0
    told = capsys.readouterr()
    assert "2 of 2 trials done" in told.out
    assert "lost a worker" in told.err
    assert "error" not in told.err


def test_a_lost_worker_with_trials_left_is_an_error_that_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def launch(jobs: list[list[str]]) -> Sequence[Any]:
        raise WorkerLost("killed")

    assert run_sweep(study_spec(COMMAND), launch) == 1
    assert "qlora-exp resume held" in capsys.readouterr().err
