"""Figures of a run while it goes on: memory, speed and spent budget, for its record."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qlora_exp.config.schema import BudgetConfig
from qlora_exp.estimate.budget import RECORD_SECONDS, exhausted, spent_before
from qlora_exp.evaluation.base_scores import BaseScores
from qlora_exp.evaluation.shared_scores import Wait
from qlora_exp.models.weight_bytes import WeightBytes
from qlora_exp.paths import RunPaths
from qlora_exp.records.files import write_json
from qlora_exp.records.types import Memory, RunRecord, Speed, Spent
from qlora_exp.training import meter as measurement
from qlora_exp.training.outcome import Observer
from qlora_exp.training.trainer import Trained, TrainingState


@dataclass
class RunFigures:
    """All figures known so far, so that the record has them however the run ends."""

    record: RunRecord
    paths: RunPaths
    meter: measurement.Meter
    earlier_seconds: float
    """Seconds of a resumed run's earlier parts."""
    useful_flops_per_token: float | None = None
    """Operations that the model needs for one unpadded token, without padding and recomputation."""
    phase: str = "prepare"
    weights: WeightBytes | None = None
    resident_bytes: int | None = None
    watch: TrainingState | None = None
    trained: Trained | None = None
    base_scores: BaseScores | None = None
    wait: Wait = field(default_factory=Wait)
    """For another run that scores the same base model."""
    baseline_wait: Wait = field(default_factory=Wait)
    """For another run that computes the same baselines, which isn't part of a phase."""
    outside_allocator_bytes: int | None = None
    started: float = field(default_factory=time.perf_counter)
    earlier: Spent = field(init=False)
    started_joules: float | None = field(init=False)
    written: float = 0.0

    def __post_init__(self) -> None:
        self.earlier = spent_before(self.record)
        self.started_joules = measurement.energy_joules(self.meter.device)

    def enter(self, phase: str, observer: Observer) -> None:
        """Begin a phase, and write all known figures: even a killed run's record then has them."""
        self.phase = phase
        write_json(self.paths.record, self.known(), durable=False)
        observer.phase(phase)

    def watching(self, watch: TrainingState) -> None:
        self.watch = watch

    @contextlib.contextmanager
    def not_measured(self) -> Iterator[None]:
        """What happens inside costs the run no seconds and no energy in its record."""
        clock, joules = time.perf_counter(), measurement.energy_joules(self.meter.device)
        try:
            yield
        finally:
            self.started += time.perf_counter() - clock
            now = measurement.energy_joules(self.meter.device)
            if self.started_joules is not None and joules is not None and now is not None:
                self.started_joules += now - joules

    def exhausted(self, budget: BudgetConfig) -> str | None:
        """Return the limit of ``budget`` that is spent, e.g. ``seconds``; ``None``: none.

        Also writes the record every :data:`RECORD_SECONDS` seconds, in case the run is killed.
        """
        clock = time.perf_counter()
        if clock - self.written > RECORD_SECONDS:
            self.written = clock
            with contextlib.suppress(OSError):  # a full disk; the next write has the same figures
                write_json(self.paths.record, self.known(), durable=False)
        return exhausted(budget, self.spent(energy=budget.kwh is not None))

    def spent(self, energy: bool = True) -> Spent:
        """Return what this run has spent up to now, earlier parts of a resumed run included. Without ``energy``, the
        GPU's counter isn't read: that takes too long for each step."""
        joules, tokens = measurement.energy_joules(self.meter.device) if energy else None, 0
        if self.watch is not None:
            tokens = self.watch.meter.tokens - self.watch.meter.earlier_tokens
        if joules is not None and self.started_joules is not None:
            joules += (self.earlier.joules or 0.0) - self.started_joules
        seconds = self.earlier.seconds + time.perf_counter() - self.started
        return Spent(seconds, self.earlier.tokens + tokens, joules)

    def known(self) -> RunRecord:
        """Return the record with all figures measured so far."""
        trained = self.trained or (self.watch.so_far() if self.watch else None)
        return self.record.replace(
            memory=_memory(self, trained),
            speed=_speed(self, trained),
            spent=self.spent(),
            training=trained.training if trained else None,
        )


