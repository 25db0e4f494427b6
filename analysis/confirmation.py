"""Decide between finalists that share fresh seeds and test items: one winner, or which to use while there is none.

All pairs of finalists are compared with intervals that hold together (95 %): the studentized range of Tukey (1953), as
the maximum of |t| over all pairs. The variance of a pair's difference has the two parts of docs/statistics.md, A over
seeds and B over items:

    half-width = sqrt(q(K, df_A)² · A + q(K, df_B)² · B)

with q the 95 % quantile of the studentized range of K finalists, divided by √2. Weighting each part with its own
quantile never covers less than 95 % for two finalists (Banerjee 1960, Ann. Inst. Statist. Math. 12);
Welch–Satterthwaite's degrees of freedom do with two or three seeds. docs/confirm.md has the measured error rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

from qlora_exp.analysis.comparable import answering_scores
from qlora_exp.analysis.configurations import (
    Configuration,
    Estimate,
    Measure,
    configurations,
    known_mean,
    tokenizer_family,
)
from qlora_exp.analysis.contrasts import Difference, GroupScores, ItemScores
from qlora_exp.analysis.margin import Margin, MarginUnit
from qlora_exp.analysis.recommendation import (
    MAX_SEEDS_ADVISED,
    ComparisonVerdict,
    comparison_verdict,
    margin_in_score,
)
from qlora_exp.analysis.report_choice import TaskMetric, task_metric_of
from qlora_exp.analysis.variance import Array, rank_seed_mean_square, split_variance
from qlora_exp.records.types import RunRecord, Status

FAMILY_ERROR = 0.05
"""Error rate of all statements about pairs together."""
MIN_SEEDS_TO_DECIDE = 2
LOST = (Status.FAILED, Status.OUT_OF_MEMORY, Status.DIVERGED)
EQUAL_MEMORY, EQUAL_SECONDS = 0.01, 0.1
"""Relative differences below which two configurations count as equally large, and as equally fast."""


class ConfirmVerdict(StrEnum):
    WINNER = "winner"
    EQUAL = "equal within the margin"
    OPEN = "not separable"
    ALONE = "one finalist"


@dataclass(frozen=True)
class PairIntervals:
    """How much better the first of each pair is. Arrays have shape (..., pairs)."""

    pairs: tuple[tuple[int, int], ...]
    gain: Array
    low: Array
    high: Array
    seed_part: Array
    item_part: Array
    seed_df: Array
    item_df: Array


@lru_cache(maxsize=256)
def critical_value(finalists: int, df: float) -> float:
    """Return the factor of the standard error with which the intervals of all pairs hold together with 95 %.

    With two finalists it is Student's t.
    """
    if finalists < 3:
        return float(stats.t.isf(FAMILY_ERROR / 2, df))
    return float(stats.studentized_range.isf(FAMILY_ERROR, finalists, df)) / math.sqrt(2)


def pair_intervals(losses: Array) -> PairIntervals:
    """Return the differences of all pairs of finalists with their simultaneous intervals.

    Args:
        losses: (..., finalists, seeds, items), lower is better; items is 1 for scores without items. No value is
            missing, and there are at least two seeds.

    A is the larger of the pair's own variance and the one pooled over all finalists, with the pooled degrees of
    freedom: a finalist that is noisier than the others gets wider intervals, and three seeds are enough to decide.
    """
    finalists, seeds, items = losses.shape[-3:]
    mean_square, df = rank_seed_mean_square(losses.mean(axis=-1))
    pairs = tuple(combinations(range(finalists), 2))
    splits = [split_variance(losses[..., b, :, :] - losses[..., a, :, :], mean_square, df) for a, b in pairs]
    gain, seed_part, item_part = (
        np.stack([getattr(split, name) for split in splits], axis=-1) for name in ("gain", "seed_part", "item_part")
    )
    seed_df, item_df = (finalists - 1.0) * (seeds - 1.0), items - 1.0 if items > 1 else math.inf
    of_seeds, of_items = critical_value(finalists, seed_df), critical_value(finalists, item_df)
    half = np.sqrt(of_seeds**2 * seed_part + of_items**2 * item_part)
    return PairIntervals(
        *(pairs, gain, gain - half, gain + half, seed_part, item_part),
        *(np.full_like(gain, seed_df), np.full_like(gain, item_df)),
    )


@dataclass(frozen=True)
class FinalistPair:
    """Two finalists. ``difference``: how much better the first is; its interval holds together with the others'."""

    first: Configuration
    second: Configuration
    difference: Difference
    verdict: ComparisonVerdict
    """On the first."""

    def seen_from(self, finalist: Configuration) -> FinalistPair:
        """Return the pair with ``finalist`` as the first."""
        if self.first is finalist:
            return self
        d = self.difference
        ends = (None if d.high is None else -d.high, None if d.low is None else -d.low)
        turned = Difference(-d.value, *ends, d.seeds, d.over, None, d.se, d.df, d.item_variance, d.item_df)
        swapped = {ComparisonVerdict.BETTER: ComparisonVerdict.WORSE, ComparisonVerdict.WORSE: ComparisonVerdict.BETTER}
        return FinalistPair(self.second, self.first, turned, swapped.get(self.verdict, self.verdict))


