"""A trial host as its worker sees it: a process to start, to talk to and, when it must be, to end."""

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
"""A host that hangs gets this long to write its stacks, and then to end by itself."""
EXIT_SECONDS = 120.0
"""A host that was told to end may still be delivering to MLflow, which bounds itself to about a minute."""
CHUNK_BYTES = 65536
ALWAYS_IMPORTED = ("qlora_exp.config.compose", "qlora_exp.orchestration.messages", "hydra.core.global_hydra")
"""What a host imports by itself, whatever it preloads."""


class ProcessDied(Exception):
    """The host's process has ended. ``code``: as :class:`subprocess.Popen` has it, negative for a signal."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code

    def __str__(self) -> str:
        if self.code >= 0:
            return f"the trial's process ended with exit code {self.code}"
        return f"the trial's process was ended by signal {signal.Signals(-self.code).name}"


class HostProcess:
    """Must be started by the thread that outlives it: the kernel ends a host with the thread that started it."""

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
        """A host that is gone doesn't hear it: :meth:`receive` tells."""
        with contextlib.suppress(BrokenPipeError):
            self._in.write(encode_message(command))

    def receive(self, timeout_seconds: float) -> Message | None:
        """The next message, or ``None`` after ``timeout_seconds``. Raises :class:`ProcessDied`."""
        until = time.monotonic() + timeout_seconds
        while b"\n" not in self._read:
            ready, _, _ = select.select([self._out], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return None
            chunk = os.read(self._out, CHUNK_BYTES)
            if not chunk:
                raise ProcessDied(self._process.wait())
            self._read += chunk
        line, _, self._read = self._read.partition(b"\n")
        return cast(Message, decode(line))

    def terminate(self) -> None:
        """TERM: the run saves what it has and ends as interrupted."""
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
        """For a host that hangs: its stacks to the log, TERM, and KILL."""
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
        """Let it finish its deliveries and exit."""
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
