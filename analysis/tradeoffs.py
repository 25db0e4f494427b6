"""What does quality cost in memory and speed? Fronts, one axis at equal everything else, and the cheapest that is good
enough."""

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
"""Most bits first: the first that was run is what the others are held against."""
LEAST_MODES = 2
EQUAL_PARAMETERS = 0.10
"""Two target sets have equally many parameters where they differ by no more than this share."""
ONE_SIDED = 0.05


class ParetoStatus(StrEnum):
    FRONT = "on the front"
    NEAR = "within noise of the front"
    DOMINATED = "dominated"


@dataclass(frozen=True)
class Front:
    """``standings``: one for each of ``configurations``, those whose quality, memory and speed are known. ``why_none``:
    why no front can be drawn; the standings are then empty."""

    configurations: tuple[Configuration, ...]
    standings: tuple[ParetoStatus, ...]
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
    """``cheapest``: of the configurations that are shown to meet the goal, the one that takes the least memory."""

    text: str
    split: str
    shown: int
    tested: int
    cheapest: Configuration | None
    sentence: str


def front(configurations: Sequence[Configuration], measure: Measure) -> Front:
    """Who is beaten by nobody in quality, memory and speed at once. A configuration whose quality can't be told from
    that of the one that beats it (95 %, over seeds) is *within noise of the front*.

    No front across quantizations is drawn with fewer than two of them really measured.
    """
    known = [c for c in configurations if None not in (c.quality, c.memory_bytes, c.tokens_per_second)]
    modes = sorted({mode_of(c) for c in known})
    if len(modes) < LEAST_MODES:
        was = f"only {modes[0]} was" if modes else "none was"
        why = f"A front needs at least two quantizations measured in this study, and {was}: qlora-exp sweep pareto"
        return Front(tuple(known), (), why)
    points = np.array(
        [[-measure.sign * c.quality.mean, c.memory_bytes, -c.tokens_per_second] for c in known]  # type: ignore[union-attr,operator]
    )
    on_front = _undominated(points)
    rivals = np.flatnonzero(on_front)
    reach = _reach(known)
    standings = []
    for index in range(len(known)):
        if on_front[index]:
            standings.append(ParetoStatus.FRONT)
            continue
        cheaper = rivals[(points[rivals, 1:] <= points[index, 1:]).all(axis=1)]
        ahead = points[index, 0] - points[cheaper, 0]
        beaten = reach is not None and bool(np.any(ahead > np.hypot(reach[index], reach[cheaper])))
        standings.append(ParetoStatus.DOMINATED if beaten or reach is None else ParetoStatus.NEAR)
    return Front(tuple(known), tuple(standings))


def quantization_contrasts(configurations: Sequence[Configuration], measure: Measure) -> list[QuantizationContrast]:
    """Each quantization against the one with the most bits, at equal everything else."""
    modes = {mode_of(c) for c in configurations}
    order = [mode for mode in PRECISION_ORDER if mode in modes]
    return _contrasts(configurations, measure, order, mode_of, ("quantization.",))


def target_contrasts(configurations: Sequence[Configuration], measure: Measure) -> list[QuantizationContrast]:
    """Each target set against the one with the most parameters, at equal rank and equal everything else."""
    return _contrasts(configurations, measure, _targets_by_size(configurations), targets_of, ("targets.",))


def targets_at_equal_parameters(
    configurations: Sequence[Configuration], measure: Measure
) -> list[QuantizationContrast]:
    """The same at equally many trainable parameters (within 10 %), so at different ranks."""
    found: list[QuantizationContrast] = []
    order = _targets_by_size(configurations)
    strata: dict[tuple[Any, ...], dict[str, list[Configuration]]] = defaultdict(lambda: defaultdict(list))
    for c in configurations:
        strata[_others(c, ("targets.", "lora.r", "lora.alpha"))][targets_of(c)].append(c)
    for level in order[1:]:
        pairs = [
            (a, b)
            for sets in strata.values()
            for a in sets[level]
            for b in sets[order[0]]
            if abs(math.log(_parameters(a) / _parameters(b))) <= math.log(1 + EQUAL_PARAMETERS)
        ]
        found += _contrast(level, order[0], pairs, measure)
    return found


