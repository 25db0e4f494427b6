"""Joins configuration, run and tracking; what every door (Hydra, the verbs, Python) calls."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from filelock import FileLock, Timeout, UnixFileLock

from qlora_exp.config.schema import Config, Engine
from qlora_exp.errors import DataError, QloraExpError, RecordError
from qlora_exp.estimate.budget import check_energy, without_limits
from qlora_exp.estimate.memory_fit import MemoryLimit, PredictedOutOfMemory, next_smaller_micro_batch
from qlora_exp.paths import OutputPaths, RunPaths
from qlora_exp.records.files import read_record, write_json
from qlora_exp.records.types import KILLED_FOR_MEMORY, Environment, Failure, Fit, RunRecord, Status, Trial
from qlora_exp.runs import sleep_engine
from qlora_exp.runs.first_record import create_record, current_time, remove
from qlora_exp.runs.process import (
    EXIT_INTERRUPTED,
    hide_other_gpus,
    import_and_freeze_gc,
    set_threads,
    silence_libraries,
)
from qlora_exp.runs.termination import ended_when_memory_is_short
from qlora_exp.system import environment, signals
from qlora_exp.system.distributed import one_rank_only
from qlora_exp.system.out_of_memory import SMALLER_HINTS, near_the_bound
from qlora_exp.training.outcome import Observer, PruneCheck, no_pruning

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
    """Run ``config``, keep its record, and show it in MLflow.

    Args:
        resume: the id of an interrupted run to go on with; its own configuration is used by the caller. Where it has
            no checkpoint it starts again in the same folder.
        run_id: the id of a new run; ``None``: one is made.
        trial: which trial of which study the run is.
        report: asked after each validation during training whether to stop.
        bases: where the base model comes from; ``None``: it is loaded.
        deliver: does the last delivery to MLflow, e.g. in a thread; ``None``: at once. Whoever gives it need not wait
            for MLflow at the run's start either.
        memory: what a new run must fit into; ``None``: as the configuration's budget has it.
        alone: this process is there for the run, and ends with it.

    Raises:
        PredictedOutOfMemory: it is predicted to need more memory than it may take; nothing was started.
        QloraExpError: wrong input, or another process executes the run to be resumed; nothing was started.
    """
    one_rank_only()
    memory = memory or _memory_rule(config)
    if trial is not None:
        config = without_limits(config)
    check_energy(config.budget, config.training.device)
    if config.training.engine is not Engine.sleep:
        hide_other_gpus(config.training.device)
    set_threads(config.training.threads)
    silence_libraries()
    outputs = OutputPaths.of(config.output_root)
    with contextlib.ExitStack() as held:
        if resume is not None:
            held.enter_context(_run_lock(outputs.run(resume)))
        if observer is not None:
            observer.phase("prepare")
        if alone and config.training.engine is not Engine.sleep:
            import_and_freeze_gc(("qlora_exp.runs.pipeline",))
        if resume is not None:  # it was let in when it began
            prepared = _prepare(config, bases)
            _check_same_data(read_record(outputs.run(resume).record), prepared.data_fingerprint)
            record, paths = create_record(config, outputs, prepared.environment, resume, run_id, trial)
        else:  # wrong input ends here, before a run exists
            config, prepared, fit, warnings = _fit_micro_batch(config, bases, memory)
            record, paths = create_record(config, outputs, prepared.environment, resume, run_id, trial)
            record = record.replace(fit=fit, warnings=(*record.warnings, *warnings))
            write_json(paths.record, record)  # whoever finds a killed run looks there
            if observer is not None:
                for warning in warnings:
                    observer.note(warning)
        if resume is None:
            held.enter_context(_run_lock(paths))
        if alone and config.tracking.enabled:
            import_and_freeze_gc(("qlora_exp.tracking.run",))
        ours = alone or deliver is not None  # a notebook's process isn't ours to end
        return _run_and_deliver(config, prepared, record, paths, observer, resume is not None, report, deliver, ours)


def _run_and_deliver(
    config: Config,
    prepared: _Prepared,
    record: RunRecord,
    paths: RunPaths,
    observer: Observer | None,
    resumed: bool,
    report: PruneCheck,
    deliver: Callable[[Callable[[], object]], object] | None,
    ours: bool,
) -> RunRecord:
    """``ours``: this process may be ended where memory is so short that the run can't end by itself."""
    outputs = OutputPaths.of(config.output_root)
    try:
        tracker = _tracker(config, outputs, warm=deliver is not None)
    except QloraExpError:
        if not resumed:
            remove(paths)
        raise
    tracker.start(record, paths, wait=deliver is None)
    if observer is not None:
        observer.note(f"run {record.run_id}")
    short: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if ours:
        short = ended_when_memory_is_short(lambda number: _last_words(paths, number), EXIT_INTERRUPTED)
    with _sigterm_as_interrupt(), short:
        try:
            finished, wrong = prepared.run(record, paths, _Told(observer, tracker), report)
        except KeyboardInterrupt:  # a second one, while the first was being answered
            finished, wrong = _interrupted(record, paths), None
    with signals.held_back("the run has ended and is being delivered to MLflow; Ctrl-C again: leave that to sync"):
        finished = finished.replace(ended_at=current_time(), process=None)
        write_json(paths.record, finished)
        if finished.status is Status.COMPLETED:
            paths.trained.unlink(missing_ok=True)
            if finished.training is None or finished.training.ended_by_budget is None:
                shutil.rmtree(paths.checkpoints, ignore_errors=True)  # the adapter is saved: these are optimizer states
        if deliver is None:
            tracker.finish(finished)
        else:
            deliver(lambda: tracker.finish(finished))
    if wrong is not None:
        raise wrong
    return finished


