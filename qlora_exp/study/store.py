"""A study in Optuna's storage: who runs which trial, exactly once, whatever is killed when.

A trial is RUNNING from its claim on; its user attributes say who claimed it for which attempt (``claim``) and when that
process was last heard of (``heartbeat``, Unix seconds). Whoever claims holds the study's lock, so a RUNNING trial
without an owner was left by a process that died while it asked. What trial number n tries first (enqueued
configurations, then a grid's points) follows from n, so nothing can be enqueued twice or be lost. What a ladder's trial
tries follows from the trials that have ended, and is kept in the trial from its creation on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import optuna
from filelock import FileLock
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from qlora_exp.environment import alive
from qlora_exp.errors import StudyError
from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.records import Failure, Process, RunRecord, Status, from_dict, to_dict, write_text
from qlora_exp.study import rows
from qlora_exp.study.distributions import decoded_params, encoded, suggest
from qlora_exp.study.history import earlier_trials, trials_of_records
from qlora_exp.study.importance import importances
from qlora_exp.study.objectives import parse_objective
from qlora_exp.study.samplers import ITEMS_ATTRIBUTE, check_search, make_pruner, make_sampler
from qlora_exp.study.space import grid, overrides_of
from qlora_exp.study.storage import check_whole, connect, damaged, set_aside, sqlite_file
from qlora_exp.study.types import Claim, Counts, Outcome, Owner, StudySpec, TrialRow

if TYPE_CHECKING:
    from qlora_exp.study.ladder import LadderTrial

CLAIM, HEARTBEAT, RUN, STATUS, SECONDS, FAILURE, MEMORY_RETRIES, UNCOUNTED = (
    *("claim", "heartbeat", "run_id", "status", "seconds", "failure", "out_of_memory_retries", "uncounted_attempts"),
)
FIXED = "fixed_params"
"""Optuna's own name for what a trial was enqueued with."""
INFEASIBLE = (Status.OUT_OF_MEMORY, Status.DIVERGED)
"""Told as PRUNED with a broken constraint of that name: samplers learn nothing from FAIL."""


