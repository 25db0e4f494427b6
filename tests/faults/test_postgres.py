"""A study in PostgreSQL, as machines share it that have a server in common: a real one, of this test's own."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.sweeps import Sweep, finish, multirun, records, survivors, trials, verb, wait_until

PASSWORD = "geheim4711"
PLACES = [os.environ["PATH"], *(str(folder) for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin")))]
"""Debian keeps the server's programs off the path."""


def program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join(PLACES))


pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(program("initdb") is None or program("postgres") is None, reason="no PostgreSQL server here"),
    pytest.mark.skipif(importlib.util.find_spec("psycopg") is None, reason="psycopg isn't installed"),
]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Server:
    """PostgreSQL on a free port of the loopback, with a password; it refuses to run as root, so that root lends it
    another user."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.who: dict[str, Any] = {"cwd": folder}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self.who |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        (folder / "password").write_text(PASSWORD)
        self._run("initdb", "-D", "data", "-U", "postgres", "-A", "scram-sha-256", "--pwfile=password", "--no-sync")

    def _run(self, name: str, *arguments: str) -> None:
        subprocess.run([str(program(name)), *arguments], check=True, capture_output=True, **self.who)

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://postgres:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        command = [str(program("postgres")), "-D", "data", "-p", str(self.port), "-h", "127.0.0.1", "-k", "."]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, **self.who)
        wait_until(self.answers, "the server doesn't start", seconds=60)

    def answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url.replace("+psycopg", "")).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)  # "fast": sessions end at once
        self.process.wait(timeout=60)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="qlora-exp-postgres-"))  # pytest's own folders are closed to other users
    try:
        made = Server(folder)
        made.start()
        monkeypatch.setenv("QLORA_EXP_STORAGE", made.url)
        yield made
        made.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


EIGHT = (
    *("lora.r=1,2,4,8", "seed=1,2", "training.engine=sleep", "training.sleep_seconds=1", "tracking=off"),
    *("sweep.name=served", "sweep.join=true", "sweep.max_attempts=100"),
)


def test_orchestrators_share_a_study_of_a_server_and_one_that_is_killed_costs_nothing(
    tmp_path: Path, server: Server
) -> None:
    root = tmp_path / "outputs"
    killed, other = Sweep(multirun(root, *EIGHT)), Sweep(multirun(root, *EIGHT))
    wait_until(lambda: len(records(root)) >= 2 or not killed.alive, "no two trials begin")
    killed.kill()
    code, told = other.wait()
    assert code == 0, told
    assert [row["status"] for row in trials(root, "served")] == ["COMPLETED"] * 8
    assert sorted(record["trial"]["number"] for record in records(root)) == list(range(8))
    assert not survivors(root)
    assert not (root / "optuna.db").exists()
    holding = [file for file in tmp_path.rglob("*") if file.is_file() and PASSWORD.encode() in file.read_bytes()]
    assert holding == []
    assert PASSWORD not in told


def test_a_server_that_is_restarted_costs_nothing(tmp_path: Path, server: Server) -> None:
    root = tmp_path / "outputs"
    sweep = Sweep(multirun(root, *EIGHT, "workers.count=2"))
    wait_until(lambda: len(records(root)) >= 2 or not sweep.alive, "no two trials begin")
    server.stop()
    server.start()
    code, told = sweep.wait()
    assert code == 0, told
    assert [row["status"] for row in trials(root, "served")] == ["COMPLETED"] * 8
    assert sorted(record["trial"]["number"] for record in records(root)) == list(range(8))
    assert [record["trial"]["attempt"] for record in records(root)] == [1] * 8


def test_a_server_that_stays_away_is_told_and_resume_does_the_rest(tmp_path: Path, server: Server) -> None:
    root = tmp_path / "outputs"
    sweep = Sweep(multirun(root, *EIGHT, "workers.lease_seconds=6"))
    wait_until(lambda: len(records(root)) >= 2 or not sweep.alive, "no two trials begin")
    server.stop()
    code, told = sweep.wait()
    assert code == 2, told
    assert "Traceback" not in told
    assert "qlora-exp resume served" in told
    assert PASSWORD not in told
    text = finish(verb(root, "status", "served"), code=2)
    assert "can't be opened" in text
    server.start()
    finish(verb(root, "resume", "served"))
    assert [row["status"] for row in trials(root, "served")] == ["COMPLETED"] * 8
    assert sorted(record["trial"]["number"] for record in records(root)) == list(range(8))
    assert not survivors(root)
