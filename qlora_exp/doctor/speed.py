"""Is this machine as fast as its data sheet says, now and in its calibration? If not, predicted seconds and dollars are
wrong."""

from __future__ import annotations

import time

from qlora_exp.config.schema import Quantization
from qlora_exp.doctor.result import Check
from qlora_exp.estimate.calibration import calibration_flops_per_second
from qlora_exp.system import environment
from qlora_exp.system.hardware import card_of, data_sheet_flops

SECONDS = 1.0
MEASURED_SIZES = {"cuda": 8192, "cpu": 1024}
"""Square matrices large enough that the multiplication is timed, not the memory."""
MIN_SHARE = 0.5
"""Share of the data sheet's figure. Large matrix products reach about 0.6 to 0.9 of it on an idle card."""
MAX_SHARE = 1.05
MIN_CALIBRATED_SHARE = 0.1
"""Share of the data sheet's figure that the calibration's training steps reach: they do more than multiply. An
assumption, not measured on a card."""


def matmul_rate() -> Check:
    """Measure the rate for a second, in 16 bits on a GPU and in fp32 on a CPU (which has no data sheet here)."""
    device = environment.probe().device
    rate = measure_flops_per_second(device.kind)
    return against_datasheet(device.kind, device.name, rate)


def against_datasheet(kind: str, name: str | None, rate: float) -> Check:
    """Compare ``rate`` in FLOP/s with the card's data sheet, if that is known."""
    detail = f"{rate / 1e12:.3g} TFLOP/s measured"
    if kind != "cuda":
        return Check("matmul rate", True, f"{detail} in fp32 with the threads above (no data sheet for CPUs)")
    sheet = data_sheet_flops(name)
    if sheet is None:
        return Check("matmul rate", None, f"{detail} in 16 bits; no data sheet is known for {name}")
    share = rate / sheet
    detail = f"{detail} in 16 bits, {share:.0%} of the data sheet's {sheet / 1e12:.4g}"
    if share > MAX_SHARE:
        return Check(
            "matmul rate", False, detail, f"the data sheet's figure for {card_of(name or '')} is wrong: report it"
        )
    if share < MIN_SHARE:
        fix = "nvidia-smi -q -d PERFORMANCE says why (another process, heat, a power limit, a part of a card)"
        return Check("matmul rate", False, detail, fix)
    return Check("matmul rate", True, detail)


def calibration() -> Check:
    """Check the rate that plans use for this machine, in the 16 bits of data sheets (on a CPU in fp32)."""
    machine = environment.probe()
    mode = Quantization.bf16 if machine.device.bf16 else Quantization.fp16
    if machine.device.kind == "cpu":
        mode = Quantization.fp32
    return calibration_against_datasheet(
        machine.device.kind, machine.device.name, mode, calibration_flops_per_second(machine, mode)
    )


def calibration_against_datasheet(kind: str, name: str | None, mode: Quantization, rate: float | None) -> Check:
    """Compare ``rate`` in FLOP/s of training with the card's data sheet; ``None`` before ``qlora-exp calibrate``."""
    if rate is None:
        detail = "none for this device and number of threads: plans have no seconds (run qlora-exp calibrate)"
        return Check("calibration", None, detail)
    detail = f"{rate / 1e12:.3g} TFLOP/s of training in {mode.value}"
    sheet = data_sheet_flops(name) if kind == "cuda" else None
    if sheet is None:
        whose = "CPUs" if kind == "cpu" else name
        return Check("calibration", None, f"{detail}; whether it agrees is unknown: no data sheet for {whose}")
    detail = f"{detail}, {rate / sheet:.0%} of the data sheet's {sheet / 1e12:.4g}"
    if MIN_CALIBRATED_SHARE <= rate / sheet <= MAX_SHARE:
        return Check("calibration", True, detail)
    return Check("calibration", False, detail, "qlora-exp calibrate, with nothing else on the card")


def measure_flops_per_second(kind: str) -> float:
    """Return the rate of square matrix products over a second, at 2 n³ operations a product."""
    import torch

    size = MEASURED_SIZES[kind]
    dtype = torch.float32
    if kind == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    left, right = (torch.randn(size, size, device=kind, dtype=dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    _wait(kind)
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        left @ right
        products += 1
        _wait(kind)
    return products * 2.0 * size**3 / (time.perf_counter() - started)


def _wait(kind: str) -> None:
    if kind == "cuda":
        import torch

        torch.cuda.synchronize()
