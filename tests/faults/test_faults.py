"""What goes wrong on real machines, done on purpose: each fault costs its own trial at most."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.sweeps import (
    SLEEP,
    Sweep,
    finish,
    mlflow_statuses,
    multirun,
    optuna_states,
    records,
    survivors,
    trials,
    verb,
    wait_until,
)

pytestmark = pytest.mark.faults


def by_fault(root: Path, study: str) -> dict[str, str]:
    return {row["training.sleep_fault"]: row["status"] for row in trials(root, study)}


def test_every_fault_is_told_as_what_it_was_and_the_sweep_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    finish(
        multirun(
            root,
            "training.sleep_fault=none,out_of_memory,diverge,fail,crash,hang",
            *SLEEP,
            "sweep.name=faults",
            "sweep.max_failures=null",
            "sweep.max_attempts=2",
            "workers.hang_seconds=3",
        )
    )
    assert by_fault(root, "faults") == {
        "none": "COMPLETED",
        "out_of_memory": "OUT_OF_MEMORY",
        "diverge": "DIVERGED",
        "fail": "FAILED",
        "crash": "FAILED",
        "hang": "FAILED",
    }
    told = {record["config"]["training"]["sleep_fault"]: record["failure"] for record in records(root)}
    assert told["none"] is None
    assert "SIGKILL" in told["crash"]["message"]
    assert "sent nothing for 3 s" in told["hang"]["message"]
    # Out of memory and divergence teach the sampler: infeasible points, not failures that it never hears of.
    assert sorted(optuna_states(root)) == ["COMPLETE", "FAIL", "FAIL", "FAIL", "PRUNED", "PRUNED"]
    assert not survivors(root)


def test_a_hung_host_leaves_a_stack_dump(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    finish(
        multirun(
            root, "training.sleep_fault=hang", "seed=1,2", *SLEEP, "sweep.name=hang", "sweep.max_failures=null",
            "sweep.max_attempts=1", "workers.hang_seconds=2",
        ),
        code=1,
    )  # fmt: skip
    logs = "".join(path.read_text() for path in (root / "studies" / "hang" / "logs").iterdir())
    assert "most recent call first" in logs


def test_out_of_memory_is_retried_with_half_the_micro_batch_where_asked(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    finish(
        multirun(
            root, "training.sleep_fault=out_of_memory", "seed=1,2", *SLEEP, "sweep.name=memory",
            "training.batch_size=16", "sweep.out_of_memory_retries=1",
        )
    )  # fmt: skip
    for record in records(root):
        assert record["status"] == "COMPLETED"
        assert record["config"]["training"]["micro_batch_size"] == 8
        assert record["config"]["training"]["batch_size"] == 16
        assert [failure["kind"] for failure in record["earlier_failures"]] == ["MemoryError"]
        assert any("micro-batches of 16" in warning for warning in record["warnings"])


@pytest.mark.parametrize(("limit", "started"), [("2", 2), ("0.5", 4)])
def test_a_sweep_stops_at_too_many_failures(tmp_path: Path, limit: str, started: int) -> None:
    root = tmp_path / "outputs"
    text = finish(
        multirun(
            root, "training.sleep_fault=fail", "seed=1,2,3,4,5,6,7,8", *SLEEP, "sweep.name=failing",
            f"sweep.max_failures={limit}",
        ),
        code=1,
    )  # fmt: skip
    assert len(records(root)) == started
    assert "max_failures" in text


def test_eight_orchestrators_start_cold_on_one_fresh_study(tmp_path: Path) -> None:
    """One study, one tracking database, nothing there before: each trial once."""
    root = tmp_path / "outputs"
    command = multirun(
        root, "lora.r=1,2,4,8", "seed=1,2,3,4", "training.engine=sleep", "training.sleep_seconds=0.3",
        "sweep.name=cold", "sweep.join=true",
    )  # fmt: skip
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(8)]
    told = [process.communicate(timeout=400)[0] for process in started]
    assert [process.returncode for process in started] == [0] * 8, "\n".join(told)
    assert sorted(record["trial"]["number"] for record in records(root)) == list(range(16))
    assert optuna_states(root) == ["COMPLETE"] * 16
    assert mlflow_statuses(root) == ["FINISHED"] * 17


def test_a_second_orchestrator_is_told_at_once_who_works_on_the_study(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    command = multirun(
        root, "seed=1,2,3,4", "training.engine=sleep", "training.sleep_seconds=3", "tracking=off", "sweep.name=held"
    )
    first = Sweep(command)
    wait_until(lambda: bool(records(root)), "no trial begins")
    text = finish(command, code=2)
    assert str(first.process.pid) in text
    assert "join" in text
    code, text = first.wait()
    assert code == 0, text
    assert len(records(root)) == 4


def test_stop_lets_running_trials_end_and_resume_does_the_rest(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    command = multirun(
        root,
        "seed=1,2,3,4,5,6",
        "training.engine=sleep",
        "training.sleep_seconds=1.5",
        "tracking=off",
        "sweep.name=stopped",
    )
    sweep = Sweep(command)
    wait_until(lambda: bool(records(root)), "no trial begins")
    finish(verb(root, "stop", "stopped"))
    sweep.wait()
    ended = [record["status"] for record in records(root)]
    assert set(ended) == {"COMPLETED"}
    assert 1 <= len(ended) < 6
    finish(verb(root, "resume", "stopped"))
    assert optuna_states(root) == ["COMPLETE"] * 6


def test_interrupted_by_the_keyboard_it_saves_says_how_to_go_on_and_leaves_nothing_running(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    command = multirun(root, "seed=1,2,3", "training.engine=sleep", "training.sleep_seconds=3", "sweep.name=ctrl-c")
    sweep = Sweep(command)
    wait_until(lambda: bool(records(root)), "no trial begins")
    time.sleep(1.0)
    os.killpg(sweep.process.pid, signal.SIGINT)
    code, text = sweep.wait()
    assert code == 130, text
    assert "qlora-exp resume ctrl-c" in text
    assert "RUNNING" not in optuna_states(root)
    assert "RUNNING" not in mlflow_statuses(root)
    assert not survivors(root)
    finish(verb(root, "resume", "ctrl-c"))
    assert optuna_states(root) == ["COMPLETE"] * 3
    assert set(mlflow_statuses(root)) == {"FINISHED"}


@pytest.mark.parametrize("damage", ["truncated", "garbled", "empty"])
def test_a_damaged_study_database_is_told_and_rebuilt_from_the_records(tmp_path: Path, damage: str) -> None:
    root = tmp_path / "outputs"
    command = multirun(root, "seed=1,2,3", *SLEEP, "sweep.name=damaged")
    finish(command)
    before = trials(root, "damaged")
    for file in root.glob("optuna.db*"):
        data = file.read_bytes()
        if file.name == "optuna.db":
            damaged = {"truncated": data[: len(data) // 2], "garbled": os.urandom(len(data)), "empty": b""}[damage]
            file.write_bytes(damaged)
        else:
            file.unlink()
    if damage != "empty":  # SQLite takes an empty file for a new database
        text = finish(command, code=2)
        assert "optuna.db" in text
        assert "--rebuild" in text
    finish(verb(root, "resume", "damaged", "--rebuild"))
    assert trials(root, "damaged") == before


def test_a_garbled_record_of_a_finished_trial_is_told_and_costs_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    finish(multirun(root, "seed=1,2,3", *SLEEP, "sweep.name=garbled"))
    victim = next(root.glob("runs/*/record.json"))
    victim.write_text('{"schema_version": 1, "run_')
    text = finish(verb(root, "ls", "runs"))
    assert victim.parent.name in text
    assert len(trials(root, "garbled")) == 3


class Hostile(http.server.BaseHTTPRequestHandler):
    answer: tuple[int, bytes] = (500, b"")

    def respond(self) -> None:
        code, body = self.answer
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PATCH = do_DELETE = respond

    def log_message(self, *arguments: object) -> None:
        return


@contextlib.contextmanager
def tracking_server(code: int, body: bytes) -> Iterator[str]:
    handler = type("Handler", (Hostile,), {"answer": (code, body)})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


@pytest.mark.parametrize(
    ("code", "body"),
    [
        (500, b""),
        (200, b"<html>not MLflow</html>"),
        (429, b'{"error_code": "RESOURCE_EXHAUSTED"}'),
        (200, b""),
    ],
    ids=["500", "garbage", "429", "nothing"],
)
def test_a_hostile_tracking_server_costs_a_sweep_nothing_and_sync_delivers_later(
    tmp_path: Path, code: int, body: bytes
) -> None:
    root = tmp_path / "outputs"
    with tracking_server(code, body) as uri:
        finish(
            multirun(
                root, "seed=1,2", "training.engine=sleep", "training.sleep_seconds=0.3", "sweep.name=hostile",
                f"tracking.uri={uri}", "tracking.timeout_seconds=1",
            )
        )  # fmt: skip
    assert [record["status"] for record in records(root)] == ["COMPLETED"] * 2
    database = tmp_path / "later.db"
    finish(verb(root, "sync", "--uri", f"sqlite:///{database}"))
    import sqlite3

    with sqlite3.connect(database) as later:
        assert [status for (status,) in later.execute("select status from runs")] == ["FINISHED"] * 3


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system of its own needs root")
def test_a_full_disk_pauses_the_sweep_and_space_lets_it_go_on(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this container may not mount a tmpfs")
    try:
        root = disk / "outputs"
        ballast = disk / "ballast"
        sweep = Sweep(
            multirun(
                root,
                "seed=1,2,3,4",
                "training.engine=sleep",
                "training.sleep_seconds=2",
                "tracking=off",
                "sweep.name=full",
            )
        )
        wait_until(lambda: len(records_readable(root)) >= 1, "no trial begins")
        with contextlib.suppress(OSError), ballast.open("wb") as stream:
            while True:
                stream.write(b"\0" * 4096)
        time.sleep(6.0)
        assert sweep.alive, sweep.wait()[1]
        ballast.unlink()
        code, text = sweep.wait()
        assert code == 0, text
        assert "disk" in text or "space" in text
        assert [record["status"] for record in records(root)] == ["COMPLETED"] * 4
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def records_readable(root: Path) -> list[object]:
    found = []
    for path in root.glob("runs/*/record.json"):
        with contextlib.suppress(ValueError):
            found.append(json.loads(path.read_text()))
    return found


def test_a_wrong_point_anywhere_in_the_grid_ends_the_sweep_before_its_first_trial(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    text = finish(multirun(root, "lora.r=4,8,-1", *SLEEP, "sweep.name=wrong"), code=2)
    assert "lora.r" in text
    assert not root.exists() or not list(root.glob("runs/*"))
    assert not (root / "studies" / "wrong").exists()
