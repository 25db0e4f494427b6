"""Which pilots are stopped early, and when two of them differ beyond noise.

A pilot is stopped if its training loss is clearly behind the best one's of its rank and seed at one step.

A ladder's pilots share seed, data and schedule, and differ in their learning rate only. So at equal steps they have
seen the same batches, and a difference of their training losses is paired. ALTO (Zuo et al. 2026, arXiv 2604.05426)
stops trainings that are behind by their loss curves; docs/statistics.md has this rule's savings and errors.

There is one step of comparison, not several: who is behind then follows from the losses at that step alone, in any
order in which the pilots run, one after the other or at the same time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

SHARE_OF_STEPS = 0.5
"""The comparison comes after this share of a pilot's steps. If its first epoch has ended by then, there is none: a
later training loss is one of rows seen before, and an earlier comparison is wrong too often (docs/statistics.md)."""
SHARE_OF_WINDOW = 0.5
"""The losses of this last part of the steps so far are averaged: single batches vary too much."""
MAX_BEHIND = 0.05
"""A pilot is behind if its loss is above the best one by more than this share of the best one."""
WRONG_DEPARTURE = 0.05
"""One-sided error rate of "another rate is better than the carried one"."""


def comparison_step(max_steps: int, steps_per_epoch: int | None, share: float = SHARE_OF_STEPS) -> int:
    """Return the step at which pilots are compared; ``max_steps``, after which nothing is left to save: they aren't.

    ``steps_per_epoch``: ``None`` if unknown.
    """
    step = max(1, math.ceil(max_steps * share))
    return step if steps_per_epoch is None or step <= steps_per_epoch else max_steps


def comparison_loss(curve: Mapping[int, float], step: int) -> float | None:
    """Return the mean of the losses logged in the last part of the first ``step`` steps.

    Args:
        curve: step → training loss, each the mean since the last logged step; ``training.logging_steps`` apart.

    Returns:
        ``None`` if nothing was logged in that part: pilots are then not compared.
    """
    window = [loss for at, loss in sorted(curve.items()) if step * (1 - SHARE_OF_WINDOW) < at <= step]
    mean = math.fsum(window) / len(window) if window else math.nan
    return mean if math.isfinite(mean) else None


def is_behind(loss: float, losses: Sequence[float], max_behind: float = MAX_BEHIND) -> bool:
    """Return whether ``loss`` is clearly above the lowest of ``losses``, all of them at the step of comparison."""
    best = min(losses, default=math.inf)
    return loss > best * (1 + max_behind)


def is_better_beyond_noise(losses: Sequence[float], others: Sequence[float]) -> bool:
    """Return whether ``losses`` are lower than ``others``, pilots with the same seeds in the same order, beyond noise.

    Every seed has to agree, and a one-sided paired t test has to reject "no better" at :data:`WRONG_DEPARTURE`. A
    single seed shows no noise, and so never rejects.
    """
    from scipy import special  # here, because trial processes load this module for its other functions alone

    gains = [other - loss for loss, other in zip(losses, others, strict=True)]
    if len(gains) < 2 or min(gains) <= 0:
        return False
    se = statistics.stdev(gains) / math.sqrt(len(gains))
    return statistics.fmean(gains) > -float(special.stdtrit(len(gains) - 1, WRONG_DEPARTURE)) * se
