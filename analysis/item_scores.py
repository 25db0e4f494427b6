"""Scores of single items, read from the runs' per-item files: what paired comparisons use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from qlora_exp.analysis.contrasts import GroupScores, ItemScores
from qlora_exp.analysis.item_groups import group_means, item_groups
from qlora_exp.paths import OutputPaths
from qlora_exp.records.types import RunRecord

MAX_CACHED_ITEM_TABLES = 64
"""Runs whose per-item values stay in memory: comparisons use the same few runs again and again."""
CORRECTNESS_COLUMNS = {"accuracy": "correct", "exact_match": "exact"}
"""Score → its column in the per-item table."""


def item_scores(outputs: OutputPaths) -> ItemScores:
    """Return a function that reads a run's scores of single items, on test if it was scored there.

    Example: ``item_scores(outputs)(record, "after", "loss_per_item")`` gives ``{"item-0001": 1.93, …}``, in nats.
    """

    @lru_cache(maxsize=MAX_CACHED_ITEM_TABLES)
    def read(run_id: str, moment: str, split: str) -> tuple[dict[str, list[Any]], dict[str, str] | None] | None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = outputs.run(run_id).items(moment, split)
        columns = ["item_id", "loss_sum_nats", "completion_nats", "completion_bytes", *CORRECTNESS_COLUMNS.values()]
        try:
            names = pq.read_schema(file).names
            table = pq.read_table(file, columns=[column for column in columns if column in names])
        except (OSError, pa.ArrowException, KeyError):
            return None
        return {column: [None] * table.num_rows for column in columns} | table.to_pydict(), item_groups(file)

    def scores(record: RunRecord, moment: str, score: str) -> Mapping[str, float] | None:
        tables = read(record.run_id, moment, "test" if record.scores.test is not None else "validation")
        if tables is None:
            return None
        items, groups = tables
        if score in CORRECTNESS_COLUMNS:
            values = items[CORRECTNESS_COLUMNS[score]]
        elif score == "loss_per_item":
            values = items["loss_sum_nats"]
        elif score == "bits_per_byte":
            sizes, nats = items["completion_bytes"], items["completion_nats"]
            size = sum(sizes) / max(len(sizes), 1) if None not in (*sizes, *nats) else 0
            values = [value / math.log(2) / size for value in nats] if size else [None]
        else:
            return None
        if None in values:
            return None
        by_item = {item: float(value) for item, value in zip(items["item_id"], values, strict=True)}
        return by_item if groups is None else GroupScores(group_means(by_item, groups))

    return scores
