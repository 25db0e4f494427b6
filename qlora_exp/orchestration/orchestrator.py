"""Which process orchestrates a study. One process at a time holds the study's lease; others may share the work.

Also: how a study's workers are asked to stop, by a command or by a signal to the process that launched them.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from filelock import FileLock

from qlora_exp.config.schema import WorkersConfig
from qlora_exp.errors import RecordError
from qlora_exp.orchestration.live_state import running_slots, worker_files
from qlora_exp.paths import StudyPaths, make_folder
from qlora_exp.records.files import write_json
from qlora_exp.system import signals
from qlora_exp.system.environment import is_alive, is_alive_if_visible, process_identity
from qlora_exp.system.orchestrator_lease import Lease, LeaseObserver, held_lease, read_lease, touch, write_lease

POLL_SECONDS = 0.2
BETWEEN_TRIALS_SECONDS = 2.0
"""After a trial has ended, its worker has none for a moment."""
ANNOUNCE_AFTER_SECONDS = 2.0
"""A shorter wait is not announced."""
WORKER_GRACE_SECONDS = 150.0
"""Time for the end of a step and a checkpoint in each worker, and for logging to MLflow."""

_sweeping = threading.local()


class Orchestration:
    """This process's part in a study. ``held``: whether it holds the lease; that may change while it works."""

    def __init__(self, paths: StudyPaths, workers: WorkersConfig) -> None:
        self.held = False
        self._paths = paths
        self._lease = Lease(process_identity(), workers.lease_seconds, workers.heartbeat_seconds)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="qlora-exp-lease", daemon=True)

    def take(self, silent: tuple[int, int] | None = None) -> bool:
        """Take the lease if no process has it. ``silent``: the stamp of a holder that has been silent for too long."""
        with FileLock(self._paths.lock):
            lease, watched = read_lease(self._paths.orchestrator), LeaseObserver(self._paths.orchestrator)
            is_alive = lease is not None and is_alive_if_visible(lease.process) is not False
            if is_alive and (silent is None or watched.stamp() != silent):
                return False
            write_lease(self._paths.orchestrator, self._lease)
            self.held = True
        return True

    def must_conclude(self, patiently: bool) -> bool:
        """Return whether the holder is gone, so that this process, which shared the work, must conclude the study.

        ``patiently``: give a holder on another machine the rest of its lease to show that it lives.
        """
        if self.held or self.take():
            return True
        lease = read_lease(self._paths.orchestrator) if patiently else None
        return lease is not None and _take_over_silent_holder(self, self._paths, lease)

    def begin(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        with FileLock(self._paths.lock):
            if self.held and self._is_ours():
                self._paths.orchestrator.unlink(missing_ok=True)

    def _is_ours(self) -> bool:
        lease = read_lease(self._paths.orchestrator)
        return lease is not None and lease.process == self._lease.process

    def _beat(self) -> None:
        """Renew the lease; without it, watch the holder and take over when it is gone."""
        watched = LeaseObserver(self._paths.orchestrator)
        while not self._ended.wait(self._lease.heartbeat_seconds):
            with contextlib.suppress(Exception):  # the disk is full or unavailable: the next heartbeat tries again
                self._beat_once(watched)

    def _beat_once(self, watched: LeaseObserver) -> None:
        if self.held and self._is_ours():
            touch(self._paths.orchestrator)
        elif self.held:
            self.held = read_lease(self._paths.orchestrator) is None and self.take()
            if not self.held:
                print("another process has taken over this study and will conclude it", file=sys.stderr, flush=True)
        else:
            lease, silent = read_lease(self._paths.orchestrator), watched.unchanged_seconds()
            if lease is not None:
                self.take(watched.stamp() if silent > lease.lease_seconds else None)


@contextlib.contextmanager
def orchestrating(paths: StudyPaths, name: str, join: bool, workers: WorkersConfig) -> Iterator[Orchestration]:
    """Hold the study's lease, or share the study with the process that does.

    A holder that can't be seen from here (another machine or container) has the rest of its lease to show that it
    lives; then this process takes the lease.

    Raises:
        RecordError: a living process holds the study, and this one must not share it.
    """
    make_folder(paths.folder)
    orchestration = Orchestration(paths, workers)
    while not orchestration.take():
        lease = read_lease(paths.orchestrator)
        stopping = paths.stop.is_file()
        if lease is None:
            continue  # its holder has just ended
        if (join and not stopping) or _take_over_silent_holder(orchestration, paths, lease, name):
            break
        if read_lease(paths.orchestrator) is not None:
            raise _held_error(lease, paths, name, stopping)
    if orchestration.held:
        paths.stop.unlink(missing_ok=True)  # the request was for the previous orchestrator
    orchestration.begin()
    try:
        yield orchestration
    finally:
        orchestration.end()


def _take_over_silent_holder(
    orchestration: Orchestration, paths: StudyPaths, lease: Lease, name: str | None = None
) -> bool:
    """Watch a holder that can't be seen from here. True: it gave no sign of life, and this process took the lease."""
    if is_alive_if_visible(lease.process) is not None:
        return False
    watched = LeaseObserver(paths.orchestrator)
    stamp, patience = watched.stamp(), watched.patience_seconds(lease)
    if name is not None and patience > ANNOUNCE_AFTER_SECONDS:
        where = f"study {name} is held by {lease.owner}, which can't be seen from here"
        print(f"{where}: waiting {patience:.0f} s for a heartbeat", file=sys.stderr, flush=True)
    deadline = time.monotonic() + patience
    while watched.stamp() == stamp:
        if time.monotonic() >= deadline:
            return orchestration.take(stamp)
        time.sleep(POLL_SECONDS)
    return False


def _held_error(lease: Lease, paths: StudyPaths, name: str, stopping: bool) -> RecordError:
    what = f"study {name} is being {'stopped' if stopping else 'worked on'}"
    first_option = "wait for it" if stopping else "wait for it, share the work (--join, or sweep.join=true), or stop it"
    hint = f"{first_option}: qlora-exp stop {shlex.quote(name)}{' --now' if stopping else ''}"
    return RecordError(what, f"{lease.owner} ({paths.orchestrator})", hint)


def wait_for_others(opened: Any, workers: WorkersConfig) -> None:
    """Wait while other workers run trials: a launcher that lost one worker may leave the others running (Slurm
    does)."""
    quiet_checks = 0
    while quiet_checks < 2:
        time.sleep(BETWEEN_TRIALS_SECONDS)
        quiet_checks = 0 if opened.others_run_trials(workers.lease_seconds) else quiet_checks + 1


def request_stop(paths: StudyPaths, name: str, now: bool) -> str:
    """Ask the workers to stop and return the mode: ``gracefully``, or ``now`` if ``now`` or if this is the second
    request.

    Raises:
        RecordError: no process works on the study.
    """
    if held_lease(paths.orchestrator) is None and not running_slots(paths):
        raise RecordError(
            "no process works on the study", f"study {name}", f"qlora-exp resume {shlex.quote(name)} continues it"
        )
    mode = "now" if now or paths.stop.is_file() else "gracefully"
    write_json(paths.stop, {"mode": mode})
    return mode


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
    import psutil

    timers: list[threading.Timer] = []

    def stop_workers(number: int, frame: FrameType | None) -> None:
        meaning = signals.meaning_of(number)
        if meaning is signals.Meaning.SAME:
            return
        workers: list[int] = []
        if meaning is not signals.Meaning.AGAIN:
            descendants = {child.pid for child in psutil.Process().children(recursive=True)}
            processes = [process for _, process, _ in worker_files(paths) if process.pid in descendants]
            workers = [process.pid for process in processes if is_alive(process)]
        if not workers:
            raise signals.SignalInterrupt
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
            raise signals.SignalInterrupt
    finally:
        _sweeping.depth -= 1
        for timer in timers:
            timer.cancel()