class Study:
    """One study, opened in this process. Make one with :meth:`open`."""

    def __init__(self, spec: StudySpec, paths: StudyPaths, study: optuna.Study) -> None:
        self.spec = spec
        self._paths = paths
        self._study = study
        self._storage = study._storage
        self._ended: dict[int, LadderTrial] = {}
        self._done: dict[int, bool] = {}

    @classmethod
    def open(cls, spec: StudySpec, paths: StudyPaths, storage_url: str | None = None) -> Study:
        """Create the study, or open it again; any number of processes may at once.

        ``storage_url`` takes the place of ``spec.storage``, which has no password.

        Raises:
            ConfigError, Problems: a search that can't be done. StudyError: a damaged database, or a study of that name
            that asks something else.
        """
        check_search(spec)
        paths.folder.mkdir(parents=True, exist_ok=True)
        url = storage_url or spec.storage
        with FileLock(paths.lock):
            storage = connect(url, spec.name)
            if paths.created.exists() and not _holds(storage, spec.name):
                raise damaged(
                    f"the database doesn't hold the study {spec.name} any more", url.rpartition("@")[2], spec.name
                )
            study = _created(spec, storage)
            if not paths.created.exists():
                write_text(paths.created, "")
        return cls(spec, paths, study)

    @classmethod
    def rebuild(
        cls, spec: StudySpec, paths: StudyPaths, records: Sequence[RunRecord], storage_url: str | None = None
    ) -> Study:
        """Make the study again from its runs' records, where the database is damaged or lost; a damaged file is kept
        as ``….damaged-N``. Trials without a record are asked again under their numbers. A study that is there stays as
        it is.

        Raises:
            as :meth:`open`.
        """
        check_search(spec)
        url = storage_url or spec.storage
        paths.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(paths.lock):
            _clear_damage(url, spec.name)
            storage = connect(url, spec.name)
            if not _holds(storage, spec.name):
                study = _created(spec, storage)
                study.add_trials(trials_of_records(spec, records))
            write_text(paths.created, "")
        return cls.open(spec, paths, storage_url)

    def claim(self, owner: Owner, lease_seconds: float) -> Claim | None:
        """A trial for ``owner`` to run now; ``None``: there is none at the moment, or for good (see :meth:`counts`).

        Trials of processes that are dead, or silent for ``lease_seconds``, are taken back first.
        """
        with FileLock(self._paths.lock):
            unfinished = self._unfinished()
            lost = [(trial, why) for trial in unfinished if (why := _lost(trial, lease_seconds))]
            for trial, why in lost:
                self._take_back(trial, why)
            unfinished = self._unfinished() if lost else unfinished
            waiting = [trial for trial in unfinished if trial.state is TrialState.WAITING]
            if self.spec.ladder is not None:
                return self._start_on_ladder(waiting, owner)
            if waiting:
                return self._start(waiting[0], owner)
            if not self._all_asked():
                return self._start(None, owner)
        return None

    def set_run(self, claim: Claim, run_id: str) -> None:
        """Say in which run the trial's artefacts are: later attempts go on there."""
        if self._mine(claim):
            self._storage.set_trial_user_attr(claim.trial_id, RUN, run_id)

    def heartbeat(self, claim: Claim) -> bool:
        """Keep the claim. False: it was taken over, and this attempt doesn't count any more."""
        mine = self._mine(claim) is not None
        if mine:
            self._storage.set_trial_user_attr(claim.trial_id, HEARTBEAT, time.time())
        return mine

    def report(self, claim: Claim, step: int, value: float, items: Sequence[float] | None = None) -> bool:
        """Report the objective at ``step``; whether the trial should be pruned.

        ``items``: losses per item, always of the same items in the same order; the Wilcoxon pruner compares them with
        the best trial's at the same step. Without pruner nothing is stored.
        """
        if self.spec.pruner == "none" or value != value or not self._mine(claim):
            return False
        if items is not None and self.spec.pruner == "wilcoxon":
            losses = [float(f"{loss:.6g}") for loss in items]
            self._storage.set_trial_user_attr(claim.trial_id, ITEMS_ATTRIBUTE.format(step=step), losses)
        trial = Trial(self._study, claim.trial_id)
        if step not in self._storage.get_trial(claim.trial_id).intermediate_values:  # of an attempt that was killed
            trial.report(value, step)
        return bool(trial.should_prune())  # some pruners answer with NumPy's

    def tell(self, claim: Claim, outcome: Outcome) -> None:
        """Say how the trial ended. A trial that has ended or was taken over is left as it is; an interrupted one waits
        to be gone on with, and is none the worse for it: that attempt doesn't count."""
        with FileLock(self._paths.lock):
            trial = self._mine(claim)
            if trial and outcome.status is Status.INTERRUPTED:
                uncounted = trial.user_attrs.get(UNCOUNTED, 0) + 1
                self._storage.set_trial_user_attr(claim.trial_id, UNCOUNTED, uncounted)
                self._release(trial)
            elif trial:
                self._tell(trial, outcome)

    def requeue(self, claim: Claim, why: str) -> bool:
        """Let the trial be claimed again, with its number, parameters and run; False: no attempt is left (then it has
        failed with ``why``), or it isn't this claim's any more."""
        with FileLock(self._paths.lock):
            trial = self._mine(claim)
            return trial is not None and self._take_back(trial, why)

    def request_memory_retry(self, claim: Claim) -> bool:
        """Let the trial be claimed again with half the micro-batch; False: no such retry is left."""
        with FileLock(self._paths.lock):
            trial = self._mine(claim)
            retries = claim.out_of_memory_retries + 1
            if trial is None or retries > self.spec.out_of_memory_retries:
                return False
            self._storage.set_trial_user_attr(claim.trial_id, MEMORY_RETRIES, retries)
            self._release(trial)
            return True

    def counts(self) -> Counts:
        trials = self._read()
        done = self.spec.ladder is not None and self._ladder_is_done()
        return rows.counts(trials, len(trials) if done else self.spec.n_trials)

    def trials(self) -> list[TrialRow]:
        """Every trial, by number."""
        return [rows.row(trial, self.spec) for trial in self._read()]

    def best(self) -> list[TrialRow]:
        """The best completed trial that breaks no constraint, or the Pareto front of several objectives. Of a ladder,
        which is decided by no single trial, the runs at the recommended rank."""
        if self.spec.ladder is not None:
            return self._recommended()
        return rows.best(self.trials(), [parse_objective(text).direction for text in self.spec.objectives])

    def on_ladder(self) -> list[LadderTrial]:
        """The trials as rank doubling sees them, with what their runs left; without those that were never asked."""
        from qlora_exp.study.ladder import LadderTrial
        from qlora_exp.study.ladder_runs import ended_trial

        outputs = OutputPaths(self._paths.folder.parent.parent)
        seen: list[LadderTrial] = []
        for trial in self._read():
            if trial.number not in self._ended and (point := self._point(trial)):
                if trial.state.is_finished():
                    self._ended[trial.number] = ended_trial(point, trial.user_attrs.get(RUN), outputs)
                else:
                    seen.append(LadderTrial(point, ended=False))
        return [*self._ended.values(), *seen]

    def importances(self) -> dict[str, dict[str, float]]:
        """Objective → axis → share of its variance, of the completed trials."""
        return importances(self._study, self.spec)

    def failures_reached(self) -> bool:
        """Whether ``max_failures`` is reached: trials told as FAIL, not those out of memory or diverged."""
        limit = self.spec.max_failures
        if limit is None:
            return False
        return self.counts().failed >= (limit if limit >= 1 else max(limit * self.spec.n_trials, 1))

    @cached_property
    def _planned(self) -> list[dict[str, Any]]:
        """What the first trials try, by number: enqueued configurations, then a grid's other points."""
        points = grid(self.spec.axes) if self.spec.sampler == "grid" else []
        return [*self.spec.enqueue, *(point for point in points if point not in self.spec.enqueue)]

    def _read(self) -> list[FrozenTrial]:
        """All trials by number; finished ones come from memory."""
        return self._storage.get_all_trials(self._study._study_id, deepcopy=False)

    def _unfinished(self) -> list[FrozenTrial]:
        """Waiting and running trials by number, without a look at each of the finished."""
        states = (TrialState.WAITING, TrialState.RUNNING)
        return self._storage.get_all_trials(self._study._study_id, deepcopy=False, states=states)

    def _all_asked(self) -> bool:
        last = self.spec.n_trials - 1
        try:
            self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, last)
        except KeyError:
            return False
        return True

    def _mine(self, claim: Claim) -> FrozenTrial | None:
        trial = self._storage.get_trial(claim.trial_id)
        ours = trial.state is TrialState.RUNNING and rows.attempt(trial) == claim.attempt
        return trial if ours else None

    def _recommended(self) -> list[TrialRow]:
        from qlora_exp.study.ladder_runs import recommended

        assert self.spec.ladder is not None
        by_point = {frozenset(overrides_of(row.params)): row for row in self.trials() if row.params}
        points = recommended(self.spec.ladder, self.on_ladder())
        return [by_point[key] for point in points if (key := frozenset(overrides_of(point))) in by_point]

    def _ladder_is_done(self) -> bool:
        """Asked often, and the answer changes with the ended trials alone."""
        from qlora_exp.study.ladder import is_done

        assert self.spec.ladder is not None
        seen = self.on_ladder()
        if len(self._ended) not in self._done:
            self._done[len(self._ended)] = is_done(self.spec.ladder, seen)
        return self._done[len(self._ended)]

    def _start_on_ladder(self, waiting: Sequence[FrozenTrial], owner: Owner) -> Claim | None:
        from qlora_exp.study.ladder import next_point

        assert self.spec.ladder is not None
        asked = [trial for trial in waiting if self._point(trial)]
        if asked:
            return self._start(asked[0], owner)
        seen = self.on_ladder()
        point = next_point(self.spec.ladder, seen)
        if point is None and waiting and self._ladder_is_done():  # a lost trial that nothing depends on
            for trial in waiting:
                self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        if point is None or (not waiting and self._all_asked()):
            return None
        return self._start(waiting[0] if waiting else None, owner, point)

    def _point(self, trial: FrozenTrial) -> dict[str, Any]:
        """What a ladder's trial tries; empty for one that was never asked."""
        return decoded_params(self.spec.axes, trial.system_attrs.get(FIXED) or trial.params)

    def _start(self, waiting: FrozenTrial | None, owner: Owner, point: Mapping[str, Any] | None = None) -> Claim:
        """``point``: what the trial tries, where that doesn't follow from its number."""
        attempt = rows.attempt(waiting) + 1 if waiting else 1
        mark = {CLAIM: {"attempt": attempt, "owner": to_dict(owner)}, HEARTBEAT: time.time()}
        fixed: dict[str, Any] = {FIXED: {key: encoded(value) for key, value in point.items()}} if point else {}
        if waiting is None:
            template = create_trial(state=TrialState.RUNNING, user_attrs=mark, system_attrs=fixed)
            trial_id = self._storage.create_new_trial(self._study._study_id, template)
        else:
            trial_id = waiting._trial_id
            for key, value in fixed.items():
                self._storage.set_trial_system_attr(trial_id, key, value)
            for key, value in mark.items():
                self._storage.set_trial_user_attr(trial_id, key, value)
            self._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        trial = self._storage.get_trial(trial_id)
        params = self._ask(trial)
        return Claim(
            number=trial.number,
            trial_id=trial_id,
            params=params,
            overrides=overrides_of(params),
            attempt=attempt,
            run_id=trial.user_attrs.get(RUN),
            out_of_memory_retries=trial.user_attrs.get(MEMORY_RETRIES, 0),
        )

    def _ask(self, trial: FrozenTrial) -> dict[str, Any]:
        if trial.number < len(self._planned) and FIXED not in trial.system_attrs:
            planned = {key: encoded(value) for key, value in self._planned[trial.number].items()}
            self._storage.set_trial_system_attr(trial._trial_id, FIXED, planned)
        self._study._thread_local.cached_all_trials = None  # as Study.ask does: samplers see what is told by now
        return suggest(self.spec.axes, Trial(self._study, trial._trial_id))

    def _take_back(self, trial: FrozenTrial, why: str) -> bool:
        retries = trial.user_attrs.get(MEMORY_RETRIES, 0) + trial.user_attrs.get(UNCOUNTED, 0)
        attempt = rows.attempt(trial)
        if attempt - retries < self.spec.max_attempts:
            self._release(trial)
            return True
        failure = Failure("AttemptsExhausted", f"{why}; attempt {attempt - retries} of {self.spec.max_attempts}")
        unknown = (None,) * len(self.spec.objectives)
        self._tell(trial, Outcome(Status.FAILED, unknown, (), None, failure))
        return False

    def _release(self, trial: FrozenTrial) -> None:
        left = {"attempt": rows.attempt(trial), "owner": None}
        self._storage.set_trial_user_attr(trial._trial_id, CLAIM, left)
        self._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def _tell(self, trial: FrozenTrial, outcome: Outcome) -> None:
        complete = outcome.status is Status.COMPLETED and None not in outcome.values
        failure = outcome.failure
        if outcome.status is Status.COMPLETED and not complete:
            failure = Failure("UnknownObjective", f"the run completed without a value for {self.spec.objectives}")
        status = Status.FAILED if failure and not complete and outcome.status is Status.COMPLETED else outcome.status
        self._constrain(trial, outcome)
        for key, value in ((STATUS, status.value), (SECONDS, outcome.seconds), (FAILURE, failure and to_dict(failure))):
            if value is not None:
                self._storage.set_trial_user_attr(trial._trial_id, key, value)
        if complete:
            self._study.tell(trial.number, [float(value) for value in outcome.values if value is not None])
        elif status in (Status.PRUNED, *INFEASIBLE):
            self._study.tell(trial.number, state=TrialState.PRUNED)
        else:
            self._study.tell(trial.number, state=TrialState.FAIL)

    def _constrain(self, trial: FrozenTrial, outcome: Outcome) -> None:
        """Set the trial's constraints; those of an earlier telling that was cut short are overwritten, which
        ``Trial.set_constraint`` refuses."""
        wanted = dict.fromkeys(trial.constraints, 0.0) | dict(
            zip(self.spec.constraints, outcome.violations, strict=False)
        )
        if outcome.status in INFEASIBLE:
            wanted[outcome.status.value.lower()] = 1.0
        if wanted:
            handle = Trial(self._study, trial._trial_id)
            for name, violation in wanted.items():
                if name not in trial.constraints:
                    handle.set_constraint(name, violation)
                elif trial.constraints[name] != violation:
                    self._storage.set_trial_system_attr(trial._trial_id, f"constraints:{name}", violation)


