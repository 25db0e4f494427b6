"""Commands for studies: ``sweep``, ``resume``, ``status``, ``stop``, ``best``, ``trials``, ``clean``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_exp.cli.arguments import (
    AsCsv,
    AsJson,
    ColumnNames,
    Force,
    OutputRoot,
    Overrides,
    Sort,
    Source,
    Storage,
    Study,
    Where,
    complete_sweeps,
    examples,
    forced,
    outputs_of,
)
from qlora_exp.cli.settings_file import combined_overrides

if TYPE_CHECKING:
    from qlora_exp.paths import StudyPaths
    from qlora_exp.study.types import StudySpec, TrialRow


def add_to(app: typer.Typer) -> None:
    app.command(
        "sweep",
        epilog=examples(
            "qlora-exp sweep demo",
            "qlora-exp sweep lora_search model=embedded sweep.n_trials=20 workers.count=2",
            "qlora-exp sweep rank_by_quantization lora.r=4,8 seed=1,2",
            "qlora-exp sweep my_sweep --from task.yaml          # sweeps/my_sweep.yaml of the current folder",
        ),
    )(sweep)
    app.command(
        "resume",
        epilog=examples(
            "qlora-exp resume last",
            "qlora-exp resume demo workers.count=2",
            "qlora-exp resume demo --retry failed              # once more, with as many attempts as a new trial",
            "qlora-exp resume demo --retry does_not_fit --force",
        ),
    )(resume)
    app.command("status", epilog=examples("qlora-exp status", "qlora-exp status demo --watch"))(status)
    app.command("stop", epilog=examples("qlora-exp stop last", "qlora-exp stop demo --now"))(stop)
    app.command("best", epilog=examples("qlora-exp best last"))(best)
    app.command("trials", epilog=examples("qlora-exp trials last", "qlora-exp trials demo --csv > demo.csv"))(trials)
    app.command("clean", epilog=examples("qlora-exp clean last", "qlora-exp clean demo --keep best:3 --yes"))(clean)


def sweep(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of a file in sweeps/", autocompletion=complete_sweeps)
    ],
    overrides: Overrides = None,
    source: Source = None,
    join: Annotated[
        bool, typer.Option("--join", help="Share the work on a study with the process that runs it")
    ] = False,
    output_root: OutputRoot = None,
    force: Force = False,
) -> int:
    """Run the trials of a study.

    Repeat the command to continue the study. It does the same as python -m qlora_exp -m sweeps=NAME …
    """
    from pathlib import Path

    from qlora_exp.config.overrides import hydra_value
    from qlora_exp.orchestration.hydra_app import main

    all_overrides = [f"sweeps={name}", *combined_overrides(source, overrides, sweep=name), *forced(force)]
    all_overrides += ["sweep.join=true"] if join else []
    if output_root:
        all_overrides.append(f"output_root={hydra_value(str(Path(output_root).expanduser().absolute()))}")
    return main(["--multirun", *all_overrides])


def resume(
    study: Study,
    overrides: Overrides = None,
    join: Annotated[
        bool, typer.Option("--join", help="Share the work on the study with the process that runs it")
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Rebuild a damaged study database from the runs' records")
    ] = False,
    retry: Annotated[
        str | None,
        typer.Option(
            "--retry",
            metavar="WHAT",
            help="Run trials with this result again: failed, out_of_memory or does_not_fit",
        ),
    ] = None,
    storage: Storage = None,
    output_root: OutputRoot = None,
    force: Force = False,
) -> int:
    """Continue a study: run exactly the missing trials, and with --retry the failed ones again."""
    from qlora_exp.system.distributed import check_single_rank

    check_single_rank()  # before a damaged study is rebuilt
    from qlora_exp.config.overrides import escape_interpolations, hydra_value
    from qlora_exp.orchestration.hydra_app import main
    from qlora_exp.study.spec import STORAGE_VARIABLE, storage_of

    spec, paths = _find_study(study, output_root)
    _check_unchanged(spec, overrides or [])
    url = storage_of(spec, storage)
    changes = [*(overrides or []), *forced(force)]
    if rebuild:
        _rebuild(spec, paths, url)
    if retry is not None:
        _retry(spec, paths, retry, url)
    changed_keys = {text.lstrip("+~").partition("=")[0] for text in changes}
    recorded = [*spec.overrides, *(f"{axis.key}={axis.text}" for axis in spec.axes if "ladder" not in axis.tags)]
    unchanged = [text for text in recorded if text.lstrip("+~").partition("=")[0] not in changed_keys]
    _check_secrets(unchanged, spec)
    name = f"sweep.name={hydra_value(escape_interpolations(spec.name))}"
    # Not as an override: a launcher writes overrides to disk, and the URL may have a password.
    previous = os.environ.get(STORAGE_VARIABLE)
    os.environ[STORAGE_VARIABLE] = url
    try:
        return main(["--multirun", *unchanged, *changes, name, *(["sweep.join=true"] if join else [])])
    finally:
        del os.environ[STORAGE_VARIABLE]
        if previous is not None:
            os.environ[STORAGE_VARIABLE] = previous


def status(
    study: Study = "last",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh every second; end with Ctrl-C")] = False,
    as_json: AsJson = False,
    storage: Storage = None,
    output_root: OutputRoot = None,
) -> int:
    """Show the state of a study.

    It shows running, finished, pruned and failed trials, the best so far, the time left, CPU and GPU use.
    """
    from qlora_exp.formatting import print_table
    from qlora_exp.orchestration.status import status_fields, study_status, watch_status
    from qlora_exp.orchestration.study_end import how_sure
    from qlora_exp.system.orchestrator_lease import held_lease
    from qlora_exp.tracking.state import not_delivered

    spec, paths = _find_study(study, output_root)
    opened = _read_study(spec, paths, storage)
    if as_json:
        from qlora_exp.cli.tables import print_json

        print_json(status_fields(spec, opened, paths, held_lease(paths.orchestrator)))
        return 0
    if watch:
        watch_status(spec, opened, paths)
        return 0
    print_table(study_status(spec, opened, paths, held_lease(paths.orchestrator)))
    rows = opened.trials()
    for line in how_sure(spec, paths, rows):
        print(line)
    runs = [row.run_id for row in rows if row.run_id is not None]
    busy = held_lease(paths.orchestrator) is not None
    missing = not_delivered(paths.outputs, runs, spec.name, busy)
    if missing is not None:
        print(missing)
    return 0


def stop(
    study: Study,
    now: Annotated[
        bool, typer.Option("--now", help="Stop the running trials, too: they save their state and end")
    ] = False,
    output_root: OutputRoot = None,
) -> int:
    """Stop a study after its running trials; a second call stops these, too."""
    from qlora_exp.orchestration.orchestrator import request_stop

    spec, paths = _find_study(study, output_root)
    mode = request_stop(paths, spec.name, now)
    what = (
        "running trials save their state and end"
        if mode == "now"
        else "no further trial starts; repeat the command to stop the running ones, too"
    )
    print(f"study {spec.name}: {what}\nto continue: qlora-exp resume {shlex.quote(spec.name)}")
    return 0


def best(study: Study, as_json: AsJson = False, storage: Storage = None, output_root: OutputRoot = None) -> int:
    """Show the best trial, how sure that is, and the command that runs it again.

    Of several objectives, the Pareto front; of rank doubling, the rank to use now and its runs; of a study that
    confirms finalists, its answer.
    """
    from qlora_exp.errors import RecordError
    from qlora_exp.formatting import print_table
    from qlora_exp.orchestration.finalists import read_plan
    from qlora_exp.orchestration.status import best_table
    from qlora_exp.orchestration.study_end import best_row, how_sure, print_confirmation, write_best
    from qlora_exp.rank_doubling.answers import print_answers

    spec, paths = _find_study(study, output_root)
    opened = _read_study(spec, paths, storage)
    rows, plan = opened.best(), read_plan(paths)
    if as_json:
        _print_best(spec, paths, rows, how_sure(spec, paths, opened.trials()))
        return 0
    if spec.ladder is not None:
        print_answers(spec, paths, opened.trials())
    elif plan is not None and rows:
        used = print_confirmation(spec, paths, plan, opened.trials())
        rows = [used] if used is not None else rows
    elif not rows:
        completed, name = opened.counts().completed, shlex.quote(spec.name)
        problem = f"none of {completed} completed trials satisfies {', '.join(spec.constraints)}"
        problem = problem if completed else "no trial has completed yet"
        raise RecordError(problem, f"study {spec.name}", f"qlora-exp {'trials' if completed else 'status'} {name}")
    if rows:
        print_table(best_table(rows, spec))
    for line in how_sure(spec, paths, opened.trials()) if plan is None else ():
        print(line)
    short_row = best_row(rows, spec)
    short = write_best(spec, paths, short_row)
    for row, command in _commands(rows, spec):
        print(short if row is short_row and short is not None else command)
    return 0


def _print_best(spec: StudySpec, paths: StudyPaths, rows: Sequence[TrialRow], how_sure: Sequence[str]) -> None:
    """Print ``best --json``: the best trials with their commands, how sure that is, and the answers of a ladder
    (ladder.json) or of a study that confirms finalists (confirm.json)."""
    import json

    from qlora_exp.cli.tables import print_json
    from qlora_exp.orchestration.command import run_overrides
    from qlora_exp.orchestration.status import trial_rows

    trials = [
        row | {"command": shlex.join(["qlora-exp", "run", *run_overrides(spec, trial.params)])}
        for row, trial in zip(trial_rows(rows, spec), rows, strict=True)
    ]
    ladders = json.loads(paths.ladder.read_text(encoding="utf-8"))["ladders"] if paths.ladder.is_file() else []
    confirmed = json.loads(paths.confirmation.read_text(encoding="utf-8")) if paths.confirmation.is_file() else None
    answer = {"study": spec.name, "objectives": spec.objectives, "trials": trials, "how_sure": list(how_sure)}
    print_json({**answer, "ladders": ladders, "confirmation": confirmed})


def _commands(rows: Sequence[TrialRow], spec: StudySpec) -> Iterator[tuple[TrialRow, str]]:
    """Yield one command per trial. A ladder's runs that differ only in their seed give one command, the first."""
    from qlora_exp.orchestration.command import run_overrides

    seen = set()
    for row in rows:
        params = {key: value for key, value in row.params.items() if spec.ladder is None or key != "seed"}
        if (settings := frozenset(run_overrides(spec, params))) not in seen:
            seen.add(settings)
            yield row, shlex.join(["qlora-exp", "run", *run_overrides(spec, row.params)])


