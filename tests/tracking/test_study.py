"""A study and its trials in MLflow: one parent run, its trials beneath it, from any process and after any loss."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import synthetic
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from qlora_exp.config.schema import TrackingConfig
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record, write_json
from qlora_exp.records.schema import from_dict
from qlora_exp.records.types import RunRecord, Status, Trial
from qlora_exp.tracking.run import Tracker
from qlora_exp.tracking.study import StudyTracker, deliver_report
from qlora_exp.tracking.study_fields import StudyDefinition, SummaryTrial
from qlora_exp.tracking.sync import sync_runs

STUDY = 'which rank: it\'s "quoted"'
PARENT = "mlflow.parentRunId"
BEST_METRICS = (
    *("score/accuracy", "score_before/accuracy", "score/exact_match", "score/loss_per_item"),
    *("memory/peak_train_mib", "speed/train_tokens_per_second"),
)
DEFINITION: dict[str, Any] = {
    "name": STUDY,
    "question": "Which rank is worth paying for?",
    "space": {"lora.r": "choice(8, 16, 32)", "training.learning_rate": "tag(log, interval(1e-4, 1e-2))"},
    "objectives": ["minimize scores.after.loss_per_item"],
    "sampler": "tpe",
    "pruner": "hyperband",
    "n_trials": 3,
    "created_at": "2026-01-02T03:04:00+00:00",
    "overrides": ["model=embedded"],
}


def tracking(uri: str | None = None) -> TrackingConfig:
    return TrackingConfig(True, uri, "qlora-exp", 1.0)


def definition(**changes: Any) -> StudyDefinition:
    return from_dict(StudyDefinition, DEFINITION | changes)


def write_definition(output: OutputPaths, **changes: Any) -> None:
    write_json(output.study(STUDY).spec, DEFINITION | changes)


def trial_record(number: int, *overrides: str) -> RunRecord:
    rank = 8 * 2**number
    swept = {"lora.r": rank, "training.learning_rate": 0.001, "+extra.key": "x"}
    record = synthetic.completed(f"trial-{number}", f"lora.r={rank}", *overrides, after=0.4 + 0.05 * number)
    return record.replace(trial=Trial(STUDY, number, 1, swept))


def row(number: int, status: Status = Status.COMPLETED, value: float | None = None) -> SummaryTrial:
    values = () if value is None else (value,)
    return SummaryTrial(number, status, values, {"lora.r": 8 * 2**number}, f"trial-{number}", 31.5)


def run_trial(output: OutputPaths, record: RunRecord) -> bool:
    begun = record.replace(status=Status.RUNNING, ended_at=None)
    paths = synthetic.write_run(output, begun)
    tracker = Tracker(tracking(), output)
    tracker.start(begun, paths)
    synthetic.write_run(output, record)
    return tracker.finish(record)


def runs_in(database: Path, view_type: int = ViewType.ACTIVE_ONLY) -> list[Run]:
    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("qlora-exp")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], "", view_type))


def family(database: Path) -> tuple[Run, list[Run]]:
    """The one parent run and its trials."""
    runs = runs_in(database)
    (parent,) = [run for run in runs if run.data.tags.get("qlora_exp.study") == STUDY]
    return parent, [run for run in runs if run.data.tags.get(PARENT) == parent.info.run_id]


def artifact(database: Path, run: Run, name: str) -> str:
    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    return Path(client.download_artifacts(run.info.run_id, name)).read_text()


def test_a_sweep_is_one_run_with_its_trials_beneath_it(output: OutputPaths) -> None:
    write_definition(output)
    study = StudyTracker(tracking(), output, STUDY)
    study.start(definition())
    parent, _ = family(output.mlflow_database)
    assert parent.info.status == "RUNNING"
    for number in range(2):
        assert run_trial(output, trial_record(number))
        study.update([row(n, value=2.0 - n) for n in range(number + 1)], best=[number])
    rows = [row(0, value=2.0), row(1, value=1.0), row(2, Status.PRUNED), row(3, Status.OUT_OF_MEMORY)]
    study.update(rows, best=[1])
    assert study.finish(Status.COMPLETED)

    parent, children = family(output.mlflow_database)
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == STUDY
    assert sorted(run.data.params["lora.r"] for run in children) == ["16", "8"]
    assert all(run.data.params["extra.key"] == "x" for run in children)
    assert {run.data.tags["qlora_exp.trial.number"] for run in children} == {"0", "1"}
    assert parent.data.params == {
        "sampler": "tpe",
        "pruner": "hyperband",
        "objective": "minimize scores.after.loss_per_item",
    }
    children_by_number = {run.data.tags["qlora_exp.trial.number"]: run for run in children}
    assert parent.data.metrics == {
        "trials_finished": 2.0,
        "trials_pruned": 1.0,
        "trials_failed": 1.0,
        "best/scores.after.loss_per_item": 1.0,
        # Of the best trial's run: the parent stands for its folded trials.
        **{key: children_by_number["1"].data.metrics[key] for key in BEST_METRICS},
    }
    assert parent.data.tags["qlora_exp.best"] == "r16: loss_per_item 1"
    note = parent.data.tags["mlflow.note.content"]
    assert note.startswith("best so far: **scores.after.loss_per_item 1** with lora.r=16 (trial 1)")
    assert "Which rank is worth paying for?" in note
    assert "| 1 | 1 | 16 | – | trial-1 |" in note
    table = list(csv.DictReader(artifact(output.mlflow_database, parent, "trials.csv").splitlines()))
    assert [(line["number"], line["status"], line["value"], line["lora.r"]) for line in table] == [
        ("0", "COMPLETED", "2.0", "8"),
        ("1", "COMPLETED", "1.0", "16"),
        ("2", "PRUNED", "", "32"),
        ("3", "OUT_OF_MEMORY", "", "64"),
    ]
    best = artifact(output.mlflow_database, parent, "best.yaml")
    assert yaml.safe_load(best) == {"lora.r": 16}
    assert "qlora-exp rerun trial-1" in best


def test_a_sweep_that_goes_on_is_the_same_run(output: OutputPaths) -> None:
    write_definition(output)
    for n_trials, status in ((3, Status.INTERRUPTED), (5, Status.COMPLETED)):
        study = StudyTracker(tracking(), output, STUDY)
        study.start(definition(n_trials=n_trials))
        if status is Status.INTERRUPTED:
            study.update([row(0, value=2.0)], best=[0])
        assert study.finish(status)
        parent, _ = family(output.mlflow_database)
        assert parent.info.status == ("KILLED" if status is Status.INTERRUPTED else "FINISHED")
    assert parent.data.metrics["trials_finished"] == 1.0  # what the first sweep told is not lost
    assert "5 trials" in parent.data.tags["mlflow.note.content"]


def test_parent_and_children_are_rebuilt_on_a_new_store(output: OutputPaths, empty_database: Path) -> None:
    write_definition(output)
    study = StudyTracker(tracking(), output, STUDY)
    study.start(definition())
    run_trial(output, trial_record(0))
    study.update([row(0, value=2.0)], best=[0])
    study.finish(Status.COMPLETED)
    other = output.root.parent / "other" / "mlflow.db"
    other.parent.mkdir()
    other.write_bytes(empty_database.read_bytes())

    report = sync_runs(output.root, uri=f"sqlite:///{other}")
    assert (report.delivered, report.studies, report.failed) == (("trial-0",), (STUDY,), {})
    first, again = family(output.mlflow_database), family(other)
    assert [run.info.run_name for run in again[1]] == ["r8 lr0.001 key=x"]
    assert [run.info.run_name for run in first[1]] == ["r8 lr0.001 key=x"]
    assert again[0].data.tags["qlora_exp.best"] == "r8: loss_per_item 2"
    assert again[0].info.status == "FINISHED"
    assert again[0].data.metrics == first[0].data.metrics
    assert again[0].data.tags["mlflow.note.content"] == first[0].data.tags["mlflow.note.content"]
    state = json.loads(output.study(STUDY).tracking_state.read_text())
    assert (state["uri"], state["mlflow_run_id"]) == (f"sqlite:///{other}", again[0].info.run_id)

    once_more = sync_runs(output.root, uri=f"sqlite:///{other}")
    assert (once_more.delivered, once_more.studies) == ((), ())


def test_a_report_is_an_artifact_of_the_parent_run_and_comes_with_it_to_a_new_store(output: OutputPaths) -> None:
    write_definition(output)
    study = StudyTracker(tracking(), output, STUDY)
    study.start(definition())
    run_trial(output, trial_record(0))
    study.update([row(0, value=2.0)], best=[0])
    study.finish(Status.COMPLETED)
    (output.study(STUDY).folder / "report.html").write_text("the answer")

    assert deliver_report(tracking(), output, STUDY) is None
    parent, _ = family(output.mlflow_database)
    client = MlflowClient(tracking_uri=f"sqlite:///{output.mlflow_database}")
    assert "report.html" in {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert sync_runs(output.root).studies == ()
    (output.study(STUDY).folder / "report.html").write_text("another answer")
    assert sync_runs(output.root).studies == (STUDY,)


def test_a_ladders_answer_is_the_note_of_the_parent_run_and_its_file_an_artifact(output: OutputPaths) -> None:
    write_definition(output)
    study = StudyTracker(tracking(), output, STUDY)
    study.start(definition())
    run_trial(output, trial_record(0))
    study.update([row(0, value=2.0)], best=[0])
    ladders = [
        {"axes": {"model.variant": "base"}, "sentence": "Returns have diminished at r = 8.", "use_rank": 8},
        {"axes": {"model.variant": "instruct"}, "sentence": "Inconclusive.", "use_rank": 16, "recommended_rank": None}
        | {"regret_bound": 0.25, "settle_command": "qlora-exp resume s sweep.ladder.max_seeds=12"},
    ]
    write_json(output.study(STUDY).ladder, {"study": STUDY, "ladders": ladders})
    study.finish(Status.COMPLETED)

    parent, _ = family(output.mlflow_database)
    note = parent.data.tags["mlflow.note.content"]
    assert note.startswith(
        "model.variant=base: Returns have diminished at r = 8.\n\nmodel.variant=instruct: Inconclusive."
    )
    assert json.loads(artifact(output.mlflow_database, parent, "ladder.json"))["ladders"] == ladders
    tags = {key.removeprefix("qlora_exp."): value for key, value in parent.data.tags.items() if "variant" in key}
    assert tags == {
        "use_rank/model.variant:base": "8",
        "use_rank/model.variant:instruct": "16",
        "recommended_rank/model.variant:instruct": "null",
        "regret_bound/model.variant:instruct": "0.25",
        "settle_command/model.variant:instruct": "qlora-exp resume s sweep.ladder.max_seeds=12",
    }
    assert sync_runs(output.root).studies == ()
    write_json(output.study(STUDY).ladder, {"study": STUDY, "ladders": ladders[:1]})
    assert sync_runs(output.root).studies == (STUDY,)


def test_a_study_that_confirms_shows_the_confirmed_configuration_not_its_luckiest_run(output: OutputPaths) -> None:
    write_definition(output)
    study = StudyTracker(tracking(), output, STUDY)
    study.start(definition())
    for number in range(2):
        assert run_trial(output, trial_record(number))
    rows = [row(0, value=2.0), row(1, value=1.0)]
    study.update(rows, best=[1])
    answer = {"use_run": "trial-0", "use": "r8 wins", "sentences": ["Use r8.", "It is better by 0.3."]}
    write_json(output.study(STUDY).confirmation, {"answer": answer})
    study.finish(Status.COMPLETED)
    parent, children = family(output.mlflow_database)
    assert parent.data.tags["qlora_exp.best"] == "r8 wins"
    assert parent.data.tags["mlflow.note.content"].startswith("Use r8. It is better by 0.3.")
    assert parent.data.metrics["best/scores.after.loss_per_item"] == 2.0
    used = next(run for run in children if run.data.params["lora.r"] == "8")
    assert parent.data.metrics["score/accuracy"] == used.data.metrics["score/accuracy"]


def test_a_parent_deleted_in_mlflow_stays_deleted(output: OutputPaths) -> None:
    write_definition(output)
    StudyTracker(tracking(), output, STUDY).start(definition())
    parent, _ = family(output.mlflow_database)
    MlflowClient(tracking_uri=f"sqlite:///{output.mlflow_database}").delete_run(parent.info.run_id)
    assert run_trial(output, trial_record(0))
    (child,) = runs_in(output.mlflow_database)
    assert PARENT not in child.data.tags


@pytest.mark.parametrize("text", [None, '{"question": "torn', '{"name": 3}'])
def test_a_trial_whose_study_can_not_be_read_is_delivered_all_the_same(output: OutputPaths, text: str | None) -> None:
    if text is not None:
        output.study(STUDY).folder.mkdir(parents=True)
        output.study(STUDY).spec.write_text(text)
    assert run_trial(output, trial_record(0))
    assert [run.info.status for run in runs_in(output.mlflow_database)] == ["FINISHED"]


def test_a_sweep_that_died_is_told_as_interrupted_by_sync(output: OutputPaths) -> None:
    write_definition(output)
    code = (
        "import os, sys; from qlora_exp.config.schema import TrackingConfig; from qlora_exp.paths import OutputPaths;"
        "from qlora_exp.tracking.study import StudyTracker;"
        "from qlora_exp.tracking.study_fields import StudyDefinition;"
        "study = StudyTracker(TrackingConfig(True, None, 'qlora-exp', 60.0), OutputPaths.of(sys.argv[1]), sys.argv[2]);"
        "study.start(StudyDefinition(sys.argv[2])); os.kill(os.getpid(), 9)"
    )
    died = subprocess.run([sys.executable, "-c", code, str(output.root), STUDY], check=False)
    assert died.returncode == -9
    parent, _ = family(output.mlflow_database)
    assert parent.info.status == "RUNNING"
    synthetic.write_run(output, trial_record(0))
    assert sync_runs(output.root).studies == (STUDY,)
    assert family(output.mlflow_database)[0].info.status == "KILLED"


@pytest.mark.parametrize("behaviour", ["hang", "dies", "500"])
def test_an_unreachable_server_costs_a_sweep_nothing(
    output: OutputPaths, hostile_server: Callable[[str], str], behaviour: str
) -> None:
    write_definition(output)
    uri = hostile_server(behaviour)
    study = StudyTracker(tracking(uri), output, STUDY)
    study.start(definition())
    for number in range(50):
        study.update([row(n, value=1.0) for n in range(number)])
    assert study.finish(Status.COMPLETED) is False
    assert json.loads(output.study(STUDY).tracking_state.read_text())["error"]

    synthetic.write_run(output, trial_record(0))
    assert sync_runs(output.root, uri=f"sqlite:///{output.mlflow_database}").studies == (STUDY,)
    assert family(output.mlflow_database)[0].data.metrics["trials_finished"] == 49


def test_no_secret_of_a_study_reaches_the_store(output: OutputPaths) -> None:
    canary = "hf_Canary0123456789canary"
    write_definition(output)
    study = StudyTracker(tracking(), output, STUDY)
    study.start(definition(question=f"token={canary}", overrides=[f"hub_token={canary}"], space={"x": canary}))
    study.update([SummaryTrial(0, Status.COMPLETED, (1.0,), {"model.path": f"https://me:{canary}@host/x"})], best=[0])
    assert study.finish(Status.COMPLETED)
    places = [output.mlflow_database, *(file for file in output.mlflow_artifacts.rglob("*") if file.is_file())]
    assert len(places) == 3
    assert [place for place in places if canary.encode() in place.read_bytes()] == []


def test_a_record_keeps_its_trial(output: OutputPaths) -> None:
    record = trial_record(1)
    assert read_record(synthetic.write_run(output, record).record).trial == record.trial
