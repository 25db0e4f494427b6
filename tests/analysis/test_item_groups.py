"""Items of one document count as one observation."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_exp.analysis.item_groups import group_means, item_groups


def written(folder: Path, **columns: list[object]) -> Path:
    path = folder / "items.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def test_groups_are_read_from_a_per_item_file(tmp_path: Path) -> None:
    path = written(tmp_path, item_id=["a:1", "a:2", "a:3"], group=["x", "x", "y"])
    assert item_groups(path) == {"a:1": "x", "a:2": "x", "a:3": "y"}


def test_files_without_groups_have_none(tmp_path: Path) -> None:
    assert item_groups(written(tmp_path, item_id=["a:1"])) is None
    assert item_groups(written(tmp_path, item_id=["a:1"], group=[None])) is None
    assert item_groups(tmp_path / "nowhere.parquet") is None


def test_differences_of_group_means_are_group_means_of_differences() -> None:
    groups = {"a:1": "x", "a:2": "x", "a:3": "y"}
    first = {"a:1": 1.0, "a:2": 3.0, "a:3": 5.0}
    second = {"a:1": 0.0, "a:2": 1.0, "a:3": 1.0}
    means = [group_means(scores, groups) for scores in (first, second)]
    assert means == [{"x": 2.0, "y": 5.0}, {"x": 0.5, "y": 1.0}]
    assert group_means({item: first[item] - second[item] for item in first}, groups) == {"x": 1.5, "y": 4.0}
    assert group_means(first, None) == first
