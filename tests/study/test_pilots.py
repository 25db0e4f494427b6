"""Pilots whose training loss is clearly behind are stopped, and the choice doesn't depend on how they were run."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from studies import ENVIRONMENT

from qlora_exp.analysis.error_rates.stopped_pilots import PILOTS_FILE, SHARES, load_pilots, measure_rule, rules_table
from qlora_exp.analysis.pilots import MAX_BEHIND, SHARE_OF_STEPS, comparison_loss, comparison_step
from qlora_exp.cli import main
from qlora_exp.config.enums import LrPolicy
from qlora_exp.config.schema import LadderConfig
from qlora_exp.paths import OutputPaths
from qlora_exp.rank_doubling.ladder import evaluate_ladder, next_point
from qlora_exp.rank_doubling.ladder_trials import LadderTrial
from qlora_exp.rank_doubling.settings import resolve
from qlora_exp.records import find
from qlora_exp.records.types import (
    Failure,
    PilotLoss,
    RunRecord,
    Scores,
    ScoreTable,
    Status,
    Training,
)
from qlora_exp.study.proposer import TrialPoint
from qlora_exp.study.types import LadderSettings, LadderSpec
from qlora_exp.training.callbacks import PilotCallback
from qlora_exp.training.outcome import no_pruning
from tests import processes

CENTRE, RATE = 1e-3, "training.learning_rate"
LADDER: dict[str, Any] = {
    "r_start": 8,
    "r_max": 8,
    "seeds": 2,
    "max_seeds": 2,
    "pilot_seed": 1000,
    "pilot_seeds": 1,
    "margin": None,
    "half_zone": None,
    "lr_policy": LrPolicy.carry,
    "lr_factors": [0.5, 1.0, 2.0],
    "screening_steps": None,
    "seed_sd": None,
    "item_sd": None,
}
Curve = tuple[float, float]
"""A pilot's training loss at the step of comparison, and its validation loss if it is trained to its end; NaN: it
diverges after the comparison."""


def spec_of(stop_pilots: bool = True) -> LadderSpec:
    return resolve(LadderConfig(**LADDER, stop_pilots=stop_pilots), 1, [LadderSettings({}, CENTRE, 0.0, "fixed")])


def ended(point: TrialPoint, status: Status, training_loss: float, validation_loss: float) -> LadderTrial:
    training = Training(10, 3.0, training_loss, None, pilot_loss=PilotLoss(5, training_loss))
    record = RunRecord(1, "n", "r", status, "2026-01-01T00:00:00", None, {}, ENVIRONMENT, training=training)
    if status is Status.COMPLETED:
        record = record.replace(scores=ScoreTable(after=Scores("validation", 9, loss_per_item=validation_loss)))
    else:
        record = record.replace(failure=Failure(status.value, "why", "train", 5))
    return LadderTrial(point, True, record)


def played(curves: dict[float, Curve], at_once: int, chance: random.Random) -> tuple[list[LadderTrial], float]:
    """The ended pilots and the chosen rate, if ``at_once`` pilots run at a time, in steps that end in any order."""
    spec = spec_of()
    done: list[LadderTrial] = []
    running: dict[float, tuple[TrialPoint, int]] = {}
    seen: dict[float, float] = {}
    while True:
        known = [*done, *(LadderTrial(point, False) for point, _ in running.values())]
        point = next_point(spec, known) if len(running) < at_once else None
        if point is not None and point["evaluation.split"] == "validation":
            running[point[RATE]] = (point, 0)
            continue
        if not running:
            break
        rate = chance.choice(sorted(running))
        point, step = running.pop(rate)
        training_loss, validation_loss = curves[rate]
        failed = [trial.params[RATE] for trial in done if trial.record and trial.record.status is Status.DIVERGED]
        if step >= 5:
            seen[rate] = training_loss
            best = min(loss for other, loss in seen.items() if other not in failed)
            if training_loss > best * (1 + MAX_BEHIND):
                done.append(ended(point, Status.PRUNED, training_loss, validation_loss))
                continue
        if step == 10:
            status = Status.COMPLETED if validation_loss == validation_loss else Status.DIVERGED
            done.append(ended(point, status, training_loss, validation_loss))
        else:
            running[rate] = (point, step + 1)
    [choice] = evaluate_ladder(spec, spec.ladders[0], done).choices
    return done, choice.learning_rate


@pytest.mark.parametrize(
    ("curves", "chosen"),
    [
        ({5e-4: (1.0, 2.0), 1e-3: (1.05, 1.9), 2e-3: (1.3, 1.8)}, 1e-3),
        ({5e-4: (1.5, 1.0), 1e-3: (1.0, 2.0), 2e-3: (1.2, 1.5)}, 1e-3),
        ({2.5e-4: (0.5, 1.1), 5e-4: (1.0, 1.0), 1e-3: (1.2, 0.9), 2e-3: (1.4, 0.8)}, 2.5e-4),
    ],
    ids=["one is behind", "only one is left", "the one beyond the edge passes all"],
)
def test_the_chosen_rate_is_the_same_in_whatever_order_and_however_many_at_once(
    curves: dict[float, Curve], chosen: float
) -> None:
    stopped = set()
    for at_once, seed in itertools.product((1, 2, 3), range(20)):
        trials, rate = played(curves, at_once, random.Random(seed))
        assert rate == chosen
        stopped.add(sum(trial.record is not None and trial.record.status is Status.PRUNED for trial in trials))
    assert max(stopped) > 0


def test_a_better_pilot_that_diverges_later_leaves_a_choice() -> None:
    curves = {5e-4: (1.5, 1.0), 1e-3: (1.3, 1.0), 2e-3: (1.0, float("nan"))}
    rates = {played(curves, at_once, random.Random(seed))[1] for at_once in (1, 3) for seed in range(20)}
    assert rates <= {5e-4, 1e-3}


def test_pilots_are_compared_after_half_of_their_steps_and_in_their_first_epoch() -> None:
    assert comparison_step(60, None) == comparison_step(60, 100) == 30
    assert comparison_step(60, 30) == 30
    assert comparison_step(60, 20) == 60  # later than its first epoch: not compared
    assert comparison_loss({5: 9.0, 15: 2.0, 20: 1.0, 25: 0.1}, 20) == 1.5
    assert comparison_loss({30: 1.0}, 20) is None


def test_a_pilot_that_is_resumed_after_the_comparison_keeps_its_loss(tmp_path: Path) -> None:
    curve = tmp_path / "curve.jsonl"
    losses = {5: 3.0, 10: 2.5, 15: 2.0, 20: 1.5, 25: 1.0, 30: 0.9, 35: 0.8, 40: 0.7}
    curve.write_text("".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in losses.items()))
    for resumed_from in (20, 34, 36, 40):
        pilot = PilotCallback(no_pruning, curve, steps_per_epoch=100)
        pilot.on_train_begin(None, SimpleNamespace(max_steps=40, global_step=resumed_from), None)
        assert pilot.loss == PilotLoss(20, 1.75)
    early = PilotCallback(no_pruning, curve, steps_per_epoch=100)
    early.on_train_begin(None, SimpleNamespace(max_steps=40, global_step=10), None)
    assert early.loss is None


def test_the_documented_savings_and_risk_are_those_of_the_stored_pilots() -> None:
    cells = load_pilots(PILOTS_FILE)
    documented = (PILOTS_FILE.parent / "statistics.md").read_text(encoding="utf-8")
    rows = [measure_rule(cells, share, MAX_BEHIND) for share in SHARES]
    assert rules_table(rows) in documented
    assert rows[SHARES.index(SHARE_OF_STEPS)].changed == 0


# As a sweep.

ASLEEP = ["training.engine=sleep", "training.sleep_seconds=0.1", "tracking=off", "training.learning_rate=1e-3"]
SEARCH = ["sweep.ladder.r_start=2", "sweep.ladder.r_max=2", "sweep.ladder.seeds=2", "sweep.ladder.max_seeds=2"]
SEARCH += ["sweep.ladder.lr_factors=[0.1,1,10]", "lora.rslora=true", "sweep.name=p"]
"""SYNTHETIC: a learning rate that is 10 times too large or small costs 0.2 nats of about 1.06."""
TWO_RANKS = ["sweep.ladder.r_max=4", "sweep.ladder.margin=0.04", "sweep.ladder.lr_policy=search"]
COMMAND = [sys.executable, "-m", "qlora_exp.cli", "sweep", "rank_doubling", *ASLEEP, *SEARCH]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pilots_of(outputs: OutputPaths) -> list[RunRecord]:
    records = find.read_runs(outputs)[0]
    return [record for record in records if record.trial and record.trial.params["evaluation.split"] == "validation"]


def answer(outputs: OutputPaths) -> dict[str, Any]:
    [ladder] = json.loads((outputs.studies / "p" / "ladder.json").read_text())["ladders"]
    return dict(ladder)


def choices(ladder: dict[str, Any]) -> dict[int, float]:
    return {choice["rank"]: choice["learning_rate"] for choice in ladder["learning_rates"]}


def test_a_stopped_pilot_is_a_pruned_trial_with_its_reason_and_in_no_decision(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND[3:], *TWO_RANKS]) == 0
    capsys.readouterr()
    outputs = OutputPaths.of("outputs")
    stopped = [record for record in pilots_of(outputs) if record.status is Status.PRUNED]
    ladder = answer(outputs)
    ranks = len(ladder["learning_rates"])
    assert len(stopped) == 2 * ranks
    for record in stopped:
        assert record.failure is not None
        assert "above another pilot's of this rank (sweep.ladder.stop_pilots)" in record.failure.message
        assert record.training is not None
        assert record.training.steps == 10
    for choice in ladder["learning_rates"]:
        [kept] = [pilot for pilot in choice["pilots"] if not pilot["behind"]]
        assert choice["learning_rate"] == kept["learning_rate"]
    assert main(["trials", "p", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert sum(row["status"] == "PRUNED" for row in rows) == 2 * ranks
    assert main(["status", "p"]) == 0
    assert f"{2 * ranks} pruned" in capsys.readouterr().out
    assert main(["trials", "p"]) == 0

    in_full = [*COMMAND[3:], *TWO_RANKS, "sweep.name=full", "sweep.ladder.stop_pilots=false"]
    assert main(in_full) == 0
    [other] = json.loads((outputs.studies / "full" / "ladder.json").read_text())["ladders"]
    assert choices(other) == choices(ladder)
    assert (other["decision"], other["recommended_rank"]) == (ladder["decision"], ladder["recommended_rank"])
    assert ladder["spent"]["pilots_stopped"] == 2 * ranks
    assert other["spent"]["pilots_stopped"] == 0


def test_pilots_that_run_at_the_same_time_are_stopped_too(elsewhere: Path) -> None:
    assert main([*COMMAND[3:], "workers.count=3"]) == 0
    outputs = OutputPaths.of("outputs")
    stopped = [record for record in pilots_of(outputs) if record.status is Status.PRUNED]
    assert stopped
    for choice in answer(outputs)["learning_rates"]:
        assert [pilot["behind"] for pilot in choice["pilots"]] == [True, False, True]


def test_a_killed_ladder_whose_database_is_lost_stops_the_same_pilots(elsewhere: Path) -> None:
    outputs = OutputPaths.of("outputs")
    sweeping = processes.Popen(COMMAND, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while sweeping.poll() is None and not any(record.status is Status.COMPLETED for record in pilots_of(outputs)):
        time.sleep(0.02)
    sweeping.kill()
    sweeping.wait()
    outputs.optuna_database.unlink()
    assert main(["resume", "p", "--rebuild"]) == 0
    ladder = answer(outputs)
    stopped = [record for record in pilots_of(outputs) if record.status is Status.PRUNED]
    assert len(stopped) == 2 * len(ladder["learning_rates"])


def test_a_study_of_an_earlier_version_runs_its_pilots_to_their_end(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its ``study.json`` and its database know no ``stop_pilots``."""
    assert main([*COMMAND[3:], "sweep.ladder.stop_pilots=false", "sweep.n_trials=1"]) == 0
    outputs = OutputPaths.of("outputs")
    file = outputs.studies / "p" / "study.json"
    file.write_text(file.read_text().replace('"stop_pilots": false', '"unknown": null'))
    import sqlite3

    with sqlite3.connect(outputs.optuna_database) as database:
        changed = database.execute(
            "UPDATE study_user_attributes SET value_json = replace(value_json, '\"stop_pilots\": false', '\"x\": 1')"
        )
        assert changed.rowcount
    database.close()
    assert main([*COMMAND[3:], "sweep.n_trials=2"]) == 0
    assert main(["resume", "p", "sweep.n_trials=3"]) == 0
    assert {record.status for record in pilots_of(outputs)} == {Status.COMPLETED}
    assert main([*COMMAND[3:], "sweep.ladder.stop_pilots=true"]) == 2
    assert "ladder.stop_pilots: False in the study, True now" in capsys.readouterr().err
