"""Rank doubling: which run comes next follows from the runs that have ended, and the answer from their records."""

from __future__ import annotations

import json
import random
import shlex
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

from qlora_exp.analysis.ladder_sections import gains_figure, ladder_sections
from qlora_exp.analysis.ladder_views import ladder_views
from qlora_exp.analysis.power import Noise, half_width
from qlora_exp.analysis.rank_rule import StepVerdict
from qlora_exp.analysis.report_content import StudyInfo
from qlora_exp.cli import main
from qlora_exp.cli.settings_file import combined_overrides
from qlora_exp.config.compose import compose
from qlora_exp.config.enums import LrPolicy
from qlora_exp.config.schema import LadderConfig
from qlora_exp.errors import QloraExpError
from qlora_exp.orchestration.command import study_spec
from qlora_exp.paths import OutputPaths
from qlora_exp.rank_doubling.answers import answers, plan_sentence
from qlora_exp.rank_doubling.ladder import evaluate_ladder, is_done, next_point
from qlora_exp.rank_doubling.ladder_trials import LadderTrial, ladder_trials
from qlora_exp.rank_doubling.settings import ladder_axes, max_trials, resolve, rule_of, seed_plan
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
    pilot_seeds=2,
    margin=0.05,
    half_zone=None,
    lr_policy=LrPolicy.fixed,
    lr_factors=[0.5, 1.0, 2.0],
    stop_pilots=False,
    screening_steps=None,
    seed_sd=None,
    item_sd=None,
)
ONE = LadderSettings({}, CENTRE, 0.0, "fixed at 16")

Level = Callable[[TrialPoint], float | None]
"""What a run scores in nats per item; ``None``: memory runs out; NaN: it diverges."""


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
    if loss is not None and np.isnan(loss):
        failure = Failure("DivergedError", "the loss is NaN")
        return LadderTrial(point, True, record.replace(status=Status.DIVERGED, failure=failure))
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
    """The rates of a rank's pilots; all pilots have one of the two pilot seeds."""
    own = [t.params for t in trials if t.params["evaluation.split"] == "validation" and t.params["lora.r"] == rank]
    assert {params["seed"] for params in own} <= {CONFIG.pilot_seed, CONFIG.pilot_seed + 1}
    return sorted({params["training.learning_rate"] for params in own})


def resumed(spec: LadderSpec, trials: list[LadderTrial], level: Level) -> list[LadderTrial]:
    """The trials of the ladder after it was continued with ``trials``."""
    ended = list(trials)
    while point := next_point(spec, ended):
        ended.append(ran(point, level, 0.01))
    return ended


def test_a_ladder_whose_returns_continue_ends_at_the_largest_rank_and_skips_every_second() -> None:
    spec = spec_of()
    trials = play(spec, gains(0.3, 0.2, 0.15))
    found = answer_of(spec, trials)
    assert (found["decision"], found["recommended_rank"], found["status"]) == ("continue", 64, "decided")
    assert decision_runs(trials) == [(rank, seed) for rank in (8, 32, 64) for seed in (1, 2, 3)]
    assert [(step["from_rank"], step["to_rank"], step["doublings"]) for step in found["comparisons"]] == [
        (8, 32, 2),
        (32, 64, 1),
    ]
    assert "still continue" in found["sentence"]


def test_it_stops_where_a_doubling_gains_too_little_and_runs_nothing_beyond() -> None:
    spec = spec_of()
    trials = play(spec, gains(0.07, 0.0, 0.3), at_once=4)
    found = answer_of(spec, trials)
    assert (found["decision"], found["recommended_rank"], found["use_rank"]) == ("stop", 16, 16)
    assert {rank for rank, _ in decision_runs(trials)} == {8, 16, 32}
    assert found["settle_command"] is None
    assert found["regret_rank"] == 32
    assert 0 <= found["regret_bound"] < 0.02


