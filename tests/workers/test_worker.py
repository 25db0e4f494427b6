"""A worker and its real trial hosts, on synthetic trials: every trial ends exactly once, whatever happens to a host."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from qlora_exp.config.enums import Isolation
from qlora_exp.errors import QloraExpError, StudyError
from qlora_exp.orchestration import worker
from qlora_exp.orchestration.slot import LAST_OWNER_SECONDS
from qlora_exp.orchestration.worker import WorkerResult, run_worker
from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.records.files import read_record, write_json
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.study.types import Claim, Outcome
from tests.workers.small_study import SmallStudy, outcome_of, paths_of, spec_of, workers_of

PATIENCE_SECONDS = 60.0


def work(
    study: SmallStudy, output: Path, stop: Callable[[], str | None] = lambda: None, **workers: Any
) -> WorkerResult:
    paths = paths_of(output)
    return run_worker(study.spec, paths, workers_of(**workers), stop=stop, study=study, outcome_of=outcome_of)


def in_thread(study: SmallStudy, output: Path, **workers: Any) -> threading.Thread:
    thread = threading.Thread(target=lambda: work(study, output, **workers))
    thread.start()
    return thread


def until(true: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(0.05)
    raise AssertionError("it never happened")


def small(output: Path, *trials: tuple[str, ...], seconds: float = 0.1, **changes: Any) -> SmallStudy:
    spec = spec_of(output, len(trials), f"training.sleep_seconds={seconds}", **changes)
    return SmallStudy(spec, trials)


def record_of(study: SmallStudy, number: int) -> RunRecord:
    return read_record(OutputPaths.of(study.spec.output_root).run(study.run_ids[number]).record)


def live(paths: StudyPaths) -> dict[str, Any]:
    def read() -> dict[str, Any] | None:
        for file in paths.workers.glob("*.json"):
            state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if state["slots"][0]["host_pid"] is not None and state["slots"][0]["step"] is not None:
                return state
        return None

    found: dict[str, Any] = until(read)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_every_trial_is_run_and_told_once(tmp_path: Path) -> None:
    study = small(tmp_path, *((f"lora.r={r}",) for r in (2, 4, 8, 16)))
    result = work(study, tmp_path, count=2)
    assert result == WorkerResult(finished=4, stopped=None)
    assert {outcome.status for outcome in study.told.values()} == {Status.COMPLETED}
    for number in range(4):
        record = record_of(study, number)
        assert record.trial is not None
        assert (record.trial.study, record.trial.number, record.trial.attempt) == ("small", number, 1)
        assert record.config["lora"]["r"] == 2 * 2**number
        assert study.told[number].values == (record.scores.after.loss_per_item if record.scores.after else None,)
    assert study.heartbeats > 0
    assert not list(paths_of(tmp_path).workers.glob("*.json"))


@pytest.mark.parametrize(("isolation", "hosts"), [(Isolation.warm, 1), (Isolation.fresh, 2)])
def test_isolation_says_how_many_hosts_there_are(tmp_path: Path, isolation: Isolation, hosts: int) -> None:
    study = small(tmp_path, ("lora.r=2",), ("lora.r=4",), seconds=1.5)
    pids: set[int] = set()
    thread = in_thread(study, tmp_path, isolation=isolation)
    while thread.is_alive():
        for file in paths_of(tmp_path).workers.glob("*.json"):
            with contextlib.suppress(OSError):
                pids.add(json.loads(file.read_text(encoding="utf-8"))["slots"][0]["host_pid"])
        time.sleep(0.05)
    assert len(pids - {None}) == hosts


def test_a_host_that_is_killed_costs_an_attempt_and_not_the_trial(tmp_path: Path) -> None:
    study = small(tmp_path, ("lora.r=2",), ("lora.r=4",), seconds=2.0)
    thread = in_thread(study, tmp_path)
    os.kill(live(paths_of(tmp_path))["slots"][0]["host_pid"], signal.SIGKILL)
    thread.join()
    assert {number: outcome.status for number, outcome in study.told.items()} == dict.fromkeys((0, 1), Status.COMPLETED)
    assert [number for number, _ in study.requeued] == [0]
    assert "SIGKILL" in study.requeued[0][1]
    record = record_of(study, 0)
    assert record.trial is not None
    assert record.trial.attempt == 2
    assert [failure.kind for failure in record.earlier_failures] == ["Lost"]
    assert len(list(OutputPaths.of(tmp_path).runs.iterdir())) == 2


def test_a_trial_that_always_kills_its_host_fails_after_its_attempts(tmp_path: Path) -> None:
    study = small(tmp_path, ("training.sleep_fault=crash",), ("lora.r=4",), max_attempts=2)
    work(study, tmp_path)
    assert study.told[0].status is Status.FAILED
    assert study.told[1].status is Status.COMPLETED
    record = record_of(study, 0)
    assert record.status is Status.FAILED
    assert record.process is None
    assert len(record.earlier_failures) == 1


def test_a_host_that_hangs_is_dumped_and_replaced(tmp_path: Path) -> None:
    study = small(tmp_path, ("training.sleep_fault=hang",), ("lora.r=4",), max_attempts=1)
    work(study, tmp_path, hang_seconds=1.5)
    assert study.told[0].status is Status.FAILED
    assert study.told[1].status is Status.COMPLETED
    failure = record_of(study, 0).failure
    assert failure is not None
    assert "sent nothing" in failure.message
    log = next(paths_of(tmp_path).logs.iterdir()).read_text()
    assert "_hang" in log


@pytest.mark.parametrize(("retries", "status"), [(0, Status.OUT_OF_MEMORY), (1, Status.COMPLETED)])
def test_memory_that_ran_out_is_told_or_tried_again_with_half(tmp_path: Path, retries: int, status: Status) -> None:
    trial = ("training.sleep_fault=out_of_memory", "training.batch_size=16")
    study = small(tmp_path, trial, ("lora.r=4",), out_of_memory_retries=retries)
    work(study, tmp_path)
    assert study.told[0].status is status
    assert study.told[1].status is Status.COMPLETED
    record = record_of(study, 0)
    assert record.config["training"]["micro_batch_size"] == (8 if retries else None)
    assert [failure.kind for failure in record.earlier_failures] == (["MemoryError"] if retries else [])
    assert any("micro-batches of 16" in warning for warning in record.warnings) == bool(retries)


@pytest.mark.parametrize(("fault", "status"), [("diverge", Status.DIVERGED), ("fail", Status.FAILED)])
def test_a_trial_that_fails_by_itself_is_told_at_once(tmp_path: Path, fault: str, status: Status) -> None:
    study = small(tmp_path, (f"training.sleep_fault={fault}",))
    work(study, tmp_path)
    assert study.told[0].status is status
    assert study.requeued == []


def test_wrong_input_of_a_later_trial_fails_that_trial_alone(tmp_path: Path) -> None:
    study = small(tmp_path, ("lora.r=4",), ("lora.rank=4",), ("lora.r=8",))
    work(study, tmp_path)
    assert study.told[1].status is Status.FAILED
    assert study.told[1].failure is not None
    assert "lora.rank" in study.told[1].failure.message
    assert [study.told[number].status for number in (0, 2)] == [Status.COMPLETED] * 2


def test_wrong_input_of_the_first_trial_is_told_before_another_starts(tmp_path: Path) -> None:
    study = small(tmp_path, ("lora.rank=4",), ("lora.r=4",))
    with pytest.raises(QloraExpError, match="no key"):
        work(study, tmp_path)
    assert not [outcome for outcome in study.told.values() if outcome.status is not Status.INTERRUPTED]


def test_the_study_prunes(tmp_path: Path) -> None:
    study = small(tmp_path, ("training.evaluate_every_steps=5",))
    study.prune_at = 10
    work(study, tmp_path)
    assert study.told[0].status is Status.PRUNED
    assert [(number, step) for number, step, _ in study.reports] == [(0, 5), (0, 10)]


def test_a_run_that_had_ended_is_told_without_running_it_again(tmp_path: Path) -> None:
    study = small(tmp_path, ("lora.r=2",))
    work(study, tmp_path)
    first = record_of(study, 0)
    again = small(tmp_path, ("lora.r=2",))
    again.waiting = [type(again.waiting[0])(0, 0, {}, ("lora.r=2",), 2, first.run_id)]
    work(again, tmp_path)
    assert again.told[0] == study.told[0]
    again.run_ids = study.run_ids
    assert record_of(again, 0) == first


def test_a_garbled_record_is_put_aside_and_the_trial_run_again(tmp_path: Path) -> None:
    study = small(tmp_path, ("lora.r=2",))
    paths = OutputPaths.of(tmp_path).run("an-id")
    paths.folder.mkdir(parents=True)
    paths.record.write_text('{"schema_version": 1, "run_')
    study.waiting = [type(study.waiting[0])(0, 0, {}, ("lora.r=2",), 2, "an-id")]
    work(study, tmp_path)
    assert study.told[0].status is Status.COMPLETED
    assert read_record(paths.record).run_id == "an-id"
    assert paths.record.with_suffix(".json.damaged").exists()


def test_stopping_gracefully_lets_the_running_trial_end(tmp_path: Path) -> None:
    study = small(tmp_path, ("lora.r=2",), ("lora.r=4",), seconds=2.0)
    thread = in_thread(study, tmp_path)
    live(paths_of(tmp_path))
    write_json(paths_of(tmp_path).stop, {"mode": "gracefully"})
    thread.join()
    assert [outcome.status for outcome in study.told.values()] == [Status.COMPLETED]
    assert len(study.waiting) == 1


def test_stopping_now_gives_the_trial_back_without_costing_an_attempt(tmp_path: Path) -> None:
    study = small(tmp_path, ("lora.r=2",), seconds=30.0)
    thread = in_thread(study, tmp_path)
    pid = live(paths_of(tmp_path))["slots"][0]["host_pid"]
    write_json(paths_of(tmp_path).stop, {"mode": "now"})
    thread.join()
    assert study.told == {}
    assert [claim.attempt for claim in study.waiting] == [1]
    assert record_of(study, 0).status is Status.INTERRUPTED
    assert not alive(pid)


def test_a_trial_that_was_taken_over_is_left_to_its_new_owner(tmp_path: Path) -> None:
    study = small(tmp_path, ("lora.r=2",), seconds=30.0)
    thread = in_thread(study, tmp_path)
    pid = live(paths_of(tmp_path))["slots"][0]["host_pid"]
    study.running[0] = dataclasses.replace(study.running[0], attempt=2)
    until(lambda: not alive(pid))
    assert record_of(study, 0).status is Status.RUNNING
    del study.running[0]
    thread.join()
    assert study.told == {}


def test_too_many_failures_end_the_worker(tmp_path: Path) -> None:
    study = small(tmp_path, *[("training.sleep_fault=fail",)] * 3, max_failures=2)
    assert work(study, tmp_path).stopped == "failures"
    assert len(study.told) == 2


def test_a_full_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_exp.orchestration import slot

    monkeypatch.setattr(slot, "MAX_PAUSE_SECONDS", 0.1)
    study = small(tmp_path, ("lora.r=2",))
    runs = OutputPaths.of(tmp_path).runs
    runs.mkdir(parents=True)
    asked: list[Path] = []

    def room_comes_back(paths: Any) -> bool:
        asked.append(paths.folder)
        (tmp_path / "full").unlink(missing_ok=True)
        return True

    monkeypatch.setattr(slot, "_can_write", room_comes_back)
    monkeypatch.setenv("PYTHONPATH", f"{full_disk(tmp_path)}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    work(study, tmp_path)
    assert asked
    assert study.told[0].status is Status.COMPLETED
    assert study.requeued == []


@pytest.mark.parametrize("stays_away", [False, True])
def test_a_storage_that_does_not_answer_is_waited_for_a_lease_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stays_away: bool
) -> None:
    monkeypatch.setattr(worker, "WAIT_SECONDS", 0.2)
    study = small(tmp_path, ("lora.r=2",))
    tell, tries = study.tell, []

    def away(claim: Claim, outcome: Outcome) -> None:
        tries.append(claim.number)
        if stays_away or len(tries) < 3:
            raise OperationalError("UPDATE trials", {}, Exception("server closed the connection"))
        tell(claim, outcome)

    monkeypatch.setattr(study, "tell", away)
    if stays_away:
        with pytest.raises(StudyError, match="storage doesn't answer"):
            work(study, tmp_path, lease_seconds=0.5)
        assert len(tries) >= 3
    else:
        assert work(study, tmp_path).finished == 1
        assert study.told[0].status is Status.COMPLETED
    assert study.requeued == []


def full_disk(folder: Path) -> Path:
    """A folder for PYTHONPATH whose sitecustomize fills the disk for records while the file ``full`` is there."""
    (folder / "full").touch()
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        f"""
import errno, os, sys
def refuse(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("record.json") and os.path.exists({str(folder / "full")!r}):
        raise OSError(errno.ENOSPC, "No space left on device", str(arguments[1]))
sys.addaudithook(refuse)
"""
    )
    return site


WORKER = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may have been started by nohup
from pathlib import Path
from tests.workers.small_study import SmallStudy, outcome_of, paths_of, spec_of, workers_of
from qlora_exp.orchestration.worker import run_worker
output = Path(sys.argv[1])
spec = spec_of(output, 1, "training.sleep_seconds=60")
study = SmallStudy(spec, [("lora.r=2",)])
result = run_worker(spec, paths_of(output), workers_of(), study=study, outcome_of=outcome_of)
print(result.stopped, len(study.waiting), flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_host_dies_with_its_worker(tmp_path: Path, number: signal.Signals) -> None:
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    pid = live(paths_of(tmp_path))["slots"][0]["host_pid"]
    worker.send_signal(number)
    told, _ = worker.communicate(timeout=PATIENCE_SECONDS)
    end = time.monotonic() + LAST_OWNER_SECONDS  # then its trial is run again
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(pid)
    assert told.split() == ([] if number == signal.SIGKILL else ["now", "1"])


LEAVING_BY_A_SIGNAL = """
import signal
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(3))
try:
    run_worker(spec, paths_of(output), workers_of(), study=study, outcome_of=outcome_of)
