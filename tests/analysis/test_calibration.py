"""The simulation that measures the rule: it decides as the rule does, and would see a rule that errs too often."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_exp.analysis import rank_rule as rule
from qlora_exp.analysis.error_rates import calibration
from qlora_exp.analysis.error_rates.calibration import (
    RULE,
    SETTINGS,
    WORLDS,
    World,
    decide_many,
    simulate,
    simulated_losses,
)
from qlora_exp.analysis.rank import decide_ladder
from qlora_exp.analysis.rank_rule import StepVerdict

EDGE, BEYOND = (
    next(w for w in WORLDS if w.name == f"Gaussian, {n}") for n in ("at the edge of the plan", "beyond the plan")
)
AT_LEAST, AT_MOST = SETTINGS[1], SETTINGS[0]


def controlled(losses: np.ndarray) -> list[StepVerdict]:
    """One ladder by the functions that decide real ones: what the walk asks for is run, until it asks no more."""
    ranks, seeds = [8 * 2**step for step in range(losses.shape[0])], {}
    seeds[8] = seeds[16] = 3
    bought: set[int] = set()
    while True:
        ladder = {
            rank: np.where(np.arange(losses.shape[1])[:, None] < seeds[rank], losses[number], np.nan)
            for number, rank in enumerate(ranks)
            if rank in seeds
        }
        found = decide_ladder(ladder, RULE, bought)
        last = found.comparisons[-1]
        if found.verdict is StepVerdict.BUY and last.decision.increase.seeds is not None:
            bought.add(last.to_rank)
            for rank in (last.from_rank, last.to_rank):
                seeds[rank] = max(seeds[rank], last.decision.increase.seeds)
        elif found.verdict is StepVerdict.CONTINUE and last.to_rank != ranks[-1]:
            seeds[2 * last.to_rank] = 3
        else:
            ends = StepVerdict.INCONCLUSIVE if found.verdict is StepVerdict.BUY else found.verdict
            return [*(step.decision.verdict for step in found.comparisons[:-1]), ends]


@pytest.mark.parametrize("world", [EDGE, World("items", seed_sd=0.4, item_sd=3.0)], ids=["seeds", "items"])
def test_many_ladders_at_once_are_decided_as_each_is_alone(world: World) -> None:
    rng = np.random.default_rng(5)
    losses = simulated_losses(world, rng.uniform(0, 6, (40, RULE.doublings)), rng)
    walked = decide_many(losses, RULE)
    names = (StepVerdict.CONTINUE, StepVerdict.STOP, StepVerdict.INCONCLUSIVE)
    for said, alone in zip(walked.verdicts, losses, strict=True):
        assert [names[code] for code in said if code >= 0] == controlled(alone)


@pytest.mark.parametrize("world", [EDGE, BEYOND], ids=["edge", "beyond"])
def test_errors_at_the_margin_stay_within_the_goal(world: World) -> None:
    low, high = (simulate(world, *setting, ladders=1500, seed=9) for setting in (AT_MOST, AT_LEAST))
    # Three standard errors of a share of 5 % among 1500.
    assert low.wrong_continue <= 0.05 + 0.017
    assert high.wrong_stop <= 0.05 + 0.017
    assert low.wrong_stop == high.wrong_continue == 0, "no such error is possible with all gains on one side"


def test_a_rule_that_errs_too_often_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "ALPHA", {1: 0.2, 2: 0.2})
    assert simulate(BEYOND, *AT_MOST, ladders=1000, seed=9).wrong_continue > 0.1


def test_what_the_plan_can_settle_is_seldom_left_open() -> None:
    assert EDGE.planned_half_width <= RULE.half_zone
    assert simulate(EDGE, *SETTINGS[2], ladders=1000, seed=2).inconclusive <= 0.20


def test_the_same_seed_gives_the_same_page(capsys: pytest.CaptureFixture[str]) -> None:
    pages = []
    for _ in range(2):
        calibration.main(["--ladders", "20", "--seed", "3"])
        pages.append(capsys.readouterr().out)
    assert pages[0] == pages[1]
    assert pages[0].count("\n| ") == 1 + len(WORLDS) * len(SETTINGS)
