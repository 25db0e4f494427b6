"""From a search to a confirmed winner: what a study's end says, ``confirm``, ``best.yaml``. Trials only sleep."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qlora_exp.architecture.run_plan import config_fingerprint
from qlora_exp.cli import main
from qlora_exp.cli.settings_file import combined_overrides
from qlora_exp.config.compose import compose
from qlora_exp.config.from_record import recorded_overrides
from qlora_exp.config.schema import to_plain
from qlora_exp.orchestration.finalists import ConfirmPlan
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.types import RunRecord, Status
from tests import processes

SLEEP = ["training.engine=sleep", "training.sleep_seconds=0.02", "tracking=off", "workers.count=1"]
GRID = ["lora.r=2,4,8", "seed=1,2", "sweep.name=grid"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def hydra(*arguments: str) -> int:
    from qlora_exp.orchestration.hydra_app import main as application

    return application(["-m", *arguments])


def records_of(study: str) -> list[RunRecord]:
    records = [read_record(file) for file in sorted(Path("outputs/runs").glob("*/record.json"))]
    return [record for record in records if record.trial is not None and record.trial.study == study]


def plan_of(study: str) -> dict[str, object]:
    content: dict[str, object] = json.loads(
        OutputPaths.of("outputs").study(study).confirmation.read_text(encoding="utf-8")
    )
    return content


def answer_of(study: str) -> dict[str, object]:
    found = plan_of(study)["answer"]
    assert isinstance(found, dict)
    return found


def test_a_grid_is_confirmed_with_fresh_seeds_on_test_then_with_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra(*GRID, *SLEEP) == 0
    end = capsys.readouterr().out
    assert "the best of 3 configurations, 2 seeds each, chosen on the same validation rows" in end
    assert "optimistic" in end
    assert "qlora-exp confirm grid\n" in end
    assert "qlora-exp run --from outputs/studies/grid/best.yaml" in end
    two = ["confirm", "grid", "--top", "2", "--seeds", "2"]

    # What it would cost is shown, and nothing is started.
    assert main([*two, "--dry-run"]) == 0
    assert "all 4 runs: training:" in capsys.readouterr().out
    assert not Path("outputs/studies/grid-confirm").exists()

    assert main(two) == 0
    records = records_of("grid-confirm")
    assert {(record.config["lora"]["r"], record.seed) for record in records} == {(8, 3), (4, 3), (8, 4), (4, 4)}
    assert all(record.scores.test is not None for record in records)
    assert "2 new seeds" in capsys.readouterr().out
    first = answer_of("grid-confirm")
    assert first["seeds"] == 2
    assert len(first["pairs"]) == 1  # type: ignore[arg-type]

    # Again: nothing is run. With more seeds: the same finalists, and the same seeds first.
    assert main(["confirm", "grid"]) == 0
    assert len(records_of("grid-confirm")) == 4
    # A larger plan that never begins leaves the answer as it was; the same command, corrected, begins.
    before = plan_of("grid-confirm")
    assert main(["confirm", "grid", "--seeds", "3", "workers.count=-3"]) == 2
    assert plan_of("grid-confirm") == before

    # With runs to come, best and status have no answer. That look is no earlier answer.
    file = OutputPaths.of("outputs").study("grid-confirm").confirmation
    file.write_text(json.dumps({**before, "seeds": [3, 4, 5]}), encoding="utf-8")
    capsys.readouterr()
    assert main(["best", "grid-confirm"]) == 0
    assert "Not finished, 2 runs to come. So far: " in capsys.readouterr().out
    assert answer_of("grid-confirm")["pending"] == 2
    assert main(["status", "grid"]) == 0
    shown = capsys.readouterr().out
    assert "confirming isn't finished; to continue: qlora-exp confirm grid\n" in shown
    assert "confirmed:" not in shown
    file.write_text(json.dumps(before), encoding="utf-8")

    assert main(["confirm", "grid", "--seeds", "3"]) == 0
    shown = capsys.readouterr().out
    points = [(record.config["lora"]["r"], record.seed) for record in records_of("grid-confirm")]
    assert sorted(points) == [(r, seed) for r in (4, 8) for seed in (3, 4, 5)]
    assert answer_of("grid-confirm")["seeds"] == 3
    assert plan_of("grid-confirm")["earlier_seeds"] == [2]
    assert "An answer was given before, with 2 seeds" in shown
    assert "at most 10 %" in shown

    # The search's own end then has the answer, and what was fixed stays.
    assert main(["best", "grid"]) == 0
    assert "confirmed: " in capsys.readouterr().out
    for changed in (["--top", "3"], ["--seeds", "2"], ["--margin", "1%"], ["training.max_steps=7"]):
        assert main(["confirm", "grid", *changed]) == 2
    assert main(["confirm", "last"]) == 0  # the study that confirms: its search is meant
    assert len(records_of("grid-confirm")) == 6


def test_best_yaml_gives_the_best_trials_configuration_without_the_study(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder, after the sweep's own file is gone."""
    (tmp_path / "sweeps").mkdir()
    own = {"sweep": {"params": {"lora.r": "4,8", "training.learning_rate": "1e-3,2e-3"}}, "training": {"max_steps": 7}}
    (tmp_path / "sweeps" / "mine.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(own)}", encoding="utf-8")
    assert main(["sweep", "mine", *SLEEP, "sweep.name=mine", "seed=3", "task.goal='accuracy >= 0.6'"]) == 0
    capsys.readouterr()
    assert main(["best", "mine"]) == 0
    assert "\nqlora-exp run --from outputs/studies/mine/best.yaml\n" in capsys.readouterr().out
    losses = {record.scores.after.loss_per_item: record for record in records_of("mine") if record.scores.after}
    best = losses[min(losses)]
    file = Path("outputs/studies/mine/best.yaml").absolute()
    (tmp_path / "sweeps" / "mine.yaml").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = to_plain(compose(combined_overrides(file, None)))
    recorded = {key: value for key, value in best.config.items() if key not in ("output_root", "name")}
    assert {key: again[key] for key in recorded} == recorded
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["lora.r"] == best.config["lora"]["r"]
    assert main(["run", "--from", str(file)]) == 0
    [run] = Path("outputs/runs").glob("*/record.json")
    made = read_record(run)
    assert made.scores == best.scores  # asleep, too, they follow from the configuration and the seed alone
    as_recorded = compose(recorded_overrides(best))
    assert config_fingerprint(compose(combined_overrides(file, None))) == config_fingerprint(as_recorded)


