"""Joins configuration, run and tracking; what every door (Hydra, the verbs, Python) calls."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import secrets
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import yaml
from filelock import FileLock, Timeout, UnixFileLock

from qlora_exp import compose, environment, redaction, synthetic
from qlora_exp.config import Config, Engine, to_plain
from qlora_exp.endings import Observer, Report, never_stop
from qlora_exp.errors import ConfigError, DataError, QloraExpError, RecordError
from qlora_exp.paths import OutputPaths, RunPaths, make_folder, slug
from qlora_exp.records import (
    SCHEMA_VERSION,
    Environment,
    Failure,
    RunRecord,
    Status,
    Trial,
    read_record,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from qlora_exp.one_run import Bases

EXIT_COMPLETED, EXIT_RUN_FAILED, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


class Ended(KeyboardInterrupt):
    """Leaves Hydra (which turns an ordinary exception into a trace and exit code 1) with an exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)  # a launcher brings it from another process
        self.code = code


def set_threads(threads: int | None) -> None:
    """Fix the CPU threads before torch is imported. Two OpenMP pools that spin on the same cores slow each other down
    many times over, so waiting is passive."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        import torch

        wanted = threads or int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads())
        torch.set_num_threads(wanted)


def quiet_libraries() -> None:
    """No telemetry, no progress bars of the libraries' own, no fork of tokenizers after threads exist."""
    for key, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }.items():
        os.environ.setdefault(key, value)
    # bitsandbytes names an optional kernel at import, and at each layer's first forward that LLM.int8() takes 16 bits.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # transformers 5.23 warns of names that TRL itself passes; nobody at the terminal can do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning)


