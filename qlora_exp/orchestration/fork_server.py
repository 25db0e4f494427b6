"""A process that imports what trial processes need and forks them: none of them repeats the imports.

``python -m qlora_exp.orchestration.fork_server --socket FD --parent PID --import MODULE …``, started by
:mod:`qlora_exp.orchestration.forking`. It imports the modules, computes nothing and starts no thread. A forked process
equals a new interpreter after the same imports: its file pages count as resident, and its random numbers are new.
If this process can't be forked safely, it ends at once with exit code ``UNSUITABLE``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import io
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TextIO, cast

from qlora_exp.orchestration.forking import UNSUITABLE
from qlora_exp.paths import PACKAGE
from qlora_exp.runs.process import die_with, import_and_freeze_gc, silence_libraries
from qlora_exp.system import streams
from qlora_exp.system.environment import git_state, package_versions
from qlora_exp.system.gpus import DEVICES_VARIABLE

WITHOUT_CUDA = {DEVICES_VARIABLE: "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""During the imports: with both, torch.cuda.is_available() returns without a call to CUDA, also in a CUDA build."""
MADV_POPULATE_READ = 22  # <linux/mman.h>, Linux 5.14
ARG_START, ARG_END = 45, 46
"""Fields of /proc/self/stat after the command's name, proc(5): where the kernel reads a process's arguments."""
PRESENT = 1 << 63
"""In an entry of /proc/self/pagemap: the page is resident."""
LIBRARIES_THREADS = {"jemalloc_bg_thd"}
"""Threads that a library starts when it is imported, and ends before a fork: pyarrow's allocator."""
FOR_TRIALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""A scheduler sends these to all processes of a job. Trial processes answer them, and need this process until then."""
THREADS_END_SECONDS = 5.0
"""Time for threads that were ended before a fork to vanish from the kernel's list."""
GENERATORS = {"datasets.fingerprint": "fingerprint_rng"}
"""Random numbers besides Python's, numpy's and torch's that must differ between processes: a random fingerprint of a
dataset names its file in the cache."""
FIRST_PATH = sys.path[0] if sys.path else ""
MESSAGE_BYTES, DESCRIPTORS = 1 << 18, 5


@dataclass(frozen=True)
class Request:
    """What to start: ``python -m module arguments``. ``environment``: variables that differ; ``None``: not set."""

    module: str
    arguments: tuple[str, ...]
    environment: dict[str, str | None]

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", self.module, *self.arguments]


