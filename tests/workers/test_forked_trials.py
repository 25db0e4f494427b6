"""Trial processes that a server forks: the same results, ends and files as those of new interpreters."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_exp.errors import QloraExpError
from qlora_exp.orchestration import forking
from qlora_exp.orchestration import trial_process as trial_process_module
from qlora_exp.orchestration.devices import environment_of
from qlora_exp.orchestration.messages import Message, Ready, RunTrial, TrialEnded, UserError
from qlora_exp.orchestration.slot import LAST_OWNER_SECONDS
from qlora_exp.orchestration.trial_process import ProcessDied, TrialProcess
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.types import RunRecord, Trial
from qlora_exp.system import heap
from qlora_exp.system.environment import NO_TELEMETRY
from tests import processes

pytestmark = pytest.mark.skipif(not forking.can_fork(), reason="this system can't fork so")

PATIENCE_SECONDS = 300.0


def trial_process(folder: Path, gpu: str | None = None, log: Path | None = None) -> TrialProcess:
    return TrialProcess(log or folder / "log", environment_of(gpu, 1), ("tracking",))


def message_of(process: TrialProcess, wanted: Callable[[Message], bool] = lambda _: True) -> Message:
    end = time.monotonic() + PATIENCE_SECONDS
    while (message := process.receive(1.0)) is None or not wanted(message):
        assert time.monotonic() < end
    return message


def ready(process: TrialProcess) -> int:
    assert message_of(process) == Ready()
    assert process.pid is not None
    return process.pid


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_trial_processes_share_a_server_and_end_with_it(tmp_path: Path) -> None:
    one, other = trial_process(tmp_path), trial_process(tmp_path)
    server = parent_of(ready(one))
    assert parent_of(ready(other)) == server != os.getpid()
    assert b"qlora_exp.orchestration.trial_main" in Path(f"/proc/{other.pid}/cmdline").read_bytes()
    assert str(tmp_path) not in " ".join(os.readlink(file) for file in Path(f"/proc/{server}/fd").iterdir())
    assert one.kill() == -signal.SIGKILL
    os.kill(server, signal.SIGKILL)
    with pytest.raises(ProcessDied) as died:
        message_of(other)
    assert died.value.code == -signal.SIGKILL
    again = trial_process(tmp_path)  # forked from another server, or new if this server's end isn't noticed yet
    assert parent_of(ready(again)) != server
    for process in (one, other, again):
        process.kill()


SERVERS = """
import os, sys
from pathlib import Path
from qlora_exp.orchestration import forking
from tests.workers.test_forked_trials import parent_of, ready, trial_process
def server_of():
    process = trial_process(folder)
    server = parent_of(ready(process))
    process.kill()
    return server
folder = Path(sys.argv[1])
forking.PACKAGE = folder  # its files stand for this package's source
with forking.servers_kept():
    servers = [server_of(), server_of()]
    os.environ["PYTEST_CURRENT_TEST"] = "another"
    servers.append(server_of())
    os.environ["HF_HOME"] = str(folder)
    servers.append(server_of())
    os.chdir(folder)
    servers.append(server_of())
    os.utime("module.py", (1.0, 1.0))
    servers.append(server_of())
print(*[servers.index(server) for server in servers], os.getpid() in servers)
"""


def test_a_server_is_used_only_while_imports_would_be_the_same(tmp_path: Path) -> None:
    (tmp_path / "module.py").touch()
    done = subprocess.run([sys.executable, "-c", SERVERS, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*"000345", "False"]


@pytest.mark.parametrize("why", ["its own GPU", "a driver", "another driver"])
def test_where_cuda_may_be_used_a_trial_process_is_a_new_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "a driver":
        (tmp_path / "nvidiactl").touch()
        monkeypatch.setattr(heap, "NVIDIA_DRIVER", tmp_path / "nvidiactl")
    if why == "another driver":
        monkeypatch.setattr(forking, "OTHER_DRIVERS", (tmp_path,))
    process = trial_process(tmp_path, "GPU-1" if why == "its own GPU" else None)
    assert process.pid is not None
    assert parent_of(process.pid) == os.getpid()
    process.kill()


def test_where_nothing_can_be_forked_a_new_interpreter_gets_what_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a pipe holds, sent while the server still imports."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, threading, time\nif any('fork_server' in text for text in sys.orig_argv):\n"
        "    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    for _ in range(2):  # the second process doesn't start a server again
        process = trial_process(tmp_path)
        trial = Trial("study", 0, 1, {}, "id")
        process.send(RunTrial(("lora.rank=" + "x" * 300_000,), str(tmp_path), "run", False, trial, {}, False))
        assert isinstance(message_of(process, lambda message: message != Ready()), UserError)
        assert process.pid is not None
        assert parent_of(process.pid) == os.getpid()
        process.end()
    assert (tmp_path / "log").read_text().count("trial processes are new interpreters") == 1


def test_one_that_is_ended_before_it_was_forked_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # another server than those of other tests: it still imports
    process = trial_process(tmp_path)
    trial = Trial("study", 0, 1, {}, "id")
    process.send(RunTrial(("training.engine=sleep", "tracking=off"), str(tmp_path), "run", False, trial, {}, False))
    assert process.pid is None
    process.terminate()
    with pytest.raises(ProcessDied) as died:
        message_of(process)
    assert died.value.code == -signal.SIGTERM
    process.kill()
    after = trial_process(tmp_path)
    ready(after)
    after.end()
    assert not OutputPaths.of(tmp_path).run("run").folder.exists()


MANY_DESCRIPTORS = """
import os, resource, sys
from pathlib import Path
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (2048 if most == resource.RLIM_INFINITY else min(2048, most), most))
kept = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]
from qlora_exp.orchestration import forking
from tests.workers.test_forked_trials import parent_of, ready, trial_process
for number in range(2):
    with forking.servers_kept() if number else open(os.devnull):
        process = trial_process(Path(sys.argv[1]))
        print(parent_of(ready(process)) == os.getpid(), process.kill())
