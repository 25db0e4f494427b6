"""Ends a run after a signal, even if memory is so short that its current step never ends.

Usually a signal ends a run after its step. But Python calls signal handlers only between bytecode instructions, so not
while a torch operation waits for pages that the kernel reads from disk. The signal's number also arrives in a pipe at
once (``signal.set_wakeup_fd``), where a second thread reads it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator

from qlora_exp.system import memory_limits

TERMINATION_SIGNALS = frozenset(
    number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None
)
MAX_SHORT_MEMORY_SECONDS = 5.0
"""Seconds of short memory after a signal in which a run may still end by itself."""
WATCH_SECONDS = 0.5


@contextlib.contextmanager
def exit_if_memory_is_short(last_words: Callable[[int], None], exit_code: int) -> Iterator[None]:
    """End this process with ``exit_code`` if a signal asked it to end and memory is so short that it can't.

    Another thread first calls ``last_words`` with the signal's number. Does nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    run_ended = threading.Event()
    thread = threading.Thread(
        target=_exit_after_signal, args=(reading, run_ended, last_words, exit_code), name="termination", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        run_ended.set()
        with contextlib.suppress(OSError):  # closing isn't enough: a forked child may hold the pipe open
            os.write(writing, b"\0")
        os.close(writing)
        thread.join()
        os.close(reading)


def _exit_after_signal(
    reading: int, run_ended: threading.Event, last_words: Callable[[int], None], exit_code: int
) -> None:
    number = _wait_for_signal(reading, run_ended)
    if number is None:
        return
    pages, seen_at = memory_limits.major_page_faults(), time.monotonic()
    short_for = 0.0
    while not run_ended.wait(WATCH_SECONDS):
        pages_now, now = memory_limits.major_page_faults(), time.monotonic()
        rate = (pages_now - pages) / (now - seen_at)
        is_short = memory_limits.is_nearly_full() or rate > memory_limits.MAX_PAGE_FAULTS_PER_SECOND
        short_for = short_for + now - seen_at if is_short else 0.0
        pages, seen_at = pages_now, now
        if short_for >= MAX_SHORT_MEMORY_SECONDS:
            with contextlib.suppress(Exception):
                last_words(number)
            os._exit(exit_code)


def _wait_for_signal(reading: int, run_ended: threading.Event) -> int | None:
    """Wait for a signal that asks this process to end, and return it; ``None`` if the run ended first."""
    while True:
        select.select([reading], [], [])
        numbers = os.read(reading, 64)
        if not numbers or run_ended.is_set():
            return None
        for number in numbers:
            if number in TERMINATION_SIGNALS:
                return number