def test_a_single_rank_gets_its_learning_rate_and_its_seeds_and_no_decision() -> None:
    cells = [LadderSettings({"task.format": written}, CENTRE, 0.0, "2r") for written in ("plain", "chat")]
    spec = spec_of(*cells, r_max=8, margin=None, lr_policy=LrPolicy.carry)

    def level(point: TrialPoint) -> float:
        best = 1e-3 if point["task.format"] == "plain" else 2e-3
        return float(2.0 + 0.05 * np.log2(point["training.learning_rate"] / best) ** 2)

    trials = play(spec, level, at_once=3)
    for one, rate, pilots_run in zip(cells, (1e-3, 2e-3), (2 * 3, 2 * 4), strict=True):
        own = [trial.params for trial in trials if one.axes.items() <= trial.params.items()]
        final = [params for params in own if params["evaluation.split"] == "test"]
        assert sorted(params["seed"] for params in final) == [1, 2, 3]
        assert {params["training.learning_rate"] for params in final} == {rate}
        assert len(own) - len(final) == pilots_run
    assert len(trials) <= max_trials(spec)
    for found in answers(spec, trials, "qlora-exp resume s"):
        assert found["status"] == "decided"
        assert found["settle_command"] is None
        assert "decision" not in found
        assert "chosen at r = 8 by 2 pilot seeds" in found["sentence"]


NOISY = gains(0.05, off=0.03)
"""A gain at the margin, and noise that eight seeds can't settle."""


def test_an_open_step_gets_one_more_seed_at_each_look() -> None:
    spec = spec_of(r_max=16)
    trials = play(spec, NOISY)
    seeds = [trial.params["seed"] for trial in trials]
    assert seeds == [1, 2, 3, 1, 2, 3, *(seed for seed in range(4, max(seeds) + 1) for _ in "ab")]
    first = [trial for trial in trials if trial.params["seed"] <= spec.seeds]
    found = answer_of(spec, first)
    assert (found["decision"], found["status"], found["recommended_rank"]) == ("buy", "open", None)
    assert "one more seed" in found["sentence"]
    assert found["use_rank"] == 8


@pytest.mark.parametrize(("max_seeds", "runs"), [(5, 10), (3, 6)])
def test_the_seeds_can_be_limited(max_seeds: int, runs: int) -> None:
    spec = spec_of(r_max=16, max_seeds=max_seeds)
    trials = play(spec, gains(0.05, off=0.0095))
    assert answer_of(spec, trials)["decision"] == "inconclusive"
    assert len(trials) == max_trials(spec) == runs


def test_an_inconclusive_ladder_says_what_to_use_what_it_may_cost_and_how_to_settle_it() -> None:
    spec = spec_of(r_max=16)
    trials = play(spec, NOISY)
    [found] = answers(spec, trials, "qlora-exp resume s")
    assert (found["decision"], found["recommended_rank"], found["use_rank"]) == ("inconclusive", None, 8)
    assert found["sentence"].startswith("Use r = 8.")
    assert found["regret_rank"] == 16
    [step] = found["comparisons"]
    assert step["gain"] < found["regret_bound"] <= step["high"]
    assert found["saves"]["against_rank"] == 16
    assert "It would take" in found["would_settle"]
    assert found["would_settle"] in found["sentence"]
    seeds = int(found["settle_command"].removeprefix("qlora-exp resume s sweep.ladder.max_seeds="))
    assert 8 < seeds <= 64
    more = replace(spec, max_seeds=seeds, raised_from=(8,))
    [after] = answers(more, resumed(more, trials, NOISY), "qlora-exp resume s")
    assert max(after["seeds"].values()) > 8
    assert any("raised from 8" in warning for warning in after["warnings"])


def test_a_hopeless_step_ends_without_more_seeds() -> None:
    spec = spec_of(r_max=16)
    trials = play(spec, gains(0.05), item_sd=3.0)
    [found] = answers(spec, trials, "qlora-exp resume s")
    assert found["decision"] == "inconclusive"
    assert " items " in found["would_settle"]
    assert found["settle_command"] is None
    assert len(trials) == 2 * 3


