"""A worker: runs a study's trials in supervised trial hosts until nothing is left, or it is told to stop."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from qlora_exp.config.compose import compose_raw
from qlora_exp.config.schema import WorkersConfig
from qlora_exp.estimate.budget import StudyBudget, budget_of, limits_of
from qlora_exp.estimate.memory_fit import MemoryLimit
from qlora_exp.orchestration import forking
from qlora_exp.orchestration.live_state import SlotState, remove_state, state_of, worker_name, write_worker_state
from qlora_exp.orchestration.memory_feedback import MAX_CONSECUTIVE_SKIPS, MemoryFeedback
from qlora_exp.orchestration.prestart import host_starts, hosts_per_device
from qlora_exp.orchestration.slot import GRACEFULLY, NOW, Setting, Slot
from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.study import objectives
from qlora_exp.study.types import Claim, Counts, Outcome, Owner, StudySpec, TrialRow
from qlora_exp.system import signals
from qlora_exp.system.environment import process_identity
from qlora_exp.training.outcome import disk_full

T = TypeVar("T")

FAILURES, BUDGET, MEMORY = "failures", "budget", "memory"
TICK_SECONDS = 0.5
STATE_SECONDS = 1.0
WAIT_SECONDS = 2.0


class Studied(Protocol):
    """What a worker asks of a study; :class:`qlora_exp.study.study.Study` is one."""

    def claim(self, owner: Owner, lease_seconds: float, affordable: Callable[[], bool] = ...) -> Claim | None: ...
    def trials(self) -> list[TrialRow]: ...
    def set_run(self, claim: Claim, run_id: str) -> None: ...
    def heartbeat(self, claim: Claim) -> bool: ...
    def report(self, claim: Claim, step: int, value: float, items: Sequence[float] | None = None) -> bool: ...
    def tell(self, claim: Claim, outcome: Outcome) -> None: ...
    def requeue(self, claim: Claim, why: str) -> bool: ...
    def request_memory_retry(self, claim: Claim) -> bool: ...
    def counts(self) -> Counts: ...
    def consecutive_skips(self, bound_bytes: int | None) -> int: ...
    def failures_reached(self) -> bool: ...


@dataclass(frozen=True)
class WorkerResult:
    """``told``: how many trials this worker told the end of. ``stopped``: why it ended before the study did —
    ``gracefully``, ``now``, ``failures``, ``budget`` or ``memory`` — or ``None``. ``by_signal``: a signal said so."""

    told: int
    stopped: str | None
    by_signal: bool = False


def run_worker(
    spec: StudySpec,
    paths: StudyPaths,
    workers: WorkersConfig,
    job: int = 0,
    stop: Callable[[], str | None] = lambda: None,
    study: Studied | None = None,
    outcome_of: Callable[[RunRecord, StudySpec], Outcome] | None = None,
) -> WorkerResult:
    """Run trials until the study has none left.

    Args:
        stop: asked twice a second for ``gracefully`` or ``now``, beside the file ``paths.stop`` and, in a main thread,
            INT, TERM and HUP (the second one ends the hosts at once).
        study: the study, where it is open already; ``outcome_of`` likewise.

    Raises:
        QloraExpError: the study can't be opened, or a GPU is in use by another process; nothing was started.
    """
    # Unchecked: without its axes a trial may lack what makes it possible.
    from qlora_exp.study.study import Study

    config = compose_raw(spec.overrides)
    starts = host_starts(config, workers, paths)
    setting = Setting(
        spec=spec,
        paths=paths,
        workers=workers,
        outcome_of=outcome_of or objectives.outcome_of,
        budget=budget_of(config),
        hosts_per_device=hosts_per_device(starts),
    )
    worker = Worker(setting, study if study is not None else Study.open(spec, paths), job, len(starts), stop)
    slots = [Slot(worker, state.slot, one, state) for state, one in zip(worker.states, starts, strict=True)]
    with forking.servers_kept():
        return worker.run(slots)


class Worker:
    """What the slots of one worker share: the study, one call at a time, and whether to stop."""

    def __init__(self, setting: Setting, study: Studied, job: int, slots: int, stop: Callable[[], str | None]) -> None:
        self.setting, self.study, self.job = setting, study, job
        self.name = worker_name()
        self.states = [SlotState(number) for number in range(slots)]
        self.stopping: str | None = None
        self.killing = False
        self.by_signal = False
        self.told = 0
        self.error: BaseException | None = None
        self.taken_over: set[tuple[int, int]] = set()
        """Trial ids and attempts that are somebody else's by now."""
        self._process = process_identity()
        self._asked_from_outside = stop
        outputs = OutputPaths.of(setting.spec.output_root)
        self._purse, self._experience = StudyBudget(setting.budget, outputs), MemoryFeedback(outputs)
        self._claims: dict[int, Claim] = {}
        self._at_work: set[int] = set()
        self._calls = threading.RLock()
        self._changed = threading.Condition()
        self._next_heartbeat = self._next_state = 0.0

    def run(self, slots: list[Slot]) -> WorkerResult:
        try:
            with self._signals():
                for slot in slots:
                    self._at_work.add(slot.number)
                    slot.start()
                try:
                    self._wait()
                except BaseException:  # a launcher's signal, as submitit has one: the job's time is over
                    self._stop(NOW)
                    self._wait()
                    raise
        finally:
            remove_state(self.setting.paths.workers, self.name)
        if self.error is not None:
            raise self.error
        return WorkerResult(self.told, self.stopping, self.by_signal)

    def _wait(self) -> None:
        """Until every slot has ended. Not by joining them: an exception out of a signal's handler, in a join, has
        Python 3.11 and 3.12 take a running thread for an ended one."""
        while self._at_work:
            self._tick()
            with self._changed:
                if self._at_work:
                    self._changed.wait(TICK_SECONDS)

    # What slots ask.

    def claim(self, slot: int) -> Claim | None:
        """A trial for ``slot``; ``None``: there is none now."""
        owner = Owner(self._process, self.name, slot)
        lease = self.setting.workers.lease_seconds
        limited = bool(limits_of(self.setting.budget))
        claim = self._ask(
            lambda: self.study.claim(owner, lease, self._affordable) if limited else self.study.claim(owner, lease)
        )
        if claim is not None:
            self._claims[slot] = claim
        return claim

    def _affordable(self) -> bool:
        """Whether the budget buys one more trial. Those that run may turn out cheap: it is spent when none does."""
        trials = self.study.trials()
        if self._purse.short(trials) is None:
            return True
        if not any(trial.state == "RUNNING" for trial in trials):
            self._stop(BUDGET)
        return False

    def accepting(self) -> bool:
        """Whether a new trial may start; sees to it that too many failures end the study."""
        if self.stopping is None and self._ask(self.study.failures_reached):
            self._stop(FAILURES)
        if self.stopping is None and self.setting.limits_memory and self._nothing_fits():
            self._stop(MEMORY)
        return self.stopping is None

    def _nothing_fits(self) -> bool:
        bound = self.setting.budget.memory_bytes
        return self._ask(lambda: self.study.consecutive_skips(bound)) >= MAX_CONSECUTIVE_SKIPS

    def memory_rule(self, claim: Claim) -> MemoryLimit | None:
        """What a trial that begins now must fit into, by all that has ended."""
        setting = self.setting
        if not setting.limits_memory:
            return None
        bound, halvings = setting.budget.memory_bytes, setting.spec.out_of_memory_retries - claim.out_of_memory_retries
        kin = self._experience.kin(self._ask(self.study.trials), bound)
        force = setting.budget.force
        return MemoryLimit(bound, setting.hosts_per_device or 1, kin, True, max(halvings, 0), force)

    def nothing_left(self) -> bool:
        """Whether no trial will ever be free again: all have ended. One that somebody else runs may still be lost."""
        counts = self._ask(self.study.counts)
        return counts.running + counts.waiting + counts.to_ask == 0

    def no_trial_finished(self) -> bool:
        """Whether no trial of the study has ended yet, however."""
        return self._ask(self.study.counts).finished == 0

    def wait(self, seconds: float) -> None:
        """Until another slot tells or gives back a trial, at most ``seconds``."""
        with self._changed:
            self._changed.wait(seconds)

    def set_run(self, claim: Claim, run_id: str) -> None:
        self._ask(lambda: self.study.set_run(claim, run_id))

    def report(self, claim: Claim, step: int, value: float, items: Sequence[float] | None = None) -> bool:
        return self._ask(lambda: self.study.report(claim, step, value, items))

    def tell(self, slot: int, claim: Claim, outcome: Outcome) -> None:
        self._ask(lambda: self.study.tell(claim, outcome))
        self.told += 1
        self.let_go(slot)

    def requeue(self, slot: int, claim: Claim, why: str) -> bool:
        """Give the trial back for another attempt. ``False``: there is none left, and it is told as failed."""
        again = self._ask(lambda: self.study.requeue(claim, why))
        self.let_go(slot)
        return again

    def return_trial(self, slot: int, claim: Claim) -> None:
        """The trial was interrupted because the worker stops: no fault of its own."""
        unknown = (None,) * len(self.setting.spec.objectives)
        self._ask(lambda: self.study.tell(claim, Outcome(Status.INTERRUPTED, unknown, (), None)))
        self.let_go(slot)

    def still_ours(self, claim: Claim) -> bool:
        """Whether nobody has taken the trial over (from a machine that slept longer than the lease, say)."""
        return self._ask(lambda: self.study.heartbeat(claim))

    def memory_retry(self, slot: int, claim: Claim) -> bool:
        granted = self._ask(lambda: self.study.request_memory_retry(claim))
        if granted:
            self.let_go(slot)
        return granted

    def let_go(self, slot: int) -> None:
        """The slot has no trial any more."""
        self._claims.pop(slot, None)
        with self._changed:
            self._changed.notify_all()

    def ended(self, slot: int) -> None:
        """The slot has ended its host, and does nothing more."""
        with self._changed:
            self._at_work.discard(slot)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """A slot met what it can't handle: the worker ends, its trials free for others."""
        self.error = self.error or error
        self._stop(NOW)

    def _ask(self, call: Callable[[], T]) -> T:
        """One call to the study. A full disk is waited for, and a lease long for a server that doesn't answer: nothing
        that has been reached may be lost."""
        from qlora_exp.study.storage import lost, unreachable

        told, until = False, time.monotonic() + self.setting.workers.lease_seconds
        while True:
            try:
                with self._calls:
                    return call()
            except Exception as error:  # whatever the storage's driver raises
                full, gone = disk_full(error), unreachable(error)
                if self.killing or not (full or gone):
                    raise
                problem = lost(error, self.setting.spec.storage, self.setting.spec.name)
                if not full and time.monotonic() > until:
                    raise problem from None
                if not told:
                    what = f"the study can't be written: {error}; waiting for space" if full else problem.what
                    print(what, file=sys.stderr, flush=True)
                    told = True
                time.sleep(WAIT_SECONDS)

    # What happens twice a second.

    def _tick(self) -> None:
        mode = self._asked_from_outside() or self._stop_file()
        if mode is not None:
            self._stop(mode)
        now = time.monotonic()
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + self.setting.workers.heartbeat_seconds
            for claim in list(self._claims.values()):
                self._heartbeat(claim)
        if now >= self._next_state:
            self._next_state = now + STATE_SECONDS
            lease = self.setting.workers.lease_seconds
            write_worker_state(
                self.setting.paths.workers, state_of(self.name, self.job, self.stopping, self.states, lease)
            )

    def _heartbeat(self, claim: Claim) -> None:
        """One that fails is made up for by the next; the lease is many heartbeats long."""
        from qlora_exp.study.storage import unreachable

        try:
            with self._calls:
                if not self.study.heartbeat(claim):
                    self.taken_over.add((claim.trial_id, claim.attempt))
        except Exception as error:  # as in _ask
            if not unreachable(error):  # the next call tells
                print(f"trial {claim.number}: no heartbeat: {error}", file=sys.stderr, flush=True)

    def _stop_file(self) -> str | None:
        try:
            asked = json.loads(self.setting.paths.stop.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return GRACEFULLY
        return NOW if isinstance(asked, dict) and asked.get("mode") == NOW else GRACEFULLY

    def _stop(self, mode: str) -> None:
        if self.stopping != NOW:
            self.stopping = mode
        with self._changed:
            self._changed.notify_all()

    def _signals(self) -> contextlib.AbstractContextManager[None]:
        """INT, TERM and HUP: as a request to stop now; the second: without mercy."""

        def asked(number: int, frame: object) -> None:
            if signals.heard(number) is not signals.Heard.SAME:
                self.killing = self.stopping == NOW
                self.stopping = NOW
                self.by_signal = True

        return signals.handling(asked)
