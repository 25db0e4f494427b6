"""What a run's predicted memory says: a warning before it starts, and why its process was killed afterwards."""

from __future__ import annotations

from qlora_exp.records.types import KILLED_FOR_MEMORY, Failure, Fit, RunRecord
from qlora_exp.system import memory_limits

SIGKILL = 9
SMALLER_HINTS = (
    "a smaller training.micro_batch_size (accumulation keeps the batch), training.gradient_checkpointing=on, "
    "or quantization=nf4"
)


def near_the_bound(fit: Fit | None) -> str | None:
    """A warning where a run that starts is predicted near its bound, or above it; else ``None``."""
    if fit is None or fit.would_fit is None:
        return None
    if fit.near_the_edge:
        return f"{_needs(fit)}, within the prediction's error ({fit.error:.0%}); what surely fits: {fit.would_fit}"
    return f"{_needs(fit)}, and started all the same; what would fit: {fit.would_fit}"


def killed_for_memory(record: RunRecord | None, signal: int | None, kills_before: int | None) -> Failure | None:
    """Why a run's process is gone, where it was probably memory; ``None`` where nothing says so.

    ``signal`` ended the process (``None``: unknown). ``kills_before`` is what :func:`memory_limits.kills` gave when it
    was started; ``None``: nobody asked.
    """
    if signal not in (SIGKILL, None):
        return None
    fit = record.fit if record is not None else None
    close = fit is not None and fit.excess >= -fit.error
    kills = memory_limits.kills()
    counted = kills is not None and kills_before is not None and kills > kills_before
    if not close and not counted:
        return None
    gone = "the run's process is gone" if signal is None else "the run's process was killed"
    how = f"{gone}, and the kernel counts a process that it ended for want of memory" if counted else gone
    needed = f"; the run was {_needs(fit)}" if fit is not None else ""
    hint = (fit.would_fit if fit is not None else None) or SMALLER_HINTS
    return Failure(KILLED_FOR_MEMORY, f"probably out of memory: {how}{needed}", hint=hint)


def _needs(fit: Fit) -> str:
    from qlora_exp.formatting import bytes_text  # loads Rich

    return f"predicted to need {bytes_text(fit.corrected_bytes)} of {bytes_text(fit.bound_bytes)} of memory"
