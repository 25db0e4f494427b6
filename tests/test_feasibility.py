"""Memory that is predicted: what is refused, what is not started, what is tried, and how it is counted."""

from __future__ import annotations

import csv
import io
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from qlora_exp.analysis.report import build
from qlora_exp.analysis.report_content import StudyInfo, to_csv, to_markdown
from qlora_exp.cli import main
from qlora_exp.config.compose import compose
from qlora_exp.config.schema import to_plain
from qlora_exp.estimate.budget import budget_of
from qlora_exp.estimate.memory_fit import (
    CPU_PROCESS_BYTES,
    RELATIVE_ERROR,
    MemoryEstimate,
    MemoryLimit,
    PredictedOutOfMemory,
    correction_key,
    corrections,
    fit_into,
    memory_limit_bytes,
    next_smaller_micro_batch,
)
from qlora_exp.orchestration.command import study_spec
from qlora_exp.orchestration.memory_predictions import MAX_CONSECUTIVE_SKIPS, MemoryFeedback
from qlora_exp.orchestration.study_budget import StudyBudget, affordable_trials_message
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import write_json
from qlora_exp.records.find import read_runs
from qlora_exp.records.fit_types import Fit, SkippedTrial
from qlora_exp.records.types import KILLED_FOR_MEMORY, Device, Failure, Memory, RunRecord, Status
from qlora_exp.runs.execute import execute
from qlora_exp.study.study import Study
from qlora_exp.study.types import TrialRow
from qlora_exp.system.environment import probe_without_torch
from tests.analysis import made_up

