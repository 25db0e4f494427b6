"""This machine's training rates, measured once by ``qlora-exp calibrate`` and kept in the user's cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from qlora_exp.config.allowed_values import INTEGER_MODES
from qlora_exp.config.enums import Quantization
from qlora_exp.estimate.throughput import Interval, machine_of
from qlora_exp.paths import user_cache
from qlora_exp.records.files import write_json
from qlora_exp.records.types import Environment
from qlora_exp.system.cards import card_of

MODES = tuple(mode for mode in Quantization if mode is not Quantization.fp4 and mode not in INTEGER_MODES)
COUNT_VERSION = 2
"""Version of the operation count. Rates of another version aren't read."""
SECONDS_PER_MODE = 2.0
"""Five modes take ten seconds."""
CALIBRATED_SHARE = (0.31, 0.52, 0.92)
"""The share of the calibrated rate that a training reaches: low, middle, high.

The calibration multiplies matrices. A training step also has element-wise work, an optimizer and the trainer's
overhead. Fitted by tests/benchmarks/predicted_seconds.py to nine trainings on one CPU thread (90 % interval for one
more); assumed for more threads and for GPUs.
"""


def rates_file() -> Path:
    """Return ``rates-COUNTING.json`` in the user's cache: machine → mode → operations per second."""
    return user_cache() / f"rates-{COUNT_VERSION}.json"


def calibrated_rate(environment: Environment, quantization: Quantization) -> Interval | None:
    """Return the rate kept for this machine, device and number of threads; ``None`` before ``qlora-exp calibrate``."""
    flops = calibration_flops_per_second(environment, quantization)
    return rate_from_calibration(flops) if flops else None


def calibration_flops_per_second(environment: Environment, quantization: Quantization) -> float | None:
    """Return what ``qlora-exp calibrate`` measured on this machine, device and number of threads, or ``None``."""
    return _read().get(machine_of(environment), {}).get(_measured_mode(quantization))


def calibrated_card_rate(card: str | None, quantization: Quantization) -> Interval | None:
    """Return the rate kept for a CUDA card by its name; without a name, that of the only card calibrated here."""
    matches = [
        rate_by_mode
        for machine, rate_by_mode in _read().items()
        if machine.startswith("cuda, ") and (card is None or card_of(machine.split(", ")[1]) == card_of(card))
    ]
    flops = matches[0].get(_measured_mode(quantization)) if len(matches) == 1 else None
    return rate_from_calibration(flops) if flops is not None else None


def rate_from_calibration(flops_per_second: float) -> Interval:
    """Return the expected training rate from the rate of plain matrix products, before any run has finished here."""
    low, middle, high = (share * flops_per_second for share in CALIBRATED_SHARE)
    basis = "a calibration of this machine: the rate of matrix products, times the share that trainings reach"
    return Interval(low, middle, high, basis)


def lower_bound_seconds(calibrated: Interval | None) -> float | None:
    """Return a lower bound on training time for a run whose calibrated estimate is ``calibrated``: nothing but matrix
    products."""
    return calibrated.low * CALIBRATED_SHARE[-1] if calibrated is not None else None


def calibrate_device(environment: Environment) -> Iterator[tuple[str, float]]:
    """Measure each mode, yield (mode, operations per second), and keep the rates after the last one."""
    from qlora_exp.estimate.benchmark import measured_flops_per_second

    measured: dict[str, float] = {}
    for mode in MODES:
        measured[mode.value] = measured_flops_per_second(mode, environment.device.kind, SECONDS_PER_MODE)
        yield mode.value, measured[mode.value]
    write_json(rates_file(), {**_read(), machine_of(environment): measured})


def _measured_mode(quantization: Quantization) -> str:
    """fp4 isn't measured: it is as fast as nf4. Our integers are dequantized by torch: taken as nf4, too."""
    return "nf4" if quantization is Quantization.fp4 or quantization in INTEGER_MODES else quantization.value


def _read() -> Mapping[str, Mapping[str, float]]:
    """Return the cached rates. A cache that is missing or damaged counts as empty."""
    try:
        raw = json.loads(rates_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(raw, dict):
        return {}
    return {
        str(machine): {str(mode): float(rate) for mode, rate in rates.items() if isinstance(rate, int | float)}
        for machine, rates in raw.items()
        if isinstance(rates, dict)
    }
