"""A study in Optuna's storage: one worker at a time runs a trial, and no kill at any moment loses or repeats one.

A trial is RUNNING from its claim on. Its user attributes name the owner and attempt (``claim``) and the owner's last
sign of life (``heartbeat``, Unix seconds). A claim holds the study's lock, so a RUNNING trial without an owner belonged
to a process that died during the claim.

Trial number n's planned parameters (enqueued configurations, then a grid's points) follow from n, so none can be
enqueued twice or lost. The parameters of a ladder's trial follow from the ended trials, and are stored when the trial
is created.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import optuna
from filelock import FileLock
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import Failure, RunRecord, Status
from qlora_exp.study import trials as rows
from qlora_exp.study.distributions import decode_params, encode_value, suggest
from qlora_exp.study.heartbeats import (
    CLAIM,
    FIXED_PARAMS,
    HEARTBEAT,
    INTERRUPTED_ATTEMPTS,
    MEMORY_RETRIES,
    RUN,
    Heartbeats,
    attempt_of,
    interrupted_attempts,
)
from qlora_exp.study.objectives import parse_objective
from qlora_exp.study.open import open_study, rebuild_study
from qlora_exp.study.read_only import read_study
from qlora_exp.study.samplers import ITEMS_ATTRIBUTE
from qlora_exp.study.space import grid, point_overrides
from qlora_exp.study.trial_outcomes import record_outcome
from qlora_exp.study.types import Claim, Counts, Outcome, Owner, StudySpec, TrialRow

if TYPE_CHECKING:
    from qlora_exp.rank_doubling.ladder import LadderTrial


class Study:
    """One study, opened in this process. Make one with :meth:`open`."""

    def __init__(self, spec: StudySpec, paths: StudyPaths, study: optuna.Study) -> None:
        self.spec = spec
        self._paths = paths
        self._study = study
        self._storage = study._storage
        self._heartbeats = Heartbeats()
        self._ended: dict[int, LadderTrial] = {}
        self._done: dict[int, bool] = {}

    @classmethod
    def open(cls, spec: StudySpec, paths: StudyPaths, storage_url: str | None = None) -> Study:
        """Create the study, or open it again; any number of processes may do so at once.

        ``storage_url`` replaces ``spec.storage``, which has no password.

        Raises:
            ConfigError, Problems: the search is invalid.
            StudyError: the database is damaged, or a study of this name exists with different settings.
        """
        study, identity = open_study(spec, paths, storage_url or spec.storage)
        return cls(replace(spec, id=identity), paths, study)

    @classmethod
    def read(cls, spec: StudySpec, paths: StudyPaths, storage_url: str | None = None) -> Study:
        """Open the study for reading: nothing is written, and a read-only disk is enough.

        Raises:
            StudyError: the database is damaged or lost, or holds another study of that name.
        """
        return cls(spec, paths, read_study(spec, storage_url or spec.storage))

    @classmethod
    def rebuild(
        cls, spec: StudySpec, paths: StudyPaths, records: Sequence[RunRecord], storage_url: str | None = None
    ) -> Study:
        """Rebuild the study from its runs' records after its database was damaged or lost.

        A damaged file is kept as ``….damaged-N``. Trials without a record will run again under their numbers. An
        existing study stays as it is.

        Raises:
            as :meth:`open`.
        """
        rebuild_study(spec, paths, records, storage_url or spec.storage)
        return cls.open(spec, paths, storage_url)

    def claim(self, owner: Owner, lease_seconds: float, affordable: Callable[[], bool] = lambda: True) -> Claim | None:
        """Return a trial for ``owner`` to run; ``None``: there is none now, or none any more (see :meth:`counts`).

        First, trials whose process is dead, or silent for ``lease_seconds``, are requeued. ``affordable`` is then
        called while no other process can claim; if it returns False, no trial is claimed.
        """
        with FileLock(self._paths.lock):
            unfinished = self._unfinished()
            lost = [
                (trial, why) for trial in unfinished if (why := self._heartbeats.stale_reason(trial, lease_seconds))
            ]
            for trial, why in lost:
                self._requeue_or_fail(trial, why)
            if not affordable():
                return None
            unfinished = self._unfinished() if lost else unfinished
            waiting = [trial for trial in unfinished if trial.state is TrialState.WAITING]
            if self.spec.ladder is not None:
                return self._start_ladder_trial(waiting, owner)
            if waiting:
                return self._start(waiting[0], owner)
            if not self._all_created():
                return self._start(None, owner)
        return None

    def others_run_trials(self, lease_seconds: float) -> bool:
        """Return whether a living process runs a trial."""
        running = [trial for trial in self._unfinished() if trial.state is TrialState.RUNNING]
        return any(self._heartbeats.stale_reason(trial, lease_seconds) is None for trial in running)

    def set_run(self, claim: Claim, run_id: str) -> None:
        """Store the trial's run, so that later attempts continue it."""
        if self._owned_trial(claim):
            self._storage.set_trial_user_attr(claim.trial_id, RUN, run_id)

    def heartbeat(self, claim: Claim) -> bool:
        """Renew the claim. False: another worker has taken the trial over, and this attempt doesn't count any more."""
        mine = self._owned_trial(claim) is not None
        if mine:
            self._storage.set_trial_user_attr(claim.trial_id, HEARTBEAT, time.time())
        return mine

    def report(self, claim: Claim, step: int, value: float, items: Sequence[float] | None = None) -> bool:
        """Report the objective at ``step``; return whether the trial should be pruned.

        ``items``: losses per item, always of the same items in the same order. The Wilcoxon pruner compares them with
        the best trial's at the same step. Without a pruner nothing is stored.
        """
        if self.spec.pruner == "none" or value != value or not self._owned_trial(claim):
            return False
        if items is not None and self.spec.pruner == "wilcoxon":
            losses = [float(f"{loss:.6g}") for loss in items]
            self._storage.set_trial_user_attr(claim.trial_id, ITEMS_ATTRIBUTE.format(step=step), losses)
        trial = Trial(self._study, claim.trial_id)
        # A killed attempt may have reported this step already.
        if step not in self._storage.get_trial(claim.trial_id).intermediate_values:
            trial.report(value, step)
        return bool(trial.should_prune())  # some pruners return NumPy's bool

    def tell(self, claim: Claim, outcome: Outcome) -> None:
        """Record how the trial ended. A trial that has ended or was taken over stays as it is.

        An interrupted trial waits to be continued, and that attempt doesn't count.
        """
        with FileLock(self._paths.lock):
            trial = self._owned_trial(claim)
            if trial and outcome.status is Status.INTERRUPTED:
                attempts = interrupted_attempts(trial) + 1
                self._storage.set_trial_user_attr(claim.trial_id, INTERRUPTED_ATTEMPTS, attempts)
                self._release(trial)
            elif trial:
                record_outcome(self._study, self.spec, trial, outcome)

    def requeue(self, claim: Claim, why: str) -> bool:
        """Make the trial claimable again, with its number, parameters and run.

        False: no attempt is left (the trial has then failed with ``why``), or this claim doesn't own the trial any
        more.
        """
        with FileLock(self._paths.lock):
            trial = self._owned_trial(claim)
            return trial is not None and self._requeue_or_fail(trial, why)

    def requeue_with_half_micro_batch(self, claim: Claim) -> bool:
        """Make the trial claimable again with half the micro-batch; False: no such retry is left."""
        with FileLock(self._paths.lock):
            trial = self._owned_trial(claim)
            retries = claim.out_of_memory_retries + 1
            if trial is None or retries > self.spec.out_of_memory_retries:
                return False
            self._storage.set_trial_user_attr(claim.trial_id, MEMORY_RETRIES, retries)
            self._release(trial)
            return True

    def counts(self) -> Counts:
        """Return the number of trials by state."""
        trials = self._read()
        done = self.spec.ladder is not None and self._ladder_is_done()
        return rows.counts(trials, len(trials) if done else self._total_trials(trials))

    def consecutive_skips(self, limit_bytes: int | None) -> int:
        """Return how many of the last ended trials in a row were predicted not to fit into ``limit_bytes`` or more.

        ``None``: into any limit. 0 for a grid and a ladder, whose skipped points count as done.
        """
        if self._skips_count:
            return 0
        ended = [trial for trial in reversed(self._read()) if trial.state.is_finished()]
        return sum(1 for _ in itertools.takewhile(lambda trial: rows.is_skipped(trial, limit_bytes), ended))

    def trials(self) -> list[TrialRow]:
        """Return every trial, by number."""
        return [rows.trial_row(trial, self.spec) for trial in self._read()]

    def best(self) -> list[TrialRow]:
        """Return the best completed feasible trial, or the Pareto front of several objectives.

        For a ladder, which no single trial decides, return the runs at the recommended rank.
        """
        if self.spec.ladder is not None:
            return self._recommended()
        return rows.best_rows(self.trials(), [parse_objective(text).direction for text in self.spec.objectives])

    def ladder_trials(self) -> list[LadderTrial]:
        """Return the trials as rank doubling sees them, with what their runs left. Trials without parameters are left
        out."""
        from qlora_exp.rank_doubling.answers import ended_trial
        from qlora_exp.rank_doubling.ladder import LadderTrial

        outputs = OutputPaths(self._paths.folder.parent.parent)
        unfinished: list[LadderTrial] = []
        for trial in self._read():
            if trial.number not in self._ended and (point := self._point(trial)):
                if trial.state.is_finished():
                    ended = ended_trial(point, trial.user_attrs.get(RUN), outputs)
                    self._ended[trial.number] = replace(ended, skipped=rows.is_skipped(trial))
                else:
                    unfinished.append(LadderTrial(point, ended=False))
        return [*self._ended.values(), *unfinished]

    def importances(self) -> dict[str, dict[str, float]]:
        """Return objective → axis → share of its variance, over the completed trials."""
        from qlora_exp.study.importance import importances  # imports scikit-learn

        return importances(self._study, self.spec)

    def failures_reached(self) -> bool:
        """Return whether ``max_failures`` is reached. Only FAIL counts, not out of memory or divergence."""
        limit = self.spec.max_failures
        if limit is None:
            return False
        return self.counts().failed >= (limit if limit >= 1 else max(limit * self.spec.n_trials, 1))

    @cached_property
    def _planned(self) -> list[dict[str, Any]]:
        """Parameters of the first trials, by number: enqueued configurations, then the remaining points of a grid."""
        points = grid(self.spec.axes) if self.spec.sampler == "grid" else []
        return [*self.spec.enqueue, *(point for point in points if point not in self.spec.enqueue)]

    def _read(self) -> list[FrozenTrial]:
        """Return all trials by number; Optuna caches the finished ones."""
        return self._storage.get_all_trials(self._study._study_id, deepcopy=False)

    def _unfinished(self) -> list[FrozenTrial]:
        """Return waiting and running trials by number, without reading each finished one."""
        states = (TrialState.WAITING, TrialState.RUNNING)
        return self._storage.get_all_trials(self._study._study_id, deepcopy=False, states=states)

    def _total_trials(self, trials: Sequence[FrozenTrial]) -> int:
        """Return how many trials the study is to have in all."""
        return self.spec.n_trials + (0 if self._skips_count else rows.count_skipped(trials))

    @property
    def _skips_count(self) -> bool:
        """Whether a point that doesn't fit counts as one of the n_trials; a sampler replaces it instead."""
        return self.spec.sampler in ("grid", "ladder")

    def _all_created(self) -> bool:
        return self._exists(self.spec.n_trials - 1) and self._exists(self._total_trials(self._read()) - 1)

    def _exists(self, last: int) -> bool:
        try:
            self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, last)
        except KeyError:
            return False
        return True

    def _owned_trial(self, claim: Claim) -> FrozenTrial | None:
        trial = self._storage.get_trial(claim.trial_id)
        is_ours = trial.state is TrialState.RUNNING and attempt_of(trial) == claim.attempt
        return trial if is_ours else None

    def _recommended(self) -> list[TrialRow]:
        from qlora_exp.rank_doubling.answers import recommended

        assert self.spec.ladder is not None
        by_point = {frozenset(point_overrides(row.params)): row for row in self.trials() if row.params}
        points = recommended(self.spec.ladder, self.ladder_trials())
        return [by_point[key] for point in points if (key := frozenset(point_overrides(point))) in by_point]

    def _ladder_is_done(self) -> bool:
        """Return whether the ladder has ended. Cached, since it is called often and changes only when a trial ends."""
        from qlora_exp.rank_doubling.ladder import is_done

        assert self.spec.ladder is not None
        trials = self.ladder_trials()
        if len(self._ended) not in self._done:
            self._done[len(self._ended)] = is_done(self.spec.ladder, trials)
        return self._done[len(self._ended)]

    def _start_ladder_trial(self, waiting: Sequence[FrozenTrial], owner: Owner) -> Claim | None:
        from qlora_exp.rank_doubling.ladder import next_point

        assert self.spec.ladder is not None
        with_point = [trial for trial in waiting if self._point(trial)]
        if with_point:
            return self._start(with_point[0], owner)
        trials = self.ladder_trials()
        point = next_point(self.spec.ladder, trials)
        if point is None and waiting and self._ladder_is_done():  # a lost trial that nothing depends on
            for trial in waiting:
                self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        if point is None or (not waiting and self._all_created()):
            return None
        return self._start(waiting[0] if waiting else None, owner, point)

    def _point(self, trial: FrozenTrial) -> dict[str, Any]:
        """Return the parameters of a ladder's trial; empty for a trial that never got any."""
        return decode_params(self.spec.axes, trial.system_attrs.get(FIXED_PARAMS) or trial.params)

    def _start(self, waiting: FrozenTrial | None, owner: Owner, point: Mapping[str, Any] | None = None) -> Claim:
        """Start the waiting trial, or a new one. ``point``: its parameters, if they don't follow from its number."""
        attempt = attempt_of(waiting) + 1 if waiting else 1
        claim_attributes = {CLAIM: {"attempt": attempt, "owner": to_dict(owner)}, HEARTBEAT: time.time()}
        fixed: dict[str, Any] = (
            {FIXED_PARAMS: {key: encode_value(value) for key, value in point.items()}} if point else {}
        )
        if waiting is None:
            template = create_trial(state=TrialState.RUNNING, user_attrs=claim_attributes, system_attrs=fixed)
            trial_id = self._storage.create_new_trial(self._study._study_id, template)
        else:
            trial_id = waiting._trial_id
            for key, value in fixed.items():
                self._storage.set_trial_system_attr(trial_id, key, value)
            for key, value in claim_attributes.items():
                self._storage.set_trial_user_attr(trial_id, key, value)
            self._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        trial = self._storage.get_trial(trial_id)
        params = self._ask(trial)
        return Claim(
            number=trial.number,
            trial_id=trial_id,
            params=params,
            overrides=point_overrides(params),
            attempt=attempt,
            run_id=trial.user_attrs.get(RUN),
            out_of_memory_retries=trial.user_attrs.get(MEMORY_RETRIES, 0),
        )

    def _ask(self, trial: FrozenTrial) -> dict[str, Any]:
        if trial.number < len(self._planned) and FIXED_PARAMS not in trial.system_attrs:
            planned = {key: encode_value(value) for key, value in self._planned[trial.number].items()}
            self._storage.set_trial_system_attr(trial._trial_id, FIXED_PARAMS, planned)
        self._study._thread_local.cached_all_trials = None  # as Study.ask does: samplers see all ended trials
        return suggest(self.spec.axes, Trial(self._study, trial._trial_id))

    def _requeue_or_fail(self, trial: FrozenTrial, why: str) -> bool:
        retries = trial.user_attrs.get(MEMORY_RETRIES, 0) + interrupted_attempts(trial)
        attempt = attempt_of(trial)
        if attempt - retries < self.spec.max_attempts:
            self._release(trial)
            return True
        failure = Failure("AttemptsExhausted", f"{why}; attempt {attempt - retries} of {self.spec.max_attempts}")
        unknown = (None,) * len(self.spec.objectives)
        record_outcome(self._study, self.spec, trial, Outcome(Status.FAILED, unknown, (), None, failure))
        return False

    def _release(self, trial: FrozenTrial) -> None:
        claim_attribute = {"attempt": attempt_of(trial), "owner": None}
        self._storage.set_trial_user_attr(trial._trial_id, CLAIM, claim_attribute)
        self._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
