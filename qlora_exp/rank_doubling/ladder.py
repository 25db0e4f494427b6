"""Rank doubling: which rank, seed and learning rate to run next. Pure over the trials that have ended, so that a study
that was killed asks what an undisturbed one would have asked.

A doubling r → 2r is decided by :mod:`qlora_exp.analysis.rank` from the test losses of runs with shared seeds. The
learning rate of a rank is chosen before, on the validation loss of pilots, whose seed is in no decision. A run is asked
for once it is surely needed, whatever the runs still under way will show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from qlora_exp.analysis.rank import Comparison, decide_doubling
from qlora_exp.analysis.rule import MOST_SEEDS, StepVerdict
from qlora_exp.analysis.variance import Array
from qlora_exp.config.schema import LrPolicy
from qlora_exp.errors import AnalysisError
from qlora_exp.rank_doubling.settings import (
    RANK,
    RATE,
    SEED,
    SPLIT,
    is_single,
    lr_scale,
    ranks_of,
    rates_of,
    rounded,
    rule_of,
)
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.study.space import point_overrides
from qlora_exp.study.types import LadderSettings, LadderSpec

LadderPoint = dict[str, Any]
"""Axis → value of one trial."""


@dataclass(frozen=True)
class LadderTrial:
    """A trial as the ladder sees it."""

    params: LadderPoint
    ended: bool
    record: RunRecord | None = None
    """``None`` until it has ended, and where it left none."""
    losses: Mapping[str, float] | None = None
    """Item → nats on the test split, sorted by item; ``None`` where it left none."""
    curve: Mapping[int, float] = field(default_factory=dict)
    """Step → training loss, as far as logged."""
    refused: bool = False
    """It was not started: it was predicted not to fit."""

    @property
    def completed(self) -> bool:
        return self.record is not None and self.record.status is Status.COMPLETED


@dataclass(frozen=True)
class Pilot:
    learning_rate: float
    validation_loss: float | None
    """Nats per item; ``None``: the run left none (it diverged, failed, or ran out of memory)."""


@dataclass(frozen=True)
class LearningRateChoice:
    """The learning rate of one rank. ``unresolved``: the best pilot is at the edge of the grid, extended once."""

    rank: int
    learning_rate: float
    unresolved: bool = False
    pilots: tuple[Pilot, ...] = ()


@dataclass(frozen=True)
class LadderState:
    """How far a ladder has come. ``needs``: points that it waits for, running ones included; none: it has ended."""

    needs: tuple[LadderPoint, ...]
    choices: tuple[LearningRateChoice, ...]
    comparisons: tuple[Comparison, ...]
    runs: Mapping[int, tuple[LadderTrial, ...]]
    """Rank → its decision runs that have ended, by seed."""
    trouble: str | None = None
    """Why it ended without an answer."""


def next_point(spec: LadderSpec, trials: Sequence[LadderTrial]) -> LadderPoint | None:
    """What the next trial tries; ``None``: nothing now (see :func:`is_done`).

    The first ladder that has something to ask for goes first, so that a host keeps its base; the others go on while it
    waits for results.
    """
    taken = {_key(trial.params) for trial in trials}
    for one in spec.ladders:
        for point in evaluate_ladder(spec, one, trials).needs:
            if _key(point) not in taken:
                return point
    return None


def is_done(spec: LadderSpec, trials: Sequence[LadderTrial]) -> bool:
    """Whether every ladder has its answer, or can't have one."""
    return not any(evaluate_ladder(spec, one, trials).needs for one in spec.ladders)


def evaluate_ladder(spec: LadderSpec, one: LadderSettings, trials: Sequence[LadderTrial]) -> LadderState:
    """How far one ladder has come by the trials that have ended."""
    walk = _LadderEvaluation(spec, one, trials)
    try:
        comparisons = tuple(walk.steps())
        trouble = None
    except AnalysisError as error:
        comparisons, trouble = tuple(walk.comparisons), error.what
        walk.needs.clear()
    return LadderState(tuple(walk.needs), tuple(walk.choices.values()), comparisons, walk.all_runs(), trouble)


