"""The result of a check of the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """``ok`` is ``None`` if the check does not apply here (``detail`` says why). ``fix`` is set only with a problem."""

    name: str
    ok: bool | None
    detail: str
    fix: str | None = None


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """Return the check's result; an exception in the check becomes a problem, so that the other checks still run."""
    try:
        return check()
    except Exception as error:
        message = (str(error) or type(error).__name__).splitlines()[0]
        return Check(name, False, f"the check itself failed: {type(error).__name__}: {message}", "report this")
