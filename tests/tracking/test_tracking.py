from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import mlflow
import pytest
import synthetic
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT

from qlora_exp.cli import main
from qlora_exp.config.schema import TrackingConfig
from qlora_exp.errors import TrackingError
from qlora_exp.paths import OutputPaths, RunPaths
from qlora_exp.records.files import read_curve, read_record, write_json
from qlora_exp.records.types import Process, Status, Trial
from qlora_exp.tracking import fields
from qlora_exp.tracking.interrupted import mark_interrupted
from qlora_exp.tracking.run import Tracker
from qlora_exp.tracking.store import locate, open_store
from qlora_exp.tracking.sync import sync_runs
from qlora_exp.tracking.ui import VIEW_BARS, VIEW_PARAMS, VIEW_PLOTS, VIEW_TAGS, ui_command, ui_environment

EXPERIMENT = "qlora-exp"


def tracking(uri: str | None = None, timeout_seconds: float = 1.0) -> TrackingConfig:
    return TrackingConfig(True, uri, EXPERIMENT, timeout_seconds)


def client_of(output: OutputPaths) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{output.mlflow_database}")


def runs_of(output: OutputPaths, view_type: int = ViewType.ACTIVE_ONLY) -> list[Run]:
    client = client_of(output)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], "", view_type))


def state_of(paths: RunPaths) -> dict[str, object]:
    return dict(json.loads(paths.tracking_state.read_text()))


def contents(output: OutputPaths) -> list[object]:
    """All that MLflow holds of all runs, for equality."""
    client, found = client_of(output), []
    for run in runs_of(output, ViewType.ALL):
        keys = sorted(run.data.metrics)
        history = [
            (m.key, m.step, m.value, m.timestamp)
            for key in keys
            for m in client.get_metric_history(run.info.run_id, key)
        ]
        data = [(entry.dataset.name, entry.dataset.digest) for entry in run.inputs.dataset_inputs]
        found.append(
            (run.data.tags[TAG], run.info.status, run.info.end_time, run.data.params, run.data.tags, history, data)
        )
    return sorted(found, key=str)


TAG = "qlora_exp.run_id"


def test_a_run_is_seen_whole(output: OutputPaths) -> None:
    tracker = Tracker(tracking(), output)
    begun = synthetic.running()
    paths = synthetic.write_run(output, begun)
    tracker.start(begun, paths)
    assert [run.info.status for run in runs_of(output)] == ["RUNNING"]

    tracker.log_curve(synthetic.curve())
    ended = synthetic.completed()
    synthetic.write_run(output, ended)
    assert tracker.finish(ended)

    (run,) = runs_of(output)
    client = client_of(output)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "base nf4 r8"
    assert run.info.end_time - run.info.start_time == 90_000
    assert run.data.params["lora.r"] == "8"
    assert run.data.metrics["score/accuracy"] == 0.55
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [5 * n for n in range(1, 17)]
    assert run.data.tags["qlora_exp.status"] == "COMPLETED"
    assert run.data.tags["git.dirty"] == "True"
    assert "| accuracy |" in run.data.tags["mlflow.note.content"]
    assert [entry.dataset.name for entry in run.inputs.dataset_inputs] == ["embedded"]
    top = {file.path for file in client.list_artifacts(run.info.run_id)}
    adapter = {file.path for file in client.list_artifacts(run.info.run_id, "adapter")}
    assert top == {"adapter", "config.yaml", "record.json"}
    assert adapter == {f"adapter/{name}" for name in ("README.md", "adapter_config.json", "adapter_model.safetensors")}
    assert state_of(paths)["delivered"] is True
    assert state_of(paths)["experiment_id"] == run.info.experiment_id
    assert client.get_experiment(run.info.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        (Status.OUT_OF_MEMORY, "FAILED"),
        (Status.DIVERGED, "FAILED"),
        (Status.FAILED, "FAILED"),
        (Status.PRUNED, "KILLED"),
        (Status.INTERRUPTED, "KILLED"),
    ],
)
def test_a_run_that_did_not_complete_is_never_finished(output: OutputPaths, status: Status, shown: str) -> None:
    record = synthetic.failed("made-up-1", status)
    synthetic.write_run(output, record, adapter=False)
    assert sync_runs(output.root).delivered == ("made-up-1",)
    (run,) = runs_of(output)
    assert run.info.status == shown
    assert run.data.tags["failure.kind"] == "RuntimeError"


