"""Sweeps on a real Slurm and a real Ray cluster, with PostgreSQL and MLflow's server. Something is killed in each;
afterwards there are the trials that were asked for, none runs, and the best one is the same."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.services import Ray, Slurm, TrackingServer, has_slurm
from tests.faults.sweeps import Sweep, finish, multirun, records, trials, verb, wait_until
from tests.faults.test_postgres import Server, program

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(program("initdb") is None or program("postgres") is None, reason="no PostgreSQL server here"),
]
needs_slurm = pytest.mark.skipif(
    not has_slurm() or importlib.util.find_spec("submitit") is None, reason="Slurm isn't installed, or this isn't root"
)
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray isn't installed")

SPACE = ("lora.r=1,2,4,8", "seed=1,2", "sweep.name=shared", "training.engine=sleep")
LEASE = ("workers.lease_seconds=8", "workers.heartbeat_seconds=1", "sweep.max_attempts=20")
SLURM = ("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1")
OTHERS = ("run_id", "seconds", "attempt")
"""Columns in which two honest sweeps differ."""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    made = Slurm()
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Ray]:
    made = Ray()
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="qlora-exp-postgres-"))
    server = Server(folder)
    try:
        server.start()
        monkeypatch.setenv("QLORA_EXP_STORAGE", server.url)
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def results(root: Path) -> list[dict[str, str]]:
    rows = trials(root, "shared")
    return [{key: value for key, value in row.items() if key not in OTHERS} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Results of the same sweep in one process, in SQLite."""
    root = tmp_path_factory.mktemp("undisturbed") / "outputs"
    finish(multirun(root, *SPACE, "training.sleep_seconds=0.1", "tracking=off"))
    return results(root)


def check(root: Path, code: int, text: str, undisturbed: list[dict[str, str]]) -> None:
    assert code == 0, text
    assert "Traceback" not in text
    assert "8 of 8 trials done" in text
    assert results(root) == undisturbed
    assert sorted(record["trial"]["number"] for record in records(root)) == list(range(8))
    assert {record["status"] for record in records(root)} == {"COMPLETED"}


def begun(root: Path, number: int, sweep: Sweep) -> None:
    wait_until(lambda: len(records(root)) >= number or not sweep.alive, f"not {number} trials begin")
    assert sweep.alive, sweep.wait()[1]


def workers(cluster: Ray) -> list[psutil.Process]:
    """Ray's processes that run a worker: those that have a trial process."""
    from tests.cluster.services import children

    found = [process for node in cluster.nodes for process in children(node.pid)]
    return [process for process in found if process.name().startswith("ray::") and process.children()]


def on_ray(cluster: Ray, *overrides: str) -> tuple[str, ...]:
    address = f"hydra.launcher.ray.init.address={cluster.address}"
    return (*SPACE, *LEASE, "hydra/launcher=ray_cluster", address, "workers.jobs=2", *overrides)


@needs_ray
def test_ray_a_killed_worker_and_a_restarted_database_cost_nothing(
    tmp_path: Path, database: Server, ray_cluster: Ray, undisturbed: list[dict[str, str]]
) -> None:
    root = tmp_path / "outputs"
    sweep = Sweep(multirun(root, *on_ray(ray_cluster, "training.sleep_seconds=4", "tracking=off")))
    begun(root, 2, sweep)
    wait_until(lambda: len(workers(ray_cluster)) == 2, "no two workers", seconds=60)
    workers(ray_cluster)[0].kill()
    database.stop()
    time.sleep(1)
    database.start()
    check(root, *sweep.wait(), undisturbed)


@needs_ray
def test_ray_a_killed_node_costs_nothing(
    tmp_path: Path, database: Server, ray_cluster: Ray, undisturbed: list[dict[str, str]]
) -> None:
    root = tmp_path / "outputs"
    sweep = Sweep(multirun(root, *on_ray(ray_cluster, "training.sleep_seconds=3", "tracking=off")))
    begun(root, 2, sweep)
    ray_cluster.kill_node()
    try:
        check(root, *sweep.wait(), undisturbed)
    finally:
        ray_cluster.add_node()


