"""Forked processes: each is what a new interpreter would be, only sooner."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qlora_exp.orchestration import forking
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.types import RunRecord, Status
from tests import processes

pytestmark = pytest.mark.skipif(not forking.can_fork(), reason="this system can't fork so")

PATIENCE_SECONDS = 60.0
LOOK = """
import json, os, random, signal, sys, threading
import numpy, torch
handled = {number: str(signal.getsignal(number)) for number in sorted(signal.valid_signals())}
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "name": __name__, "main": sorted(vars(sys.modules["__main__"]))[:3],
    "folder": os.getcwd(), "environment": dict(os.environ), "handled": handled, "leads": os.getsid(0) == os.getpid(),
    "threads": threading.active_count(), "cuda": torch.cuda.is_initialized(), "torch_threads": torch.get_num_threads(),
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())), "wakeup": signal.set_wakeup_fd(-1),
    "files": sorted(map(int, os.listdir("/proc/self/fd")))[:4], "streams": [
        (stream.encoding, stream.errors, stream.line_buffering, stream.isatty())
        for stream in (sys.stdin, sys.stdout, sys.stderr)
    ], "question": sys.stdin.read(), "hydra": "hydra" in sys.modules and __import__(
        "hydra.core.global_hydra").core.global_hydra.GlobalHydra.instance().is_initialized(),
}))
print(random.random(), numpy.random.rand(), torch.rand(1).item(), file=sys.stderr)
"""


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
    assert libraries.isdisjoint(processes.ENVIRONMENT.keys() - {"MLFLOW_DISABLE_TELEMETRY"})
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
def test_its_exit_code_and_its_last_output_are_a_new_interpreters(code: str, expected: int) -> None:
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


def test_what_imports_set_in_this_process_is_no_other_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in processes.SET_BY_IMPORTS - processes.ENVIRONMENT.keys():
        monkeypatch.setenv(name, "set by an import")
    code = "import sys; print('torch' in sys.modules)"
    for given in ({}, {"env": dict(os.environ)}):
        assert processes.run(processes.program(code), capture_output=True, text=True, **given).stdout == "True\n"


SHORT = [
    *("training.device=cpu", "training.max_steps=4", "training.batch_size=4", "training.max_length=64"),
    *("evaluation=quick", "evaluation.max_items=4", "quantization=nf4", "tracking=off"),
]


GENERATORS_KEPT = """
import gc, random, sympy, sys, tempfile
from qlora_exp.orchestration.fork_server import GENERATORS
gc.unfreeze()
known = [random._inst, *(vars(sys.modules[module])[name] for module, name in GENERATORS.items())]
known += [sympy.core.random.rng, sympy.core.random._assumptions_rng, sympy.Dummy._prng]  # none of them names a file
for one in gc.get_objects():
    if type(one) is random.Random and all(one is not other for other in known):
        holders = gc.get_referrers(one)
        if not any(isinstance(holder, tempfile._RandomNameSequence) for holder in holders):  # begins afresh itself
            print([list(holder)[:3] for holder in holders if isinstance(holder, dict)])
"""


def test_no_two_forked_processes_have_the_same_random_numbers_of_a_library() -> None:
    """A dataset's random fingerprint names its file in the cache."""
    code = "from datasets.fingerprint import generate_random_fingerprint; print(generate_random_fingerprint())"
    printed = {processes.run(processes.program(code), capture_output=True, text=True).stdout for _ in range(2)}
    assert len(printed) == 2
    others = processes.run(processes.program(GENERATORS_KEPT), capture_output=True, text=True)
    assert (others.stdout, others.returncode) == ("", 0), others.stderr


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


# A server that has imported little.


@contextmanager
def server_with(folder: Path, code: str = "", **variables: str) -> Iterator[forking.ForkServer]:
    """One that imports a module with ``code``."""
    (folder / "imported.py").write_text(code)
    path = f"{folder}:{os.environ.get('PYTHONPATH', '')}"
    one = forking.ForkServer({**os.environ, "PYTHONPATH": path, **variables}, ["imported"], subprocess.DEVNULL)
    try:
        yield one
    finally:
        one.kill()


def request(
    server: forking.ForkServer, code: str, folder: str = ".", module: str = "tests.program", **variables: str
) -> tuple[forking.Forked, int]:
    """The process that runs ``code``, and what reads its output."""
    reading, writing = os.pipe()
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        environment = {**server.environment, **variables}
        forked = server.start(module, [code], (nothing, writing, nothing), environment, folder)
    finally:
        os.close(writing)
        os.close(nothing)
    return forked, reading


def output_of(server: forking.ForkServer, code: str, **variables: str) -> str:
    forked, reading = request(server, code, **variables)
    with open(reading) as stream:
        printed = stream.read()
    assert forked.has_begun()
    assert forked.wait(PATIENCE_SECONDS) == 0
    return printed


def refused(server: forking.ForkServer) -> None:
    forked, reading = request(server, "")
    with pytest.raises(ProcessLookupError):
        forked.has_begun(PATIENCE_SECONDS)
    assert os.read(reading, 1) == b""
    os.close(reading)