finally:
    print(len(study.waiting), study.waiting[0].attempt, flush=True)
"""


def test_a_worker_that_its_launcher_takes_away_gives_its_trial_back(tmp_path: Path) -> None:
    """As submitit does before a job's time is over: by an exception out of a signal's handler."""
    code = WORKER.partition("result =")[0] + LEAVING_BY_A_SIGNAL
    worker = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    pid = live(paths_of(tmp_path))["slots"][0]["host_pid"]
    worker.send_signal(signal.SIGUSR2)
    told, _ = worker.communicate(timeout=PATIENCE_SECONDS)
    assert worker.returncode == 3
    assert told.split() == ["1", "1"]
    assert not alive(pid)
    [folder] = OutputPaths.of(tmp_path).runs.iterdir()
    assert read_record(folder / "record.json").status is Status.INTERRUPTED


def test_the_worker_tells_what_it_is_doing(tmp_path: Path) -> None:
    study = small(tmp_path, ("lora.r=2",), seconds=3.0)
    thread = in_thread(study, tmp_path)
    state = live(paths_of(tmp_path))
    thread.join()
    slot = state["slots"][0]
    assert (slot["trial"], slot["phase"], slot["total"], slot["params"]) == (0, "train", 20, {"lora.r": "2"})
    assert slot["loss"] > 0
    assert state["process"]["pid"] == os.getpid()


def test_a_host_of_synthetic_trials_loads_nothing_heavy(tmp_path: Path) -> None:
    study: SmallStudy = small(tmp_path, ("lora.r=2",), seconds=3.0)
    thread = in_thread(study, tmp_path)
    pid = live(paths_of(tmp_path))["slots"][0]["host_pid"]
    mapped = Path(f"/proc/{pid}/maps").read_text()
    thread.join()
    assert "python" in mapped
    assert "libtorch" not in mapped


def test_every_trial_is_delivered_to_mlflow_before_the_worker_ends(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    output = tmp_path / "outputs"
    study = small(output, ("lora.r=2",), ("training.sleep_fault=fail",), ("lora.r=8",))
    study.spec = dataclasses.replace(study.spec, overrides=(*study.spec.overrides, "tracking.enabled=true"))
    work(study, output)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    assert sorted(run.info.status for run in client.search_runs(experiments)) == ["FAILED", "FINISHED", "FINISHED"]