@needs_ray
def test_ray_after_the_driver_was_killed_the_same_command_goes_on_and_mlflow_has_all_after_it_was_down(
    tmp_path: Path, database: Server, ray_cluster: Ray, undisturbed: list[dict[str, str]]
) -> None:
    root, served = tmp_path / "outputs", TrackingServer(tmp_path)
    served.start()
    try:
        command = multirun(root, *on_ray(ray_cluster, "training.sleep_seconds=3", f"tracking.uri={served.uri}"))
        killed = Sweep(command)
        begun(root, 2, killed)
        killed.kill()
        again = Sweep(command)
        wait_until(lambda: len(records(root)) >= 5 or not again.alive, "not five trials begin")
        served.stop()
        check(root, *again.wait(), undisturbed)
        served.start()
        finish(verb(root, "sync"))
    finally:
        served.stop()
    with sqlite3.connect(tmp_path / "served.db") as runs:
        assert [status for (status,) in runs.execute("select status from runs")] == ["FINISHED"] * 9


@needs_ray
def test_ray_that_does_not_answer_is_one_clear_message(tmp_path: Path) -> None:
    address = ("hydra/launcher=ray_cluster", "hydra.launcher.ray.init.address=127.0.0.1:1")
    text = finish(multirun(tmp_path / "outputs", *SPACE, *address), code=2)
    assert "no Ray cluster answers at 127.0.0.1:1" in text
    assert "Traceback" not in text


@needs_slurm
def test_slurm_a_cancelled_worker_costs_nothing(
    tmp_path: Path, database: Server, slurm: Slurm, undisturbed: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    root = tmp_path / "outputs"
    overrides = (*SPACE, *LEASE, *SLURM, "workers.jobs=2", "training.sleep_seconds=4", "tracking=off")
    sweep = Sweep(multirun(root, *overrides))
    begun(root, 2, sweep)
    running = sorted(job for job, state in slurm.jobs().items() if state == "RUNNING")
    assert len(running) == 2
    slurm.command("scancel", running[1])
    code, text = sweep.wait()
    check(root, code, text, undisturbed)
    assert not slurm.jobs()


@needs_slurm
def test_slurm_requeues_a_worker_after_its_time(
    tmp_path: Path, database: Server, slurm: Slurm, undisturbed: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    root = tmp_path / "outputs"
    limits = ("hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=10")
    sweep = Sweep(multirun(root, *SPACE, *LEASE, *SLURM, *limits, "training.sleep_seconds=8", "tracking=off"))
    code, text = sweep.wait()
    check(root, code, text, undisturbed)
    logs = [file.read_text(errors="replace") for file in root.rglob("*_log.*")]
    assert any("DUE TO JOB REQUEUE" in log or "Requeued job" in log for log in logs), logs


CHECKED = ("workers", "shared files", "file locks", "versions", "clocks", "storage", "tracking")


def doctor(root: Path, *overrides: str, code: int = 0) -> dict[str, str]:
    command = verb(root, "doctor", "--cluster", "--json", "workers.jobs=1", *overrides)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return {row["check"]: row["result"] for row in json.loads(done.stdout)}


@needs_slurm
def test_doctor_checks_what_slurms_workers_share(
    tmp_path: Path, database: Server, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    away = ("tracking.uri=http://127.0.0.1:9",)
    found = doctor(tmp_path / "outputs", *SLURM, *away, code=1)
    assert found == {**dict.fromkeys(CHECKED, "ok"), "tracking": "problem"}


@needs_ray
def test_doctor_checks_what_rays_workers_share(tmp_path: Path, database: Server, ray_cluster: Ray) -> None:
    address = f"hydra.launcher.ray.init.address={ray_cluster.address}"
    found = doctor(tmp_path / "outputs", "hydra/launcher=ray_cluster", address)
    assert found == dict.fromkeys(CHECKED, "ok")
