"""Time and money of a plan: this machine's calibrated rate, and the table of prices."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_exp.architecture.shapes import Architecture
from qlora_exp.config.schema import Config, Isolation, to_plain
from qlora_exp.estimate.affordable_steps import StepCost
from qlora_exp.estimate.calibration import known_card_rate, known_rate
from qlora_exp.estimate.device import PlanDevice
from qlora_exp.estimate.duration import Interval, Rate, lower_bound_seconds, predicted_seconds, predicted_usd
from qlora_exp.estimate.flops import Workload
from qlora_exp.estimate.throughput import MeasuredThroughput, from_finished_runs
from qlora_exp.estimate.tokens import PlannedRows
from qlora_exp.records.redaction import redact
from qlora_exp.records.types import Environment, RunRecord
from qlora_exp.system.environment import available_cores, probe_without_torch
from qlora_exp.system.hardware import read_prices, usd_per_hour
from qlora_exp.training.meter import card_of


@dataclass(frozen=True)
class CostEstimate:
    """Steps, tokens and seconds of training; other seconds, of loading and scoring; US dollars of both, of training
    alone where the others aren't known. Times and dollars with their intervals (low, high); ``None`` is unknown."""

    steps: int | None
    tokens: int | None
    seconds: float | None
    seconds_interval: tuple[float, float] | None
    other_seconds: float | None
    other_seconds_interval: tuple[float, float] | None
    usd: float | None
    usd_interval: tuple[float, float] | None


UNKNOWN_COST = CostEstimate(None, None, None, None, None, None, None, None)


class CostEstimator:
    """Looks at the machine, its rates and the prices once. ``records``: ended runs, the newest first; those of
    the same base go before the machine's calibration. ``hosts``: whether trial hosts will train, which share the cores.

    Raises:
        ConfigError: the table of prices can't be read.
    """

    def __init__(self, records: Sequence[RunRecord] = (), hosts: bool = False) -> None:
        self._records, self._hosts = records, hosts
        self._known: dict[tuple[Any, ...], tuple[MeasuredThroughput, Rate | None]] = {}
        self._prices: Mapping[str, float] = read_prices()

    def payment(
        self,
        config: Config,
        device: PlanDevice,
        architecture: Architecture,
        modules: Sequence[str],
        rows: PlannedRows | None = None,
    ) -> tuple[CostEstimate, StepCost]:
        """What ``config`` takes, and at what pace. ``rows``: the task's; unknown, every one counts as long as
        ``training.max_length``, an upper bound (and as the shortest, one of a single token)."""
        extent = Workload.of(config.training, rows.lengths if rows else None)
        seen, calibrated = self._seen(config, device, extent.steps)

        def by(rate: Rate | None) -> Interval | None:
            return predicted_seconds(architecture, modules, config, device.kind, rate, extent)

        seconds = by(seen.rate or calibrated)
        least = lower_bound_seconds(by(calibrated))
        hourly = config.budget.usd_per_hour
        if hourly is None:
            hourly = usd_per_hour(device.kind, device.card, self._prices)
        usd = predicted_usd(seconds.plus(seen.other) if seconds else None, hourly)
        paid = CostEstimate(extent.steps, extent.tokens, *_told(seconds), *_told(seen.other), *_told(usd))
        shortest = float(rows.lengths.shortest_tokens) if rows else 1.0
        return paid, StepCost(extent, shortest, seconds, least, seen.before)

    def _seen(self, config: Config, device: PlanDevice, steps: int) -> tuple[MeasuredThroughput, Rate | None]:
        """What ended runs say, and the machine's calibration."""
        threads = _threads(config, self._hosts)
        sections = (config.model, config.quantization.mode, config.task, config.evaluation)
        key = (device.name, threads, steps, repr(sections))
        if key not in self._known:
            if device.kind == "cpu":
                here = replace(probe_without_torch(), torch_threads=threads)  # as a run with so many would find it
                seen, calibrated = self._of(config, here, steps), known_rate(here, config.quantization.mode)
            else:
                seen = self._of(config, self._where(device.card), steps)
                calibrated = known_card_rate(device.card, config.quantization.mode)
            self._known[key] = seen, calibrated
        return self._known[key]

    def _of(self, config: Config, there: Environment | None, steps: int) -> MeasuredThroughput:
        if there is None:
            return MeasuredThroughput(None, None, None)
        warm = self._hosts and config.workers is not None and config.workers.isolation is Isolation.warm
        return from_finished_runs(self._records, there, redact(to_plain(config)), steps, warm)

    def _where(self, card: str | None) -> Environment | None:
        """Where the last run on such a card was made."""
        cards = (one.environment for one in self._records if one.environment.device.kind == "cuda")
        return next((one for one in cards if card is None or card_of(one.device.name or "") == card_of(card)), None)


def _told(interval: Interval | None) -> tuple[float | None, tuple[float, float] | None]:
    return (None, None) if interval is None else (interval.middle, (interval.low, interval.high))


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
