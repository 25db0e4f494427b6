"""``show --items`` and ``diff --items``: what the tuned models answered, item by item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qlora_exp.analysis.contrasts import Difference
    from qlora_exp.analysis.item_differences import ItemComparison
    from qlora_exp.paths import RunPaths
    from qlora_exp.records.types import RunRecord

ITEMS_SHOWN = 20

ShownItems = Annotated[
    int | None,
    typer.Option("--items", metavar="N", min=1, help="Show N items: right answer, base model, tuned model"),
]
OnlyWrong = Annotated[bool, typer.Option("--wrong", help="Show items that the tuned model answers wrongly")]
AnswersOfBoth = Annotated[
    bool, typer.Option("--items", help="Show their answers side by side, items on which they disagree first")
]
ItemLimit = Annotated[int, typer.Option("--limit", metavar="N", min=1, help="With --items: show N of them")]


def show_items(paths: RunPaths, record: RunRecord, count: int, wrong: bool, as_json: bool) -> int:
    """Print ``count`` items of a run with the answers before and after tuning; with ``wrong`` only wrong ones."""
    from qlora_exp.analysis.shown_items import answer_lines, chosen_items, heading, wrapped
    from qlora_exp.cli.tables import print_json
    from qlora_exp.formatting import table_width
    from qlora_exp.records.items import read_items

    rows = read_items(paths.folder)
    shown = chosen_items(rows, count, wrong)
    if as_json:
        print_json(shown)
        return 0
    width = table_width()
    print(f"{record.name}  ({record.run_id})")
    print(*wrapped(heading(rows, shown, wrong), width), sep="\n")
    if shown:
        print(*answer_lines(rows, shown, width), sep="\n")
    return 0


def diff_items(folders: Sequence[RunPaths], records: tuple[RunRecord, RunRecord], limit: int, as_json: bool) -> int:
    """Print the answers of two runs side by side, items where one is right and the other wrong first.

    Raises:
        AnalysisError: the runs were scored on different items.
        RecordError: a run has no per-item files.
    """
    from qlora_exp.analysis.item_differences import check_same_items, compare_items, plain_comparison
    from qlora_exp.cli.tables import print_json
    from qlora_exp.formatting import table_width

    first, second = _rows_of_one_split(folders)
    check_same_items([(records[0], first), (records[1], second)])
    comparison = compare_items(first, second)
    if as_json:
        print_json({"first": records[0].run_id, "second": records[1].run_id, **plain_comparison(comparison)})
        return 0
    print("\n".join(_differences(comparison, records, first, limit, table_width())))
    return 0


def _rows_of_one_split(runs: Sequence[RunPaths]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the items of both runs: on test if both were scored there, else on validation."""
    from qlora_exp.records.items import SPLITS, read_items

    split = next((s for s in SPLITS if all(paths.items("after", s).is_file() for paths in runs)), None)
    first, second = (read_items(paths.folder, split) for paths in runs)
    return first, second


def _differences(
    comparison: ItemComparison,
    records: Sequence[RunRecord],
    rows: list[dict[str, Any]],
    limit: int,
    width: int,
) -> list[str]:
    """Return the comparison as lines: who is who, counts, intervals, items."""
    from qlora_exp.analysis.shown_items import answer_words, two_answer_lines, wrapped
    from qlora_exp.records.labels import labels, short_id

    names = labels([{"config": record.config} for record in records])
    ids = [record.run_id for record in records]
    lines = [
        f"{letter}: {name}  ({short_id(record.run_id, ids)})"
        for letter, name, record in zip("AB", names, records, strict=True)
    ]
    total = len(comparison.rows)
    c = comparison
    if c.both + c.only_first + c.only_second + c.neither == total:
        lines += [
            f"{total:,} {rows[0]['split']} items: both right {c.both:,}, only A {c.only_first:,}, "
            f"only B {c.only_second:,}, neither {c.neither:,}"
        ]
    measures = {"right answers": c.accuracy, "loss of an item, nats per token": c.loss}
    lines += [line for name, value in measures.items() if value for line in wrapped(_in_words(name, value), width)]
    if all(record.seed is not None for record in records):
        lines += wrapped("One run on each side: how much of it is due to the training's seed is not known.", width)
    shown = c.rows[:limit]
    lines += wrapped(
        f"{len(shown)} items, those where the two disagree first. {answer_words(rows, with_generated=False)}", width
    )
    return [*lines, *two_answer_lines(rows, shown, width)]


def _in_words(name: str, difference: Difference) -> str:
    return f"{name}: B − A = {difference}"
