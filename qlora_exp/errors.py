"""The errors that a user can meet, all of one shape: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence


class QloraExpError(Exception):
    """An error for a person to read: ``what`` is wrong, ``where`` (key and file, or row), ``hint`` (what to do)."""

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
    """An invalid configuration: a misspelt key, a wrong type, an impossible combination."""


class DataError(QloraExpError):
    """A data file, or one of its rows, is unusable for training."""


class ModelError(QloraExpError):
    """A model directory, file or architecture can't be used as configured."""


class RecordError(QloraExpError):
    """A record or run folder can't be found or read."""


class ExportError(QloraExpError):
    """A run can't be exported, or the export's folder can't be written."""


class AnalysisError(QloraExpError):
    """A table, ladder or decision rule gives no answer."""


class TrackingError(QloraExpError):
    """The tracking store can't be opened. Raised only at the start; later failures wait for ``qlora-exp sync``."""


class StudyError(QloraExpError):
    """A study can't be opened: its database is damaged, or a different study has the same name."""


class Problems(QloraExpError):
    """Several errors reported together, so that a user can fix them in one go."""

    def __init__(self, errors: Sequence[QloraExpError]) -> None:
        super().__init__(f"{len(errors)} problems" if len(errors) != 1 else errors[0].what)
        self.errors = tuple(errors)
        self.args = (self.errors,)  # pickle rebuilds an exception from its args

    def __str__(self) -> str:
        if len(self.errors) == 1:
            return str(self.errors[0])
        return "\n".join(f"({number}) {error}" for number, error in enumerate(self.errors, start=1))


def raise_all(errors: Sequence[QloraExpError]) -> None:
    """Raise a single error as it is, and several as :class:`Problems`; do nothing without errors."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise Problems(errors)


UNWRITABLE_ERRNOS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)


def unwritable_error(error: OSError) -> QloraExpError | None:
    """Return the user's error for missing permissions or a full disk; ``None`` for every other ``error``."""
    if error.errno not in UNWRITABLE_ERRNOS:
        return None
    hint = (
        "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable, or use another folder"
    )
    return QloraExpError(f"{error.strerror}", str(error.filename or "a file"), hint)


MUCH_LESS_SIMILAR = 0.2
"""difflib's ratio: a name that is so much less similar than the nearest one isn't what somebody meant."""


def nearest(name: str, valid: Iterable[str], limit: int = 5, template: str = "{}") -> str:
    """Return a hint for a misspelt ``name``: ``did you mean alpha or adapter?``, else ``valid: …`` with all names, or
    with the first ``limit`` if there are many. ``template``: how a near name is written, e.g. ``model={}``."""
    names = sorted(set(valid))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    similarities = {text: difflib.SequenceMatcher(None, text, name).ratio() for text in close}
    close = [text for text in close if similarities[text] > max(similarities.values()) - MUCH_LESS_SIMILAR]
    if close:
        return f"did you mean {' or '.join(template.format(text) for text in close)}?"
    if not names:
        return "there are no valid names here"
    shown = ", ".join(names[:limit]) if len(names) > limit * 3 else ", ".join(names)
    return f"valid: {shown}{', …' if len(names) > limit * 3 else ''}"