def until(true: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE_SECONDS
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def test_a_container_that_refuses_pidfd_open_lets_processes_be_forked(tmp_path: Path) -> None:
    code = "import os\ndef pidfd_open(*_):\n    raise PermissionError\nos.pidfd_open = pidfd_open"
    with server_with(tmp_path, code) as server:
        assert output_of(server, "print('forked')") == "forked\n"


UNSUITABLE = {
    "a thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
    "an error": "raise ValueError",
    "no fork": "import os\ndef fork():\n    raise OSError\nos.fork = fork",
}


@pytest.mark.parametrize("why", UNSUITABLE)
def test_a_server_that_can_not_fork_ends_itself(tmp_path: Path, why: str) -> None:
    with server_with(tmp_path, UNSUITABLE[why]) as server:
        refused(server)
        assert until(lambda: server.code) == forking.UNSUITABLE
        with pytest.raises(OSError, match=r"."):
            request(server, "")


def test_no_device_is_visible_to_the_imports(tmp_path: Path) -> None:
    """bitsandbytes calls torch.cuda.is_available(): with a CUDA build that would keep a process from being forked."""
    code = "import os\nseen = os.environ['CUDA_VISIBLE_DEVICES'], os.environ['PYTORCH_NVML_BASED_CUDA_CHECK']"
    look = "import imported, os; print(*imported.seen, os.environ.get('CUDA_VISIBLE_DEVICES'))"
    with server_with(tmp_path, code, CUDA_VISIBLE_DEVICES="7") as server:
        assert output_of(server, look) == " 1 7\n"
    with server_with(tmp_path, code) as server:
        assert output_of(server, look) == " 1 None\n"


def waiting_fork(folder: Path) -> str:
    """A forked process writes its pid to the file ``pid`` and waits for the file ``go`` before it is complete."""
    return (
        "import os, time\nreal = os.setsid\ndef setsid():\n    real()\n"
        f"    open({str(folder / 'new')!r}, 'w').write(str(os.getpid()))\n"
        f"    os.rename({str(folder / 'new')!r}, {str(folder / 'pid')!r})\n"
        f"    while not os.path.exists({str(folder / 'go')!r}):\n        time.sleep(0.01)\nos.setsid = setsid"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_during_a_fork_is_kept(tmp_path: Path, number: signal.Signals) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may have been started by nohup
    with contextlib.ExitStack() as ends:
        ends.callback(signal.signal, signal.SIGHUP, previous)
        server = ends.enter_context(server_with(tmp_path, waiting_fork(tmp_path)))
        forked, reading = request(server, "import time; time.sleep(60)")
        until((tmp_path / "pid").exists)
        assert forked.pid is None
        os.kill(int((tmp_path / "pid").read_text()), number)
        (tmp_path / "go").touch()
        assert forked.has_begun()
        assert forked.wait(PATIENCE_SECONDS) == -number
        os.close(reading)


def test_an_ignored_sigchld_changes_nothing(tmp_path: Path) -> None:
    previous = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with server_with(tmp_path) as server:
            look = "import signal; print(signal.getsignal(signal.SIGCHLD).name)"
            assert output_of(server, look) == "SIG_IGN\n"
            assert output_of(server, look) == "SIG_IGN\n"
    finally:
        signal.signal(signal.SIGCHLD, previous)


def test_variables_that_imports_set_stay_set(tmp_path: Path) -> None:
    code = "import os\nos.environ.update(NEW='by the import', CHANGED='by the import')"
    look = "import os; print(os.environ['NEW'], os.environ['CHANGED'], os.environ.get('PYTEST_CURRENT_TEST'))"
    with server_with(tmp_path, code, CHANGED="before") as server:
        assert output_of(server, look, PYTEST_CURRENT_TEST="one") == "by the import by the import one\n"
        with pytest.raises(OSError, match="CHANGED"):
            request(server, look, CHANGED="otherwise")


def test_a_path_that_an_import_put_first_stays(tmp_path: Path) -> None:
    (tmp_path / "look.py").write_text("import os, sys; print(sys.path[0], sys.path[1] == os.getcwd())")
    with server_with(tmp_path, "import sys\nsys.path.insert(0, 'first')", PYTHONSAFEPATH="") as server:
        forked, reading = request(server, "", module="look")
        with open(reading) as stream:
            assert stream.read() == "first True\n"
        forked.wait(PATIENCE_SECONDS)


def test_a_thread_that_ends_with_the_first_fork_may_be_listed_for_a_moment(tmp_path: Path) -> None:
    code = (
        "import os, threading, time\nend = threading.Event()\n"
        "threading.Thread(target=lambda: (end.wait(), time.sleep(0.3))).start()\n"
        "os.register_at_fork(before=end.set)"
    )
    with server_with(tmp_path, code) as server:
        assert output_of(server, "print('forked')") == "forked\n"


def test_a_mapped_file_may_have_any_name(tmp_path: Path) -> None:
    code = (
        f"import mmap, os\nname = {os.fsencode(tmp_path)!r} + b'/na\\xefve'\n"
        "with open(name, 'wb+') as stream:\n    stream.write(bytes(4096))\n    stream.flush()\n"
        "    kept = mmap.mmap(stream.fileno(), 4096)"
    )
    with server_with(tmp_path, code) as server:
        assert output_of(server, "print('forked')") == "forked\n"


def test_without_a_thread_more_there_is_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    own = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(OSError, match="can't start new thread"):
        forking.ForkServer(os.environ, [], subprocess.DEVNULL)
    assert len(os.listdir("/proc/self/fd")) <= own  # another test's may be closed meanwhile


@pytest.mark.parametrize("safe", ["", "1"])
def test_its_search_path_is_a_new_interpreters(tmp_path: Path, safe: str) -> None:
    look = "import sys; print(sys.path)"
    with server_with(tmp_path, PYTHONSAFEPATH=safe) as server:
        command = processes.program(look)
        fresh = subprocess.run(command, env=server.environment, capture_output=True, text=True, check=True)
        assert output_of(server, look) == fresh.stdout


def test_it_knows_the_commit_and_the_versions_that_its_server_imported(tmp_path: Path) -> None:
    look = (
        "from qlora_exp.system.environment import git_state, package_versions as v; from qlora_exp.paths import PACKAGE"
        "\nprint(v.cache_info().currsize, (v(), v.cache_info().misses)[1])"
        "\nprint(git_state.cache_info().currsize, (git_state(PACKAGE), git_state.cache_info().misses)[1])"
    )
    with server_with(tmp_path) as server:
        assert output_of(server, look) == "1 1\n1 1\n"


FAILING = """
import os
real, calls = {call}, []
def failing(*given):
    calls.append(given)
    if len(calls) > {allowed} and os.path.exists({switch!r}):
        raise OSError
    return real(*given)
{call} = failing
"""


@pytest.mark.parametrize(("call", "allowed"), [("os.fork", 1), ("os.fchdir", 0)])
def test_a_fork_that_fails_leaves_nothing_open(tmp_path: Path, call: str, allowed: int) -> None:
    switch = tmp_path / "fails"
    with server_with(tmp_path, FAILING.format(call=call, allowed=allowed, switch=str(switch))) as server:
        assert output_of(server, "print(1)") == "1\n"
        assert until(lambda: files_of(server.pid) == OF_IDLE_SERVER)
        own = len(os.listdir("/proc/self/fd"))
        switch.touch()
        for _ in range(3):
            refused(server)
        switch.unlink()
        assert output_of(server, "print(1)") == "1\n"
        assert until(lambda: files_of(server.pid) == OF_IDLE_SERVER)
        assert len(os.listdir("/proc/self/fd")) <= own


OF_IDLE_SERVER = 6
"""Three standard streams, the requests, and both ends of the pipe that SIGCHLD writes to."""


def files_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_one_that_nobody_waits_for_is_not_forked(tmp_path: Path) -> None:
    code = f"import os, time\nwhile not os.path.exists({str(tmp_path / 'go')!r}):\n    time.sleep(0.01)"
    with server_with(tmp_path, code) as server:
        forked, reading = request(server, f"open({str(tmp_path / 'begun')!r}, 'w')")
        assert forked.pid is None
        assert forked.give_up(signal.SIGTERM) == forked.wait() == -signal.SIGTERM
        (tmp_path / "go").touch()
        assert os.read(reading, 1) == b""
        os.close(reading)
        assert output_of(server, "print(1)") == "1\n"
        assert not (tmp_path / "begun").exists()


def test_one_that_is_given_up_while_it_is_forked_is_killed(tmp_path: Path) -> None:
    with server_with(tmp_path, waiting_fork(tmp_path)) as server:
        forked, reading = request(server, f"import time; open({str(tmp_path / 'begun')!r}, 'w'); time.sleep(60)")
        until((tmp_path / "pid").exists)
        assert forked.give_up(signal.SIGTERM) == -signal.SIGTERM
        (tmp_path / "go").touch()
        assert os.read(reading, 1) == b""  # it has ended
        os.close(reading)


def test_each_process_of_a_killed_server_counts_as_killed(tmp_path: Path) -> None:
    with server_with(tmp_path) as server:
        forked, reading = request(server, "import time; time.sleep(60)")
        assert forked.has_begun()
        assert forked.poll() is None
        server.kill()
        assert forked.wait(PATIENCE_SECONDS) == -signal.SIGKILL
        assert forked.pid is not None
        os.kill(forked.pid, signal.SIGKILL)  # it hadn't asked the kernel to end with its server
        os.close(reading)


def test_a_retired_server_ends_after_its_last_process(tmp_path: Path) -> None:
    with server_with(tmp_path) as server:
        forked, reading = request(server, "import sys; print(1, flush=True); sys.exit(4)")
        assert os.read(reading, 1) == b"1"
        server.retire()
        assert forked.wait(PATIENCE_SECONDS) == 4
        assert until(lambda: server.code is not None)
        assert server.code == 0
        os.close(reading)
