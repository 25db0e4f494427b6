"""Uses of a run's predicted memory: a warning before the start, and an explanation if its process was ended."""

from __future__ import annotations

from qlora_exp.records.fit_types import Fit
from qlora_exp.records.types import KILLED_FOR_MEMORY, Failure, RunRecord
from qlora_exp.system import memory_limits
from qlora_exp.system.device_errors import bitsandbytes_error, is_out_of_memory

SIGKILL = 9
SMALLER_HINTS = (
    "a smaller training.micro_batch_size (accumulation keeps the batch), training.gradient_checkpointing=on, "
    "or quantization=nf4"
)


def memory_warning(fit: Fit | None) -> str | None:
    """Return a warning if the predicted memory is close to the limit or above it; else ``None``."""
    if fit is None or fit.would_fit is None:
        return None
    if fit.borderline:
        need = f"{_predicted_need(fit)}, within the prediction's error ({fit.error:.0%})"
        return f"{need}; what surely fits: {fit.would_fit}"
    return f"{_predicted_need(fit)}, and started anyway; what would fit: {fit.would_fit}"


def killed_for_memory(record: RunRecord | None, signal: int | None, kills_before: int | None) -> Failure | None:
    """Return a failure if a run's process was probably killed for lack of memory; ``None`` without evidence.

    Evidence is a prediction close to the limit, or a new kill that the kernel counted.

    Args:
        signal: what ended the process; ``None``: unknown.
        kills_before: :func:`memory_limits.kills` when the process started; ``None``: unknown.
    """
    if signal not in (SIGKILL, None):
        return None
    fit = record.fit if record is not None else None
    near_limit = fit is not None and fit.excess >= -fit.error
    kills = memory_limits.out_of_memory_kills()
    counted = kills is not None and kills_before is not None and kills > kills_before
    if not near_limit and not counted:
        return None
    ending = "the run's process is gone" if signal is None else "the run's process was killed"
    cause = f"{ending}, and the kernel counted a process that it killed for lack of memory" if counted else ending
    prediction = f"; the run was {_predicted_need(fit)}" if fit is not None else ""
    return Failure(KILLED_FOR_MEMORY, f"probably out of memory: {cause}{prediction}", hint=_hint(fit))


def ended_for_memory(record: RunRecord, output: str) -> Failure | None:
    """Return a failure if bitsandbytes ended a run's process because the GPU's memory ran out; else ``None``.

    ``output``: the process's standard error. bitsandbytes writes the reason there, and raises no exception.
    """
    error = bitsandbytes_error(output)
    if error is None or not is_out_of_memory(RuntimeError(error)):
        return None
    what = f"out of memory: bitsandbytes ended the run's process with the CUDA error: {error}"
    return Failure(KILLED_FOR_MEMORY, what, hint=_hint(record.fit))


def _hint(fit: Fit | None) -> str:
    return (fit.would_fit if fit is not None else None) or SMALLER_HINTS


def _predicted_need(fit: Fit) -> str:
    from qlora_exp.formatting import bytes_text  # loads Rich

    return f"predicted to need {bytes_text(fit.corrected_bytes)} of {bytes_text(fit.limit_bytes)} of memory"