"""


def test_a_worker_may_have_more_than_1024_files_open(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MANY_DESCRIPTORS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "True -9\nFalse -9\n", done.stderr


def test_a_full_disk_under_the_log_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import atexit, warnings\nwarnings.warn('printed by an import')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    processes = [trial_process(tmp_path, log=Path("/dev/full")) for _ in range(2)]
    parents = {parent_of(ready(process)) for process in processes}
    assert len(parents) == 1
    assert os.getpid() not in parents
    assert {process.kill() for process in processes} == {-signal.SIGKILL}


def test_a_signal_to_all_processes_of_a_job_is_answered_by_trial_processes_not_by_their_server(tmp_path: Path) -> None:
    """As a scheduler and a container send it: a run then saves what it has."""
    one = trial_process(tmp_path)
    server = parent_of(ready(one))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(server, number)
    other = trial_process(tmp_path)
    assert parent_of(ready(other)) == server
    other.terminate()
    with pytest.raises(ProcessDied) as died:
        message_of(other)
    assert died.value.code == -signal.SIGTERM
    for process in (one, other):
        process.kill()


def test_a_server_that_is_stopped_does_not_keep_a_worker_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_process_module, "REPORT_SECONDS", 0.5)
    process = trial_process(tmp_path)
    server = parent_of(ready(process))
    os.kill(server, signal.SIGSTOP)
    assert process.kill() == -signal.SIGKILL
    end = time.monotonic() + LAST_OWNER_SECONDS
    while is_alive(server) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_alive(server)


def test_one_that_hangs_writes_its_stacks(tmp_path: Path) -> None:
    process = trial_process(tmp_path)
    ready(process)
    assert process.dump_and_kill() in (-signal.SIGTERM, -signal.SIGKILL)
    assert "trial_main.py" in (tmp_path / "log").read_text()


def test_imports_that_hang_write_their_stacks_and_cost_the_other_processes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nclass Hanging:\n    def find_spec(self, name, *_):\n        if name == 'mlflow':\n"
        f"            open({str(tmp_path / 'hangs')!r}, 'w').close()\n            __import__('time').sleep(600)\n"
        "if any('fork_server' in text for text in sys.orig_argv):\n    sys.meta_path.insert(0, Hanging())\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    hung, other = trial_process(tmp_path), trial_process(tmp_path)
    end = time.monotonic() + PATIENCE_SECONDS
    while not (tmp_path / "hangs").exists() and time.monotonic() < end:
        time.sleep(0.05)
    hung.dump_and_kill()
    assert "find_spec" in (tmp_path / "log").read_text()
    assert parent_of(ready(other)) == os.getpid()
    other.end()


SHORT = [
    *("training.device=cpu", "training.max_steps=4", "training.batch_size=4", "training.max_length=64"),
    *("evaluation=quick", "evaluation.max_items=4", "quantization=nf4", "tracking=off"),
]
MEMORY = {"resident_after_imports_bytes": 0.01, "peak_load_bytes": 0.1, "peak_train_bytes": 0.25}
"""Relative differences between equal runs: so small a model's peak varies between new interpreters, too."""


