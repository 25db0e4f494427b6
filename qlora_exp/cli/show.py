"""Commands that show records: ``show`` and ``diff``."""

from __future__ import annotations

from typing import Annotated

import typer

from qlora_exp.cli.arguments import OutputRoot, Run, examples, outputs_of


def add_to(app: typer.Typer) -> None:
    app.command("show", epilog=examples("qlora-exp show last", "qlora-exp show last --json | jq .scores.after"))(show)
    app.command("diff", epilog=examples("qlora-exp diff last 20261121-043802"))(diff)


def show(
    run: Run,
    json: Annotated[bool, typer.Option("--json", help="Print record.json")] = False,
    output_root: OutputRoot = None,
) -> int:
    """Show the record of a run."""
    from qlora_exp.records.files import read_record
    from qlora_exp.records.find import find_run

    paths = find_run(run, outputs_of(output_root))
    record = read_record(paths.record)
    if json:
        print(paths.record.read_text(encoding="utf-8"), end="")
        return 0
    from qlora_exp.cli.tables import record_table
    from qlora_exp.formatting import print_table as show_table

    show_table(record_table(record))
    print(f"record: {paths.record}")
    return 0


def diff(first: Run, second: Run, output_root: OutputRoot = None) -> int:
    """Show the differences between two runs."""
    from qlora_exp.cli.tables import difference_table
    from qlora_exp.formatting import print_table as show_table
    from qlora_exp.records.files import read_record
    from qlora_exp.records.find import find_run

    outputs = outputs_of(output_root)
    left, right = (read_record(find_run(run, outputs).record) for run in (first, second))
    show_table(difference_table(left, right))
    return 0
