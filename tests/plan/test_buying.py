"""What a plan says of a budget: the words of the run or the sweep that it is a plan of."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_exp.cli import main
from qlora_exp.config.compose import compose
from qlora_exp.estimate.budget import affordable_steps, budget_of
from qlora_exp.estimate.calibration import rates_file
from qlora_exp.estimate.throughput import machine_of
from qlora_exp.orchestration.command import study_spec
from qlora_exp.orchestration.study_budget import StudyBudget, affordable_trials_message
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import write_json
from qlora_exp.runs.prepare import prepare
from qlora_exp.study.study import Study
from qlora_exp.system.environment import probe, probe_without_torch

SMALL = ["training.device=cpu", "training.threads=1", "quantization=fp32", "tracking=off", "training.max_steps=40"]
SMALL += ["training.batch_size=4", "task.max_train_items=40"]
LIMITED = ["budget.seconds=2", "budget.tokens=1500", "budget.usd=0.02", "budget.usd_per_hour=36"]


@pytest.fixture(autouse=True)
def calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    here = machine_of(replace(probe_without_torch(), torch_threads=1))
    write_json(rates_file(), {here: {"fp32": 1e10}, "cuda, Tesla T4, 2.13.0": {"fp16": 1e13}})


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main(["plan", "--json", *arguments]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_a_plan_says_of_a_budget_what_the_run_will_say(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = compose([*SMALL, *LIMITED])
    prepared = prepare(config, probe(config.training.device))
    told = [limit.message for limit in affordable_steps(config.budget, prepared.estimate)]
    assert len(told) == 3
    [run] = planned(capsys, *SMALL, *LIMITED)
    assert [bought["message"] for bought in run["budget"]] == told
    for bought in run["budget"]:
        assert 0 < bought["minimum"] <= bought["about"] <= bought["maximum"] <= bought["of"] == run["steps"] == 40
    assert main(["plan", *SMALL, *LIMITED, "--html", str(tmp_path / "plan.html")]) == 0
    shown, page = capsys.readouterr().out, (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert all(sentence in shown and sentence in page for sentence in told)
    assert planned(capsys, *SMALL)[0]["budget"] == []


@pytest.mark.parametrize(
    "axes", [["lora.r=4,8,16"], ["training.learning_rate=interval(1e-4,1e-2)", "sweep.n_trials=7"]]
)
def test_a_plan_says_of_a_budget_what_the_sweep_will_say(axes: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    asked = study_spec([*SMALL, *LIMITED, *axes])
    purse = StudyBudget(budget_of(asked.config), OutputPaths.of("outputs"))
    told = list(affordable_trials_message(asked, Study.open(asked.spec, asked.paths), purse))
    assert len(told) == 3
    assert all(f" of {3 if len(axes) == 1 else 7} trials (" in sentence for sentence in told)
    for run in planned(capsys, *SMALL, *LIMITED, *axes):
        assert [bought["message"] for bought in run["budget"]] == told


def test_tokens_are_known_before_the_first_trial_of_an_uncalibrated_machine(capsys: pytest.CaptureFixture[str]) -> None:
    rates_file().unlink()
    plain = planned(capsys, *SMALL, "lora.r=4,8")
    seconds, tokens = planned(capsys, *SMALL, "lora.r=4,8", "budget.seconds=9", "budget.tokens=1000000000")[0]["budget"]
    assert seconds["about"] is None
    assert tokens["about"] == tokens["of"] == 2
    limit = 1.5 * plain[0]["tokens"]
    [one] = planned(capsys, *SMALL, "lora.r=4,8", f"budget.tokens={limit:.0f}")[0]["budget"]
    assert one["about"] == 1


def test_an_impossible_budget_is_the_message_that_validate_has(capsys: pytest.CaptureFixture[str]) -> None:
    for limit in ("budget.seconds=0.001", "budget.tokens=50"):
        told = []
        for verb in ("plan", "validate"):
            assert main([verb, *SMALL, limit]) == 2
            told.append(capsys.readouterr().err)
        assert told[0] == told[1]
        assert re.search(rf"needs at least \S+ {'s' if 'seconds' in limit else 'tokens'}\b", told[0])
    assert main(["plan", *SMALL, "budget.seconds=0.001", "lora.r=4,256"]) == 2
    several = capsys.readouterr().err
    assert several.count("too small for one training step") == 1
    assert main(["plan", *SMALL, "budget.seconds=0.001", "lora.r=4"]) == 2
    assert several == capsys.readouterr().err  # of several the cheapest


def test_a_configuration_of_which_the_budget_buys_no_step_is_a_row_that_does_not_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fast, slow = planned(capsys, *SMALL, "training.batch_size=2,40", "budget.tokens=200")
    assert (fast["fits"], slow["fits"]) == (True, False)
    assert "too small for one training step" in slow["reason"]
    assert slow["memory"]["peak_bytes"] > fast["memory"]["peak_bytes"]


def test_energy_is_refused_on_a_cpu_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL, "budget.kwh=1"]) == 2
    assert "energy can't be measured here" in capsys.readouterr().err
    [run] = planned(capsys, "model=llama3_1_8b", "plan.device=rtx4090", "budget.kwh=1")
    assert run["budget"][0]["message"] == "budget.kwh=1: the cost of a step is unknown"


def test_a_card_that_is_to_be_fitted_is_the_card_that_is_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--fit", "t4", "model=llama3_2_1b", "lora.r=8", "targets=attention", "training.max_length=256")
    runs = planned(capsys, *asked)
    assert {run["device"] for run in runs} == {"t4"}
    modes = {run["settings"]["quantization"] for run in runs}
    assert "fp16" in modes
    assert "bf16" not in modes
    assert all((run["usd"] is not None) == (run["settings"]["quantization"] == "fp16") for run in runs)
    other = planned(capsys, *asked, "--device", "rtx4090")
    assert {run["device"] for run in other} == {"rtx4090"}
    assert "bf16" in {run["settings"]["quantization"] for run in other}


def test_bfloat16_on_a_card_without_it_is_mentioned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = ("model=llama3_2_1b", "quantization=bf16,fp16", "training.max_length=64", "training.micro_batch_size=1")
    bf16, fp16 = planned(capsys, *asked, "--device", "t4")
    assert fp16["notes"] == []
    assert "no bfloat16" in bf16["notes"][0]
    assert main(["plan", *asked, "--device", "t4", "--html", str(tmp_path / "plan.html")]) == 0
    assert "no bfloat16" in capsys.readouterr().out
    assert "no bfloat16" in (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert {tuple(run["notes"]) for run in planned(capsys, *asked, "--device", "l4")} == {()}
