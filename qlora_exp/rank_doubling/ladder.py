"""Rank doubling: decide which rank, seed and learning rate to run next.

The functions are pure over the ended trials, so that a killed study continues with the trials that it would have run
otherwise.

:mod:`qlora_exp.analysis.rank` decides each doubling r → 2r from the test losses of runs with shared seeds. Before that,
pilot runs choose the rank's learning rate by their validation loss; no decision uses the pilots' seed. A run is
requested as soon as it is certainly needed, independent of the results of running trials.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import numpy as np

from qlora_exp.analysis.pilots import is_behind
from qlora_exp.analysis.rank import Comparison, answer, decide_doubling
from qlora_exp.analysis.rank_rule import MAX_SEEDS, StepVerdict
from qlora_exp.analysis.variance import Array
from qlora_exp.config.schema import LrPolicy
from qlora_exp.errors import AnalysisError, RecordError
from qlora_exp.paths import OutputPaths, RunPaths, StudyPaths
from qlora_exp.rank_doubling.settings import (
    RANK,
    RATE,
    SEED,
    SPLIT,
    is_single_rank,
    lr_scale,
    ranks_of,
    rates_of,
    round_rate,
    rule_of,
)
from qlora_exp.records.files import read_curve, read_record, training_losses
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.study.proposer import PlannedProposer, Proposer, TrialPoint, Trials
from qlora_exp.study.space import point_overrides
from qlora_exp.study.types import LadderSettings, LadderSpec, StudySpec, TrialRow

LOSS_UNIT = "nats per item"


@dataclass(frozen=True)
class LadderTrial:
    """One trial of the study, with what the ladder uses of its run."""

    params: TrialPoint
    ended: bool
    record: RunRecord | None = None
    """``None`` until the trial has ended, and if its run left no record."""
    losses: Mapping[str, float] | None = None
    """Item → nats on the test split, sorted by item; ``None`` if the run left none."""
    curve: Mapping[int, float] = field(default_factory=dict)
    """Step → training loss, for the logged steps."""
    skipped: bool = False
    """The trial was not started because it was predicted not to fit into memory."""

    @property
    def completed(self) -> bool:
        return self.record is not None and self.record.status is Status.COMPLETED


@dataclass(frozen=True)
class Pilot:
    """One pilot run of a learning rate."""

    learning_rate: float
    validation_loss: float | None
    """Nats per item; ``None`` if the run left no loss (stopped early, diverged, failed, or out of memory)."""
    training_loss: float | None = None
    """Nats per token at the step at which pilots are compared; ``None`` unless ``sweep.ladder.stop_pilots``."""
    behind: bool = False
    """The training loss is clearly behind another pilot's. The run was stopped early. If the other one ran later, it
    was completed, but isn't chosen either: the choice depends on the losses, not on the order of the runs."""


@dataclass(frozen=True)
class LearningRateChoice:
    """The learning rate of one rank. ``unresolved``: the best pilot is still at the edge of the grid after one
    extension."""

    rank: int
    learning_rate: float
    unresolved: bool = False
    pilots: tuple[Pilot, ...] = ()


@dataclass(frozen=True)
class LadderState:
    """State of one ladder. ``needs``: points that it still waits for, running ones included; empty if it has ended."""

    needs: tuple[TrialPoint, ...]
    choices: tuple[LearningRateChoice, ...]
    comparisons: tuple[Comparison, ...]
    runs: Mapping[int, tuple[LadderTrial, ...]]
    """Rank → its ended decision runs, by seed."""
    trouble: str | None = None
    """Why the ladder ended without an answer."""


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
        """Return the completed decision runs at the recommended ranks, by ladder and seed."""
        rows = {_key(row.params): row for row in trials}
        known, best = self.ladder_trials(trials), []
        for ladder in self._spec.ladders:
            state = evaluate_ladder(self._spec, ladder, known)
            if state.comparisons and not state.needs:
                rank = answer(state.comparisons, rule_of(self._spec), LOSS_UNIT).recommended_rank
                runs = state.runs.get(rank, ()) if rank is not None else ()
                best += [rows[key] for trial in runs if trial.completed and (key := _key(trial.params)) in rows]
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


def ladder_trials(records: Sequence[RunRecord], outputs: OutputPaths) -> list[LadderTrial]:
    """Return the ended trials of a study from its runs' records: enough to compute the answer again without the
    database."""
    ended = [record for record in records if record.status not in (Status.RUNNING, Status.INTERRUPTED)]
    return [ended_trial(record.trial.params, record.run_id, outputs) for record in ended if record.trial is not None]


def ended_trial(params: TrialPoint, run_id: str | None, outputs: OutputPaths) -> LadderTrial:
    """Return the ended trial with what its run left on disk."""
    record, losses, curve = None, None, {}
    if run_id is not None:
        paths = outputs.run(run_id)
        with contextlib.suppress(RecordError):
            record = read_record(paths.record)
        if record is not None and params.get(SPLIT) == "test":
            losses = _test_losses(paths)
            curve = training_losses(read_curve(paths.curve))
    return LadderTrial(params, ended=True, record=record, losses=losses, curve=curve)


