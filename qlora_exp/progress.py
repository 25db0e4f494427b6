"""How far long work has come, for whoever shows it: rows tokenized, weights loaded, items scored.

The code that works calls :func:`report_progress`; :func:`shown_by` names who shows it. Without a listener a report
costs one comparison, with one at most five calls a second, so that nothing that is measured becomes slower.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SECONDS_BETWEEN = 0.2
"""Reports in between are dropped, except the last one of a piece of work."""


@dataclass(frozen=True)
class Amount:
    """``done`` of ``total`` ``unit`` (plural, e.g. "items scored"). ``share``: the part of the work that is done, from
    0 to 1; it differs from done / total if some take longer than others."""

    done: int
    total: int
    unit: str
    share: float


Listener = Callable[[Amount], None]

_listener: Listener | None = None
_last_report = 0.0


@contextlib.contextmanager
def shown_by(listener: Listener) -> Iterator[None]:
    """Send the reports inside the ``with`` block to ``listener``, in this process."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def report_progress(done: int, total: int, unit: str, share: float | None = None) -> None:
    """Report that ``done`` of ``total`` ``unit`` are done. ``share``: see :class:`Amount`; by default done / total."""
    global _last_report
    if _listener is None or total <= 0:
        return
    now = time.monotonic()
    if now - _last_report < SECONDS_BETWEEN and 0 < done < total:
        return
    _last_report = now
    _listener(Amount(done, total, unit, done / total if share is None else share))
