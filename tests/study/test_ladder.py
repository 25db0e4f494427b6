"""Rank doubling: which run comes next follows from the runs that have ended, and the answer from their records."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from studies import ENVIRONMENT

from qlora_exp.analysis.power import Noise, half_width
from qlora_exp.analysis.rank_rule import StepVerdict
from qlora_exp.analysis.report_content import StudyInfo
from qlora_exp.analysis.sections import ladder_sections
from qlora_exp.cli import main
from qlora_exp.config.schema import LadderConfig, LrPolicy
from qlora_exp.errors import QloraExpError
from qlora_exp.orchestration.command import study_spec
from qlora_exp.paths import OutputPaths
from qlora_exp.rank_doubling.answers import answers, plan_sentence
from qlora_exp.rank_doubling.ladder import LadderTrial, evaluate_ladder, is_done, ladder_trials, next_point
from qlora_exp.rank_doubling.settings import ladder_axes, max_trials, resolve, rule_of
from qlora_exp.records import find
from qlora_exp.records.types import Failure, Memory, RunRecord, Scores, ScoreTable, Speed, Status
from qlora_exp.study.proposer import TrialPoint
from qlora_exp.study.spec import read_spec
from qlora_exp.study.types import LadderSettings, LadderSpec
from tests import processes

ITEMS = 200
CENTRE = 1e-3
CONFIG = LadderConfig(
    r_start=8,
    r_max=64,
    seeds=3,
    max_seeds=8,
    pilot_seed=1000,
    margin=0.05,
    half_zone=None,
    lr_policy=LrPolicy.fixed,
    lr_factors=[0.5, 1.0, 2.0],
    stop_pilots=False,
    seed_sd=None,
    item_sd=None,
)
ONE = LadderSettings({}, CENTRE, 0.0, "fixed at 16")

Level = Callable[[TrialPoint], float | None]
"""What a run scores in nats per item; ``None``: it fails."""


def spec_of(*ladders: LadderSettings, **changes: Any) -> LadderSpec:
    return resolve(LadderConfig(**(vars(CONFIG) | changes)), 1, ladders or (ONE,))


def gains(*doublings: float, seed_sd: float = 0.002, off: float = 0.0) -> Level:
    """r = 8 scores 2; each doubling gains as said, and seeds vary by ``seed_sd``. ``off``: what every second rank and
    seed is above the others, so that gains differ from seed to seed by 4 times as much."""
    levels = 2.0 - np.concatenate([[0.0], np.cumsum(doublings)])

    def level(point: TrialPoint) -> float:
        noise = random.Random(f"{sorted(point.items())}").gauss(0.0, seed_sd)
        step = int(np.log2(point["lora.r"] // 8))
        return float(levels[step]) + noise + off * (-1) ** (step + point["seed"])

    return level


def ran(point: TrialPoint, level: Level, item_sd: float) -> LadderTrial:
    """The trial, ended, as a run would have left it."""
    loss = level(point)
    name = "-".join(str(value) for value in point.values())
    record = RunRecord(1, name, "r", Status.COMPLETED, "2026-01-01T00:00:00", None, {}, ENVIRONMENT)
    if loss is None:
        failure = Failure("OutOfMemoryError", "no memory")
        return LadderTrial(point, True, record.replace(status=Status.OUT_OF_MEMORY, failure=failure))
    after = Scores("validation", ITEMS, loss_per_item=loss)
    record = record.replace(scores=ScoreTable(after=after))
    curve = {1: 9.0, 5: (9.0 + loss) / 2, 10: loss}
    rng = np.random.default_rng(ITEMS)
    hard = rng.normal(0.0, 0.5, ITEMS)
    own = np.random.default_rng(point["lora.r"]).normal(0.0, item_sd, ITEMS)
    values = loss + hard - hard.mean() + own - own.mean()
    losses = {f"i{number}": float(value) for number, value in enumerate(values)}
    return LadderTrial(point, True, record, losses if point["evaluation.split"] == "test" else None, curve)


def play(spec: LadderSpec, level: Level, at_once: int = 1, seed: int = 0, item_sd: float = 0.01) -> list[LadderTrial]:
    """All trials that the ladders ask for, ``at_once`` running at a time and ending in any order."""
    chance = random.Random(seed)
    ended: list[LadderTrial] = []
    running: list[TrialPoint] = []
    while True:
        seen = [*ended, *(LadderTrial(point, False) for point in running)]
        point = next_point(spec, seen) if len(running) < at_once else None
        if point is not None:
            running.append(point)
        elif running:
            ended.append(ran(running.pop(chance.randrange(len(running))), level, item_sd))
        else:
            assert is_done(spec, ended)
            return ended


def answer_of(spec: LadderSpec, trials: list[LadderTrial]) -> dict[str, Any]:
    [found] = answers(spec, trials)
    assert json.loads(json.dumps(found)) == found
    return found


def decision_runs(trials: list[LadderTrial]) -> list[tuple[int, int]]:
    return sorted((t.params["lora.r"], t.params["seed"]) for t in trials if t.params["evaluation.split"] == "test")


def pilots(trials: list[LadderTrial], rank: int) -> list[float]:
    own = [t.params for t in trials if t.params["evaluation.split"] == "validation" and t.params["lora.r"] == rank]
    assert {params["seed"] for params in own} <= {CONFIG.pilot_seed}
    return sorted(params["training.learning_rate"] for params in own)


def test_a_ladder_whose_returns_continue_ends_at_the_largest_rank() -> None:
    spec = spec_of()
    trials = play(spec, gains(0.3, 0.2, 0.15))
    found = answer_of(spec, trials)
    assert (found["decision"], found["recommended_rank"], found["status"]) == ("continue", 64, "decided")
    assert decision_runs(trials) == [(rank, seed) for rank in (8, 16, 32, 64) for seed in (1, 2, 3)]
    assert "still continue" in found["sentence"]


def test_it_stops_at_the_first_doubling_that_gains_too_little_and_runs_nothing_beyond() -> None:
    spec = spec_of()
    trials = play(spec, gains(0.2, 0.01, 0.3), at_once=4)
    found = answer_of(spec, trials)
    assert (found["decision"], found["recommended_rank"]) == ("stop", 16)
    assert {rank for rank, _ in decision_runs(trials)} == {8, 16, 32}


def test_a_single_rank_gets_its_learning_rate_and_its_seeds_and_no_decision() -> None:
    cells = [LadderSettings({"task.format": written}, CENTRE, 0.0, "2r") for written in ("plain", "chat")]
    spec = spec_of(*cells, r_max=8, margin=None, lr_policy=LrPolicy.search)

    def level(point: TrialPoint) -> float:
        best = 1e-3 if point["task.format"] == "plain" else 2e-3
        return float(2.0 + 0.05 * np.log2(point["training.learning_rate"] / best) ** 2)

    trials = play(spec, level, at_once=3)
    for one, rate, pilots_run in zip(cells, (1e-3, 2e-3), (3, 4), strict=True):
        own = [trial.params for trial in trials if one.axes.items() <= trial.params.items()]
        final = [params for params in own if params["evaluation.split"] == "test"]
        assert sorted(params["seed"] for params in final) == [1, 2, 3]
        assert {params["training.learning_rate"] for params in final} == {rate}
        assert len(own) - len(final) == pilots_run
    assert len(trials) <= max_trials(spec)
    for found in answers(spec, trials):
        assert found["status"] == "decided"
        assert "decision" not in found
        assert "Learning rate chosen at every rank" in found["sentence"]


def test_an_open_doubling_buys_seeds_once() -> None:
    spec = spec_of()
    trials = play(spec, gains(0.05, 0.0, 0.0, off=0.01))
    [first, *_] = evaluate_ladder(spec, ONE, trials).comparisons
    assert first.decision.seeds > spec.seeds
    bought = max(seed for _, seed in decision_runs(trials))
    assert 4 <= bought <= 8
    assert [seed for rank, seed in decision_runs(trials) if rank == 8] == list(range(1, bought + 1))


def test_what_is_asked_for_before_the_last_look_is_the_capped_number_of_seeds() -> None:
    spec = spec_of(r_max=16, max_seeds=5)
    first = [t for t in play(spec, gains(0.05, off=0.2)) if t.params["seed"] <= spec.seeds]
    assert "Run 5 seeds in total" in answer_of(spec, first)["sentence"]


@pytest.mark.parametrize(("max_seeds", "runs"), [(5, 10), (3, 6)])
def test_a_purchase_can_be_capped_or_left_out(max_seeds: int, runs: int) -> None:
    spec = spec_of(r_max=16, max_seeds=max_seeds)
    trials = play(spec, gains(0.05, off=0.2))
    assert answer_of(spec, trials)["decision"] == "inconclusive"
    assert len(trials) == max_trials(spec) == runs


def test_what_no_purchase_settles_is_inconclusive_with_what_it_would_take() -> None:
    spec = spec_of(r_max=16)
    trials = play(spec, gains(0.05, off=0.2))
    found = answer_of(spec, trials)
    assert (found["decision"], found["recommended_rank"], found["saves"]) == ("inconclusive", None, None)
    assert "It would take" in found["would_settle"]
    assert found["would_settle"] in found["sentence"]
    assert len(trials) == 2 * 8


def test_where_items_are_missing_no_seed_is_bought() -> None:
    spec = spec_of(r_max=16)
    trials = play(spec, gains(0.05), item_sd=1.0)
    found = answer_of(spec, trials)
    assert found["decision"] == "inconclusive"
    assert "test items" in found["sentence"]
    assert len(trials) == 2 * 3


def test_an_earlier_decision_stays_as_it_was_when_a_later_doubling_buys_seeds() -> None:
    spec = spec_of(half_zone=0.02)
    trials = play(spec, gains(0.3, 0.05, 0.0, off=0.01))
    early = [trial for trial in trials if (trial.params["lora.r"], trial.params["seed"]) <= (16, 3)]
    early = [trial for trial in early if trial.params["seed"] <= 3]
    assert max(seed for rank, seed in decision_runs(trials) if rank == 16) > 3
    assert evaluate_ladder(spec, ONE, trials).comparisons[0] == evaluate_ladder(spec, ONE, early).comparisons[0]


def test_pilots_choose_the_learning_rate_by_the_rank_and_are_in_no_decision() -> None:
    one = LadderSettings({}, CENTRE, -0.5, "2r")
    spec = spec_of(one, lr_policy=LrPolicy.search)

    def level(point: TrialPoint) -> float:
        best = 1e-3 * (point["lora.r"] / 8) ** -0.5
        off = np.log2(point["training.learning_rate"] / best)
        return float(gains(0.2, 0.0, 0.0)(point) + 0.05 * off**2) - 5.0 * (point["seed"] == CONFIG.pilot_seed)

    trials = play(spec, level)
    assert pilots(trials, 8) == [5e-4, 1e-3, 2e-3]
    assert pilots(trials, 16) == [3.536e-4, 7.071e-4, 1.414e-3]
    choices = {choice.rank: choice for choice in evaluate_ladder(spec, one, trials).choices}
    assert choices[8].learning_rate == 1e-3
    assert choices[16].learning_rate == 7.071e-4
    assert not any(choice.unresolved for choice in choices.values())
    found = answer_of(spec, trials)
    assert found["recommended_rank"] == 16
    assert all(abs(step["gain"]) < 1.0 for step in found["comparisons"])


@pytest.mark.parametrize(("best", "tried", "unresolved"), [(4e-3, 4e-3, True), (1.8e-3, 4e-3, False)])
def test_an_optimum_at_the_edge_extends_the_grid_once(best: float, tried: float, unresolved: bool) -> None:
    spec = spec_of(r_max=16, lr_policy=LrPolicy.search)

    def level(point: TrialPoint) -> float:
        return float(gains(0.2)(point) + 0.1 * np.log2(point["training.learning_rate"] / best) ** 2)

    trials = play(spec, level)
    assert pilots(trials, 8) == [5e-4, 1e-3, 2e-3, tried]
    found = answer_of(spec, trials)
    assert [choice["unresolved"] for choice in found["learning_rates"]] == [unresolved] * 2
    assert any("unresolved" in warning for warning in found["warnings"]) == unresolved
    assert ("unresolved" in found["sentence"]) == unresolved


def test_a_rate_that_diverges_is_not_chosen() -> None:
    spec = spec_of(r_max=16, lr_policy=LrPolicy.search)
    trials = play(spec, lambda point: None if point["training.learning_rate"] > 1.5e-3 else gains(0.2)(point))
    assert {choice.learning_rate for choice in evaluate_ladder(spec, ONE, trials).choices} <= {2.5e-4, 5e-4, 1e-3}
    assert answer_of(spec, trials)["decision"] == "continue"


def test_a_transferred_rate_is_searched_at_the_first_rank_only_and_said() -> None:
    one = LadderSettings({}, CENTRE, -0.5, "2r")
    spec = spec_of(one, lr_policy=LrPolicy.transfer)
    trials = play(spec, gains(0.2, 0.0, 0.0))
    assert pilots(trials, 8)
    assert not pilots(trials, 16)
    rates = {choice.rank: choice.learning_rate for choice in evaluate_ladder(spec, one, trials).choices}
    assert rates[32] == pytest.approx(rates[8] / 2, rel=1e-3)
    assert "Learning rate chosen at r = 8 and carried over" in answer_of(spec, trials)["sentence"]


def test_ladders_have_their_own_answers_and_the_second_goes_on_while_the_first_waits() -> None:
    ladders = [LadderSettings({"quantization": mode}, CENTRE, 0.0, "r") for mode in ("nf4", "int8")]
    spec = spec_of(*ladders)
    steep, flat = gains(0.2, 0.2, 0.2), gains(0.0, 0.0, 0.0)
    trials = play(spec, lambda point: (steep if point["quantization"] == "nf4" else flat)(point), at_once=9)
    assert [found["recommended_rank"] for found in answers(spec, trials)] == [64, 8]
    running: list[LadderTrial] = []
    while point := next_point(spec, running):
        running.append(LadderTrial(point, False))
    assert [sum(t.params["quantization"] == mode for t in running) for mode in ("nf4", "int8")] == [6, 6]


@pytest.mark.parametrize("at_once", [2, 5, 20])
def test_the_same_runs_are_asked_for_in_whatever_order_they_end(at_once: int) -> None:
    spec = spec_of(lr_policy=LrPolicy.search)
    level = gains(0.2, 0.05, 0.0, off=0.01)
    alone = play(spec, level)
    assert len(alone) <= max_trials(spec)
    for seed in range(3):
        together = play(spec, level, at_once, seed)
        assert sorted(str(t.params) for t in together) == sorted(str(t.params) for t in alone)
        assert answer_of(spec, together) == answer_of(spec, alone)


def test_a_resumed_ladder_asks_what_an_undisturbed_one_would_have_asked() -> None:
    spec = spec_of(lr_policy=LrPolicy.search)
    level = gains(0.2, 0.0, 0.0)
    alone = play(spec, level)
    for done in range(0, len(alone), 4):
        assert next_point(spec, alone[:done]) == alone[done].params


def test_every_point_lies_on_the_axes() -> None:
    one = LadderSettings({}, 3.3e-4, -0.5, "2r")
    spec = spec_of(one, lr_policy=LrPolicy.search)
    axes = {axis.key: axis for axis in ladder_axes(spec)}

    def level(point: TrialPoint) -> float:  # the rate always wants to be higher
        return gains(0.2, 0.2, 0.2)(point) - float(np.log2(point["training.learning_rate"]))

    for trial in play(spec, level):
        assert set(trial.params) == set(axes)
        rate = axes["training.learning_rate"]
        assert rate.low is not None
        assert rate.high is not None
        assert rate.low <= trial.params["training.learning_rate"] <= rate.high
        assert trial.params["lora.r"] in axes["lora.r"].values
        assert trial.params["seed"] in axes["seed"].values


def test_a_lost_run_is_left_out_and_told() -> None:
    spec = spec_of()
    trials = play(spec, lambda p: None if (p["lora.r"], p["seed"]) == (16, 2) else gains(0.2, 0.0, 0.0)(p))
    found = answer_of(spec, trials)
    assert found["recommended_rank"] == 16
    assert any("1 decision runs" in warning for warning in found["warnings"])


def test_a_rank_that_can_not_be_run_ends_the_ladder_with_the_reason() -> None:
    spec = spec_of()
    trials = play(spec, lambda p: None if p["lora.r"] == 32 else gains(0.2, 0.2, 0.2)(p))
    found = answer_of(spec, trials)
    assert (found["status"], found["recommended_rank"]) == ("failed", 16)
    assert "no memory" in found["sentence"]
    assert not answers(spec, play(spec, lambda p: None))[0]["comparisons"]


def test_runs_that_can_not_be_compared_are_refused_with_the_difference_named() -> None:
    spec = spec_of()
    trials = play(spec, gains(0.2, 0.0, 0.0))
    assert trials[0].record is not None
    other = LadderTrial(trials[0].params, True, trials[0].record.replace(synthetic=True), trials[0].losses)
    standing = evaluate_ladder(spec, ONE, [other, *trials[1:]])
    assert standing.trouble is not None
    assert "whether a model was trained" in standing.trouble
    fewer = dict(list((trials[0].losses or {}).items())[1:])
    standing = evaluate_ladder(spec, ONE, [LadderTrial(trials[0].params, True, trials[0].record, fewer), *trials[1:]])
    assert standing.trouble is not None
    assert "other items" in standing.trouble


def test_a_first_rank_that_is_enough_is_said_to_be_perhaps_too_much() -> None:
    spec = spec_of()
    flat = answer_of(spec, play(spec, gains(0.0, 0.0, 0.0)))
    assert flat["recommended_rank"] == 8
    assert any("r_start=4" in warning for warning in flat["warnings"])
    assert any("saturates" in warning for warning in flat["warnings"])
    assert any("coincide" in warning for warning in flat["warnings"])
    assert not answer_of(spec, play(spec, gains(0.3, 0.3, 0.3)))["warnings"]


def test_curves_that_end_together_but_went_apart_do_not_coincide() -> None:
    spec = spec_of(r_max=16)
    trials = play(spec, gains(0.0))
    assert any("coincide" in warning for warning in answer_of(spec, trials)["warnings"])
    apart = [replace(t, curve={**t.curve, 5: 3.0 + 0.1 * t.params["lora.r"]}) for t in trials]
    assert not any("coincide" in warning for warning in answer_of(spec, apart)["warnings"])


def test_training_times_that_overlap_are_no_saving() -> None:
    def timed(trial: LadderTrial) -> LadderTrial:
        assert trial.record is not None
        speed = Speed(train_seconds=10.0 + trial.params["seed"] + 0.1 * trial.params["lora.r"])
        return replace(trial, record=trial.record.replace(speed=speed))

    spec = spec_of(r_max=16)
    found = answer_of(spec, [timed(trial) for trial in play(spec, gains(0.0))])
    assert found["saves"]["train_seconds"] is None
    assert "no clearly different training time" in found["sentence"]


@pytest.mark.parametrize(("usd", "told"), [(0.5, "0.5 USD less"), (None, "the cost is unknown: budget.usd_per_hour")])
def test_the_sentence_says_what_the_rank_saves_in_memory_time_and_money(usd: float | None, told: str) -> None:
    def with_costs(trial: LadderTrial) -> LadderTrial:
        assert trial.record is not None
        doublings = trial.params["lora.r"] // 8
        memory = Memory(peak_train_bytes=1_000_000_000 + 2_000_000 * doublings)
        speed = Speed(train_seconds=10.0 + 3 * doublings, cost_usd=None if usd is None else usd * doublings)
        return replace(trial, record=trial.record.replace(memory=memory, speed=speed))

    spec = spec_of(r_max=16)
    found = answer_of(spec, [with_costs(trial) for trial in play(spec, gains(0.0))])
    assert found["saves"]["cost_usd"] == usd
    assert "Compared with r = 16, a run at r = 8 takes 2 MB less memory, 3 s less training time" in found["sentence"]
    assert told in found["sentence"]


def test_the_report_has_the_ladders_own_figures_words_and_warnings() -> None:
    ladders = [LadderSettings({"model.variant": variant}, CENTRE, 0.0, "2r") for variant in ("base", "instruct")]
    spec = spec_of(*ladders)
    base, instruct = found = answers(spec, play(spec, gains(0.2, 0.01)))
    sections = ladder_sections([StudyInfo("doubling", ladders=found)])
    assert [section.title for section in sections] == [
        "Rank doubling: model.variant=base",
        "Rank doubling: model.variant=instruct",
    ]
    for section, one in zip(sections, (base, instruct), strict=True):
        assert section.paragraphs[0] == one["sentence"]
        assert f"{one['spent']['runs']} runs" in section.paragraphs[1]
        assert section.points == tuple(one["warnings"])
        [table], [figure] = section.tables, section.figures
        steps = one["comparisons"]
        assert table.rows == tuple(
            (f"{s['from_rank']} → {s['to_rank']}", s["decision"], s["gain"], s["low"], s["high"]) for s in steps
        )
        drawn = figure["data"][0]
        assert drawn["y"] == [step["gain"] for step in steps]
        assert [y + up for y, up in zip(drawn["y"], drawn["error_y"]["array"], strict=True)] == pytest.approx(
            [step["high"] for step in steps]
        )


def test_the_plan_says_beforehand_whether_it_can_settle_the_margin() -> None:
    rule = rule_of(spec_of())
    assert plan_sentence(rule, 0.001, 0.01, 1000)[0]
    assert not plan_sentence(rule, 0.5, 0.01, 1000)[0]
    assert not plan_sentence(rule, 0.5, None, None)[0]
    settles, told = plan_sentence(rule, None, None, None)
    assert settles
    at_most = float(told.split("at most ")[1].split()[0])
    assert half_width(Noise(at_most, 0.0), 8, 1, rule) == pytest.approx(rule.half_zone, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"margin": None}, "sweep.ladder.margin"),
        ({"margin": -1.0}, "sweep.ladder.margin"),
        ({"half_zone": 1.0}, "half-zone"),
        ({"r_max": 12}, "r_max"),
        ({"r_start": 0}, "r_max"),
        ({"seeds": 1}, "seeds"),
        ({"seeds": 9}, "seeds"),
        ({"max_seeds": 2}, "max_seeds"),
        ({"max_seeds": 9}, "max_seeds"),
        ({"pilot_seed": 4}, "pilot_seed"),
        ({"lr_policy": LrPolicy.search, "lr_factors": [1.0]}, "lr_factors"),
        ({"lr_factors": [1.0, -1.0]}, "lr_factors"),
    ],
)
def test_a_ladder_that_can_not_be_meant_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(QloraExpError) as caught:
        spec_of(**changes)
    assert expected in str(caught.value)


# With the real machinery; SYNTHETIC runs.

ASLEEP = ["training.engine=sleep", "training.sleep_seconds=0.02", "tracking=off", "training.learning_rate=1e-3"]
SMALL = ["sweep.ladder.r_start=2", "sweep.ladder.margin=0.04", "sweep.ladder.lr_policy=fixed"]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_command_means_one_ladder_for_each_point_of_the_other_axes(elsewhere: Path) -> None:
    spec = study_spec(["sweeps=rank_doubling", "model.variant=base,instruct", "quantization=nf4,int8", "seed=5"]).spec
    assert spec.ladder is not None
    assert [one.axes for one in spec.ladder.ladders] == [
        {"model.variant": variant, "quantization": mode} for variant in ("base", "instruct") for mode in ("nf4", "int8")
    ]
    assert spec.ladder.first_seed == 5
    assert {one.learning_rate for one in spec.ladder.ladders} == {2e-3}
    assert {one.rate_exponent for one in spec.ladder.ladders} == {-0.5}
    fixed = study_spec(["sweeps=rank_doubling", "lora.rslora=true", "training.learning_rate=1e-4"]).spec.ladder
    assert fixed is not None
    assert (fixed.ladders[0].learning_rate, fixed.ladders[0].rate_exponent) == (1e-4, 0.0)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["lora.r=8,16"], "lora.r"),
        (["lora.r=8"], "lora.r"),
        (["seed=1,2"], "seed"),
        (["evaluation.split=test"], "evaluation.split"),
        (["sweep.ladder.margin=null"], "margin"),
        (["sweep.pruner=median", "training.evaluate_every_steps=5"], "pruner"),
        (["lora.dropout=interval(0.0,0.1)"], "lora.dropout"),
    ],
)
def test_what_a_ladder_can_not_do_is_told_before_anything_is_trained(
    overrides: list[str], expected: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "rank_doubling", *ASLEEP, *overrides]) == 2
    told = capsys.readouterr().err
    assert expected in told
    assert "Traceback" not in told
    assert not list(elsewhere.glob("outputs/runs/*"))


def test_a_sweep_that_is_killed_goes_on_to_the_same_answer(elsewhere: Path) -> None:
    """SYNTHETIC: the formula gains 0.1, 0.06, 0.02 … by doublings from r = 2, so that r = 8 is enough."""
    command = [sys.executable, "-m", "qlora_exp.cli", "sweep", "rank_doubling", *ASLEEP, *SMALL]
    outputs = OutputPaths.of("outputs")
    sweeping = processes.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while sweeping.poll() is None and len(list(outputs.runs.glob("*/items_after_test.parquet"))) < 4:
        time.sleep(0.05)
    sweeping.kill()
    sweeping.communicate()
    done = processes.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC" in done.stdout
    [study] = outputs.studies.iterdir()
    found = json.loads((study / "ladder.json").read_text())
    assert found["synthetic"]
    [ladder] = found["ladders"]
    assert (ladder["decision"], ladder["recommended_rank"]) == ("stop", 8)
    assert ladder["sentence"] in done.stdout
    assert ladder["saves"]["against_rank"] == 16
    assert ladder["saves"]["model_state_bytes"] > 0

    records, _ = find.read_runs(outputs)
    own = {record.trial.number: record for record in records if record.trial is not None}
    assert len(own) == len(records) == 4 * 3
    spec = read_spec(outputs.study(study.name))
    assert spec.ladder is not None
    assert answers(spec.ladder, ladder_trials(records, outputs)) == [ladder]


def test_a_margin_can_not_change_once_there_are_runs(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", "rank_doubling", *ASLEEP, *SMALL, "sweep.name=mine", "sweep.n_trials=1"]
    assert main(command) == 0
    assert main([*command, "sweep.ladder.margin=0.2"]) == 2
    assert "0.2" in capsys.readouterr().err


def test_a_lost_database_is_made_again_and_the_ladder_resumed(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "rank_doubling", *ASLEEP, *SMALL, "sweep.n_trials=5", "seed=3"]) == 0
    outputs = OutputPaths.of("outputs")
    outputs.optuna_database.unlink()
    assert main(["resume", "last", "--rebuild", "sweep.n_trials=40"]) == 0
    [study] = outputs.studies.iterdir()
    [ladder] = json.loads((study / "ladder.json").read_text())["ladders"]
    assert ladder["decision"] in (StepVerdict.STOP, StepVerdict.CONTINUE)
    assert sum(ladder["seeds"].values()) == len(list(outputs.runs.iterdir()))
    capsys.readouterr()

    assert main(["best", "last"]) == 0
    told = capsys.readouterr().out
    assert ladder["sentence"] in told
    [command] = [line for line in told.splitlines() if line.startswith("qlora-exp run ")]
    assert f"lora.r={ladder['recommended_rank']} seed=3 " in command
