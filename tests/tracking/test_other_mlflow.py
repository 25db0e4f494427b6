"""A tracking database whose tables another MLflow made: runs and sweeps go on, and say what to do."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from qlora_exp.cli import main

SLEEP = ["training.engine=sleep", "training.sleep_seconds=0"]
OLDER = "0584bdc529eb"
"""A schema of MLflow 2."""


@pytest.mark.parametrize(("version", "told"), [("ffff12345678", "a newer MLflow"), (OLDER, "an older MLflow")])
def test_runs_and_sweeps_go_on_and_say_so(
    version: str,
    told: str,
    tmp_path: Path,
    empty_database: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, "mlflow.db")
    with closing(sqlite3.connect("mlflow.db")) as database:
        [(right,)] = database.execute("SELECT version_num FROM alembic_version").fetchall()
        database.execute("UPDATE alembic_version SET version_num = ?", (version,))
        database.commit()
    for command in (["run", *SLEEP], ["run", "-m", "lora.r=4,8", "sweep.name=s", *SLEEP]):
        assert main(command) == 0
        shown = capsys.readouterr().err
        assert shown.count(told) == 1
        assert "qlora-exp sync" in shown
    assert told in json.loads(Path("outputs/studies/s/tracking.json").read_text())["error"]
    with closing(sqlite3.connect("mlflow.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (right,))
        database.commit()
    assert main(["sync"]) == 0
    with closing(sqlite3.connect("mlflow.db")) as database:
        assert database.execute("SELECT count(*) FROM runs").fetchone() == (4,)
