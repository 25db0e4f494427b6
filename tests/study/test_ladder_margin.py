"""A ladder's margin: relative to the first rank's loss, fixed by its first seeds, and said in several units."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_ladder import ASLEEP, answer_of, gains, play, spec_of

from qlora_exp.analysis.margin import Levels
from qlora_exp.cli import main
from qlora_exp.errors import QloraExpError
from qlora_exp.rank_doubling.ladder_trials import LadderTrial
from qlora_exp.rank_doubling.settings import rule_in_margin_units, rule_of
from qlora_exp.records.types import Scores, ScoreTable


def test_a_relative_margin_follows_the_loss_at_the_first_rank() -> None:
    spec = spec_of(margin="5%", half_zone=2.0)
    rule = rule_of(spec, Levels(2.0))
    assert (rule.margin, rule.half_zone) == (pytest.approx(0.1), pytest.approx(0.04)), (
        "the half-zone is 2 % of the loss"
    )
    assert (rule_in_margin_units(spec).margin, rule_in_margin_units(spec).half_zone) == (5.0, 2.0)
    found = answer_of(spec, play(spec, gains(0.3, 0.2, 0.01)))
    assert found["margin_text"] == "5%"
    assert found["margin"] == pytest.approx(0.1, rel=0.01)
    assert found["margin_units"]["share_of_loss"] == pytest.approx(0.05)
    assert "Margin per doubling: 5% of the loss = 0.1 nats per item" in found["sentence"]


def test_the_margin_stays_as_the_first_seeds_gave_it() -> None:
    spec = spec_of(margin="5%", r_max=16, max_seeds=8)
    trials = play(spec, gains(0.1, off=0.03))
    seeds = sorted(trial.params["seed"] for trial in trials if trial.losses and trial.params["lora.r"] == 8)
    assert len(seeds) > spec.seeds, "seeds were added"
    first = [
        fmean(trial.losses.values())
        for trial in trials
        if trial.losses and trial.params["lora.r"] == 8 and trial.params["seed"] <= spec.seeds
    ]
    assert answer_of(spec, trials)["margin"] == pytest.approx(0.05 * fmean(first), rel=1e-9)


def with_accuracy(trial: LadderTrial) -> LadderTrial:
    if not trial.losses or trial.record is None:
        return trial
    loss = fmean(trial.losses.values())
    scores = {"loss": loss / 4, "loss_per_item": loss, "accuracy": 1 - loss / 4}
    tables = ScoreTable(test=Scores("test", 40, **scores), test_before=Scores("test", 40, loss_per_item=5.0))
    return replace(trial, record=trial.record.replace(scores=tables))


def test_the_answer_has_the_margin_in_the_tasks_own_metric() -> None:
    spec = spec_of(margin=0.05)
    found = answer_of(spec, [with_accuracy(trial) for trial in play(spec, gains(0.3, 0.2, 0.01))])
    assert found["margin_text"] == "0.05 nats_per_item"
    units = found["margin_units"]
    assert units["nats_per_token"] == pytest.approx(0.0125), "four tokens an item"
    runs = sum(found["seeds"].values())
    assert units["task"] == {"metric": "accuracy", "value": pytest.approx(0.0125), "r": pytest.approx(1), "runs": runs}
    assert f"about 1.2 points of accuracy (r = 1 over {runs} runs)" in found["sentence"]


def test_a_share_of_the_tuning_gain_needs_scores_before_tuning() -> None:
    spec = spec_of(margin="2% of the tuning gain")
    trials = play(spec_of(margin=0.06), gains(0.3, 0.2, 0.01))
    tuned = answer_of(spec, [with_accuracy(trial) for trial in trials])
    assert tuned["margin"] == pytest.approx(0.06, rel=0.01)
    untuned = answer_of(spec, trials)
    assert untuned["status"] == "failed"
    assert "the tuning gain at the first rank is unknown (no score before tuning)" in untuned["sentence"]


@pytest.mark.parametrize(
    ("margin", "half_zone", "words"),
    [
        ("0.1 nats_per_itme", None, "did you mean nats_per_item"),
        ("0.25% 0.1", None, "2 margins"),
        (["0.25%", 0.1], None, "2 margins"),
        ("0.25%", 0.3, "invalid half-zone 0.3 for margin 0.25"),
    ],
)
def test_a_margin_that_can_not_be_meant_is_refused(margin: object, half_zone: float | None, words: str) -> None:
    with pytest.raises(QloraExpError, match=r"sweep\.ladder\.margin|half-zone") as caught:
        spec_of(margin=margin, half_zone=half_zone)
    assert words in str(caught.value)


def test_the_command_takes_a_relative_margin_and_says_beforehand_what_can_be_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["sweep", "rank_doubling", *ASLEEP, "sweep.ladder.r_max=16", "sweep.ladder.lr_policy=fixed"]
    assert main([*command, "sweep.ladder.margin=1% of the tuning gain"]) == 2
    assert "no score before tuning" in capsys.readouterr().err
    assert main([*command, "sweep.ladder.margin=5%", "sweep.ladder.seed_sd=0.5"]) == 0
    out, err = capsys.readouterr()
    assert "% of the loss between seeds" in err
    assert "expected: 0.5 between seeds" in err
    assert "Margin per doubling: 5% of the loss" in out
