"""Whether a planned configuration fits into memory, how surely, and why, in words."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_exp.estimate.device import PlanDevice
from qlora_exp.estimate.memory_fit import CPU_PROCESS_BYTES, ERROR
from qlora_exp.formatting import bytes_text

BORDERLINE_NOTES = {
    "cpu": f"predictions have been off by up to {100 * ERROR['cpu']:.0f} %",
    "cuda": f"by how much predictions are off on a GPU nobody has measured yet: {100 * ERROR['cuda']:.0f} % is a guess",
}
"""Device → what is known of a predicted peak's error."""


@dataclass(frozen=True)
class PlannedLimit:
    """What a configuration must fit into. ``whole``: all that its process takes must, on a CPU too what it holds after
    its imports; else, for ``budget.memory_bytes``, what training adds to that."""

    bound_bytes: int
    whole: bool


@dataclass(frozen=True)
class FitResult:
    """``fits`` is ``None`` where no bound is known. ``near_the_edge``: the bound lies within the prediction's error."""

    fits: bool | None
    near_the_edge: bool
    reason: str


def planned_limit(fit_bytes: int | None, budget_bytes: int | None, device: PlanDevice) -> PlannedLimit | None:
    """``fit_bytes``: of ``--fit SIZE``, which goes before ``budget.memory_bytes``, and that before the device's memory;
    ``None``: it isn't known."""
    bounds = ((fit_bytes, True), (budget_bytes, False), (device.memory_bytes, True))
    return next((PlannedLimit(size, whole) for size, whole in bounds if size is not None), None)


def verdict_of(
    peak_bytes: int, exact_bytes: int, base_bytes: int, bound: PlannedLimit | None, device_kind: str
) -> FitResult:
    """``exact_bytes``: of the predicted ``peak_bytes`` what is known exactly, ``base_bytes`` of these the base."""
    on_cpu = device_kind == "cpu"
    needs = f"needs {bytes_text(peak_bytes)}"
    if bound is None:
        return FitResult(None, False, f"{needs}; no card is named (plan.device=CARD, --fit SIZE)")
    process = CPU_PROCESS_BYTES if on_cpu and bound.whole else 0
    if process:
        needs = f"needs {bytes_text(process + peak_bytes)} ({bytes_text(process)} after imports)"
    elif on_cpu:
        needs = f"{needs} beyond what it has after imports,"
    told, left = f"{needs} of {bytes_text(bound.bound_bytes)}", bound.bound_bytes - process
    if base_bytes > left:
        return FitResult(False, False, f"{told}{f', the base alone {bytes_text(base_bytes)}' if left > 0 else ''}")
    factor = 1.0 + ERROR[device_kind]
    if exact_bytes <= left and left / factor < peak_bytes <= left * factor:
        return FitResult(peak_bytes <= left, True, f"near the edge: {told}; {BORDERLINE_NOTES[device_kind]}")
    return FitResult(peak_bytes <= left, False, told)
