"""Standard output and error that never end the work: a reader that is gone, a closed terminal, a full disk.

``qlora-exp run … 2>&1 | head`` closes its pipe while a training goes on. What can't be written is dropped, and the exit
code stays that of the work. Verbs that only print keep Python's own streams: for them a closed pipe is the end.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any, TextIO, cast

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET, errno.ENXIO)
"""A pipe without a reader, a terminal that was closed; a full disk may have room again later."""


def keep_writing() -> None:
    """Make this process's standard streams such ones. Called before anything else opens a file or keeps a stream:
    where a standard descriptor is closed, the next file that is opened would get its number."""
    _open_missing()
    sys.stdout = _lasting(sys.stdout, 1)
    sys.stderr = _lasting(sys.stderr, 2)


def _open_missing() -> None:
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one


def _lasting(stream: TextIO | None, number: int) -> TextIO:
    """``stream`` over a descriptor that can't fail; one without a descriptor (a test's) stays as it is."""
    if stream is not None:
        if isinstance(getattr(stream, "buffer", None), _Buffer) or _descriptor(stream) != number:
            return stream
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    raw = _Lasting(number)
    buffer = _Buffer(raw)
    encoding, errors = getattr(stream, "encoding", "utf-8"), getattr(stream, "errors", "backslashreplace")
    lines = number == 2 or raw.isatty() or getattr(stream, "write_through", False)  # PYTHONUNBUFFERED
    return cast(TextIO, io.TextIOWrapper(buffer, encoding, errors, line_buffering=lines))


def _descriptor(stream: Any) -> int | None:
    try:
        return int(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return None


class _Buffer(io.BufferedWriter):
    """Recognised when the streams are set a second time."""


class _Lasting(io.FileIO):
    """A descriptor whose writes always succeed."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
            while written is None:  # a pipe that doesn't block is full
                select.select([], [self.fileno()], [])
                written = super().write(data)
            return written
        except OSError as error:
            if error.errno in GONE:
                self._drop_the_rest()
            return len(data)

    def _drop_the_rest(self) -> None:
        """What else writes to this descriptor, a library in C or a child, then doesn't fail either."""
        with contextlib.suppress(OSError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.fileno())
            os.close(nothing)