def main() -> Request:
    """Fork processes until nobody requests one. Returns only in a forked process, with its request."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--import", dest="modules", action="append", default=[])
    parser.add_argument("room", help="space for the forked processes' arguments, which ps shows")
    arguments = parser.parse_args()
    die_with(arguments.parent)
    os.set_inheritable(arguments.socket, False)
    streams.ignore_write_errors()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # for imports that hang
    inherited = {number: signal.getsignal(number) for number in (*FOR_TRIALS, signal.SIGCHLD)}
    for number in FOR_TRIALS:
        if number != signal.SIGUSR1:
            signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # where the parent ignores it, no process could be waited for
    problem = _import(arguments.modules)
    if problem is not None:
        print(f"trial processes are new interpreters: {problem}", file=sys.stderr, flush=True)
        os._exit(UNSUITABLE)
    _let_go_of_log()
    requests = socket.socket(fileno=arguments.socket)
    request, mask = _Server(requests, inherited, _resident_file_pages()).serve()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # a signal that came during the fork arrives now
    return request


class _Server:
    def __init__(self, requests: socket.socket, inherited: dict[signal.Signals, Any], pages: list[tuple[int, int]]):
        self.requests, self.inherited, self.pages = requests, inherited, pages
        self.running: dict[int, int] = {}
        """By the pid of a process: the socket that gets its exit code."""
        self.ended, self._wake = os.pipe()
        os.set_blocking(self.ended, False)
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)

    def serve(self) -> tuple[Request, set[int]]:
        """Returns in a forked process: its request, and the signal mask to set."""
        poll = select.poll()
        poll.register(self.requests, select.POLLIN)
        poll.register(self.ended, select.POLLIN)
        requested = True
        while requested or self.running:
            for descriptor, _ in poll.poll():
                if descriptor == self.ended:
                    self._report_ended()
                    continue
                message, own, _, _ = socket.recv_fds(self.requests, MESSAGE_BYTES, DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
                if not message:
                    requested = False
                    poll.unregister(self.requests)
                    continue
                started = self._start(message, own)
                if started is not None:
                    return started
        os._exit(os.EX_OK)

    def _report_ended(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.ended, 1 << 12)
        for pid in list(self.running):
            ended, code = os.waitpid(pid, os.WNOHANG)
            if ended:
                status = self.running.pop(pid)
                _write(status, f"exit {os.waitstatus_to_exitcode(code)}")
                os.close(status)

    def _start(self, message: bytes, descriptors: list[int]) -> tuple[Request, set[int]] | None:
        """Fork a process. If that fails, the end of its status says so, and it is started without this server."""
        unused = list(descriptors)
        try:
            if len(descriptors) == DESCRIPTORS and _write(descriptors[-1], "forking"):
                raw = json.loads(message)
                request = Request(raw["module"], tuple(raw["arguments"]), raw["environment"])
                *own, status = descriptors
                pid, mask = self._forked(request, own, status)
                if pid == 0:
                    return request, mask
                if _write(status, f"pid {pid}"):
                    self.running[pid] = unused.pop()
                else:  # nobody waits for it any more
                    os.killpg(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
        except Exception:
            traceback.print_exc()
        for descriptor in unused:
            os.close(descriptor)
        return None

    def _forked(self, request: Request, own: list[int], status: int) -> tuple[int, set[int]]:
        """As :func:`os.fork`, with the signal mask that the forked process has to set.

        When this returns, the process leads a group, and signals act on it as on a new interpreter.

        Raises:
            OSError: no process could be forked, or it couldn't become what was requested.
        """
        ready, complete = os.pipe()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_TRIALS)
        try:
            pid = os.fork()
        except OSError:
            pid = -1
        if pid == 0:
            try:
                self._become(request, own, status)
                os.write(complete, b"1")
                os.close(complete)
                os.close(ready)
                return pid, mask
            except BaseException:
                os._exit(os.EX_SOFTWARE)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(complete)
        is_complete = os.read(ready, 1)
        os.close(ready)
        if not is_complete:
            if pid > 0:
                os.waitpid(pid, 0)
            raise OSError(f"no process could be forked for {' '.join(request.command)}")
        return pid, mask

    def _become(self, request: Request, own: list[int], status: int) -> None:
        """In the forked process: become what a new interpreter is after the same imports."""
        os.setsid()
        signal.set_wakeup_fd(-1)
        self.requests.close()
        for descriptor in (self.ended, self._wake, status, *self.running.values()):
            os.close(descriptor)
        *standard, folder = own
        for number, descriptor in enumerate(standard):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.fchdir(folder)
        os.close(folder)
        for name, value in request.environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _show_as(request)
        _make_resident(self.pages)
        _begin_afresh()
        faulthandler.unregister(signal.SIGUSR1)
        for number, handler in self.inherited.items():
            signal.signal(number, handler)


def run(request: Request) -> None:
    """Go on as ``python -m module arguments`` in this forked process."""
    sys.orig_argv = request.command
    sys.argv = ["-m", *request.arguments]
    if not sys.flags.safe_path and FIRST_PATH in sys.path:  # an import may have put others before it
        try:
            folder = os.getcwd()
        except FileNotFoundError:
            folder = ""
        sys.path[sys.path.index(FIRST_PATH)] = folder
    sys.modules["__main__"] = types.ModuleType("__main__")
    runpy._run_module_as_main(request.module)  # type: ignore[attr-defined]


def _write(status: int, text: str) -> bool:
    """Return whether somebody still reads it."""
    try:
        os.write(status, f"{text}\n".encode())
    except OSError:
        return False
    return True


def _import(modules: Sequence[str]) -> str | None:
    """Import ``modules``. Returns why nothing can be forked afterwards."""
    if not _resident_file_pages():
        return "/proc/self/pagemap can't be read"
    before = {name: os.environ.get(name) for name in WITHOUT_CUDA}
    os.environ.update(WITHOUT_CUDA)
    try:
        silence_libraries()
        import_and_freeze_gc(modules)
    except BaseException:
        traceback.print_exc()  # a new interpreter meets it, too, and reports it
        return "the imports failed"
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    git_state(PACKAGE)  # kept by both functions: records name the code that was imported here
    package_versions()
    torch: Any = sys.modules.get("torch")
    if torch is not None and (torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork()):
        return "the imports have begun to use CUDA"
    try:
        pid = os.fork()  # libraries end their threads before a fork
    except OSError as error:
        return f"a fork failed: {error}"
    if pid == 0:
        os._exit(os.EX_OK if torch is None or not torch.cuda._is_in_bad_fork() else os.EX_SOFTWARE)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != os.EX_OK:
        return "the imports have begun to use CUDA"
    until = time.monotonic() + THREADS_END_SECONDS
    while len(own := _threads()) > 1 and time.monotonic() < until:
        time.sleep(0.01)
    return None if len(own) == 1 else f"the imports have started threads: {', '.join(own)}"


def _threads() -> list[str]:
    """The names of this process's threads that a fork would lose. A thread that has ended may be listed a little
    longer."""
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has just ended
            names.append(path.read_text(encoding="utf-8", errors="replace").strip())
    return sorted(name for name in names if name not in LIBRARIES_THREADS)


def _let_go_of_log() -> None:
    """The first trial process's log must not stay open here."""
    sys.stdout.flush()
    sys.stderr.flush()
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    os.close(nothing)


def _resident_file_pages() -> list[tuple[int, int]]:
    """Start and length of the mapped files' parts that are resident: a fork doesn't take them along."""
    size = os.sysconf("SC_PAGE_SIZE")
    found: list[tuple[int, int]] = []
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            for line in Path("/proc/self/maps").read_bytes().split(b"\n")[:-1]:  # names of files are any bytes
                place, mode, _, _, inode, *_ = line.split()
                if inode == b"0" or not mode.startswith(b"r"):
                    continue
                start, end = (int(text, 16) for text in place.split(b"-"))
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
    """What each interpreter has for itself: random numbers, standard streams, the folder for temporary files."""
    random.seed()
    if "numpy" in sys.modules:
        import numpy

        numpy.random.seed()
    if "torch" in sys.modules:
        import torch

        torch.default_generator.seed()
    for module, name in GENERATORS.items():
        if module in sys.modules:
            getattr(sys.modules[module], name).seed()
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
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    start, end = int(fields[ARG_START]), int(fields[ARG_END])
    if end <= start:  # the kernel hides them
        return
    text = b"".join(os.fsencode(part) + b"\0" for part in request.command)[: end - start - 1]
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, len(text))


if __name__ == "__main__":
    run(main())
