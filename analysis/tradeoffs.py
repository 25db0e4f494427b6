"""What does quality cost in memory and speed? Pareto fronts, and contrasts of target modules."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from qlora_exp.analysis.comparable import answering_scores
from qlora_exp.analysis.configurations import Configuration, Estimate, Measure, mean, mode_of, targets_of
from qlora_exp.records.types import RunRecord

PRECISION_ORDER = ("fp32", "bf16", "fp16", "int8", "nf4", "fp4")
"""Most bits first."""
MIN_MODES = 2
EQUAL_PARAMETERS = 0.10
"""Two target sets count as equally large if their parameters differ by at most this share."""


class ParetoStatus(StrEnum):
    FRONT = "on the front"
    NEAR = "within noise of the front"
    DOMINATED = "dominated"


@dataclass(frozen=True)
class Front:
    """``configurations``: those whose quality, memory and speed are known; ``statuses``: one for each. ``why_none``:
    reason why there is no front; ``statuses`` is then empty."""

    configurations: tuple[Configuration, ...]
    statuses: tuple[ParetoStatus, ...]
    why_none: str | None = None


@dataclass(frozen=True)
class QuantizationContrast:
    """``level`` against ``reference`` over otherwise equal runs. ``gain``: how much better, in the score's units.
    Ratios are level / reference."""

    level: str
    reference: str
    gain: Estimate
    memory_ratio: float | None
    speed_ratio: float | None
    parameters_ratio: float | None


def front(configurations: Sequence[Configuration], measure: Measure) -> Front:
    """Return the Pareto front of quality, memory and speed.

    A configuration off the front is *within noise of the front* if none that is at least as small and fast is shown to
    have a better quality (95 %, over seeds). There is no front with fewer than two measured quantizations.
    """
    known = [c for c in configurations if None not in (c.quality, c.memory_bytes, c.tokens_per_second)]
    modes = sorted({mode_of(c.first) for c in known})
    if len(modes) < MIN_MODES:
        measured = f"only {modes[0]} was" if modes else "none was"
        why = f"A Pareto front needs at least two measured quantizations, and here {measured}: qlora-exp sweep pareto"
        return Front(tuple(known), (), why)
    points = np.array(
        [[-measure.sign * c.quality.mean, c.memory_bytes, -c.tokens_per_second] for c in known]  # type: ignore[union-attr,operator]
    )
    halves = [c.quality.half_width() if c.quality is not None else None for c in known]
    # Without a second seed the noise is unknown: then every configuration off the front is dominated.
    half_widths = None if None in halves else np.array(halves, dtype=float)
    on_front = _non_dominated(points)
    rivals = np.flatnonzero(on_front)
    statuses = []
    for index in range(len(known)):
        status = ParetoStatus.FRONT if on_front[index] else ParetoStatus.DOMINATED
        if not on_front[index] and half_widths is not None:
            cheaper = rivals[(points[rivals, 1:] <= points[index, 1:]).all(axis=1)]
            ahead = points[index, 0] - points[cheaper, 0]
            if not np.any(ahead > np.hypot(half_widths[index], half_widths[cheaper])):
                status = ParetoStatus.NEAR
        statuses.append(status)
    return Front(tuple(known), tuple(statuses))


def targets_at_equal_parameters(
    configurations: Sequence[Configuration], measure: Measure
) -> list[QuantizationContrast]:
    """Compare target sets at equally many trainable parameters (within 10 %), so at different ranks."""
    order = list(_parameters_per_rank(configurations))
    excluded = ("targets.", "lora.r", "lora.alpha")
    adapted = [c for c in configurations if c.rank]
    return _contrasts(adapted, measure, order, targets_of, excluded, at_equal_size=True)


def equal_parameters_hint(configurations: Sequence[Configuration]) -> str | None:
    """Return which ranks would make the target sets equally large; ``None`` if only one set was run."""
    per_rank = _parameters_per_rank(configurations)
    if len(per_rank) < 2:
        return None
    largest, *others = per_rank
    rank = max(c.rank for c in configurations if targets_of(c.first) == largest)
    as_large = [f"{name} at r = {round(rank * per_rank[largest] / per_rank[name])}" for name in others]
    return (
        f"No two target sets were run with equally many parameters: {', '.join(as_large)} would have as many as"
        f" {largest} at r = {rank}."
    )


def _non_dominated(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which rows no other row dominates: equal or lower in every column, and lower in at least one."""
    on_front = np.zeros(len(points), dtype=bool)
    members: list[int] = []
    # In lexicographic order no later row can dominate an earlier one.
    for index in np.lexsort(points.T[::-1]):
        rivals = points[members]
        beaten = (rivals <= points[index]).all(axis=1) & (rivals < points[index]).any(axis=1)
        if not beaten.any():
            on_front[index] = True
            members.append(int(index))
    return on_front