def test_a_killed_confirm_continues_with_the_same_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One finalist has an axis that the others don't have: not every combination of their settings is valid."""
    params = {"lora.r": "2,4", "lora.alpha_policy": "2r,fixed", "lora.alpha": "16"}
    own = {"sweep": {"params": params, "conditions": {"lora.alpha": "lora.alpha_policy == fixed"}}}
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "grid.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(own)}", encoding="utf-8")
    assert main(["sweep", "grid", "sweep.name=grid", *SLEEP]) == 0
    command = [sys.executable, "-m", "qlora_exp.cli", "confirm", "grid", "--seeds", "2"]
    process = processes.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any(line.startswith("[1/6]") for line in process.stderr)
    process.kill()
    process.wait()
    process.stderr.close()
    for study in ("grid", "grid-confirm"):  # unfinished: nowhere an answer
        capsys.readouterr()
        assert main(["status", study]) == 0
        shown = capsys.readouterr().out
        assert "confirming isn't finished; to continue: qlora-exp confirm grid\n" in shown
        assert "confirmed:" not in shown
    assert main(["confirm", "grid"]) == 0
    assert answer_of("grid-confirm")["pending"] == 0
    records = records_of("grid-confirm")
    assert [record.status for record in records] == [Status.COMPLETED] * 6
    loras = [(record.config["lora"]["r"], record.config["lora"]["alpha"], record.seed) for record in records]
    assert set(loras) == {(*one, seed) for one in ((4, None), (4, 16), (2, None)) for seed in (2, 3)}


