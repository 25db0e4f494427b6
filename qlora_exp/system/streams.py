"""Standard streams whose write errors never end a run: a pipe without a reader, a closed terminal, a full disk.

``qlora-exp run … 2>&1 | head`` closes its pipe during training. Text that can't be written is dropped, and the exit
code stays that of the run. Commands that only print keep Python's streams: a closed pipe ends them.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any, TextIO, cast

PERMANENT_ERRORS = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET, errno.ENXIO)
"""Errors that last: a pipe without a reader, a closed terminal. A full disk is left out: it may have room later."""


def ignore_write_errors() -> None:
    """Replace this process's standard output and error by streams that never fail.

    Call it before anything opens a file or stores a stream: if a standard descriptor is closed, the next file that is
    opened would get its number.
    """
    _open_missing()
    sys.stdout = _unfailing(sys.stdout, 1)
    sys.stderr = _unfailing(sys.stderr, 2)


def _open_missing() -> None:
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one


def _unfailing(stream: TextIO | None, number: int) -> TextIO:
    """Return ``stream`` over a descriptor that can't fail; a stream without descriptor (in tests) stays as it is."""
    if stream is not None:
        if isinstance(getattr(stream, "buffer", None), _Buffer) or _descriptor(stream) != number:
            return stream
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    raw = _UnfailingFile(number)
    buffer = _Buffer(raw)
    encoding, errors = getattr(stream, "encoding", "utf-8"), getattr(stream, "errors", "backslashreplace")
    line_buffered = number == 2 or raw.isatty() or getattr(stream, "write_through", False)  # PYTHONUNBUFFERED
    return cast(TextIO, io.TextIOWrapper(buffer, encoding, errors, line_buffering=line_buffered))


def _descriptor(stream: Any) -> int | None:
    try:
        return int(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return None


class _Buffer(io.BufferedWriter):
    """Marks a stream that :func:`ignore_write_errors` made."""


class _UnfailingFile(io.FileIO):
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
            if error.errno in PERMANENT_ERRORS:
                self._point_at_null_device()
            return len(data)

    def _point_at_null_device(self) -> None:
        """Point the descriptor at the null device, so that C libraries and child processes can write to it, too."""
        with contextlib.suppress(OSError):
            null_device = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null_device, self.fileno())
            os.close(null_device)