@dataclass(frozen=True)
class Confirmation:
    """The decision between finalists. ``None`` is unknown."""

    verdict: ConfirmVerdict
    use: Configuration
    finalists: tuple[Configuration, ...]
    """Those that are compared, the best on test first."""
    lost: tuple[tuple[Configuration, int], ...]
    """Finalists that lost runs (failed, diverged, out of memory), and how many; they are never chosen."""
    pairs: tuple[FinalistPair, ...]
    measure: Measure
    metric: TaskMetric | None
    margin: float | None
    """In the measure's unit; ``None``: it can't be converted, and equality is never concluded."""
    margin_text: str
    level: float | None
    """Mean of the measure over the finalists: what a relative margin is a share of."""
    seeds: int
    """Seeds that all finalists share."""
    items: int
    contenders: tuple[Configuration, ...]
    """Finalists that no other one is shown to beat."""
    regret_bound: float | None
    regret_against: Configuration | None
    seeds_advised: int | None
    """Seeds with which every comparison of ``use`` would probably be decided; ``None``: decided, or 64 aren't
    enough."""
    pending: int = 0
    """Runs that have not ended."""

    def pairs_of(self, finalist: Configuration) -> list[FinalistPair]:
        return _of(finalist, self.pairs)

    def score(self, finalist: Configuration) -> tuple[str, float, float | None, float | None] | None:
        """Return name, mean and ends of the finalist's score on test, in the task's own metric if there is one.

        The interval is corrected for the number of finalists: the best of several may have passed by luck.
        """
        estimate: Estimate | None = self.metric.tuned(finalist) if self.metric is not None else None
        name, bounded = (self.metric.words, True) if self.metric is not None else (self.measure.label, False)
        if estimate is None:
            name, bounded, estimate = self.measure.label, self.measure.higher_is_better, finalist.quality
        if estimate is None:
            return None
        if estimate.se is None or estimate.df is None or estimate.seeds < MIN_SEEDS_TO_DECIDE:
            return name, estimate.mean, None, None
        half = float(stats.t.isf(FAMILY_ERROR / 2 / len(self.finalists), estimate.df)) * estimate.se
        low, high = estimate.mean - half, estimate.mean + half
        return name, estimate.mean, max(low, 0.0) if bounded else low, min(high, 1.0) if bounded else high


