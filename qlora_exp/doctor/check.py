"""What a check of the machine says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """``ok`` is ``None`` where the check does not apply here (``detail`` says why). ``fix`` only with a problem."""

    name: str
    ok: bool | None
    detail: str
    fix: str | None = None


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """The check, or that it fell over: a doctor that falls over helps nobody."""
    try:
        return check()
    except Exception as error:
        message = (str(error) or type(error).__name__).splitlines()[0]
        return Check(name, False, f"the check itself failed: {type(error).__name__}: {message}", "report this")
