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

from qlora_exp.orchestration.messages import Command, EndProcess, Message, decode, encode_message

DUMP_SECONDS, TERM_SECONDS = 0.5, 5.0
"""Time for a hung process to write its stack traces, and then to end after SIGTERM."""
EXIT_SECONDS = 120.0
"""Time for a process to end after :class:`EndProcess`: logging to MLflow may take up to about a minute."""
CHUNK_BYTES = 65536


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
        preloads = [argument for name in preload for argument in ("--preload", name)]
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "qlora_exp.orchestration.trial_main", "--parent", str(os.getpid()), *preloads],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env={**os.environ, **environment},
                bufsize=0,
                start_new_session=True,  # Ctrl-C at the terminal is the worker's to pass on
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout.fileno()
        self._read = b""

    @property
    def pid(self) -> int:
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
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        return self._closed(self._process.wait())

    def dump_and_kill(self) -> int:
        """End a hung process: stack traces to the log, SIGTERM, SIGKILL."""
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
        if self._process.stdout is not None:
            self._process.stdout.close()
        return code
