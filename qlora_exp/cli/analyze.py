"""``analyze``: the rank decision from any table of results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_exp.cli.arguments import examples

if TYPE_CHECKING:
    from rich.table import Table

    from qlora_exp.analysis.table import TableAnswer


def add_to(app: typer.Typer) -> None:
    app.command(
        "analyze",
        epilog=examples(
            "qlora-exp analyze results.csv --margin 0.02",
            "qlora-exp analyze paper.csv --score-column wikisql --higher-is-better --se 0.5 --margin 0.5",
            "qlora-exp analyze export.parquet --margin 0.02 --json | jq .decision",
        ),
    )(analyze)


def analyze(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV, TSV, JSON, JSON lines or Parquet")],
    margin: Annotated[
        float | None, typer.Option(help="Smallest gain of a step that is worth its cost, in the score's units")
    ] = None,
    higher_is_better: Annotated[
        bool | None,
        typer.Option(
            "--higher-is-better/--lower-is-better", help="Direction of the score; default: from the score's name"
        ),
    ] = None,
    rank_column: Annotated[str | None, typer.Option(metavar="NAME", help="Column with the rank")] = None,
    score_column: Annotated[str | None, typer.Option(metavar="NAME", help="Column with the score")] = None,
    configuration_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column that distinguishes configurations")
    ] = None,
    se: Annotated[float | None, typer.Option(help="Published standard error of every score")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the answer as one JSON object")] = False,
) -> int:
    """Decide which rank is enough from a table of results of any tool.

    The table has columns for rank and score, and optionally seed and item. Without seeds or a standard error, the
    command says what can't be concluded. The exit code is 0 for every answer.
    """
    from qlora_exp.analysis.table import Options, analyze_table, table_as_json

    options = Options(rank_column, score_column, configuration_column, higher_is_better, margin, se)
    answers = analyze_table(file, options)
    if json:
        from json import dumps

        print(dumps(table_as_json(answers), indent=1, ensure_ascii=False, allow_nan=False))
        return 0
    from qlora_exp.formatting import print_table

    for table_answer in answers:
        if table_answer.configuration is not None:
            print(f"{table_answer.configuration}:")
        print(table_answer.answer.sentence)
        print_table(_comparisons(table_answer))
        for note in table_answer.notes:
            print(note)
    return 0


def _comparisons(table_answer: TableAnswer) -> Table:
    from qlora_exp.formatting import plain_table

    rows = [
        (
            f"{step.from_rank} → {step.to_rank}",
            *map(_figure, (decision.gain, decision.low, decision.high)),
            str(decision.verdict),
        )
        for step in table_answer.answer.comparisons
        for decision in (step.decision,)
    ]
    return plain_table(("step", "gain", "low", "high", "decision"), rows)


def _figure(value: float | None) -> str:
    from qlora_exp.formatting import UNKNOWN_CELL

    return UNKNOWN_CELL if value is None else f"{value:+.4g}"