def confirm_finalists(
    records: Sequence[RunRecord], measure: Measure, items: ItemScores | None, margin: Margin, planned: int = 0
) -> Confirmation | None:
    """Return the decision between the configurations of ``records``; ``None`` before any of them has a score.

    Args:
        records: all runs of the study that confirms, failed ones included.
        measure: the score that decides, on the test split.
        margin: differences within it count as equal.
        planned: how many runs there will be. Before all have ended there is no winner: the intervals hold for one look.

    A seed counts only if every finalist has a score with it, because the comparison is paired.
    """
    ended = _ended(records)
    if not ended:
        return None
    pending = pending_runs(records, planned)
    measure = comparable_measure(ended, measure)
    all_finalists = configurations(ended, measure)
    lost = tuple((c, failed) for c in all_finalists if (failed := sum(map(_is_lost, c.runs))))
    compared = [c for c in all_finalists if c.quality is not None and all(c is not other for other, _ in lost)]
    if not compared:
        return None
    order = sorted(compared, key=lambda c: -measure.sign * c.quality.mean if c.quality else math.inf)
    seeds = [seed for seed in _scores(order[0], measure) if all(seed in _scores(c, measure) for c in order)]
    if seeds:  # order and quality, too, only count the seeds that all of them share
        order = _over_seeds(order, seeds, measure)
        order.sort(key=lambda c: -measure.sign * c.quality.mean if c.quality else math.inf)
    losses, of_items, item_count = _losses(order, seeds, measure, items)
    level = known_mean(c.quality.mean for c in order if c.quality is not None)
    size = margin_in_score(margin, [run for c in order for run in c.runs], measure.name)
    if size is None and margin.unit is MarginUnit.SCORE:
        size = margin.value
    pairs = _pairs(order, losses, f"{len(seeds)} seeds{of_items}", size)
    contenders = tuple(c for c in order if not _is_beaten(c, pairs))
    use, verdict = order[0], ConfirmVerdict.ALONE
    if len(order) > 1:
        use = contenders[0] if len(contenders) == 1 else cheapest(contenders, measure)
        verdict = ConfirmVerdict.WINNER if len(contenders) == 1 else ConfirmVerdict.OPEN
        open_pairs = [p for p in _of(use, pairs) if any(p.second is c for c in contenders)]
        if len(contenders) > 1 and all(p.verdict is ComparisonVerdict.EQUIVALENT for p in open_pairs):
            verdict = ConfirmVerdict.EQUAL
    if pending or (lost and len(order) == 1):
        verdict = ConfirmVerdict.OPEN
    bounds = [(-p.difference.low, p.second) for p in _of(use, pairs) if p.difference.low is not None]
    bound, against = max(bounds, key=lambda pair: pair[0], default=(None, None))
    advised = seeds_to_confirm(_of(use, pairs), size, len(order)) if verdict is ConfirmVerdict.OPEN else None
    return Confirmation(
        *(verdict, use, tuple(order), lost, tuple(pairs), measure, task_metric_of(order), size, str(margin), level),
        *(len(seeds), item_count, contenders, None if bound is None else max(0.0, bound), against, advised),
        pending=pending,
    )


def comparable_measure(records: Sequence[RunRecord], measure: Measure) -> Measure:
    """Return bits per byte in place of loss per item if the runs differ in format or tokenizer, which it depends on."""
    read_as = {
        (record.plan.format if record.plan is not None else None, tokenizer_family(record.config.get("model") or {}))
        for record in records
    }
    return Measure("bits_per_byte", False) if measure.name == "loss_per_item" and len(read_as) > 1 else measure


def cheapest(candidates: Sequence[Configuration], measure: Measure) -> Configuration:
    """Return the configuration of least memory; of those within 1 %, the one of least training time; of those within
    10 %, the one of the best score."""

    def least(found: Sequence[Configuration], costs: Sequence[float | None], tolerance: float) -> list[Configuration]:
        known = [cost for cost in costs if cost is not None]
        if len(known) < len(found):
            return list(found)
        return [c for c, cost in zip(found, known, strict=True) if cost <= min(known) * (1 + tolerance)]

    left = least(candidates, [c.memory_bytes for c in candidates], EQUAL_MEMORY)
    left = least(left, [c.train_seconds for c in left], EQUAL_SECONDS)
    return max(left, key=lambda c: measure.sign * c.quality.mean if c.quality is not None else -math.inf)


def seeds_to_confirm(pairs: Sequence[FinalistPair], margin: float | None, finalists: int) -> int | None:
    """Return the fewest seeds with which each pair's interval would exclude 0 or lie within the margin, if differences
    and noise stay as they are; ``None`` if 64 aren't enough, or the noise is unknown."""
    undecided = [pair.difference for pair in pairs if pair.verdict is ComparisonVerdict.OPEN]
    if not undecided or any(d.se is None or d.seeds < MIN_SEEDS_TO_DECIDE for d in undecided):
        return None

    def decides(seeds: int) -> bool:
        of_seeds = critical_value(finalists, (finalists - 1.0) * (seeds - 1.0))
        for d in undecided:
            assert d.se is not None
            seed_part = max(0.0, d.se**2 - d.item_variance) * d.seeds / seeds
            of_items = critical_value(finalists, d.item_df)
            half = math.sqrt(of_seeds**2 * seed_part + of_items**2 * d.item_variance)
            if not (half < abs(d.value) or (margin is not None and half < margin - abs(d.value))):
                return False
        return True

    low, high = undecided[0].seeds + 1, MAX_SEEDS_ADVISED
    if not decides(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle + 1, high)
    return low


def pending_runs(records: Sequence[RunRecord], planned: int) -> int:
    """Return how many of the planned runs have not ended."""
    return max(planned, len(records)) - len(_ended(records))


def _ended(records: Sequence[RunRecord]) -> list[RunRecord]:
    return [record for record in records if record.status not in (Status.RUNNING, Status.INTERRUPTED)]


