"""Which quantization, which target modules? Otherwise equal runs, paired by seed and item, against a reference."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qlora_exp.analysis.comparable import answering_scores
from qlora_exp.analysis.configurations import (
    Configuration,
    Measure,
    best_on_validation,
    known_mean,
    mean,
    mode_of,
    targets_of,
)
from qlora_exp.analysis.contrasts import MIN_SEEDS, Difference, ItemScores, stratified_difference
from qlora_exp.analysis.margin import Margin
from qlora_exp.analysis.recommendation import (
    ComparisonVerdict,
    comparison_verdict,
    joint_alpha,
    margin_in_score,
    seeds_to_settle,
)
from qlora_exp.analysis.tradeoffs import PRECISION_ORDER
from qlora_exp.records.types import RunRecord

LEARNING_RATE = "training.learning_rate"


@dataclass(frozen=True)
class LevelCosts:
    """Means over the compared runs; ``None`` is unknown."""

    weight_bytes: float | None
    """Weights and quantization state."""
    peak_bytes: float | None
    """Peak of training."""
    model_state_bytes: float | None
    """Weights, quantization state, adapter, gradients and optimizer."""
    tokens_per_second: float | None
    parameters: float | None
    """Trainable ones."""


@dataclass(frozen=True)
class LevelContrast:
    """``level`` against ``reference`` over otherwise equal configurations."""

    level: str
    reference: str
    difference: Difference
    """How much better ``level`` is, in the units of the measure."""
    reference_score: float
    """Mean score of the reference's compared runs."""
    verdict: ComparisonVerdict
    costs: LevelCosts
    reference_costs: LevelCosts
    pairs: tuple[tuple[Configuration, Configuration], ...]
    """(level, reference): configurations that agree in everything else."""
    own_rates: bool
    """Whether some of them differ in the learning rate: each has the one that was best for it on validation."""
    seeds_to_settle: int | None

    def ratio(self, cost: str) -> float | None:
        """Return level / reference of one of the costs; ``None`` if it is unknown."""
        level, reference = getattr(self.costs, cost), getattr(self.reference_costs, cost)
        return level / reference if level is not None and reference else None


@dataclass(frozen=True)
class LevelComparison:
    """All levels of one setting against the reference, and which one to use."""

    reference: str
    contrasts: tuple[LevelContrast, ...]
    measure: Measure
    margin: float | None
    """In the units of the measure."""
    margin_text: str | None
    use: str
    regret_bound: float | None
    """The most by which another compared level may be better than ``use``, jointly with 95 %."""
    regret_against: str | None

    @property
    def reference_score(self) -> float:
        return self.contrasts[0].reference_score


def compare_quantizations(
    configurations: Sequence[Configuration],
    measure: Measure,
    items: ItemScores | None = None,
    margin: Margin | None = None,
) -> LevelComparison | None:
    """Compare each quantization with the one of the most bits; ``None`` if no two otherwise equal runs differ in it.

    The one to use is that with the smallest weights among those shown to cost less than the margin; if there is none,
    the one that may cost least against the others.
    """
    modes = {mode_of(c.first) for c in configurations}
    order = [mode for mode in PRECISION_ORDER if mode in modes]
    return _compare(configurations, measure, order, mode_of, "quantization.", "weight_bytes", items, margin)


def compare_targets(
    configurations: Sequence[Configuration],
    measure: Measure,
    items: ItemScores | None = None,
    margin: Margin | None = None,
) -> LevelComparison | None:
    """Compare each set of target modules with the largest one at equal rank, as :func:`compare_quantizations` does.

    Of the sets that are shown to cost less than the margin, the one with the fewest trainable parameters is used.
    """
    sizes: dict[str, float] = {}
    for c in configurations:
        if c.first.plan is not None and c.rank:
            sizes.setdefault(targets_of(c.first), c.first.plan.trainable_parameters / c.rank)
    order = sorted(sizes, key=lambda name: -sizes[name])
    adapted = [c for c in configurations if c.rank]
    return _compare(adapted, measure, order, targets_of, "targets.", "parameters", items, margin)


_Pairs = list[tuple[Configuration, Configuration]]


def _compare(
    configurations: Sequence[Configuration],
    measure: Measure,
    order: Sequence[str],
    level_of: Callable[[RunRecord], str],
    setting: str,
    cost: str,
    items: ItemScores | None,
    margin: Margin | None,
) -> LevelComparison | None:
    strata = _strata(configurations, level_of, setting)
    reference = next((level for level in order if any(level in s and len(s) > 1 for s in strata)), None)
    if reference is None:
        return None
    contrasts = []
    for level in order:
        pairs = _pairs_of(strata, level, reference, measure) if level != reference else []
        difference = _difference(pairs, measure, items)
        if difference is not None:
            contrasts.append(_contrast(level, reference, pairs, difference, measure, margin))
    if not contrasts:
        return None
    size = margin_in_score(margin, _runs(contrasts[0].pairs, 1), measure.name)
    levels = [reference, *(contrast.level for contrast in contrasts)]
    bounds = _regret_bounds(levels, strata, measure, items)
    use = _level_to_use(contrasts, bounds, cost, size)
    against, bound = bounds[use] or (None, None)
    text = str(margin) if margin is not None else None
    return LevelComparison(reference, tuple(contrasts), measure, size, text, use, bound, against)


