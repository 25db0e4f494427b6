"""Memory that is predicted not to fit into this machine, and processes that ended because it did not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_exp import load_run, run
from qlora_exp.cli import main
from qlora_exp.config.compose import compose
from qlora_exp.estimate.memory_fit import CPU_PROCESS_BYTES
from qlora_exp.formatting import bytes_text
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record, write_json
from qlora_exp.records.fit_types import Fit
from qlora_exp.records.types import Process, RunRecord, Status
from qlora_exp.runs.entry_points import complete_killed_record
from qlora_exp.runs.execute import execute
from qlora_exp.runs.prepare import prepare
from qlora_exp.runs.termination import exit_if_memory_is_short
from qlora_exp.system import memory_limits
from qlora_exp.system.environment import probe, process_identity
from qlora_exp.system.out_of_memory import killed_for_memory
from qlora_exp.tracking.interrupted import mark_interrupted
from tests.analysis import made_up
from tests.conftest import write_colour_task

SMALL = [
    *("training.device=cpu", "quantization=fp32", "training.max_steps=1", "training.batch_size=512", "tracking=off"),
    *("task=local", "task.kind=classification", "task.path=colours.jsonl"),
    *("evaluation.before=false", "evaluation.max_items=4", "evaluation.forgetting=false"),
    *("evaluation.baselines=false", "evaluation.generate=false"),
]
Machine = Callable[..., None]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, colour_task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def needed_bytes(tmp_path_factory: pytest.TempPathFactory) -> int:
    """What training with :data:`SMALL` is predicted to add to its process."""
    path = write_colour_task(tmp_path_factory.mktemp("task") / "colours.jsonl")
    config = compose([*SMALL, f"task.path={path}"])
    environment = replace(probe(config.training.device), glibc_tunables=None)
    peak: int | None = prepare(config, environment).plan.predicted_peak_train_bytes
    assert peak
    return peak


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Gives the machine's control groups, from the outermost on, limits in bytes and a number of kills."""

    def made(*limits: int | str, kills: int = 0, version: int = 2) -> None:
        groups, path = tmp_path / "groups", "/".join(f"group{depth}" for depth in range(1, len(limits)))
        names = ("memory.max", "memory.events") if version == 2 else ("memory.limit_in_bytes", "memory.oom_control")
        folder = groups if version == 2 else groups / "memory"
        for depth, limit in enumerate(limits):
            folder = folder / f"group{depth}" if depth else folder
            folder.mkdir(parents=True, exist_ok=True)
            (folder / names[0]).write_text(f"{limit}\n")
            (folder / names[1]).write_text(f"low 0\noom_kill {kills}\n")
        (tmp_path / "proc" / "self").mkdir(parents=True, exist_ok=True)
        controllers = "0::" if version == 2 else "4:memory:"
        (tmp_path / "proc" / "self" / "cgroup").write_text(f"9:name=systemd:/other\n{controllers}/{path}\n")
        monkeypatch.setattr(memory_limits, "PROC", tmp_path / "proc")
        monkeypatch.setattr(memory_limits, "CGROUPS", groups)

    return made


@pytest.mark.parametrize("version", [1, 2])
def test_the_smallest_limit_on_the_way_up_counts(version: int, machine: Machine) -> None:
    unlimited = "max" if version == 2 else 9223372036854771712
    machine(unlimited, 2_000_000_000, unlimited, kills=3, version=version)
    assert memory_limits.total_bytes() == 2_000_000_000
    assert memory_limits.out_of_memory_kills() == 3
    machine(1_000_000_000, 2_000_000_000, version=version)
    assert memory_limits.total_bytes() == 1_000_000_000


def test_without_control_groups_it_is_the_machines_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limits, "PROC", tmp_path)
    monkeypatch.setattr(memory_limits, "CGROUPS", tmp_path)
    assert memory_limits.total_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_limits.out_of_memory_kills() is None
    assert not memory_limits.is_nearly_full()