def test_an_earlier_decision_stays_as_it_was_when_a_later_step_adds_seeds() -> None:
    spec = spec_of(r_max=64)

    def level(point: TrialPoint) -> float:
        off = 0.015 * (-1) ** point["seed"] if point["lora.r"] == 64 else 0.0
        levels = {8: 2.0, 32: 1.7, 64: 1.65 + off}
        return levels[point["lora.r"]] + random.Random(f"{sorted(point.items())}").gauss(0.0, 0.002)

    trials = play(spec, level)
    early = [trial for trial in trials if trial.params["seed"] <= 3]
    assert max(seed for rank, seed in decision_runs(trials) if rank == 32) > 3
    before, after = (evaluate_ladder(spec, ONE, some).comparisons for some in (early, trials))
    assert (before[0].from_rank, before[0].to_rank, before[0].decision.verdict) == (8, 32, StepVerdict.CONTINUE)
    assert before[0] == after[0]


def test_pilots_choose_one_rate_and_a_law_carries_it_to_the_other_ranks() -> None:
    one = LadderSettings({}, CENTRE, -0.5, "2r")
    spec = spec_of(one, lr_policy=LrPolicy.carry)

    def level(point: TrialPoint) -> float:
        off = np.log2(point["training.learning_rate"] / 1e-3)
        pilot = point["seed"] >= CONFIG.pilot_seed
        return float(gains(0.07, 0.0, 0.0)(point) + 0.05 * off**2 * pilot) - 5.0 * pilot

    trials = play(spec, level)
    assert pilots(trials, 8) == [5e-4, 1e-3, 2e-3]
    assert not any(pilots(trials, rank) for rank in (16, 32, 64))
    choices = {choice.rank: choice for choice in evaluate_ladder(spec, one, trials).choices}
    assert {rank: choice.learning_rate for rank, choice in choices.items()} == {8: 1e-3, 16: 7.071e-4, 32: 5e-4}
    assert [choices[rank].carried for rank in (8, 16, 32)] == [None, 7.071e-4, 5e-4]
    found = answer_of(spec, trials)
    assert found["recommended_rank"] == 16
    assert found["lr_policy"] == "carry"
    assert "(carry) chosen at r = 8 by 2 pilot seeds and carried over by r^-0.5" in found["sentence"]
    assert "the answer holds for these rates" in found["sentence"]
    assert all(abs(step["gain"]) < 1.0 for step in found["comparisons"]), "pilots are in no decision"


def test_the_rate_with_the_lowest_mean_over_the_pilot_seeds_is_chosen() -> None:
    """Either seed alone chooses another rate."""
    losses = {(5e-4, 1000): 1.00, (1e-3, 1000): 1.02, (2e-3, 1000): 1.30}
    losses |= {(5e-4, 1001): 1.30, (1e-3, 1001): 1.02, (2e-3, 1001): 1.00}
    spec = spec_of(r_max=16, lr_policy=LrPolicy.carry)
    trials = play(spec, lambda p: losses.get((p["training.learning_rate"], p["seed"]), 1.0))
    choice = evaluate_ladder(spec, ONE, trials).choices[0]
    assert choice.learning_rate == 1e-3
    assert [(pilot.learning_rate, pilot.seed) for pilot in choice.pilots] == sorted(losses)