def _last_words(paths: RunPaths, number: int) -> None:
    """The record of a run that was asked to end by signal ``number``, and could not for want of memory."""
    record = read_record(paths.record)
    if record.status is not Status.RUNNING:
        return
    hint = (record.fit.would_fit if record.fit is not None else None) or SMALLER_HINTS
    what = f"asked to end by signal {number}, the run could not end by itself: memory was too short"
    failure = Failure(KILLED_FOR_MEMORY, what, hint=hint)
    write_json(
        paths.record, record.replace(status=Status.INTERRUPTED, ended_at=current_time(), process=None, failure=failure)
    )
    print(f"error: {what}\n  do:    {hint}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _run_lock(paths: RunPaths) -> Iterator[None]:
    """Hold the run's folder for this process alone; the kernel lets go of it when the process ends, however it ends."""
    read_record(paths.record)  # no record, no run: nothing is made in its folder
    lock = FileLock(paths.lock)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        who = paths.lock.read_text(encoding="utf-8") or "another process"
        raise RecordError(f"{who} executes this run", str(paths.folder), "wait for it, or stop it first") from None
    if isinstance(lock, UnixFileLock):  # where the disk has no flock, the file's content is filelock's own
        me = environment.process_identity()
        paths.lock.write_text(f"process {me.pid} on {me.host or 'an unnamed host'}", encoding="utf-8")
    try:
        yield
    finally:
        lock.release()


class _Prepared(Protocol):
    """A run that may begin."""

    environment: Environment
    data_fingerprint: str | None

    def fit(self, memory: MemoryLimit) -> Fit | None: ...

    def run(
        self, record: RunRecord, paths: RunPaths, observer: Observer, report: PruneCheck
    ) -> tuple[RunRecord, QloraExpError | None]: ...


def preflight(config: Config, prepared: Prepared, probed: Environment) -> str | None:
    """What is held against a new run's predictions, asked without making one. Returns a warning, or ``None``.

    Raises:
        ConfigError: it would be refused for its budget or its memory.
    """
    from qlora_exp.estimate.preflight import memory_fit

    check_energy(config.budget, config.training.device)
    if config.training.engine is Engine.sleep:
        return near_the_bound(sleep_engine.synthetic_fit(config, probed, _memory_rule(config)))
    return near_the_bound(memory_fit(config, prepared, probed, _memory_rule(config)))


def _memory_rule(config: Config) -> MemoryLimit:
    """Of a run by itself: what its budget says is meant; a card's memory is held against a prediction that may err."""
    bound = config.budget.memory_bytes
    return MemoryLimit(bound, hosts=1, kin=(), allow_borderline=bound is None, halvings=0, force=config.budget.force)


def _fit_micro_batch(
    config: Config, bases: BaseModels | None, memory: MemoryLimit
) -> tuple[Config, _Prepared, Fit | None, tuple[str, ...]]:
    """The run as it is predicted to fit: with its micro-batch halved, where ``memory`` allows that."""
    batch = config.training.batch_size
    rows = less = config.training.micro_batch_size or batch
    try:
        prepared = _prepare(config, bases)
        fit = prepared.fit(memory)
        return config, prepared, fit, _warnings(fit)
    except PredictedOutOfMemory as error:
        refused = error
    for _ in range(memory.halvings):
        if less == 1:
            break
        less = next_smaller_micro_batch(less, batch)
        smaller = dataclasses.replace(config, training=dataclasses.replace(config.training, micro_batch_size=less))
        told = f"predicted not to fit with micro-batches of {rows}; run with {less}, the batch unchanged"
        with contextlib.suppress(PredictedOutOfMemory):
            prepared = _prepare(smaller, bases)
            fit = prepared.fit(memory)
            return smaller, prepared, fit, (told, *_warnings(fit))
    raise refused


def _warnings(fit: Fit | None) -> tuple[str, ...]:
    warning = near_the_bound(fit)
    return (warning,) if warning is not None else ()


def _prepare(config: Config, bases: BaseModels | None) -> _Prepared:
    return _Sleep(config) if config.training.engine is Engine.sleep else _Training(config, bases)


class _Training:
    """A run that trains a model."""

    def __init__(self, config: Config, bases: BaseModels | None) -> None:
        from qlora_exp.runs.prepare import prepare

        self.config, self.bases = config, bases
        self.environment = environment.probe(config.training.device)
        self.prepared = prepare(config, self.environment, self.bases)
        self.data_fingerprint: str | None = self.prepared.splits.record.fingerprint

    def fit(self, memory: MemoryLimit) -> Fit | None:
        from qlora_exp.estimate.preflight import memory_fit

        return memory_fit(self.config, self.prepared, self.environment, memory)

    def run(
        self, record: RunRecord, paths: RunPaths, observer: Observer, report: PruneCheck
    ) -> tuple[RunRecord, QloraExpError | None]:
        from qlora_exp.runs.pipeline import run_pipeline

        return run_pipeline(self.config, self.prepared, record, paths, observer, report, self.bases)


class _Sleep:
    """A run that trains nothing: neither torch nor data are touched."""

    data_fingerprint: str | None = None

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
    """The tracker; for ``tracking=off`` one that does nothing, and for which MLflow isn't imported."""
    if not config.tracking.enabled:
        return _Untracked()
    from qlora_exp.tracking.run import Tracker

    return Tracker(config.tracking, outputs, warm)


class _Untracked:
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
    """TERM (a scheduler's, a container's) and HUP (a closed terminal) end a run like Ctrl-C in every phase; training
    has a gentler way of its own."""
    return signals.interrupting()


def _interrupted(record: RunRecord, paths: RunPaths) -> RunRecord:
    with contextlib.suppress(RecordError):
        record = read_record(paths.record)
    return record.replace(status=Status.INTERRUPTED, failure=Failure("KeyboardInterrupt", "interrupted twice"))


class _Told:
    """Passes what a run tells on to the person who watches, and its curve to the tracker."""

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
