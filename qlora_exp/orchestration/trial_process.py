"""A trial process as its worker sees it: start it, exchange messages, end it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from qlora_exp.orchestration import forking
from qlora_exp.orchestration.messages import PRELOADED, Command, EndProcess, Message, decode, encode_message
from qlora_exp.system.gpus import DEVICES_VARIABLE

DUMP_SECONDS, TERM_SECONDS = 0.5, 5.0
"""Time for a hung process to write its stack traces, and then to end after SIGTERM."""
EXIT_SECONDS = 120.0
"""Time for a process to end after :class:`EndProcess`: logging to MLflow may take up to about a minute."""
CHUNK_BYTES = 65536
ALWAYS_IMPORTED = ("qlora_exp.config.compose", "qlora_exp.orchestration.messages", "hydra.core.global_hydra")
"""What a host imports by itself, whatever it preloads."""


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
    """A running trial process. The thread that starts it must outlive it: the kernel kills the process when that thread
    ends."""

    def __init__(self, log: Path, environment: Mapping[str, str], preload: Sequence[str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        commands, send = os.pipe()
        self._out, answers = os.pipe()
        self._in = os.fdopen(send, "wb", buffering=0)
        self._read = b""
        self._server: forking.ForkServer | None = None
        try:
            with log.open("ab") as stream:
                descriptors = (commands, answers, stream.fileno())
                self._process = self._begin({**os.environ, **environment}, preload, descriptors)
        except BaseException:
            self._closed(0)
            raise
        finally:
            os.close(commands)
            os.close(answers)

    def _begin(
        self, environment: Mapping[str, str], preload: Sequence[str], descriptors: tuple[int, int, int]
    ) -> subprocess.Popen[bytes] | forking.Forked:
        """Forked where it trains nothing on a GPU, which no process can share by a fork; else a new interpreter."""
        preloads = [argument for name in preload for argument in ("--preload", name)]
        if preload and DEVICES_VARIABLE not in environment:
            modules = (*ALWAYS_IMPORTED, *(module for name in preload for module in PRELOADED[name]))
            self._server = forking.server_for(environment, modules, descriptors[2])
        if self._server is not None:
            with contextlib.suppress(OSError):  # it has just ended
                parent = ["--parent", str(self._server.pid)]
                return self._server.start("qlora_exp.orchestration.trial_main", [*parent, *preloads], descriptors)
        return subprocess.Popen(
            [sys.executable, "-m", "qlora_exp.orchestration.trial_main", "--parent", str(os.getpid()), *preloads],
            stdin=descriptors[0],
            stdout=descriptors[1],
            stderr=descriptors[2],
            env=environment,
            start_new_session=True,  # Ctrl-C at the terminal is the worker's to pass on
        )

    @property
    def pid(self) -> int | None:
        """``None``: the server that forks it is still importing."""
        return self._process.pid

    def send(self, command: Command) -> None:
        """Send a command. If the process is gone, only :meth:`receive` reports that."""
        with contextlib.suppress(BrokenPipeError):
            self._in.write(encode_message(command))

    def receive(self, timeout_seconds: float) -> Message | None:
        """The next message, or ``None`` after ``timeout_seconds``. Raises :class:`ProcessDied`."""
        deadline = time.monotonic() + timeout_seconds
        while b"\n" not in self._read:
            ready, _, _ = select.select([self._out], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            chunk = os.read(self._out, CHUNK_BYTES)
            if not chunk:
                raise ProcessDied(self._process.wait())
            self._read += chunk
        line, _, self._read = self._read.partition(b"\n")
        return cast(Message, decode(line))

    def terminate(self) -> None:
        """Send SIGTERM: the run saves its state and ends as interrupted."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> int:
        """KILL to it and all that it started. Returns the exit code."""
        if self._process.poll() is None:
            pid = self._process.pid
            if pid is None and isinstance(self._process, forking.Forked):
                return self._closed(self._process.forgo())
            assert pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        return self._closed(self._process.wait())

    def dump_and_kill(self) -> int:
        """End a hung process: stack traces to the log, SIGTERM, SIGKILL."""
        if self._process.pid is None and self._server is not None:  # its imports hang
            self._server.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)
        time.sleep(DUMP_SECONDS)
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(TERM_SECONDS)
        return self.kill()

    def end(self) -> None:
        """Let the process finish logging to MLflow, and end it."""
        self.send(EndProcess())
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_SECONDS)
        self.kill()

    def _closed(self, code: int) -> int:
        with contextlib.suppress(BrokenPipeError):
            self._in.close()
        out, self._out = self._out, -1
        if out >= 0:
            os.close(out)
        return code
