"""A study has an identity of its own: what has its name elsewhere, or had it before, is another study everywhere."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from qlora_exp.cli import main
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import write_json
from qlora_exp.records.find import read_runs
from qlora_exp.study.spec import read_spec

SLEEP = ["lora.r=4,8", "training.engine=sleep", "training.sleep_seconds=0", "sweep.name=s"]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return tmp_path / "mlflow.db"


def begin(root: str, *more: str, tracked: bool = True) -> int:
    from qlora_exp.orchestration.hydra_app import main as application

    tracking = [f"tracking.uri=sqlite:///{os.getcwd()}/mlflow.db"] if tracked else ["tracking=off"]
    return application(["-m", *SLEEP, *tracking, f"output_root={root}", *more])


def parents(database: Path) -> dict[str, tuple[Run, list[Run]]]:
    """Study id (empty: it has none) → its parent run, and the trials beneath."""
    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("qlora-exp")
    assert experiment is not None
    runs = list(client.search_runs([experiment.experiment_id]))
    found = [run for run in runs if "qlora_exp.study" in run.data.tags]
    families = {}
    for parent in found:
        beneath = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        families[parent.data.tags.get("qlora_exp.study_id", "")] = (parent, beneath)
    assert len(families) == len(found)
    return families


def identity(root: str) -> str:
    found = read_spec(OutputPaths.of(root).study("s")).id
    assert found is not None
    return found


def test_studies_of_one_name_have_a_parent_run_each(store: Path) -> None:
    assert begin("a") == 0
    first = identity("a")
    assert begin("b", "sweep.n_trials=1") == 0
    shutil.rmtree("a")
    assert begin("a", "sweep.n_trials=1") == 0
    families = parents(store)
    assert set(families) == {first, identity("a"), identity("b")}
    assert {key: len(trials) for key, (_, trials) in families.items()} == {
        first: 2,
        identity("a"): 1,
        identity("b"): 1,
    }
    assert begin("b") == 0
    again = parents(store)
    assert set(again) == set(families)
    assert len(again[identity("b")][1]) == 2
    assert again[first][0].data.metrics["trials_finished"] == 2
    records, _ = read_runs(OutputPaths.of("b"))
    assert {record.trial.study_id for record in records if record.trial} == {identity("b")}


def test_a_copy_that_goes_on_is_a_study_of_its_own(store: Path) -> None:
    assert begin("a", "sweep.n_trials=1") == 0
    shutil.copytree("a", "copy")
    assert main(["resume", "s", "sweep.n_trials=2", "--output-root", "copy"]) == 0
    copied = identity("copy")
    assert copied != identity("a")
    assert main(["resume", "s", "sweep.n_trials=3", "sweep.sampler=random", "--output-root", "a"]) in (0, 2)
    assert main(["resume", "s", "sweep.n_trials=2", "--output-root", "copy"]) == 0
    assert identity("copy") == copied
    assert {len(trials) for _, trials in parents(store).values()} == {1}


def storage(root: str) -> str:
    return f"sweep.storage=sqlite:///{os.getcwd()}/{root}.db"


def test_a_shared_storage_never_mixes_two_studies_of_one_name(capsys: pytest.CaptureFixture[str]) -> None:
    shared = storage("shared")
    assert begin("a", shared, tracked=False) == 0
    first = identity("a")
    assert begin("b", shared, tracked=False) == 2
    told = capsys.readouterr().err
    assert "a different study named s" in told
    assert f"created under {Path('a').absolute()}" in told
    assert "sweep.name=OTHER" in told
    assert not list(Path().glob("b/runs/*"))
    shutil.rmtree("a/studies")  # the runs are there: it is this study
    assert begin("a", shared, "sweep.n_trials=3", "seed=1,2", tracked=False) == 2  # that asks something else, as before
    assert begin("a", shared, tracked=False) == 0
    assert identity("a") == first
    Path("a").rename("moved")
    assert main(["resume", "s", "--output-root", "moved"]) == 0
    assert identity("moved") == first
    shutil.rmtree("moved")
    assert begin("a", shared, tracked=False) == 2  # begun again: its runs are gone
    assert "a different study named s" in capsys.readouterr().err


def test_a_study_of_elsewhere_that_took_the_name_meanwhile_is_not_gone_on_with(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shared = storage("shared")
    assert begin("a", shared, tracked=False) == 0
    Path("shared.db").unlink()
    assert begin("b", shared, tracked=False) == 0
    assert main(["resume", "s", "--output-root", "a"]) == 2
    assert "a different study named s" in capsys.readouterr().err


def made_by_an_earlier_version(root: str, store: Path | None = None) -> None:
    """Take away what earlier versions didn't write."""
    outputs = OutputPaths.of(root)
    spec = read_spec(outputs.study("s"))
    without(outputs.study("s").spec, "id", "interpolated")
    for file in outputs.runs.glob("*/record.json"):
        raw = json.loads(file.read_text())
        del raw["trial"]["study_id"]
        write_json(file, raw)
    backend = optuna.storages.get_storage(spec.storage)._backend  # type: ignore[attr-defined]
    with backend.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM study_user_attributes WHERE key IN ('identity', 'output_root')")
    if store is not None:
        client = MlflowClient(tracking_uri=f"sqlite:///{store}")
        for parent, trials in parents(store).values():
            client.delete_tag(parent.info.run_id, "qlora_exp.study_id")
            for trial in trials:
                client.delete_tag(trial.info.run_id, "qlora_exp.trial.study_id")


