"""Executes one configuration: first record, run, last record, tracking. All ways to start a run call it."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from filelock import FileLock, Timeout, UnixFileLock

from qlora_exp.config.allowed_values import AUTO_TOKENS
from qlora_exp.config.enums import Engine
from qlora_exp.config.schema import Config
from qlora_exp.errors import DataError, QloraExpError, RecordError
from qlora_exp.estimate.budget import check_energy, without_limits
from qlora_exp.estimate.memory_fit import MemoryLimit, PredictedOutOfMemory, smaller_micro_batch, with_micro_batch
from qlora_exp.paths import OutputPaths, RunPaths
from qlora_exp.records.files import read_record, write_json
from qlora_exp.records.fit_types import Fit
from qlora_exp.records.types import KILLED_FOR_MEMORY, Environment, Failure, Plan, RunRecord, Status, Trial
from qlora_exp.runs import sleep_engine
from qlora_exp.runs.first_record import create_record, current_time, remove_record
from qlora_exp.runs.process import (
    EXIT_INTERRUPTED,
    hide_other_gpus,
    import_and_freeze_gc,
    set_threads,
    silence_libraries,
)
from qlora_exp.runs.termination import exit_if_memory_is_short
from qlora_exp.system import environment, signals
from qlora_exp.system.c_exit import call_at_c_exit
from qlora_exp.system.distributed import check_single_rank
from qlora_exp.system.out_of_memory import SMALLER_HINTS, memory_warning
from qlora_exp.training.outcome import Observer, PruneCheck, no_pruning
from qlora_exp.training.reporters import check_reporters

if TYPE_CHECKING:
    from qlora_exp.models.base_models import BaseModels
    from qlora_exp.runs.prepare import Prepared


def execute(
    config: Config,
    observer: Observer | None = None,
    resume: str | None = None,
    *,
    run_id: str | None = None,
    trial: Trial | None = None,
    report: PruneCheck = no_pruning,
    bases: BaseModels | None = None,
    deliver: Callable[[Callable[[], object]], object] | None = None,
    memory: MemoryLimit | None = None,
    alone: bool = False,
) -> RunRecord:
    """Run ``config``, write its record, deliver it to MLflow, and return the record.

    Args:
        observer: gets phases, steps and notes.
        resume: the id of an interrupted run to continue; ``config`` is then that run's configuration. Without a
            checkpoint it starts again in the same folder.
        run_id: the id of a new run; ``None``: a new id.
        trial: the trial that the run belongs to.
        report: called after each validation during training; returns whether the pruner stops the trial.
        bases: provides the base model; ``None``: it is loaded.
        deliver: makes the final delivery to MLflow, e.g. in a thread; ``None``: at once. With it, the start of the run
            doesn't wait for MLflow either.
        memory: the memory limit of a new run; ``None``: from ``budget``.
        alone: this process exists for this run only and ends with it.

    Raises:
        PredictedOutOfMemory: the predicted memory is above the limit; the run was not started.
        QloraExpError: wrong input, or another process executes the run to resume; the run was not started.
    """
    check_single_rank()
    memory = memory or _memory_limit(config)
    if trial is not None:
        config = without_limits(config)
    check_energy(config.budget, config.training.device)
    check_reporters(config.tracking)
    if config.training.engine is not Engine.sleep:
        hide_other_gpus(config.training.device)
    set_threads(config.training.threads)
    silence_libraries()
    outputs = OutputPaths.of(config.output_root)
    with contextlib.ExitStack() as locks:
        if resume is not None:
            locks.enter_context(_run_lock(outputs.run(resume)))
        if alone and config.training.engine is not Engine.sleep:
            if observer is not None:
                observer.phase("import libraries")
            import_and_freeze_gc(("qlora_exp.runs.pipeline",))
        if observer is not None:
            observer.phase("prepare")
        if resume is not None:  # its memory was checked when it first started
            earlier = read_record(outputs.run(resume).record)
            prepared = _prepare(_with_earlier_micro_batch(config, earlier), bases, memory)
            _check_same_data(earlier, prepared.data_fingerprint)
            record, paths = create_record(config, outputs, prepared.environment, resume, run_id, trial)
        else:  # wrong input raises here, before a run exists
            config, prepared, fit, warnings = _fit_micro_batch(config, bases, memory)
            record, paths = create_record(config, outputs, prepared.environment, resume, run_id, trial)
            warnings = (*warnings, *prepared.data_warnings)
            record = record.replace(fit=fit, warnings=(*record.warnings, *warnings))
            write_json(paths.record, record)  # explains a killed run: see killed_for_memory
            if observer is not None:
                for note in (*prepared.data_notes, *warnings):
                    observer.note(note)
        if resume is None:
            locks.enter_context(_run_lock(paths))
        if alone and config.tracking.enabled:
            if observer is not None:
                observer.phase("import and open MLflow")
            import_and_freeze_gc(("qlora_exp.tracking.run",))
        may_end = alone or deliver is not None  # never end a notebook's process
        return _run_and_deliver(config, prepared, record, paths, observer, resume is not None, report, deliver, may_end)


def _run_and_deliver(
    config: Config,
    prepared: _Prepared,
    record: RunRecord,
    paths: RunPaths,
    observer: Observer | None,
    resumed: bool,
    report: PruneCheck,
    deliver: Callable[[Callable[[], object]], object] | None,
    may_end: bool,
) -> RunRecord:
    """Run ``prepared``, write its last record and deliver it.

    ``may_end``: end this process if memory is so short that the run can't stop by itself.
    """
    outputs = OutputPaths.of(config.output_root)
    try:
        tracker = _tracker(config, outputs, warm=deliver is not None)
    except QloraExpError:
        if not resumed:
            remove_record(paths)
        raise
    tracker.start(record, paths, wait=deliver is None)
    if observer is not None:
        observer.note(f"run {record.run_id}")
    low_memory_guard: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if may_end:
        low_memory_guard = exit_if_memory_is_short(
            lambda number: _write_interrupted_record(paths, number), EXIT_INTERRUPTED
        )
    exit_guard: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if may_end and deliver is None:  # a worker completes the records of its trial processes
        exit_guard = call_at_c_exit(lambda: _write_exit_record(paths))
    with _sigterm_as_interrupt(), low_memory_guard, exit_guard:
        try:
            finished, input_error = prepared.run(record, paths, _EventForwarder(observer, tracker), report)
        except KeyboardInterrupt:  # a second one, while the first was being handled
            finished, input_error = _interrupted(record, paths), None
    with signals.delay_interrupt(
        "the run has ended and is sent to MLflow now; Ctrl-C again: leave that to qlora-exp sync"
    ):
        finished = finished.replace(ended_at=current_time(), process=None)
        write_json(paths.record, finished)
        if finished.status is Status.COMPLETED:
            paths.trained.unlink(missing_ok=True)
            if finished.training is None or finished.training.ended_by_budget is None:
                # The adapter is saved; checkpoints only add the optimizer's states.
                shutil.rmtree(paths.checkpoints, ignore_errors=True)
        if deliver is None:
            tracker.finish(finished)
        else:
            deliver(lambda: tracker.finish(finished))
    if input_error is not None:
        raise input_error
    return finished


def _write_interrupted_record(paths: RunPaths, number: int) -> None:
    """Write the last record of a run that can't stop after signal ``number``, because memory is too short."""
    record = read_record(paths.record)
    if record.status is not Status.RUNNING:
        return
    hint = (record.fit.would_fit if record.fit is not None else None) or SMALLER_HINTS
    what = f"the run could not stop by itself after signal {number}: memory was too short"
    failure = Failure(KILLED_FOR_MEMORY, what, hint=hint)
    write_json(
        paths.record, record.replace(status=Status.INTERRUPTED, ended_at=current_time(), process=None, failure=failure)
    )
    print(f"error: {what}\n  do:    {hint}", file=sys.stderr, flush=True)