def test_syncing_twice_adds_nothing(output: OutputPaths) -> None:
    for number in range(3):
        synthetic.write_run(output, synthetic.completed(f"made-up-{number}", seed=number))
    assert len(sync_runs(output.root).delivered) == 3
    first = contents(output)
    for paths in output.runs.iterdir():
        RunPaths(paths).tracking_state.unlink()  # even where it is not known what was delivered
    assert len(sync_runs(output.root).delivered) == 3
    assert contents(output) == first
    assert len(sync_runs(output.root).already) == 3


def test_a_partly_delivered_run_is_completed_and_not_doubled(output: OutputPaths) -> None:
    begun = synthetic.running()
    paths = synthetic.write_run(output, begun, steps=6)
    tracker = Tracker(tracking(), output)
    tracker.start(begun, paths)
    client, run_id = client_of(output), str(state_of(paths)["mlflow_run_id"])
    client.log_metric(run_id, "train/loss", 2.4, step=5)  # delivered by the process that died then
    synthetic.write_run(output, synthetic.completed(), steps=6)
    assert sync_runs(output.root).delivered == ("made-up-1",)
    (run,) = runs_of(output)
    assert run.info.run_id == run_id
    assert run.info.status == "FINISHED"
    assert sorted(m.step for m in client.get_metric_history(run_id, "train/loss")) == [5, 10, 15, 20, 25, 30]


def test_the_view_is_rebuilt_from_the_run_folders(output: OutputPaths) -> None:
    begun = synthetic.running()
    paths = synthetic.write_run(output, begun)
    tracker = Tracker(tracking(), output)
    tracker.start(begun, paths)
    ended = synthetic.completed()
    synthetic.write_run(output, ended)
    tracker.finish(ended)
    live = contents(output)
    other = OutputPaths.of(output.root.parent / "moved" / "outputs")
    other.root.parent.mkdir()
    output.root.rename(other.root)
    assert sync_runs(other.root).delivered == ("made-up-1",)
    assert contents(other) == live


def test_a_run_deleted_in_mlflow_stays_deleted(output: OutputPaths) -> None:
    synthetic.write_run(output, synthetic.completed())
    sync_runs(output.root)
    client_of(output).delete_run(runs_of(output)[0].info.run_id)
    assert sync_runs(output.root).deleted == ("made-up-1",)
    assert runs_of(output) == []


def test_a_changed_record_is_delivered_again_into_the_same_run(output: OutputPaths) -> None:
    synthetic.write_run(output, synthetic.failed("made-up-1"))
    sync_runs(output.root)
    synthetic.write_run(output, synthetic.completed("made-up-1"))
    assert sync_runs(output.root).delivered == ("made-up-1",)
    (run,) = runs_of(output)
    assert run.info.status == "FINISHED"


def test_a_run_that_goes_on_after_an_interruption_is_the_same_mlflow_run(output: OutputPaths) -> None:
    synthetic.write_run(output, synthetic.failed("made-up-1", Status.INTERRUPTED))
    sync_runs(output.root)
    begun = synthetic.running("made-up-1")
    paths = synthetic.write_run(output, begun)
    Tracker(tracking(), output).start(begun, paths)
    (run,) = runs_of(output)
    assert run.info.status == "RUNNING"


def test_a_run_whose_process_died_is_told_so_and_a_living_one_is_left_alone(output: OutputPaths) -> None:
    for run_id in ("dead", "living"):
        record = synthetic.running(run_id)
        paths = synthetic.write_run(output, record)
        Tracker(tracking(), output).start(record, paths)
    dead = output.run("dead")
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    write_json(dead.record, read_record(dead.record).replace(process=Process(child.pid, None, None)))

    assert mark_interrupted(output.root) == ("dead",)
    record = read_record(dead.record)
    assert record.status is Status.INTERRUPTED
    assert record.ended_at is not None
    assert record.failure is not None
    assert str(child.pid) in record.failure.message
    assert read_record(output.run("living").record).status is Status.RUNNING
    assert {run.data.tags[TAG]: run.info.status for run in runs_of(output)} == {"dead": "KILLED", "living": "RUNNING"}
    assert mark_interrupted(output.root) == ()