def runs_in_report(root: str, capsys: pytest.CaptureFixture[str]) -> int:
    """As the report's refusal counts them: nothing was trained here."""
    capsys.readouterr()
    assert main(["report", "s", "--output-root", root]) == 2
    return int(capsys.readouterr().err.split(" runs are SYNTHETIC")[0].rpartition(" ")[2])


def without(file: Path, *keys: str) -> None:
    raw: dict[str, Any] = json.loads(file.read_text())
    write_json(file, {key: value for key, value in raw.items() if key not in keys})


@pytest.mark.parametrize("told", [True, False], ids=["", "without tracking.json"])
def test_a_study_of_an_earlier_version_goes_on_with_its_parent_and_its_runs(
    told: bool, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert begin("a", "sweep.n_trials=1") == 0
    made_by_an_earlier_version("a", store)
    assert set(parents(store)) == {""}
    for verb in (["status", "s"], ["best", "s"], ["trials", "s", "--csv"]):
        assert main([*verb, "--output-root", "a"]) == 0
    assert runs_in_report("a", capsys) == 1
    assert read_spec(OutputPaths.of("a").study("s")).id is None
    if not told:
        OutputPaths.of("a").study("s").tracking_state.unlink()
    assert main(["resume", "s", "sweep.n_trials=2", "--output-root", "a"]) == 0
    families = parents(store)
    assert {key: len(trials) for key, (_, trials) in families.items()} == {identity("a"): 2}
    assert runs_in_report("a", capsys) == 2
    Path("a/optuna.db").write_bytes(b"garbage" * 1000)
    assert main(["resume", "s", "--rebuild", "--output-root", "a"]) == 0
    assert "rebuilt from 2 runs" in capsys.readouterr().out
    assert set(parents(store)) == {identity("a")}


def test_an_earlier_versions_study_in_a_shared_storage_is_its_roots(capsys: pytest.CaptureFixture[str]) -> None:
    shared = storage("shared")
    assert begin("a", shared, "sweep.n_trials=1", tracked=False) == 0
    made_by_an_earlier_version("a")
    assert begin("b", shared, tracked=False) == 2
    assert "a different study named s" in capsys.readouterr().err
    shutil.rmtree("a/studies")
    assert begin("a", shared, tracked=False) == 0
    assert len(read_runs(OutputPaths.of("a"))[0]) == 2


def test_runs_of_a_study_that_was_deleted_are_not_those_of_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert begin("a", tracked=False) == 0
    shutil.rmtree("a/studies")
    Path("a/optuna.db").unlink()
    assert begin("a", "sweep.n_trials=1", tracked=False) == 0
    assert len(read_runs(OutputPaths.of("a"))[0]) == 3
    assert runs_in_report("a", capsys) == 1
    assert main(["resume", "s", "--rebuild", "--output-root", "a"]) == 0
    assert "rebuilt from 1 runs" in capsys.readouterr().out
