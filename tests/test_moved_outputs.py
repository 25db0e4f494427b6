"""An output root that was moved, copied or mounted elsewhere: its studies are where it is now."""

from __future__ import annotations

import csv
import io
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from qlora_exp.cli import main
from qlora_exp.paths import OutputPaths
from qlora_exp.study.spec import read_spec

ONE_OF_THREE = ["lora.r=4,8,16", "training.engine=sleep", "training.sleep_seconds=0.1", "sweep.name=s"]


@pytest.fixture(autouse=True)
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``first/outputs`` with one trial of three."""
    monkeypatch.chdir(tmp_path)
    root = "output_root=first/outputs"
    assert main(["run", "-m", *ONE_OF_THREE, "sweep.sampler=grid", "sweep.n_trials=1", root]) == 0


def statuses(root: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert main(["trials", "s", "--csv", "--output-root", root]) == 0
    return [row["status"] for row in csv.DictReader(io.StringIO(capsys.readouterr().out))]


def test_a_study_goes_on_where_its_outputs_were_moved_to(capsys: pytest.CaptureFixture[str]) -> None:
    Path("first").rename("second")
    root = ["--output-root", "second/outputs"]
    assert main(["status", "s", *root]) == 0
    assert "1 of 1 trials done" in capsys.readouterr().out
    assert main(["best", "s", *root]) == 0
    assert main(["resume", "s", "sweep.n_trials=3", *root]) == 0
    assert statuses("second/outputs", capsys) == ["COMPLETED"] * 3
    assert len(list(Path("second/outputs/runs").iterdir())) == 3
    assert not Path("first/outputs").exists()


def places_of_artifacts(database: Path) -> set[str]:
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT artifact_uri FROM runs UNION SELECT artifact_location FROM experiments")
        return {str(uri) for (uri,) in rows if "mlartifacts" in str(uri)}


def test_artifacts_that_were_moved_with_the_tracking_database_are_found_there() -> None:
    Path("first").rename("second")
    assert main(["sync", "--output-root", "second/outputs"]) == 0
    places = places_of_artifacts(Path("second/mlflow.db"))
    assert len(places) >= 2
    assert all(uri.startswith(Path("second/mlartifacts").absolute().as_uri()) for uri in places)


def test_a_copy_of_a_study_goes_on_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("first", "copy")
    assert main(["resume", "s", "sweep.n_trials=2", "--output-root", "copy/outputs"]) == 0
    assert statuses("copy/outputs", capsys) == ["COMPLETED"] * 2
    assert statuses("first/outputs", capsys) == ["COMPLETED"]


def test_a_study_that_was_moved_without_its_database_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    Path("second/outputs/studies").mkdir(parents=True)
    Path("first/outputs/studies/s").rename("second/outputs/studies/s")
    for verb in ("status", "resume"):
        assert main([verb, "s", "--output-root", "second/outputs"]) == 2
        told = capsys.readouterr().err
        assert f"move all of {Path('first/outputs').absolute()} together" in told
    assert not Path("second/outputs/optuna.db").exists()


def test_another_name_of_the_same_folder_is_no_move(capsys: pytest.CaptureFixture[str]) -> None:
    Path("link").symlink_to("first")
    named = read_spec(OutputPaths.of("link/outputs").study("s"))
    assert named == read_spec(OutputPaths.of("first/outputs").study("s"))
    assert statuses("link/outputs", capsys) == ["COMPLETED"]
