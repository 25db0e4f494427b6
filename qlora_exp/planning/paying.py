"""Time and money of a plan: this machine's calibrated rate, and the table of prices."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qlora_exp.calibration import known_card_rate, known_rate
from qlora_exp.config import Config, Quantization
from qlora_exp.environment import available_cores, probe_without_torch
from qlora_exp.plan import Architecture
from qlora_exp.plan.prices import read_prices, usd_per_hour
from qlora_exp.plan.seconds import Rate, machine_of, predicted_seconds, predicted_usd, rate_from_records
from qlora_exp.planning.devices import PlanDevice
from qlora_exp.records import RunRecord


@dataclass(frozen=True)
class Payment:
    """Seconds and US dollars of training, each with its interval (low, high); ``None`` is unknown."""

    seconds: float | None
    seconds_interval: tuple[float, float] | None
    usd: float | None
    usd_interval: tuple[float, float] | None


class Cashier:
    """Looks at the machine, its rates and the prices once. ``records``: finished runs, whose rates go before the
    machine's calibration. ``hosts``: whether trial hosts will train, which share the cores.

    Raises:
        ConfigError: the table of prices can't be read.
    """

    def __init__(self, records: Sequence[RunRecord] = (), hosts: bool = False) -> None:
        self._records, self._hosts = records, hosts
        self._rates: dict[tuple[str, Quantization, int | None], Rate | None] = {}
        self._prices: Mapping[str, float] = read_prices()

    def payment(
        self,
        config: Config,
        device: PlanDevice,
        architecture: Architecture,
        modules: Sequence[str],
        length: float | None = None,
    ) -> Payment:
        """Training alone. ``length``: tokens of a mean row; unknown, every row counts as long as
        ``training.max_length``, an upper bound."""
        rate = self._rate(config, device)
        seconds = predicted_seconds(architecture, modules, config, device.kind, rate, length=length)
        hourly = config.budget.usd_per_hour
        if hourly is None:
            hourly = usd_per_hour(device.kind, device.card, self._prices)
        usd = predicted_usd(seconds, hourly)
        return Payment(
            seconds.middle if seconds else None,
            (seconds.low, seconds.high) if seconds else None,
            usd.middle if usd else None,
            (usd.low, usd.high) if usd else None,
        )

    def _rate(self, config: Config, device: PlanDevice) -> Rate | None:
        mode, threads = config.quantization.mode, _threads(config, self._hosts)
        key = (device.name, mode, threads)
        if key not in self._rates:
            on_cpu = device.kind == "cpu"
            self._rates[key] = self._cpu_rate(mode, threads) if on_cpu else known_card_rate(device.card, mode)
        return self._rates[key]

    def _cpu_rate(self, mode: Quantization, threads: int | None) -> Rate | None:
        """As a run with so many threads would find it."""
        here = replace(probe_without_torch(), torch_threads=threads)
        return rate_from_records(self._records, machine_of(here), mode.value) or known_rate(here, mode)


def _threads(config: Config, hosts: bool) -> int | None:
    """Of one run: trial hosts share the cores; alone, torch takes OMP_NUM_THREADS, or all of them."""
    cores = available_cores()
    if config.training.threads is not None:
        return config.training.threads
    if hosts:
        at_once = (config.workers.count if config.workers is not None else None) or 1
        return max(1, (cores or 1) // at_once)
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(told) if told.isdecimal() and int(told) > 0 else cores
