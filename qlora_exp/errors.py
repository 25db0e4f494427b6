"""The one shape of every error that a user can meet: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence


class QloraExpError(Exception):
    """A problem told to a person: ``what`` is wrong, ``where`` (key and file, or row), ``hint`` (what to do)."""

    exit_code = 2

    def __init__(self, what: str, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  do:    {self.hint}")
        return "\n".join(lines)


class ConfigError(QloraExpError):
    """A configuration that can't be meant: a misspelt key, a wrong type, an impossible combination."""


class DataError(QloraExpError):
    """A data file or a row of it that can't be trained on."""


class ModelError(QloraExpError):
    """A model directory, file or architecture that can't be used as asked."""


class RecordError(QloraExpError):
    """A record or run folder that can't be found or read."""


class ExportError(QloraExpError):
    """A run that can't be exported, or a folder that an export can't be written to."""


class AnalysisError(QloraExpError):
    """A table, ladder or rule that no answer can be drawn from."""


class TrackingError(QloraExpError):
    """The tracking store can't be opened. Raised at the start only: later trouble is spooled, never raised."""


class StudyError(QloraExpError):
    """A study that can't be opened: a damaged database, or one that asks something else under the same name."""


class Problems(QloraExpError):
    """Several errors found together, so that a user mends them in one go."""

    def __init__(self, errors: Sequence[QloraExpError]) -> None:
        super().__init__(f"{len(errors)} problems" if len(errors) != 1 else errors[0].what)
        self.errors = tuple(errors)
        self.args = (self.errors,)  # what it is made from again in another process

    def __str__(self) -> str:
        if len(self.errors) == 1:
            return str(self.errors[0])
        return "\n".join(f"({number}) {error}" for number, error in enumerate(self.errors, start=1))


def raise_all(errors: Sequence[QloraExpError]) -> None:
    """Raise nothing for no error, the error itself for one, :class:`Problems` for several."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise Problems(errors)


UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)


def unwritable(error: OSError) -> QloraExpError | None:
    """What to tell of a file that may not be used, or of a full disk; ``None`` for every other ``error``."""
    if error.errno not in UNWRITABLE:
        return None
    hint = (
        "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable, or use another folder"
    )
    return QloraExpError(f"{error.strerror}", str(error.filename or "a file"), hint)


def nearest(name: str, valid: Iterable[str], limit: int = 5) -> str:
    """A phrase that names what ``name`` could have meant: the nearest valid names, or all where they are few."""
    names = sorted(set(valid))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    if not names:
        return "there are no valid names here"
    shown = ", ".join(names[:limit]) if len(names) > limit * 3 else ", ".join(names)
    return f"valid: {shown}{', …' if len(names) > limit * 3 else ''}"
