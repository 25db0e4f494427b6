"""A slot of a worker: claims a trial, runs it in a trial process, and records how it ended, even if the process
dies."""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_exp.config.enums import Isolation
from qlora_exp.config.schema import BudgetConfig, WorkersConfig
from qlora_exp.errors import QloraExpError, RecordError
from qlora_exp.estimate.memory_fit import smaller_micro_batch
from qlora_exp.orchestration.live_state import SlotState, utc_now
from qlora_exp.orchestration.messages import (
    DiskFull,
    PhaseChanged,
    Progress,
    PruneReply,
    PruneRequest,
    RunTrial,
    Step,
    TrialEnded,
    TrialRefused,
    UserError,
)
from qlora_exp.orchestration.prestart import ProcessStart, take_started
from qlora_exp.orchestration.trial_process import ProcessDied, TrialProcess
from qlora_exp.paths import OutputPaths, RunPaths, StudyPaths, slug
from qlora_exp.records.files import read_record, write_json
from qlora_exp.records.types import Failure, RunRecord, Status, Trial
from qlora_exp.study.pilot_pruner import may_stop
from qlora_exp.study.types import Claim, Outcome, StudySpec
from qlora_exp.system import memory_limits
from qlora_exp.system.device_errors import bitsandbytes_error
from qlora_exp.system.environment import is_alive
from qlora_exp.system.out_of_memory import SMALLER_HINTS, ended_for_memory, killed_for_memory
from qlora_exp.training.outcome import is_disk_full

if TYPE_CHECKING:
    from qlora_exp.orchestration.worker import Worker

GRACEFULLY, NOW = "gracefully", "now"
POLL_SECONDS, LISTEN_SECONDS = 1.0, 0.25
START_SECONDS = 300.0
"""A trial process may need this long for its imports on a slow network disk before it counts as hung."""
TRIAL_GRACE_SECONDS = 120.0
"""Time for the end of a step and a checkpoint after a request to stop now."""
LAST_OWNER_SECONDS = 10.0
"""A killed worker's trial process ends with it: within two seconds, or a little more on an overloaded machine."""
PROBE_BYTES = 1 << 20
OUTPUT_BYTES = 1 << 16
"""Part of a log that is read to learn why its process ended."""
MAX_PAUSE_SECONDS = 300.0


@dataclass(frozen=True)
class SlotContext:
    """What all slots of a worker share."""

    spec: StudySpec
    paths: StudyPaths
    workers: WorkersConfig
    outcome_of: Callable[[RunRecord, StudySpec], Outcome]
    budget: BudgetConfig
    processes_per_device: int | None
    """Trial processes per GPU, or on the machine if they train on its CPU; ``None``: nothing is trained."""

    @property
    def limits_memory(self) -> bool:
        """Whether a trial's memory is limited."""
        return self.budget.memory_bytes is not None or self.processes_per_device is not None


@dataclass(frozen=True)
class TimedOut:
    """The trial process sent nothing for ``seconds`` and was killed."""

    seconds: float

    def __str__(self) -> str:
        return (
            f"the trial sent nothing for {self.seconds:g} s, and its process was killed; its log has the stack traces"
        )


@dataclass(frozen=True)
class Stopped:
    """The trial process was ended because the worker was asked to stop."""


@dataclass(frozen=True)
class TakenOver:
    """Another worker has taken the trial over; the process was ended, and the run belongs to that worker."""


End = TrialEnded | UserError | TrialRefused | DiskFull | ProcessDied | TimedOut | Stopped | TakenOver


