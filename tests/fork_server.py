"""A process that has imported what others need, and forks them from itself: they start within milliseconds.

``python -m tests.fork_server --socket FD --parent PID [--import MODULE …]``, started by
:mod:`tests.forking`. It imports the modules, computes nothing and starts no thread. A forked process
is what a new interpreter is after the same imports: its pages count as resident, and its random numbers are its own.
Where that can't be had, the server starts a new interpreter instead.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TextIO, cast

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
MADV_POPULATE_READ = 22  # <linux/mman.h>, Linux 5.14
ARG_START, ARG_END = 45, 46
"""Fields of /proc/self/stat after the command's name, proc(5): where the kernel reads a process's arguments."""
PRESENT = 1 << 63
"""In an entry of /proc/self/pagemap: the page is resident."""
LIBRARIES_THREADS = {"jemalloc_bg_thd"}
"""Threads that a library starts when it is imported and takes care of at a fork: pyarrow's allocator."""
ANSWERED_BY_OTHERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
MESSAGE_BYTES, DESCRIPTORS = 1 << 18, 5


@dataclass(frozen=True)
class Request:
    """What to start: ``python -m module arguments``. ``environment``: variables that differ from the server's own;
    ``None`` is one that isn't set."""

    module: str
    arguments: tuple[str, ...]
    environment: dict[str, str | None]

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", self.module, *self.arguments]


