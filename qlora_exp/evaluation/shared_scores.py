"""Scores that several runs share: one process computes them, the others wait and read them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

T = TypeVar("T")

SIGN_SECONDS = 5.0
"""A waiting run gives a sign of life this often: a worker ends a trial process that is silent for too long."""


@dataclass
class Wait:
    """How long a run waited for another one's scores, and what it does meanwhile."""

    sign: Callable[[], None] = lambda: None
    """Called when the run begins to wait, and every :data:`SIGN_SECONDS` from then on."""
    over: Callable[[], None] = lambda: None
    """Called when the wait is over: the scores are there, or this run computes them."""
    seconds: float = 0.0


def cached(
    folder: Path | None,
    key: str,
    load: Callable[[Path], T],
    compute: Callable[[], T],
    save: Callable[[Path, T], None],
    wait: Wait | None = None,
) -> T:
    """Return the result that ``folder`` holds under ``key``, else compute and save it. Without a folder, compute it.

    One process computes it, the others wait; a signal ends the wait as it ends the computation. If the computing
    process dies, the kernel releases its lock, and one of the others computes the result. A result that can't be loaded
    is computed again; ``None`` isn't saved.

    Args:
        wait: gets the seconds of waiting.
    """
    if folder is None:
        return compute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.json"
    with contextlib.suppress(Exception):  # there is none, or it is damaged
        return load(path)
    with _lock(folder / f"{key}.lock", wait or Wait()):
        with contextlib.suppress(Exception):
            return load(path)
        result = compute()
        if result is not None:
            save(path, result)
    return result


@contextlib.contextmanager
def _lock(file: Path, wait: Wait) -> Iterator[None]:
    """Hold the lock ``file``. Where the file system has no locks, hold none: two processes may then compute the same
    result, and each writes all of it."""
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        _acquire_later(lock, wait)
    except (OSError, NotImplementedError):  # no locks on this file system, or its lock server doesn't answer
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _acquire_later(lock: FileLock, wait: Wait) -> None:
    began = time.monotonic()
    try:
        while not lock.is_locked:
            wait.sign()
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=SIGN_SECONDS)
    finally:
        wait.seconds += time.monotonic() - began
    wait.over()
