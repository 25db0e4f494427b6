"""Rank doubling: decide which rank, seed and learning rate to run next.

The functions are pure over the ended trials, so that a killed study continues with the trials that it would have run
otherwise.

:mod:`qlora_exp.analysis.rank_walk` decides each step from the test losses of runs with shared seeds. Before that, pilot
runs choose the learning rate by their validation loss; no decision uses the pilots' seeds. A run is requested as soon
as it is certainly needed, independent of the results of running trials; idle workers start nothing speculative.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import numpy as np

from qlora_exp.analysis.rank import Comparison, RankAnswer
from qlora_exp.analysis.rank_rule import Rule
from qlora_exp.analysis.rank_walk import Walk, walk
from qlora_exp.analysis.variance import Array
from qlora_exp.config.enums import LrPolicy
from qlora_exp.errors import AnalysisError
from qlora_exp.paths import StudyPaths
from qlora_exp.rank_doubling.ladder_trials import LadderTrial, ended_trial, trial_key
from qlora_exp.rank_doubling.learning_rates import LearningRateChoice, best_rate, carried_or_better_rate
from qlora_exp.rank_doubling.margins import start_levels
from qlora_exp.rank_doubling.screening import ladder_after_screening
from qlora_exp.rank_doubling.settings import (
    EDITION,
    RANK,
    RATE,
    SEED,
    SPLIT,
    is_single_rank,
    lr_scale,
    pilot_seeds_of,
    ranks_of,
    rates_of,
    round_rate,
    rule_of,
    seed_plan,
)
from qlora_exp.records.types import RunRecord
from qlora_exp.study.proposer import PlannedProposer, Proposer, TrialPoint, Trials
from qlora_exp.study.types import LadderSettings, LadderSpec, StudySpec, TrialRow

LOSS_UNIT = "nats per item"


@dataclass(frozen=True)
class LadderState:
    """State of one ladder. ``needs``: points that it still waits for, running ones included; empty if it has ended."""

    needs: tuple[TrialPoint, ...]
    choices: tuple[LearningRateChoice, ...]
    walk: Walk | None
    """``None``: a single rank, or the ladder ended without a comparison."""
    runs: Mapping[int, tuple[LadderTrial, ...]]
    """Rank → its ended decision runs, by seed, lost ones included."""
    trouble: str | None = None
    """Why the ladder ended early, or without an answer."""

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        return self.walk.comparisons if self.walk is not None else ()

    @property
    def lost(self) -> list[LadderTrial]:
        """The decision runs that left no result, by rank and seed."""
        return [trial for trials in self.runs.values() for trial in trials if not trial.completed]


def proposer_of(spec: StudySpec, paths: StudyPaths) -> Proposer:
    """Return what decides the study's trials: its ladders, if it has any."""
    return PlannedProposer(spec) if spec.ladder is None else LadderProposer(spec.ladder, paths)