SLEEP = ["training.engine=sleep", "training.sleep_seconds=0.05", "tracking=off"]
BOUND = 800_000
"""A sleeping run takes 500,000 bytes and 16,000 a rank, by its own word: up to r = 18 it fits, up to 29 it is tried."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sweep(*overrides: str) -> int:
    from qlora_exp.orchestration.hydra_app import main as application

    return application(["-m", *SLEEP, "sweep.name=mine", *overrides])


def trials(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    capsys.readouterr()
    assert main(["trials", "mine", "--csv"]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def runs() -> list[RunRecord]:
    return read_runs(OutputPaths.of("outputs"))[0]


GRID = ("lora.r=4,16,32,64", f"budget.memory_bytes={BOUND}")


def test_a_grids_points_that_do_not_fit_are_done_without_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(*GRID) == 0
    shown = capsys.readouterr()
    assert "4 of 4 trials done: 2 finished, 0 pruned, 0 failed, 2 predicted not to fit" in shown.out
    assert "2 trials predicted not to fit into 800 kB were not started" in shown.out
    assert f"budget.memory_bytes={BOUND} (800 kB)" in shown.err
    first = trials(capsys)
    assert [row["status"] for row in first] == ["COMPLETED", "COMPLETED", "DOES_NOT_FIT", "DOES_NOT_FIT"]
    assert [row["run_id"] for row in first[2:]] == ["", ""]
    assert sorted(record.run_id for record in runs()) == sorted(row["run_id"] for row in first[:2])
    assert len(list(Path("outputs/runs").iterdir())) == 2
    assert sweep(*GRID) == 0
    assert trials(capsys) == first
    assert main(["status", "mine"]) == 0
    assert "2 trials predicted not to fit into 800 kB were not started" in capsys.readouterr().out


def test_the_sampler_is_told_what_does_not_fit_and_asks_for_another(capsys: pytest.CaptureFixture[str]) -> None:
    search = ["lora.r=int(interval(1,128))", "sweep.sampler=tpe", "sweep.n_trials=5", f"budget.memory_bytes={BOUND}"]
    assert sweep(*search) == 0
    rows = trials(capsys)
    assert sum(row["status"] == "COMPLETED" for row in rows) == 5
    refused = [row for row in rows if row["status"] == "DOES_NOT_FIT"]
    assert refused
    assert len(rows) == 5 + len(refused)
    assert all(int(row["lora.r"]) > 18 for row in refused)
    assert all(int(row["lora.r"]) <= 27 for row in rows if row not in refused)
    study = optuna.load_study(study_name="mine", storage="sqlite:///outputs/optuna.db")
    for row in refused:
        trial = study.trials[int(row["number"])]
        excess = (500_000 + 16_000 * int(row["lora.r"])) / BOUND - 1
        assert trial.state is optuna.trial.TrialState.PRUNED
        assert trial.constraints["predicted_not_to_fit"] == pytest.approx(excess)
        assert trial.user_attrs["predicted_not_to_fit"]["fit"]["limit_bytes"] == BOUND
    assert sweep(*search) == 0
    assert trials(capsys) == rows


def test_what_several_workers_refuse_is_refused_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("lora.r=" + ",".join(map(str, range(10, 34))), f"budget.memory_bytes={BOUND}", "workers.count=2") == 0
    rows = trials(capsys)
    assert [row["lora.r"] for row in rows] == [str(r) for r in range(10, 34)]
    assert [row["status"] for row in rows] == ["COMPLETED"] * 20 + ["DOES_NOT_FIT"] * 4
    assert len(runs()) == 20


@pytest.mark.faults
def test_a_space_in_which_nothing_fits_ends_with_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    search = ["lora.r=int(interval(64,128))", "sweep.sampler=random", "sweep.n_trials=5"]
    for _ in range(2):
        assert sweep(*search, f"budget.memory_bytes={BOUND}") == 2
        shown = capsys.readouterr().err
        assert shown.count("error:") == 1
        assert "none of them is predicted to fit into 800 kB" in shown
        assert len(trials(capsys)) == MAX_CONSECUTIVE_SKIPS
    assert sweep(*search, "budget.memory_bytes=3000000") == 0
    assert sum(row["status"] == "COMPLETED" for row in trials(capsys)) == 5


def test_a_grid_of_which_nothing_fits_is_wrong_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("lora.r=64,128", f"budget.memory_bytes={BOUND}") == 2
    assert "budget.memory_bytes=1524000" in capsys.readouterr().err


def test_a_grids_trials_that_did_not_fit_are_started_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("lora.r=8,64,128", f"budget.memory_bytes={BOUND}") == 0
    assert main(["resume", "mine", f"budget.memory_bytes={BOUND}", "--retry", "does_not_fit", "--force"]) == 0
    assert "run again: trials 1, 2" in capsys.readouterr().out
    assert [row["status"] for row in trials(capsys)] == ["COMPLETED"] * 3
    study = optuna.load_study(study_name="mine", storage="sqlite:///outputs/optuna.db")
    assert all(violation <= 0 for trial in study.trials for violation in trial.constraints.values())


def test_the_hint_of_a_grid_of_which_nothing_fits_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("lora.r=64,128", f"budget.memory_bytes={BOUND}") == 2
    command = capsys.readouterr().err.rpartition("a larger bound: qlora-exp ")[2]
    assert main(shlex.split(command)) == 0
    assert [row["status"] for row in trials(capsys)] == ["COMPLETED", "DOES_NOT_FIT"]


def test_a_samplers_trials_that_did_not_fit_are_not_retried(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("lora.r=8,9", "sweep.sampler=random", "sweep.n_trials=2") == 0
    assert main(["resume", "mine", "--retry", "does_not_fit"]) == 2
    assert "the sampler random replaces trials" in capsys.readouterr().err


def test_a_trial_that_ran_out_of_memory_keeps_its_larger_kin_from_being_started(
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = ["training.sleep_fault=out_of_memory", "lora.r=4,8,2,16", "budget.memory_bytes=2000000"]
    assert sweep(*full) == 1
    statuses = ["OUT_OF_MEMORY", "DOES_NOT_FIT", "OUT_OF_MEMORY", "DOES_NOT_FIT"]
    assert [row["status"] for row in trials(capsys)] == statuses
    assert main(["status", "mine"]) == 0
    told = "predictions wrong: 2 of 2 (out of memory: 1 of 1 borderline trials, 1 of the others;"
    assert told in capsys.readouterr().out


def test_a_ladder_ends_below_the_rank_that_does_not_fit_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    ladder = ["sweep.sampler=ladder", "sweep.ladder.r_start=4", "sweep.ladder.r_max=64", "sweep.ladder.margin=0.001"]
    assert sweep(*ladder, "sweep.ladder.seeds=2", "training.learning_rate=1e-3", "budget.memory_bytes=560000") == 0
    assert "no run at r = 16 completed: predicted not to fit into memory" in capsys.readouterr().out
    rows = trials(capsys)
    assert {row["lora.r"] for row in rows if row["status"] == "DOES_NOT_FIT"} == {"16"}
    assert all(row["status"] == "COMPLETED" for row in rows if int(row["lora.r"]) < 16)


def test_refused_trials_cost_a_budget_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = 20 * 8 * 10
    grid = ["lora.r=64,4,32,8,16", "training.batch_size=8", f"budget.memory_bytes={BOUND}"]
    assert sweep(*grid, f"budget.tokens={2 * tokens}") == 0
    assert [row["status"] for row in trials(capsys)][:4] == ["DOES_NOT_FIT", "COMPLETED", "DOES_NOT_FIT", "COMPLETED"]
    assert len(runs()) == 2


def test_the_bound_is_the_studys_and_no_axis(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("budget.memory_bytes=1000000,2000000") == 2
    assert "budget.memory_bytes can't be an axis" in capsys.readouterr().err
    assert sweep("budget.memory_bytes=0") == 2
    assert "budget.memory_bytes must be above 0" in capsys.readouterr().err
    assert sweep("lora.r=4", f"budget.memory_bytes={BOUND}") == 0
    [record] = runs()
    budget: Any = record.config["budget"]
    assert budget["memory_bytes"] is None
    assert record.fit is not None
    assert record.fit.limit_bytes == BOUND


SMALL = [
    "training.padding_free=off",
    *("training.device=cpu", "quantization=fp32", "training.max_steps=1", "training.batch_size=16", "tracking=off"),
    *("evaluation.before=false", "evaluation.max_items=4", "evaluation.forgetting=false"),
    *("evaluation.baselines=false", "evaluation.generate=false"),
]


def test_a_run_that_does_not_fit_is_refused_with_its_parts_and_what_would_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", *SMALL, "budget.memory_bytes=150000000"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("error:") == 1
    assert "of 150 MB: base, adapters and optimizer" in shown
    assert "activations" in shown
    assert "budget.memory_bytes = 150000000" in shown
    assert not Path("outputs/runs").exists()
    [told] = [line for line in shown.splitlines() if "training.micro_batch_size=" in line]
    proposed = next(word for word in told.split() if word.startswith("training.micro_batch_size="))
    assert main(["run", *SMALL, "budget.memory_bytes=150000000", proposed]) == 0


@pytest.mark.parametrize("verb", ["run", "sweep"])
def test_less_memory_than_the_base_takes_in_any_quantization_is_one_message(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ["budget.memory_bytes=3000000", "training.engine=sft", *SMALL]
    assert (main(["run", *limits]) if verb == "run" else sweep(*limits, "lora.r=4,8")) == 2
    shown = capsys.readouterr().err
    assert shown.count("error:") == 1
    assert "no quantization of this base fits: nf4, the smallest, takes 4.1 MB by itself" in shown
    assert not Path("outputs/runs").exists()


def test_a_trial_is_run_with_as_much_of_its_micro_batch_as_fits_where_it_may_be_halved() -> None:
    rule = MemoryLimit(150_000_000, hosts=1, corrections=(), allow_borderline=True, halvings=4)
    record = execute(compose(SMALL), memory=rule)
    assert record.status is Status.COMPLETED
    assert record.plan is not None
    assert record.plan.batch_size == 16
    assert record.plan.micro_batch_size < 16
    assert any("predicted not to fit with micro-batches of 16" in warning for warning in record.warnings)
    assert record.fit is not None
    assert record.fit.peak_bytes == record.plan.predicted_peak_train_bytes


def test_a_smaller_micro_batch_divides_the_batch() -> None:
    for batch in range(1, 65):
        rows = batch
        while rows > 1:
            less = next_smaller_micro_batch(rows, batch)
            assert less <= rows // 2
            assert batch % less == 0
            rows = less
    assert (
        next_smaller_micro_batch(5, 5),
        next_smaller_micro_batch(9, 9),
        next_smaller_micro_batch(12, 12),
        next_smaller_micro_batch(16, 48),
    ) == (1, 3, 6, 8)


@pytest.mark.faults
def test_a_batch_that_no_half_divides_is_still_trained_whole() -> None:
    rule = MemoryLimit(90_000_000, hosts=1, corrections=(), allow_borderline=True, halvings=2)
    record = execute(compose([*SMALL, "training.batch_size=15"]), memory=rule)
    assert record.plan is not None
    assert record.plan.micro_batch_size in (1, 5)
    assert record.plan.micro_batch_size * record.plan.gradient_accumulation_steps == 15


def test_runs_that_have_ended_here_say_beforehand_what_a_budget_will_buy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("cache").absolute()))
    limited = ["training.device=cpu", "training.threads=1", "quantization=fp32", "budget.seconds=600", "tracking=off"]
    asked = study_spec([*limited, "lora.r=4,8"])
    purse = StudyBudget(budget_of(asked.config), OutputPaths.of("outputs"))
    opened = Study.open(asked.spec, asked.paths)
    [unknown] = affordable_trials_message(asked, opened, purse)
    assert "is unknown until the first has ended" in unknown
    record = made_up.run(mode="fp32")
    assert record.plan is not None
    record = record.replace(
        environment=replace(probe_without_torch(), torch_threads=1),
        plan=replace(record.plan, padding_free=True, train_flops_per_token=1e7, predicted_loss_tokens=1),
        config=to_plain(compose(["quantization=fp32"])),
        speed=replace(record.speed, train_tokens=100_000, train_seconds=100.0),
        synthetic=False,
    )
    paths = OutputPaths.of("outputs").run("earlier")
    paths.folder.mkdir(parents=True)
    write_json(paths.record, record.replace(run_id="earlier"))
    [told] = affordable_trials_message(asked, opened, purse)
    assert " of 2 trials (" in told
    assert "from training times predicted from the task's row lengths" in told
    write_json(paths.record, record.replace(run_id="earlier", config=to_plain(compose(["quantization=nf4"]))))
    [unknown] = affordable_trials_message(asked, opened, purse)
    assert "is unknown until the first has ended" in unknown


def test_a_run_by_itself_is_held_to_its_budget_and_not_to_the_edge() -> None:
    config = [*SLEEP, "budget.memory_bytes=1000000000000"]
    record = execute(compose(config))
    assert record.fit is not None
    bound = round(0.97 * record.fit.corrected_bytes)
    with pytest.raises(PredictedOutOfMemory):
        execute(compose([*config, f"budget.memory_bytes={bound}"]))


# What the kin of a run say.

NEED = MemoryEstimate(1000, 0, None, None)


def ended(status: Status, predicted: int, measured: int | None = None, bound: int = 2000) -> RunRecord:
    record = made_up.run()
    assert record.plan is not None
    return record.replace(
        status=status,
        plan=replace(record.plan, predicted_peak_train_bytes=predicted),
        memory=Memory(train_working_set_bytes=measured),
        fit=Fit(predicted, 0, predicted, bound, RELATIVE_ERROR["cpu"], 0),
    )


def judged(records: list[RunRecord], bound: int, need: MemoryEstimate = NEED) -> tuple[Fit, bool]:
    kin = corrections(records, bound)
    key = kin[0].key if kin else "none"
    return fit_into(bound, need, MemoryLimit(bound, 1, kin, allow_borderline=True, halvings=0), key, "cpu")


def test_the_median_of_measured_over_predicted_peaks_corrects_the_next_prediction() -> None:
    done = [ended(Status.COMPLETED, 100, measured) for measured in (110, 120, 900)]
    fit, fits = judged(done, 1100)
    assert (fit.corrected_bytes, fit.similar_runs, fits) == (1200, 3, True)
    assert fit.borderline
    assert not judged(done, 950)[1]
    assert judged([], 1000)[0].corrected_bytes == 1000
    unmeasured = [ended(Status.COMPLETED, 100), ended(Status.FAILED, 100, 500)]
    assert judged(unmeasured, 1000)[0].corrected_bytes == 1000


def test_only_kin_count() -> None:
    other = ended(Status.COMPLETED, 100, 200)
    other = other.replace(config={**other.config, "quantization": {"mode": "fp32"}})
    assert len(corrections([other, ended(Status.COMPLETED, 100, 100)], None)) == 2


def test_runs_with_padding_do_not_correct_those_without() -> None:
    done = {choice: ended(Status.COMPLETED, 100, 150) for choice in (True, False, None)}
    for choice, record in done.items():
        assert record.plan is not None
        done[choice] = record.replace(plan=replace(record.plan, padding_free=choice))
    free, padded = corrections(done.values(), None)
    assert (free.count, padded.count) == (1, 2), "records of earlier versions are of padded runs"
    config, device = done[True].config, done[True].environment.device
    assert free.key == correction_key(config, device, padding_free=True)
    assert padded.key == correction_key(config, device, padding_free=False)


def test_what_ran_out_of_memory_bounds_its_kin_from_below() -> None:
    fit, fits = judged([ended(Status.OUT_OF_MEMORY, 900, bound=1500)], 1500)
    assert not fits
    assert fit.corrected_bytes >= 1500
    assert judged([ended(Status.OUT_OF_MEMORY, 1100, bound=1500)], 1500)[1]
    assert judged([ended(Status.OUT_OF_MEMORY, 900, bound=1500)], 3000)[1]
    larger_fitted = [ended(Status.OUT_OF_MEMORY, 900), ended(Status.COMPLETED, 1200, 1200)]
    assert judged(larger_fitted, 2000)[1]


def test_a_small_run_that_the_kernel_ended_for_other_processes_says_nothing_of_its_kin() -> None:
    small, large = (ended(Status.OUT_OF_MEMORY, 900, bound=bound) for bound in (20_000, 1500))
    killed = Failure(KILLED_FOR_MEMORY, "probably out of memory")
    fit, fits = judged([small.replace(failure=killed)], 20_000)
    assert (fit.corrected_bytes, fits) == (1000, True)
    assert not judged([small], 20_000)[1], "what the process itself was refused is its own need"
    assert not judged([large.replace(failure=killed)], 1500)[1]


def test_what_ran_out_of_memory_raises_the_correction_and_never_lowers_it() -> None:
    done = ended(Status.COMPLETED, 100, 120)
    assert corrections([done, ended(Status.OUT_OF_MEMORY, 1000, bound=1500)], None)[0].ratio == pytest.approx(1.35)
    assert corrections([done, ended(Status.OUT_OF_MEMORY, 2000, bound=1000)], None)[0].ratio == pytest.approx(1.2)


def test_the_edge_is_tried_by_trials_and_not_by_runs() -> None:
    rule = MemoryLimit(900, 1, (), allow_borderline=True, halvings=0)
    assert fit_into(900, NEED, rule, "", "cpu")[1]
    assert not fit_into(900, NEED, replace(rule, allow_borderline=False), "", "cpu")[1]
    assert not fit_into(800, NEED, rule, "", "cpu")[1]


def test_the_devices_memory_is_the_bound_where_nothing_else_is_said() -> None:
    card = Device("cuda", "H100", 1, 80_000, None, None, True)
    rule = MemoryLimit(None, hosts=2, corrections=(), allow_borderline=True, halvings=0)
    assert memory_limit_bytes(rule, card) == 40_000
    assert memory_limit_bytes(replace(rule, limit_bytes=90_000), card) == 90_000
    machine = replace(card, kind="cpu", memory_bytes=2 * CPU_PROCESS_BYTES + 2_000)
    assert memory_limit_bytes(rule, machine) == 1_000
    assert memory_limit_bytes(rule, replace(machine, memory_bytes=None)) is None


# How it is counted.


def row(number: int, record: RunRecord | None, skipped: SkippedTrial | None = None) -> TrialRow:
    if record is not None:
        paths = OutputPaths.of("outputs").run(f"run-{number}")
        paths.folder.mkdir(parents=True)
        write_json(paths.record, record.replace(run_id=f"run-{number}"))
    status = record.status if record is not None else Status.PRUNED
    run_id = f"run-{number}" if record is not None else None
    return TrialRow(number, "COMPLETE", status, (None,), run_id, None, {}, 1, None, skipped=skipped)


def test_a_trial_that_was_halved_and_still_went_beyond_the_bound_is_one_wrong_prediction() -> None:
    halved_once = replace(row(0, ended(Status.COMPLETED, 1000, 2100)), out_of_memory_retries=1)
    found = MemoryFeedback(OutputPaths.of("outputs")).predicted([halved_once])
    assert found is not None
    assert (found.out_of_memory, found.above_limit, found.wrong, found.compared) == (1, 0, 1, 1)


def test_predictions_are_counted_by_what_came_of_them() -> None:
    skipped = SkippedTrial(Fit(5000, 0, 5000, 2000, RELATIVE_ERROR["cpu"], 0), train_seconds=60.0, train_flops=None)
    rows = [
        row(0, ended(Status.COMPLETED, 1000, 900)),
        row(1, ended(Status.COMPLETED, 1000, 2100)),
        row(2, ended(Status.OUT_OF_MEMORY, 1000)),
        row(3, ended(Status.OUT_OF_MEMORY, 2100)),
        row(4, ended(Status.COMPLETED, 1900, 1950)),
        row(5, ended(Status.COMPLETED, 1900)),
        row(6, None, skipped),
        row(7, None, skipped),
    ]
    found = MemoryFeedback(OutputPaths.of("outputs")).predicted(rows)
    assert found is not None
    assert (found.skipped, found.seconds_saved) == (2, 120.0)
    assert (found.borderline, found.borderline_out_of_memory) == (3, 1)
    assert (found.out_of_memory, found.above_limit, found.wrong, found.compared) == (1, 1, 3, 5)
    assert "2 trials predicted not to fit into 2 kB were not started (about 120 s of training)" in found.sentence
    assert MemoryFeedback(OutputPaths.of("outputs")).predicted([]) is None


def test_the_report_has_what_was_not_started_and_what_was_wrong() -> None:
    told = {"sentence": "3 trials predicted not to fit", "skipped": 3, "seconds_saved": 90.0, "limit_bytes": 2e9}
    record = made_up.run().replace(fit=Fit(1000, 0, 1100, 2000, RELATIVE_ERROR["cpu"], 2))
    report = build([record], [StudyInfo("one", predicted_memory=told)])
    page = to_markdown(report)
    assert "Trials that would not have fitted" in page
    assert "3 trials predicted not to fit." in page
    assert "90.0 s" in page
    [line] = csv.DictReader(io.StringIO(to_csv(report)))
    assert (line["predicted_need"], line["memory_bound"]) == ("1100", "2000")
    assert "Trials that would not have fitted" not in to_markdown(build([record], [StudyInfo("one")]))