@pytest.mark.parametrize(
    ("other", "chosen"),
    [((0.9, 0.91), 5e-4), ((0.9, 1.01), 1e-3), ((0.99, 0.9), 1e-3)],
    ids=["better at both seeds", "worse at one seed", "by less than its noise"],
)
def test_search_leaves_the_law_only_where_all_pilot_seeds_show_a_better_rate_beyond_noise(
    other: tuple[float, float], chosen: float
) -> None:
    spec = spec_of(r_max=16, lr_policy=LrPolicy.search)

    def level(point: TrialPoint) -> float:
        rate, pilot = point["training.learning_rate"], point["seed"] >= CONFIG.pilot_seed
        if point["lora.r"] == 8 or not pilot:
            return float(gains(0.2)(point) + 0.1 * pilot * np.log2(rate / 1e-3) ** 2)
        return {5e-4: other[point["seed"] - CONFIG.pilot_seed], 1e-3: 1.0}.get(rate, 1.5)

    trials = play(spec, level)
    assert len(trials) <= max_trials(spec)
    start, larger = evaluate_ladder(spec, ONE, trials).choices
    assert (start.learning_rate, start.carried) == (1e-3, None)
    assert (larger.learning_rate, larger.carried) == (chosen, 1e-3)
    sentence = answer_of(spec, trials)["sentence"]
    left = "pilots left the law at r = 16 (0.0005 instead of 0.001)"
    assert (left if chosen == 5e-4 else "no better rate beyond their noise") in sentence


def test_a_carried_rate_that_diverges_is_left() -> None:
    spec = spec_of(r_max=16, lr_policy=LrPolicy.search)

    def level(point: TrialPoint) -> float | None:
        rate = point["training.learning_rate"]
        if (point["lora.r"], point["seed"]) == (16, CONFIG.pilot_seed + 1) and rate == 1e-3:
            return float("nan")
        return float(gains(0.2)(point) + 0.1 * np.log2(rate / 1e-3 * (1.2 if point["lora.r"] == 16 else 1)) ** 2)

    choice = evaluate_ladder(spec, ONE, play(spec, level)).choices[1]
    assert (choice.learning_rate, choice.carried) == (5e-4, 1e-3)


@pytest.mark.parametrize(("best", "tried", "unresolved"), [(4e-3, 4e-3, True), (1.8e-3, 4e-3, False)])
def test_an_optimum_at_the_edge_extends_the_grid_once(best: float, tried: float, unresolved: bool) -> None:
    spec = spec_of(r_max=16, lr_policy=LrPolicy.carry)

    def level(point: TrialPoint) -> float:
        return float(gains(0.2)(point) + 0.1 * np.log2(point["training.learning_rate"] / best) ** 2)

    trials = play(spec, level)
    assert pilots(trials, 8) == [5e-4, 1e-3, 2e-3, tried]
    found = answer_of(spec, trials)
    assert [choice["unresolved"] for choice in found["learning_rates"]] == [unresolved, False]
    assert any("unresolved" in warning for warning in found["warnings"]) == unresolved
    assert ("unresolved" in found["sentence"]) == unresolved


def test_a_rate_that_diverges_is_not_chosen() -> None:
    spec = spec_of(r_max=16, lr_policy=LrPolicy.search)
    trials = play(spec, lambda point: None if point["training.learning_rate"] > 1.5e-3 else gains(0.2)(point))
    assert {choice.learning_rate for choice in evaluate_ladder(spec, ONE, trials).choices} <= {2.5e-4, 5e-4, 1e-3}
    assert answer_of(spec, trials)["decision"] == "continue"


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
        seeds = axes["seed"]
        assert seeds.low is not None
        assert seeds.high is not None
        assert seeds.low <= trial.params["seed"] <= seeds.high


def test_a_rank_that_is_lost_in_the_middle_of_a_long_ladder_leaves_the_larger_ones_in_the_bound() -> None:
    spec, level = spec_of(r_max=128), gains(0.2, 0.2, 0.01, 0.01)
    trials = play(spec, lambda point: None if point["lora.r"] == 64 else level(point))
    (found,) = answers(spec, trials)
    assert found["use_rank"] == 32
    assert found["regret_rank"] == 128
    assert "no run at r = 64 completed" in found["sentence"]


