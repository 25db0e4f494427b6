"""Forked processes: each is what a new interpreter would be, only sooner."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.types import RunRecord, Status
from tests import forking, processes

pytestmark = pytest.mark.skipif(not forking.can_fork(), reason="this system can't fork so")

LOOK = """
import json, os, random, signal, sys, threading
import numpy, torch
handled = {number: str(signal.getsignal(number)) for number in sorted(signal.valid_signals())}
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "name": __name__, "main": sorted(vars(sys.modules["__main__"]))[:3],
    "folder": os.getcwd(), "environment": dict(os.environ), "handled": handled, "leads": os.getsid(0) == os.getpid(),
    "threads": threading.active_count(), "cuda": torch.cuda.is_initialized(), "torch_threads": torch.get_num_threads(),
    "files": sorted(map(int, os.listdir("/proc/self/fd")))[:4], "streams": [
        (stream.encoding, stream.errors, stream.line_buffering, stream.isatty())
        for stream in (sys.stdin, sys.stdout, sys.stderr)
    ], "asked": sys.stdin.read(), "hydra": "hydra" in sys.modules and __import__(
        "hydra.core.global_hydra").core.global_hydra.GlobalHydra.instance().is_initialized(),
}))
print(random.random(), numpy.random.rand(), torch.rand(1).item(), file=sys.stderr)
"""
SET_BY_IMPORTS = {"TORCHINDUCTOR_CACHE_DIR", "DO_NOT_TRACK", "KMP_INIT_AT_FORK", "KMP_DUPLICATE_LIB_OK"}
"""By torch and what it brings along; a new interpreter has them once it has imported that."""


def looked(run: Callable[..., Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    command = processes.program(LOOK, "one argument", "ü")
    environment = processes.ENVIRONMENT
    done = run(
        command, cwd=folder, env=environment, input="a question", capture_output=True, text=True, check=True,
        **({"start_new_session": True} if run is subprocess.run else {}),
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    return found, done.stderr.split()[-3:]


def test_a_forked_process_is_what_a_new_interpreter_is(tmp_path: Path) -> None:
    fresh, _ = looked(subprocess.run, tmp_path)
    forked, random = looked(processes.run, tmp_path)
    of_fresh, of_forked = fresh.pop("environment"), forked.pop("environment")
    libraries = {name for name in of_forked if of_fresh.get(name) != of_forked[name]}
    assert not of_fresh.keys() - of_forked.keys()
    assert all(name not in of_fresh for name in libraries)  # what is given is as it is given
    assert forked == fresh
    _, random_of_another = looked(processes.run, tmp_path)
    assert not set(random) & set(random_of_another)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; sys.exit(3)", 3),
        ("raise ValueError('wrong')", 1),
        ("import sys; sys.exit('a message')", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import atexit; atexit.register(print, 'at the end')", 0),
    ],
)
def test_its_exit_code_and_its_last_words_are_a_new_interpreters(code: str, expected: int) -> None:
    forked = processes.run(processes.program(code), capture_output=True, text=True)
    fresh = subprocess.run(processes.program(code), capture_output=True, text=True)
    assert forked.returncode == fresh.returncode == expected
    assert forked.stdout == fresh.stdout
    assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


@pytest.mark.parametrize("how", ["another variable", "a function before its start"])
def test_what_can_not_be_forked_gets_a_new_interpreter(how: str) -> None:
    given: dict[str, Any] = {"env": {**os.environ, "OMP_NUM_THREADS": "3"}}
    if how != "another variable":
        given = {"preexec_fn": os.setsid}
    code = "import sys; print('torch' in sys.modules)"
    assert processes.run(processes.program(code), capture_output=True, text=True, **given).stdout == "False\n"
    assert processes.run(processes.program(code), capture_output=True, text=True).stdout == "True\n"


SHORT = [
    *("training.device=cpu", "training.max_steps=4", "training.batch_size=4", "training.max_length=64"),
    *("evaluation=quick", "evaluation.max_items=4", "quantization=nf4", "tracking=off"),
]


def test_a_forked_run_has_the_same_results(tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path) -> None:
    given = [*SHORT, "model=local", f"model.path={tiny_models['llama']}"]
    given += ["task=local", "task.kind=classification", f"task.path={colour_task}"]
    found: dict[str, tuple[RunRecord, str]] = {}
    for name, run in {"fresh": subprocess.run, "forked": processes.run}.items():
        root = tmp_path / name
        command = [sys.executable, "-m", "qlora_exp.cli", "run", *given, f"output_root={root}"]
        run(command, env=processes.ENVIRONMENT, check=True, capture_output=True)
        [folder] = root.glob("runs/*")
        adapter = OutputPaths.of(root).run(folder.name).adapter / "adapter_model.safetensors"
        found[name] = read_record(folder / "record.json"), hashlib.sha256(adapter.read_bytes()).hexdigest()
    (fresh, weights), (forked, weights_of_forked) = found["fresh"], found["forked"]
    assert forked.status is fresh.status is Status.COMPLETED
    assert weights_of_forked == weights
    assert forked.scores == fresh.scores
    assert forked.environment.torch_threads == fresh.environment.torch_threads


@pytest.fixture
def server(tmp_path: Path) -> Iterator[forking.ForkServer]:
    one = forking.ForkServer(dict(os.environ), ["json"], subprocess.DEVNULL, [])
    yield one
    one.close()


def started(server: forking.ForkServer, code: str) -> tuple[forking.Forked, int]:
    reading, writing = os.pipe()
    nothing = os.open(os.devnull, os.O_RDWR)
    forked = server.start("tests.program", [code], (nothing, writing, nothing))
    os.close(writing)
    os.close(nothing)
    return forked, reading


def test_a_module_that_starts_a_thread_when_it_is_imported_keeps_a_server_from_forking(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    server = forking.ForkServer(environment, ["busy"], subprocess.DEVNULL, [])
    forked, reading = started(server, "import sys; print('busy' in sys.modules)")
    with open(reading) as stream:
        assert stream.read() == "False\n"
    assert forked.wait() == 0
    server.close()


def test_one_that_nobody_waits_for_is_not_forked(server: forking.ForkServer, tmp_path: Path) -> None:
    forked, reading = started(server, f"open({str(tmp_path / 'begun')!r}, 'w')")
    if forked.pid is None:
        assert forked.forgo() == forking.SERVER_KILLED
        assert os.read(reading, 1) == b""
        assert not (tmp_path / "begun").exists()
    os.close(reading)


def test_a_killed_server_is_told_by_each_of_its_processes(server: forking.ForkServer) -> None:
    forked, reading = started(server, "import time; time.sleep(60)")
    pid = forked.begun()
    assert pid is not None
    assert forked.poll() is None
    os.kill(server.pid, signal.SIGKILL)
    assert forked.wait(timeout=60) == -signal.SIGKILL
    os.kill(pid, signal.SIGKILL)  # it hadn't asked the kernel to end with its server
    os.close(reading)


# Trial hosts.