def select_learning_rate(
    spec: LadderSpec, one: LadderSettings, trials: Sequence[LadderTrial], rank: int
) -> tuple[LearningRateChoice | None, tuple[LadderPoint, ...]]:
    """The learning rate of ``rank`` by the pilots that have ended, whatever the ladder would ask for first; and the
    pilots that it still waits for."""
    walk = _LadderEvaluation(spec, one, trials)
    return walk._choose(rank), tuple(walk.needs)


class _LadderEvaluation:
    """One ladder walked from its start, as far as its trials have come."""

    def __init__(self, spec: LadderSpec, one: LadderSettings, trials: Sequence[LadderTrial]) -> None:
        self.spec, self.one = spec, one
        self.trials = {_key(trial.params): trial for trial in trials}
        self.needs: list[LadderPoint] = []
        self.choices: dict[int, LearningRateChoice] = {}
        self.comparisons: list[Comparison] = []
        self.seeds: dict[int, int] = {}
        """Rank → how many seeds it was to be run with, as the walk stands."""

    def steps(self) -> list[Comparison]:
        if is_single(self.spec):
            self._ask_for(self.spec.r_start, self.spec.r_start, self.spec.seeds)
        for smaller, larger in pairwise(ranks_of(self.spec)):
            seen = partial(self._seen, smaller, larger)
            decision = decide_doubling(seen, self.spec.seeds, rule_of(self.spec), self.spec.most_seeds)
            if decision is None:
                break
            self.comparisons.append(Comparison(smaller, larger, decision))
            if decision.verdict is not StepVerdict.CONTINUE:
                break
        return self.comparisons

    def all_runs(self) -> dict[int, tuple[LadderTrial, ...]]:
        return {rank: tuple(self._runs(rank)) for rank in self.seeds if rank in self.choices}

    def _ask_for(self, smaller: int, larger: int, seeds: int) -> None:
        for rank in (smaller, larger):
            self.seeds[rank] = max(self.seeds.get(rank, 0), seeds)
            choice = self.choices.get(rank) or self._choose(rank)
            if choice is not None:
                self.choices[rank] = choice
                for seed in range(self.seeds[rank]):
                    self._ended(self._point(rank, self.spec.first_seed + seed, choice.learning_rate, "test"))

    def _ended(self, point: LadderPoint) -> LadderTrial | None:
        trial = self.trials.get(_key(point))
        if trial is not None and trial.ended:
            return trial
        if point not in self.needs:
            self.needs.append(point)
        return None

    def _point(self, rank: int, seed: int, rate: float, split: str) -> LadderPoint:
        return {**self.one.axes, RANK: rank, SEED: seed, RATE: rate, SPLIT: split}

    # Learning rates.

    def _choose(self, rank: int) -> LearningRateChoice | None:
        """``None``: pilots are still missing."""
        if self.spec.lr_policy == LrPolicy.fixed.value:
            return LearningRateChoice(rank, rounded(self.one.learning_rate))
        if self.spec.lr_policy == LrPolicy.transfer.value and rank != self.spec.r_start:
            start = self.choices.get(self.spec.r_start)
            return start and LearningRateChoice(
                rank, rounded(start.learning_rate * lr_scale(self.spec, self.one, rank))
            )
        return self._searched(rank)

    def _searched(self, rank: int) -> LearningRateChoice | None:
        rates = rates_of(self.spec, self.one, rank)
        pilots = self._pilots(rank, rates)
        if pilots is None:
            return None
        best = self._best(pilots, rank)
        if best in (rates[0], rates[-1]):
            beyond = rates[0] ** 2 / rates[1] if best == rates[0] else rates[-1] ** 2 / rates[-2]
            rates = sorted([*rates, rounded(beyond)])
            pilots = self._pilots(rank, rates)
            if pilots is None:
                return None
            best = self._best(pilots, rank)
        return LearningRateChoice(rank, best, best in (rates[0], rates[-1]), tuple(pilots))

    def _pilots(self, rank: int, rates: Sequence[float]) -> list[Pilot] | None:
        ended = [self._ended(self._point(rank, self.spec.pilot_seed, rate, "validation")) for rate in rates]
        known = [trial for trial in ended if trial is not None]
        if len(known) < len(ended):
            return None
        return [Pilot(rate, _validation_loss(trial)) for rate, trial in zip(rates, known, strict=True)]

    def _best(self, pilots: Sequence[Pilot], rank: int) -> float:
        known = [(pilot.validation_loss, pilot.learning_rate) for pilot in pilots if pilot.validation_loss is not None]
        if not known:
            own = [trial for trial in self.trials.values() if trial.params[RANK] == rank]
            why = _why(own, otherwise="")
            told = f"no pilot at r = {rank} left a validation loss{f': {why}' if why else ''}"
            raise AnalysisError(told, f"r = {rank}")
        return min(known)[1]

    # Decisions.

    def _seen(self, smaller: int, larger: int, seeds: int) -> list[Array] | None:
        """Losses of the ranks so far, these two with ``seeds`` seeds; ``None``: runs are still missing."""
        self._ask_for(smaller, larger, seeds)
        return None if self.needs else list(self._losses([rank for rank in ranks_of(self.spec) if rank <= larger]))

    def _losses(self, ranks: Sequence[int]) -> Iterator[Array]:
        """(MOST_SEEDS, items) for each rank, NaN for a run that doesn't exist; the items in the same order."""
        runs = {rank: list(self._runs(rank)) for rank in ranks}
        whole = [trial for several in runs.values() for trial in several if trial.completed]
        for rank, several in runs.items():
            if not any(trial.completed for trial in several):
                raise AnalysisError(f"no run at r = {rank} completed: {_why(several)}", f"r = {rank}")
        _check_comparable([trial.record for trial in whole if trial.record is not None])
        items = list(whole[0].losses or ())
        for trial in whole:
            if not trial.losses or list(trial.losses) != items:
                run = trial.record.run_id if trial.record else "a run"
                raise AnalysisError(f"the per-item losses of {run} are missing, or are of other items", "test split")
        for several in runs.values():
            losses = np.full((MOST_SEEDS, len(items)), np.nan)
            for row, trial in enumerate(several):
                if trial.completed and trial.losses:
                    losses[row] = list(trial.losses.values())
            yield losses

    def _runs(self, rank: int) -> Iterator[LadderTrial]:
        """The ended decision runs of ``rank``, by seed, as many as it was to be run with."""
        rate = self.choices[rank].learning_rate
        for seed in range(self.seeds[rank]):
            trial = self.trials.get(_key(self._point(rank, self.spec.first_seed + seed, rate, "test")))
            if trial is not None and trial.ended:
                yield trial


