"""Signals that ask a process to end: Ctrl-C, TERM (a scheduler or container), HUP (a terminal that was closed).

One event often brings several signals: a shell and the kernel both send HUP, a supervisor sends TERM to all processes
of a group and each parent passes it on. :func:`heard` tells such a repetition from a person who asks a second time.
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)
ENDING = (signal.SIGINT, signal.SIGTERM, HANGUP)
SAME_KEY_SECONDS, SAME_EVENT_SECONDS = 0.1, 2.0
"""Nobody presses Ctrl-C twice so quickly; TERM comes again within this time from a parent that passes it on."""

Handler = Callable[[int, FrameType | None], object]


class Heard(enum.Enum):
    FIRST = "the first request to end"
    SAME = "a repetition of it"
    AGAIN = "another request: it is urgent"


class _Requests:
    """What this process has been asked, since the outermost :func:`handling` began."""

    def __init__(self) -> None:
        self.depth = 0
        self.last: float | None = None
        self.last_key = -SAME_KEY_SECONDS


_requests = _Requests()


def heard(number: int) -> Heard:
    """What the signal ``number``, which has just come, means. Called once a signal, by its handler."""
    now, last, last_key = time.monotonic(), _requests.last, _requests.last_key
    _requests.last = now
    if number == signal.SIGINT:
        _requests.last_key = now
    if last is None:
        return Heard.FIRST
    if number == signal.SIGINT:
        return Heard.SAME if now - last_key < SAME_KEY_SECONDS else Heard.AGAIN
    return Heard.SAME if number == HANGUP or now - last < SAME_EVENT_SECONDS else Heard.AGAIN


@contextlib.contextmanager
def handling(handler: Handler, numbers: tuple[int, ...] = ENDING) -> Iterator[None]:
    """Have ``handler`` called for the signals. HUP stays ignored where it was (nohup). Only in a main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _requests.depth == 0:
        _requests.last, _requests.last_key = None, -SAME_KEY_SECONDS
    _requests.depth += 1
    taken = [number for number in numbers if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in taken}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)
        _requests.depth -= 1


def interrupting() -> contextlib.AbstractContextManager[None]:
    """All of them end what goes on like Ctrl-C: by KeyboardInterrupt, once for each request."""
    return handling(interrupt)


def interrupt(number: int, frame: FrameType | None) -> None:
    if heard(number) is not Heard.SAME:
        raise KeyboardInterrupt


@contextlib.contextmanager
def held_back(text: str) -> Iterator[None]:
    """Let short work be finished first: only a second Ctrl-C from now on interrupts it; the first shows ``text``."""
    keys = 0

    def count(number: int, frame: FrameType | None) -> None:
        nonlocal keys
        if heard(number) is Heard.SAME or number != signal.SIGINT:
            return
        keys += 1
        if keys > 1:
            raise KeyboardInterrupt
        say(text)

    with handling(count):
        yield


def say(text: str) -> None:
    """Print to standard error from a handler, which must not touch a stream that it may have interrupted."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())
