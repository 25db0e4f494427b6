"""Honesty test 8: a training set whose labels were shuffled teaches nothing; the same one unshuffled does."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from qlora_exp import run
from qlora_exp.paths import EMBEDDED

SETTINGS = [
    "task=local",
    "task.kind=classification",
    "task.prompt='Definition: {definition}\\nCategory:'",
    "task.completion='{category}'",
    "task.columns.label=category",
    "task.columns.prompt=null",
    "task.columns.completion=null",
    "targets=all_linear",
    "quantization=fp32",
    "training.max_steps=150",
    "evaluation.generate=false",
    "evaluation.forgetting=false",
    "evaluation.before=false",
    "tracking=off",
]


def write_task(folder: Path, shuffled: bool) -> Path:
    folder.mkdir()
    for split in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (EMBEDDED / "task" / f"{split}.jsonl").read_text().splitlines()]
        rows = [{"definition": row["definition"], "category": row["category"]} for row in rows]
        if shuffled and split == "train":
            labels = [row["category"] for row in rows]
            random.Random(0).shuffle(labels)
            rows = [{**row, "category": label} for row, label in zip(rows, labels, strict=True)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_shuffled_labels_train_to_chance(tmp_path: Path) -> None:
    accuracy = {}
    for shuffled in (True, False):
        task = write_task(tmp_path / f"task_{shuffled}", shuffled)
        record = run(*SETTINGS, f"task.path={task}", f"output_root={tmp_path / 'outputs'}")
        assert record.scores.after is not None, record.failure
        assert record.baselines is not None
        accuracy[shuffled] = record.scores.after.accuracy
        majority = record.baselines.majority_accuracy
    assert majority is not None
    # Three binomial standard errors at 500 items around the majority class, the best that chance can do.
    chance = majority + 3 * (majority * (1 - majority) / 500) ** 0.5
    assert accuracy[True] < chance
    assert accuracy[False] > chance + 0.1