def _validation_loss(trial: LadderTrial) -> float | None:
    after = trial.record.scores.after if trial.completed and trial.record else None
    loss = after.loss_per_item if after else None
    return loss if loss is not None and math.isfinite(loss) else None


def _key(point: LadderPoint) -> frozenset[str]:
    return frozenset(point_overrides(point))


def _why(trials: Sequence[LadderTrial], otherwise: str = "they left no record") -> str:
    failures = [trial.record.failure for trial in trials if trial.record is not None]
    told = {f"{failure.kind}: {failure.message.splitlines()[0]}" for failure in failures if failure is not None}
    told |= {"predicted not to fit into memory" for trial in trials if trial.refused}
    return "; ".join(sorted(told)) or otherwise


def _check_comparable(records: Sequence[RunRecord]) -> None:
    """Raises :class:`AnalysisError` with the difference named."""
    told: dict[str, set[str]] = {
        "the data": {record.data.fingerprint for record in records if record.data},
        "the model's files": {record.model_fingerprint for record in records if record.model_fingerprint},
        "the training steps": {str(record.plan.max_steps) for record in records if record.plan},
        "the adapters' type": {record.plan.adapter_dtype for record in records if record.plan},
        "the computing type": {record.plan.compute_dtype for record in records if record.plan},
        "whether a model was trained": {str(record.synthetic) for record in records},
    }
    for what, values in told.items():
        if len(values) > 1:
            raise AnalysisError(f"the ladder's runs differ in {what}: {', '.join(sorted(values))}", "decision runs")