def test_a_run_of_another_host_is_left_running_and_told_so(
    output: OutputPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    record = synthetic.running("far").replace(process=Process(2**22 + 1, 1, "another boot", "another-host"))
    paths = synthetic.write_run(output, record)
    assert mark_interrupted(output.root) == ()
    assert sync_runs(output.root).elsewhere == ("far",)
    assert read_record(paths.record).status is Status.RUNNING
    assert main(["ls", "runs", "--output-root", str(output.root)]) == 0
    assert "on another-host, which can't be seen from here" in capsys.readouterr().out


@pytest.mark.parametrize("behaviour", ["500", "429", "401", "garbage", "dies", "hang", "closed"])
def test_a_server_that_fails_costs_a_run_nothing_and_sync_delivers_later(
    output: OutputPaths, hostile_server: Callable[[str], str], behaviour: str
) -> None:
    uri = closed_port() if behaviour == "closed" else hostile_server(behaviour)
    tracker = Tracker(tracking(uri), output)
    begun = synthetic.running("made-up-1", f"tracking.uri={uri}", "tracking.timeout_seconds=1")
    paths = synthetic.write_run(output, begun)
    tracker.start(begun, paths)
    tracker.log_curve(synthetic.curve())
    ended = synthetic.completed("made-up-1", f"tracking.uri={uri}", "tracking.timeout_seconds=1")
    synthetic.write_run(output, ended)
    assert tracker.finish(ended) is False
    assert state_of(paths)["delivered"] is False
    assert state_of(paths)["error"]

    report = sync_runs(output.root)
    assert set(report.failed) == {"made-up-1"}
    assert sync_runs(output.root, uri=f"sqlite:///{output.mlflow_database}").delivered == ("made-up-1",)
    assert [run.info.status for run in runs_of(output)] == ["FINISHED"]


def test_a_server_that_dies_during_a_run_leaves_the_rest_to_sync(output: OutputPaths) -> None:
    """The database disappears under a live tracker: nothing raises, and sync makes it whole."""
    begun = synthetic.running()
    paths = synthetic.write_run(output, begun)
    tracker = Tracker(tracking(), output)
    tracker.start(begun, paths)
    output.mlflow_database.write_bytes(b"no database any more " * 400)
    ended = synthetic.completed()
    synthetic.write_run(output, ended)
    assert tracker.finish(ended) is False
    output.mlflow_database.unlink()
    # Another process, as a user's would be: in this one MLflow keeps the connection to the file that is gone.
    code = (
        "import sys; from qlora_exp.tracking.sync import sync_runs;"
        " sys.exit(sync_runs(sys.argv[1]).delivered != ('made-up-1',))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(output.root)], check=False).returncode == 0


@pytest.mark.parametrize(
    "uri",
    [
        "htp://127.0.0.1:5000",
        "mlruns",
        "file:///tmp/mlruns",
        "sqlite://",
        "sqlite:///:memory:",
        "http://",
        "http://host:99999",
        "sqlite:////proc/no/such/mlflow.db",
        "ftp://user:canary-password@host/x",
    ],
)
def test_a_uri_that_can_not_be_meant_is_told_before_training(output: OutputPaths, uri: str) -> None:
    with pytest.raises(TrackingError) as raised:
        Tracker(tracking(uri), output)
    assert raised.value.exit_code == 2
    assert raised.value.hint
    assert "canary" not in str(raised.value)


def test_a_database_that_is_none_is_told_before_training(output: OutputPaths) -> None:
    output.mlflow_database.parent.mkdir(parents=True, exist_ok=True)
    output.mlflow_database.write_bytes(b"these are my notes " * 300)
    with pytest.raises(TrackingError, match="not a database"):
        Tracker(tracking(), output)


def test_an_experiment_deleted_in_mlflow_is_told_before_training(output: OutputPaths) -> None:
    Tracker(tracking(), output)
    client = client_of(output)
    client.delete_experiment(client.get_experiment_by_name(EXPERIMENT).experiment_id)
    with pytest.raises(TrackingError, match="deleted"):
        Tracker(tracking(), output)


def test_tracking_that_is_off_touches_no_store(fresh_output: OutputPaths) -> None:
    engine = ["training.engine=sleep", "training.sleep_seconds=0"]
    assert main(["run", *engine, "tracking=off", f"output_root={fresh_output.root}"]) == 0
    assert not fresh_output.mlflow_database.exists()
    assert not list(fresh_output.runs.glob("*/tracking.json"))


def test_the_store_holds_no_secret(output: OutputPaths) -> None:
    canary = "hf_Canary0123456789canary"
    record = synthetic.completed("made-up-1", f"model.path=/models/{canary}").replace(warnings=(f"password={canary}",))
    paths = synthetic.write_run(output, record)
    paths.config.write_text(f"hub_token: {canary}\nurl: https://me:{canary}@host/x\n")
    assert sync_runs(output.root).delivered == ("made-up-1",)
    places = [output.mlflow_database, *(file for file in output.mlflow_artifacts.rglob("*") if file.is_file())]
    assert len(places) > 4
    assert [place for place in places if canary.encode() in place.read_bytes()] == []


def test_the_host_program_keeps_its_own_mlflow_settings(output: OutputPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
    uri = mlflow.get_tracking_uri()
    synthetic.write_run(output, synthetic.completed())
    sync_runs(output.root)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "5"
    assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == MLFLOW_HTTP_REQUEST_TIMEOUT.default
    assert mlflow.get_tracking_uri() == uri
    assert mlflow.active_run() is None


def test_a_delivery_in_a_thread_takes_nothing_out_of_the_environment_that_another_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qlora_exp.records.redaction import redact_text
    from qlora_exp.tracking.store import bounded_calls

    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    ended = threading.Event()

    def deliver() -> None:
        while not ended.is_set():
            with bounded_calls(1.0):
                pass

    delivery = threading.Thread(target=deliver)
    delivery.start()
    try:
        for _ in range(3000):
            dict(os.environ)
            redact_text("ordinary")
    finally:
        ended.set()
        delivery.join()


def test_a_torn_curve_is_read_up_to_the_tear_and_repeated_steps_once(output: OutputPaths) -> None:
    paths = synthetic.write_run(output, synthetic.running())
    paths.curve.write_text(
        '{"step": 5, "loss": 2.0}\n{"step": 10, "loss": 1.5}\n{"step": 5, "loss": 1.9}\n{"step": 15, "lo'
    )
    assert [(point["step"], point["loss"]) for point in read_curve(paths.curve)] == [(5, 1.9), (10, 1.5)]


def test_an_unreadable_record_does_not_stop_the_others(output: OutputPaths) -> None:
    synthetic.write_run(output, synthetic.completed("whole"))
    torn = synthetic.write_run(output, synthetic.completed("torn"))
    torn.record.write_text('{"schema_version": 1, "run')
    report = sync_runs(output.root)
    assert report.delivered == ("whole",)
    assert set(report.failed) == {"torn"}


def test_a_redacted_password_is_asked_for(output: OutputPaths) -> None:
    synthetic.write_run(output, synthetic.completed("made-up-1", "tracking.uri=http://me:***@host:5000"))
    assert "password" in sync_runs(output.root).failed["made-up-1"]


START = """
import sys
from qlora_exp.config.schema import TrackingConfig
from qlora_exp.paths import OutputPaths
from qlora_exp.records.types import Status
from qlora_exp.tracking.run import Tracker
sys.path.insert(0, sys.argv[2])
import synthetic
output = OutputPaths.of(sys.argv[1])
record = synthetic.completed(sys.argv[3])
paths = synthetic.write_run(output, record)
print("ready", flush=True)
sys.stdin.readline()
tracker = Tracker(TrackingConfig(True, None, "qlora-exp", 60.0), output)
tracker.start(record.replace(status=Status.RUNNING, ended_at=None), paths)
sys.exit(0 if tracker.finish(record) else 3)
"""


DELIVER = """
import sys
from qlora_exp.config.schema import TrackingConfig
from qlora_exp.paths import OutputPaths
from qlora_exp.records.types import Status
from qlora_exp.records.files import read_record
from qlora_exp.tracking.run import Tracker
from qlora_exp.tracking.sync import deliver_runs
import qlora_exp.tracking.run
output, how, run_ids = OutputPaths.of(sys.argv[1]), sys.argv[2], sys.argv[3:]
for run_id in run_ids:
    paths = output.run(run_id)
    record = read_record(paths.record)
    print("ready", flush=True)
    sys.stdin.readline()
    if how == "sync":
        deliver_runs(output, [run_id])
    else:
        tracker = Tracker(TrackingConfig(True, None, "qlora-exp", 60.0), output)
        tracker.start(record.replace(status=Status.RUNNING, ended_at=None), paths)
        assert tracker.finish(record)
"""


def started(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def let_go_together(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Each has told that it is ready and waits for a line."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


def test_a_run_that_several_processes_deliver_at_once_is_one_mlflow_run(output: OutputPaths) -> None:
    """Its own host, an orchestrator whose sweep has ended, ``qlora-exp sync`` in another terminal."""
    run_ids = [f"made-up-{number}" for number in range(8)]
    for run_id in run_ids:
        synthetic.write_run(output, synthetic.completed(run_id), adapter=False)
    processes = [started(DELIVER, str(output.root), how, *run_ids) for how in ("host", "host", "sync")]
    for _ in run_ids:
        let_go_together(processes)
    assert [process.wait(timeout=300) for process in processes] == [0] * 3
    assert sorted(run.data.tags[TAG] for run in runs_of(output)) == run_ids
    assert all(state_of(output.run(run_id))["delivered"] for run_id in run_ids)


def start_cold(output: OutputPaths, count: int) -> list[int]:
    """Exit codes of so many processes that open the fresh store at once."""
    here = str(Path(__file__).parent)
    processes = [started(START, str(output.root), here, f"made-up-{number}") for number in range(count)]
    let_go_together(processes)
    return [process.wait(timeout=300) for process in processes]


def test_processes_that_start_together_on_a_fresh_database_all_succeed(fresh_output: OutputPaths) -> None:
    output = fresh_output
    assert start_cold(output, 3) == [0] * 3
    assert [run.info.status for run in runs_of(output)] == ["FINISHED"] * 3


@pytest.mark.faults
def test_eight_processes_that_start_together_on_a_fresh_database_all_succeed(fresh_output: OutputPaths) -> None:
    output = fresh_output
    assert start_cold(output, 8) == [0] * 8
    assert [run.info.status for run in runs_of(output)] == ["FINISHED"] * 8


@pytest.mark.slow
def test_a_real_server_shows_runs_with_their_artifacts(output: OutputPaths) -> None:
    """Through ``qlora-exp ui``'s own command: a database's artifacts are served, and a server takes runs by HTTP."""
    synthetic.write_run(output, synthetic.completed("made-up-1"))
    sync_runs(output.root)
    port = int(closed_port().rpartition(":")[2])
    server = subprocess.Popen(
        ui_command(None, output.mlflow_database, port),
        env=ui_environment(),
        cwd=output.root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        uri = f"http://127.0.0.1:{port}"
        client = MlflowClient(tracking_uri=uri)
        wait_for(port)
        (run,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
        assert len(client.list_artifacts(run.info.run_id, "adapter")) == 3
        assert sync_runs(output.root, uri=uri).already == ("made-up-1",)  # the same database, through the server
        other = "tracking.experiment=through-http"
        record = synthetic.completed("made-up-2", f"tracking.uri={uri}", other)
        synthetic.write_run(output, record)
        tracker = Tracker(TrackingConfig(True, uri, "through-http", 20.0), output)
        tracker.start(record.replace(status=Status.RUNNING, ended_at=None), output.run("made-up-2"))
        assert tracker.finish(record)
        (sent,) = client.search_runs([client.get_experiment_by_name("through-http").experiment_id])
        assert len(client.list_artifacts(sent.info.run_id, "adapter")) == 3
    finally:
        server.terminate()
        server.wait(30)


def test_the_ui_stays_on_loopback_and_sends_no_telemetry(output: OutputPaths) -> None:
    with pytest.raises(TrackingError, match="no tracked runs"):
        ui_command(None, output.mlflow_database.with_name("none.db"))
    command = ui_command(None, output.mlflow_database, 5001)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert f"sqlite:///{output.mlflow_database}" in command
    assert ui_environment()["MLFLOW_DISABLE_TELEMETRY"] == "true"
    with pytest.raises(TrackingError, match="its own UI"):
        ui_command("http://host:5000", output.mlflow_database)


def test_a_store_of_an_earlier_version_gets_the_views_of_this_one(output: OutputPaths) -> None:
    Tracker(tracking(), output)
    client = client_of(output)
    experiment_id = client.get_experiment_by_name(EXPERIMENT).experiment_id
    for key in VIEW_TAGS:
        client.set_experiment_tag(experiment_id, key, "{}")
    client.set_experiment_tag(experiment_id, "mlflow.experimentKind", "a person's choice")
    Tracker(tracking(), output)
    tags = client.get_experiment(experiment_id).tags
    assert {key: tags[key] for key in VIEW_TAGS} == VIEW_TAGS
    assert tags["mlflow.experimentKind"] == "a person's choice"


def test_the_first_charts_are_of_parameters_and_metrics_that_runs_have() -> None:
    record = synthetic.completed()
    assert set(VIEW_PARAMS) <= set(fields.run_params(record))
    assert {*VIEW_BARS, *(key for keys in VIEW_PLOTS.values() for key in keys)} <= set(fields.run_metrics(record))


def test_a_place_with_blanks_and_accents_works(tmp_path: Path) -> None:
    output = OutputPaths.of(tmp_path / "mes essais été #1 100%" / "outputs")
    synthetic.write_run(output, synthetic.completed())
    assert sync_runs(output.root).delivered == ("made-up-1",)
    (run,) = runs_of(output)
    assert len(list(output.mlflow_artifacts.rglob("record.json"))) == 1
    assert len(client_of(output).list_artifacts(run.info.run_id)) == 3


def test_repair_of_a_clean_folder_needs_no_mlflow(tmp_path: Path) -> None:
    code = (
        "import sys; from qlora_exp.tracking.interrupted import mark_interrupted; mark_interrupted(sys.argv[1]);"
        " sys.exit('mlflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def wait_for(port: int) -> None:
    import time

    for _ in range(240):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.25)
    raise AssertionError("the server did not start")


MAKE_AND_DIE = """
import os, sys
from qlora_exp.config.schema import TrackingConfig
from qlora_exp.paths import OutputPaths
from qlora_exp.tracking.store import locate, open_store
import mlflow.store.db.utils as made
def killed(engine):
    os.kill(os.getpid(), 9)
made._upgrade_db = killed
open_store(locate(TrackingConfig(True, None, "qlora-exp", 5.0), OutputPaths.of(sys.argv[1])))
"""


def test_a_process_that_is_killed_while_it_makes_the_database_leaves_none_that_cannot_be_opened(
    fresh_output: OutputPaths,
) -> None:
    killed = subprocess.run([sys.executable, "-c", MAKE_AND_DIE, str(fresh_output.root)], check=False)
    assert killed.returncode == -9
    assert not fresh_output.mlflow_database.exists() or not fresh_output.mlflow_database.stat().st_size
    open_store(locate(TrackingConfig(True, None, "qlora-exp", 5.0), fresh_output))
    left = sorted(file.name for file in fresh_output.root.parent.glob("mlflow.db*"))
    assert left == ["mlflow.db", "mlflow.db.lock"]


@pytest.mark.parametrize("used", ["no", "experiments", "runs"])
def test_a_half_made_database_is_set_aside_and_one_that_was_used_never_is(output: OutputPaths, used: str) -> None:
    database = output.mlflow_database
    with sqlite3.connect(database) as opened:
        opened.execute("update alembic_version set version_num = '75868b020152'")  # as a killed process left it
        if used != "experiments":  # MLflow makes its first one after the last migration
            opened.execute("delete from experiments")
        if used == "runs":
            opened.execute("insert into runs (run_uuid, experiment_id) values ('1', 0)")
    kept = database.read_bytes()
    store = locate(TrackingConfig(True, None, "qlora-exp", 5.0), output)
    if used != "no":
        with pytest.raises(TrackingError, match=r"schema|tables"):
            open_store(store)
        assert database.read_bytes() == kept
    else:
        open_store(store)
        assert database.with_name("mlflow.db.half-made-1").read_bytes() == kept


def test_a_trial_of_an_earlier_version_gets_its_name_of_today_unless_a_person_named_it(output: OutputPaths) -> None:
    for number in range(2):
        trial = Trial("s", number, 1, {"lora.r": 8 * 2**number, "seed": 3})
        synthetic.write_run(output, synthetic.completed(f"made-up-{number}").replace(trial=trial))
    sync_runs(output.root)
    assert sorted(str(run.info.run_name) for run in runs_of(output)) == ["r16 s3", "r8 s3"]
    client = client_of(output)
    by_id = {run.data.tags[TAG]: run.info.run_id for run in runs_of(output)}
    client.update_run(by_id["made-up-0"], name="base nf4 r8")  # as earlier versions did
    client.update_run(by_id["made-up-1"], name="the one we ship")
    assert len(sync_runs(output.root).already) == 2
    names = {run.data.tags[TAG]: run.info.run_name for run in runs_of(output)}
    assert names == {"made-up-0": "r8 s3", "made-up-1": "the one we ship"}
