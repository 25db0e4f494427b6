"""A study's workers carried by a launcher that has processes of its own."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import cloudpickle
import psutil
import pytest

from qlora_exp.errors import ConfigError, Problems
from qlora_exp.orchestration.command import study_spec
from qlora_exp.orchestration.hydra_app import run_job
from qlora_exp.orchestration.sweep import jobs_of
from qlora_exp.runs.process import ExitCode
from tests.faults.sweeps import (
    SLEEP,
    Sweep,
    finish,
    multirun,
    optuna_states,
    records,
    survivors,
    trials,
    wait_until,
)

JOBLIB = ("hydra/launcher=joblib", "workers.jobs=2", "sweep.name=carried")


def owners(root: Path) -> set[int]:
    """Processes of the workers that claimed the trials so far."""
    if not (root / "optuna.db").exists():
        return set()
    with sqlite3.connect(f"file:{root / 'optuna.db'}?mode=ro", uri=True) as database:
        query = "select json_extract(value_json, '$.owner.process.pid') from trial_user_attributes where key = 'claim'"
        try:
            return {pid for (pid,) in database.execute(query) if pid is not None}
        except sqlite3.OperationalError:  # its tables are being made
            return set()


def in_session(process: psutil.Process, leader: int) -> bool:
    try:
        return os.getsid(process.pid) == leader and process.pid != leader
    except (ProcessLookupError, PermissionError):
        return False


@pytest.mark.long
def test_two_workers_that_joblib_carries_share_one_study(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    told = finish(multirun(root, "lora.r=1,2,4,8,16,32", *SLEEP, "training.sleep_seconds=2", *JOBLIB))
    assert "Traceback" not in told
    assert [(row["lora.r"], row["status"]) for row in trials(root, "carried")] == [
        (str(2**number), "COMPLETED") for number in range(6)
    ]
    assert sorted(record["trial"]["number"] for record in records(root)) == list(range(6))
    assert len(owners(root)) == 2
    assert not survivors(root)


@pytest.mark.faults
def test_after_a_carried_worker_was_killed_the_same_command_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    command = multirun(root, "lora.r=1,2,4,8", *SLEEP, "training.sleep_seconds=2", *JOBLIB)
    killed = Sweep(command)
    wait_until(lambda: len(owners(root)) == 2 or not killed.alive, "no two workers")
    psutil.Process(min(owners(root))).kill()
    code, told = killed.wait()
    assert code == 1
    assert "Traceback" not in told
    assert "qlora-exp resume carried" in told
    wait_until(lambda: not survivors(root), "processes outlive their parent", seconds=30)
    finish(command)
    assert optuna_states(root) == ["COMPLETE"] * 4
    assert sorted(record["trial"]["number"] for record in records(root)) == list(range(4))
    assert [record["status"] for record in records(root)] == ["COMPLETED"] * 4


@pytest.mark.faults
def test_joblibs_processes_end_after_their_work_when_the_controller_was_killed(tmp_path: Path) -> None:
    """joblib itself would keep them for five minutes."""
    root = tmp_path / "outputs"
    killed = Sweep(multirun(root, "lora.r=1,2,4,8", *SLEEP, "training.sleep_seconds=2", *JOBLIB))
    wait_until(lambda: len(owners(root)) == 2 or not killed.alive, "no two workers")
    group = [process for process in psutil.process_iter() if in_session(process, killed.process.pid)]
    killed.kill()
    assert any("loky" in " ".join(process.cmdline()) for process in group if process.is_running())
    _, alive = psutil.wait_procs(group, timeout=90)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert optuna_states(root) == ["COMPLETE"] * 4


@pytest.mark.parametrize(
    "thing", [ExitCode(2), ConfigError("what", "where", "do"), Problems([ConfigError("a", "b", "c")])]
)
def test_how_a_worker_ends_survives_the_way_back(thing: BaseException) -> None:
    back = cloudpickle.loads(cloudpickle.dumps(thing))
    assert type(back) is type(thing)
    assert str(back) == str(thing)
    assert vars(back) == vars(thing) or isinstance(thing, Problems)


def test_what_a_launcher_carries_can_be_pickled(tmp_path: Path) -> None:
    asked = study_spec(["lora.r=4,8", "training.engine=sleep", f"output_root={tmp_path}"])
    from qlora_exp.config.compose import compose_raw

    carried = (run_job, jobs_of(asked), compose_raw(["training.engine=sleep"]))
    task, jobs, config = cloudpickle.loads(cloudpickle.dumps(carried))
    assert task is run_job
    assert jobs == carried[1]
    assert config == carried[2]
