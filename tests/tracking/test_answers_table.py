"""A run's answers in MLflow: one table, which its own reader and its UI find, however often the run is delivered."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic
from mlflow import MlflowClient

from qlora_exp.paths import OutputPaths, RunPaths
from qlora_exp.records.files import write_json
from qlora_exp.tracking.answers_table import ARTIFACT, CELL_CHARACTERS, LOGGED_ITEMS
from qlora_exp.tracking.state import read_state
from qlora_exp.tracking.sync import sync_runs


def write_items(paths: RunPaths, items: int, texts: bool = True) -> None:
    rows = [
        {
            "item_id": f"test.jsonl:{item + 1}",
            "label": "plant" if texts else None,
            "predicted": ("plant" if item % 2 else "food") if texts else None,
            "correct": item % 2 == 1,
            "loss_sum_nats": 1.0,
            "tokens": 1,
        }
        for item in range(items)
    ]
    for moment in ("before", "after"):
        pq.write_table(pa.Table.from_pylist(rows), paths.items(moment, "validation"))
    if texts:
        prompts = [{"item_id": row["item_id"], "prompt": f"Name it: {row['item_id']} {'x' * 3000}"} for row in rows]
        pq.write_table(pa.Table.from_pylist(prompts), paths.texts("validation"))


def delivered(output: OutputPaths, paths: RunPaths) -> tuple[MlflowClient, str]:
    assert sync_runs(output.root).failed == {}
    state = read_state(paths)
    assert state is not None
    return MlflowClient(f"sqlite:///{output.mlflow_database}"), str(state.mlflow_run_id)


def test_the_answers_are_one_table_of_bounded_size_however_often_the_run_is_delivered(
    output: OutputPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{output.mlflow_database}")  # load_table asks this store
    paths = synthetic.write_run(output, synthetic.completed(), adapter=False)
    write_items(paths, LOGGED_ITEMS + 50)
    delivered(output, paths)
    write_json(paths.record, synthetic.completed(after=0.6))  # a changed record is delivered again
    client, run_id = delivered(output, paths)
    tag = client.get_run(run_id).data.tags["mlflow.loggedArtifacts"]
    assert json.loads(tag) == [{"path": ARTIFACT, "type": "table"}]
    run = client.get_run(run_id)
    table = client.load_table(run.info.experiment_id, ARTIFACT, [run_id])
    assert list(table.columns)[:4] == ["prompt → right answer", "tuned", "right answer", "base"]
    assert len(table) == LOGGED_ITEMS
    assert set(table["tuned"]) == {"✓ plant", "✗ food"}
    assert all(text.endswith("\n→ plant") for text in table.iloc[:, 0])
    assert table.map(len).max().max() <= CELL_CHARACTERS


def test_a_run_that_keeps_no_texts_has_no_table(output: OutputPaths) -> None:
    paths = synthetic.write_run(output, synthetic.completed(), adapter=False)
    write_items(paths, 4, texts=False)
    client, run_id = delivered(output, paths)
    assert ARTIFACT not in [entry.path for entry in client.list_artifacts(run_id)]
    assert "mlflow.loggedArtifacts" not in client.get_run(run_id).data.tags