class LadderProposer:
    """Decides a study's trials by its ladders, from the trials that have ended."""

    replaces_skipped = False

    def __init__(self, spec: LadderSpec, paths: StudyPaths) -> None:
        self._spec, self._outputs = spec, paths.outputs
        self._ended: dict[int, LadderTrial] = {}
        self._done: dict[int, bool] = {}
        """Number of ended trials → whether the ladders are done, which only the end of a trial changes."""

    def planned_point(self, number: int) -> TrialPoint:
        return {}

    def next_point(self, trials: Trials) -> TrialPoint | None:
        return next_point(self._spec, self.ladder_trials(trials()))

    def is_done(self, trials: Trials) -> bool:
        known = self.ladder_trials(trials())
        if len(self._ended) not in self._done:
            self._done[len(self._ended)] = is_done(self._spec, known)
        return self._done[len(self._ended)]

    def best(self, trials: Sequence[TrialRow]) -> list[TrialRow]:
        """Return the completed decision runs at the ranks to use now, by ladder and seed."""
        rows = {trial_key(row.params): row for row in trials}
        known, best = self.ladder_trials(trials), []
        for ladder in ladder_after_screening(self._spec, known)[0].ladders:
            state = evaluate_ladder(self._spec, ladder, known)
            rank = use_rank(self._spec, state)
            runs = state.runs.get(rank, ()) if rank is not None else ()
            best += [rows[key] for trial in runs if trial.completed and (key := trial_key(trial.params)) in rows]
        return best

    def ladder_trials(self, trials: Sequence[TrialRow]) -> list[LadderTrial]:
        """Return the trials with what their runs left. Trials without parameters are left out."""
        unfinished: list[LadderTrial] = []
        for row in trials:
            if row.params and row.state in ("WAITING", "RUNNING"):
                unfinished.append(LadderTrial(row.params, ended=False))
            elif row.params and row.number not in self._ended:
                ended = ended_trial(row.params, row.run_id, self._outputs)
                self._ended[row.number] = replace(ended, skipped=row.skipped is not None)
        return [*self._ended.values(), *unfinished]


def next_point(spec: LadderSpec, trials: Sequence[LadderTrial]) -> TrialPoint | None:
    """Return the parameters of the next trial; ``None``: nothing to start now (see :func:`is_done`).

    The first ladder that needs a run goes first, so that a trial process keeps its base model; the others continue
    while it waits for results.
    """
    existing = {trial_key(trial.params) for trial in trials}
    spec, screening = ladder_after_screening(spec, trials)
    screened = screening.needs if screening is not None else ()
    of_ladders = (point for ladder in spec.ladders for point in evaluate_ladder(spec, ladder, trials).needs)
    return next((point for point in chain(screened, of_ladders) if trial_key(point) not in existing), None)


def is_done(spec: LadderSpec, trials: Sequence[LadderTrial]) -> bool:
    """Return whether every ladder has its answer, or has ended without one."""
    spec, screening = ladder_after_screening(spec, trials)
    if screening is not None and screening.needs:
        return False
    return not any(evaluate_ladder(spec, ladder, trials).needs for ladder in spec.ladders)


def evaluate_ladder(spec: LadderSpec, ladder: LadderSettings, trials: Sequence[LadderTrial]) -> LadderState:
    """Return the state of one ladder, computed from the ended trials."""
    return _LadderEvaluation(spec, ladder, trials).evaluate()


def rank_answer(spec: LadderSpec, state: LadderState) -> RankAnswer | None:
    """Return the ladder's answer so far; ``None`` before its first look."""
    return state.walk.answer(seed_plan(spec), LOSS_UNIT) if state.walk is not None else None


def use_rank(spec: LadderSpec, state: LadderState) -> int | None:
    """Return the rank to use now; ``None``: no two ranks have been compared yet.

    If the ladder ended because all runs of a larger rank were lost, it is the smallest rank that was run.
    """
    answer = rank_answer(spec, state)
    if answer is not None:
        return answer.use_rank
    completed = [rank for rank, trials in state.runs.items() if any(trial.completed for trial in trials)]
    return min(completed) if completed and state.trouble is not None else None


def select_learning_rate(
    spec: LadderSpec, ladder: LadderSettings, trials: Sequence[LadderTrial], rank: int
) -> tuple[LearningRateChoice | None, tuple[TrialPoint, ...]]:
    """Return the learning rate of ``rank`` from its ended pilots, and the pilots that are still missing.

    Unlike :func:`evaluate_ladder` this doesn't depend on the lower ranks' results.
    """
    evaluation = _LadderEvaluation(spec, ladder, trials)
    return evaluation._choose_learning_rate(rank), tuple(evaluation.needs)