def _lost(trial: FrozenTrial, lease_seconds: float) -> str | None:
    """Why a RUNNING trial has nobody who runs it; ``None``: somebody does, or it isn't RUNNING."""
    if trial.state is not TrialState.RUNNING:
        return None
    owner = (trial.user_attrs.get(CLAIM) or {}).get("owner")
    if owner is None:
        return "left while it was asked or requeued"
    process = from_dict(Process, owner["process"])
    if alive(process) is False:
        return f"its worker {owner['worker']} (process {process.pid}) died"
    silent_seconds = time.time() - trial.user_attrs.get(HEARTBEAT, 0.0)
    return (
        f"its worker {owner['worker']} was silent for {silent_seconds:.0f} s"
        if silent_seconds > lease_seconds
        else None
    )


def _holds(storage: optuna.storages.BaseStorage, name: str) -> bool:
    try:
        storage.get_study_id_from_name(name)
    except KeyError:
        return False
    return True


def _created(spec: StudySpec, storage: optuna.storages.BaseStorage) -> optuna.Study:
    """The study in ``storage``, new or of before; raises :class:`StudyError` where it asks something else."""
    study = optuna.create_study(
        study_name=spec.name,
        storage=storage,
        sampler=make_sampler(spec, earlier_trials(spec, storage)),
        pruner=make_pruner(spec),
        directions=[parse_objective(text).direction for text in spec.objectives],
        load_if_exists=True,
    )
    asked, stored = _question(spec), study.user_attrs.get("asks")
    if stored is None:
        study.set_user_attr("asks", asked)
        return study
    # A key that only one of them has came or went with another version of this package.
    both = [key for key in asked if key in stored]
    changes = [f"{key}: {stored[key]} there, {asked[key]} now" for key in both if stored[key] != asked[key]]
    if changes:
        raise StudyError(
            f"the study {spec.name} exists and asks something else",
            "; ".join(changes),
            "go on with the same settings, or start another with sweep.name=NAME",
        )
    return study


def _question(spec: StudySpec) -> dict[str, Any]:
    """What can't change once trials exist: later ones couldn't be compared, or would repeat earlier ones."""
    ladder = {} if spec.ladder is None else {"ladder": to_dict(spec.ladder)}
    return {
        **ladder,
        "axes": [f"{axis.key}={axis.text}" + (f" if {axis.condition}" if axis.condition else "") for axis in spec.axes],
        "objectives": list(spec.objectives),
        "constraints": list(spec.constraints),
        "enqueue": [list(overrides_of(point)) for point in spec.enqueue],
        "grid": spec.sampler == "grid",
    } | spec.settings


def _clear_damage(url: str, name: str) -> None:
    file = sqlite_file(url)
    if file is None or not file.exists():
        return
    with FileLock(f"{file}.lock"):
        try:
            check_whole(file, name)
        except StudyError as error:
            if "damaged" not in error.what:
                raise
            set_aside(file)
