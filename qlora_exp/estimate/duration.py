"""How long training takes, and what it costs: floating-point operations over the rate that this machine was seen at,
by :mod:`qlora_exp.estimate.benchmark` or by finished runs (:mod:`qlora_exp.estimate.throughput`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_exp.architecture.shapes import Architecture
from qlora_exp.config.schema import Config
from qlora_exp.estimate.flops import Workload, train_flops

CALIBRATED_SHARE = (0.31, 0.52, 0.92)
"""Of the calibration's rate, what a training reaches: low, middle, high. The calibration multiplies matrices; a step
also has element-wise work, an optimizer and the trainer's own. Fitted by tests/benchmarks/predicted_seconds.py to nine
trainings on one thread of a CPU (the 90 % interval for one more); assumed for more threads, and for cards."""


@dataclass(frozen=True)
class Interval:
    """``low`` ≤ ``middle`` ≤ ``high``, and how they were made."""

    low: float
    middle: float
    high: float
    basis: str

    def times(self, factor: float) -> Interval:
        return Interval(self.low * factor, self.middle * factor, self.high * factor, self.basis)

    def plus(self, other: Interval | None) -> Interval:
        """Ends added to ends, as if both were long or short together."""
        if other is None:
            return self
        basis = f"{self.basis}; {other.basis}"
        return Interval(self.low + other.low, self.middle + other.middle, self.high + other.high, basis)


@dataclass(frozen=True)
class Rate:
    """Floating-point operations a second that trainings reach on one machine in one quantization mode."""

    flops_per_second: Interval
    machine: str
    quantization: str


def predicted_seconds(
    architecture: Architecture,
    modules: Sequence[str],
    config: Config,
    device_kind: str,
    rate: Rate | None,
    extent: Workload,
) -> Interval | None:
    """Seconds of training ``config`` with adapters on ``modules`` (full names), without loading and evaluation;
    ``None`` where the machine's rate is unknown."""
    if rate is None:
        return None
    flops = train_flops(architecture, modules, config, device_kind, extent)
    speed = rate.flops_per_second
    return Interval(flops / speed.high, flops / speed.middle, flops / speed.low, speed.basis)


def predicted_usd(seconds: Interval | None, usd_per_hour: float | None) -> Interval | None:
    """``None`` where time or price is unknown."""
    return seconds.times(usd_per_hour / 3600.0) if seconds is not None and usd_per_hour is not None else None


def rate_from_calibration(flops_per_second: float, machine: str, quantization: str) -> Rate:
    """From the rate of bare matrix products, before any run has finished here."""
    low, middle, high = (share * flops_per_second for share in CALIBRATED_SHARE)
    basis = "a calibration of this machine: matrix products, and the share of their rate that trainings reach"
    return Rate(Interval(low, middle, high, basis), machine, quantization)


def lower_bound_seconds(calibrated: Interval | None) -> float | None:
    """The least that a training can take that the calibration alone tells ``calibrated`` seconds: nothing but matrix
    products."""
    return calibrated.low * CALIBRATED_SHARE[-1] if calibrated is not None else None
