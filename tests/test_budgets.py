"""Budgets: what they end, what is said of it, what is refused; through the command line."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_exp.cli import main
from qlora_exp.estimate.budget import budget_of
from qlora_exp.estimate.calibration import rates_file
from qlora_exp.estimate.throughput import machine_of
from qlora_exp.orchestration.command import study_spec
from qlora_exp.orchestration.study_budget import StudyBudget, affordable_trials_message
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import write_json
from qlora_exp.records.find import read_runs
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.study.study import Study
from qlora_exp.system.environment import probe_without_torch
from tests import processes

SLEEP = ["training.engine=sleep", "training.sleep_seconds=0.2", "tracking=off", "training.batch_size=8"]
TOKENS = 20 * 8 * 10
"""Of a sleeping trial: steps, rows, tokens a row."""
GRID = ["training.learning_rate=1e-4,2e-4,3e-4,4e-4,5e-4,6e-4", "sweep.name=mine"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sweep(*overrides: str) -> int:
    from qlora_exp.orchestration.hydra_app import main as application

    return application(["-m", *SLEEP, *GRID, *overrides])


def records() -> list[RunRecord]:
    return read_runs(OutputPaths.of("outputs"))[0]


def trials(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    capsys.readouterr()
    assert main(["trials", "mine", "--csv"]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def spent_tokens() -> int:
    return sum(record.spent.tokens for record in records() if record.spent is not None)


@pytest.mark.parametrize(
    ("limit", "name"), [(f"budget.tokens={TOKENS // 2}", "tokens"), ("budget.seconds=0.1", "seconds")]
)
def test_a_run_whose_budget_is_spent_is_finished_and_scored_with_fewer_steps(
    limit: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *SLEEP, limit]) == 0
    [record] = records()
    assert record.status is Status.COMPLETED
    assert record.training is not None
    assert record.training.ended_by_budget == name
    assert 0 < record.training.steps < 20
    assert record.scores.after is not None
    told = f"budget.{name} was spent after {record.training.steps} of 20 steps"
    assert any(told in warning for warning in record.warnings)
    assert told in capsys.readouterr().out


def test_a_run_that_its_budget_holds_is_whole() -> None:
    assert main(["run", *SLEEP, f"budget.tokens={TOKENS}", "budget.seconds=60"]) == 0
    [record] = records()
    assert record.training is not None
    assert (record.training.steps, record.training.ended_by_budget) == (20, None)


def test_a_sweep_starts_no_trial_that_what_is_left_does_not_buy(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(f"budget.tokens={3 * TOKENS + 100}") == 0
    shown = capsys.readouterr()
    assert f"the budget is spent (budget.tokens={3 * TOKENS + 100}" in shown.out
    assert "qlora-exp resume mine budget.tokens=" in shown.out
    assert "is unknown until the first has ended" in shown.err
    assert [record.training.steps for record in records() if record.training] == [20, 20, 20]


def test_a_resumed_sweep_spends_what_is_left_of_a_larger_budget(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(f"budget.tokens={2 * TOKENS}") == 0
    assert main(["resume", "mine"]) == 0
    assert len(trials(capsys)) == 2
    assert main(["resume", "mine", f"budget.tokens={5 * TOKENS}"]) == 0
    assert (
        f"budget.tokens={5 * TOKENS} is enough for about 3 of 4 trials (3–3, from 2 finished trials)"
        in capsys.readouterr().err
    )
    assert len(trials(capsys)) == 5
    assert main(["resume", "mine", "budget.tokens=null"]) == 0
    assert sorted(row["number"] for row in trials(capsys)) == list("012345")
    assert spent_tokens() == 6 * TOKENS


def test_what_runs_at_once_spends_one_budget() -> None:
    assert sweep(f"budget.tokens={4 * TOKENS}", "workers.count=2") == 0
    assert len(records()) == 4


def test_failed_trials_are_paid_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("training.sleep_fault=fail", f"budget.tokens={TOKENS}", "sweep.max_failures=null") == 1
    assert "the budget is spent" in capsys.readouterr().out
    assert spent_tokens() >= TOKENS
    assert 1 < len(records()) < 6


def test_dollars_are_the_seconds_of_the_runs_at_the_machines_price(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("budget.usd=0.5", "budget.usd_per_hour=3600") == 0  # a dollar a second
    assert "the budget is spent (budget.usd=0.5" in capsys.readouterr().out
    assert 1 <= len(records()) <= 2


def test_what_a_killed_trial_spent_stays_spent() -> None:
    crash = [
        "training.sleep_seconds=5",
        "training.sleep_fault=crash",
        "sweep.max_attempts=1",
        "sweep.max_failures=null",
    ]
    assert sweep(*crash, "budget.seconds=1") == 1
    [record] = records()
    assert record.status is Status.FAILED
    assert record.spent is not None
    assert record.spent.seconds >= 1


def test_a_killed_sweep_goes_on_with_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*SLEEP, *GRID, "training.sleep_seconds=0.5", f"budget.tokens={4 * TOKENS}"]
    process = processes.Popen(
        [sys.executable, "-m", "qlora_exp", "-m", *overrides], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    until = time.monotonic() + 60
    while time.monotonic() < until and not any(record.status is Status.COMPLETED for record in records()):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert main(["resume", "mine"]) == 0
    assert "the budget is spent" in capsys.readouterr().out
    completed = [record for record in records() if record.status is Status.COMPLETED]
    assert 3 <= len(completed) <= 4
    assert spent_tokens() <= 4 * TOKENS


def test_a_trials_configuration_is_not_limited_by_its_studys_budget() -> None:
    assert sweep(f"budget.tokens={TOKENS // 2}") == 0
    [record] = records()
    assert record.training is not None
    assert record.training.steps == 20
    budget: Any = record.config["budget"]
    assert budget["tokens"] is None
    spec = json.loads(Path("outputs/studies/mine/study.json").read_text())
    assert f"budget.tokens={TOKENS // 2}" in spec["overrides"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("budget.seconds=0", "budget.seconds must be above 0"),
        ("budget.tokens=-5", "budget.tokens must be above 0"),
        ("budget.usd=nan", "budget.usd must be above 0"),
        ("budget.usd=1", "budget.usd_per_hour=2.5"),
        ("budget.tokens=3", "too small for one training step"),
        ("budget.seconds=10min", "budget.seconds"),
        ("budget.tokens=1.5", "budget.tokens"),
        ("budget.minutes=5", "budget.minutes"),
    ],
)
@pytest.mark.parametrize("verb", ["run", "sweep"])
def test_an_impossible_budget_is_one_message(
    verb: str, wrong: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["run", *SLEEP, wrong]) if verb == "run" else sweep(wrong)
    shown = capsys.readouterr().err
    assert code == 2
    assert told in shown
    assert shown.count("error:") == 1
    assert "Traceback" not in shown
    assert not Path("outputs/runs").exists()


@pytest.mark.parametrize("verb", ["run", "sweep"])
def test_energy_that_nothing_counts_is_no_budget(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    limit = ["budget.kwh=1", "training.device=cpu"]
    assert (main(["run", *SLEEP, *limit]) if verb == "run" else sweep(*limit)) == 2
    shown = capsys.readouterr().err
    assert "energy can't be measured here" in shown
    assert "budget.seconds" in shown


def test_a_budget_is_no_axis(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("budget.seconds=5,10") == 2
    assert "budget.seconds can't be an axis" in capsys.readouterr().err


@pytest.mark.parametrize(("limit", "name"), [("budget.tokens=400", "tokens"), ("budget.seconds=3", "seconds")])
def test_a_real_training_that_a_budget_ends_keeps_its_checkpoint_and_is_scored(
    limit: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [
        "training.max_steps=2000",
        "training.batch_size=2",
        "evaluation.max_items=8",
        "evaluation.forgetting=false",
    ]
    device = ["training.device=cpu", "evaluation.baselines=false", "tracking=off", "quantization=fp32"]
    assert main(["run", *small, *device, limit]) == 0
    [record] = records()
    assert record.training is not None
    if name == "tokens":
        told = re.search(r"budget.tokens=400 is enough for about (\d+) of 2000 steps", capsys.readouterr().err)
        assert told is not None
        assert int(told[1]) == pytest.approx(record.training.steps, rel=0.5)
    assert record.training.ended_by_budget == name
    assert not record.training.stopped_early
    assert 0 < record.training.steps < 2000
    assert record.scores.after is not None
    checkpoints = OutputPaths.of("outputs").run(record.run_id).checkpoints
    assert (checkpoints / f"checkpoint-{record.training.steps}").is_dir()
    assert record.spent is not None
    assert record.spent.tokens == record.speed.train_tokens
    assert record.spent.tokens >= 400 if name == "tokens" else record.spent.seconds >= 3


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_calibrated_machine_knows_beforehand_what_a_budget_will_buy(
    calibrated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if calibrated:
        machine = machine_of(replace(probe_without_torch(), torch_threads=1))
        write_json(rates_file(), {machine: {"fp32": 1e10}})
    limited = ["training.device=cpu", "training.threads=1", "quantization=fp32", "budget.seconds=600", "tracking=off"]
    asked = study_spec([*limited, "lora.r=4,8", "training.learning_rate=1e-4,1e-3,1e-2", "sweep.name=mine"])
    purse = StudyBudget(budget_of(asked.config), OutputPaths.of("outputs"))
    [told] = affordable_trials_message(asked, Study.open(asked.spec, asked.paths), purse)
    assert (" of 6 trials (" in told) == calibrated
    assert ("is unknown until the first has ended" in told) != calibrated