def test_finalists_on_different_tasks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra("task.max_train_items=100,200", "sweep.name=tasks", *SLEEP) == 0
    assert main(["confirm", "tasks", "--dry-run"]) == 2
    assert "task.max_train_items" in capsys.readouterr().err


def test_a_margin_of_the_tuning_gain_needs_scores_before_tuning(capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra("lora.r=2,8", "evaluation.before=false", "sweep.name=blind", *SLEEP) == 0
    capsys.readouterr()
    margin = ["--margin", "1% of the tuning gain"]
    assert main(["confirm", "blind", "--dry-run", *margin]) == 2
    shown = capsys.readouterr().err
    assert "evaluation.before=false" in shown
    assert "0.25%" in shown
    assert main(["confirm", "blind", *margin]) == 2
    assert not Path("outputs/studies/blind-confirm").exists()
    # Two seeds are enough to decide with, and err more often.
    assert main(["confirm", "blind", "--dry-run", "--seeds", "2"]) == 0
    assert "two seeds" in capsys.readouterr().err
    assert main(["confirm", "blind", "--dry-run", "--seeds", "3"]) == 0
    assert "two seeds" not in capsys.readouterr().err


def test_studies_that_confirm_cannot_decide_say_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    front = "sweep.objectives=[minimize scores.after.loss_per_item,minimize memory.model_state_bytes]"
    assert hydra("lora.r=2,8", front, "sweep.name=front", *SLEEP) == 0
    assert "qlora-exp confirm front --trials 1,0" in capsys.readouterr().out
    assert main(["confirm", "front"]) == 2
    assert "--trials 1,0" in capsys.readouterr().err
    assert main(["confirm", "front", "--trials", "0,9"]) == 2
    assert "trial 9 isn't a completed trial" in capsys.readouterr().err
    assert main(["confirm", "front", "--trials", "0,1", "--seeds", "2"]) == 0
    assert len(records_of("front-confirm")) == 4

    speed = "sweep.objectives=[maximize speed.train_tokens_per_second]"
    assert hydra("lora.r=2,8", speed, "sweep.name=speed", *SLEEP) == 0
    assert main(["confirm", "speed"]) == 2
    assert "scores.after.loss_per_item" in capsys.readouterr().err

    ladder = ["sweep.sampler=ladder", "sweep.ladder.r_start=2", "sweep.ladder.r_max=4", "sweep.ladder.lr_policy=fixed"]
    assert hydra(*ladder, "sweep.ladder.margin=0.5 nats_per_item", "sweep.name=rank", *SLEEP) == 0
    assert "It needs no confirm" in capsys.readouterr().out
    assert main(["confirm", "rank"]) == 2
    assert "a ladder needs no confirm" in capsys.readouterr().err


def test_an_answer_of_fewer_seeds_is_no_answer_of_the_study() -> None:
    """Seeds were added, and their runs were killed: the earlier answer counts for the earlier seeds alone."""
    plan = ConfirmPlan(
        *("grid", None, "minimize scores.after.loss_per_item", "loss_per_item", "0.25%"),
        *((3, 4, 5), (0, 1), ("a", "b"), (1.4, 1.5), 2, "qlora-exp confirm grid"),
    )
    assert not plan.is_answered
    for answer, is_answered in (
        ({"pending": 0, "planned_seeds": 2, "seeds": 2}, False),
        ({"pending": 1, "planned_seeds": 3, "seeds": 2}, False),
        ({"pending": 0, "planned_seeds": 3, "seeds": 2}, True),  # one seed is lost
        ({"seeds": 2}, False),  # of an earlier version
        ({"seeds": 3}, True),
    ):
        assert replace(plan, answer=answer).is_answered == is_answered, answer
