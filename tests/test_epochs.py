"""``training.epochs`` becomes steps of this file and batch size, also in the record; whole texts are trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_exp.cli import main
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record
from qlora_exp.tracking.fields import run_params

QUICK = ["tracking=off", "evaluation.forgetting=false", "training.device=cpu", "training.batch_size=8"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rows = [{"text": f"Number {n} is followed by {n + 1}, and preceded by {n - 1}."} for n in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "texts.jsonl"


def test_each_point_of_a_plan_has_the_steps_of_its_batch_size(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    axes = ["training.epochs=0.5,3", "training.batch_size=8,16"]
    assert main(["plan", "task=local", f"task.path={texts}", *axes, "--json"]) == 0
    found = [(run["overrides"], run["steps"]) for run in json.loads(capsys.readouterr().out)]
    expected = {(0.5, 8): 2, (0.5, 16): 1, (3.0, 8): 12, (3.0, 16): 6}  # of 32 training rows
    assert {(run["training.epochs"], run["training.batch_size"]): steps for run, steps in found} == expected


def test_a_run_on_whole_texts_for_half_an_epoch(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["task=local", f"task.path={texts}", "training.epochs=0.5", *QUICK]
    assert main(["validate", *given]) == 0
    shown = capsys.readouterr().out
    assert "read as whole texts: completion = text" in shown
    assert "training 2 steps of 8 items (0.5 epochs of 32 rows)" in shown
    assert main(["run", *given, f"output_root={tmp_path / 'outputs'}"]) == 0
    assert capsys.readouterr().err.count("read as whole texts") == 1
    [folder] = OutputPaths.of(str(tmp_path / "outputs")).runs.iterdir()
    record = read_record(folder / "record.json")
    assert record.plan is not None
    assert record.data is not None
    assert record.training is not None
    assert record.config["training"]["epochs"] == 0.5
    assert record.config["training"]["max_steps"] is None
    assert (record.plan.max_steps, record.training.steps, record.training.epochs) == (2, 2, 0.5)
    assert run_params(record)["training.epochs"] == "0.5"
    assert record.data.layout == "whole texts"
    assert record.data.layout_settings == {"task.prompt": "", "task.columns.completion": "text"}
    scores = record.scores.after
    assert scores is not None
    assert scores.exact_match is None
    assert scores.loss is not None


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("task.format=chat", "no turns for a chat template"),
        ("evaluation.few_shots=2", "nothing is generated"),
        ('task.goal="exact_match >= 0.5"', "nothing is generated"),
        ("task.system=Brief.", "no system message"),
    ],
)
def test_whole_texts_refuse_settings_that_need_a_prompt(
    setting: str, says: str, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", "task=local", f"task.path={texts}", setting]) == 2
    assert says in capsys.readouterr().err
