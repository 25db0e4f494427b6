"""A sweep from start to end: the study, its MLflow parent run, the workers, and the conclusion."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig

from qlora_exp.config.interpolations import unresolved_texts
from qlora_exp.config.override_errors import official_sweeper_problems
from qlora_exp.config.overrides import (
    SEARCH_PATH,
    escape_interpolations,
    is_hydra,
    override_key,
    search_folders,
    search_path,
)
from qlora_exp.config.schema import BudgetConfig, WorkersConfig
from qlora_exp.errors import QloraExpError, StudyError, raise_all, unwritable_error
from qlora_exp.estimate.budget import budget_of, check_energy
from qlora_exp.formatting import bytes_text
from qlora_exp.orchestration import launcher_signals
from qlora_exp.orchestration.command import SweepCommand, study_spec, typed_settings
from qlora_exp.orchestration.launcher_processes import launcher_job
from qlora_exp.orchestration.memory_feedback import MAX_CONSECUTIVE_SKIPS
from qlora_exp.orchestration.orchestrator import Orchestration, orchestrating, wait_for_others
from qlora_exp.orchestration.prestart import prestarted
from qlora_exp.orchestration.status import LiveStatus, best_table, memory_predictions, progress_text, tracking_rows
from qlora_exp.orchestration.study_budget import StudyBudget, affordable_trials_message, check_memory
from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.rank_doubling.answers import announce, print_answers
from qlora_exp.rank_doubling.ladder import proposer_of
from qlora_exp.records.files import write_json
from qlora_exp.records.schema import from_dict, to_dict
from qlora_exp.records.types import Status
from qlora_exp.runs.process import (
    EXIT_COMPLETED,
    EXIT_INTERRUPTED,
    EXIT_RUN_FAILED,
    EXIT_WRONG_INPUT,
    ExitCode,
    print_error,
)
from qlora_exp.study.space import point_overrides
from qlora_exp.study.spec import read_spec, storage_of, without_secrets, write_spec
from qlora_exp.study.types import Counts, StudySpec
from qlora_exp.system import signals, streams
from qlora_exp.system.distributed import check_single_rank

Launch = Callable[[list[list[str]]], Sequence[Any]]
"""Takes the overrides of each job and returns when all have ended; the results have Hydra's ``return_value``."""


def sweep_for_hydra(config: DictConfig, arguments: Sequence[str], launcher: Any) -> None:
    """Run a sweep for Hydra's sweeper; ``arguments`` are the command line's overrides.

    ``hydra.sweeper.params`` are read unresolved, since an axis may change what they refer to.

    Raises:
        ExitCode: always, because Hydra discards what a sweeper returns.
    """
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    texts = unresolved_texts(config.hydra.overrides, "hydra")
    hydra = [text for text in texts if not text.startswith(("hydra.mode=", SEARCH_PATH))]
    search_path_texts = [text for text in texts if text.startswith(SEARCH_PATH)]
    own_folders = search_folders(search_path_texts)[1:]
    if own_folders:
        hydra.append(search_path(own_folders))
    command = None
    try:
        raise_all(official_sweeper_problems(list(config.hydra.sweeper)))
        command = study_spec([*arguments, *hydra], unresolved_texts(config.hydra.sweeper, "params"))
        job = config.hydra.job
        in_this_process = isinstance(launcher, BasicLauncher) and not (job.env_set or job.chdir)
        code = run_sweep(command, lambda jobs: launcher.launch(jobs, initial_job_idx=0), in_this_process)
    except QloraExpError as error:
        print_error(error)
        code = EXIT_WRONG_INPUT
    except Exception as error:
        shown_error = _user_error(error, command.spec if command is not None else None)
        if shown_error is None:
            raise
        print_error(shown_error)
        code = EXIT_WRONG_INPUT
    raise ExitCode(code)


def _user_error(error: Exception, spec: StudySpec | None) -> QloraExpError | None:
    """Return the error to show for ``error``; ``None``: a bug, which gets a traceback."""
    from qlora_exp.study.storage import is_unreachable, unreachable_error

    if isinstance(error, OSError):
        return unwritable_error(error)
    return unreachable_error(error, spec.storage, spec.name) if spec is not None and is_unreachable(error) else None


