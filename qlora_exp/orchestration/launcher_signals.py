"""How a signal ends a sweep whose workers run in processes that a launcher started on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from qlora_exp.errors import RecordError
from qlora_exp.paths import StudyPaths
from qlora_exp.records.schema import from_dict
from qlora_exp.records.types import Process
from qlora_exp.system import signals
from qlora_exp.system.environment import is_alive

WORKER_GRACE_SECONDS = 150.0
"""Time for the end of a step and a checkpoint in each worker, and for logging to MLflow."""

_sweeping = threading.local()


def launches_sweep() -> bool:
    """Return whether this thread launches a sweep: after a worker in it was stopped, the launcher must start no other
    one."""
    return getattr(_sweeping, "depth", 0) > 0


@contextlib.contextmanager
def stop_workers_on_signal(paths: StudyPaths) -> Iterator[None]:
    """Pass a request to stop on to the workers that a launcher started on this machine.

    They save and return their trials, and the launcher returns. Without such workers, and at the second request, this
    raises KeyboardInterrupt. Otherwise the signal would reach the launcher first, which kills its processes.
    """
    timers: list[threading.Timer] = []

    def stop_workers(number: int, frame: FrameType | None) -> None:
        meaning = signals.meaning_of(number)
        if meaning is signals.Meaning.SAME:
            return
        workers = [] if meaning is signals.Meaning.AGAIN else _worker_pids(paths)
        if not workers:
            raise KeyboardInterrupt
        for pid in workers:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM)
        timers.append(threading.Timer(WORKER_GRACE_SECONDS, os.kill, (os.getpid(), signal.SIGINT)))
        timers[-1].daemon = True
        timers[-1].start()
        signals.print_to_stderr("the workers save and stop; a second signal stops them at once")

    _sweeping.depth = getattr(_sweeping, "depth", 0) + 1
    try:
        with signals.handle_signals(stop_workers):
            yield
        if timers:
            raise KeyboardInterrupt
    finally:
        _sweeping.depth -= 1
        for timer in timers:
            timer.cancel()


def _worker_pids(paths: StudyPaths) -> list[int]:
    """Return the process ids of the study's workers that descend from this process, without itself."""
    import psutil

    descendants = {child.pid for child in psutil.Process().children(recursive=True)}
    pids = []
    for file in paths.workers.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecordError):
            process = from_dict(Process, json.loads(file.read_text(encoding="utf-8"))["process"])
            if process.pid in descendants and is_alive(process):
                pids.append(process.pid)
    return pids
