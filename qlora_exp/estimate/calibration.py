"""This machine's training rates, measured once by ``qlora-exp calibrate`` and kept in the user's cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from qlora_exp.config.schema import Quantization
from qlora_exp.estimate.duration import Rate, rate_from_calibration
from qlora_exp.estimate.throughput import machine_of
from qlora_exp.records.files import write_json
from qlora_exp.records.types import Environment
from qlora_exp.system.hardware import card_of

MODES = tuple(mode for mode in Quantization if mode is not Quantization.fp4)
COUNT_VERSION = 2
"""Version of the operation count. Rates of another version aren't read."""
SECONDS_PER_MODE = 2.0
"""Five modes take ten seconds."""


def rates_file() -> Path:
    """Return ``qlora-exp/rates-COUNTING.json`` in XDG_CACHE_HOME or ~/.cache: machine → mode → operations per
    second."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "qlora-exp" / f"rates-{COUNT_VERSION}.json"


def calibrated_rate(environment: Environment, quantization: Quantization) -> Rate | None:
    """Return the rate kept for this machine, device and number of threads; ``None`` before ``qlora-exp calibrate``."""
    flops = calibration_flops_per_second(environment, quantization)
    return rate_from_calibration(flops, machine_of(environment), quantization.value) if flops else None


def calibration_flops_per_second(environment: Environment, quantization: Quantization) -> float | None:
    """Return what ``qlora-exp calibrate`` measured on this machine, device and number of threads, or ``None``."""
    mode = "nf4" if quantization is Quantization.fp4 else quantization.value
    return _read().get(machine_of(environment), {}).get(mode)


def calibrated_card_rate(card: str | None, quantization: Quantization) -> Rate | None:
    """Return the rate kept for a CUDA card by its name; without a name, that of the only card calibrated here."""
    mode = "nf4" if quantization is Quantization.fp4 else quantization.value
    rates = {machine: rate_by_mode for machine, rate_by_mode in _read().items() if machine.startswith("cuda, ")}
    matches = {
        machine: rate_by_mode
        for machine, rate_by_mode in rates.items()
        if card is None or card_of(machine.split(", ")[1]) == card_of(card)
    }
    if len(matches) != 1:
        return None
    [(machine, rate_by_mode)] = matches.items()
    return rate_from_calibration(rate_by_mode[mode], machine, quantization.value) if mode in rate_by_mode else None


def calibrate_device(environment: Environment, seconds_a_mode: float = SECONDS_PER_MODE) -> Iterator[tuple[str, float]]:
    """Measure each mode, yield (mode, operations per second), and keep the rates after the last one."""
    from qlora_exp.estimate.benchmark import measured_flops_per_second

    measured: dict[str, float] = {}
    for mode in MODES:
        measured[mode.value] = measured_flops_per_second(mode, environment.device.kind, seconds_a_mode)
        yield mode.value, measured[mode.value]
    write_json(rates_file(), {**_read(), machine_of(environment): measured})


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
