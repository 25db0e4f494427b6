"""The rank decision: what it says, what changes it, what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from qlora_exp.analysis.power import Noise, plan
from qlora_exp.analysis.rank import decide, decide_from_summary, decide_ladder
from qlora_exp.analysis.rank_rule import FIRST_LOOK, LAST_LOOK, Rule, StepVerdict, make_rule
from qlora_exp.analysis.variance import Array, rank_seed_mean_square
from qlora_exp.errors import AnalysisError

RULE = Rule(margin=0.02, half_zone=0.01, doublings=5)


def losses(gains: list[float], seeds: int = 3, seed_sd: float = 0.002, item_sd: float = 0.02) -> dict[int, np.ndarray]:
    """A ladder from r = 8 with 400 items."""
    rng = np.random.default_rng(0)
    item = rng.normal(1.0, 0.5, 400)
    levels = -np.cumsum([0.0, *gains])
    return {
        8 * 2**step: level
        + item
        + rng.normal(0, item_sd, 400)
        + rng.normal(0, seed_sd, (seeds, 1))
        + rng.normal(0, 0.05, (seeds, 400))
        for step, level in enumerate(levels)
    }


def pooled_noise(ladder: Mapping[int, Array]) -> tuple[Array, Array]:
    return rank_seed_mean_square(np.stack([values.mean(axis=1) for values in ladder.values()]))


def test_the_bounds_are_the_formulas_of_the_rule() -> None:
    ladder = losses([0.03, 0.01], seeds=4)
    found = decide(ladder[8], ladder[16], list(ladder.values()), RULE, LAST_LOOK)
    pooled, pooled_df = pooled_noise(ladder)
    d = ladder[8] - ladder[16]
    rest = d - d.mean(axis=0) - d.mean(axis=1, keepdims=True) + d.mean()
    ms_item, ms_rest = 4 * d.mean(axis=0).var(ddof=1), (rest**2).sum() / (3 * 399)
    a = max(d.mean(axis=1).var(ddof=1), 2 * pooled) / 4
    b = max(0.0, ms_item - ms_rest) / (4 * 400)
    df = (a + b) ** 2 / (a**2 / pooled_df + b**2 / 399)
    assert pooled_df == (3 - 1) * (4 - 1)
    assert found.df == pytest.approx(df)
    assert found.low == pytest.approx(d.mean() - stats.t.ppf(0.975, df) * np.sqrt(a + b))
    assert found.high == pytest.approx(d.mean() + stats.t.ppf(1 - 0.025 / 5, df) * np.sqrt(a + b))


def test_a_ladder_stops_where_its_gains_fall_below_the_margin() -> None:
    found = decide_ladder(losses([0.09, 0.05, 0.0, 0.05], seeds=8), RULE, bought=(16, 32, 64, 128))
    assert [step.decision.verdict for step in found.comparisons][:3] == ["continue", "continue", "stop"]
    assert (found.verdict, found.recommended_rank) == (StepVerdict.STOP, 32)
    assert "diminished at r = 32" in found.sentence


def test_a_ladder_of_large_gains_continues_to_its_end() -> None:
    found = decide_ladder(losses([0.2, 0.2], seeds=8), RULE, complete=True)
    assert (found.verdict, found.recommended_rank) == (StepVerdict.CONTINUE, 32)


def test_an_open_first_look_buys_seeds_and_an_open_last_look_is_inconclusive() -> None:
    ladder = losses([0.021], seed_sd=0.01)
    first = decide_ladder(ladder, RULE)
    assert first.verdict is StepVerdict.BUY
    assert first.recommended_rank is None
    bought = first.comparisons[0].decision.increase
    assert bought is not None
    assert 4 <= bought.seeds <= 8
    assert bought.items is None
    last = decide_ladder(ladder, RULE, bought=(16,))
    assert (last.verdict, last.recommended_rank) == (StepVerdict.INCONCLUSIVE, None)
    assert "It would take" in last.sentence


def test_where_items_alone_are_too_few_it_asks_for_items_and_for_more_than_there_are() -> None:
    bought = decide_ladder(losses([0.02], seed_sd=0.0001, item_sd=0.3), RULE).comparisons[0].decision.increase
    assert bought is not None
    assert bought.seeds is None
    assert bought.items > 400


def test_a_decision_does_not_change_with_the_order_of_items_or_seeds_or_with_a_shift_of_both_ranks() -> None:
    ladder = losses([0.03, 0.015])
    rng = np.random.default_rng(3)
    items, seeds = rng.permutation(400), rng.permutation(3)
    shift = rng.normal(size=(3, 400))
    changed = {rank: (values + shift)[seeds][:, items] for rank, values in ladder.items()}
    for step, other in zip(
        decide_ladder(ladder, RULE).comparisons, decide_ladder(changed, RULE).comparisons, strict=True
    ):
        assert step.decision.verdict == other.decision.verdict
        assert (step.decision.low, step.decision.high) == pytest.approx((other.decision.low, other.decision.high))


def test_a_larger_gain_never_turns_continue_into_stop_and_a_larger_margin_never_stop_into_continue() -> None:
    order = {StepVerdict.STOP: 0, StepVerdict.BUY: 1, StepVerdict.INCONCLUSIVE: 1, StepVerdict.CONTINUE: 2}
    ladder = losses([0.0], seeds=8, seed_sd=0.012)
    run = list(ladder.values())
    by_gain = [
        order[decide(ladder[8], ladder[16] - gain, run, RULE, LAST_LOOK).verdict]
        for gain in np.linspace(-0.05, 0.09, 60)
    ]
    assert by_gain == sorted(by_gain)
    assert set(by_gain) == {0, 1, 2}
    by_margin = [
        order[decide(ladder[8], ladder[16] - 0.03, run, make_rule(margin, 5), LAST_LOOK).verdict]
        for margin in np.linspace(0.005, 0.09, 60)
    ]
    assert by_margin == sorted(by_margin, reverse=True)


def test_stop_gets_harder_with_the_number_of_doublings_and_continue_does_not() -> None:
    ladder = losses([0.02])
    run = list(ladder.values())
    short, long = (decide(ladder[8], ladder[16], run, replace(RULE, doublings=n), FIRST_LOOK) for n in (1, 6))
    assert short.low == long.low
    assert short.high < long.high


def test_a_failed_run_is_left_out_of_its_doubling_only() -> None:
    ladder = losses([0.05, 0.05], seeds=4)
    ladder[32][1] = np.nan
    found = decide_ladder(ladder, RULE, complete=True)
    assert [step.decision.seeds for step in found.comparisons] == [4, 3]
    assert pooled_noise(ladder)[1] == 5


def test_a_ladder_is_decided_the_same_when_it_has_grown() -> None:
    ladder = losses([0.05, 0.03, 0.02])
    early = decide_ladder({rank: ladder[rank] for rank in (8, 16)}, RULE)
    late = decide_ladder(ladder, RULE)
    assert early.comparisons[0] == late.comparisons[0]


def test_scores_without_items_are_decided_over_seeds_and_a_single_seed_is_not_decided() -> None:
    ladder = {rank: values.mean(axis=1) for rank, values in losses([0.2], seeds=8).items()}
    decision = decide_ladder(ladder, RULE, complete=True).comparisons[0].decision
    assert (decision.verdict, decision.items, decision.item_part) == (StepVerdict.CONTINUE, None, None)
    one = decide_ladder({rank: values[:1] for rank, values in losses([0.2]).items()}, RULE, complete=True)
    decision = one.comparisons[0].decision
    assert (decision.verdict, decision.low, decision.high) == (StepVerdict.INCONCLUSIVE, None, None)
    assert "more than one seed" in one.sentence


def test_identical_losses_stop_without_a_division_by_zero() -> None:
    same = np.ones((3, 50))
    found = decide_ladder({8: same, 16: same, 32: same}, RULE)
    assert (found.verdict, found.recommended_rank) == (StepVerdict.STOP, 8)


def test_a_published_gain_is_decided_by_the_normal_quantiles() -> None:
    found = decide_from_summary(1.0, 0.1, make_rule(0.5, 1))
    assert found.verdict is StepVerdict.CONTINUE
    assert (found.low, found.high) == pytest.approx((1 - 1.959964 * 0.1, 1 + 1.959964 * 0.1))


@pytest.mark.parametrize(("gain", "verdict"), [(0.49, StepVerdict.STOP), (0.51, StepVerdict.CONTINUE)])
def test_where_either_answer_would_do_the_mean_is_held_against_the_margin(gain: float, verdict: StepVerdict) -> None:
    found = decide_from_summary(gain, 0.01, make_rule(0.5, 3))
    assert 0.25 < found.low < found.high < 0.75
    assert found.verdict is verdict


@pytest.mark.parametrize(
    ("ladder", "words"),
    [
        ({8: np.zeros((3, 5))}, "single rank"),
        ({8: np.zeros((3, 5)), 16: np.zeros((3, 6))}, "different shapes"),
        ({8: np.zeros((3, 2)), 16: np.array([[0, 0], [0, np.nan], [0, 0]])}, "no finite loss"),
        ({8: np.array([0.0, np.nan]), 16: np.array([np.nan, 0.0])}, "share no seed"),
    ],
)
def test_ladders_that_do_not_pair_are_refused(ladder: dict[int, np.ndarray], words: str) -> None:
    with pytest.raises(AnalysisError, match=words):
        decide_ladder(ladder, RULE)


@pytest.mark.parametrize(("margin", "zone"), [(0, None), (-1, None), (float("nan"), None), (1, 0), (1, 2)])
def test_a_margin_that_nothing_can_be_decided_against_is_refused(margin: float, zone: float | None) -> None:
    with pytest.raises(AnalysisError):
        make_rule(margin, 5, zone)


def test_a_plan_says_what_is_needed_and_what_it_says_suffices() -> None:
    poor = plan(Noise(seed_sd=0.02, item_sd=0.05), seeds=8, items=400, rule=RULE)
    assert not poor.settles
    assert poor.seeds_needed is not None
    assert plan(Noise(0.02, 0.05), poor.seeds_needed, 400, RULE).settles
    assert not plan(Noise(0.02, 0.05), poor.seeds_needed - 1, 400, RULE).settles
    few_items = plan(Noise(seed_sd=0.001, item_sd=0.5), seeds=8, items=400, rule=RULE)
    assert few_items.seeds_needed is None
    assert few_items.items_needed is not None
    assert plan(Noise(0.001, 0.5), 8, few_items.items_needed, RULE).settles


def test_without_a_second_seed_the_noise_is_unknown() -> None:
    larger, smaller = np.zeros((1, 4)), np.ones((1, 4))
    found = decide(smaller, larger, [smaller, larger], RULE, LAST_LOOK)
    assert (found.verdict, found.se, found.low, found.df) == (StepVerdict.INCONCLUSIVE, None, None, 0)