def _write_exit_record(paths: RunPaths) -> None:
    """Write the last record of a run whose process a library is ending."""
    record = read_record(paths.record)
    if record.status is not Status.RUNNING:
        return
    what = "a library ended the run's process without an exception, as bitsandbytes does after a CUDA error"
    hint = f"see its last message on the terminal or in the log; if it says out of memory: {SMALLER_HINTS}"
    failure = Failure("ProcessExit", what, hint=hint)
    write_json(
        paths.record, record.replace(status=Status.FAILED, ended_at=current_time(), process=None, failure=failure)
    )
    print(f"error: {what}\n  do:    {hint}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _run_lock(paths: RunPaths) -> Iterator[None]:
    """Lock the run's folder for this process; the kernel releases the lock when the process ends in any way."""
    read_record(paths.record)  # raises if there is no run, before a lock file is created
    lock = FileLock(paths.lock)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        owner = paths.lock.read_text(encoding="utf-8") or "another process"
        raise RecordError(f"{owner} executes this run", str(paths.folder), "wait for it, or stop it first") from None
    if isinstance(lock, UnixFileLock):  # other lock types use the file's content themselves
        own = environment.process_identity()
        paths.lock.write_text(f"process {own.pid} on {own.host or 'an unnamed host'}", encoding="utf-8")
    try:
        yield
    finally:
        lock.release()


class _Prepared(Protocol):
    """A run that can start: the interface of both engines."""

    environment: Environment
    data_fingerprint: str | None
    data_warnings: tuple[str, ...]
    data_notes: tuple[str, ...]
    """How the rows are read, if no setting says it, and what may be a mistake; shown, not recorded as warnings."""
    plan: Plan | None

    def fit(self, memory: MemoryLimit) -> Fit | None: ...

    def run(
        self, record: RunRecord, paths: RunPaths, observer: Observer, report: PruneCheck
    ) -> tuple[RunRecord, QloraExpError | None]: ...


def preflight(config: Config, prepared: Prepared, probed: Environment) -> str | None:
    """Check a new run's predicted memory and budget without starting it. Returns a warning, or ``None``.

    Raises:
        ConfigError: ``run`` would refuse the configuration because of its budget or its memory.
    """
    from qlora_exp.estimate.preflight import memory_fit

    check_energy(config.budget, config.training.device)
    check_reporters(config.tracking)
    if config.training.engine is Engine.sleep:
        return memory_warning(sleep_engine.synthetic_fit(config, probed, _memory_limit(config)))
    return memory_warning(memory_fit(config, prepared.estimate, _memory_limit(config)))


def _memory_limit(config: Config) -> MemoryLimit:
    """Return the memory limit of a single run.

    ``budget.memory_bytes`` is a strict limit. Without it the limit is the device's memory, and a borderline prediction
    may start.
    """
    bound = config.budget.memory_bytes
    return MemoryLimit(
        bound, hosts=1, corrections=(), allow_borderline=bound is None, halvings=0, force=config.budget.force
    )


def _fit_micro_batch(
    config: Config, bases: BaseModels | None, memory: MemoryLimit
) -> tuple[Config, _Prepared, Fit | None, tuple[str, ...]]:
    """Prepare the run; halve its micro-batch until it fits, at most ``memory.halvings`` times.

    ``micro_batch_tokens=auto`` is halved as often as needed: peaks of similar runs may show that its prediction is too
    small. Returns the configuration, the prepared run, its predicted fit, and warnings.
    """
    prepared = _prepare(config, bases, memory)
    try:
        fit = prepared.fit(memory)
        return config, prepared, fit, _warnings(fit)
    except PredictedOutOfMemory as error:
        first_error = error
    requested = smaller = smaller_micro_batch(vars(config.training), prepared.plan)
    halvings = range(memory.halvings) if config.training.micro_batch_tokens != AUTO_TOKENS else itertools.count()
    for _ in halvings:
        if requested is None or smaller is None:
            break
        config = with_micro_batch(config, {smaller.key: smaller.after})
        warning = (
            f"predicted not to fit with micro-batches of {requested.before} {requested.unit}; "
            f"uses {smaller.after}, with the same batch size"
        )
        prepared = _prepare(config, bases, memory)
        with contextlib.suppress(PredictedOutOfMemory):
            fit = prepared.fit(memory)
            return config, prepared, fit, (warning, *_warnings(fit))
        smaller = smaller_micro_batch(vars(config.training), prepared.plan)
    raise first_error


def _with_earlier_micro_batch(config: Config, earlier: RunRecord) -> Config:
    """Return ``config`` with the earlier attempt's number in place of ``micro_batch_tokens=auto``: its memory limit may
    have been another one, e.g. that of two trials on one GPU."""
    tokens = earlier.plan.micro_batch_tokens if earlier.plan is not None else None
    if tokens is None or config.training.micro_batch_tokens != AUTO_TOKENS:
        return config
    return with_micro_batch(config, {"micro_batch_tokens": tokens})


def _warnings(fit: Fit | None) -> tuple[str, ...]:
    warning = memory_warning(fit)
    return (warning,) if warning is not None else ()


def _prepare(config: Config, bases: BaseModels | None, memory: MemoryLimit) -> _Prepared:
    return _SleepRun(config) if config.training.engine is Engine.sleep else _TrainingRun(config, bases, memory)


class _TrainingRun:
    """A run that trains a model."""

    def __init__(self, config: Config, bases: BaseModels | None, memory: MemoryLimit) -> None:
        from qlora_exp.runs.prepare import prepare

        self.config, self.bases = config, bases
        self.environment = environment.probe(config.training.device)
        self.prepared = prepare(config, self.environment, self.bases, memory)
        self.data_fingerprint: str | None = self.prepared.splits.record.fingerprint
        splits = self.prepared.splits
        self.data_warnings = splits.warnings
        read_as = [splits.read_as] if splits.read_as is not None else []
        self.data_notes: tuple[str, ...] = (*read_as, *splits.notes)
        self.plan: Plan | None = self.prepared.plan

    def fit(self, memory: MemoryLimit) -> Fit | None:
        from qlora_exp.estimate.preflight import memory_fit

        return memory_fit(self.config, self.prepared.estimate, memory)

    def run(
        self, record: RunRecord, paths: RunPaths, observer: Observer, report: PruneCheck
    ) -> tuple[RunRecord, QloraExpError | None]:
        from qlora_exp.runs.pipeline import run_pipeline

        return run_pipeline(self.config, self.prepared, record, paths, observer, report, self.bases)


class _SleepRun:
    """A run without training (``training.engine=sleep``): needs neither torch nor data."""

    data_fingerprint: str | None = None
    data_warnings: tuple[str, ...] = ()
    data_notes: tuple[str, ...] = ()
    plan: Plan | None = None

    def __init__(self, config: Config) -> None:
        self.config = config
        self.environment = environment.probe_without_torch()

    def fit(self, memory: MemoryLimit) -> Fit | None:
        return sleep_engine.synthetic_fit(self.config, self.environment, memory)

    def run(
        self, record: RunRecord, paths: RunPaths, observer: Observer, report: PruneCheck
    ) -> tuple[RunRecord, QloraExpError | None]:
        return sleep_engine.sleep_run(self.config, record, paths, observer, report), None


def _tracker(config: Config, outputs: OutputPaths, warm: bool) -> Any:
    """Return the tracker; with ``tracking=off`` one that does nothing and doesn't import MLflow."""
    if not config.tracking.enabled:
        return _NoTracker()
    from qlora_exp.tracking.run import Tracker

    return Tracker(config.tracking, outputs, warm)


class _NoTracker:
    def start(self, record: RunRecord, paths: RunPaths, wait: bool) -> None:
        return

    def log_curve(self, points: Any) -> None:
        return

    def finish(self, record: RunRecord) -> bool:
        return False


def _check_same_data(record: RunRecord, fingerprint: str | None) -> None:
    if record.data is not None and record.data.fingerprint != fingerprint:
        raise DataError("the data have changed since this run began", record.run_id, f"qlora-exp rerun {record.run_id}")


def _sigterm_as_interrupt() -> contextlib.AbstractContextManager[None]:
    """Let TERM (scheduler, container) and HUP (closed terminal) end a run like Ctrl-C in every phase. During training,
    :class:`~qlora_exp.training.callbacks.GracefulInterrupt` replaces this."""
    return signals.signals_as_interrupts()


def _interrupted(record: RunRecord, paths: RunPaths) -> RunRecord:
    with contextlib.suppress(RecordError):
        record = read_record(paths.record)
    return record.replace(status=Status.INTERRUPTED, failure=Failure("KeyboardInterrupt", "interrupted twice"))


class _EventForwarder:
    """Forwards a run's events to the observer, and its curve to the tracker."""

    def __init__(self, observer: Observer | None, tracker: Any) -> None:
        self.observer, self.tracker = observer, tracker

    def phase(self, name: str) -> None:
        if self.observer is not None:
            self.observer.phase(name)

    def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        self.tracker.log_curve([{"step": step, **metrics}])
        if self.observer is not None:
            self.observer.step(step, total, metrics)

    def note(self, text: str) -> None:
        if self.observer is not None:
            self.observer.note(text)
