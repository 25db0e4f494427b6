"""Signals that ask a process to end: Ctrl-C, TERM (a scheduler or container), HUP (a terminal was closed).

One event often causes several signals: a shell and the kernel both send HUP, a supervisor sends TERM to all processes
of a group and each parent forwards it. :func:`meaning_of` distinguishes such a repetition from a second request.
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
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, HANGUP)
SAME_KEY_SECONDS, SAME_EVENT_SECONDS = 0.1, 2.0
"""Two SIGINT within the first are one key press; a TERM within the second is one that a parent forwarded."""

Handler = Callable[[int, FrameType | None], object]


class Meaning(enum.Enum):
    """The meaning of a signal."""

    FIRST = "the first request to end"
    SAME = "a repetition of it"
    AGAIN = "another request: it is urgent"


class SignalInterrupt(KeyboardInterrupt):
    """A signal asked this process to end.

    A subclass, because CPython marks the process if exactly KeyboardInterrupt leaves ``exec`` of a text, which imports
    often call (dataclasses, SQLAlchemy). ``python -m`` then ends by SIGINT, although the exception was caught.
    """


class _Requests:
    """When this process got signals, since the outermost :func:`handle_signals` began (``time.monotonic`` seconds)."""

    def __init__(self) -> None:
        self.depth = 0
        self.last: float | None = None
        self.last_key = -SAME_KEY_SECONDS


_requests = _Requests()


def meaning_of(number: int) -> Meaning:
    """Return the meaning of signal ``number``, which has just arrived. Its handler calls this once per signal."""
    now, last, last_key = time.monotonic(), _requests.last, _requests.last_key
    _requests.last = now
    if number == signal.SIGINT:
        _requests.last_key = now
    if last is None:
        return Meaning.FIRST
    if number == signal.SIGINT:
        return Meaning.SAME if now - last_key < SAME_KEY_SECONDS else Meaning.AGAIN
    return Meaning.SAME if number == HANGUP or now - last < SAME_EVENT_SECONDS else Meaning.AGAIN


@contextlib.contextmanager
def handle_signals(handler: Handler, numbers: tuple[int, ...] = ENDING_SIGNALS) -> Iterator[None]:
    """Install ``handler`` for the signals; restore the earlier handlers at the end.

    HUP stays ignored if it was (nohup). Outside the main thread nothing is installed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _requests.depth == 0:
        _requests.last, _requests.last_key = None, -SAME_KEY_SECONDS
    _requests.depth += 1
    handled = [number for number in numbers if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)
        _requests.depth -= 1


def signals_as_interrupts() -> contextlib.AbstractContextManager[None]:
    """Let all of these signals raise :class:`SignalInterrupt`, once per request."""
    return handle_signals(interrupt)


def interrupt(number: int, frame: FrameType | None) -> None:
    if meaning_of(number) is not Meaning.SAME:
        raise SignalInterrupt


@contextlib.contextmanager
def delay_interrupt(text: str) -> Iterator[None]:
    """Let a short task finish: the first Ctrl-C prints ``text``, only a second one interrupts."""
    presses = 0

    def count(number: int, frame: FrameType | None) -> None:
        nonlocal presses
        if meaning_of(number) is Meaning.SAME or number != signal.SIGINT:
            return
        presses += 1
        if presses > 1:
            raise SignalInterrupt
        print_to_stderr(text)

    with handle_signals(count):
        yield


def print_to_stderr(text: str) -> None:
    """Print to standard error from a signal handler, without the stream object that the signal may have interrupted."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())
