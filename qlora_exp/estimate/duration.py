"""Training time and cost: floating-point operations divided by a measured rate.

The rate comes from :mod:`qlora_exp.estimate.benchmark` or from finished runs (:mod:`qlora_exp.estimate.throughput`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_exp.architecture.shapes import Architecture
from qlora_exp.config.schema import Config
from qlora_exp.estimate.flops import Workload, train_flops

CALIBRATED_SHARE = (0.31, 0.52, 0.92)
"""The share of the calibrated rate that a training reaches: low, middle, high.

The calibration multiplies matrices. A training step also has element-wise work, an optimizer and the trainer's
overhead. Fitted by tests/benchmarks/predicted_seconds.py to nine trainings on one CPU thread (90 % interval for one
more); assumed for more threads and for GPUs.
"""


@dataclass(frozen=True)
class Interval:
    """``low`` ≤ ``middle`` ≤ ``high``, and what they are based on."""

    low: float
    middle: float
    high: float
    basis: str

    def times(self, factor: float) -> Interval:
        return Interval(self.low * factor, self.middle * factor, self.high * factor, self.basis)

    def plus(self, other: Interval | None) -> Interval:
        """Add low to low and high to high, as if both were short or long together."""
        if other is None:
            return self
        basis = f"{self.basis}; {other.basis}"
        return Interval(self.low + other.low, self.middle + other.middle, self.high + other.high, basis)


@dataclass(frozen=True)
class Rate:
    """Floating-point operations per second that trainings reach on one machine in one quantization mode."""

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
    """Return the seconds of training ``config`` with adapters on ``modules`` (full names), without loading and
    evaluation; ``None`` if the machine's rate is unknown."""
    if rate is None:
        return None
    flops = train_flops(architecture, modules, config, device_kind, extent)
    speed = rate.flops_per_second
    return Interval(flops / speed.high, flops / speed.middle, flops / speed.low, speed.basis)


def predicted_usd(seconds: Interval | None, usd_per_hour: float | None) -> Interval | None:
    """Return US dollars; ``None`` if time or price is unknown."""
    return seconds.times(usd_per_hour / 3600.0) if seconds is not None and usd_per_hour is not None else None


def rate_from_calibration(flops_per_second: float, machine: str, quantization: str) -> Rate:
    """Return the expected training rate from the rate of plain matrix products, before any run has finished here."""
    low, middle, high = (share * flops_per_second for share in CALIBRATED_SHARE)
    basis = "a calibration of this machine: the rate of matrix products, times the share that trainings reach"
    return Rate(Interval(low, middle, high, basis), machine, quantization)


def lower_bound_seconds(calibrated: Interval | None) -> float | None:
    """Return a lower bound on training time for a run whose calibrated estimate is ``calibrated``: nothing but matrix
    products."""
    return calibrated.low * CALIBRATED_SHARE[-1] if calibrated is not None else None
