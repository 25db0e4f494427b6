"""Scores of the untouched base are read from the cache only where nothing that they depend on, or that pairs them with
the tuned model's, has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from qlora_exp import run
from qlora_exp.records.types import RunRecord
from tests.conftest import write_colour_task
from tests.test_run import local, overrides

Task = Callable[..., RunRecord]


@pytest.fixture
def scored(tiny_models: dict[str, Path], tmp_path: Path) -> Task:
    """Runs the task in ``tmp_path/colours.jsonl`` for one step."""

    def once(*more: str) -> RunRecord:
        task = local(tiny_models["llama"], tmp_path / "colours.jsonl")
        always = ["tracking=off", "training.max_steps=1", "evaluation.generate=false", "evaluation.forgetting=false"]
        return run(*overrides(tmp_path / "outputs", *task, *always, *more))

    write_colour_task(tmp_path / "colours.jsonl")
    return once


def pairs(record: RunRecord, output: Path) -> tuple[list[str], list[str]]:
    """Item names before and after."""
    folder = output / "runs" / record.run_id
    tables = [pq.read_table(folder / f"items_{moment}_validation.parquet") for moment in ("before", "after")]
    return tables[0]["item_id"].to_pylist(), tables[1]["item_id"].to_pylist()


def test_the_same_rows_are_scored_once(scored: Task) -> None:
    assert not scored().speed.base_scores_cached
    assert scored("lora.r=4", "training.learning_rate=1e-3").speed.base_scores_cached


@pytest.mark.parametrize(
    "change",
    ["evaluation.max_items=6", "task.split_seed=1", "task.max_validation_items=5", "training.max_length=32",
     "evaluation.split=test", "quantization=fp32", "task.system='Be short.'"],
)  # fmt: skip
def test_a_setting_that_changes_what_is_scored_has_scores_of_its_own(scored: Task, change: str) -> None:
    scored()
    assert not scored(change).speed.base_scores_cached


@pytest.mark.parametrize(
    ("old", "new"), [("has the colour", "is of the colour"), ('"red"', '"pink"')], ids=["prompts", "answers"]
)
def test_a_changed_row_has_scores_of_its_own(scored: Task, tmp_path: Path, old: str, new: str) -> None:
    scored()
    file = tmp_path / "colours.jsonl"
    file.write_text(file.read_text().replace(old, new))
    assert not scored().speed.base_scores_cached


def test_items_before_and_after_have_the_same_names_when_the_rows_stand_elsewhere_in_the_file(
    scored: Task, tmp_path: Path
) -> None:
    """An empty line moves every row: the rows are equal, their numbers aren't."""
    scored()
    file = tmp_path / "colours.jsonl"
    file.write_text("\n" + file.read_text())
    before, after = pairs(scored(), tmp_path / "outputs")
    assert before == after


def test_baselines_are_those_of_the_rows_that_are_scored(scored: Task) -> None:
    few, more = scored("evaluation.max_items=2").baselines, scored("evaluation.max_items=12").baselines
    assert few is not None
    assert more is not None
    assert few.majority_accuracy in (0.0, 0.5, 1.0)
    assert few != more
    assert scored("evaluation.max_items=2").baselines == few
