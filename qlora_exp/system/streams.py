"""Standard streams that take any text, and streams whose write errors never end a run.

``qlora-exp run … 2>&1 | head`` closes its pipe during training. Text that can't be written is dropped, and the exit
code stays that of the run. Commands that only print keep Python's streams: a closed pipe ends them.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any, TextIO, cast

from qlora_exp.errors import ConfigError

PERMANENT_ERRORS = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET, errno.ENXIO)
"""Errors that last: a pipe without a reader, a closed terminal. A full disk is left out: it may have room later."""

HANDLER = "qlora_exp.ascii"
ASCII = {
    "→": "->", "←": "<-", "×": "x", "–": "-", "—": "-", "−": "-", "…": "...", "·": "-", "•": "*", "±": "+-",
    "≤": "<=", "≥": ">=", "∝": "~", "≈": "~", "½": "1/2", "⁶": "^6", "⁹": "^9",
    "‘": "'", "’": "'", "“": '"', "”": '"', "\N{NO-BREAK SPACE}": " ", "\N{NARROW NO-BREAK SPACE}": " ",
}  # fmt: skip
"""Character → what a stream writes whose encoding lacks it."""


def show_any_text() -> None:
    """Let standard output and standard error take any text in any encoding (``LANG=C``, Latin-1, file names that aren't
    UTF-8)."""
    codecs.register_error(HANDLER, _replacement)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=HANDLER)


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise :class:`ConfigError` for an argument that isn't valid text in this process's encoding: no record could
    hold it."""
    encoding = sys.getfilesystemencoding()
    for text in arguments:
        if any("\ud800" <= character <= "\udfff" for character in text):
            hint = "a name in UTF-8" if encoding == "utf-8" else "export PYTHONUTF8=1"
            raise ConfigError(f"an argument can't be read as text ({encoding})", ascii(text), hint)


def _replacement(error: UnicodeError) -> tuple[str, int]:
    """Return the text that replaces what the encoding lacks, and where to go on."""
    assert isinstance(error, UnicodeEncodeError)
    replaced = []
    for character in error.object[error.start : error.end]:
        name = unicodedata.name(character, "")
        if character in ASCII:
            replaced.append(ASCII[character])
        elif name.startswith("BOX DRAWINGS"):
            replaced.append("-" if "HORIZONTAL" in name else "|")
        else:
            replaced.append(character.encode("ascii", "backslashreplace").decode("ascii"))
    return "".join(replaced), error.end


def ignore_write_errors() -> None:
    """Replace this process's standard output and error by streams that never fail.

    Call it before anything opens a file or stores a stream: if a standard descriptor is closed, the next file that is
    opened would get its number.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    sys.stdout = _unfailing(sys.stdout, 1)
    sys.stderr = _unfailing(sys.stderr, 2)


def _unfailing(stream: TextIO | None, number: int) -> TextIO:
    """Return ``stream`` over a descriptor that can't fail; a stream without descriptor (in tests) stays as it is."""
    if stream is not None:
        try:
            is_other = stream.fileno() != number
        except (OSError, ValueError, AttributeError):
            is_other = True
        if is_other or isinstance(getattr(stream, "buffer", None), _Buffer):
            return stream
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    raw = _UnfailingFile(number)
    buffer = _Buffer(raw)
    encoding, errors = getattr(stream, "encoding", "utf-8"), getattr(stream, "errors", "backslashreplace")
    line_buffered = number == 2 or raw.isatty() or getattr(stream, "write_through", False)  # PYTHONUNBUFFERED
    return cast(TextIO, io.TextIOWrapper(buffer, encoding, errors, line_buffering=line_buffered))


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
                # Point the descriptor at the null device, so that C libraries and child processes can write to it, too.
                with contextlib.suppress(OSError):
                    null_device = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null_device, self.fileno())
                    os.close(null_device)
            return len(data)