def test_a_forked_trial_has_the_results_and_the_memory_of_a_new_interpreters(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*SHORT, "model=local", f"model.path={tiny_models['llama']}"]
    overrides += ["task=local", "task.kind=classification", f"task.path={colour_task}"]

    def run(name: str) -> tuple[RunRecord, list[Any], str]:
        root = tmp_path / name
        process = TrialProcess(root / "log", environment_of(None, 1), ("training",))
        trial = Trial("study", 0, 1, {}, "id")
        process.send(RunTrial(tuple(overrides), str(root), "run", False, trial, {}, False))
        assert message_of(process, lambda message: isinstance(message, TrialEnded | UserError)) == TrialEnded()
        assert process.pid is not None
        assert (parent_of(process.pid) == os.getpid()) == (name == "fresh")
        process.end()
        paths = OutputPaths.of(root).run("run")
        curve = [json.loads(line) for line in paths.curve.read_text().splitlines()]
        losses = [{key: value for key, value in point.items() if "loss" in key} for point in curve]
        weights = hashlib.sha256((paths.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
        return read_record(paths.record), losses, weights

    forked, losses_of_forked, weights_of_forked = run("forked")
    monkeypatch.setattr(heap, "NVIDIA_DRIVER", tmp_path)  # with a driver nothing is forked
    fresh, losses, weights = run("fresh")
    assert losses_of_forked == losses
    assert any(losses)
    assert weights_of_forked == weights
    assert forked.scores == fresh.scores
    assert forked.environment == fresh.environment
    assert forked.memory.process_reused == fresh.memory.process_reused
    for name, tolerance in MEMORY.items():
        assert getattr(forked.memory, name) == pytest.approx(getattr(fresh.memory, name), rel=tolerance), name


def test_each_trial_of_fresh_isolation_has_a_new_fork_with_its_own_memory_figures(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    given = [*SHORT, "model=local", f"model.path={tiny_models['llama']}", "workers.isolation=fresh", "lora.r=2,4"]
    given += ["task=local", "task.kind=classification", f"task.path={colour_task}", f"output_root={tmp_path}"]
    sweep = processes.Popen([sys.executable, "-m", "qlora_exp", "-m", *given], stderr=subprocess.DEVNULL)
    parents: dict[int, int] = {}
    while sweep.poll() is None:
        for file in tmp_path.glob("runs/*/record.json"):
            with contextlib.suppress(OSError, QloraExpError):
                owner = read_record(file).process
                if owner is not None:
                    parents[owner.pid] = parents.get(owner.pid) or parent_of(owner.pid)
        time.sleep(0.02)
    assert sweep.returncode == 0
    assert len(parents) == 2
    assert len(set(parents.values()) - {sweep.pid}) == 1
    records = [read_record(file) for file in tmp_path.glob("runs/*/record.json")]
    assert [record.memory.process_reused for record in records] == [False, False]
    first, second = (record.memory for record in records)
    assert first.resident_after_imports_bytes == pytest.approx(second.resident_after_imports_bytes, rel=0.02)
    assert None not in (first.peak_train_bytes, second.peak_train_bytes)


def test_the_trial_processes_of_a_tracked_sweep_in_the_background_share_one_server(tmp_path: Path) -> None:
    """Importing MLflow's client sets variables in the orchestrator. A shell's background job ignores INT."""
    given = ["training.engine=sleep", "tracking=mlflow", "workers.isolation=fresh", "lora.r=2,4"]
    command = [sys.executable, "-m", "qlora_exp", "-m", *given, f"output_root={tmp_path}"]
    environment = {name: value for name, value in os.environ.items() if name not in NO_TELEMETRY}
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        sweep = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGINT, previous)
    parents: dict[int, int] = {}
    while sweep.poll() is None:
        for file in tmp_path.glob("runs/*/record.json"):
            with contextlib.suppress(OSError, QloraExpError):
                owner = read_record(file).process
                if owner is not None:
                    parents[owner.pid] = parents.get(owner.pid) or parent_of(owner.pid)
        time.sleep(0.02)
    assert sweep.returncode == 0
    assert len(parents) == 2
    assert len(set(parents.values()) - {sweep.pid}) == 1


WORKER = """
import sys, time
from pathlib import Path
from qlora_exp.orchestration import forking
from tests.workers.test_forked_trials import parent_of, ready, trial_process
with forking.servers_kept():
    one = trial_process(Path(sys.argv[1]))
    pid = ready(one)
    importing = forking.server_for({"PATH": "/"}, ["time"], 2)
    print(pid, parent_of(pid), importing.pid, flush=True)
    if sys.argv[2] == "killed":
        time.sleep(600)
"""


@pytest.mark.parametrize("how", ["killed", "at its end"])
def test_a_trial_process_and_its_server_end_with_their_worker(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-c", WORKER, str(tmp_path), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        pids = [int(text) for text in worker.stdout.readline().split()]
        assert len(pids) == 3
        if how == "killed":
            worker.kill()
    end = time.monotonic() + LAST_OWNER_SECONDS
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))