def _is_lost(run: RunRecord) -> bool:
    return run.status in LOST


def _scores(configuration: Configuration, measure: Measure) -> Mapping[int | None, float]:
    """Return seed → score on test."""
    found = {run.seed: measure.of(answering_scores(run)) for run in configuration.runs}
    return {seed: value for seed, value in found.items() if value is not None}


def _over_seeds(
    finalists: Sequence[Configuration], seeds: Sequence[int | None], measure: Measure
) -> list[Configuration]:
    """Return the finalists with the runs of these seeds alone; labels and settings stay."""
    runs = [run for c in finalists for run in c.runs if run.seed in seeds]
    of_run = {run.run_id: c for c in finalists for run in c.runs}
    return [
        replace(c, label=of_run[c.first.run_id].label, settings=of_run[c.first.run_id].settings)
        for c in configurations(runs, measure)
    ]


def _losses(
    finalists: Sequence[Configuration], seeds: Sequence[int | None], measure: Measure, items: ItemScores | None
) -> tuple[Array, str, int]:
    """Return (finalists, seeds, items), lower is better; e.g. `` and 300 items``; and the number of scored items.

    The last axis has length 1 if the items' values are missing.
    """
    runs = [[next(run for run in c.runs if run.seed == seed) for seed in seeds] for c in finalists]
    scored = [scores.items for row in runs for run in row if (scores := answering_scores(run)) is not None]
    values = [[(items(run, "after", measure.name) if items is not None else None) or {} for run in row] for row in runs]
    names = next((first.keys() for row in values for first in row), {}.keys())
    if names and all(of_run.keys() == names for row in values for of_run in row):
        table = np.array([[[of_run[name] for name in names] for of_run in row] for row in values], dtype=float)
        if np.isfinite(table).all():
            groups = isinstance(values[0][0], GroupScores)
            what = f" and {len(names):,} {'groups of items' if groups else 'items'}"
            return -measure.sign * table, what, min(scored, default=0)
    by_seed = [_scores(c, measure) for c in finalists]
    means = np.array([[[scores[seed]] for seed in seeds] for scores in by_seed], dtype=float)
    return -measure.sign * means.reshape(len(finalists), len(seeds), 1), "", min(scored, default=0)


def _pairs(finalists: Sequence[Configuration], losses: Array, over: str, margin: float | None) -> list[FinalistPair]:
    seeds = losses.shape[1]
    if len(finalists) < 2 or seeds == 0:
        return []
    if seeds < MIN_SEEDS_TO_DECIDE:
        means = losses.mean(axis=(1, 2))
        only = over.replace("1 seeds", "1 seed")
        return [
            FinalistPair(finalists[a], finalists[b], Difference(float(means[b] - means[a]), None, None, seeds, only),
                         ComparisonVerdict.OPEN)
            for a, b in combinations(range(len(finalists)), 2)
        ]  # fmt: skip
    bounds = pair_intervals(losses)
    made = []
    for index, (a, b) in enumerate(bounds.pairs):
        seed_part, item_part = float(bounds.seed_part[index]), float(bounds.item_part[index])
        difference = Difference(
            *(float(bounds.gain[index]), float(bounds.low[index]), float(bounds.high[index]), seeds, over, None),
            *(math.sqrt(seed_part + item_part), float(bounds.seed_df[index]), item_part, float(bounds.item_df[index])),
        )
        made.append(FinalistPair(finalists[a], finalists[b], difference, comparison_verdict(difference, margin)))
    return made


def _of(finalist: Configuration, pairs: Sequence[FinalistPair]) -> list[FinalistPair]:
    return [pair.seen_from(finalist) for pair in pairs if finalist is pair.first or finalist is pair.second]


def _is_beaten(finalist: Configuration, pairs: Sequence[FinalistPair]) -> bool:
    return any(pair.verdict is ComparisonVerdict.WORSE for pair in _of(finalist, pairs))


def margin_unit_of(measure: Measure) -> MarginUnit:
    """Return the unit of a bare number: nats per item for a loss, as in a sweep; else the score's."""
    return MarginUnit.NATS_PER_ITEM if measure.is_loss else MarginUnit.SCORE


def planned_runs(content: Mapping[str, Any]) -> int:
    """Return how many runs ``confirm.json`` will have; those that were predicted not to fit are none."""
    skipped = (content.get("answer") or {}).get("skipped", 0)
    return len(content.get("seeds") or ()) * len(content.get("trials") or ()) - int(skipped)
