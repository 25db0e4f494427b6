"""``ls``: the choices of the configuration, and the recorded runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qlora_exp.cli.arguments import OutputRoot, examples, outputs_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qlora_exp.paths import OutputPaths
    from qlora_exp.records.types import RunRecord

LISTS = ("models", "quantizations", "targets", "tasks", "sweeps", "runs")
COLUMNS = {"models": ("checkpoints.base", "checkpoints.instruct"), "tasks": ("kind",)}
"""Keys of the files that get a column, in addition to name, meaning and command."""


def add_to(app: typer.Typer) -> None:
    app.command("ls", epilog=examples("qlora-exp ls runs", "qlora-exp ls models", "qlora-exp ls runs --limit 10"))(ls)


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


def _runs(outputs: OutputPaths, limit: int | None) -> int:
    from qlora_exp.cli.tables import runs_table
    from qlora_exp.formatting import print_table
    from qlora_exp.records.find import read_runs

    _mark_dead_runs(outputs)
    records, unreadable = read_runs(outputs)
    if not records and not unreadable:
        print(f"there are no runs under {outputs.root} yet; qlora-exp run makes one")
        return 0
    shown = records[-limit:] if limit is not None else records
    print_table(runs_table(shown))
    for error in unreadable:
        print(f"not shown: {error}")
    for line in _lines_on_other_hosts(shown):
        print(line)
    print(_ui_line(shown, outputs))
    return 0


def _mark_dead_runs(outputs: OutputPaths) -> None:
    """Mark runs whose process died as interrupted. If that fails, the list is still worth showing."""
    import sys

    from qlora_exp.errors import QloraExpError
    from qlora_exp.tracking.interrupted import mark_interrupted

    try:
        if outputs.runs.is_dir():
            mark_interrupted(outputs.root)
    except (OSError, QloraExpError) as error:
        print(f"runs of dead processes were not marked as interrupted: {error}", file=sys.stderr)


def _lines_on_other_hosts(records: Sequence[RunRecord]) -> Iterator[str]:
    """Yield a line for each RUNNING run whose process is on another host, where it can't be checked."""
    from qlora_exp.system.environment import is_alive

    for record in records:
        owner = record.process
        if not record.status.ended and owner is not None and is_alive(owner) is None:
            owned_by = f"process {owner.pid} on {owner.host or 'another host'}"
            yield (
                f"{record.run_id} was started by {owned_by}, which can't be seen from here; "
                f"if it has ended: qlora-exp run --resume {record.run_id}"
            )


def _ui_line(records: Sequence[RunRecord], outputs: OutputPaths) -> str:
    from qlora_exp.config.choices import default_output_root
    from qlora_exp.errors import TrackingError
    from qlora_exp.paths import OutputPaths
    from qlora_exp.records.find import tracking_uri
    from qlora_exp.tracking.ui import ui_command

    uri = tracking_uri(records)
    try:
        ui_command(uri, outputs.mlflow_database)
    except TrackingError as error:
        return f"MLflow UI: {error.hint if uri is not None else error.what}"
    default = OutputPaths.of(default_output_root()).root == outputs.root
    option = "" if default else f" --output-root {outputs.root}"
    store = uri or f"sqlite:///{outputs.mlflow_database}"
    return f"MLflow UI: qlora-exp ui{option}\n      or:  mlflow ui --host 127.0.0.1 --backend-store-uri {store}"
