"""This machine's rates of training, measured once and kept in the user's cache: ``qlora-exp calibrate``."""

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
from qlora_exp.training.meter import card_of

MODES = tuple(mode for mode in Quantization if mode is not Quantization.fp4)
COUNTING = 2
"""How often what counts as an operation has changed, and one: rates that were counted otherwise are none."""
SECONDS_A_MODE = 2.0
"""Five modes make ten seconds."""


def rates_file() -> Path:
    """``qlora-exp/rates-COUNTING.json`` in XDG_CACHE_HOME, or in ~/.cache: machine → mode → operations a second."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "qlora-exp" / f"rates-{COUNTING}.json"


def known_rate(environment: Environment, quantization: Quantization) -> Rate | None:
    """The rate kept for this machine, device and number of threads; ``None`` before ``qlora-exp calibrate``."""
    found = kept_flops_per_second(environment, quantization)
    return rate_from_calibration(found, machine_of(environment), quantization.value) if found else None


def kept_flops_per_second(environment: Environment, quantization: Quantization) -> float | None:
    """As ``qlora-exp calibrate`` measured it on this machine, device and number of threads."""
    mode = "nf4" if quantization is Quantization.fp4 else quantization.value
    return _read().get(machine_of(environment), {}).get(mode)


def known_card_rate(card: str | None, quantization: Quantization) -> Rate | None:
    """The rate kept for a CUDA card by its name; without one, that of the only card that was calibrated here."""
    mode = "nf4" if quantization is Quantization.fp4 else quantization.value
    rates = {machine: found for machine, found in _read().items() if machine.startswith("cuda, ")}
    fitting = {
        machine: found
        for machine, found in rates.items()
        if card is None or card_of(machine.split(", ")[1]) == card_of(card)
    }
    if len(fitting) != 1:
        return None
    [(machine, found)] = fitting.items()
    return rate_from_calibration(found[mode], machine, quantization.value) if mode in found else None


def calibrate_device(environment: Environment, seconds_a_mode: float = SECONDS_A_MODE) -> Iterator[tuple[str, float]]:
    """Measure each mode and keep the rates; gives (mode, operations a second) as they come."""
    from qlora_exp.estimate.benchmark import measured_flops_per_second

    measured: dict[str, float] = {}
    for mode in MODES:
        measured[mode.value] = measured_flops_per_second(mode, environment.device.kind, seconds_a_mode)
        yield mode.value, measured[mode.value]
    write_json(rates_file(), {**_read(), machine_of(environment): measured})


def _read() -> Mapping[str, Mapping[str, float]]:
    """A cache that is missing or torn is empty."""
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