def trials(
    study: Study,
    as_csv: AsCsv = False,
    as_json: AsJson = False,
    where: Where = None,
    sort: Sort = None,
    columns: ColumnNames = None,
    limit: Annotated[
        int | None, typer.Option(help="Show only so many trials: the first by --sort, else the newest", min=1)
    ] = None,
    storage: Storage = None,
    output_root: OutputRoot = None,
) -> int:
    """List a study's trials, one row each."""
    import sys

    from qlora_exp.cli.tables import print_rows, select
    from qlora_exp.orchestration.status import trial_columns, trial_rows, write_csv
    from qlora_exp.records.find import run_folders
    from qlora_exp.records.flat_rows import Selection, selected

    spec, paths = _find_study(study, output_root)
    trials = _read_study(spec, paths, storage).trials()
    everybody = [run.folder.name for run in run_folders(paths.outputs)]
    rows = trial_rows(trials, spec, everybody)
    positions = selected(rows, Selection(tuple(where or ()), sort, columns, limit))
    trials = [trials[position] for position in positions]
    if as_csv and columns is None:
        write_csv(trials, spec, sys.stdout)
        return 0
    rows = trial_rows(trials, spec, everybody)
    shown, chosen = select(rows, rows, columns, trial_columns(spec))
    print_rows(shown, chosen, as_json, as_csv, f"study {spec.name}: {len(rows)} trial{'s' if len(rows) != 1 else ''}")
    return 0