def main() -> Request | None:
    """Serve until the parent is gone. Returns in each forked process, with what that is to do; ``None``: the end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--import", dest="modules", action="append", default=[])
    parser.add_argument("--may-differ", action="append", default=[])
    parser.add_argument("room", help="space for the forked processes' arguments, as ps shows them")
    arguments = parser.parse_args()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != arguments.parent:
        os._exit(1)
    # A scheduler sends these to all processes of a job. The forked ones answer, and need this one until they end.
    inherited = {number: signal.getsignal(number) for number in ANSWERED_BY_OTHERS}
    for number, handler in inherited.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    os.set_inheritable(arguments.socket, False)
    requests = socket.socket(fileno=arguments.socket)
    request = _Server(requests, dict(os.environ), arguments.modules, set(arguments.may_differ)).serve()
    for number, handler in inherited.items():
        signal.signal(number, handler)
    return request


class _Server:
    def __init__(
        self, requests: socket.socket, environment: Mapping[str, str], modules: Sequence[str], may_differ: set[str]
    ) -> None:
        self.requests, self.environment, self.may_differ = requests, environment, may_differ
        self.running: dict[int, tuple[int, int]] = {}
        """By the descriptor of the process: its pid, and the pipe that gets its exit code."""
        self.unsuitable = _import(modules)
        self.pages = [] if self.unsuitable else _resident_file_pages()
        if not self.unsuitable and not self.pages:
            self.unsuitable = "/proc/self/pagemap can't be read"

    def serve(self) -> Request | None:
        poll = select.poll()
        poll.register(self.requests, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor in self.running:
                    poll.unregister(descriptor)
                    self._ended(descriptor)
                    continue
                message, descriptors, _, _ = socket.recv_fds(self.requests, MESSAGE_BYTES, DESCRIPTORS)
                if not message:
                    return None
                started = self._start(_request(message), descriptors)
                if isinstance(started, Request):
                    return started
                if started is not None:
                    poll.register(started, select.POLLIN)

    def _start(self, request: Request, descriptors: list[int]) -> int | Request | None:
        """The descriptor of the process, in the forked one its request; ``None``: there is none."""
        if len(descriptors) != DESCRIPTORS:
            return None
        *own, status = descriptors
        os.set_inheritable(status, False)
        pid = None if _nobody_waits(status) else self._begun(request, own)
        if pid == 0:
            self._leave(own, status)
            return self._become(request)
        for descriptor in own:
            os.close(descriptor)
        try:
            process = None if pid is None else os.pidfd_open(pid)
        except OSError:
            traceback.print_exc()
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            process = None
        if pid is None or process is None:
            _tell(status, "exit 1")
            os.close(status)
            return None
        self.running[process] = pid, status
        _tell(status, f"pid {pid}")
        return process

    def _begun(self, request: Request, own: list[int]) -> int | None:
        """The pid of the new process, 0 in a forked one; ``None``: there is no memory for it. This process goes on
        then, for those that run need it."""
        try:
            if self.unsuitable or self._differs(request.environment):
                return self._spawned(request, own)
            return _forked()
        except OSError:
            traceback.print_exc()
            return None

    def _spawned(self, request: Request, own: list[int]) -> int:
        """The pid of a new interpreter."""
        *standard, folder = own
        process = subprocess.Popen(
            request.command,
            stdin=standard[0],
            stdout=standard[1],
            stderr=standard[2],
            cwd=f"/proc/self/fd/{folder}",
            env=self._environment(request),
            start_new_session=True,
        )
        process.returncode = 0  # subprocess is not to wait for it
        return process.pid

    def _environment(self, request: Request) -> dict[str, str]:
        own = {name: value for name, value in self.environment.items() if name not in request.environment}
        return own | {name: value for name, value in request.environment.items() if value is not None}

    def _ended(self, process: int) -> None:
        pid, status = self.running.pop(process)
        os.close(process)
        _, code = os.waitpid(pid, 0)
        _tell(status, f"exit {os.waitstatus_to_exitcode(code)}")
        os.close(status)

    # In the forked process.

    def _leave(self, own: list[int], status: int) -> None:
        self.requests.close()
        os.close(status)
        for process, (_, other) in self.running.items():
            os.close(process)
            os.close(other)
        *standard, folder = own
        for number, descriptor in enumerate(standard):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.fchdir(folder)
        os.close(folder)

    def _become(self, request: Request) -> Request:
        wanted = self._environment(request)
        set_by_imports = {name: value for name, value in os.environ.items() if name not in self.environment}
        for name in set(os.environ) - set(wanted) - set(set_by_imports):
            del os.environ[name]
        os.environ.update(wanted)
        _show_as(request)
        _make_resident(self.pages)
        _begin_afresh()
        return request

    def _differs(self, environment: Mapping[str, str | None]) -> bool:
        """Whether the imports might have gone otherwise with ``environment``. Some set variables themselves."""
        return any(value != os.environ.get(name) for name, value in environment.items() if name not in self.may_differ)


def run(request: Request) -> None:
    """Go on as ``python -m module arguments`` in this forked process."""
    sys.orig_argv = request.command
    sys.argv = ["-m", *request.arguments]
    try:
        sys.path[0] = os.getcwd()
    except FileNotFoundError:
        sys.path[0] = ""
    sys.modules["__main__"] = types.ModuleType("__main__")
    runpy._run_module_as_main(request.module)  # type: ignore[attr-defined]


def _forked() -> int:
    """Fork a process that leads a group already, so that it can be killed with what it starts. As :func:`os.fork`."""
    ready, begun = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(ready)
        os.setsid()
        os.close(begun)
        return 0
    os.close(begun)
    os.read(ready, 1)
    os.close(ready)
    return pid


def _request(message: bytes) -> Request:
    raw = json.loads(message)
    return Request(raw["module"], tuple(raw["arguments"]), raw["environment"])


def _nobody_waits(pipe: int) -> bool:
    """Whether the reader of a pipe is gone."""
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _tell(pipe: int, text: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody asks any more
        os.write(pipe, f"{text}\n".encode())


def _import(modules: Sequence[str]) -> str | None:
    """Import ``modules``. Returns why nothing can be forked afterwards."""
    try:
        from qlora_exp.runs.process import import_and_freeze_gc, silence_libraries

        silence_libraries()
        import_and_freeze_gc(modules)
    except BaseException:
        traceback.print_exc()  # a new interpreter meets it too, and tells
        return "the imports failed"
    torch: Any = sys.modules.get("torch")
    if torch is not None and (torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork()):
        return "the imports have begun to use CUDA"
    pid = os.fork()  # libraries end their threads before a fork
    if pid == 0:
        os._exit(os.EX_OK if torch is None or not torch.cuda._is_in_bad_fork() else os.EX_SOFTWARE)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != os.EX_OK:
        return "the imports have begun to use CUDA"
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    own = sorted(name for name in names if name not in LIBRARIES_THREADS)
    return None if len(own) == 1 else f"the imports have started threads: {', '.join(own)}"


def _resident_file_pages() -> list[tuple[int, int]]:
    """Start and length of the mapped files' parts that are resident: a fork doesn't take them along."""
    size = os.sysconf("SC_PAGE_SIZE")
    found: list[tuple[int, int]] = []
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            for line in Path("/proc/self/maps").read_text().splitlines():
                place, mode, _, _, inode, *_ = line.split()
                if inode == "0" or not mode.startswith("r"):
                    continue
                start, end = (int(text, 16) for text in place.split("-"))
                entries = memoryview(os.pread(pagemap.fileno(), (end - start) // size * 8, start // size * 8))
                _add_runs(found, start, size, entries)
    except OSError:
        return []
    return found


def _add_runs(found: list[tuple[int, int]], start: int, size: int, entries: memoryview) -> None:
    begun: int | None = None
    for number, entry in enumerate(entries.cast("Q")):
        if entry & PRESENT:
            begun = number if begun is None else begun
        elif begun is not None:
            found.append((start + begun * size, (number - begun) * size))
            begun = None
    if begun is not None:
        found.append((start + begun * size, (len(entries) // 8 - begun) * size))


def _make_resident(pages: Sequence[tuple[int, int]]) -> None:
    """Have the mapped files' pages count as resident here as they do in the server, and in a new interpreter: what a
    run's memory grows by is then its own."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    size = os.sysconf("SC_PAGE_SIZE")
    for start, length in pages:
        if madvise(start, length, MADV_POPULATE_READ) != 0:
            for place in range(start, start + length, size):
                ctypes.string_at(place, 1)


