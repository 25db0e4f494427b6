"""A trial process as its worker sees it: start it, exchange messages, end it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from qlora_exp.orchestration import forking
from qlora_exp.orchestration.messages import PRELOADED, Command, EndProcess, Message, decode, encode_message
from qlora_exp.system.environment import NO_TELEMETRY
from qlora_exp.system.gpus import DEVICES_VARIABLE

DUMP_SECONDS, TERM_SECONDS = 0.5, 5.0
"""Time for a hung process to write its stack traces, and then to end after SIGTERM."""
REPORT_SECONDS = 30.0
"""Time for a server to report that a process was killed: one that was stopped, or hangs, never would."""
EXIT_SECONDS = 120.0
"""Time for a process to end after :class:`EndProcess`: logging to MLflow may take up to about a minute."""
CHUNK_BYTES = 65536
PROGRAM = "qlora_exp.orchestration.trial_main"
ALWAYS_IMPORTED = ("qlora_exp.config.compose", "qlora_exp.orchestration.messages", "hydra.core.global_hydra")
"""What every trial process imports, in addition to what it preloads."""


class ProcessDied(Exception):
    """The trial process has ended. ``code``: as in :class:`subprocess.Popen`, negative for a signal."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code

    def __str__(self) -> str:
        if self.code >= 0:
            return f"the trial's process ended with exit code {self.code}"
        return f"the trial's process was ended by signal {signal.Signals(-self.code).name}"


class TrialProcess:
    """A running trial process: forked from a server that has imported what it needs, else a new interpreter.

    The thread that starts and uses it must outlive it: the kernel kills a new interpreter when that thread ends."""

    def __init__(self, log: Path, environment: Mapping[str, str], preload: Sequence[str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._environment = {**os.environ, **NO_TELEMETRY, **environment}
        self._preloads = [argument for name in preload for argument in ("--preload", name)]
        self._read = self._unsent = b""
        self._own, self._theirs = contextlib.ExitStack(), contextlib.ExitStack()
        """Our ends of both pipes. And theirs with the log, until the process has them."""
        try:
            stderr = self._theirs.enter_context(log.open("ab")).fileno()
            stdin, send = os.pipe()
            self._theirs.callback(os.close, stdin)
            self._in = self._own.enter_context(os.fdopen(send, "wb", buffering=0))
            self._out, stdout = os.pipe()
            self._theirs.callback(os.close, stdout)
            self._own.callback(os.close, self._out)
            self._standard = stdin, stdout, stderr
            uses_gpu = DEVICES_VARIABLE in environment
            self._server = self._server_for(preload) if preload and not uses_gpu else None
            self._process = self._requested() or self._new_interpreter()
        except BaseException:
            self._theirs.close()
            self._own.close()
            raise

    def _server_for(self, preload: Sequence[str]) -> forking.ForkServer | None:
        modules = (*ALWAYS_IMPORTED, *(module for name in preload for module in PRELOADED[name]))
        with contextlib.suppress(OSError):
            return forking.server_for(self._environment, modules, self._standard[2])
        return None

    def _requested(self) -> forking.Forked | None:
        if self._server is not None:
            arguments = ["--parent", str(self._server.pid), *self._preloads]
            with contextlib.suppress(OSError):  # the server has just ended, for example
                return self._server.start(PROGRAM, arguments, self._standard, self._environment)
        return None

    def _new_interpreter(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", PROGRAM, "--parent", str(os.getpid()), *self._preloads],
            stdin=self._standard[0],
            stdout=self._standard[1],
            stderr=self._standard[2],
            env=self._environment,
            start_new_session=True,  # Ctrl-C at the terminal is the worker's to pass on
        )
        self._theirs.close()
        return process

    def _has_begun(self, timeout_seconds: float) -> bool:
        """Wait until the process runs; if it can't be forked, start a new interpreter."""
        if isinstance(self._process, forking.Forked) and self._process.pid is None:
            try:
                if not self._process.has_begun(timeout_seconds):
                    return False
            except ProcessLookupError:
                self._process = self._new_interpreter()
        self._theirs.close()
        unsent, self._unsent = self._unsent, b""
        with contextlib.suppress(BrokenPipeError):
            while unsent:  # a signal may end a write early
                unsent = unsent[self._in.write(unsent) :]
        return True

    @property
    def pid(self) -> int | None:
        """``None``: the server that forks it is still importing."""
        return self._process.pid

    def send(self, command: Command) -> None:
        """Send a command. If the process is gone, only :meth:`receive` reports that."""
        self._unsent += encode_message(command)  # a pipe that nobody reads yet must not block the worker
        self._has_begun(0.0)

    def receive(self, timeout_seconds: float) -> Message | None:
        """The next message, or ``None`` after ``timeout_seconds``. Raises :class:`ProcessDied`."""
        deadline = time.monotonic() + timeout_seconds
        while b"\n" not in self._read:
            if not self._has_begun(max(0.0, deadline - time.monotonic())):
                return None
            if not forking.is_readable(self._out, max(0.0, deadline - time.monotonic())):
                return None
            chunk = os.read(self._out, CHUNK_BYTES)
            if not chunk:
                raise ProcessDied(self._process.wait())
            self._read += chunk
        line, _, self._read = self._read.partition(b"\n")
        return cast(Message, decode(line))

    def terminate(self) -> None:
        """Send SIGTERM: the run saves its state and ends as interrupted. One that hasn't begun ends at once."""
        if isinstance(self._process, forking.Forked) and self._process.pid is None:
            self._process.give_up(signal.SIGTERM)
        else:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> int:
        """KILL to it and all that it started. Returns the exit code."""
        pid = self._process.pid
        if isinstance(self._process, forking.Forked) and pid is None:
            code = self._process.give_up(signal.SIGKILL)
        else:
            assert pid is not None
            if self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            code = self._killed()
        self._theirs.close()
        with contextlib.suppress(BrokenPipeError):
            self._own.close()
        return code

    def _killed(self) -> int:
        """Wait for the killed process. Returns its exit code."""
        if self._server is not None and isinstance(self._process, forking.Forked):
            try:
                return self._process.wait(REPORT_SECONDS)
            except subprocess.TimeoutExpired:
                self._server.kill()
        return self._process.wait()

    def dump_and_kill(self) -> int:
        """End a hung process: stack traces to the log, SIGTERM, SIGKILL."""
        if self.pid is None and self._server is not None:  # the imports hang
            self._server.dump()
        else:
            self._process.send_signal(signal.SIGUSR1)
        time.sleep(DUMP_SECONDS)
        if self.pid is None and self._server is not None:
            self._server.kill()
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(TERM_SECONDS)
        return self.kill()

    def end(self) -> None:
        """Let the process finish logging to MLflow, and end it."""
        if self.pid is not None:
            self.send(EndProcess())
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(EXIT_SECONDS)
        self.kill()
