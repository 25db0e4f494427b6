"""Items that share a document or context: averaged first, because they aren't independent (Miller 2024)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

GROUP_COLUMN = "group"
"""Column of the per-item files, only in runs with ``task.columns.group``."""


def item_groups(items_file: Path) -> dict[str, str] | None:
    """Return item → its group, from a run's per-item file (``RunPaths.items(moment, split)``).

    ``None``: the run has no ``task.columns.group``, it is of an earlier version, or the file can't be read. Groups are
    a property of the data, so one run's file is enough for all runs of one protocol. To compare two sides:

        groups = item_groups(paths.items("after", "test"))
        first, second = (group_means(scores, groups) for scores in (first, second))  # then pair by key as before

    With ``None`` the scores stay as they are. The number of keys is then the I of docs/statistics.md.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if GROUP_COLUMN not in pq.read_schema(items_file).names:
            return None
        table = pq.read_table(items_file, columns=["item_id", GROUP_COLUMN])
    except (OSError, pa.ArrowException):
        return None
    groups = dict(zip(table["item_id"].to_pylist(), table[GROUP_COLUMN].to_pylist(), strict=True))
    return groups if groups and None not in groups.values() else None


def group_means(scores: Mapping[str, float], groups: Mapping[str, str] | None) -> dict[str, float]:
    """Return group → the mean score of its items, in the groups' first order; the scores themselves without groups.

    A paired difference of group means is the group's mean of paired differences, so each side can be averaged alone.
    All groups count the same, as docs/statistics.md says. An item without a group is a group with one item.
    """
    if groups is None:
        return dict(scores)
    members: dict[str, list[float]] = defaultdict(list)
    for item, score in scores.items():
        members[groups.get(item, item)].append(score)
    return {group: fmean(values) for group, values in members.items()}
