"""Whether a planned configuration fits into memory, how certain that is, and why."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_exp.estimate.device import PlanDevice
from qlora_exp.estimate.memory_fit import CPU_PROCESS_BYTES, RELATIVE_ERROR
from qlora_exp.formatting import bytes_text

BORDERLINE_NOTES = {
    "cpu": f"predictions were off by up to {100 * RELATIVE_ERROR['cpu']:.0f} %",
    "cuda": f"the error of predictions on GPUs is not measured yet: {100 * RELATIVE_ERROR['cuda']:.0f} % is a guess",
}
"""Device → what is known about the error of a predicted peak."""


@dataclass(frozen=True)
class PlannedLimit:
    """The memory that a configuration must fit into.

    ``whole``: the limit covers all of the process, on a CPU also what it holds after its imports. Else
    (``budget.memory_bytes``) it covers only what training adds.
    """

    limit_bytes: int
    whole: bool


@dataclass(frozen=True)
class FitResult:
    """``fits`` is ``None`` if no memory limit is known. ``borderline``: the limit lies within the prediction's
    error."""

    fits: bool | None
    borderline: bool
    reason: str


def planned_limit(fit_bytes: int | None, budget_bytes: int | None, device: PlanDevice) -> PlannedLimit | None:
    """Return the limit that applies: ``fit_bytes`` (``--fit SIZE``), else ``budget.memory_bytes``, else the device's
    memory; ``None``: it is unknown."""
    bounds = ((fit_bytes, True), (budget_bytes, False), (device.memory_bytes, True))
    return next((PlannedLimit(size, whole) for size, whole in bounds if size is not None), None)


def fit_result(
    peak_bytes: int, exact_bytes: int, base_bytes: int, bound: PlannedLimit | None, device_kind: str
) -> FitResult:
    """Compare the predicted peak with the limit. ``exact_bytes``: the part of ``peak_bytes`` that is exact.
    ``base_bytes``: the part of these that is the base."""
    on_cpu = device_kind == "cpu"
    needs = f"needs {bytes_text(peak_bytes)}"
    if bound is None:
        return FitResult(None, False, f"{needs}; no card is named (plan.device=CARD, --fit SIZE)")
    process = CPU_PROCESS_BYTES if on_cpu and bound.whole else 0
    if process:
        needs = f"needs {bytes_text(process + peak_bytes)} ({bytes_text(process)} after imports)"
    elif on_cpu:
        needs = f"{needs} beyond the process after imports,"
    message, available = f"{needs} of {bytes_text(bound.limit_bytes)}", bound.limit_bytes - process
    if base_bytes > available:
        return FitResult(
            False, False, f"{message}{f', the base alone {bytes_text(base_bytes)}' if available > 0 else ''}"
        )
    factor = 1.0 + RELATIVE_ERROR[device_kind]
    if exact_bytes <= available and available / factor < peak_bytes <= available * factor:
        return FitResult(peak_bytes <= available, True, f"borderline: {message}; {BORDERLINE_NOTES[device_kind]}")
    return FitResult(peak_bytes <= available, False, message)
