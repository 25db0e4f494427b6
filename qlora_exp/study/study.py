"""A study in Optuna's storage: one worker at a time runs a trial, and no kill at any moment loses or repeats one.

A trial is RUNNING from its claim on. Its user attributes name the owner and attempt (``claim``) and the owner's last
sign of life (``heartbeat``, Unix seconds). A claim holds the study's lock, so a RUNNING trial without an owner belonged
to a process that died during the claim.

A :class:`~qlora_exp.study.proposer.Proposer` decides the trials. What it plans for trial number n follows from n, so
no point can be lost or used twice. What it decides from the ended trials is stored when the trial is created.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import optuna
from filelock import FileLock
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from qlora_exp.paths import StudyPaths
from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import Failure, Status
from qlora_exp.study.distributions import decode_params, encode_value, suggest
from qlora_exp.study.heartbeats import Heartbeats
from qlora_exp.study.objectives import importances
from qlora_exp.study.open import open_study, read_study
from qlora_exp.study.pilot_pruner import may_stop
from qlora_exp.study.proposer import PlannedProposer, Proposer, TrialPoint
from qlora_exp.study.samplers import ITEMS_ATTRIBUTE
from qlora_exp.study.space import point_overrides
from qlora_exp.study.trials import (
    CLAIM,
    FIXED_PARAMS,
    HEARTBEAT,
    INTERRUPTED_ATTEMPTS,
    MEMORY_RETRIES,
    RUN,
    attempt_of,
    counts_of,
    interrupted_attempts,
    is_skipped,
    record_outcome,
    trial_row,
)
from qlora_exp.study.types import Claim, Counts, Outcome, Owner, StudySpec, TrialRow


class Study:
    """One study, opened in this process. Make one with :meth:`open`."""

    def __init__(self, spec: StudySpec, paths: StudyPaths, proposer: Proposer | None, study: optuna.Study) -> None:
        self.spec = spec
        self._paths = paths
        self._proposer = proposer or PlannedProposer(spec)
        self._study = study
        self._storage = study._storage
        self._heartbeats = Heartbeats()

    @classmethod
    def open(
        cls, spec: StudySpec, paths: StudyPaths, proposer: Proposer | None = None, storage_url: str | None = None
    ) -> Study:
        """Create the study, or open it again; any number of processes may do so at once.

        ``proposer`` decides the trials; without one, enqueued configurations, the grid and the sampler do.
        ``storage_url`` replaces ``spec.storage``, which has no password.

        Raises:
            ConfigError, Problems: the search is invalid.
            StudyError: the database is damaged, or a study of this name exists with different settings.
        """
        study, identity = open_study(spec, paths, storage_url or spec.storage)
        return cls(replace(spec, id=identity), paths, proposer, study)

    @classmethod
    def read(
        cls, spec: StudySpec, paths: StudyPaths, proposer: Proposer | None = None, storage_url: str | None = None
    ) -> Study:
        """Open the study for reading: nothing is written, and a read-only disk is enough.

        Raises:
            StudyError: the database is damaged or lost, or holds another study of that name.
        """
        return cls(spec, paths, proposer, read_study(spec, storage_url or spec.storage))

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
            if not waiting and self._all_created():
                return None
            candidates: Sequence[FrozenTrial | None] = waiting or [None]
            for candidate in candidates:
                has_point = candidate is not None and self._point(candidate)
                point = {} if has_point else self._proposer.next_point(self._created_trials)
                if point is not None:
                    return self._start(candidate, owner, point)
            if waiting and self._proposer.is_done(self._created_trials):
                for trial in waiting:  # nothing depends on it
                    self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
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
        """Report the objective at ``step``, or a pilot's training loss; return whether the trial should be pruned.

        ``items``: losses per item, always of the same items in the same order. The Wilcoxon pruner compares them with
        the best trial's at the same step. Without a pruner nothing is stored.
        """
        if value != value or not self._owned_trial(claim):
            return False
        if may_stop(self.spec.ladder, claim.params):
            return self._report_pilot(claim, step, value)
        if self.spec.pruner == "none":
            return False
        if items is not None and self.spec.pruner == "wilcoxon":
            losses = [float(f"{loss:.6g}") for loss in items]
            self._storage.set_trial_user_attr(claim.trial_id, ITEMS_ATTRIBUTE.format(step=step), losses)
        trial = Trial(self._study, claim.trial_id)
        # A killed attempt may have reported this step already.
        if step not in self._storage.get_trial(claim.trial_id).intermediate_values:
            trial.report(value, step)
        return bool(trial.should_prune())  # some pruners return NumPy's bool

    def _report_pilot(self, claim: Claim, step: int, value: float) -> bool:
        """As Optuna's ``report`` and ``should_prune``, which refuse a study with several objectives. No pilot is
        stopped by an objective."""
        if step not in self._storage.get_trial(claim.trial_id).intermediate_values:
            self._storage.set_trial_intermediate_value(claim.trial_id, step, value)
        return self._study.pruner.prune(self._study, self._storage.get_trial(claim.trial_id))

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
        done = self._proposer.is_done(self._created_trials)
        return counts_of(trials, len(trials) if done else self._total_trials(trials))

    def consecutive_skips(self, limit_bytes: int | None) -> int:
        """Return how many of the last ended trials in a row were predicted not to fit into ``limit_bytes`` or more.

        ``None``: into any limit. 0 for a grid and a ladder, whose skipped points count as done.
        """
        if not self._proposer.replaces_skipped:
            return 0
        ended = [trial for trial in reversed(self._read()) if trial.state.is_finished()]
        return sum(1 for _ in itertools.takewhile(lambda trial: is_skipped(trial, limit_bytes), ended))

    def trials(self) -> list[TrialRow]:
        """Return every trial, by number."""
        return [trial_row(trial, self.spec) for trial in self._read()]

    def best(self) -> list[TrialRow]:
        """Return the best completed feasible trial, or the Pareto front of several objectives.

        For a ladder, which no single trial decides, return the runs at the recommended rank.
        """
        return self._proposer.best(self.trials())

    def importances(self) -> dict[str, dict[str, float]]:
        """Return objective → axis → share of its variance, over the completed trials."""
        return importances(self._study, self.spec)

    def failures_reached(self) -> bool:
        """Return whether ``max_failures`` is reached. Only FAIL counts, not out of memory or divergence."""
        limit = self.spec.max_failures
        if limit is None:
            return False
        return self.counts().failed >= (limit if limit >= 1 else max(limit * self.spec.n_trials, 1))

    def _read(self) -> list[FrozenTrial]:
        """Return all trials by number; Optuna caches the finished ones."""
        return self._storage.get_all_trials(self._study._study_id, deepcopy=False)

    def _unfinished(self) -> list[FrozenTrial]:
        """Return waiting and running trials by number, without reading each finished one."""
        states = (TrialState.WAITING, TrialState.RUNNING)
        return self._storage.get_all_trials(self._study._study_id, deepcopy=False, states=states)

    def _total_trials(self, trials: Sequence[FrozenTrial]) -> int:
        """Return how many trials the study is to have in all."""
        return self.spec.n_trials + (sum(map(is_skipped, trials)) if self._proposer.replaces_skipped else 0)

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

    def _created_trials(self) -> list[TrialRow]:
        """Return every trial with the parameters that it was created with, even if it has not been sampled yet."""
        return [replace(trial_row(trial, self.spec), params=self._point(trial)) for trial in self._read()]

    def _point(self, trial: FrozenTrial) -> TrialPoint:
        """Return the trial's parameters; empty if its worker died before it got any."""
        return decode_params(self.spec.axes, trial.system_attrs.get(FIXED_PARAMS) or trial.params)

    def _start(self, waiting: FrozenTrial | None, owner: Owner, point: TrialPoint) -> Claim:
        """Start the waiting trial, or a new one. ``point``: parameters that don't follow from its number."""
        attempt = attempt_of(waiting) + 1 if waiting else 1
        claim_attributes = {CLAIM: {"attempt": attempt, "owner": to_dict(owner)}, HEARTBEAT: time.time()}
        fixed: dict[str, Any] = {FIXED_PARAMS: _encoded(point)} if point else {}
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
        planned = self._proposer.planned_point(trial.number)
        if planned and FIXED_PARAMS not in trial.system_attrs:
            self._storage.set_trial_system_attr(trial_id, FIXED_PARAMS, _encoded(planned))
        self._study._thread_local.cached_all_trials = None  # as Study.ask does: samplers see all ended trials
        params = suggest(self.spec.axes, Trial(self._study, trial_id))
        return Claim(
            number=trial.number,
            trial_id=trial_id,
            params=params,
            overrides=point_overrides(params),
            attempt=attempt,
            run_id=trial.user_attrs.get(RUN),
            out_of_memory_retries=trial.user_attrs.get(MEMORY_RETRIES, 0),
        )

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


def _encoded(point: TrialPoint) -> dict[str, Any]:
    return {key: encode_value(value) for key, value in point.items()}