class Slot(threading.Thread):
    """Runs one trial at a time in one trial process at a time. The thread must outlive them: the kernel kills a process
    when the thread that started it ends."""

    def __init__(self, worker: Worker, number: int, host_start: ProcessStart, state: SlotState) -> None:
        super().__init__(name=f"slot-{number}")
        self.worker, self.number, self.state = worker, number, state
        self.setting = worker.setting
        self._host_start = host_start
        self._host: TrialProcess | None = None
        self._pauses = 0
        self._kills_before: int | None = None
        self._log_start = 0

    def run(self) -> None:
        try:
            while self.worker.may_start_trial():
                claim = self.worker.claim(self.number)
                if claim is not None:
                    self._attempt(claim)
                elif self.worker.all_trials_ended():
                    break
                else:
                    self.worker.wait(POLL_SECONDS)
        except BaseException as error:
            self.worker.fail(error)
        finally:
            try:
                self._end_host(politely=not self.worker.killing)
            finally:
                self.worker.ended(self.number)

    # One trial.

    def _attempt(self, claim: Claim) -> None:
        run_id = claim.run_id or _run_id(self.setting.spec, claim)
        if claim.run_id is None:
            self.worker.set_run(claim, run_id)
        paths = OutputPaths.of(self.setting.spec.output_root).run(run_id)
        self._show(claim, run_id)
        end: End | None = None
        while True:
            _wait_for_last_owner(paths)
            record = _readable_record(paths)
            if record is not None and not _is_resumable(record):  # its worker died before recording the end
                self.worker.tell(self.number, claim, self.setting.outcome_of(record, self.setting.spec))
                break
            end = self._run_in_process(claim, run_id, record)
            if not self._disk_is_full(end, paths):
                self._conclude(claim, paths, end)
                break
            if not self._pause(paths):
                self.worker.return_trial(self.number, claim)
                break
        vars(self.state).update(vars(SlotState(self.number, host_pid=self.state.host_pid)))
        if self.setting.workers.isolation is Isolation.fresh and not isinstance(
            end, TrialRefused
        ):  # nothing was run in it
            self._end_host()

    def _run_in_process(self, claim: Claim, run_id: str, record: RunRecord | None) -> End:
        spec = self.setting.spec
        self._kills_before = memory_limits.out_of_memory_kills()
        with contextlib.suppress(OSError):  # no log yet
            self._log_start = self._host_start.log.stat().st_size
        host = self._host = self._host or take_started(self._host_start)
        host.send(
            RunTrial(
                overrides=(*spec.overrides, *claim.overrides),
                output_root=spec.output_root,
                run_id=run_id,
                resume=record is not None,
                trial=Trial(spec.name, claim.number, claim.attempt, dict(claim.params), spec.id),
                micro_batch=_earlier_micro_batch(record),
                per_item=spec.pruner == "wilcoxon",
                memory=self.worker.memory_limit(claim) if record is None else None,
                pilot=may_stop(spec.ladder, claim.params),
            )
        )
        try:
            return self._listen(host, claim)
        except (ProcessDied, RecordError) as died:
            code = host.kill()
            self._host = None
            if self.worker.stopping == NOW:
                return Stopped()
            return died if isinstance(died, ProcessDied) else ProcessDied(code)

    def _listen(self, host: TrialProcess, claim: Claim) -> End:
        """Handle messages until the run ends, the process hangs, or the time to stop is over. Raises
        :class:`ProcessDied`."""
        patience = self.setting.workers.hang_seconds
        heard, started = time.monotonic(), False
        stop_at: float | None = None
        while True:
            message = host.receive(LISTEN_SECONDS)
            self.state.host_pid = host.pid
            clock = time.monotonic()
            if message is not None:
                heard, started = clock, True
            match message:
                case TrialEnded() | UserError() | TrialRefused() | DiskFull():
                    return message
                case PruneRequest(step, value, items):
                    stop = value is not None and self.worker.report(claim, step, value, items)
                    host.send(PruneReply(stop))
                case PhaseChanged(name):
                    self.state.phase, self.state.progress = name, None
                case Progress(done, total, unit):
                    self.state.progress = f"{done:,}/{total:,} {unit}"
                case Step(step, total, metrics):
                    self.state.step, self.state.total = step, total
                    self.state.loss = metrics.get("loss", self.state.loss)
            if self.worker.stopping == NOW and stop_at is None:
                host.terminate()
                stop_at = clock + TRIAL_GRACE_SECONDS
            if stop_at is not None and (self.worker.killing or clock > stop_at):
                self._end_host(politely=False)
                return Stopped()
            if (claim.trial_id, claim.attempt) in self.worker.taken_over:
                self._end_host(politely=False)
                return TakenOver()
            if clock - heard > (patience if started else max(patience, START_SECONDS)):
                host.dump_and_kill()
                self._host = None
                return TimedOut(patience)

    # How it ended.

    def _conclude(self, claim: Claim, paths: RunPaths, end: End) -> None:
        if isinstance(end, TakenOver):
            return self.worker.forget_trial(self.number)
        record = _readable_record(paths)
        if isinstance(end, ProcessDied) and record is not None and record.status is Status.RUNNING:
            record = self._killed_for_memory(paths, record, end)
        if record is not None and not _is_resumable(record):
            if _leaves_process_unusable(record):
                self._end_host()
            if record.status is Status.OUT_OF_MEMORY and self._retry_with_half(claim, paths, record):
                return None
            return self.worker.tell(self.number, claim, self.setting.outcome_of(record, self.setting.spec))
        if isinstance(end, TrialRefused):
            return self.worker.tell(self.number, claim, self._skipped_outcome(end))
        if isinstance(end, UserError) and self.worker.no_trial_finished():
            # The first trial shows what is wrong for all of them: data, a model's files, a name that fits no module.
            self.worker.return_trial(self.number, claim)
            return self.worker.fail(QloraExpError(end.what, end.where, end.hint))
        if isinstance(end, UserError):
            failure = Failure(end.kind, end.what, phase="prepare", hint=end.hint)
            unknown = (None,) * len(self.setting.spec.objectives)
            return self.worker.tell(self.number, claim, Outcome(Status.FAILED, unknown, (), None, failure))
        if self.worker.stopping == NOW and not isinstance(end, TimedOut | ProcessDied):
            if record is not None and record.status is Status.RUNNING:  # the process was killed before it could write
                failure = Failure("Interrupted", "ended before it could save", self.state.phase, self.state.step)
                _write(
                    paths, record.replace(status=Status.INTERRUPTED, ended_at=utc_now(), process=None, failure=failure)
                )
            return self.worker.return_trial(self.number, claim)
        why = str(end) if isinstance(end, TimedOut | ProcessDied) else "the run was interrupted from outside"
        if isinstance(end, ProcessDied) and (error := bitsandbytes_error(self._output())) is not None:
            why += f"; bitsandbytes ended it because of the CUDA error: {error}"
        return self._lost(claim, paths, record, why)

    def _killed_for_memory(self, paths: RunPaths, record: RunRecord, end: ProcessDied) -> RunRecord:
        """Return the record of a run whose process died, marked as out of memory if that is probable."""
        failure = killed_for_memory(record, -end.code, self._kills_before) or ended_for_memory(record, self._output())
        if failure is None:
            return record
        failure = replace(failure, phase=self.state.phase, step=self.state.step)
        record = record.replace(status=Status.OUT_OF_MEMORY, ended_at=utc_now(), process=None, failure=failure)
        _write(paths, record)
        return record

    def _skipped_outcome(self, end: TrialRefused) -> Outcome:
        spec = self.setting.spec
        satisfied = (0.0,) * len(spec.constraints)
        failure = Failure("PredictedNotToFit", end.what, phase="prepare")
        return Outcome(Status.PRUNED, (None,) * len(spec.objectives), satisfied, None, failure, end.skipped)

    def _lost(self, claim: Claim, paths: RunPaths, record: RunRecord | None, why: str) -> None:
        """Record that the process died or hung, and requeue the trial, which continues from its newest checkpoint.

        If this was the last attempt, the run has failed.
        """
        if not self.worker.owns_trial(claim):
            return self.worker.forget_trial(self.number)
        print(f"trial {claim.number}, attempt {claim.attempt}: {why}", file=sys.stderr, flush=True)
        hint = (
            SMALLER_HINTS if memory_limits.out_of_memory_kills() is None else None
        )  # the kernel doesn't report here whether memory ran out
        failure = Failure("Lost", why, phase=self.state.phase, step=self.state.step, hint=hint)
        if record is not None:
            record = record.replace(status=Status.INTERRUPTED, ended_at=utc_now(), process=None, failure=failure)
            _write(paths, record)
        if not self.worker.requeue(self.number, claim, why) and record is not None:
            _write(paths, record.replace(status=Status.FAILED))
        return None

    def _retry_with_half(self, claim: Claim, paths: RunPaths, record: RunRecord) -> bool:
        """Requeue the trial with half the micro-batch, if the study allows it; return whether it was requeued.

        The record is reopened first, because any worker may claim the trial right after.
        """
        smaller = smaller_micro_batch(record.config["training"], record.plan)
        if smaller is None or claim.out_of_memory_retries >= self.setting.spec.out_of_memory_retries:
            return False
        if not self.worker.owns_trial(claim):
            return False
        warning = (
            f"memory ran out with micro-batches of {smaller.before} {smaller.unit}; "
            f"run again with {smaller.after}, the batch unchanged"
        )
        training = {**record.config["training"], smaller.key: smaller.after}
        shutil.rmtree(paths.checkpoints, ignore_errors=True)
        opened = record.replace(
            status=Status.INTERRUPTED,
            config={**record.config, "training": training},
            warnings=(*record.warnings, warning),
        )
        _write(paths, opened)
        if self.worker.memory_retry(self.number, claim):
            return True
        _write(paths, record)
        return False

    def _output(self) -> str:
        """Return the end of what the trial process wrote to its log during this attempt."""
        with contextlib.suppress(OSError), self._host_start.log.open("rb") as stream:
            stream.seek(max(self._log_start, self._host_start.log.stat().st_size - OUTPUT_BYTES))
            return stream.read().decode("utf-8", "replace")
        return ""

    # A full disk.

    def _disk_is_full(self, end: End, paths: RunPaths) -> bool:
        if isinstance(end, DiskFull) or (isinstance(end, UserError) and is_disk_full(end.what)):
            return True
        record = _readable_record(paths)
        return isinstance(end, TrialEnded) and record is not None and _failed_by_full_disk(record)

    def _pause(self, paths: RunPaths) -> bool:
        """Wait until something can be written again, longer each time. ``False``: the worker was asked to stop
        first."""
        self._pauses += 1
        self.state.phase = "paused: the disk is full"
        message = f"the disk is full at {paths.folder.parent}; trial {self.state.trial} waits until there is room"
        print(message, file=sys.stderr, flush=True)
        next_check = time.monotonic() + min(2.0**self._pauses, MAX_PAUSE_SECONDS)
        while self.worker.stopping != NOW:
            time.sleep(LISTEN_SECONDS)
            if time.monotonic() > next_check and _can_write(paths):
                return True
        return False

    # The host.

    def _end_host(self, politely: bool = True) -> None:
        host, self._host = self._host, None
        self.state.host_pid = None
        if host is not None and politely:
            host.end()
        elif host is not None:
            host.kill()

    def _show(self, claim: Claim, run_id: str) -> None:
        state = self.state
        state.trial, state.attempt, state.run_id = claim.number, claim.attempt, run_id
        state.params, state.started_at, state.phase = dict(claim.params), utc_now(), "start"


