"""Processes forked from a server that has their imports done (:mod:`qlora_exp.orchestration.fork_server`)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from qlora_exp.paths import PACKAGE
from qlora_exp.system import gpus, heap

ROOM = " " * 400
"""For the arguments of a forked process, as ``ps`` shows them."""
MAY_DIFFER = (
    *("PWD", "OLDPWD", "PYTEST_CURRENT_TEST", "_MLFLOW_TELEMETRY_SESSION_ID"),
    *("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"),
)
"""Variables that change while a program works. No library reads them when it is imported."""
UNSUITABLE = 69
"""Exit code of a server that can't fork (EX_UNAVAILABLE of sysexits.h): another one couldn't, either."""
OTHER_DRIVERS = (Path("/dev/dxg"), Path("/dev/nvmap"), Path("/dev/kfd"))
"""Of GPUs under WSL, of a Jetson, and of AMD's."""
MAX_SERVERS = 2
KILLED = -int(getattr(signal, "SIGKILL", 9))


def is_readable(descriptor: int, timeout: float | None) -> bool:
    """Wait until ``descriptor`` has something to read or its end; ``False``: not within ``timeout`` seconds.

    Unlike :func:`select.select`, it takes a descriptor from 1024 on: this process may be a launcher's, with many.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if timeout is None else math.ceil(timeout * 1000)))


class Forked:
    """A process of a server, used like a :class:`subprocess.Popen`. Its server may still be importing."""

    def __init__(self, status: socket.socket) -> None:
        self._status, self._read = status, b""
        self._pid: int | None = None
        self.returncode: int | None = None
        self._reading = threading.Lock()

    @property
    def pid(self) -> int | None:
        """``None``: it hasn't been forked yet."""
        if self._pid is None:
            self._receive(0.0)
        return self._pid

    def has_begun(self, timeout: float | None = None) -> bool:
        """Wait until it is forked; ``False``: not within ``timeout`` seconds.

        Raises:
            ProcessLookupError: its server can't fork it, or has ended.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while self._pid is None and self.returncode is None:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not self._receive(left) and left == 0.0:
                return False
            if self._pid is None and self._status.fileno() < 0 and self.returncode is None:
                raise ProcessLookupError("the process was not forked")
        return True

    def give_up(self, number: int) -> int:
        """For one that hasn't begun: it must not. Returns the exit code as if signal ``number`` had ended it."""
        with contextlib.suppress(OSError):  # it is closed
            self._status.shutdown(socket.SHUT_RD)  # the server notices this before it lets a forked process go on
        self._receive(0.0)
        with self._reading:
            if self.returncode is None:
                self.returncode = -number
            if self._pid is not None:  # forked in this moment
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._pid, signal.SIGKILL)
            self._status.close()
            return self.returncode

    def poll(self) -> int | None:
        self._receive(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code of a process that has begun. Raises :class:`subprocess.TimeoutExpired`."""
        until = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not self._receive(left) and left == 0.0:
                assert timeout is not None
                raise subprocess.TimeoutExpired("a forked process", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it to a process that has begun and hasn't ended."""
        if self.poll() is None and self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def _receive(self, timeout: float | None) -> bool:
        """Read what the server reports; ``False``: nothing within ``timeout`` seconds."""
        if timeout != 0.0:
            with contextlib.suppress(OSError, ValueError):  # another thread has read the end
                is_readable(self._status.fileno(), timeout)
        with self._reading:
            if self._status.fileno() < 0:
                return True
            if not is_readable(self._status.fileno(), 0.0):
                return False
            chunk = self._status.recv(256)
            self._read += chunk
            *lines, self._read = self._read.split(b"\n")
            for line in lines:
                kind, _, number = line.partition(b" ")
                if kind == b"pid":
                    self._pid = int(number)
                elif kind == b"exit":
                    self.returncode = int(number)
            if not chunk and self._pid is not None and self.returncode is None:
                self.returncode = KILLED  # the kernel has ended its processes with it
            if not chunk or self.returncode is not None:
                self._status.close()
            return True


class ForkServer:
    """A server process. It ends with this one, and its processes can ask the kernel to end with it.

    Args:
        environment: its variables, all of them.
        modules: what it imports.
        stderr: where it writes until the imports are done.
    """

    def __init__(self, environment: Mapping[str, str], modules: Sequence[str], stderr: IO[bytes] | int) -> None:
        self.environment = dict(environment)
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._requests.setblocking(False)
        options = [text for name in modules for text in ("--import", name)]
        options += ["--socket", str(theirs.fileno()), "--parent", str(os.getpid()), ROOM]
        command = [sys.executable, "-m", "qlora_exp.orchestration.fork_server", *options]
        self._started = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: object = None
        with theirs:
            arguments = (command, theirs.fileno(), stderr)
            # The kernel ends the server with the thread that started it: one that lives as long as this process.
            try:
                threading.Thread(target=self._keep, args=arguments, name="fork-server", daemon=True).start()
                self._started.wait()
            except RuntimeError as error:  # no thread more may be started
                self._failure = error
        if self._process is None:
            self._requests.close()
            raise OSError(f"no server could be started: {self._failure}")

    def _keep(self, command: list[str], requests: int, stderr: IO[bytes] | int) -> None:
        try:
            self._process = subprocess.Popen(
                command, env=self.environment, pass_fds=(requests,), stdin=subprocess.DEVNULL, stdout=stderr,
                stderr=stderr, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._failure = error
        finally:
            self._started.set()
        if self._process is not None:
            self._process.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The server's exit code; ``None``: it lives."""
        assert self._process is not None
        return self._process.returncode

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        standard: tuple[int, int, int],
        environment: Mapping[str, str],
        folder: str = ".",
    ) -> Forked:
        """Request ``python -m module arguments`` in a new session, with the descriptors ``standard`` as standard input,
        output and error. Doesn't wait for it.

        Raises:
            OSError: the server is gone, or can't serve this ``environment``.
        """
        names = sorted({*environment, *self.environment})
        different = {
            name: environment.get(name) for name in names if environment.get(name) != self.environment.get(name)
        }
        if fixed := different.keys() - set(MAY_DIFFER):
            raise OSError(f"the server has other values of {', '.join(fixed)}")
        request = {"module": module, "arguments": list(arguments), "environment": different}
        place = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        try:
            status, theirs = socket.socketpair()
            with theirs:
                try:
                    descriptors = [*standard, place, theirs.fileno()]
                    socket.send_fds(self._requests, [json.dumps(request).encode()], descriptors)
                except OSError:
                    status.close()
                    raise
            return Forked(status)
        finally:
            os.close(place)

    def retire(self) -> None:
        """Let it end after the last of its processes."""
        self._requests.close()

    def dump(self) -> None:
        """Have it write its stack traces, if it still imports."""
        assert self._process is not None
        self._process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """End it, and with it those of its processes that asked for that."""
        assert self._process is not None
        self._process.kill()


_servers: dict[Any, ForkServer] = {}
_users = _in_any_folder = 0
_lock = threading.Lock()


@contextlib.contextmanager
def servers_kept(in_any_folder: bool = False) -> Iterator[None]:
    """Context in which :func:`server_for` returns servers. At the end of the outermost one they end.

    ``in_any_folder``: the caller knows that no working directory holds a module, so one server serves them all.
    """
    global _users, _in_any_folder
    with _lock:
        _users += 1
        _in_any_folder += in_any_folder
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            _in_any_folder -= in_any_folder
            while _servers and not _users:
                _servers.popitem()[1].retire()


def server_for(environment: Mapping[str, str], modules: Sequence[str], stderr: int) -> ForkServer | None:
    """Return a server with these variables and imports, running or new; ``None``: processes can't be forked here.

    A server is used as long as a new interpreter would import the same: the same variables, folder, limits and files.
    """
    fixed = {name: value for name, value in environment.items() if name not in MAY_DIFFER}
    with _lock:
        if not _users or not can_fork():
            return None
        folder = None if _in_any_folder else os.getcwd()  # python -m imports from it first
        key = (tuple(sorted(fixed.items())), tuple(modules), folder, _inherited(), _importable())
        server = _servers.pop(key, None)
        if server is None or server.code not in (None, UNSUITABLE):
            server = ForkServer(environment, modules, stderr)
        _servers[key] = server
        while len(_servers) > MAX_SERVERS:
            _servers.pop(next(iter(_servers))).retire()
        return server if server.code is None else None


def can_fork() -> bool:
    """Whether to start a server. With a GPU's driver the imports may use CUDA, which no process shares by a fork, and
    without it libraries choose code for the CPU when they are imported."""
    if sys.platform != "linux" or not hasattr(socket, "send_fds"):
        return False
    drivers = (heap.NVIDIA_DRIVER, gpus.DRIVER_FILES, *OTHER_DRIVERS)
    return not any(path.exists() for path in drivers) and not gpus.cards()


def _inherited() -> Any:
    """What else a process takes over from the one that starts it: group, cores, limits, priority, masks.

    A worker handles INT and TERM even where they were ignored: whether they are makes no difference to a trial process.
    """
    import resource

    status = Path("/proc/thread-self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in status if line.startswith(("Umask:", "SigBlk:", "Cpus_allowed:"))]
    handled = 1 << (signal.SIGINT - 1) | 1 << (signal.SIGTERM - 1)
    kept += [f"{int(line.split()[1], 16) & ~handled:x}" for line in status if line.startswith("SigIgn:")]
    names = [name for name in vars(resource) if name.startswith("RLIMIT_")]
    limits = [resource.getrlimit(getattr(resource, name)) for name in names]
    groups = Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace")
    return os.getpid(), groups, tuple(kept), tuple(limits), os.getpriority(os.PRIO_PROCESS, 0)


def _importable() -> Any:
    """What tells that imports would give something else now: this package's files, and the installed packages."""
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    files = (*PACKAGE.rglob("*.py"), *map(Path, installed))
    return tuple(sorted((str(file), file.stat().st_mtime_ns) for file in files))