def _strata(
    configurations: Sequence[Configuration], level_of: Callable[[RunRecord], str], setting: str
) -> list[dict[str, list[Configuration]]]:
    """Return level → configurations, for each set of configurations that agree in all but the level and the learning
    rate."""
    strata: dict[tuple[str, ...], dict[str, list[Configuration]]] = defaultdict(lambda: defaultdict(list))
    for c in configurations:
        others = tuple(str(v) for key, v in c.settings.items() if not key.startswith(setting) and key != LEARNING_RATE)
        strata[others][level_of(c.first)].append(c)
    return [dict(stratum) for stratum in strata.values()]


def _pairs_of(strata: Sequence[dict[str, list[Configuration]]], level: str, reference: str, measure: Measure) -> _Pairs:
    """Return the configurations of both levels that agree in everything else.

    If a stratum's levels share no learning rate, as after a search for each, the best one of each on validation is
    used.
    """
    pairs: _Pairs = []
    for stratum in strata:
        first, second = stratum.get(level, []), stratum.get(reference, [])
        equal = [
            (a, b) for a in first for b in second if a.settings.get(LEARNING_RATE) == b.settings.get(LEARNING_RATE)
        ]
        if not equal and first and second:
            best = best_on_validation(first, measure), best_on_validation(second, measure)
            equal = [(best[0], best[1])] if best[0] is not None and best[1] is not None else []
        pairs += equal
    return pairs


def _difference(pairs: _Pairs, measure: Measure, items: ItemScores | None) -> Difference | None:
    return stratified_difference([(a.runs, b.runs) for a, b in pairs], measure.name, items)


def _contrast(
    level: str, reference: str, pairs: _Pairs, difference: Difference, measure: Measure, margin: Margin | None
) -> LevelContrast:
    references = _runs(pairs, 1)
    score = known_mean(measure.of(answering_scores(run)) for run in references)
    size = margin_in_score(margin, references, measure.name)
    verdict = comparison_verdict(difference, size)
    return LevelContrast(
        level=level,
        reference=reference,
        difference=difference,
        reference_score=math.nan if score is None else score,
        verdict=verdict,
        costs=_costs(_runs(pairs, 0)),
        reference_costs=_costs(references),
        pairs=tuple(pairs),
        own_rates=any(a.settings.get(LEARNING_RATE) != b.settings.get(LEARNING_RATE) for a, b in pairs),
        seeds_to_settle=seeds_to_settle(difference, size) if verdict is ComparisonVerdict.OPEN else None,
    )


def _runs(pairs: Iterable[tuple[Configuration, Configuration]], side: int) -> list[RunRecord]:
    return list({run.run_id: run for pair in pairs for run in pair[side].runs}.values())


def _costs(runs: Sequence[RunRecord]) -> LevelCosts:
    weights = [
        None if m.base_weight_bytes is None else float(m.base_weight_bytes + (m.quantization_state_bytes or 0))
        for m in (run.memory for run in runs)
    ]
    return LevelCosts(
        weight_bytes=mean(weights),
        peak_bytes=mean(run.memory.peak_train_bytes for run in runs),
        model_state_bytes=mean(run.memory.model_state_bytes for run in runs),
        tokens_per_second=mean(run.speed.train_tokens_per_second for run in runs),
        parameters=mean(run.plan.trainable_parameters if run.plan is not None else None for run in runs),
    )


def _regret_bounds(
    levels: Sequence[str], strata: Sequence[dict[str, list[Configuration]]], measure: Measure, items: ItemScores | None
) -> dict[str, tuple[str, float] | None]:
    """Return level → the alternative that may be better by the most, and by how much at most; ``None``: unknown."""
    alpha = joint_alpha(len(levels) - 1)
    bounds: dict[str, tuple[str, float] | None] = {}
    for level in levels:
        known: list[tuple[float, str]] = []
        others = [other for other in levels if other != level]
        for other in others:
            # Not all levels have pairs with each other; all have pairs with the reference.
            difference = _difference(_pairs_of(strata, other, level, measure), measure, items)
            upper = difference.upper(alpha) if difference is not None else None
            if upper is not None:
                known.append((max(0.0, upper), other))
        bounds[level] = (max(known)[1], max(known)[0]) if len(known) == len(others) else None
    return bounds


def _level_to_use(
    contrasts: Sequence[LevelContrast],
    bounds: dict[str, tuple[str, float] | None],
    cost: str,
    margin: float | None,
) -> str:
    reference = contrasts[0].reference
    cheap = [
        (ratio, contrast.level)
        for contrast in contrasts
        if (ratio := contrast.ratio(cost)) is not None and ratio < 1
        # Not inferior: the end of the 95 % interval is within the margin.
        if margin is not None
        and contrast.difference.seeds >= MIN_SEEDS
        and (upper := contrast.difference.upper(joint_alpha(len(contrasts)))) is not None
        and 2 * contrast.difference.value - upper > -margin  # the lower bound at the level of several comparisons
    ]
    if cheap:
        return min(cheap)[1]
    known = [(bound[1], level) for level, bound in bounds.items() if bound is not None]
    if len(known) == len(bounds):
        return min(known, key=lambda pair: pair[0])[1]
    best = max(contrasts, key=lambda contrast: contrast.difference.value)
    return best.level if best.difference.value > 0 else reference