def _run_id(spec: StudySpec, claim: Claim) -> str:
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    return slug(f"{stamp}-{slug(spec.name)}-{claim.number:04d}-{secrets.token_hex(2)}", 120)


def _is_resumable(record: RunRecord) -> bool:
    return record.status in (Status.RUNNING, Status.INTERRUPTED) or _failed_by_full_disk(record)


def _leaves_process_unusable(record: RunRecord) -> bool:
    """Return whether no further trial may run in the process of a run that has ended.

    The allocator's state after a failed allocation is undefined. After some CUDA errors (illegal memory access, failed
    launch) every later call fails, and such an error may be hidden behind another one: any failure on a GPU counts.
    """
    failed_on_gpu = record.status is Status.FAILED and record.environment.device.kind == "cuda"
    return record.status is Status.OUT_OF_MEMORY or failed_on_gpu


def _failed_by_full_disk(record: RunRecord) -> bool:
    failure = record.failure
    return record.status is Status.FAILED and failure is not None and is_disk_full(failure.message)


def _readable_record(paths: RunPaths) -> RunRecord | None:
    """Return the run's record; ``None`` if there is none. An unreadable one is renamed, and the trial is run again."""
    if not paths.record.exists():
        return None
    try:
        return read_record(paths.record)
    except RecordError:
        with contextlib.suppress(OSError):
            os.replace(paths.record, paths.record.with_suffix(".json.damaged"))
        return None


def _write(paths: RunPaths, record: RunRecord) -> None:
    """Write the record. On a full disk it still says RUNNING, and readers see that its process is dead."""
    with contextlib.suppress(OSError):
        write_json(paths.record, record)


def _wait_for_last_owner(paths: RunPaths) -> None:
    deadline = time.monotonic() + LAST_OWNER_SECONDS
    while time.monotonic() < deadline:
        record = _readable_record(paths)
        if record is None or record.status is not Status.RUNNING or record.process is None:
            return
        if not is_alive(record.process):
            return
        time.sleep(LISTEN_SECONDS)


def _earlier_micro_batch(record: RunRecord | None) -> dict[str, int]:
    """Return the micro-batch of the earlier attempt, which may be smaller than configured after memory ran out."""
    training = record.config["training"] if record is not None else {}
    values = {key: training.get(key) for key in ("micro_batch_size", "micro_batch_tokens")}
    return {key: value for key, value in values.items() if isinstance(value, int)}


def _can_write(paths: RunPaths) -> bool:
    try:
        with tempfile.TemporaryFile(dir=paths.folder.parent) as probe:
            probe.write(b"\0" * PROBE_BYTES)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError:
        return False
    return True
