"""What does quality cost in memory and speed? Pareto fronts, contrasts of one axis, and the cheapest configuration that
meets the goal."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from qlora_exp.analysis.comparable import answering_scores
from qlora_exp.analysis.configurations import Configuration, Estimate, Measure, mean, pooled_sd

PRECISION_ORDER = ("fp32", "bf16", "fp16", "int8", "nf4", "fp4")
"""Most bits first; the first of these that was run is the reference."""
MIN_MODES = 2
EQUAL_PARAMETERS = 0.10
"""Two target sets count as equally large if their parameters differ by at most this share."""
ONE_SIDED = 0.05


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


@dataclass(frozen=True)
class GoalAnswer:
    """``cheapest``: among the configurations shown to meet the goal, the one with the least memory."""

    text: str
    split: str
    shown: int
    tested: int
    cheapest: Configuration | None
    sentence: str


def front(configurations: Sequence[Configuration], measure: Measure) -> Front:
    """Return the Pareto front of quality, memory and speed.

    A configuration off the front is *within noise of the front* if none that is at least as small and fast is shown to
    have a better quality (95 %, over seeds). There is no front with fewer than two measured quantizations.
    """
    known = [c for c in configurations if None not in (c.quality, c.memory_bytes, c.tokens_per_second)]
    modes = sorted({mode_of(c) for c in known})
    if len(modes) < MIN_MODES:
        measured = f"only {modes[0]} was" if modes else "none was"
        why = f"A Pareto front needs at least two measured quantizations, and here {measured}: qlora-exp sweep pareto"
        return Front(tuple(known), (), why)
    points = np.array(
        [[-measure.sign * c.quality.mean, c.memory_bytes, -c.tokens_per_second] for c in known]  # type: ignore[union-attr,operator]
    )
    on_front = _non_dominated(points)
    rivals = np.flatnonzero(on_front)
    half_widths = _half_widths(known)
    standings = []
    for index in range(len(known)):
        if on_front[index]:
            standings.append(ParetoStatus.FRONT)
            continue
        cheaper = rivals[(points[rivals, 1:] <= points[index, 1:]).all(axis=1)]
        ahead = points[index, 0] - points[cheaper, 0]
        is_dominated = half_widths is not None and bool(
            np.any(ahead > np.hypot(half_widths[index], half_widths[cheaper]))
        )
        standings.append(ParetoStatus.DOMINATED if is_dominated or half_widths is None else ParetoStatus.NEAR)
    return Front(tuple(known), tuple(standings))


def quantization_contrasts(configurations: Sequence[Configuration], measure: Measure) -> list[QuantizationContrast]:
    """Compare each quantization with the one of the most bits, between runs that agree in everything else."""
    modes = {mode_of(c) for c in configurations}
    order = [mode for mode in PRECISION_ORDER if mode in modes]
    return _contrasts(configurations, measure, order, mode_of, ("quantization.",))


def target_contrasts(configurations: Sequence[Configuration], measure: Measure) -> list[QuantizationContrast]:
    """Compare each target set with the largest one, between runs that agree in rank and everything else."""
    return _contrasts(configurations, measure, _targets_by_size(configurations), targets_of, ("targets.",))


def targets_at_equal_parameters(
    configurations: Sequence[Configuration], measure: Measure
) -> list[QuantizationContrast]:
    """Compare target sets at equally many trainable parameters (within 10 %), so at different ranks."""
    contrasts: list[QuantizationContrast] = []
    order = _targets_by_size(configurations)
    strata: dict[tuple[Any, ...], dict[str, list[Configuration]]] = defaultdict(lambda: defaultdict(list))
    for c in configurations:
        strata[_other_settings(c, ("targets.", "lora.r", "lora.alpha"))][targets_of(c)].append(c)
    for level in order[1:]:
        pairs = [
            (a, b)
            for sets in strata.values()
            for a in sets[level]
            for b in sets[order[0]]
            if abs(math.log(_parameters(a) / _parameters(b))) <= math.log(1 + EQUAL_PARAMETERS)
        ]
        contrasts += _contrast(level, order[0], pairs, measure)
    return contrasts


def equal_parameters_hint(configurations: Sequence[Configuration]) -> str | None:
    """Return which ranks would make the target sets equally large; ``None`` if only one set was run."""
    per_rank = {targets_of(c): _parameters(c) / int(c.first.config["lora"]["r"]) for c in configurations}
    order = _targets_by_size(configurations)
    if len(order) < 2:
        return None
    rank = max(int(c.first.config["lora"]["r"]) for c in configurations if targets_of(c) == order[0])
    as_large = [f"{name} at r = {round(rank * per_rank[order[0]] / per_rank[name])}" for name in order[1:]]
    return (
        f"No two target sets were run with equally many parameters: {', '.join(as_large)} would have as many as"
        f" {order[0]} at r = {rank}."
    )


def goal_answer(configurations: Sequence[Configuration]) -> GoalAnswer | None:
    """Return the cheapest configuration that is shown to meet ``task.goal``; ``None`` if no run had a goal.

    Shown: the one-sided bound over seeds and items meets the goal, at 5 % divided by the number of configurations
    (Bonferroni), because the best of many may pass by luck. Cheapest: least memory, then least time.
    """
    with_goals = [(c, [run.goal for run in c.runs if run.goal is not None]) for c in configurations]
    with_goals = [(c, goals) for c, goals in with_goals if goals]
    if not with_goals:
        return None
    texts = {goal.text for _, goals in with_goals for goal in goals}
    text, split = with_goals[0][1][0].text, with_goals[0][1][0].split
    if len(texts) > 1:
        return GoalAnswer(text, split, 0, 0, None, f"The runs have {len(texts)} different goals: no answer.")
    sd, df = pooled_sd([[goal.value for goal in goals if goal.value is not None] for _, goals in with_goals])
    met = [c for c, goals in with_goals if _meets_goal(goals, text, ONE_SIDED / len(with_goals), sd, df)]
    cheapest = min(met, key=_memory_then_time) if met else None
    over = "seeds and items" if sd is not None else "items alone: no configuration has a second seed"
    divided = (
        f" / {len(with_goals)}, because {len(with_goals)} configurations are compared" if len(with_goals) > 1 else ""
    )
    qualifier = f" (each bound at 5 %{divided}; over {over})"
    if cheapest is None:
        best = max((goal.value for _, goals in with_goals for goal in goals if goal.value is not None), default=None)
        highest = "" if best is None or "<" in text else f" The highest value of a run was {best:.3g}."
        sentence = f"No configuration is shown to meet {text} on {split}{qualifier}.{highest}"
    else:
        sentence = (
            f"The cheapest configuration (least memory, then time) that is shown to meet {text} on {split} is"
            f" {cheapest.label}; {len(met)} of {len(with_goals)} are shown to meet it{qualifier}."
        )
    return GoalAnswer(text, split, len(met), len(with_goals), cheapest, sentence)


def mode_of(configuration: Configuration) -> str:
    return str((configuration.first.config.get("quantization") or {}).get("mode"))


def targets_of(configuration: Configuration) -> str:
    targets = configuration.first.config.get("targets") or {}
    modules = targets.get("modules")
    return "+".join(map(str, modules)) if modules else str(targets.get("set"))


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


def _half_widths(configurations: Sequence[Configuration]) -> NDArray[np.float64] | None:
    """Return the half-width of each quality's 95 % interval; ``None`` if no configuration has a second seed."""
    halves = [c.quality.half_width() if c.quality is not None else None for c in configurations]
    return None if None in halves else np.array(halves, dtype=float)