def run_sweep(command: SweepCommand, launch: Launch, here: bool = False) -> int:
    """Work on the study until it is complete, stopped or has failed too often, and print the conclusion.

    ``here``: whether ``launch`` runs its jobs in this process, with the same environment and folder.

    Exit codes: 0 complete; 1 ``sweep.max_failures`` reached, no trial completed, or a worker failed; 130 interrupted.

    Raises:
        QloraExpError: another process orchestrates the study (and ``sweep.join`` is false), the study can't be opened,
        or it exists with another space. Nothing was started.
    """
    from qlora_exp.study.study import Study

    spec, paths = command.spec, command.paths
    budget = budget_of(command.config)
    check_energy(budget, command.config.training.device)
    if budget.memory_bytes is not None:
        check_memory(command)
    study_budget = StudyBudget(budget, OutputPaths.of(spec.output_root))
    with contextlib.ExitStack() as resources:
        orchestration = resources.enter_context(orchestrating(paths, spec.name, command.sweep.join, command.workers))
        if here:
            resources.enter_context(prestarted(command.config, command.workers, paths, spec.n_trials))
        opened = Study.open(spec, paths, proposer_of(spec, paths))
        spec = opened.spec
        command = replace(command, spec=spec)
        write_spec(spec, paths)
        resources.callback(_print_not_delivered, command, opened)
        if _is_complete(opened.counts()):
            print(f"study {spec.name} is complete; sweep.n_trials=… continues it, sweep.name=… starts another")
            with _finish_for_lost_holder(command, opened, orchestration, study_budget, EXIT_COMPLETED):
                return _conclude(opened, spec, paths, study_budget, budget)
        budget_lines = [f"\n  {text}" for text in affordable_trials_message(command, opened, study_budget)]
        print(_announcement(command, opened.counts()), *budget_lines, sep="", file=sys.stderr, flush=True)
        if spec.ladder is not None:
            announce(spec, command.sweep.ladder)
        with contextlib.ExitStack() as trackers:
            shares = not orchestration.held
            tracker = trackers.enter_context(_study_tracker(command, opened, orchestration, study_budget))
            with LiveStatus(spec, opened, paths, tracker):
                code = _launch(launch, command, opened)
            if shares:
                trackers.enter_context(_finish_for_lost_holder(command, opened, orchestration, study_budget, code))
            if code not in (EXIT_COMPLETED, EXIT_INTERRUPTED):
                return code
            conclusion = _conclude(opened, spec, paths, study_budget, budget)
            return conclusion if _is_complete(opened.counts()) else code or conclusion


def work(raw: Any, overrides: Sequence[str]) -> Any:
    """Run one launcher job: a worker that runs trials until none is left.

    It needs only the study's name and output root, so that any launcher can run it on another machine that shares the
    folder.
    """
    from qlora_exp.orchestration.worker import run_worker

    streams.ignore_write_errors()  # a launcher may run this job in a new process
    paths = OutputPaths.of(str(raw.output_root)).study(str(raw.sweep.name))
    spec, workers = read_spec(paths), typed_settings(raw.workers, WorkersConfig)
    # study.json holds no secrets; this job's command line does.
    own_overrides = [
        text for text in overrides if not text.startswith(("workers.job=", "sweep.name=", "sweep.storage="))
    ]
    hydra_overrides = [text for text in spec.overrides if is_hydra(override_key(text))]
    try:
        check_single_rank()
        spec = replace(spec, overrides=(*own_overrides, *hydra_overrides), storage=storage_of(spec, raw.sweep.storage))
        with launcher_job():
            result = run_worker(spec, paths, workers, int(raw.workers.job))
        if result.by_signal and launcher_signals.launches_sweep():
            raise ExitCode(EXIT_INTERRUPTED)
        return result
    except QloraExpError as error:
        print_error(error)
        raise ExitCode(error.exit_code) from None


def jobs_of(command: SweepCommand) -> list[list[str]]:
    """Return the overrides of each launcher job."""
    spec = command.spec
    overrides = [text for text in spec.overrides if not is_hydra(override_key(text))]
    study_overrides: dict[str, Any] = {"sweep.name": escape_interpolations(spec.name)}
    if command.sweep.storage is not None:
        study_overrides["sweep.storage"] = spec.storage
    return [
        [*overrides, *point_overrides(study_overrides), f"workers.job={job}"] for job in range(command.workers.jobs)
    ]


