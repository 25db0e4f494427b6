"""What MLflow did not receive is said at the end, with a command that delivers it as it is printed."""

from __future__ import annotations

import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from qlora_exp.cli import main
from tests import processes

SLEEP = ["training.engine=sleep", "training.sleep_seconds=0.1"]
TO_DELIVER = "To deliver: "
DOORS = {"run": ["run"], "sweep": ["sweep", "rank_by_quantization", "lora.r=4,8", "quantization=nf4"]}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path / "mlflow.db")


def command_in(text: str) -> list[str]:
    [line] = [line for line in text.splitlines() if TO_DELIVER in line]
    words = shlex.split(line.partition(TO_DELIVER)[2].partition(" (with")[0])
    assert words[:2] == ["qlora-exp", "sync"]
    return words[1:]


def nobody_listens() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("root", ["outputs", "other place/out"])
@pytest.mark.parametrize("door", DOORS)
def test_artifacts_that_cannot_be_written_are_told_and_delivered_by_the_printed_command(
    door: str, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(root).parent.absolute()
    folder.mkdir(exist_ok=True)
    if folder != Path.cwd():
        shutil.copy("mlflow.db", folder)
    blocked = folder / "mlartifacts"
    blocked.write_text("a file in the folder's place: nothing can be written beneath it, not even by root")
    assert main([*DOORS[door], *SLEEP, f"output_root='{folder / 'outputs'}'", "tracking.timeout_seconds=2"]) == 0
    told = capsys.readouterr().out
    assert "MLflow lacks" in told
    if door == "sweep":
        assert main(["status", "last", "--output-root", str(folder / "outputs")]) == 0
        assert command_in(capsys.readouterr().out) == command_in(told)
    assert main(command_in(told)) == 1  # it can't be written yet
    blocked.unlink()
    assert main(command_in(told)) == 0
    capsys.readouterr()
    assert main(command_in(told)) == 0
    assert "delivered" not in capsys.readouterr().out
    with sqlite3.connect(folder / "mlflow.db") as database:
        statuses = [status for (status,) in database.execute("select status from runs")]
    assert set(statuses) == {"FINISHED"}
    if door == "sweep":
        assert main(["status", "last", "--output-root", str(folder / "outputs")]) == 0
        assert TO_DELIVER not in capsys.readouterr().out


@pytest.mark.parametrize("server", ["nobody", "401", "500", "dies"])
def test_a_server_that_takes_nothing_is_told_with_the_reason(
    server: str, capsys: pytest.CaptureFixture[str], hostile_server: Callable[[str], str]
) -> None:
    uri = nobody_listens() if server == "nobody" else hostile_server(server)
    assert main(["run", *SLEEP, f"tracking.uri={uri}", "tracking.timeout_seconds=1"]) == 0
    told = capsys.readouterr().out
    reason = {"nobody": "connection refused", "401": "401", "500": "500", "dies": "onnection"}[server]
    assert reason in next(line for line in told.splitlines() if TO_DELIVER in line)
    assert main(command_in(told)) == 1
    failed = capsys.readouterr().err
    assert "qlora-exp sync tries again" in failed
    assert main([*command_in(told), "--uri", f"sqlite:///{Path.cwd() / 'mlflow.db'}"]) == 0


def test_a_password_that_no_file_keeps_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    secret = nobody_listens().replace("://", "://ann:hunter2@")
    assert main(["run", *SLEEP, f"tracking.uri={secret}", "tracking.timeout_seconds=1"]) == 0
    told = capsys.readouterr().out
    assert "hunter2" not in told
    command = command_in(told)
    assert command[:2] == ["sync", "--uri"]
    assert command[2] == secret.replace("hunter2", "***")
    assert main(["sync"]) == 1
    assert "qlora-exp sync --uri URI" in capsys.readouterr().err


def test_a_deleted_experiment_is_restored_or_replaced_by_the_printed_hints(capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    assert main(["run", *SLEEP]) == 0
    client = MlflowClient(f"sqlite:///{Path.cwd() / 'mlflow.db'}")
    [experiment] = client.search_experiments(filter_string="name = 'qlora-exp'")
    client.delete_experiment(experiment.experiment_id)
    capsys.readouterr()
    assert main(["sync"]) == 1
    hint = capsys.readouterr().err.partition("restore it: ")[2].partition("; or use another")[0]
    assert main(["sync", "--experiment", "another"]) == 0
    variable, _, restore = hint.partition(" ")
    assert restore.startswith("mlflow experiments restore -x ")
    assert variable == f"MLFLOW_TRACKING_URI=sqlite:///{Path.cwd() / 'mlflow.db'}"
    client.restore_experiment(restore.rpartition(" ")[2])
    assert main(["sync"]) == 0


def test_without_tracking_nothing_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *SLEEP, "tracking=off"]) == 0
    assert TO_DELIVER not in capsys.readouterr().out


def test_a_second_ctrl_c_leaves_no_run_running(tmp_path: Path) -> None:
    """The trial's host can't answer the first one: the second ends it, and what it left is told to MLflow."""
    command = [sys.executable, "-m", "qlora_exp", "-m", "lora.r=4,8", *SLEEP, "training.sleep_seconds=60"]
    sweep = processes.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 120
    while not _running_in_mlflow() and time.monotonic() < until:
        time.sleep(0.1)
    children = psutil.Process(sweep.pid).children(recursive=True)
    [host] = [child for child in children if "qlora_exp.orchestration.trial_main" in " ".join(child.cmdline())]
    host.suspend()
    for _ in range(2):
        sweep.send_signal(signal.SIGINT)
        time.sleep(1.0)
    told, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 130, told
    with sqlite3.connect("mlflow.db") as database:
        assert [status for (status,) in database.execute("select status from runs")] == ["KILLED"] * 2


def _running_in_mlflow() -> bool:
    with sqlite3.connect("mlflow.db") as database:
        return len(database.execute("select 1 from runs where status = 'RUNNING'").fetchall()) == 2
