"""A polite signal ends a run after its step. Where memory is so short that no step ends, a second thread ends it.

Python runs a signal's handler between two of its own instructions: never, while one operation of torch waits for pages
that the kernel reads from disk. The number of each signal also arrives in a pipe, at once, and a thread reads it there.
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
SHORT_SECONDS = 5.0
"""What a run gets to end by itself while memory is short."""
WATCH_SECONDS = 0.5


@contextlib.contextmanager
def ended_when_memory_is_short(last_words: Callable[[int], None], exit_code: int) -> Iterator[None]:
    """End this process where a signal asked it to end, and memory is so short that it can't.

    ``last_words`` is called with the signal's number before, in another thread. Does nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    over = threading.Event()
    watch = threading.Thread(
        target=_watch, args=(reading, over, last_words, exit_code), name="termination", daemon=True
    )
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        over.set()
        with contextlib.suppress(OSError):  # not its end alone: a forked child may hold it open
            os.write(writing, b"\0")
        os.close(writing)
        watch.join()
        os.close(reading)


def _watch(reading: int, over: threading.Event, last_words: Callable[[int], None], exit_code: int) -> None:
    number = _asked_to_end(reading, over)
    if number is None:
        return
    pages, seen = memory_limits.pages_read_back(), time.monotonic()
    short_for = 0.0
    while not over.wait(WATCH_SECONDS):
        pages_now, now = memory_limits.pages_read_back(), time.monotonic()
        rate = (pages_now - pages) / (now - seen)
        is_short = memory_limits.is_nearly_full() or rate > memory_limits.PAGES_PER_SECOND
        short_for = short_for + now - seen if is_short else 0.0
        pages, seen = pages_now, now
        if short_for >= SHORT_SECONDS:
            with contextlib.suppress(Exception):
                last_words(number)
            os._exit(exit_code)


def _asked_to_end(reading: int, over: threading.Event) -> int | None:
    """The signal that asks this process to end; ``None``: the run ended first."""
    while True:
        select.select([reading], [], [])
        numbers = os.read(reading, 64)
        if not numbers or over.is_set():
            return None
        for number in numbers:
            if number in TERMINATION_SIGNALS:
                return number
