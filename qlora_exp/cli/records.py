"""Commands that show what there is: ``ls``, ``show`` and ``diff``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qlora_exp.cli.arguments import (
    AsCsv,
    AsJson,
    ColumnNames,
    OutputRoot,
    Run,
    Sort,
    Where,
    complete_studies,
    examples,
    outputs_of,
)
from qlora_exp.cli.items import (
    ITEMS_SHOWN,
    AnswersOfBoth,
    ItemLimit,
    OnlyWrong,
    ShownItems,
    diff_items,
    show_items,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora_exp.paths import OutputPaths
    from qlora_exp.records.flat_rows import Selection
    from qlora_exp.records.types import RunRecord

LISTS = ("models", "quantizations", "methods", "targets", "routes", "tasks", "sweeps", "runs")
LIST_NOTES = {
    "models": (
        "any other model:      model=hub model.id=OWNER/NAME    or    model=local model.path=DIR_OR_GGUF",
        "start from a run:     model.adapter=RUN",
    )
}
"""Lines above the table of a list."""
COLUMNS = {"models": ("checkpoints.base", "checkpoints.instruct"), "tasks": ("kind",)}
"""Keys of the files that get a column, in addition to name, meaning and command."""


def add_to(app: typer.Typer) -> None:
    app.command("ls", epilog=examples("qlora-exp ls runs", "qlora-exp ls models", "qlora-exp ls runs --limit 10"))(ls)
    shows = ("qlora-exp show last", "qlora-exp show last --items 20 --wrong")
    app.command("show", epilog=examples(*shows, "qlora-exp show last --json | jq .scores.after"))(show)
    app.command("diff", epilog=examples("qlora-exp diff last 20261121-043802", "qlora-exp diff last 3f2a --items"))(
        diff
    )


def complete_lists(incomplete: str) -> list[str]:
    return [name for name in LISTS if name.startswith(incomplete)]


def ls(
    what: Annotated[str, typer.Argument(metavar="WHAT", help=", ".join(LISTS), autocompletion=complete_lists)] = "runs",
    output_root: OutputRoot = None,
    limit: Annotated[
        int | None, typer.Option(help="Show only so many runs: the first by --sort, else the newest", min=1)
    ] = None,
    study: Annotated[
        str | None,
        typer.Option("--study", metavar="STUDY", help="Only runs of this study", autocompletion=complete_studies),
    ] = None,
    where: Where = None,
    sort: Sort = None,
    columns: ColumnNames = None,
    as_csv: AsCsv = False,
    as_json: AsJson = False,
) -> int:
    """List the runs, or the choices: models, quantizations, methods, targets, routes, tasks, sweeps."""
    from qlora_exp.config.choices import LISTED, choices, sweeps
    from qlora_exp.errors import ConfigError, nearest
    from qlora_exp.records.flat_rows import Selection, selected

    if what not in LISTS:
        raise ConfigError(f"{what!r} can't be listed", "qlora-exp ls", nearest(what, LISTS))
    selection = Selection(tuple(where or ()), sort, columns, limit)
    if what == "runs":
        return _runs(outputs_of(output_root), study, selection, as_csv, as_json)
    from qlora_exp.cli.tables import choices_columns, choices_rows, print_rows, select

    listed = sweeps() if what == "sweeps" else choices(LISTED[what])
    if not listed and not as_json:
        print(f"there are no {what} yet")
        return 0
    rows = choices_rows(listed, COLUMNS.get(what, ()))
    rows = [rows[position] for position in selected(rows, selection)]
    shown, chosen = select(rows, rows, columns, choices_columns(rows))
    command = "qlora-exp sweep NAME" if what == "sweeps" else f"qlora-exp run {LISTED[what]}=NAME"
    header = "\n".join([f"{command}      (--json has the command of each)", *LIST_NOTES.get(what, ())])
    print_rows(shown, chosen, as_json, as_csv, header)
    return 0


def show(
    run: Run,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Show every figure of the record")] = False,
    items: ShownItems = None,
    wrong: OnlyWrong = False,
    json: Annotated[bool, typer.Option("--json", help="Print record.json; with --items, the items")] = False,
    output_root: OutputRoot = None,
) -> int:
    """Show a run: status, scores before and after, memory, speed, cost, files; or what its models answered."""
    from qlora_exp.records.files import read_record
    from qlora_exp.records.find import find_run

    outputs = outputs_of(output_root)
    paths = find_run(run, outputs)
    record = read_record(paths.record)
    if items is not None or wrong:
        return show_items(paths, record, items or ITEMS_SHOWN, wrong, json)
    if json:
        print(paths.record.read_text(encoding="utf-8"), end="")
        return 0
    from qlora_exp.cli.views import record_table, summary_table
    from qlora_exp.formatting import print_table
    from qlora_exp.tracking.state import root_option

    if everything:
        print_table(record_table(record))
        print(f"record: {paths.record}")
    else:
        print_table(summary_table(record, paths, root_option(outputs)))
    return 0


def diff(
    first: Run,
    second: Run,
    everything: Annotated[
        bool, typer.Option("--all", "-a", help="Show all that differs, also machine and plan")
    ] = False,
    items: AnswersOfBoth = False,
    limit: ItemLimit = ITEMS_SHOWN,
    as_json: AsJson = False,
    output_root: OutputRoot = None,
) -> int:
    """Show the differences between two runs: settings, results, then memory, speed and cost; or their answers."""
    from qlora_exp.cli.tables import print_json
    from qlora_exp.cli.views import difference_table, differences, is_main, pair_lines
    from qlora_exp.formatting import print_table
    from qlora_exp.records.files import read_record
    from qlora_exp.records.find import find_run
    from qlora_exp.records.labels import short_id

    outputs = outputs_of(output_root)
    folders = [find_run(run, outputs) for run in (first, second)]
    left, right = (read_record(paths.record) for paths in folders)
    if items:
        return diff_items(folders, (left, right), limit, as_json)
    rows = differences(left, right)
    if as_json:
        print_json({"first": left.run_id, "second": right.run_id, "differences": rows})
        return 0
    ids = [short_id(run, (left.run_id, right.run_id)) for run in (left.run_id, right.run_id)]
    print("\n".join(pair_lines((left, right), ids)))
    shown = [row for row in rows if everything or is_main(row)]
    print_table(difference_table(shown, ids))
    if len(shown) < len(rows):
        print(f"and {len(rows) - len(shown)} more: --all")
    return 0


def _runs(outputs: OutputPaths, study: str | None, selection: Selection, as_csv: bool, as_json: bool) -> int:
    import sys

    from qlora_exp.cli.tables import print_rows, runs_columns, runs_rows, select, with_quality
    from qlora_exp.errors import QloraExpError
    from qlora_exp.records.find import read_runs
    from qlora_exp.records.flat_rows import all_fields, selected
    from qlora_exp.records.labels import shared_settings
    from qlora_exp.system.environment import is_alive
    from qlora_exp.tracking.interrupted import mark_interrupted

    try:
        if outputs.runs.is_dir():
            mark_interrupted(outputs.root)
    except (OSError, QloraExpError) as error:  # the list is still worth showing
        print(f"runs of dead processes were not marked as interrupted: {error}", file=sys.stderr)
    records, unreadable = read_runs(outputs)
    everybody = [record.run_id for record in records]
    is_table = not (as_csv or as_json)
    if not records and not unreadable and is_table:
        print(f"there are no runs under {outputs.root} yet; qlora-exp run makes one")
        return 0
    if study is not None:
        records = _of_study(records, study)
    positions = selected([all_fields(record) for record in records], selection)
    records = [records[position] for position in positions]
    rows = runs_rows(records, everybody)
    if is_table:
        rows = with_quality(rows)
    shown, columns = select(rows, [all_fields(record) for record in records], selection.columns, runs_columns(rows))
    if is_table and not records and not unreadable:
        print(f"none of {len(everybody)} runs matches")
        return 0
    shared = shared_settings([{"config": record.config} for record in records]) if len(records) > 1 else ""
    header = f"{len(records)} run{'s' if len(records) != 1 else ''}{f', all {shared}' if shared else ''}"
    synthetic = sum(record.synthetic for record in records)
    print_rows(shown, columns, as_json, as_csv, header + (f"; {synthetic} SYNTHETIC" if synthetic else ""))
    for problem in unreadable:
        print(f"not shown: {problem}", file=sys.stdout if is_table else sys.stderr)
    if not is_table:
        return 0
    for record in records:
        owner = record.process
        if not record.status.ended and owner is not None and is_alive(owner) is None:
            print(
                f"{record.run_id} was started by process {owner.pid} on {owner.host or 'another host'}, which can't be "
                f"seen from here; if it has ended: qlora-exp run --resume {record.run_id}"
            )
    print(_ui_line(records, outputs))
    return 0


def _of_study(records: Sequence[RunRecord], study: str) -> list[RunRecord]:
    """Return the trials of the study with this name, or with a unique beginning of it, or of the newest (``last``)."""
    from qlora_exp.errors import RecordError, nearest
    from qlora_exp.paths import study_name
    from qlora_exp.records.find import LAST

    names = list(dict.fromkeys(record.trial.study for record in records if record.trial is not None))
    wanted = names[-1] if study == LAST and names else study_name(study)
    matches = [name for name in names if name == wanted] or [name for name in names if name.startswith(wanted)]
    if len(matches) != 1:
        problem = f"{study!r} matches {len(matches)} studies" if matches else f"no run is of a study {study!r}"
        raise RecordError(problem, "--study", ", ".join(matches) if matches else nearest(study, names))
    return [record for record in records if record.trial is not None and record.trial.study == matches[0]]


def _ui_line(records: Sequence[RunRecord], outputs: OutputPaths) -> str:
    from qlora_exp.errors import TrackingError
    from qlora_exp.records.find import tracking_uri
    from qlora_exp.tracking.state import root_option
    from qlora_exp.tracking.ui import ui_command

    uri = tracking_uri(records)
    try:
        ui_command(uri, outputs.mlflow_database)
    except TrackingError as error:
        return f"MLflow UI: {error.hint if uri is not None else error.what}"
    store = uri or f"sqlite:///{outputs.mlflow_database}"
    ours = f"qlora-exp ui{root_option(outputs)}"
    return f"MLflow UI: {ours}\n      or:  mlflow ui --host 127.0.0.1 --backend-store-uri {store}"