def clean(
    study: Study,
    keep: Annotated[str, typer.Option("--keep", help="Adapters to keep: best:K or all")] = "best:1",
    yes: Annotated[
        bool, typer.Option("--yes", help="Delete; without this option the command only lists what it would delete")
    ] = False,
    storage: Storage = None,
    output_root: OutputRoot = None,
) -> int:
    """Delete a study's checkpoints and the adapters that are not among its best.

    Records, per-item results and training curves are always kept.
    """
    from qlora_exp.formatting import bytes_text
    from qlora_exp.orchestration.retention import best_runs_first, deletable, delete, kept_numbers

    spec, paths = _find_study(study, output_root, whole_name=yes)  # deletion needs the study's whole name
    opened = _read_study(spec, paths, storage)
    rows = opened.trials()
    ranked = best_runs_first(rows, opened.best(), spec.objectives[0].startswith("maximize"))
    items = deletable(rows, kept_numbers(keep, ranked, rows), paths.outputs)
    if yes:
        print(f"{bytes_text(delete(items))} freed in {len(items)} folders")
        return 0
    for item in items:
        print(f"{bytes_text(item.size_bytes):>8}  {item.folder}")
    print(
        f"{bytes_text(sum(item.size_bytes for item in items))} would be freed in {len(items)} folders; "
        "--yes deletes them"
    )
    return 0