def _memory(progress: RunFigures, trained: Trained | None) -> Memory:
    meter, weights = progress.meter, progress.weights
    return Memory(
        base_weight_bytes=weights.base_weight_bytes if weights else None,
        quantization_state_bytes=weights.quantization_state_bytes if weights else None,
        adapter_bytes=weights.adapter_bytes if weights else None,
        gradient_bytes=trained.gradient_bytes if trained else None,
        optimizer_bytes=trained.optimizer_bytes if trained else None,
        saved_bytes=_saved_bytes(progress.paths.weights) if progress.trained else None,
        resident_after_imports_bytes=progress.resident_bytes,
        peak_load_bytes=meter.of("load").peak_bytes,
        peak_train_bytes=meter.of("train").peak_bytes,
        peak_evaluation_bytes=meter.of("evaluate").peak_bytes,
        peak_train_reserved_bytes=meter.of("train").reserved_bytes,
        train_working_set_bytes=_working_set(progress),
        checkpoint_bytes=trained.checkpoint_bytes if trained else None,
        outside_allocator_bytes=progress.outside_allocator_bytes,
        process_reused=meter.process_reused,
        source=meter.source,
    )


def _saved_bytes(folder: Path) -> int | None:
    """Return the size of the safetensors files in ``folder``; ``None`` if there is none."""
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    return sum(sizes) if sizes else None


def _working_set(progress: RunFigures) -> int | None:
    """Return the bytes that training needed at its peak, base model included.

    On CUDA, states of a paged optimizer are added: torch's allocator doesn't know of them. On a CPU this excludes what
    the process held before training for scoring or MLflow.
    """
    train, weights = progress.meter.of("train"), progress.weights
    if progress.meter.device == "cuda":
        paged_bytes = progress.watch.meter.paged_bytes if progress.watch is not None else 0
        return train.peak_bytes + paged_bytes if train.peak_bytes is not None else None
    if train.anonymous_peak_bytes is None or weights is None:
        return None
    weight_bytes = weights.base_weight_bytes + weights.quantization_state_bytes + weights.adapter_bytes
    return weight_bytes + train.anonymous_peak_bytes


def _speed(progress: RunFigures, trained: Trained | None) -> Speed:
    record, meter, base_scores = progress.record, progress.meter, progress.base_scores
    total = progress.earlier_seconds + time.perf_counter() - progress.started
    in_base_phase, waited = meter.of("base").seconds, progress.wait.seconds
    price = record.plan.usd_per_hour if record.plan is not None else None
    speed = Speed(
        load_seconds=meter.of("load").seconds,
        evaluation_seconds=meter.of("evaluate").seconds,
        base_evaluation_seconds=None if in_base_phase is None else max(in_base_phase - waited, 0.0),
        base_scores_cached=base_scores.cached if base_scores else False,
        waiting_seconds=waited + progress.baseline_wait.seconds,
        total_seconds=total,
        cost_usd=total / 3600.0 * price if price is not None else None,
    )
    if trained is None:
        return speed
    counted = sum(trained.counted_seconds)
    rate = trained.counted_tokens / counted if counted > 0 else None
    ordered = sorted(trained.counted_seconds)
    return replace(
        speed,
        train_seconds=trained.seconds,
        steps=trained.training.steps,
        excluded_steps=trained.excluded_steps,
        train_tokens=trained.tokens,
        loss_tokens=trained.loss_tokens,
        train_tokens_per_second=rate,
        step_seconds_p50=_quantile(ordered, 0.5),
        step_seconds_p95=_quantile(ordered, 0.95),
        model_flops_utilisation=_utilisation(progress, rate),
        energy_joules=meter.of("train").energy_joules,
    )


def _utilisation(progress: RunFigures, tokens_per_second: float | None) -> float | None:
    flops = progress.useful_flops_per_token
    if tokens_per_second is None or flops is None or progress.meter.device != "cuda":
        return None
    return measurement.model_flops_utilisation(progress.record.environment.device.name, flops, tokens_per_second)


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    """Return the nearest-rank quantile of sorted values; ``None`` without values."""
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]
