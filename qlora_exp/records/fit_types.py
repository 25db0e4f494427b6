"""A run's predicted memory against its limit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """A run's predicted memory and its memory limit, in bytes."""

    peak_bytes: int
    """Predicted peak of training, without correction."""
    context_bytes: int
    """Additional memory on the device: ``plan.predicted_context_bytes``."""
    corrected_bytes: int
    """Peak plus context, with the peak multiplied by measured / predicted peak of similar runs."""
    limit_bytes: int
    """The memory limit."""
    error: float
    """Relative prediction error: a trial may start up to (1 + error) × the limit."""
    similar_runs: int
    """Number of measured peaks in the correction."""
    would_fit: str | None = None
    """Settings that are predicted to fit, if the run is near the limit or above it."""

    @property
    def excess(self) -> float:
        """Relative excess over the limit; negative below it."""
        return self.corrected_bytes / self.limit_bytes - 1.0

    @property
    def borderline(self) -> bool:
        return abs(self.excess) <= self.error


@dataclass(frozen=True)
class SkippedTrial:
    """Predictions of a trial that was skipped because it was predicted not to fit."""

    fit: Fit
    train_seconds: float | None
    """Predicted seconds of training; ``None`` if the machine's speed is unknown."""
    train_flops: float | None
    """FLOPs of training."""