def _contrasts(
    configurations: Sequence[Configuration],
    measure: Measure,
    order: Sequence[str],
    level_of: Any,
    compared_keys: tuple[str, ...],
) -> list[QuantizationContrast]:
    strata: dict[tuple[Any, ...], dict[str, Configuration]] = defaultdict(dict)
    for configuration in configurations:
        strata[_other_settings(configuration, compared_keys)][level_of(configuration)] = configuration
    return [
        contrast
        for level in order[1:]
        for contrast in _contrast(
            level,
            order[0],
            [(sets[level], sets[order[0]]) for sets in strata.values() if level in sets and order[0] in sets],
            measure,
        )
    ]


def _contrast(
    level: str, reference: str, pairs: Sequence[tuple[Configuration, Configuration]], measure: Measure
) -> Iterable[QuantizationContrast]:
    """Yield the contrast over all pairs; nothing if there is no pair."""
    gains = [gain for a, b in pairs for gain in _paired_gains(a, b, measure)]
    if gains:
        count = len(gains)
        se = float(np.std(gains, ddof=1)) / math.sqrt(count) if count > 1 else None
        yield QuantizationContrast(
            *(level, reference, Estimate(float(np.mean(gains)), count, se, count - 1.0 if count > 1 else None)),
            memory_ratio=_ratio((a.memory_bytes, b.memory_bytes) for a, b in pairs),
            speed_ratio=_ratio((a.tokens_per_second, b.tokens_per_second) for a, b in pairs),
            parameters_ratio=_ratio((_parameters(a), _parameters(b)) for a, b in pairs),
        )