class _LadderEvaluation:
    """Evaluates one ladder from its first rank, as far as its ended trials allow."""

    def __init__(self, spec: LadderSpec, ladder: LadderSettings, trials: Sequence[LadderTrial]) -> None:
        self.spec, self.one = spec, ladder
        self.trials = {trial_key(trial.params): trial for trial in trials}
        self.needs: list[TrialPoint] = []
        self.choices: dict[int, LearningRateChoice] = {}
        self.seeds: dict[int, int] = {}
        """Rank → number of seeds that the evaluation has requested so far."""
        self.without_result: set[int] = set()
        """Ranks all of whose runs were lost."""

    def evaluate(self) -> LadderState:
        walked, trouble = None, None
        try:
            if is_single_rank(self.spec):
                self._request_runs(self.spec.r_start, self.spec.seeds)
            else:
                walked, trouble = self._walk()
        except AnalysisError as error:
            trouble = error.what
            self.needs.clear()
        runs = {rank: tuple(self._runs(rank)) for rank in sorted(self.seeds) if rank in self.choices}
        choices = tuple(choice for _, choice in sorted(self.choices.items()))
        return LadderState(tuple(self.needs), choices, walked, runs, trouble)

    def _walk(self) -> tuple[Walk, str | None]:
        """Return the walk over the ranks that can be run, and why it ends before r_max if a rank leaves no result."""
        ranks, trouble = ranks_of(self.spec), None
        while True:
            try:
                probe = self.spec.edition >= EDITION
                found = walk(ranks, seed_plan(self.spec), self._rule, self._requested_losses, probe)
                # The losses have ranks from before a restart, too.
                return replace(found, requested={**self.seeds, **found.requested}), trouble
            except _NoResultError as error:
                ranks, trouble = [rank for rank in ranks if rank < error.rank], error.what
                self.without_result.add(error.rank)
                if len(ranks) < 2:
                    raise

    def _rule(self, losses: Mapping[int, Array]) -> Rule:
        return rule_of(self.spec, start_levels(self.spec, {rank: list(self._runs(rank)) for rank in losses}))

    def _request_runs(self, rank: int, seeds: int) -> None:
        self.seeds[rank] = max(self.seeds.get(rank, 0), seeds)
        choice = self.choices.get(rank) or self._choose_learning_rate(rank)
        if choice is not None:
            self.choices[rank] = choice
            for seed in range(self.seeds[rank]):
                self._ended(self._point(rank, self.spec.first_seed + seed, choice.learning_rate, "test"))

    def _ended(self, point: TrialPoint) -> LadderTrial | None:
        trial = self.trials.get(trial_key(point))
        if trial is not None and trial.ended:
            return trial
        if point not in self.needs:
            self.needs.append(point)
        return None

    def _point(self, rank: int, seed: int, rate: float, split: str) -> TrialPoint:
        return {**self.one.axes, RANK: rank, SEED: seed, RATE: rate, SPLIT: split}

    # Learning rates.

    def _choose_learning_rate(self, rank: int) -> LearningRateChoice | None:
        """Return the rank's learning rate; ``None``: pilots are still missing."""
        spec, scale = self.spec, lr_scale(self.spec, self.one, rank)
        if spec.lr_policy == LrPolicy.fixed.value:
            return LearningRateChoice(rank, round_rate(self.one.learning_rate))
        seeds, pilot_run = pilot_seeds_of(spec), partial(self._pilot, rank)
        alone = spec.lr_policy == LrPolicy.search.value and spec.edition < EDITION
        if rank == spec.r_start or alone:
            rates = self._in_order(rates_of(spec, self.one, rank), self.one.learning_rate * scale)
            return best_rate(rank, rates, seeds, pilot_run)
        start = self.choices.get(spec.r_start) or self._choose_learning_rate(spec.r_start)
        if start is None:
            return None
        self.choices[spec.r_start] = start
        carried = round_rate(start.learning_rate * scale)
        if spec.lr_policy == LrPolicy.carry.value:
            return LearningRateChoice(rank, carried, carried=carried)
        around = [round_rate(carried * factor) for factor in spec.lr_factors]
        return carried_or_better_rate(rank, carried, self._in_order(around, carried), seeds, pilot_run)

    def _pilot(self, rank: int, rate: float, seed: int) -> LadderTrial | None:
        return self._ended(self._point(rank, seed, rate, "validation"))

    def _in_order(self, rates: Sequence[float], centre: float) -> list[float]:
        """Return the rates in the order in which their pilots start: if they can be stopped, the centre comes first,
        because it is the best one most often, and the others are compared with it."""
        if not self.spec.stop_pilots:
            return list(rates)
        return sorted(rates, key=lambda rate: (abs(math.log(rate / centre)), rate))

    # Decisions.

    def _requested_losses(self, seeds: Mapping[int, int]) -> dict[int, Array] | None:
        """Request runs, rank → seeds, and return the losses of all ranks requested so far; ``None``: runs are
        missing."""
        for rank, number in seeds.items():
            self._request_runs(rank, number)
        return None if self.needs else self._losses(sorted(self.seeds.keys() - self.without_result))

    def _losses(self, ranks: Sequence[int]) -> dict[int, Array]:
        """Return an array (max_seeds, items) for each rank, NaN for missing runs; items have the same order in all."""
        runs = {rank: list(self._runs(rank)) for rank in ranks}
        completed = [trial for trials in runs.values() for trial in trials if trial.completed]
        for rank, trials in runs.items():
            if not any(trial.completed for trial in trials):
                raise _NoResultError(rank, trials)
        _check_comparable([trial.record for trial in completed if trial.record is not None])
        items = list(completed[0].losses or ())
        for trial in completed:
            if not trial.losses or list(trial.losses) != items:
                run = trial.record.run_id if trial.record else "a run"
                raise AnalysisError(f"the per-item losses of {run} are missing, or belong to other items", "test split")
        losses = {rank: np.full((self.spec.max_seeds, len(items)), np.nan) for rank in ranks}
        for rank, trials in runs.items():
            for trial in trials:
                if trial.completed and trial.losses:
                    losses[rank][trial.params[SEED] - self.spec.first_seed] = list(trial.losses.values())
        return losses

    def _runs(self, rank: int) -> Iterator[LadderTrial]:
        """Yield the ended decision runs of ``rank``, by seed, up to the requested number of seeds."""
        rate = self.choices[rank].learning_rate
        for seed in range(self.seeds[rank]):
            trial = self.trials.get(trial_key(self._point(rank, self.spec.first_seed + seed, rate, "test")))
            if trial is not None and trial.ended:
                yield trial


class _NoResultError(AnalysisError):
    """All requested runs of a rank have ended, and none left a result."""

    def __init__(self, rank: int, trials: Sequence[LadderTrial]) -> None:
        self.rank = rank
        causes = "; ".join(sorted({trial.cause for trial in trials if trial.cause is not None}))
        super().__init__(f"no run at r = {rank} completed: {causes}", f"r = {rank}")


def _check_comparable(records: Sequence[RunRecord]) -> None:
    """Raise :class:`AnalysisError` that names the difference, if the runs can't be compared."""
    values_by_topic: dict[str, set[str]] = {
        "the data": {record.data.fingerprint for record in records if record.data},
        "the model files": {record.model_fingerprint for record in records if record.model_fingerprint},
        "the training steps": {str(record.plan.max_steps) for record in records if record.plan},
        "the adapter dtype": {record.plan.adapter_dtype for record in records if record.plan},
        "the compute dtype": {record.plan.compute_dtype for record in records if record.plan},
        "whether a model was trained": {str(record.synthetic) for record in records},
    }
    for topic, values in values_by_topic.items():
        if len(values) > 1:
            raise AnalysisError(f"the ladder's runs differ in {topic}: {', '.join(sorted(values))}", "decision runs")