def patched_children(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Processes that the command starts see the machine that ``machine`` made, too."""
    (folder / "site").mkdir()
    places = {"PROC": folder / "proc", "CGROUPS": folder / "groups"}
    lines = [f"memory_limits.{name} = Path({str(place)!r})" for name, place in places.items()]
    text = "\n".join(("from pathlib import Path", "from qlora_exp.system import memory_limits", *lines))
    (folder / "site" / "sitecustomize.py").write_text(text)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    )


@pytest.mark.parametrize("verb", ["validate", "run", "run -m", "python -m", "sweep"])
def test_what_the_machines_memory_cannot_hold_is_refused_before_anything_loads(
    verb: str,
    machine: Machine,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    needed_bytes: int,
) -> None:
    machine(CPU_PROCESS_BYTES + needed_bytes // 2)
    patched_children(monkeypatch, tmp_path)
    from qlora_exp.orchestration.hydra_app import main as hydra

    code = {
        "validate": lambda: main(["validate", *SMALL]),
        "run": lambda: main(["run", *SMALL]),
        "run -m": lambda: hydra(["-m", "hydra/sweeper=basic", *SMALL, "lora.r=4,8"]),
        "python -m": lambda: hydra(SMALL),
        "sweep": lambda: hydra(["-m", *SMALL, "lora.r=4,8"]),
    }[verb]()
    told = capfd.readouterr().err
    assert code == 2, told
    assert f"of {bytes_text(needed_bytes // 2)}" in told
    assert not list(Path("outputs").glob("runs/*/record.json"))
    if verb == "validate":
        assert "this machine's memory" in told
        assert "--force" in told
        proposed = next(word for word in told.split() if word.startswith("training.micro_batch_size="))
        assert main(["validate", *SMALL, proposed]) == 0


def test_a_batch_of_a_hundred_thousand_is_told_what_fits(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine(24_000_000_000)
    assert main(["validate", *SMALL, "training.batch_size=100000"]) == 2
    told = capsys.readouterr().err
    proposed = next(word for word in told.split() if word.startswith("training.micro_batch_size="))
    assert 16 < int(proposed.partition("=")[2]) < 100_000


def test_plan_says_what_validate_says(machine: Machine, capsys: pytest.CaptureFixture[str], needed_bytes: int) -> None:
    for limit in (2.0, 1.1, 0.9, 0.5):
        machine(CPU_PROCESS_BYTES + int(limit * needed_bytes))
        code = main(["validate", *SMALL])
        warned = "warning" in capsys.readouterr().out
        assert main(["plan", *SMALL, "--json"]) == 0
        (planned,) = json.loads(capsys.readouterr().out)
        # A plan that may not fit is near the edge, as is a run that starts with a warning.
        assert (code == 0) == (planned["fits"] or planned["borderline"]), (limit, planned["reason"])
        assert warned == (planned["borderline"] and code == 0), limit


def test_near_the_bound_a_run_starts_with_a_warning_and_keeps_what_would_fit(
    machine: Machine, needed_bytes: int
) -> None:
    machine(CPU_PROCESS_BYTES + round(needed_bytes / 1.1))
    record = run(*SMALL)
    assert record.status is Status.COMPLETED
    assert record.fit is not None
    assert "training.micro_batch_size=" in (record.fit.would_fit or "")
    assert any("within the prediction's error" in warning for warning in record.warnings)


def test_force_starts_what_is_refused(machine: Machine, capsys: pytest.CaptureFixture[str], needed_bytes: int) -> None:
    machine(CPU_PROCESS_BYTES + needed_bytes // 2)
    assert main(["validate", *SMALL, "--force"]) == 0
    assert "started anyway" in capsys.readouterr().out
    assert main(["run", *SMALL, "--force"]) == 0
    assert any("started anyway" in warning for warning in load_run("last").warnings)


# What is told of a process that is gone.

NEAR = Fit(1000, 0, 1000, 900, 0.22, 0, would_fit="training.micro_batch_size=1 (5 MB)")


def left_running(fit: Fit | None, process: Process | None = None) -> Path:
    paths = OutputPaths.of("outputs").run("dead")
    paths.folder.mkdir(parents=True)
    dead = replace(process_identity(), pid=2**22 - 3, start_ticks=1)
    record = made_up.run().replace(run_id="dead", status=Status.RUNNING, ended_at=None, process=process or dead)
    write_json(paths.record, record.replace(fit=fit))
    return paths.record


def test_a_run_near_the_bound_whose_process_is_gone_is_not_to_be_run_again_as_it_was() -> None:
    file = left_running(NEAR)
    mark_interrupted("outputs")
    failure = read_record(file).failure
    assert failure is not None
    assert "probably out of memory" in failure.message
    assert "predicted to need 1 kB of 900 B" in failure.message
    assert failure.hint == NEAR.would_fit


def test_a_run_far_from_the_bound_whose_process_is_gone_is_told_as_before() -> None:
    file = left_running(replace(NEAR, limit_bytes=10**9))
    mark_interrupted("outputs")
    assert "the same settings" in str(read_record(file).failure)


@pytest.mark.parametrize(
    ("fit", "signal_number", "kills", "status"),
    [
        (NEAR, signal.SIGKILL, 0, Status.OUT_OF_MEMORY),
        (replace(NEAR, limit_bytes=10**9), signal.SIGKILL, 1, Status.OUT_OF_MEMORY),
        (replace(NEAR, limit_bytes=10**9), signal.SIGKILL, 0, Status.FAILED),
        (NEAR, signal.SIGSEGV, 0, Status.FAILED),
        (None, signal.SIGKILL, 1, Status.OUT_OF_MEMORY),
    ],
)
def test_a_run_of_a_multirun_that_the_kernel_ended_is_out_of_memory(
    fit: Fit | None,
    signal_number: int,
    kills: int,
    status: Status,
    machine: Machine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine("max", kills=kills)
    process = process_identity()
    file = left_running(fit, process)
    complete_killed_record(compose(["tracking=off"]), process.pid, signal_number, kills_before=0)
    record = read_record(file)
    assert record.status is status
    assert ("probably out of memory" in capsys.readouterr().err) == (status is Status.OUT_OF_MEMORY)
    assert record.failure is not None
    assert record.failure.hint


def test_without_a_sign_of_it_nothing_is_called_out_of_memory(machine: Machine) -> None:
    machine("max", kills=2)
    assert killed_for_memory(None, signal.SIGKILL, 2) is None
    assert killed_for_memory(None, signal.SIGKILL, None) is None
    assert killed_for_memory(None, signal.SIGKILL, 1) is not None


STUCK = """
import hashlib, sys, time, types
from pathlib import Path
from qlora_exp.system import memory_limits
from qlora_exp.runs import sleep_engine as synthetic
memory_limits.PROC = Path("proc")
def one_long_operation(seconds):
    Path("stuck").touch()
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2 * 10**9)  # lets threads run, looks at no signal
synthetic.time = types.SimpleNamespace(sleep=one_long_operation, perf_counter=time.perf_counter)
from qlora_exp.cli import main
sys.exit(main(["run", "training.engine=sleep", "training.device=cpu", "tracking=off", "output_root=outputs"]))
"""


def meminfo(available_kb: int) -> None:
    Path("proc").mkdir(exist_ok=True)
    Path("proc/meminfo").write_text(f"MemTotal:       1000000 kB\nMemAvailable:   {available_kb} kB\n")


def test_a_run_that_waits_for_memory_ends_when_it_is_asked_to(tmp_path: Path) -> None:
    meminfo(900_000)
    with subprocess.Popen([sys.executable, "-c", STUCK], stderr=subprocess.PIPE, text=True) as child:
        while not Path("stuck").exists():
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert child.poll() is None, "with memory left, it may finish its step"
        meminfo(1_000)
        assert child.wait(60) == 130
        assert child.stderr is not None
        assert "memory was too short" in child.stderr.read()
    (file,) = Path("outputs/runs").glob("*/record.json")
    record: RunRecord = read_record(file)
    assert record.status is Status.INTERRUPTED
    assert record.failure is not None
    assert record.failure.kind == "OutOfMemory"


def test_the_watch_ends_with_the_run_though_a_forked_child_lives_on() -> None:
    with exit_if_memory_is_short(lambda number: None, 130):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        began = time.monotonic()
    seconds = time.monotonic() - began
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert seconds < 10


def test_only_a_process_of_ours_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[int] = []

    @contextlib.contextmanager
    def watch(last_words: object, exit_code: int) -> Iterator[None]:
        watched.append(exit_code)
        yield

    monkeypatch.setattr("qlora_exp.runs.execute.exit_if_memory_is_short", watch)
    config = compose(["training.engine=sleep", "training.sleep_seconds=0", "tracking=off"])
    execute(config)
    assert not watched, "a notebook's process isn't"
    execute(config, alone=True)
    execute(config, deliver=lambda finish: finish())
    assert watched == [130, 130]


def test_a_trial_near_the_bound_that_the_kernel_ended_is_out_of_memory_and_not_tried_again(
    capfd: pytest.CaptureFixture[str],
) -> None:
    from qlora_exp.orchestration.hydra_app import main as hydra

    sleep = ["training.engine=sleep", "training.sleep_seconds=0.05", "training.device=cpu", "tracking=off"]
    killed = [
        "sweep.name=killed",
        "lora.r=8,9",
        "training.sleep_fault=crash",
        "sweep.max_attempts=3",
        "sweep.max_failures=null",
    ]
    assert hydra(["-m", *sleep, *killed, "budget.memory_bytes=650000"]) == 1
    records = [read_record(file) for file in Path("outputs/runs").glob("*/record.json")]
    assert [record.status for record in records] == [Status.OUT_OF_MEMORY]
    assert "probably out of memory" in str(records[0].failure)
    assert main(["trials", "killed", "--csv"]) == 0
    assert "DOES_NOT_FIT" in capfd.readouterr().out, "what needs as much isn't tried either"