def _paired_gains(a: Configuration, b: Configuration, measure: Measure) -> Iterable[float]:
    scores = [{run.seed: measure.of(answering_scores(run)) for run in side.runs} for side in (a, b)]
    for seed in scores[0].keys() & scores[1].keys():
        first, second = scores[0][seed], scores[1][seed]
        if first is not None and second is not None:
            yield measure.sign * (first - second)


def _ratio(pairs: Iterable[tuple[float | None, float | None]]) -> float | None:
    """Return the geometric mean of the known ratios."""
    logs = [math.log(first / second) for first, second in pairs if first and second]
    log_ratio = mean(logs)
    return None if log_ratio is None else math.exp(log_ratio)


def _other_settings(configuration: Configuration, excluded: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(str(value) for key, value in configuration.settings.items() if not key.startswith(excluded))


def _parameters(configuration: Configuration) -> int:
    plan = configuration.first.plan
    return plan.trainable_parameters if plan is not None else 1


def _targets_by_size(configurations: Sequence[Configuration]) -> list[str]:
    """Return the target sets, the largest first, by parameters per unit of rank: sets may be run at different ranks."""
    size = {targets_of(c): _parameters(c) / int(c.first.config["lora"]["r"]) for c in configurations}
    return sorted(size, key=lambda name: -size[name])


def _memory_then_time(configuration: Configuration) -> tuple[float, float]:
    unknown = math.inf
    memory, seconds = configuration.memory_bytes, configuration.train_seconds
    return (unknown if memory is None else memory, unknown if seconds is None else seconds)


def _meets_goal(goals: Sequence[Any], text: str, alpha: float, seed_sd: float | None, seed_df: int) -> bool:
    """Return whether the bound over seeds and items meets the goal. The records' bounds are at 5 % over items."""
    values = [goal.value for goal in goals if goal.value is not None]
    rising = ">" in text
    edges = [goal.low if rising else goal.high for goal in goals if goal.value is not None]
    if not values or None in edges:
        return False
    threshold = float(text.replace("=", "").split(">" if rising else "<")[1])
    # The records have one-sided 5 % bounds over items: dividing by the normal quantile gives the standard error.
    item_se = max(abs(v - e) for v, e in zip(values, edges, strict=True)) / float(stats.norm.isf(ONE_SIDED))
    seed_variance = 0.0 if seed_sd is None else seed_sd**2 / len(values)
    variance = item_se**2 + seed_variance
    # Welch–Satterthwaite, with infinite degrees of freedom for the items: there are many.
    df = variance**2 / seed_variance**2 * seed_df if seed_variance > 0 else math.inf
    bound = float(np.mean(values)) + (-1 if rising else 1) * float(stats.t.isf(alpha, df)) * math.sqrt(variance)
    return bound >= threshold if rising else bound <= threshold


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the answer and its tables for a folder of runs; ``--page FILE`` saves the plots."""
    from qlora_exp.analysis.ask import main as ask

    ask(["tradeoffs", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    main()