def _launch(launch: Launch, command: SweepCommand, opened: Any) -> int:
    """Run the jobs to their end. An exit code other than 0: the study isn't complete, and a worker failed or was
    lost."""
    name, code = command.spec.name, EXIT_COMPLETED
    problems: list[QloraExpError] = []
    try:
        with launcher_signals.stop_workers_on_signal(command.paths):
            results = launch(jobs_of(command))
    except ExitCode as ended:
        return ended.code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:  # every launcher raises its own exception for a killed job
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        hint = f"qlora-exp resume {shlex.quote(name)} continues it"
        code = EXIT_RUN_FAILED
        problems.append(StudyError(f"the launcher lost a worker: {reason}", f"study {name}", hint))
        results = []
        wait_for_others(opened, command.workers)
    for result in results:
        try:
            _ = result.return_value
        except QloraExpError as error:
            problems.append(error)
            code = error.exit_code
    if code and _is_complete(opened.counts()):
        for problem in problems:
            print(f"{problem.what}; the other workers completed the study", file=sys.stderr, flush=True)
        return EXIT_COMPLETED
    for problem in problems:
        print_error(problem)
    return code


@contextlib.contextmanager
def _finish_for_lost_holder(
    command: SweepCommand, opened: Any, orchestration: Orchestration, study_budget: StudyBudget, code: int
) -> Iterator[None]:
    """Update the study's MLflow run if the process that held the study is gone and has not done so.

    ``code``: exit code of this process's work; one that was interrupted doesn't wait for others.
    """
    status = _status(opened.counts(), study_budget.first_exhausted(opened.trials()) is not None)
    if not orchestration.must_conclude(code == EXIT_COMPLETED) or _end_is_logged(command.paths, status):
        yield
        return
    with _study_tracker(command, opened, orchestration, study_budget) as tracker:
        if tracker is not None:
            tracker.update(tracking_rows(opened.trials()), [row.number for row in opened.best()])
        yield


@contextlib.contextmanager
def _study_tracker(
    command: SweepCommand, opened: Any, orchestration: Orchestration, study_budget: StudyBudget
) -> Iterator[Any]:
    """Yield the study's tracker and finish it however the sweep ends, after logging the runs that killed processes
    could not.

    ``None`` for a process that shares the work. If another process has taken the study over, that one finishes the run.
    """
    if not (orchestration.held and command.tracking.enabled):
        yield None
        return
    from qlora_exp.tracking.study import StudyTracker
    from qlora_exp.tracking.study_fields import StudyDefinition
    from qlora_exp.tracking.sync import deliver_runs

    outputs = OutputPaths(command.paths.folder.parent.parent)
    tracker = StudyTracker(command.tracking, outputs, command.spec.name)
    try:
        tracker.start(from_dict(StudyDefinition, to_dict(without_secrets(command.spec))))
        yield _TrackerWhileHeld(tracker, orchestration)
    finally:
        with signals.delay_interrupt("the study is being logged to MLflow; Ctrl-C again leaves that to qlora-exp sync"):
            run_ids = [row.run_id for row in opened.trials() if row.run_id is not None]
            deliver_runs(outputs, run_ids, command.tracking.uri)
            if orchestration.held:
                tracker.finish(_status(opened.counts(), study_budget.first_exhausted(opened.trials()) is not None))


@dataclass(frozen=True)
class _TrackerWhileHeld:
    """A study's tracker that stops updating when another process takes the study over."""

    tracker: Any
    duty: Orchestration

    def update(self, *state: Any) -> None:
        if self.duty.held:
            self.tracker.update(*state)


def _print_not_delivered(command: SweepCommand, opened: Any) -> None:
    """Print, as the sweep's last line, which runs have not been logged to MLflow."""
    if not command.tracking.enabled:
        return
    from qlora_exp.tracking.state import not_delivered

    with contextlib.suppress(Exception):  # a lost storage has been reported already
        run_ids = [row.run_id for row in opened.trials() if row.run_id is not None]
        missing = not_delivered(OutputPaths(command.paths.folder.parent.parent), run_ids, command.spec.name)
        if missing is not None:
            print(missing, flush=True)


def _end_is_logged(paths: StudyPaths, status: Status) -> bool:
    from qlora_exp.tracking.state import read_state
    from qlora_exp.tracking.study import read_summary

    state, summary = read_state(paths), read_summary(paths)
    return state is not None and state.delivered and summary is not None and summary.status is status


def _is_complete(counts: Counts) -> bool:
    return counts.running + counts.waiting + counts.to_ask == 0


def _status(counts: Counts, budget_is_spent: bool) -> Status:
    if not _is_complete(counts) and (counts.running or not budget_is_spent):
        return Status.INTERRUPTED
    return Status.COMPLETED if counts.completed else Status.FAILED


