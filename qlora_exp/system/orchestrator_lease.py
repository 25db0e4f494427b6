"""A lease: a file with its owner's identity, which the owner touches every few seconds (heartbeat).

If the owner runs on this machine, its process shows whether it is alive. An owner on another machine or in another
container isn't visible: it counts as gone when its file hasn't changed for the length of the lease. Clocks of two
machines are never compared: the observer times changes by its own clock, and file ages come from the file system.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from qlora_exp.errors import RecordError
from qlora_exp.records.files import write_json
from qlora_exp.records.schema import from_dict, to_dict
from qlora_exp.records.types import Process
from qlora_exp.system.environment import is_alive_if_visible, process_identity

DEFAULT_LEASE_SECONDS, DEFAULT_HEARTBEAT_SECONDS = 60.0, 5.0
"""For files of earlier versions, which hold neither."""
MISSED_HEARTBEATS = 2.5
"""An observer waits at least this many heartbeats before an owner counts as gone, even if its file looks old."""


@dataclass(frozen=True)
class Lease:
    """The owner, the seconds that the lease lasts without a heartbeat, and the seconds between heartbeats."""

    process: Process
    lease_seconds: float
    heartbeat_seconds: float

    @property
    def owner(self) -> str:
        """``process 12``, or ``process 12 on HOST`` for another machine."""
        elsewhere = self.process.host is not None and self.process.host != process_identity().host
        return f"process {self.process.pid}" + (f" on {self.process.host}" if elsewhere else "")


def write_lease(file: Path, lease: Lease) -> None:
    seconds = {"lease_seconds": lease.lease_seconds, "heartbeat_seconds": lease.heartbeat_seconds}
    write_json(file, {**to_dict(lease.process), **seconds})


def read_lease(file: Path) -> Lease | None:
    """Return the lease in ``file``; ``None`` if the file doesn't exist or can't be read."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        process = from_dict(Process, raw)
        lease_seconds = float(raw.get("lease_seconds") or DEFAULT_LEASE_SECONDS)
        return Lease(process, lease_seconds, float(raw.get("heartbeat_seconds") or DEFAULT_HEARTBEAT_SECONDS))
    except (OSError, ValueError, TypeError, RecordError):
        return None


def held_lease(file: Path) -> Lease | None:
    """Return the lease if it is held; ``None`` if its owner is dead, or sent no heartbeat for longer than the lease."""
    lease = read_lease(file)
    if lease is None:
        return None
    is_alive = is_alive_if_visible(lease.process)
    if is_alive is None:
        age = age_seconds(file)
        is_alive = age is not None and abs(age) <= lease.lease_seconds  # a clock that was set back makes ages negative
    return lease if is_alive else None


def age_seconds(file: Path) -> float | None:
    """Return seconds since ``file`` was last touched, by the clock of its file system; ``None`` if it doesn't exist."""
    try:
        touched = file.stat().st_mtime
    except OSError:
        return None
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".now.") as probe:
            return os.fstat(probe.fileno()).st_mtime - touched
    except OSError:  # the folder isn't writable
        return time.time() - touched


class LeaseObserver:
    """An observer of a lease's file: measures for how long it hasn't changed."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._seen = self.stamp()
        self._since = time.monotonic()

    def stamp(self) -> tuple[int, int] | None:
        """Return a value that changes with every heartbeat and every new owner; ``None`` if there is no file."""
        try:
            status = self.file.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino

    def unchanged_seconds(self) -> float:
        stamp = self.stamp()
        if stamp != self._seen:
            self._seen, self._since = stamp, time.monotonic()
        return time.monotonic() - self._since

    def patience_seconds(self, lease: Lease) -> float:
        """Return how long an observer that starts now waits for a heartbeat: the rest of the lease, but at least
        :data:`MISSED_HEARTBEATS` heartbeats."""
        age = age_seconds(self.file) or 0.0
        remaining = lease.lease_seconds - age if age >= 0 else lease.lease_seconds
        return min(max(remaining, MISSED_HEARTBEATS * lease.heartbeat_seconds), lease.lease_seconds)


def touch(file: Path) -> None:
    """Send a heartbeat: set the file's time to the file system's current time."""
    with contextlib.suppress(OSError):
        os.utime(file)
