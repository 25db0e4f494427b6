"""Two sections of the report: what every configuration writes, and the items on which tuning changed the model most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from qlora_exp.analysis.configurations import Configuration
from qlora_exp.analysis.report_content import QUOTE, Section, Table, value_table
from qlora_exp.analysis.shown_items import (
    ItemRow,
    answer_words,
    cut,
    marked,
    one_line,
    same_items,
    shown_prompts,
    without_end,
)
from qlora_exp.records.items import ItemLoss
from qlora_exp.records.types import RunRecord

SHOWN_CONFIGURATIONS = 25
SHOWN_ITEMS = 5
SAMPLE_CHARACTERS = 300
"""Of each text."""
CAPTION_COLUMNS = 160
OPEN_TABLES = 3
"""Further tables of a section are folded."""
PROMPTS_READ = 60
"""Prompts of which the text is found that all of them share."""


class Answers(Protocol):
    """Run → its items, as :func:`qlora_exp.records.items.read_items` returns them, all or those of ``ids``; empty if it
    has none."""

    def __call__(self, record: RunRecord, /, ids: Sequence[str] | None = None) -> Sequence[ItemRow]: ...


Losses = Callable[[RunRecord], Sequence[ItemLoss]]
"""Run → losses of its items, as :func:`qlora_exp.records.items.read_item_losses` returns them."""


def samples_section(ordered: Sequence[Configuration], answers: Answers) -> Section | None:
    """Return what each of the ``ordered`` configurations answers on the same items, one table an item.

    ``None`` if the first configuration has no answers, or it is the only one.
    """
    first = answers(ordered[0].first)
    known = [row for row in first if row["answer"] is not None or row["generated"] is not None]
    items = same_items(known, SHOWN_ITEMS)
    if not items or len(ordered) < 2:
        return None
    names = [row["id"] for row in items]
    shown = [(c, {row["id"]: row for row in answers(c.first, names)}) for c in ordered[:SHOWN_CONFIGURATIONS]]
    prompts = shown_prompts(first)
    tables = tuple(
        _sample_table(row, prompts[row["id"]], [(c, rows[row["id"]]) for c, rows in shown if row["id"] in rows], number)
        for number, row in enumerate(items)
    )
    where = f"{len(items)} of {len(first):,} {first[0]['split']} items, drawn at random"
    loss = "The loss is that of the right answer, in nats per token."
    text = f"{where}; of each configuration the first run. {answer_words(first)} {loss}{_left_out(ordered)}"
    return Section("samples", "What every configuration answers", (text,), tables)


def changes_section(ordered: Sequence[Configuration], answers: Answers, losses: Losses) -> Section | None:
    """Return the items whose right answer changed its probability most, one table for each of the ``ordered``
    configurations; ``None`` if no run has scores of both models."""
    tables: list[Table] = []
    for configuration in ordered[:SHOWN_CONFIGURATIONS]:
        found = losses(configuration.first)
        if found:
            tables.append(_change_table(configuration, found, answers, len(tables)))
    if not tables:
        return None
    texts = (
        f"For each configuration the {SHOWN_ITEMS} items on which base and tuned model differ most, of its first run."
        " The measure is the loss of the right answer and its end, in nats per token, tuned minus base: below 0, tuning"
        " made the right answer more likely; -1 makes each token 2.7 times as likely on average.",
        f"qlora-exp inspect RUN --item ITEM shows such an answer token by token.{_left_out(ordered)}",
    )
    return Section("changed-most", "Where tuning changed the model most", texts, tuple(tables))


def _sample_table(
    item: ItemRow, prompt: str | None, rows: Sequence[tuple[Configuration, ItemRow]], number: int
) -> Table:
    cells = [
        (
            configuration.label,
            _text(marked(row["base_answer"], row["base_correct"])),
            _text(row["base_generated"]) if row["answer_kind"] == "label" else None,
            _text(marked(row["answer"], row["correct"])),
            _text(row["generated"]) if row["answer_kind"] == "label" else None,
            row["loss"],
        )
        for configuration, row in rows
    ]
    texts = ("base", "base writes", "tuned", "tuned writes")
    columns: list[tuple[str, str] | str] = ["configuration", *((name, QUOTE) for name in texts), ("loss", "figure")]
    asked = cut(prompt or item["id"], CAPTION_COLUMNS)
    caption = f"{asked} → {cut(item['expected'], CAPTION_COLUMNS)} ({item['id']})"
    return _folded(replace(value_table(columns, cells, caption), quotes=True), number)


def _change_table(configuration: Configuration, losses: Sequence[ItemLoss], answers: Answers, number: int) -> Table:
    run = configuration.first
    ordered = sorted(losses, key=lambda one: (-abs(one.tuned - one.base), one.item_id))
    shown, worse = ordered[:SHOWN_ITEMS], [one for one in ordered if one.tuned > one.base]
    if worse and worse[0] not in shown:
        shown.append(worse[0])
    others = same_items([{"id": one.item_id} for one in losses], PROMPTS_READ)
    rows = answers(run, [*(one.item_id for one in shown), *(row["id"] for row in others)])
    prompts, by_id = shown_prompts(rows), {row["id"]: row for row in rows}
    cells = [(one.item_id, *_change_cells(one, by_id.get(one.item_id, {}), prompts)) for one in shown]
    texts, figures = ("prompt", "right answer", "base", "tuned"), ("loss, base", "loss, tuned", "change")
    columns: list[tuple[str, str] | str] = [
        "item",
        *((name, QUOTE) for name in texts),
        *((name, "figure") for name in figures),
    ]
    seed = "" if run.seed is None else f", seed {run.seed}"
    count = f"less likely on {len(worse):,} of {len(losses):,} items"
    last = ", the last row has the worst of them" if len(shown) > SHOWN_ITEMS else ""
    caption = f"{configuration.label}{seed} ({run.run_id}): the right answer became {count}{last}"
    return _folded(value_table(columns, cells, caption), number)


def _change_cells(one: ItemLoss, row: ItemRow, prompts: dict[str, str | None]) -> tuple[Any, ...]:
    texts = (
        prompts.get(one.item_id),
        row.get("expected"),
        marked(row.get("base_answer"), row.get("base_correct")),
        marked(row.get("answer"), row.get("correct")),
    )
    return *map(_text, texts), one.base, one.tuned, one.tuned - one.base


def _folded(table: Table, number: int) -> Table:
    return replace(table, folded=number >= OPEN_TABLES)


def _left_out(ordered: Sequence[Configuration]) -> str:
    more = len(ordered) - SHOWN_CONFIGURATIONS
    return f" {more:,} configurations that are worse on validation are left out." if more > 0 else ""


def _text(text: str | None) -> str | None:
    return None if text is None else one_line(without_end(text, SAMPLE_CHARACTERS))
