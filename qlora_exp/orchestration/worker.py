"""A worker: runs a study's trials in supervised trial processes until none is left, or until it is asked to stop."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from qlora_exp.config.compose import compose_raw
from qlora_exp.config.schema import WorkersConfig
from qlora_exp.estimate.budget import budget_of, limits_of
from qlora_exp.estimate.memory_fit import MemoryLimit
from qlora_exp.orchestration import forking
from qlora_exp.orchestration.live_state import SlotState, remove_worker_state, worker_name, write_worker_state
from qlora_exp.orchestration.memory_predictions import MAX_CONSECUTIVE_SKIPS, MemoryFeedback
from qlora_exp.orchestration.prestart import process_starts, processes_per_device
from qlora_exp.orchestration.slot import GRACEFULLY, NOW, Slot, SlotContext
from qlora_exp.orchestration.study_budget import StudyBudget
from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.rank_doubling.ladder import proposer_of
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.study import objectives
from qlora_exp.study.storage import is_unreachable, unreachable_error
from qlora_exp.study.study import Study
from qlora_exp.study.types import Claim, Outcome, Owner, StudySpec
from qlora_exp.system import signals
from qlora_exp.system.environment import process_identity
from qlora_exp.training.outcome import is_disk_full

P = ParamSpec("P")
T = TypeVar("T")

FAILURES, BUDGET, MEMORY = "failures", "budget", "memory"
TICK_SECONDS = 0.5
STATE_SECONDS = 1.0
WAIT_SECONDS = 2.0


@dataclass(frozen=True)
class WorkerResult:
    """``finished``: number of trials whose end this worker recorded. ``by_signal``: a signal stopped it.

    ``stopped``: why it ended before the study did (``gracefully``, ``now``, ``failures``, ``budget`` or ``memory``), or
    ``None``.
    """

    finished: int
    stopped: str | None
    by_signal: bool = False


def run_worker(
    spec: StudySpec,
    paths: StudyPaths,
    workers: WorkersConfig,
    job: int = 0,
    stop: Callable[[], str | None] = lambda: None,
    study: Study | None = None,
    outcome_of: Callable[[RunRecord, StudySpec], Outcome] | None = None,
) -> WorkerResult:
    """Run trials until the study has none left.

    Args:
        stop: called twice a second; returns ``gracefully``, ``now`` or ``None``. The file ``paths.stop`` and, in a main
            thread, INT, TERM and HUP stop the worker, too. The second signal kills the trial processes.
        study: the study, if it is open already; ``outcome_of`` likewise.

    Raises:
        QloraExpError: the study can't be opened, or a GPU is in use by another process; nothing was started.
    """
    # Without checks: the configuration may only be valid together with the axes' values.
    config = compose_raw(spec.overrides)
    starts = process_starts(config, workers, paths)
    setting = SlotContext(
        spec=spec,
        paths=paths,
        workers=workers,
        outcome_of=outcome_of or objectives.outcome_of,
        budget=budget_of(config),
        processes_per_device=processes_per_device(starts),
    )
    opened = study if study is not None else Study.open(spec, paths, proposer_of(spec, paths))
    worker = Worker(setting, opened, job, len(starts), stop)
    slots = [Slot(worker, state.slot, start, state) for state, start in zip(worker.states, starts, strict=True)]
    with forking.servers_kept():
        return worker.run(slots)


class Worker:
    """What the slots of one worker share: the study, called by one slot at a time, and whether to stop."""

    def __init__(
        self, setting: SlotContext, study: Study, job: int, slots: int, stop: Callable[[], str | None]
    ) -> None:
        self.setting, self.study, self.job = setting, study, job
        self.states = [SlotState(number) for number in range(slots)]
        self.stopping: str | None = None
        self.killing = False
        self.by_signal = False
        self.finished = 0
        self.error: BaseException | None = None
        self.taken_over: set[tuple[int, int]] = set()
        """(trial id, attempt) of trials that another worker has taken over."""
        self._process = process_identity()
        self._stop_callback = stop
        outputs = OutputPaths.of(setting.spec.output_root)
        self._study_budget, self._memory_feedback = StudyBudget(setting.budget, outputs), MemoryFeedback(outputs)
        self._claims: dict[int, Claim] = {}
        self._active_slots: set[int] = set()
        self._calls = threading.RLock()
        self._changed = threading.Condition()
        self._next_heartbeat = self._next_state = 0.0

    def run(self, slots: list[Slot]) -> WorkerResult:
        try:
            with self._signals():
                for slot in slots:
                    self._active_slots.add(slot.number)
                    slot.start()
                try:
                    self._wait()
                except BaseException:  # a launcher's signal (submitit's, for example): the job's time is over
                    self._stop(NOW)
                    self._wait()
                    raise
        finally:
            remove_worker_state(self.setting.paths)
        if self.error is not None:
            raise self.error
        return WorkerResult(self.finished, self.stopping, self.by_signal)

    def _wait(self) -> None:
        """Wait until every slot has ended.

        This doesn't join the threads: in Python 3.11 and 3.12 an exception from a signal handler during a join makes a
        running thread count as ended.
        """
        while self._active_slots:
            self._tick()
            with self._changed:
                if self._active_slots:
                    self._changed.wait(TICK_SECONDS)

    # What slots ask.

    def claim(self, slot: int) -> Claim | None:
        """Return a trial for ``slot``; ``None``: there is none now."""
        owner = Owner(self._process, worker_name(), slot)
        claim = self._ask(self.study.claim, owner, self.setting.workers.lease_seconds, self._affordable)
        if claim is not None:
            self._claims[slot] = claim
        return claim

    def _affordable(self) -> bool:
        """Return whether the budget covers one more trial.

        Running trials may turn out cheaper than reserved, so the budget counts as spent only when none runs.
        """
        if not limits_of(self.setting.budget):
            return True
        trials = self.study.trials()
        if self._study_budget.first_exhausted(trials) is None:
            return True
        if not any(trial.state == "RUNNING" for trial in trials):
            self._stop(BUDGET)
        return False

    def may_start_trial(self) -> bool:
        """Return whether a new trial may start; stop the worker after too many failures, or if nothing fits any
        more."""
        if self.stopping is None and self._ask(self.study.failures_reached):
            self._stop(FAILURES)
        if self.stopping is None and self.setting.limits_memory:
            skips = self._ask(self.study.consecutive_skips, self.setting.budget.memory_bytes)
            if skips >= MAX_CONSECUTIVE_SKIPS:
                self._stop(MEMORY)
        return self.stopping is None

    def memory_limit(self, claim: Claim) -> MemoryLimit | None:
        """Return what a trial that starts now must fit into, corrected by the ended trials."""
        setting = self.setting
        if not setting.limits_memory:
            return None
        bound, halvings = setting.budget.memory_bytes, setting.spec.out_of_memory_retries - claim.out_of_memory_retries
        known_corrections = self._memory_feedback.corrections(self._ask(self.study.trials), bound)
        force = setting.budget.force
        return MemoryLimit(bound, setting.processes_per_device or 1, known_corrections, True, max(halvings, 0), force)

    def all_trials_ended(self) -> bool:
        """Return whether all trials have ended. A trial that another worker runs may still be lost and become free."""
        return self._ask(self.study.counts).is_complete

    def no_trial_finished(self) -> bool:
        """Return whether no trial of the study has ended yet."""
        return self._ask(self.study.counts).finished == 0

    def wait(self, seconds: float) -> None:
        """Wait until another slot ends or returns a trial, at most ``seconds``."""
        with self._changed:
            self._changed.wait(seconds)

    def set_run(self, claim: Claim, run_id: str) -> None:
        self._ask(self.study.set_run, claim, run_id)

    def report(self, claim: Claim, step: int, value: float, items: Sequence[float] | None = None) -> bool:
        return self._ask(self.study.report, claim, step, value, items)

    def tell(self, slot: int, claim: Claim, outcome: Outcome) -> None:
        self._ask(self.study.tell, claim, outcome)
        self.finished += 1
        self.forget_trial(slot)

    def requeue(self, slot: int, claim: Claim, why: str) -> bool:
        """Return the trial to the study for another attempt. ``False``: none is left, and the trial has failed."""
        again = self._ask(self.study.requeue, claim, why)
        self.forget_trial(slot)
        return again

    def return_trial(self, slot: int, claim: Claim) -> None:
        """Return the trial to the study because the worker stops; the attempt doesn't count."""
        unknown = (None,) * len(self.setting.spec.objectives)
        self._ask(self.study.tell, claim, Outcome(Status.INTERRUPTED, unknown, (), None))
        self.forget_trial(slot)

    def owns_trial(self, claim: Claim) -> bool:
        """Return whether no other worker has taken the trial over (after this machine slept longer than the lease, for
        example)."""
        return self._ask(self.study.heartbeat, claim)

    def memory_retry(self, slot: int, claim: Claim) -> bool:
        granted = self._ask(self.study.requeue_with_half_micro_batch, claim)
        if granted:
            self.forget_trial(slot)
        return granted

    def forget_trial(self, slot: int) -> None:
        """Forget the slot's trial."""
        self._claims.pop(slot, None)
        with self._changed:
            self._changed.notify_all()

    def ended(self, slot: int) -> None:
        """Mark the slot as ended: its trial process is gone, and it does nothing more."""
        with self._changed:
            self._active_slots.discard(slot)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Stop the worker after an error that a slot can't handle; its trials become free for others."""
        self.error = self.error or error
        self._stop(NOW)

    def _ask(self, call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Call the study, and wait for a full disk to have space, or for one lease for a server to answer.

        So no finished work is lost.
        """
        reported, deadline = False, time.monotonic() + self.setting.workers.lease_seconds
        while True:
            try:
                with self._calls:
                    return call(*arguments, **options)
            except Exception as error:  # each storage driver raises its own exceptions
                disk_is_full, storage_is_lost = is_disk_full(error), is_unreachable(error)
                if self.killing or not (disk_is_full or storage_is_lost):
                    raise
                problem = unreachable_error(error, self.setting.spec.storage, self.setting.spec.name)
                if not disk_is_full and time.monotonic() > deadline:
                    raise problem from None
                if not reported:
                    what = f"the study can't be written: {error}; waiting for space" if disk_is_full else problem.what
                    print(what, file=sys.stderr, flush=True)
                    reported = True
                time.sleep(WAIT_SECONDS)

    # What happens twice a second.

    def _tick(self) -> None:
        mode = self._stop_callback() or self._stop_file()
        if mode is not None:
            self._stop(mode)
        now = time.monotonic()
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + self.setting.workers.heartbeat_seconds
            for claim in list(self._claims.values()):
                self._heartbeat(claim)
        if now >= self._next_state:
            self._next_state = now + STATE_SECONDS
            lease_seconds = self.setting.workers.lease_seconds
            write_worker_state(self.setting.paths, self.job, self.stopping, self.states, lease_seconds)

    def _heartbeat(self, claim: Claim) -> None:
        """Renew a claim. A failed heartbeat does no harm: the lease lasts for many."""
        try:
            with self._calls:
                if not self.study.heartbeat(claim):
                    self.taken_over.add((claim.trial_id, claim.attempt))
        except Exception as error:  # as in _ask
            if not is_unreachable(error):  # the next call to the study reports a lost storage
                print(f"trial {claim.number}: no heartbeat: {error}", file=sys.stderr, flush=True)

    def _stop_file(self) -> str | None:
        try:
            request = json.loads(self.setting.paths.stop.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return GRACEFULLY
        return NOW if isinstance(request, dict) and request.get("mode") == NOW else GRACEFULLY

    def _stop(self, mode: str) -> None:
        if self.stopping != NOW:
            self.stopping = mode
        with self._changed:
            self._changed.notify_all()

    def _signals(self) -> contextlib.AbstractContextManager[None]:
        """Handle INT, TERM and HUP: the first is a request to stop now, the second kills the trial processes."""

        def request_stop(number: int, frame: object) -> None:
            if signals.meaning_of(number) is not signals.Meaning.SAME:
                self.killing = self.stopping == NOW
                self.stopping = NOW
                self.by_signal = True

        return signals.handle_signals(request_stop)
