"""What a run's budget will buy, and when it is refused: by what is predicted before a weight is read."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_exp.cli import main
from qlora_exp.config.compose import compose
from qlora_exp.config.schema import Config, to_plain
from qlora_exp.estimate.budget import affordable_steps
from qlora_exp.estimate.calibration import rates_file
from qlora_exp.estimate.estimator import TIME_FIELDS, with_first_predictions
from qlora_exp.estimate.throughput import Interval, machine_of
from qlora_exp.estimate.tokens import row_lengths
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import write_json
from qlora_exp.records.types import SCHEMA_VERSION, RunRecord, Speed, Status
from qlora_exp.runs.prepare import Prepared, prepare
from qlora_exp.system.environment import probe, probe_without_torch

SMALL = ["training.device=cpu", "training.threads=1", "quantization=fp32", "tracking=off", "training.max_steps=40"]
SMALL += ["training.batch_size=4", "task.max_train_items=40"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def prepared() -> Prepared:
    """Forty steps predicted to take 80 s (40 to 160), and 10 s beside them but for the last scoring."""
    found = prepare(compose(SMALL), probe(compose(SMALL).training.device))
    time = replace(found.estimate.time, train=Interval(40.0, 80.0, 160.0, "a guess"), before=10.0)
    return replace(found, estimate=replace(found.estimate, time=time))


def sentences(config: Config, prepared: Prepared) -> list[str]:
    return [limit.message for limit in affordable_steps(config.budget, prepared.estimate)]


def test_seconds_and_dollars_buy_steps_after_what_comes_before_them(prepared: Prepared) -> None:
    def told(*overrides: str) -> list[str]:
        return sentences(compose([*SMALL, *overrides]), prepared)

    assert told() == []
    assert told("budget.kwh=1") == ["budget.kwh=1: the cost of a step is unknown"]
    [seconds] = told("budget.seconds=31")  # 21 s at 4, 2, 1 s a step; the step that reaches the limit is made
    assert seconds == "budget.seconds=31 is enough for about 11 of 40 steps (6–21, from a guess)"
    [dollars] = told("budget.usd=0.31", "budget.usd_per_hour=36")  # one cent a second
    assert dollars == "budget.usd=0.31 is enough for about 11 of 40 steps (6–21, from a guess)"
    assert "about 1 of 40 steps (1–1," in told("budget.seconds=9")[0]
    assert "about 40 of 40 steps (40–40," in told("budget.seconds=1000")[0]
    time = replace(prepared.estimate.time, before=None)
    unknown = replace(prepared, estimate=replace(prepared.estimate, time=time))
    [seconds] = sentences(compose([*SMALL, "budget.seconds=31"]), unknown)
    assert seconds.startswith("budget.seconds=31 is enough for about 16 of 40 steps (8–31,")
    assert seconds.endswith("not counting the time before training")
    config = compose([*SMALL, "budget.seconds=31"])
    [unknown_pace] = sentences(config, prepare(config, probe(config.training.device)))
    assert "is unknown until qlora-exp calibrate has measured this machine" in unknown_pace


def test_tokens_buy_steps_of_the_mean_row(prepared: Prepared) -> None:
    mean = sum(row_lengths(prepared.splits)) / 40
    [told] = sentences(compose([*SMALL, f"budget.tokens={round(10 * 4 * mean) - 1}"]), prepared)
    assert "is enough for about 10 of 40 steps" in told


def test_a_token_limit_of_the_training_is_counted_in_the_steps_it_takes() -> None:
    config = compose([*SMALL, "training.max_steps=null", "training.max_tokens=2000", "budget.tokens=1000"])
    [told] = sentences(config, prepare(config, probe(config.training.device)))
    found = re.search(r"about (\d+) of (\d+) steps", told)
    assert found is not None
    assert int(found[1]) == pytest.approx(int(found[2]) / 2, abs=1)


def test_a_budget_is_refused_by_the_calibrations_fastest_and_not_by_a_slow_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = compose(SMALL)
    here = replace(probe_without_torch(), torch_threads=1)
    plan = replace(prepare(config, probe(config.training.device)).plan, train_flops_per_token=1e7)
    slow = RunRecord(
        SCHEMA_VERSION, "slow", "slow", Status.COMPLETED, "2026-01-01T00:00:00Z", None, to_plain(config), here,
        plan=plan, speed=Speed(steps=40, train_tokens=4_000, train_seconds=1e6),
    )  # fmt: skip
    write_json(OutputPaths.of("outputs").run("slow").record, slow)
    limited = [*SMALL, "budget.seconds=30"]
    assert main(["validate", *limited]) == 0
    told = prepare(config, probe(config.training.device)).plan
    assert told.train_flops_per_token is not None
    assert told.predicted_train_tokens is not None
    least = told.train_flops_per_token * told.predicted_train_tokens
    write_json(rates_file(), {machine_of(here): {"fp32": least / 100.0}})
    assert prepare(config, probe(config.training.device)).estimate.time.least_train == pytest.approx(100.0)
    write_json(rates_file(), {machine_of(here): {"fp32": 1e3}})
    capsys.readouterr()
    for verb in ("validate", "run"):
        assert main([verb, *limited]) == 2
        told = capsys.readouterr().err
        assert "the budget is too small for one training step" in told
        assert "budget.seconds = 30" in told
    assert [folder.name for folder in Path("outputs/runs").iterdir()] == ["slow"]


def test_a_resumed_run_keeps_the_times_that_it_was_told_first(prepared: Prepared) -> None:
    planned = prepared.plan
    later = replace(planned, predicted_train_seconds=1.0, predicted_train_usd=2.0, predicted_peak_train_bytes=7)
    kept = with_first_predictions(later, planned)
    assert {name: getattr(kept, name) for name in TIME_FIELDS} == {name: getattr(planned, name) for name in TIME_FIELDS}
    assert kept.predicted_peak_train_bytes == 7
    assert with_first_predictions(later, None) == later


def test_validate_refuses_what_a_run_would_for_its_energy_and_its_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["validate", *SMALL, "budget.kwh=1"]) == 2
    assert "energy can't be measured here" in capsys.readouterr().err
    limited = [*SMALL, "budget.memory_bytes=1000000"]
    assert main(["validate", *limited]) == 2
    assert "budget.memory_bytes" in capsys.readouterr().err


def test_a_token_limit_is_reached_with_fewer_rows_than_a_batch() -> None:
    config = compose([*SMALL, "training.max_steps=null", "training.max_tokens=4000", "task.max_train_items=3"])
    prepared = prepare(config, probe(config.training.device))
    tokens = sum(row_lengths(prepared.splits))
    assert prepared.plan.max_steps * tokens >= 4000
    assert prepared.estimate.workload.steps == -(-4000 // tokens)
