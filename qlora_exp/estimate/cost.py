"""Time and money of a plan, from finished runs, this machine's calibration and the price table."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_exp.architecture.shapes import Architecture
from qlora_exp.config.schema import Config, Isolation, to_plain
from qlora_exp.estimate.affordable_steps import StepCost
from qlora_exp.estimate.calibration import calibrated_card_rate, calibrated_rate
from qlora_exp.estimate.device import PlanDevice
from qlora_exp.estimate.duration import Interval, Rate, lower_bound_seconds, predicted_seconds, predicted_usd
from qlora_exp.estimate.flops import Workload
from qlora_exp.estimate.throughput import MeasuredThroughput, from_finished_runs
from qlora_exp.estimate.tokens import PlannedRows
from qlora_exp.records.redaction import redact
from qlora_exp.records.types import Environment, RunRecord
from qlora_exp.system.environment import available_cores, probe_without_torch
from qlora_exp.system.hardware import card_of, read_prices, usd_per_hour


@dataclass(frozen=True)
class CostEstimate:
    """Steps, tokens and seconds of training, other seconds (loading and scoring), and US dollars.

    Dollars are of training, loading and scoring; of training alone if the others are unknown. Intervals are (low,
    high); ``None`` is unknown.
    """

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
    """Estimates time and money. It reads the machine, its rates and the prices once.

    ``records``: ended runs, the newest first; those of the same base take precedence over the machine's calibration.
    ``hosts``: trial hosts will train, and share the cores.

    Raises:
        ConfigError: the price table can't be read.
    """

    def __init__(self, records: Sequence[RunRecord] = (), hosts: bool = False) -> None:
        self._records, self._hosts = records, hosts
        self._known: dict[tuple[Any, ...], tuple[MeasuredThroughput, Rate | None]] = {}
        self._prices: Mapping[str, float] = read_prices()

    def estimate_cost(
        self,
        config: Config,
        device: PlanDevice,
        architecture: Architecture,
        modules: Sequence[str],
        rows: PlannedRows | None = None,
    ) -> tuple[CostEstimate, StepCost]:
        """Return the cost of ``config``, and the cost of its steps.

        ``rows``: the task's row lengths. If they are unknown, each row counts as ``training.max_length`` tokens (an
        upper bound), and the shortest as one token.
        """
        extent = Workload.of(config.training, rows.lengths if rows else None)
        throughput, calibrated = self._seen(config, device, extent.steps)

        def seconds_at(rate: Rate | None) -> Interval | None:
            return predicted_seconds(architecture, modules, config, device.kind, rate, extent)

        seconds = seconds_at(throughput.rate or calibrated)
        lower_bound = lower_bound_seconds(seconds_at(calibrated))
        price = config.budget.usd_per_hour
        if price is None:
            price = usd_per_hour(device.kind, device.card, self._prices)
        usd = predicted_usd(seconds.plus(throughput.other) if seconds else None, price)
        cost = CostEstimate(
            extent.steps,
            extent.tokens,
            *_middle_and_interval(seconds),
            *_middle_and_interval(throughput.other),
            *_middle_and_interval(usd),
        )
        shortest = float(rows.lengths.shortest_tokens) if rows else 1.0
        return cost, StepCost(extent, shortest, seconds, lower_bound, throughput.before)

    def _seen(self, config: Config, device: PlanDevice, steps: int) -> tuple[MeasuredThroughput, Rate | None]:
        """Return what ended runs say, and the machine's calibration."""
        threads = _threads(config, self._hosts)
        sections = (config.model, config.quantization.mode, config.task, config.evaluation)
        key = (device.name, threads, steps, repr(sections))
        if key not in self._known:
            if device.kind == "cpu":
                env = replace(probe_without_torch(), torch_threads=threads)  # as in a run with so many threads
                throughput, calibrated = self._of(config, env, steps), calibrated_rate(env, config.quantization.mode)
            else:
                throughput = self._of(config, self._where(device.card), steps)
                calibrated = calibrated_card_rate(device.card, config.quantization.mode)
            self._known[key] = throughput, calibrated
        return self._known[key]

    def _of(self, config: Config, environment: Environment | None, steps: int) -> MeasuredThroughput:
        if environment is None:
            return MeasuredThroughput(None, None, None)
        warm = self._hosts and config.workers is not None and config.workers.isolation is Isolation.warm
        return from_finished_runs(self._records, environment, redact(to_plain(config)), steps, warm)

    def _where(self, card: str | None) -> Environment | None:
        """Return the environment of the last run on such a card, or ``None``."""
        environments = (record.environment for record in self._records if record.environment.device.kind == "cuda")
        return next(
            (env for env in environments if card is None or card_of(env.device.name or "") == card_of(card)), None
        )


def _middle_and_interval(interval: Interval | None) -> tuple[float | None, tuple[float, float] | None]:
    return (None, None) if interval is None else (interval.middle, (interval.low, interval.high))


def _threads(config: Config, hosts: bool) -> int | None:
    """Return the threads of one run. Trial hosts share the cores; a single run takes OMP_NUM_THREADS, or all cores."""
    cores = available_cores()
    if config.training.threads is not None:
        return config.training.threads
    if hosts:
        at_once = (config.workers.count if config.workers is not None else None) or 1
        return max(1, (cores or 1) // at_once)
    omp_threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(omp_threads) if omp_threads.isdecimal() and int(omp_threads) > 0 else cores
