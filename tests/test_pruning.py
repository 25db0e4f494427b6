"""A clearly worse trial is stopped while it trains for real."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_exp.orchestration.hydra_app import main
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.types import Status

QUICK = (
    *("training.device=cpu", "training.batch_size=8", "training.max_steps=9", "training.evaluate_every_steps=3"),
    *("training.max_length=64", "evaluation=quick", "evaluation.max_items=12", "quantization=fp32", "tracking=off"),
)


@pytest.mark.parametrize(
    ("pruner", "options"),
    [("wilcoxon", ()), ("median", ("+sweep.pruner_options.n_startup_trials=1",))],
    ids=["wilcoxon", "median"],
)
def test_a_learning_rate_that_learns_nothing_is_pruned(
    pruner: str, options: tuple[str, ...], tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    places = (f"output_root={tmp_path}/outputs", f"model.path={tiny_models['llama']}", f"task.path={colour_task}")
    rates = "training.learning_rate=5e-3,1e-9"
    command = ["-m", "model=local", "task=local", "task.kind=classification", *places, rates, *QUICK]
    assert main([*command, f"sweep.pruner={pruner}", "sweep.name=p", *options]) == 0
    records = [read_record(file) for file in OutputPaths.of(tmp_path / "outputs").runs.glob("*/record.json")]
    good, bad = sorted(records, key=lambda record: record.trial.number if record.trial else -1)
    assert good.status is Status.COMPLETED
    assert bad.status is Status.PRUNED
    assert bad.training is not None
    assert bad.training.steps < 9


def test_a_pilot_whose_learning_rate_learns_nothing_is_stopped_and_not_chosen(
    tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    places = (f"output_root={tmp_path}/outputs", f"model.path={tiny_models['llama']}", f"task.path={colour_task}")
    ladder = ("r_start=4", "r_max=4", "seeds=2", "max_seeds=2", "lr_factors=[1e-6,1,2]", "stop_pilots=true")
    settings = (*(f"sweep.ladder.{text}" for text in ladder), "training.learning_rate=2e-2", "training.logging_steps=1")
    command = ["-m", "model=local", "task=local", "task.kind=classification", *places, *QUICK, *settings]
    assert main([*command, "sweep.sampler=ladder", "sweep.name=p"]) == 0
    records = [read_record(file) for file in OutputPaths.of(tmp_path / "outputs").runs.glob("*/record.json")]
    pilots = {record.config["training"]["learning_rate"]: record for record in records if record.seed >= 1000}
    stopped = pilots[2e-8]
    assert stopped.status is Status.PRUNED
    assert stopped.training is not None
    assert stopped.training.pilot_loss is not None
    assert stopped.training.pilot_loss.step <= stopped.training.steps < 9
    assert stopped.failure is not None
    assert "sweep.ladder.stop_pilots" in stopped.failure.message
    deciding = {record.config["training"]["learning_rate"] for record in records if record.seed < 1000}
    assert len(deciding) == 1
    assert 2e-8 not in deciding
