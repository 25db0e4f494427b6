"""Workers: long-lived processes that any Hydra launcher can carry, and the trial hosts that they supervise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_exp.workers.worker import WorkerResult as WorkerResult
    from qlora_exp.workers.worker import run_worker as run_worker


def __getattr__(name: str) -> Any:
    """Loaded when first used: a trial host is in this room too, and needs none of it."""
    if name not in ("run_worker", "WorkerResult"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qlora_exp.workers import worker

    return getattr(worker, name)
