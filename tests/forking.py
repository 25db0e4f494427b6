"""Processes forked from a server that has their imports done (:mod:`tests.fork_server`)."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

ROOM = " " * 400
"""For the arguments of a forked process, as ``ps`` shows them."""
READ_LATER = (
    *("PWD", "OLDPWD", "PYTEST_CURRENT_TEST", "_MLFLOW_TELEMETRY_SESSION_ID"),
    *("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"),
)
"""Variables that change while a program works. No library reads them when it is imported."""
SERVER_KILLED = -int(getattr(signal, "SIGKILL", 9))


@functools.cache
def can_fork() -> bool:
    """Whether this system has what the server needs. An old kernel or a container's rules may refuse a call."""
    if sys.platform != "linux" or not hasattr(os, "pidfd_open") or not hasattr(socket, "send_fds"):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
        Path("/proc/self/pagemap").open("rb").close()
    except OSError:
        return False
    return True


class Forked:
    """A process of a server, used like a :class:`subprocess.Popen`. Its server may still be importing."""

    def __init__(self, status: int) -> None:
        self._status, self._read = status, b""
        self._pid: int | None = None
        self.returncode: int | None = None
        self._reading = threading.Lock()

    def __del__(self) -> None:
        self._close()

    @property
    def pid(self) -> int | None:
        """``None``: it hasn't been forked yet."""
        if self._pid is None:
            self._receive(0.0)
        return self._pid

    def forgo(self) -> int:
        """For one that hasn't been forked yet: it need not be. Returns the exit code of a killed process."""
        with self._reading:
            self.returncode = SERVER_KILLED
            self._close()
        return self.returncode

    def poll(self) -> int | None:
        self._receive(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises :class:`subprocess.TimeoutExpired`."""
        until = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not self._receive(left) and left == 0.0:
                assert timeout is not None
                raise subprocess.TimeoutExpired("a forked process", timeout)
        return self.returncode

    def begun(self) -> int | None:
        """Wait until it is forked. Returns its pid; ``None``: its server ended first."""
        while self._pid is None and self.returncode is None:
            self._receive(None)
        return self._pid

    def send_signal(self, number: int) -> None:
        """One that hasn't been forked yet, or has ended, doesn't get it."""
        if self.poll() is None and self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _receive(self, timeout: float | None) -> bool:
        """Read what the server tells; ``False``: nothing within ``timeout`` seconds."""
        if timeout != 0.0:
            with contextlib.suppress(OSError, ValueError):  # another thread has read the end
                select.select([self._status], [], [], timeout)
        with self._reading:
            if self.returncode is not None:
                return True
            if not select.select([self._status], [], [], 0.0)[0]:
                return False
            chunk = os.read(self._status, 256)
            self._read += chunk
            *lines, self._read = self._read.split(b"\n")
            for line in lines:
                kind, _, number = line.partition(b" ")
                if kind == b"pid":
                    self._pid = int(number)
                else:
                    self.returncode = int(number)
            if not chunk and self.returncode is None:
                self.returncode = SERVER_KILLED  # the kernel has ended its processes with it
            if self.returncode is not None:
                self._close()
            return True

    def _close(self) -> None:
        status, self._status = self._status, -1
        if status >= 0:
            os.close(status)


class ForkServer:
    """A server process. It ends with this one, and its processes can ask the kernel to end with it.

    Args:
        environment: its variables, whole.
        modules: what it imports.
        may_differ: variables that a process may have otherwise than the server and still be forked; one that differs in
            others gets a new interpreter.
    """

    def __init__(
        self, environment: Mapping[str, str], modules: Sequence[str], stderr: IO[bytes] | int, may_differ: Sequence[str]
    ) -> None:
        self.environment = dict(environment)
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        options = [text for name in modules for text in ("--import", name)]
        options += [text for name in may_differ for text in ("--may-differ", name)]
        options += ["--socket", str(theirs.fileno()), "--parent", str(os.getpid()), ROOM]
        command = [sys.executable, "-m", "tests.fork_server", *options]
        self._started = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._failed: OSError | None = None
        self._forked: list[Forked] = []
        self._counting = threading.Lock()
        with theirs:
            arguments = (command, theirs.fileno(), stderr)
            # The kernel ends the server with the thread that started it: one that lives as long as this process.
            threading.Thread(target=self._keep, args=arguments, name="fork-server", daemon=True).start()
            self._started.wait()
        if self._failed is not None:
            raise self._failed

    def _keep(self, command: list[str], requests: int, stderr: IO[bytes] | int) -> None:
        try:
            self._process = subprocess.Popen(
                command, env=self.environment, pass_fds=(requests,), stdin=subprocess.DEVNULL, stdout=stderr,
                stderr=stderr, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._failed = error
        finally:
            self._started.set()
        if self._process is not None:
            self._process.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        standard: tuple[int, int, int],
        environment: Mapping[str, str] | None = None,
        folder: str = ".",
    ) -> Forked:
        """``python -m module arguments`` in a new session, with the descriptors ``standard`` as standard input, output
        and error. Doesn't wait for it.

        Raises:
            OSError: the server is gone.
        """
        wanted = self.environment if environment is None else environment
        different = {
            name: wanted.get(name)
            for name in {*wanted, *self.environment}
            if wanted.get(name) != self.environment.get(name)
        }
        request = {"module": module, "arguments": list(arguments), "environment": different}
        reading, writing = os.pipe()
        place = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        try:
            descriptors = [*standard, place, writing]
            socket.send_fds(self._requests, [json.dumps(request).encode()], descriptors)
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(place)
            os.close(writing)
        forked = Forked(reading)
        with self._counting:
            self._forked = [one for one in self._forked if one.poll() is None] + [forked]
        return forked

    def is_used(self) -> bool:
        """Whether a process of it still runs."""
        return any(one.poll() is None for one in self._forked)

    def close(self) -> None:
        """End it, and with it those of its processes that asked for that."""
        self._requests.close()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
