"""Commands that show what there is: ``ls``, ``show`` and ``diff``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qlora_exp.cli.arguments import OutputRoot, Run, examples, outputs_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora_exp.paths import OutputPaths
    from qlora_exp.records.types import RunRecord

LISTS = ("models", "quantizations", "targets", "tasks", "sweeps", "runs")
COLUMNS = {"models": ("checkpoints.base", "checkpoints.instruct"), "tasks": ("kind",)}
"""Keys of the files that get a column, in addition to name, meaning and command."""


def add_to(app: typer.Typer) -> None:
    app.command("ls", epilog=examples("qlora-exp ls runs", "qlora-exp ls models", "qlora-exp ls runs --limit 10"))(ls)
    shows = ("qlora-exp show last", "qlora-exp show last --items 20 --wrong")
    app.command("show", epilog=examples(*shows, "qlora-exp show last --json | jq .scores.after"))(show)
    diffs = ("qlora-exp diff last 20261121-043802", "qlora-exp diff last 3f2a --items       # answers side by side")
    app.command("diff", epilog=examples(*diffs))(diff)


def complete_lists(incomplete: str) -> list[str]:
    return [name for name in LISTS if name.startswith(incomplete)]


def ls(
    what: Annotated[str, typer.Argument(metavar="WHAT", help=", ".join(LISTS), autocompletion=complete_lists)] = "runs",
    output_root: OutputRoot = None,
    limit: Annotated[int | None, typer.Option(help="Show only so many runs, the newest", min=1)] = None,
) -> int:
    """List the runs, or the choices: models, quantizations, targets, tasks, sweeps."""
    from qlora_exp.config.choices import LISTED, choices, sweeps
    from qlora_exp.errors import ConfigError, nearest

    if what == "runs":
        return _runs(outputs_of(output_root), limit)
    if what not in LISTS:
        raise ConfigError(f"{what!r} can't be listed", "qlora-exp ls", nearest(what, LISTS))
    from qlora_exp.cli.tables import choices_table
    from qlora_exp.formatting import print_table

    listed = sweeps() if what == "sweeps" else choices(LISTED[what])
    if not listed:
        print(f"there are no {what} yet")
        return 0
    print_table(choices_table(listed, COLUMNS.get(what, ())))
    return 0


def show(
    run: Run,
    json: Annotated[bool, typer.Option("--json", help="Print record.json; with --items, the items")] = False,
    items: Annotated[
        int | None,
        typer.Option("--items", metavar="N", min=1, help="Show N items: right answer, base model, tuned model"),
    ] = None,
    wrong: Annotated[bool, typer.Option("--wrong", help="With --items: only wrong answers of the tuned model")] = False,
    output_root: OutputRoot = None,
) -> int:
    """Show the record of a run, or what its models answered."""
    from qlora_exp.records.files import read_record
    from qlora_exp.records.find import find_run

    paths = find_run(run, outputs_of(output_root))
    record = read_record(paths.record)
    if items is not None or wrong:
        from qlora_exp.cli.items import ITEMS_SHOWN, show_items

        return show_items(paths, record, items or ITEMS_SHOWN, wrong, json)
    if json:
        print(paths.record.read_text(encoding="utf-8"), end="")
        return 0
    from qlora_exp.cli.tables import record_table
    from qlora_exp.formatting import print_table

    print_table(record_table(record))
    print(f"record: {paths.record}")
    return 0


def diff(
    first: Run,
    second: Run,
    items: Annotated[
        bool, typer.Option("--items", help="Show their answers side by side, those where they disagree first")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="With --items: so many items")] = 20,
    json: Annotated[bool, typer.Option("--json", help="With --items: print all items as JSON")] = False,
    output_root: OutputRoot = None,
) -> int:
    """Show the differences between two runs: settings and figures, or their answers."""
    from qlora_exp.cli.tables import difference_table
    from qlora_exp.formatting import print_table
    from qlora_exp.records.files import read_record
    from qlora_exp.records.find import find_run

    outputs = outputs_of(output_root)
    left_paths, right_paths = (find_run(run, outputs) for run in (first, second))
    left, right = read_record(left_paths.record), read_record(right_paths.record)
    if items:
        from qlora_exp.cli.items import diff_items

        return diff_items(((left_paths, left), (right_paths, right)), outputs, limit, json)
    print_table(difference_table(left, right))
    return 0


def _runs(outputs: OutputPaths, limit: int | None) -> int:
    import sys

    from qlora_exp.cli.tables import runs_table
    from qlora_exp.errors import QloraExpError
    from qlora_exp.formatting import print_table
    from qlora_exp.records.find import read_runs
    from qlora_exp.system.environment import is_alive
    from qlora_exp.tracking.interrupted import mark_interrupted

    try:
        if outputs.runs.is_dir():
            mark_interrupted(outputs.root)
    except (OSError, QloraExpError) as error:  # the list is still worth showing
        print(f"runs of dead processes were not marked as interrupted: {error}", file=sys.stderr)
    records, unreadable = read_runs(outputs)
    if not records and not unreadable:
        print(f"there are no runs under {outputs.root} yet; qlora-exp run makes one")
        return 0
    shown = records[-limit:] if limit is not None else records
    print_table(runs_table(shown))
    for problem in unreadable:
        print(f"not shown: {problem}")
    for record in shown:
        owner = record.process
        if not record.status.ended and owner is not None and is_alive(owner) is None:
            print(
                f"{record.run_id} was started by process {owner.pid} on {owner.host or 'another host'}, which can't be "
                f"seen from here; if it has ended: qlora-exp run --resume {record.run_id}"
            )
    print(_ui_line(shown, outputs))
    return 0


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