def _announcement(command: SweepCommand, counts: Counts) -> str:
    spec = command.spec
    synthetic = "SYNTHETIC " if spec.synthetic else ""
    done = f", {counts.finished} of them done" if counts.finished else ""
    axes = " × ".join(f"{axis.key}={axis.text}" for axis in spec.axes) or "no axes"
    axes += "".join(f"\n  {text} on the command line fixes an axis of the sweep" for text in command.fixed_axes)
    search = f"{spec.sampler}, pruner {spec.pruner}"
    at_most = "at most " if spec.ladder is not None else ""
    return f"{synthetic}study {spec.name}: {at_most}{spec.n_trials} trials{done} ({search})\n  {axes}"


def _conclude(opened: Any, spec: StudySpec, paths: StudyPaths, study_budget: StudyBudget, budget: BudgetConfig) -> int:
    from qlora_exp.formatting import print_table

    counts, best = opened.counts(), opened.best()
    if spec.ladder is not None:
        write_json(paths.ladder, print_answers(spec, paths, opened.trials()))
        print(f"  {paths.ladder}")
    elif best:
        print_table(best_table(best, spec))
    print(("SYNTHETIC " if spec.synthetic else "") + progress_text(counts))
    predicted = memory_predictions(opened.trials(), paths)
    if predicted is not None:
        print(predicted.sentence)
    outputs = OutputPaths(paths.folder.parent.parent)
    option = "" if outputs == OutputPaths.of("outputs") else f" --output-root {shlex.quote(str(outputs.root))}"
    name = shlex.quote(spec.name)
    if counts.skipped and _nothing_fits(opened, counts, budget):
        print_error(_nothing_fits_error(opened, spec, counts, budget, option))
        return EXIT_COMPLETED if counts.completed else EXIT_WRONG_INPUT
    if not _is_complete(counts):
        failed = opened.failures_reached()
        exhausted = study_budget.first_exhausted(opened.trials())
        if exhausted is not None and not failed and not counts.running:
            larger_limit = f"budget.{exhausted.name}={2 * exhausted.limit:g}"
            print(f"the budget is spent ({exhausted}): qlora-exp resume {name} {larger_limit}{option}")
            return EXIT_COMPLETED if counts.completed else EXIT_RUN_FAILED
        why = f"sweep.max_failures={spec.max_failures:g} is reached" if failed else "not complete"
        without_limit = " sweep.max_failures=null" if failed else ""
        print(f"{why}: qlora-exp resume {name}{without_limit}{option}")
        return EXIT_RUN_FAILED if failed else EXIT_INTERRUPTED
    if best:
        print(f"  qlora-exp best {name}{option}")
    print(f"  qlora-exp trials {name} --csv{option}")
    if counts.failed:
        print(f"  qlora-exp resume {name} --retry failed{option}")
    return EXIT_COMPLETED if counts.completed and not opened.failures_reached() else EXIT_RUN_FAILED


def _nothing_fits(opened: Any, counts: Counts, budget: BudgetConfig) -> bool:
    """Return whether the sampler no longer finds a configuration that fits, or no point of a grid fits."""
    if _is_complete(counts):
        return counts.finished == counts.skipped
    return not counts.running and opened.consecutive_skips(budget.memory_bytes) >= MAX_CONSECUTIVE_SKIPS


def _nothing_fits_error(
    opened: Any, spec: StudySpec, counts: Counts, budget: BudgetConfig, option: str
) -> QloraExpError:
    """Return the error that says what would fit."""
    refusals = [row.skipped for row in opened.trials() if row.skipped is not None]
    smallest = min((refusal.fit for refusal in refusals), key=lambda fit: fit.corrected_bytes)
    smallest_bytes, bound = smallest.corrected_bytes, refusals[-1].fit.limit_bytes
    subject = "none of them" if not counts.completed else f"none of the last {MAX_CONSECUTIVE_SKIPS}"
    retry = " --retry does_not_fit" if spec.sampler in ("grid", "ladder") else ""
    resume_command = f"qlora-exp resume {shlex.quote(spec.name)}{retry}{option}"
    if budget.memory_bytes is not None:
        hint = "a space with smaller batches, lengths or models under another sweep.name, or a larger bound: "
        hint += f"{resume_command} budget.memory_bytes={smallest_bytes}"
    else:
        would_fit = smallest.would_fit or "smaller batches, lengths or models"
        hint = f"under another sweep.name: {would_fit}; to start them anyway: {resume_command} --force"
    return StudyError(
        f"{counts.finished} trials were proposed, and {subject} is predicted to fit into {bytes_text(bound)}",
        f"study {spec.name}: the smallest needs {bytes_text(smallest_bytes)}",
        hint,
    )
