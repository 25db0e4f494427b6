"""A lease: a file that names its owner and that the owner touches every few seconds.

An owner on this machine is dead or alive by its process. One on another machine, or in another container, can't be
seen: it is gone when its file has not changed for the length of the lease. Two clocks are never compared: a change is
timed by the observer's own clock, and a file's age is taken from the file system that holds it.
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
from qlora_exp.system.environment import alive_if_visible, process_identity

EARLIER_LEASE_SECONDS, EARLIER_HEARTBEAT_SECONDS = 60.0, 5.0
"""Of a file that names none: an earlier version wrote it."""
MISSED_HEARTBEATS = 2.5
"""However old a file looks, it is watched for this many heartbeats before its owner counts as gone."""


@dataclass(frozen=True)
class Lease:
    """Who holds it, and for how long without a heartbeat."""

    process: Process
    lease_seconds: float
    heartbeat_seconds: float

    @property
    def owner(self) -> str:
        """``process 12``, or ``process 12 on HOST`` where that is another machine."""
        elsewhere = self.process.host is not None and self.process.host != process_identity().host
        return f"process {self.process.pid}" + (f" on {self.process.host}" if elsewhere else "")


def write_lease(file: Path, lease: Lease) -> None:
    seconds = {"lease_seconds": lease.lease_seconds, "heartbeat_seconds": lease.heartbeat_seconds}
    write_json(file, {**to_dict(lease.process), **seconds})


def read_lease(file: Path) -> Lease | None:
    """``None``: nobody holds it, or the file can't be read."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        process = from_dict(Process, raw)
        lease_seconds = float(raw.get("lease_seconds") or EARLIER_LEASE_SECONDS)
        return Lease(process, lease_seconds, float(raw.get("heartbeat_seconds") or EARLIER_HEARTBEAT_SECONDS))
    except (OSError, ValueError, TypeError, RecordError):
        return None


def held(file: Path) -> Lease | None:
    """The lease as it looks at a glance; ``None``: its owner is dead, or has been silent for longer than the lease."""
    lease = read_lease(file)
    if lease is None:
        return None
    living = alive_if_visible(lease.process)
    if living is None:
        age = age_seconds(file)
        living = age is not None and abs(age) <= lease.lease_seconds  # a clock that was set back makes ages negative
    return lease if living else None


def age_seconds(file: Path) -> float | None:
    """Seconds since ``file`` was last written or touched, by the clock of its file system; ``None``: it is gone."""
    try:
        touched = file.stat().st_mtime
    except OSError:
        return None
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".now.") as probe:
            return os.fstat(probe.fileno()).st_mtime - touched
    except OSError:  # a folder that can't be written
        return time.time() - touched


class Watched:
    """A lease's file as one observer sees it: for how long it has not changed."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._seen = self.stamp()
        self._since = time.monotonic()

    def stamp(self) -> tuple[int, int] | None:
        """Changes with every heartbeat and with every new owner; ``None``: there is no file."""
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
        """How much longer an observer who begins now waits for a heartbeat: the rest of the lease."""
        age = age_seconds(self.file) or 0.0
        left = lease.lease_seconds - age if age >= 0 else lease.lease_seconds
        return min(max(left, MISSED_HEARTBEATS * lease.heartbeat_seconds), lease.lease_seconds)


def touch(file: Path) -> None:
    """A heartbeat. The file system says what time it is."""
    with contextlib.suppress(OSError):
        os.utime(file)
