"""The simulation that measures the rule: it decides as the rule does, and would see a rule that errs too often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from qlora_exp.analysis import rank_rule as rule
from qlora_exp.analysis.error_rates import calibration
from qlora_exp.analysis.error_rates.calibration import SETTINGS, WORLDS, replay_worlds, simulate
from qlora_exp.analysis.error_rates.simulation import DOUBLINGS, PLAN, RULE, World, decide_many, simulated_losses
from qlora_exp.analysis.rank_rule import StepVerdict
from qlora_exp.analysis.rank_walk import walk

EDGE, BEYOND = (
    next(w for w in WORLDS if w.name == f"Gaussian, {n}") for n in ("at the edge of the plan", "beyond the plan")
)
AT_MOST, AT_LEAST, RANDOM = SETTINGS[0], SETTINGS[1], SETTINGS[4]
RANKS = [8 * 2**step for step in range(DOUBLINGS + 1)]


@pytest.mark.parametrize(
    "world",
    [
        EDGE,
        World("items", seed_sd=0.4, item_sd=3.0),
        World("clusters", seed_sd=0.5, item_sd=2.2, cluster=5, icc=0.3),
        World("lost", seed_sd=1.0, item_sd=0.5, failing=0.05, diverging=True),
    ],
    ids=lambda world: world.name,
)
def test_many_ladders_at_once_are_decided_as_each_is_alone(world: World) -> None:
    rng = np.random.default_rng(5)
    losses = simulated_losses(world, rng.uniform(0, 6, (40, DOUBLINGS)), rng)
    losses[:, :, 0] = np.where(np.isnan(losses[:, :, 0]), 0.0, losses[:, :, 0])  # one seed that all ranks share
    outcomes = decide_many(losses, RULE)
    codes = {StepVerdict.CONTINUE: 0, StepVerdict.STOP: 1, StepVerdict.INCONCLUSIVE: 2}
    for number, alone in enumerate(losses):
        requested: dict[int, int] = {}

        def run(
            wanted: Mapping[int, int], requested: dict[int, int] = requested, alone: np.ndarray = alone
        ) -> dict[int, np.ndarray]:
            for rank, seeds in wanted.items():
                requested[rank] = max(requested.get(rank, 0), seeds)
            seen = np.arange(PLAN.most)[:, None]
            return {r: np.where(seen < n, alone[RANKS.index(r)], np.nan) for r, n in sorted(requested.items())}

        answer = walk(RANKS, PLAN, lambda _: RULE, run).answer(PLAN, "half-zones")
        assert answer is not None
        assert answer.regret is not None
        assert codes[answer.verdict] == outcomes.ended[number]
        assert RANKS.index(answer.use_rank) == outcomes.use[number]
        assert answer.regret.bound == pytest.approx(outcomes.regret_bound[number])
        assert outcomes.run[number].sum() == sum(requested.values())


@pytest.mark.parametrize("world", [EDGE, BEYOND], ids=["edge", "beyond"])
def test_errors_at_the_margin_stay_within_the_goal(world: World) -> None:
    low, high = (simulate(world, *setting, ladders=1500, seed=9) for setting in (AT_MOST, AT_LEAST))
    # Three standard errors of a share of 5 % among 1500.
    assert low.wrong_continue <= 0.05 + 0.017
    assert high.wrong_stop <= 0.05 + 0.017
    assert low.wrong_stop == high.wrong_continue == 0, "no such error is possible with all gains on one side"


def test_a_rule_that_errs_too_often_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "WRONG_CONTINUE", 0.3)
    assert simulate(BEYOND, *AT_MOST, ladders=1000, seed=9).wrong_continue > 0.1


def test_items_in_clusters_break_the_rule_without_the_group_column_and_not_with_it() -> None:
    grouped = next(world for world in WORLDS if world.name == "clusters of 10 items (icc 0.9), grouped")
    ungrouped = replace(grouped, grouped=False)
    assert simulate(grouped, *AT_LEAST, ladders=500, seed=9).wrong_stop <= 0.05
    assert simulate(ungrouped, *AT_LEAST, ladders=500, seed=9).wrong_stop > 0.1


def test_runs_that_diverge_do_not_flatter_the_rank_that_lost_them() -> None:
    world = next(world for world in WORLDS if world.name == "runs above + 1 sd diverge, beyond")
    assert simulate(world, *AT_MOST, ladders=1000, seed=9).wrong_continue <= 0.05 + 0.02


def test_what_the_plan_can_settle_is_seldom_left_open() -> None:
    assert EDGE.planned_half_width <= 1.1 * RULE.half_zone
    assert simulate(EDGE, *RANDOM, ladders=1000, seed=2).inconclusive <= 0.20


def test_the_same_seed_gives_the_same_page(capsys: pytest.CaptureFixture[str]) -> None:
    pages = []
    for _ in range(2):
        calibration.main(["--ladders", "20", "--seed", "3"])
        pages.append(capsys.readouterr().out)
    assert pages[0] == pages[1]
    assert pages[0].count("\n| ") == 1 + (len(WORLDS) + len(replay_worlds())) * len(SETTINGS)
