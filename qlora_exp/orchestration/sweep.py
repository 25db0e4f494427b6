"""A sweep from start to end: the study, its MLflow parent run, the workers, and the conclusion."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
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
from qlora_exp.config.schema import NotifyConfig, WorkersConfig
from qlora_exp.errors import QloraExpError, StudyError, raise_all, unwritable_error
from qlora_exp.estimate.budget import budget_of, check_energy
from qlora_exp.formatting import bytes_text, print_table
from qlora_exp.orchestration.command import SweepCommand, study_spec, typed_settings
from qlora_exp.orchestration.finalists import read_plan
from qlora_exp.orchestration.launcher_processes import launcher_job
from qlora_exp.orchestration.launchers import prepare_launcher
from qlora_exp.orchestration.memory_predictions import MAX_CONSECUTIVE_SKIPS
from qlora_exp.orchestration.orchestrator import (
    Orchestration,
    launches_sweep,
    orchestrating,
    stop_workers_on_signal,
    wait_for_others,
)
from qlora_exp.orchestration.prestart import prestarted
from qlora_exp.orchestration.status import LiveStatus, best_table, memory_predictions, progress_text
from qlora_exp.orchestration.study_budget import StudyBudget, affordable_trials_message, check_memory
from qlora_exp.orchestration.study_end import best_row, how_sure, output_option, print_confirmation, write_best
from qlora_exp.paths import OutputPaths
from qlora_exp.rank_doubling.answers import announce, print_answers, says_what_to_use
from qlora_exp.rank_doubling.ladder import proposer_of
from qlora_exp.records.files import write_json
from qlora_exp.records.schema import from_dict, to_dict
from qlora_exp.records.types import Status
from qlora_exp.runs.notify import notify, sweep_notification
from qlora_exp.runs.process import (
    EXIT_COMPLETED,
    EXIT_INTERRUPTED,
    EXIT_RUN_FAILED,
    EXIT_WRONG_INPUT,
    ExitCode,
    print_error,
)
from qlora_exp.study.objectives import parse_objective
from qlora_exp.study.space import point_overrides
from qlora_exp.study.spec import read_spec, storage_of, without_secrets, write_spec
from qlora_exp.study.storage import is_unreachable, unreachable_error
from qlora_exp.study.study import Study
from qlora_exp.study.types import Counts, StudySpec, TrialRow
from qlora_exp.system import signals, streams
from qlora_exp.system.distributed import check_single_rank
from qlora_exp.training.reporters import check_reporters

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
        prepare_launcher(launcher, command.spec, config.hydra.launcher)
        job = config.hydra.job
        in_this_process = isinstance(launcher, BasicLauncher) and not (job.env_set or job.chdir)
        code = run_sweep(command, lambda jobs: launcher.launch(jobs, initial_job_idx=0), in_this_process)
    except QloraExpError as error:
        print_error(error)
        code = EXIT_WRONG_INPUT
    except Exception as error:
        shown_error = unwritable_error(error) if isinstance(error, OSError) else None
        if command is not None and is_unreachable(error):
            shown_error = unreachable_error(error, command.spec.storage, command.spec.name)
        if shown_error is None:  # a bug gets a traceback
            raise
        print_error(shown_error)
        code = EXIT_WRONG_INPUT
    raise ExitCode(code)


def run_sweep(command: SweepCommand, launch: Launch, here: bool = False) -> int:
    """Work on the study until it is complete, stopped or has failed too often, and print the conclusion.

    ``here``: whether ``launch`` runs its jobs in this process, with the same environment and folder.

    Exit codes: 0 complete; 1 ``sweep.max_failures`` reached, no trial completed, or a worker failed; 130 interrupted.

    Raises:
        QloraExpError: another process orchestrates the study (and ``sweep.join`` is false), the study can't be opened,
        or it exists with another space. Nothing was started.
    """
    spec, paths = command.spec, command.paths
    budget = budget_of(command.config)
    check_energy(budget, command.config.training.device)
    check_reporters(command.tracking)
    if budget.memory_bytes is not None:
        check_memory(command)
    study_budget = StudyBudget(budget, OutputPaths.of(spec.output_root))
    with contextlib.ExitStack() as resources:
        orchestration = resources.enter_context(orchestrating(paths, spec.name, command.sweep.join, command.workers))
        if here:
            resources.enter_context(prestarted(command.config, command.workers, paths, spec.n_trials))
        opened = Study.open(spec, paths, proposer_of(spec, paths))
        spec = opened.spec
        sweep = _Sweep(replace(command, spec=spec), opened, orchestration, study_budget)
        write_spec(spec, paths)
        resources.callback(sweep.print_not_delivered)
        if opened.counts().is_complete:
            print(f"study {spec.name} is complete; sweep.n_trials=… continues it, sweep.name=… starts another")
            with sweep.finish_for_lost_holder(EXIT_COMPLETED):
                return sweep.conclude()
        ending = _Ending(time.monotonic())
        # Read now: a variable of the environment that isn't set is a mistake to hear of before the first trial.
        notify_config: NotifyConfig = typed_settings(command.config.notify, NotifyConfig)
        resources.callback(sweep.notify_of, ending, notify_config)
        budget_lines = [f"\n  {text}" for text in affordable_trials_message(sweep.command, opened, study_budget)]
        print(_announcement(sweep.command, opened.counts()), *budget_lines, sep="", file=sys.stderr, flush=True)
        if spec.ladder is not None:
            announce(spec, command.sweep.ladder)
        with contextlib.ExitStack() as trackers:
            shares = not orchestration.held
            log = trackers.enter_context(sweep.parent_run())
            with LiveStatus(spec, opened, paths, log):
                ending.exit_code = code = sweep.launch(launch)
            if shares:
                trackers.enter_context(sweep.finish_for_lost_holder(code))
            if code not in (EXIT_COMPLETED, EXIT_INTERRUPTED):
                return code
            conclusion = sweep.conclude()
            ending.exit_code = conclusion if opened.counts().is_complete else code or conclusion
            return ending.exit_code


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
        if result.by_signal and launches_sweep():
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


def _announcement(command: SweepCommand, counts: Counts) -> str:
    spec = command.spec
    synthetic = "SYNTHETIC " if spec.synthetic else ""
    done = f", {counts.finished} of them done" if counts.finished else ""
    axes = " × ".join(f"{axis.key}={axis.text}" for axis in spec.axes) or "no axes"
    axes += "".join(f"\n  {text} on the command line fixes an axis of the sweep" for text in command.fixed_axes)
    axes += "".join(f"\n  {line}" for line in command.left_out)
    stops_pilots = spec.ladder is not None and spec.ladder.stop_pilots
    source = spec.sampler if spec.n_trials > len(spec.enqueue) else "all enqueued"
    search = f"{source}, " + ("stops pilots that are behind" if stops_pilots else f"pruner {spec.pruner}")
    at_most = "at most " if spec.ladder is not None else ""
    return f"{synthetic}study {spec.name}: {at_most}{spec.n_trials} trials{done} ({search})\n  {axes}"


@dataclass
class _Ending:
    """When this process began to work on the study, and with which exit code it ends; ``None``: with an exception."""

    began: float
    exit_code: int | None = None


@dataclass(frozen=True)
class _Sweep:
    """One call of :func:`run_sweep`: the study, this process's part in it, and its budget."""

    command: SweepCommand
    opened: Study
    orchestration: Orchestration
    budget: StudyBudget

    @property
    def spec(self) -> StudySpec:
        return self.command.spec

    @property
    def outputs(self) -> OutputPaths:
        return self.command.paths.outputs

    def notify_of(self, ending: _Ending, config: NotifyConfig) -> None:
        """Send the notification of the sweep's end, if this process holds the study."""
        if not self.orchestration.held or (config.command is None and config.webhook is None):
            return
        with signals.delay_interrupt("the notification is being sent; Ctrl-C again leaves it out"):
            counts, best = self.opened.counts(), next(iter(self.opened.best()), None)
            fields = [parse_objective(text).field for text in self.spec.objectives]
            values = dict(zip(fields, best.values or (), strict=False)) if best is not None else {}
            names = ("total", "completed", "pruned", "failed", "skipped")
            action = "report" if counts.is_complete else "resume"
            notification = sweep_notification(
                self.spec.name,
                self.status().value,
                ending.exit_code,
                time.monotonic() - ending.began,
                {name: getattr(counts, name) for name in names},
                {"run_id": best.run_id, "params": best.params, "values": values} if best is not None else None,
                self.command.paths.folder,
                next((file for file in [self.command.paths.folder / "report.html"] if file.is_file()), None),
                f"qlora-exp {action} {shlex.quote(self.spec.name)}{output_option(self.outputs)}",
            )
            notify(config, notification)

    def run_ids(self) -> list[str]:
        return [row.run_id for row in self.opened.trials() if row.run_id is not None]

    def status(self) -> Status:
        counts, budget_is_spent = self.opened.counts(), self.budget.first_exhausted(self.opened.trials()) is not None
        if not counts.is_complete and (counts.running or not budget_is_spent):
            return Status.INTERRUPTED
        return Status.COMPLETED if counts.completed else Status.FAILED

    def launch(self, launch: Launch) -> int:
        """Run the jobs to their end. An exit code other than 0: the study isn't complete, and a worker failed or was
        lost."""
        name, code = self.spec.name, EXIT_COMPLETED
        problems: list[QloraExpError] = []
        try:
            with stop_workers_on_signal(self.command.paths):
                results = launch(jobs_of(self.command))
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
            wait_for_others(self.opened, self.command.workers)
        for result in results:
            try:
                _ = result.return_value
            except QloraExpError as error:
                problems.append(error)
                code = error.exit_code
        if code and self.opened.counts().is_complete:
            for problem in problems:
                print(f"{problem.what}; the other workers completed the study", file=sys.stderr, flush=True)
            return EXIT_COMPLETED
        for problem in problems:
            print_error(problem)
        return code

    @contextlib.contextmanager
    def parent_run(self) -> Iterator[Callable[[], None] | None]:
        """Yield what logs the study's state to its MLflow run, which is finished however the sweep ends, after logging
        the runs that killed processes could not.

        ``None`` for a process that shares the work. If another process has taken the study over, that one logs it and
        finishes the run.
        """
        command = self.command
        if not (self.orchestration.held and command.tracking.enabled):
            yield None
            return
        from qlora_exp.tracking.study import StudyTracker
        from qlora_exp.tracking.study_fields import StudyDefinition, SummaryTrial
        from qlora_exp.tracking.sync import deliver_runs

        tracker = StudyTracker(command.tracking, self.outputs, self.spec.name)

        def log() -> None:
            if self.orchestration.held:
                trials = [
                    SummaryTrial(
                        row.number, row.status or Status.RUNNING, row.values, row.params, row.run_id, row.seconds
                    )
                    for row in self.opened.trials()
                    if row.status is not None or row.state == "RUNNING"
                ]
                tracker.update(trials, [row.number for row in self.opened.best()])

        try:
            tracker.start(from_dict(StudyDefinition, to_dict(without_secrets(self.spec))))
            yield log
        finally:
            waiting_for = "the study is being logged to MLflow; Ctrl-C again leaves that to qlora-exp sync"
            with signals.delay_interrupt(waiting_for):
                deliver_runs(self.outputs, self.run_ids(), command.tracking.uri)
                if self.orchestration.held:
                    tracker.finish(self.status())

    @contextlib.contextmanager
    def finish_for_lost_holder(self, code: int) -> Iterator[None]:
        """Update the study's MLflow run if the process that held the study is gone and has not done so.

        ``code``: exit code of this process's work; one that was interrupted doesn't wait for others.
        """
        status = self.status()
        if not self.orchestration.must_conclude(code == EXIT_COMPLETED) or self._end_is_logged(status):
            yield
            return
        with self.parent_run() as log:
            if log is not None:
                log()
            yield

    def _end_is_logged(self, status: Status) -> bool:
        from qlora_exp.tracking.state import read_state
        from qlora_exp.tracking.study import read_summary

        state, summary = read_state(self.command.paths), read_summary(self.command.paths)
        return state is not None and state.delivered and summary is not None and summary.status is status

    def print_not_delivered(self) -> None:
        """Print, as the sweep's last line, which runs have not been logged to MLflow."""
        if not self.command.tracking.enabled:
            return
        from qlora_exp.tracking.state import not_delivered

        with contextlib.suppress(Exception):  # a lost storage has been reported already
            missing = not_delivered(self.outputs, self.run_ids(), self.spec.name)
            if missing is not None:
                print(missing, flush=True)

    def conclude(self) -> int:
        """Print how the study ended and what to do next; return the exit code."""
        spec, paths, opened = self.spec, self.command.paths, self.opened
        counts, best, rows = opened.counts(), opened.best(), opened.trials()
        to_run_again, confirms = best_row(best, spec), read_plan(paths)
        exhausted = None if counts.is_complete else self.budget.first_exhausted(opened.trials())
        larger_limit = exhausted.larger if exhausted is not None else None
        answers = None
        if spec.ladder is not None:
            answers = print_answers(spec, paths, opened.trials(), larger_limit)
            write_json(paths.ladder, answers)
            print(f"  {paths.ladder}")
        elif confirms is not None:
            to_run_again = print_confirmation(spec, paths, confirms, rows)
        elif best:
            print_table(best_table(best, spec))
        run_again = write_best(spec, paths, to_run_again)
        print(("SYNTHETIC " if spec.synthetic else "") + progress_text(counts))
        predicted = memory_predictions(opened.trials(), paths)
        if predicted is not None:
            print(predicted.sentence)
        for line in self._how_sure(rows) if confirms is None else ():
            print(line)
        if run_again is not None:
            print(f"  to run it again: {run_again}")
        option, name = output_option(self.outputs), shlex.quote(spec.name)
        if counts.skipped and (error := self._nothing_fits_error(counts, option)):
            print_error(error)
            return EXIT_COMPLETED if counts.completed else EXIT_WRONG_INPUT
        failed = opened.failures_reached()
        if not counts.is_complete:
            if exhausted is not None and not failed and not counts.running:
                print(f"the budget is spent ({exhausted}): qlora-exp resume {name} {larger_limit}{option}")
                if answers is not None and not says_what_to_use(answers):
                    print("It settled nothing: no two configurations have been compared.")
                    return EXIT_WRONG_INPUT
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
        return EXIT_COMPLETED if counts.completed and not failed else EXIT_RUN_FAILED

    def _how_sure(self, rows: Sequence[TrialRow]) -> list[str]:
        workers = self.command.workers
        return how_sure(self.spec, self.command.paths, rows, (workers.count or 1) * workers.jobs)

    def _nothing_fits_error(self, counts: Counts, option: str) -> QloraExpError | None:
        """Return what would fit, if no point of a grid fits, or the sampler no longer finds a configuration that
        does."""
        spec, memory_bytes = self.spec, budget_of(self.command.config).memory_bytes
        if counts.is_complete:
            nothing_fits = counts.finished == counts.skipped
        else:
            nothing_fits = not counts.running and self.opened.consecutive_skips(memory_bytes) >= MAX_CONSECUTIVE_SKIPS
        if not nothing_fits:
            return None
        refusals = [row.skipped for row in self.opened.trials() if row.skipped is not None]
        smallest = min((refusal.fit for refusal in refusals), key=lambda fit: fit.corrected_bytes)
        smallest_bytes, bound = smallest.corrected_bytes, refusals[-1].fit.limit_bytes
        subject = "none of them" if not counts.completed else f"none of the last {MAX_CONSECUTIVE_SKIPS}"
        retry = " --retry does_not_fit" if spec.sampler in ("grid", "ladder") else ""
        resume_command = f"qlora-exp resume {shlex.quote(spec.name)}{retry}{option}"
        if memory_bytes is not None:
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