def _contrasts(
    configurations: Sequence[Configuration],
    measure: Measure,
    order: Sequence[str],
    level_of: Callable[[RunRecord], str],
    excluded: tuple[str, ...],
    at_equal_size: bool = False,
) -> list[QuantizationContrast]:
    """Return the contrast of each level with ``order[0]``, between configurations that agree in all other settings.

    Args:
        excluded: beginnings of the keys in which two compared configurations may differ.
        at_equal_size: compare only configurations with equally many parameters. Otherwise a level has one
            configuration among those that agree: the last one.
    """
    strata: dict[tuple[str, ...], dict[str, list[Configuration]]] = defaultdict(lambda: defaultdict(list))
    for c in configurations:
        others = tuple(str(value) for key, value in c.settings.items() if not key.startswith(excluded))
        strata[others][level_of(c.first)].append(c)
    contrasts = []
    for level in order[1:]:
        pairs = []
        for by_level in strata.values():
            sides = by_level[level], by_level[order[0]]
            if at_equal_size:
                pairs += [
                    (a, b)
                    for a in sides[0]
                    for b in sides[1]
                    if abs(math.log(_parameters(a) / _parameters(b))) <= math.log(1 + EQUAL_PARAMETERS)
                ]
            elif all(sides):
                pairs.append((sides[0][-1], sides[1][-1]))
        gains = [gain for a, b in pairs for gain in _paired_gains(a, b, measure)]
        if gains:
            count = len(gains)
            se = float(np.std(gains, ddof=1)) / math.sqrt(count) if count > 1 else None
            contrast = QuantizationContrast(
                level,
                order[0],
                gain=Estimate(float(np.mean(gains)), count, se, count - 1.0 if count > 1 else None),
                memory_ratio=_mean_ratio((a.memory_bytes, b.memory_bytes) for a, b in pairs),
                speed_ratio=_mean_ratio((a.tokens_per_second, b.tokens_per_second) for a, b in pairs),
                parameters_ratio=_mean_ratio((_parameters(a), _parameters(b)) for a, b in pairs),
            )
            contrasts.append(contrast)
    return contrasts


def _paired_gains(a: Configuration, b: Configuration, measure: Measure) -> Iterable[float]:
    scores = [{run.seed: measure.of(answering_scores(run)) for run in side.runs} for side in (a, b)]
    for seed in scores[0].keys() & scores[1].keys():
        first, second = scores[0][seed], scores[1][seed]
        if first is not None and second is not None:
            yield measure.sign * (first - second)


def _mean_ratio(pairs: Iterable[tuple[float | None, float | None]]) -> float | None:
    """Return the geometric mean of the known ratios."""
    log_ratio = mean(math.log(first / second) for first, second in pairs if first and second)
    return None if log_ratio is None else math.exp(log_ratio)


def _parameters(configuration: Configuration) -> int:
    plan = configuration.first.plan
    return plan.trainable_parameters if plan is not None else 1


def _parameters_per_rank(configurations: Sequence[Configuration]) -> dict[str, float]:
    """Return target set → parameters per unit of rank, the largest first: sets may be run at different ranks."""
    sizes = {targets_of(c.first): _parameters(c) / c.rank for c in configurations if c.rank}
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))