def equal_parameters_hint(configurations: Sequence[Configuration]) -> str | None:
    """Which ranks would make target sets equally large, where several sets were run and none is; else ``None``."""
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
    """The cheapest configuration that is shown to meet ``task.goal``; ``None`` where no run was asked about one.

    Shown: the one-sided bound over seeds and items meets the goal, at 5 % divided by the number of configurations
    (Bonferroni), so that the best of many isn't taken for good by luck. Cheapest: least memory, then least time.
    """
    asked = [(c, [run.goal for run in c.runs if run.goal is not None]) for c in configurations]
    asked = [(c, goals) for c, goals in asked if goals]
    if not asked:
        return None
    texts = {goal.text for _, goals in asked for goal in goals}
    text, split = asked[0][1][0].text, asked[0][1][0].split
    if len(texts) > 1:
        return GoalAnswer(text, split, 0, 0, None, f"The runs were asked {len(texts)} different goals: no answer.")
    sd, df = pooled_sd([[goal.value for goal in goals if goal.value is not None] for _, goals in asked])
    met = [c for c, goals in asked if _shown(goals, text, ONE_SIDED / len(asked), sd, df)]
    cheapest = min(met, key=_price) if met else None
    over = "seeds and items" if sd is not None else "items alone: no configuration has a second seed"
    divided = f" / {len(asked)}, for {len(asked)} configurations were looked at" if len(asked) > 1 else ""
    several = f" (each bound at 5 %{divided}; over {over})"
    if cheapest is None:
        best = max((goal.value for _, goals in asked for goal in goals if goal.value is not None), default=None)
        told = "" if best is None or "<" in text else f" The highest value of a run was {best:.3g}."
        sentence = f"No configuration is shown to meet {text} on {split}{several}.{told}"
    else:
        sentence = (
            f"The cheapest configuration (least memory, then time) that is shown to meet {text} on {split} is"
            f" {cheapest.label}; {len(met)} of {len(asked)} are shown to meet it{several}."
        )
    return GoalAnswer(text, split, len(met), len(asked), cheapest, sentence)


def mode_of(configuration: Configuration) -> str:
    return str((configuration.first.config.get("quantization") or {}).get("mode"))


def targets_of(configuration: Configuration) -> str:
    targets = configuration.first.config.get("targets") or {}
    modules = targets.get("modules")
    return "+".join(map(str, modules)) if modules else str(targets.get("set"))


def _undominated(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Rows (lower is better in every column) that no other row equals or beats everywhere and beats somewhere."""
    kept = np.zeros(len(points), dtype=bool)
    members: list[int] = []
    # In lexicographic order nothing that comes later can beat what came before.
    for index in np.lexsort(points.T[::-1]):
        rivals = points[members]
        beaten = (rivals <= points[index]).all(axis=1) & (rivals < points[index]).any(axis=1)
        if not beaten.any():
            kept[index] = True
            members.append(int(index))
    return kept


def _reach(configurations: Sequence[Configuration]) -> NDArray[np.float64] | None:
    """One-sided 97.5 % reach of each configuration's quality; ``None`` where no seed was repeated."""
    halves = [c.quality.half_width() if c.quality is not None else None for c in configurations]
    return None if None in halves else np.array(halves, dtype=float)


def _contrasts(
    configurations: Sequence[Configuration], measure: Measure, order: Sequence[str], level_of: Any, own: tuple[str, ...]
) -> list[QuantizationContrast]:
    strata: dict[tuple[Any, ...], dict[str, Configuration]] = defaultdict(dict)
    for configuration in configurations:
        strata[_others(configuration, own)][level_of(configuration)] = configuration
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
    """Nothing where no two runs are otherwise equal."""
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
    """Geometric mean of the known ratios."""
    logs = [math.log(first / second) for first, second in pairs if first and second]
    found = mean(logs)
    return None if found is None else math.exp(found)


def _others(configuration: Configuration, own: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(str(value) for key, value in configuration.settings.items() if not key.startswith(own))


def _parameters(configuration: Configuration) -> int:
    plan = configuration.first.plan
    return plan.trainable_parameters if plan is not None else 1


def _targets_by_size(configurations: Sequence[Configuration]) -> list[str]:
    """Parameters per unit of rank tell the sets' sizes apart, whatever ranks each was run at."""
    size = {targets_of(c): _parameters(c) / int(c.first.config["lora"]["r"]) for c in configurations}
    return sorted(size, key=lambda name: -size[name])


def _price(configuration: Configuration) -> tuple[float, float]:
    unknown = math.inf
    memory, seconds = configuration.memory_bytes, configuration.train_seconds
    return (unknown if memory is None else memory, unknown if seconds is None else seconds)


def _shown(goals: Sequence[Any], text: str, alpha: float, seed_sd: float | None, seed_df: int) -> bool:
    """Whether the bound over seeds and items meets the goal. The records' own bounds are at 5 % over items."""
    values = [goal.value for goal in goals if goal.value is not None]
    rising = ">" in text
    edges = [goal.low if rising else goal.high for goal in goals if goal.value is not None]
    if not values or None in edges:
        return False
    threshold = float(text.replace("=", "").split(">" if rising else "<")[1])
    item_se = max(abs(v - e) for v, e in zip(values, edges, strict=True)) / float(stats.norm.isf(ONE_SIDED))
    seed_variance = 0.0 if seed_sd is None else seed_sd**2 / len(values)
    variance = item_se**2 + seed_variance
    # Welch–Satterthwaite; the items' own degrees of freedom are beyond counting.
    df = variance**2 / seed_variance**2 * seed_df if seed_variance > 0 else math.inf
    bound = float(np.mean(values)) + (-1 if rising else 1) * float(stats.t.isf(alpha, df)) * math.sqrt(variance)
    return bound >= threshold if rising else bound <= threshold


def main(arguments: Sequence[str] | None = None) -> None:
    """The answer and its tables of a folder of runs; ``--page FILE`` saves the plots."""
    from qlora_exp.analysis.ask import main as ask

    ask(["tradeoffs", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    main()