def _test_losses(paths: RunPaths) -> dict[str, float] | None:
    """Return item → nats, sorted by item; ``None`` if the file is missing or can't be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(paths.items("after", "test"), columns=["item_id", "loss_sum_nats"])
    except (OSError, pa.ArrowException):
        return None
    return dict(sorted(zip(table["item_id"].to_pylist(), table["loss_sum_nats"].to_pylist(), strict=True)))


def next_point(spec: LadderSpec, trials: Sequence[LadderTrial]) -> TrialPoint | None:
    """Return the parameters of the next trial; ``None``: nothing to start now (see :func:`is_done`).

    The first ladder that needs a run goes first, so that a trial process keeps its base model; the others continue
    while it waits for results.
    """
    existing = {_key(trial.params) for trial in trials}
    for ladder in spec.ladders:
        for point in evaluate_ladder(spec, ladder, trials).needs:
            if _key(point) not in existing:
                return point
    return None


def is_done(spec: LadderSpec, trials: Sequence[LadderTrial]) -> bool:
    """Return whether every ladder has its answer, or has ended without one."""
    return not any(evaluate_ladder(spec, ladder, trials).needs for ladder in spec.ladders)


def evaluate_ladder(spec: LadderSpec, ladder: LadderSettings, trials: Sequence[LadderTrial]) -> LadderState:
    """Return the state of one ladder, computed from the ended trials."""
    evaluation = _LadderEvaluation(spec, ladder, trials)
    try:
        comparisons = tuple(evaluation.steps())
        trouble = None
    except AnalysisError as error:
        comparisons, trouble = tuple(evaluation.comparisons), error.what
        evaluation.needs.clear()
    return LadderState(
        tuple(evaluation.needs), tuple(evaluation.choices.values()), comparisons, evaluation.all_runs(), trouble
    )


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
        self.trials = {_key(trial.params): trial for trial in trials}
        self.needs: list[TrialPoint] = []
        self.choices: dict[int, LearningRateChoice] = {}
        self.comparisons: list[Comparison] = []
        self.seeds: dict[int, int] = {}
        """Rank → number of seeds that the evaluation has requested so far."""

    def steps(self) -> list[Comparison]:
        if is_single_rank(self.spec):
            self._request_runs(self.spec.r_start, self.spec.r_start, self.spec.seeds)
        for smaller, larger in pairwise(ranks_of(self.spec)):
            losses = partial(self._seen, smaller, larger)
            decision = decide_doubling(losses, self.spec.seeds, rule_of(self.spec), self.spec.max_seeds)
            if decision is None:
                break
            self.comparisons.append(Comparison(smaller, larger, decision))
            if decision.verdict is not StepVerdict.CONTINUE:
                break
        return self.comparisons

    def all_runs(self) -> dict[int, tuple[LadderTrial, ...]]:
        return {rank: tuple(self._runs(rank)) for rank in self.seeds if rank in self.choices}

    def _request_runs(self, smaller: int, larger: int, seeds: int) -> None:
        for rank in (smaller, larger):
            self.seeds[rank] = max(self.seeds.get(rank, 0), seeds)
            choice = self.choices.get(rank) or self._choose_learning_rate(rank)
            if choice is not None:
                self.choices[rank] = choice
                for seed in range(self.seeds[rank]):
                    self._ended(self._point(rank, self.spec.first_seed + seed, choice.learning_rate, "test"))

    def _ended(self, point: TrialPoint) -> LadderTrial | None:
        trial = self.trials.get(_key(point))
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
        if self.spec.lr_policy == LrPolicy.fixed.value:
            return LearningRateChoice(rank, round_rate(self.one.learning_rate))
        if self.spec.lr_policy == LrPolicy.transfer.value and rank != self.spec.r_start:
            start = self.choices.get(self.spec.r_start)
            return start and LearningRateChoice(
                rank, round_rate(start.learning_rate * lr_scale(self.spec, self.one, rank))
            )
        return self._search_learning_rate(rank)

    def _search_learning_rate(self, rank: int) -> LearningRateChoice | None:
        """Return the best pilot's learning rate. If it is at the edge of the grid, one rate beyond the edge is run,
        too."""
        rates = rates_of(self.spec, self.one, rank)
        extended = False
        while True:
            trials = {}
            for rate in self._in_order(rates, rank):
                trials[rate] = self._ended(self._point(rank, self.spec.pilot_seed, rate, "validation"))
            ended = {rate: trial for rate in rates if (trial := trials[rate]) is not None}
            if len(ended) < len(rates):
                return None
            pilots = _pilots(ended)
            best = self._best(pilots, rank)
            at_edge = best in (rates[0], rates[-1])
            if extended or not at_edge:
                return LearningRateChoice(rank, best, at_edge, tuple(pilots))
            beyond = rates[0] ** 2 / rates[1] if best == rates[0] else rates[-1] ** 2 / rates[-2]
            rates, extended = sorted([*rates, round_rate(beyond)]), True

    def _in_order(self, rates: Sequence[float], rank: int) -> list[float]:
        """Return the rates in the order in which their pilots start: if they can be stopped, the centre comes first,
        because it is the best one most often, and the others are compared with it."""
        if not self.spec.stop_pilots:
            return list(rates)
        centre = self.one.learning_rate * lr_scale(self.spec, self.one, rank)
        return sorted(rates, key=lambda rate: (abs(math.log(rate / centre)), rate))

    def _best(self, pilots: Sequence[Pilot], rank: int) -> float:
        kept = [pilot for pilot in pilots if not pilot.behind]
        known = [(loss, pilot.learning_rate) for pilot in kept if (loss := pilot.validation_loss) is not None]
        if not known:  # all others failed, among them the one because of which these were stopped
            known = [(loss, pilot.learning_rate) for pilot in kept if (loss := pilot.training_loss) is not None]
        if not known:
            of_rank = [trial for trial in self.trials.values() if trial.params[RANK] == rank]
            reason = _failure_reasons(of_rank, otherwise="")
            message = f"no pilot at r = {rank} left a validation loss{f': {reason}' if reason else ''}"
            raise AnalysisError(message, f"r = {rank}")
        return min(known)[1]

    # Decisions.

    def _seen(self, smaller: int, larger: int, seeds: int) -> list[Array] | None:
        """Return the losses of the ranks up to ``larger``, with ``seeds`` seeds for this doubling; ``None``: runs are
        missing."""
        self._request_runs(smaller, larger, seeds)
        return None if self.needs else list(self._losses([rank for rank in ranks_of(self.spec) if rank <= larger]))

    def _losses(self, ranks: Sequence[int]) -> Iterator[Array]:
        """Yield an array (MOST_SEEDS, items) for each rank, NaN for missing runs; items have the same order in all."""
        runs = {rank: list(self._runs(rank)) for rank in ranks}
        completed = [trial for trials in runs.values() for trial in trials if trial.completed]
        for rank, trials in runs.items():
            if not any(trial.completed for trial in trials):
                raise AnalysisError(f"no run at r = {rank} completed: {_failure_reasons(trials)}", f"r = {rank}")
        _check_comparable([trial.record for trial in completed if trial.record is not None])
        items = list(completed[0].losses or ())
        for trial in completed:
            if not trial.losses or list(trial.losses) != items:
                run = trial.record.run_id if trial.record else "a run"
                raise AnalysisError(f"the per-item losses of {run} are missing, or belong to other items", "test split")
        for trials in runs.values():
            losses = np.full((MAX_SEEDS, len(items)), np.nan)
            for row, trial in enumerate(trials):
                if trial.completed and trial.losses:
                    losses[row] = list(trial.losses.values())
            yield losses

    def _runs(self, rank: int) -> Iterator[LadderTrial]:
        """Yield the ended decision runs of ``rank``, by seed, up to the requested number of seeds."""
        rate = self.choices[rank].learning_rate
        for seed in range(self.seeds[rank]):
            trial = self.trials.get(_key(self._point(rank, self.spec.first_seed + seed, rate, "test")))
            if trial is not None and trial.ended:
                yield trial


def _pilots(trials: Mapping[float, LadderTrial]) -> list[Pilot]:
    """Return the ended pilots of a rank, by learning rate. Pilots that failed are compared with none."""
    losses = {rate: _training_loss(trial) for rate, trial in trials.items()}
    known = [loss for loss in losses.values() if loss is not None]
    return [
        Pilot(rate, _validation_loss(trial), loss := losses[rate], loss is not None and is_behind(loss, known))
        for rate, trial in trials.items()
    ]


def _training_loss(trial: LadderTrial) -> float | None:
    """Return a pilot's loss at the step of comparison; ``None`` if it isn't known or the run failed."""
    training = trial.record.training if trial.record is not None else None
    if trial.record is None or training is None or training.pilot_loss is None:
        return None
    return training.pilot_loss.loss if trial.record.status in (Status.COMPLETED, Status.PRUNED) else None


def _validation_loss(trial: LadderTrial) -> float | None:
    after = trial.record.scores.after if trial.completed and trial.record else None
    loss = after.loss_per_item if after else None
    return loss if loss is not None and math.isfinite(loss) else None


def _key(point: TrialPoint) -> frozenset[str]:
    return frozenset(point_overrides(point))


def _failure_reasons(trials: Sequence[LadderTrial], otherwise: str = "they left no record") -> str:
    failures = [trial.record.failure for trial in trials if trial.record is not None]
    reasons = {f"{failure.kind}: {failure.message.splitlines()[0]}" for failure in failures if failure is not None}
    reasons |= {"predicted not to fit into memory" for trial in trials if trial.skipped}
    return "; ".join(sorted(reasons)) or otherwise


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
