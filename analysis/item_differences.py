"""Two runs on the same items: where they disagree, and by how much one is better."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_exp.analysis.contrasts import Difference, interval
from qlora_exp.analysis.item_groups import group_means
from qlora_exp.analysis.paired_shares import Z_TWO_SIDED_95, paired_bounds
from qlora_exp.analysis.shown_items import ItemRow
from qlora_exp.errors import AnalysisError
from qlora_exp.records.types import RunRecord

MIN_ITEMS = 2
"""For an interval."""


@dataclass(frozen=True)
class ItemComparison:
    """``rows``: items with the answers of both, those where they disagree first. ``None``: nothing is rated."""

    rows: list[dict[str, Any]]
    both: int
    only_first: int
    only_second: int
    neither: int
    accuracy: Difference | None
    """Share of right answers, second run minus first."""
    loss: Difference | None
    """Mean over items of the loss in nats per token, second run minus first; below 0, the second is better."""


def compare_items(first: Sequence[ItemRow], second: Sequence[ItemRow]) -> ItemComparison:
    """Compare the rows of :func:`~qlora_exp.records.items.read_items` of two runs on the same items.

    The intervals are over items, or groups of items, of two single runs: they don't hold the variation from seed to
    seed.
    """
    others = {row["id"]: row for row in second}
    rows = [_joined(row, others[row["id"]]) for row in first]
    counts = {
        (a, b): sum((row["first_correct"], row["second_correct"]) == (a, b) for row in rows)
        for a in (True, False)
        for b in (True, False)
    }
    groups = {row["id"]: row["group"] for row in first if row["group"] is not None}
    return ItemComparison(
        sorted(rows, key=_disagreement),
        counts[True, True],
        counts[True, False],
        counts[False, True],
        counts[False, False],
        _difference(rows, "correct", groups),
        _difference(rows, "loss", groups),
    )


def plain_comparison(comparison: ItemComparison) -> dict[str, Any]:
    """Return the comparison as plain values: counts, differences with their 95 % intervals, and all items."""
    counts = {name: getattr(comparison, name) for name in ("both", "only_first", "only_second", "neither")}
    differences: dict[str, Any] = {}
    for name in ("accuracy", "loss"):
        found = getattr(comparison, name)
        for key, value in (("", "value"), ("_low", "low"), ("_high", "high")):
            differences[f"{name}_difference{key}"] = getattr(found, value) if found is not None else None
    return {**counts, **differences, "items": comparison.rows}


def check_same_items(runs: Sequence[tuple[RunRecord, Sequence[ItemRow]]]) -> None:
    """Check that both runs were scored on the same items.

    Raises:
        AnalysisError: they have other rows, other ids, or other right answers.
    """
    (first, a), (second, b) = runs
    where = f"{first.run_id} and {second.run_id}"
    ids = [{row["id"] for row in rows} for rows in (a, b)]
    if ids[0] != ids[1]:
        shared = len(ids[0] & ids[1])
        what = f"the runs were scored on different items: {len(a):,} and {len(b):,}, of which {shared:,} are shared"
        raise AnalysisError(what, where, _setting_hint(first, second))
    rows = [record.data.rows_fingerprint if record.data is not None else None for record in (first, second)]
    expected = [{row["id"]: row["expected"] for row in rows} for rows in (a, b)]
    texts_differ = any(
        None not in (text, expected[1][name]) and text != expected[1][name] for name, text in expected[0].items()
    )
    if texts_differ or (None not in rows and rows[0] != rows[1]):
        what = "the runs were scored on different items: rows of the same number have other texts"
        raise AnalysisError(what, where, _setting_hint(first, second))


def _setting_hint(first: RunRecord, second: RunRecord) -> str:
    """Return which settings of the data differ."""
    settings = []
    for record in (first, second):
        task, evaluation = record.config.get("task") or {}, record.config.get("evaluation") or {}
        names = ("name", "path", "hub_id", "hub_revision", "split_seed", "max_items")
        settings.append(
            {f"task.{name}": task.get(name) for name in names}
            | {f"evaluation.{name}": evaluation.get(name) for name in ("max_items", "split")}
        )
    differing = [
        f"{key}: {value} and {settings[1][key]}" for key, value in settings[0].items() if value != settings[1][key]
    ]
    again = f"qlora-exp rerun {second.run_id} with the settings of the other"
    return f"{', '.join(differing)}; {again}" if differing else again


def _joined(first: ItemRow, second: ItemRow) -> dict[str, Any]:
    shared = {key: first[key] if first[key] is not None else second[key] for key in ("id", "prompt", "expected")}
    fields = ("answer", "correct", "generated", "loss")
    return {
        **shared,
        "answer_kind": first["answer_kind"],
        **{f"{side}_{field}": row[field] for field in fields for side, row in (("first", first), ("second", second))},
    }


def _disagreement(row: Mapping[str, Any]) -> tuple[int, bytes]:
    """Return a sort key: one is right and the other wrong; then other answers; then the same. At random within."""
    order = (
        0 if row["first_correct"] != row["second_correct"] else 1 if row["first_answer"] != row["second_answer"] else 2
    )
    return order, hashlib.sha256(str(row["id"]).encode()).digest()


def _difference(rows: Sequence[Mapping[str, Any]], field: str, groups: Mapping[str, str]) -> Difference | None:
    sides = [{row["id"]: row[f"{side}_{field}"] for row in rows} for side in ("first", "second")]
    if not rows or any(value is None for side in sides for value in side.values()):
        return None
    means = [group_means({name: float(value) for name, value in side.items()}, groups or None) for side in sides]
    gains = np.array([[means[1][name] - means[0][name] for name in means[0]]])
    if not np.isfinite(gains).all():
        return None
    unit = "groups of items" if groups else "items"
    if field == "correct" and not groups:
        # A t interval over items that are all alike would be a single point.
        won, lost = int((gains > 0).sum()), int((gains < 0).sum())
        low, high = paired_bounds(won, lost, gains.size, Z_TWO_SIDED_95)
        return Difference(float(gains.mean()), low, high, 1, f"{gains.size} items alone")
    return interval(gains, f"1 seed and {gains.shape[1]} {unit}", trained=True)
