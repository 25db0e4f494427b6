"""The SQLite file behind a study: its journal's mode on each kind of disk, and what is put aside with it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from studies import a_spec, claimed, finish, opened, paths_of, worker

from qlora_exp.errors import StudyError
from qlora_exp.study import storage
from qlora_exp.study.open import rebuild_study
from qlora_exp.study.study import Study

LOCAL = "qlora_exp.study.storage.LOCAL_DISKS"


def mode_of(database: Path) -> str:
    with closing(sqlite3.connect(database)) as connection:
        return str(connection.execute("PRAGMA journal_mode").fetchone()[0])


def test_a_database_from_a_local_disk_leaves_the_write_ahead_mode_on_a_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, database = a_spec(tmp_path), tmp_path / "optuna.db"
    if not storage.on_local_disk(database):
        pytest.skip("the tests' folder is on no local disk")
    study = opened(spec)
    claimed(study)
    assert mode_of(database) == "wal"
    monkeypatch.setattr(storage, "BUSY_SECONDS", 0.2)
    monkeypatch.setattr(LOCAL, ())
    with pytest.raises(StudyError, match="WAL mode"):  # another machine may still use it there
        opened(spec)
    study._storage._backend.engine.dispose()  # type: ignore[attr-defined]
    assert len(opened(spec).trials()) == 1
    assert mode_of(database) == "delete"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_place_that_takes_no_files_is_told(tmp_path: Path) -> None:
    spec = a_spec(tmp_path)
    with pytest.raises(StudyError, match="can't be created there"):
        Study.open(spec, paths_of(spec), storage_url="sqlite:////proc/studies.db")


def test_what_a_killed_worker_left_in_the_log_is_in_the_study(tmp_path: Path) -> None:
    spec = a_spec(tmp_path)
    code = "study.claim(me, 600.0); import os; os.kill(os.getpid(), 9)"
    worker(spec, code).wait()
    assert [row.state for row in opened(spec).trials()] == ["RUNNING"]


def test_a_damaged_databases_log_is_put_aside_with_it(tmp_path: Path) -> None:
    spec, database = a_spec(tmp_path), tmp_path / "optuna.db"
    finish(opened(spec))
    database.write_bytes(b"garbage" * 1000)
    for suffix in ("-wal", "-shm"):
        database.with_name(database.name + suffix).write_bytes(b"garbage" * 1000)
    rebuild_study(spec, paths_of(spec), [], spec.storage)
    rebuilt = opened(spec)
    assert rebuilt.counts().finished == 0
    assert (tmp_path / "optuna.db.damaged-1-wal").exists()
    assert (tmp_path / "optuna.db.damaged-1-shm").exists()