def _find_study(study: str, output_root: str | None, whole_name: bool = False) -> tuple[StudySpec, StudyPaths]:
    from qlora_exp.records.find import find_study
    from qlora_exp.study.spec import read_spec

    paths = find_study(study, outputs_of(output_root), whole_name)
    return read_spec(paths), paths


def _read_study(spec: StudySpec, paths: StudyPaths, storage: str | None) -> Any:
    from qlora_exp.rank_doubling.ladder import proposer_of
    from qlora_exp.study.spec import storage_of
    from qlora_exp.study.study import Study

    return Study.read(spec, paths, proposer_of(spec, paths), storage_of(spec, storage))


def _check_unchanged(spec: StudySpec, overrides: Sequence[str]) -> None:
    """Raise ConfigError if an override changes the study's name or output root, which a resumed study keeps."""
    from qlora_exp.errors import ConfigError

    hints = {
        "sweep.name": "leave it out; to start another study, use qlora-exp sweep with sweep.name=OTHER",
        "output_root": "leave it out; to name the study's folder: "
        f"qlora-exp resume {shlex.quote(spec.name)} --output-root DIR",
    }
    for text in overrides:
        key = text.lstrip("+~").partition("=")[0]
        if key in hints and text not in (f"{key}={spec.name}", f"{key}={spec.output_root}"):
            raise ConfigError(f"resume continues the study {spec.name} and can't change its {key}", text, hints[key])


def _rebuild(spec: StudySpec, paths: StudyPaths, url: str) -> None:
    from qlora_exp.records.find import read_runs
    from qlora_exp.study.open import rebuild_study
    from qlora_exp.study.spec import is_trial_of

    records, _ = read_runs(paths.outputs)
    study_records = [record for record in records if is_trial_of(record, spec)]
    rebuild_study(spec, paths, study_records, url)
    print(f"study {spec.name} rebuilt from {len(study_records)} runs")


def _retry(spec: StudySpec, paths: StudyPaths, what: str, url: str) -> None:
    from qlora_exp.errors import ConfigError, RecordError, nearest
    from qlora_exp.orchestration.live_state import running_slots
    from qlora_exp.study.reopen_trials import RETRY_CHOICES, retry_trials
    from qlora_exp.system.orchestrator_lease import held_lease

    if what not in RETRY_CHOICES:
        raise ConfigError(f"invalid trial result {what!r}", "--retry", nearest(what, RETRY_CHOICES))
    if held_lease(paths.orchestrator) is not None or running_slots(paths):
        raise RecordError("the study is running", f"study {spec.name}", "wait for it, then --retry")
    numbers = retry_trials(spec, paths, what, url)
    result = what.replace("_", " ")
    if numbers:
        plural = "s" if len(numbers) > 1 else ""
        print(f"run again: trial{plural} {', '.join(map(str, numbers))} ({result})", flush=True)
    else:
        print(f"no trial ended as {result}", flush=True)


def _check_secrets(overrides: list[str], spec: StudySpec) -> None:
    from qlora_exp.errors import RecordError
    from qlora_exp.records.redaction import REDACTED

    hidden = [text for text in overrides if REDACTED in text]
    if hidden:
        keys = " ".join(f"{text.partition('=')[0]}=…" for text in hidden)
        raise RecordError(
            "study.json doesn't contain a secret setting",
            " ".join(hidden),
            f"qlora-exp resume {shlex.quote(spec.name)} {keys}",
        )