def _begin_afresh() -> None:
    """What an interpreter has of its own: random numbers, standard streams, the folder for temporary files."""
    random.seed()
    if "numpy" in sys.modules:
        import numpy

        numpy.random.seed()
    if "torch" in sys.modules:
        import torch

        torch.default_generator.seed()
    tempfile.tempdir = None
    sys.stdin, sys.stdout = _stream(sys.stdin, 0, "r"), _stream(sys.stdout, 1, "w")
    sys.stderr = _stream(sys.stderr, 2, "w", line_buffering=True)
    vars(sys).update(__stdin__=sys.stdin, __stdout__=sys.stdout, __stderr__=sys.stderr)


def _stream(like: TextIO, number: int, mode: Literal["r", "w"], line_buffering: bool = False) -> io.TextIOWrapper:
    """A standard stream as the interpreter opens it."""
    through = bool(os.environ.get("PYTHONUNBUFFERED"))
    raw = io.FileIO(number, mode, closefd=False)
    buffer = io.BufferedReader(raw) if mode == "r" else raw if through else io.BufferedWriter(raw)
    lines = not through and (line_buffering or raw.isatty())
    stream = io.TextIOWrapper(cast(IO[bytes], buffer), like.encoding, like.errors, None, lines, through)
    setattr(stream, "mode", mode)  # noqa: B010 - as the interpreter does; its type has none
    return stream


def _show_as(request: Request) -> None:
    """Have ``ps`` show this process as what it is."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[ARG_START]), int(fields[ARG_END])
    text = b"".join(os.fsencode(part) + b"\0" for part in request.command)[: end - start - 1]
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, len(text))


if __name__ == "__main__":
    _work = main()
    if _work is not None:
        run(_work)