def execute(
    config: Config,
    observer: Observer | None = None,
    resume: str | None = None,
    *,
    run_id: str | None = None,
    trial: Trial | None = None,
    report: Report = never_stop,
    bases: Bases | None = None,
    deliver: Callable[[Callable[[], object]], object] | None = None,
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

    Raises:
        QloraExpError: wrong input, or another process executes the run to be resumed; nothing was started.
    """
    set_threads(config.training.threads)
    quiet_libraries()
    outputs = OutputPaths.of(config.output_root)
    with contextlib.ExitStack() as held:
        if resume is not None:
            held.enter_context(_owned(outputs.run(resume)))
        if observer is not None:
            observer.phase("prepare")
        prepared = _prepare(config, bases)  # wrong input ends here, before a run exists
        if resume is not None:
            _check_same_data(read_record(outputs.run(resume).record), prepared.data_fingerprint)
        record, paths = _begin(config, outputs, prepared.environment, resume, run_id, trial)
        if resume is None:
            held.enter_context(_owned(paths))
        return _run_and_deliver(config, prepared, record, paths, observer, resume is not None, report, deliver)


def _run_and_deliver(
    config: Config,
    prepared: _Prepared,
    record: RunRecord,
    paths: RunPaths,
    observer: Observer | None,
    resumed: bool,
    report: Report,
    deliver: Callable[[Callable[[], object]], object] | None,
) -> RunRecord:
    outputs = OutputPaths.of(config.output_root)
    try:
        tracker = _tracker(config, outputs, warm=deliver is not None)
    except QloraExpError:
        if not resumed:
            _remove(paths)
        raise
    tracker.start(record, paths, wait=deliver is None)
    if observer is not None:
        observer.note(f"run {record.run_id}")
    with _terminated_like_interrupted():
        finished, wrong = prepared.run(record, paths, _Told(observer, tracker), report)
    finished = finished.replace(ended_at=_now(), process=None)
    write_json(paths.record, finished)
    if finished.status is Status.COMPLETED:
        paths.trained.unlink(missing_ok=True)
        shutil.rmtree(paths.checkpoints, ignore_errors=True)  # the adapter is saved; what is left: optimizer states
    if deliver is None:
        tracker.finish(finished)
    else:
        deliver(lambda: tracker.finish(finished))
    if wrong is not None:
        raise wrong
    return finished


@contextlib.contextmanager
def _owned(paths: RunPaths) -> Iterator[None]:
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

    def run(
        self, record: RunRecord, paths: RunPaths, observer: Observer, report: Report
    ) -> tuple[RunRecord, QloraExpError | None]: ...


def _prepare(config: Config, bases: Bases | None) -> _Prepared:
    return _Sleep(config) if config.training.engine is Engine.sleep else _Training(config, bases)


class _Training:
    """A run that trains a model."""

    def __init__(self, config: Config, bases: Bases | None) -> None:
        from qlora_exp import one_run

        self.config, self.bases = config, bases
        self.environment = environment.probe(config.training.device)
        self.prepared = one_run.prepare(config, self.environment, self.bases)
        self.data_fingerprint: str | None = self.prepared.splits.record.fingerprint

    def run(
        self, record: RunRecord, paths: RunPaths, observer: Observer, report: Report
    ) -> tuple[RunRecord, QloraExpError | None]:
        from qlora_exp import one_run

        return one_run.run(self.config, self.prepared, record, paths, observer, report, self.bases)


class _Sleep:
    """A run that trains nothing: neither torch nor data are touched."""

    data_fingerprint: str | None = None

    def __init__(self, config: Config) -> None:
        self.config = config
        self.environment = environment.probe_without_torch()

    def run(
        self, record: RunRecord, paths: RunPaths, observer: Observer, report: Report
    ) -> tuple[RunRecord, QloraExpError | None]:
        return synthetic.run(self.config, record, paths, observer, report), None


def _tracker(config: Config, outputs: OutputPaths, warm: bool) -> Any:
    """The tracker; for ``tracking=off`` one that does nothing, and for which MLflow isn't imported."""
    if not config.tracking.enabled:
        return _Untracked()
    from qlora_exp import tracking

    return tracking.Tracker(config.tracking, outputs, warm)


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


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """TERM (a scheduler's, a container's) is told like Ctrl-C in every phase; training has a gentler way of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


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


def _begin(
    config: Config,
    outputs: OutputPaths,
    probed: Environment,
    resume: str | None,
    run_id: str | None,
    trial: Trial | None,
) -> tuple[RunRecord, RunPaths]:
    plain = redaction.redact({key: value for key, value in to_plain(config).items() if key not in ("sweep", "workers")})
    if resume is not None:
        paths = outputs.run(resume)
        old = read_record(paths.record)
        record = old.replace(
            status=Status.RUNNING,
            ended_at=None,
            config=plain if trial is not None else old.config,
            failure=None,
            earlier_failures=(*old.earlier_failures, *((old.failure,) if old.failure is not None else ())),
            environment=probed,
            process=environment.process_identity(),
            trial=trial or old.trial,
        )
    else:
        run_id = run_id or _new_run_id(config)
        paths = outputs.run(run_id)
        make_folder(paths.folder, exist_ok=trial is not None)
        record = RunRecord(
            schema_version=SCHEMA_VERSION,
            run_id=run_id,
            name=redaction.redact_text(_name(config, trial)),
            status=Status.RUNNING,
            started_at=_now(),
            ended_at=None,
            config=plain,
            environment=probed,
            process=environment.process_identity(),
            seed=config.seed,
            trial=trial,
        )
        if config.training.engine is Engine.sleep:
            record = synthetic.marked(record)
    write_text(paths.config, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    write_json(paths.record, record)
    return record, paths


def _remove(paths: RunPaths) -> None:
    for file in (paths.record, paths.config, paths.lock):
        file.unlink(missing_ok=True)
    paths.folder.rmdir()


def _name(config: Config, trial: Trial | None) -> str:
    name = config.name or display_name(config)
    return name if trial is None else f"{name} #{trial.number}"


def display_name(config: Config) -> str:
    """The axes in a few words, e.g. ``embedded-base nf4 r8 attention s1``."""
    where = "+".join(config.targets.modules) if config.targets.modules else config.targets.set
    model = f"{config.model.family}-{config.model.variant.value}"
    return f"{model} {config.quantization.mode.value} r{config.lora.r} {where} s{config.seed}"


def _new_run_id(config: Config) -> str:
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    model = f"{config.model.family}-{config.model.variant.value}"
    return slug(f"{stamp}-{model}-{config.quantization.mode.value}-r{config.lora.r}-{secrets.token_hex(2)}", 120)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def exit_code_of(status: Status) -> int:
    if status in (Status.COMPLETED, Status.PRUNED):
        return EXIT_COMPLETED
    return EXIT_INTERRUPTED if status is Status.INTERRUPTED else EXIT_RUN_FAILED


def tell(error: QloraExpError) -> None:
    """Print an error to stderr as the person at the terminal should read it."""
    print(f"error: {redaction.redact_text(str(error))}", file=sys.stderr)


def end_killed_run(config: Config, pid: int, number: int) -> None:
    """A child that was killed could not end its own record. SIGKILL without a sender is how Linux ends a process that
    asks for more memory than there is."""
    from qlora_exp import tracking

    outputs = OutputPaths.of(config.output_root)
    told = Failure(
        kind="Killed",
        message=f"the run's process was ended by signal {number}",
        hint="if it was the system's out-of-memory killer (dmesg says so): a smaller training.micro_batch_size",
    )
    print(f"error: {told.message}\n  do:    {told.hint}", file=sys.stderr)
    here = environment.process_identity()
    for path in outputs.runs.glob("*/record.json"):
        with contextlib.suppress(RecordError):
            record = read_record(path)
            owner = record.process
            if (
                record.status is Status.RUNNING
                and owner is not None
                and (owner.pid, owner.boot_id) == (pid, here.boot_id)
            ):
                write_json(path, record.replace(status=Status.FAILED, ended_at=_now(), process=None, failure=told))
    if config.tracking.enabled:
        tracking.sync(outputs.root)


def run_and_tell(config: Config, resume: str | None = None) -> int:
    """Run with progress on stderr, print the summary on stdout, and return the exit code."""
    from qlora_exp.progress import Progress

    with Progress() as observer:
        record = execute(config, observer, resume)
    print(summary(record, config))
    return exit_code_of(record.status)


def summary(record: RunRecord, config: Config) -> str:
    """Three lines after a run: what came of it, and where to look."""
    lines = [f"{record.status}: {record.name}  ({record.run_id})"]
    before, after = record.scores.before, record.scores.after
    if after is not None:
        for name in ("accuracy", "exact_match", "loss"):
            if getattr(after, name) is not None:
                old = getattr(before, name) if before else None
                shown = f"{old:.3f} → " if old is not None else ""
                lines.append(f"  {name} {shown}{getattr(after, name):.3f} on {after.items} {after.split} items")
    if record.failure is not None:
        lines.append(
            f"  {record.failure.kind} in phase {record.failure.phase}: {record.failure.message.splitlines()[0]}"
        )
        if record.failure.hint:
            lines.append(f"  do: {record.failure.hint}")
    lines.append(f"  record: {OutputPaths.of(config.output_root).run(record.run_id).record}")
    return "\n".join(lines)


def config_from_plain(plain: dict[str, Any]) -> Config:
    """A configuration from a record or a child's standard input, checked like any other."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        # A run's record doesn't keep the settings of the sweep that it belongs to.
        plain = {"sweep": None, "workers": None, **plain}
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(plain))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0], "the recorded configuration", "run it again by hand") from None
    return compose.checked(merged)