def test_a_finished_ladder_of_the_first_edition_keeps_its_answer_and_asks_for_no_run() -> None:
    """It compared 8 with 16 only: the second edition would first ask for r = 32."""
    spec, level = replace(spec_of(r_max=64), edition=1), gains(0.0, 0.0, 0.0)
    made = [
        ran({"lora.r": r, "seed": seed, "training.learning_rate": rate, "evaluation.split": "test"}, level, 0.01)
        for r, rate in ((8, ONE.learning_rate), (16, ONE.learning_rate))
        for seed in (1, 2, 3)
    ]
    spec = replace(spec, lr_policy="fixed")
    assert is_done(spec, made)
    (found,) = answers(spec, made)
    assert (found["decision"], found["use_rank"], found["status"]) == ("stop", 8, "decided")


def test_a_lost_run_counts_against_its_rank_and_is_said_with_its_cause() -> None:
    spec = spec_of(r_max=16)
    lucky = gains(0.08, seed_sd=0.001)
    found = answer_of(spec, play(spec, lucky))
    assert (found["decision"], found["lost_runs"], found["seeds"]["16"]) == ("continue", [], 3)
    found = answer_of(spec, play(spec, lambda p: None if (p["lora.r"], p["seed"]) == (16, 2) else lucky(p)))
    assert found["seeds"]["16"] > 3, "the lost run could turn it, so more seeds are needed"
    [step] = found["comparisons"]
    assert step["lost_runs"] == 1
    cause = "out of memory (OutOfMemoryError: no memory)"
    assert found["lost_runs"] == [{"rank": 16, "seed": 2, "cause": cause}]
    assert any(
        warning.startswith("r = 16, seed 2 left no result") and cause in warning for warning in found["warnings"]
    )
    most = answer_of(spec, play(spec, lambda p: float("nan") if p["lora.r"] == 16 and p["seed"] % 2 else lucky(p)))
    assert (most["decision"], most["use_rank"]) != ("continue", 16)
    assert {run["cause"] for run in most["lost_runs"]} == {"diverged (DivergedError: the loss is NaN)"}


def test_a_rank_that_can_not_be_run_ends_the_ladder_with_the_reason() -> None:
    spec = spec_of()
    trials = play(spec, lambda p: None if p["lora.r"] == 32 else gains(0.2, 0.2, 0.2)(p))
    found = answer_of(spec, trials)
    assert (found["status"], found["recommended_rank"]) == ("failed", 16)
    assert "no run at r = 32 completed: out of memory (OutOfMemoryError: no memory)" in found["sentence"]
    assert {run["rank"] for run in found["lost_runs"]} == {32}
    only_first = answer_of(spec, play(spec, lambda p: None if p["lora.r"] > 8 else 2.0))
    assert (only_first["recommended_rank"], only_first["use_rank"]) == (None, 8)
    assert only_first["sentence"].startswith("Use r = 8")
    nothing = answers(spec, play(spec, lambda p: None))[0]
    assert not nothing["comparisons"]
    assert nothing["use_rank"] is None


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
    base, instruct = found = answers(spec, play(spec, gains(0.07, 0.0, 0.0)))
    sections = ladder_sections(ladder_views([StudyInfo("doubling", ladders=found)], []))
    assert [section.title for section in sections] == ["Rank doubling: base", "Rank doubling: instruct"]
    for section, one in zip(sections, (base, instruct), strict=True):
        assert section.paragraphs[0] == one["sentence"]
        assert f"{one['spent']['runs']} runs" in section.paragraphs[-1]
        assert section.points == tuple(one["warnings"])
        [table], steps = section.tables, one["comparisons"]
        # Without the runs' records the loss is unknown, and gains are in nats per item.
        assert [row[:5] for row in table.rows] == [
            (f"{s['from_rank']} → {s['to_rank']}", s["decision"], s["gain"], s["low"], s["high"]) for s in steps
        ]
    figure = gains_figure(ladder_views([StudyInfo("doubling", ladders=found)], []))
    assert figure is not None
    for drawn, one in zip(figure["data"][::2], (base, instruct), strict=True):
        steps = one["comparisons"]
        assert drawn["y"] == pytest.approx([step["gain"] / step["doublings"] for step in steps])
        assert [y + up for y, up in zip(drawn["y"], drawn["error_y"]["array"], strict=True)] == pytest.approx(
            [step["high"] / step["doublings"] for step in steps]
        )


def test_the_plan_says_beforehand_whether_it_can_settle_the_margin() -> None:
    spec = spec_of()
    rule, seeds = rule_of(spec), seed_plan(spec)
    assert plan_sentence(rule, 0.001, 0.01, 1000, seeds)[0]
    assert not plan_sentence(rule, 0.5, 0.01, 1000, seeds)[0]
    assert not plan_sentence(rule, 0.5, None, None, seeds)[0]
    settles, sentence = plan_sentence(rule, None, None, None, seeds)
    assert settles
    at_most = float(sentence.split("is at most ")[1].split()[0])
    assert half_width(Noise(at_most, 0.0), seeds, 1) == pytest.approx(rule.half_zone, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"margin": None}, "sweep.ladder.margin"),
        ({"margin": -1.0}, "sweep.ladder.margin"),
        ({"half_zone": 1.0}, "half-zone"),
        ({"r_max": 12}, "r_max"),
        ({"r_start": 0}, "r_max"),
        ({"seeds": 1}, "seeds"),
        ({"seeds": 65, "max_seeds": 65}, "seeds"),
        ({"max_seeds": 2}, "max_seeds"),
        ({"max_seeds": 65}, "max_seeds"),
        ({"pilot_seed": 8}, "pilot_seed"),
        ({"pilot_seed": 50, "max_seeds": 64}, "pilot_seed"),
        ({"pilot_seed": 0}, "pilot_seed"),
        ({"pilot_seeds": 0}, "pilot_seeds"),
        ({"pilot_seeds": 1, "lr_policy": LrPolicy.search}, "pilot_seeds"),
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
    config = compose(combined_overrides(Path(shlex.split(command)[3]), None))
    assert (config.lora.r, config.seed) == (ladder["recommended_rank"], 3)


def test_the_command_that_settles_an_inconclusive_ladder_runs_and_best_shows_the_rank_to_use(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["sweep.ladder.r_max=4", "sweep.ladder.seeds=2", "sweep.ladder.max_seeds=2", "sweep.name=the study"]
    assert (
        main(
            [
                "sweep",
                "rank_doubling",
                *ASLEEP,
                *SMALL,
                *few,
                "sweep.ladder.margin=0.094",
                "sweep.ladder.half_zone=0.005",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    file = OutputPaths.of("outputs").study("the study").ladder
    [ladder] = json.loads(file.read_text())["ladders"]
    assert (ladder["decision"], ladder["recommended_rank"], ladder["use_rank"]) == ("inconclusive", None, 2)
    assert ladder["settle_command"].startswith("qlora-exp resume 'the study' sweep.ladder.max_seeds=")
    assert f"to settle it: {ladder['settle_command']}" in shown

    assert main(["best", "the study"]) == 0
    shown = capsys.readouterr().out
    assert "Use r = 2." in shown
    commands = [shlex.split(line) for line in shown.splitlines() if line.startswith("qlora-exp run ")]
    assert [words for words in commands if compose(combined_overrides(Path(words[3]), None)).lora.r == 2]

    assert main(shlex.split(ladder["settle_command"])[1:]) == 0
    shown = capsys.readouterr().out
    [settled] = json.loads(file.read_text())["ladders"]
    assert settled["decision"] in ("stop", "continue")
    assert settled["seeds"]["2"] > 2
    assert "raised from 2" in shown
    assert main(["resume", "the study"]) == 0, "the study keeps its larger limit"
