"""The rank decision: what it says, what changes it, what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent))

import independent_rule

from qlora_exp.analysis.power import Noise, plan
from qlora_exp.analysis.rank import Look, RankAnswer, decide, decide_from_summary, decide_ladder
from qlora_exp.analysis.rank_rule import WRONG_CONTINUE, WRONG_STOP, Rule, SeedPlan, StepVerdict, make_rule
from qlora_exp.analysis.rank_walk import Walk, walk
from qlora_exp.analysis.variance import Array, rank_seed_mean_square
from qlora_exp.errors import AnalysisError

RULE, PLAN = Rule(margin=0.02, half_zone=0.01), SeedPlan(3, 8)


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


def walked(ladder: Mapping[int, Array], plan: SeedPlan = PLAN, rule: Rule = RULE) -> tuple[Walk, dict[int, int]]:
    """The walk over a ladder whose runs exist already, and the seeds that it asked for."""
    requested: dict[int, int] = {}

    def run(wanted: Mapping[int, int]) -> dict[int, Array]:
        for rank, seeds in wanted.items():
            requested[rank] = max(requested.get(rank, 0), seeds)
        return {
            rank: np.where(np.arange(len(ladder[rank]))[:, None] < seeds, ladder[rank], np.nan)
            for rank, seeds in sorted(requested.items())
        }

    return walk(sorted(ladder), plan, lambda _: rule, run), requested


def answered(ladder: Mapping[int, Array], plan: SeedPlan = PLAN, rule: Rule = RULE) -> RankAnswer:
    found = walked(ladder, plan, rule)[0].answer(plan, "nats per item")
    assert found is not None
    return found


def test_the_bounds_are_the_formulas_of_the_rule() -> None:
    ladder = losses([0.03, 0.01], seeds=4)
    found = decide(ladder[8], ladder[16], list(ladder.values()), RULE, Look(PLAN, 4))
    pooled, pooled_df = pooled_noise(ladder)
    d = ladder[8] - ladder[16]
    rest = d - d.mean(axis=0) - d.mean(axis=1, keepdims=True) + d.mean()
    ms_item, ms_rest = 4 * d.mean(axis=0).var(ddof=1), (rest**2).sum() / (3 * 399)
    a = max(d.mean(axis=1).var(ddof=1), 2 * pooled) / 4
    b = max(0.0, ms_item - ms_rest) / (4 * 400)
    own_is_larger = d.mean(axis=1).var(ddof=1) > 2 * pooled
    df = (a + b) ** 2 / (a**2 / (3 if own_is_larger else pooled_df) + b**2 / 399)
    share = 4 / 8 / (1 + 2.5 * 5 / 8 + (5 / 8) ** 3)
    assert pooled_df == (3 - 1) * (4 - 1)
    assert found.df == pytest.approx(df)
    assert found.low == pytest.approx(d.mean() - stats.t.isf(share / 30, df) * np.sqrt(a + b))
    assert found.high == pytest.approx(d.mean() + stats.t.isf(share / 60, df) * np.sqrt(a + b))


@pytest.mark.parametrize("first_case", range(0, 1000, 250))
def test_an_independent_implementation_of_the_page_walks_every_ladder_alike(first_case: int) -> None:
    for case in range(first_case, first_case + 250):
        rng = np.random.default_rng(case)
        ranks, items = int(rng.integers(2, 6)), int(rng.choice([1, 5, 12]))
        first = int(rng.integers(2, 5))
        most = int(rng.integers(first, 9))
        level = -np.cumsum(np.r_[0, rng.uniform(-0.5, 3, ranks - 1)])[:, None, None]
        made = level + rng.uniform(0.05, 1) * rng.normal(size=(ranks, most, 1))
        made = made + rng.uniform(0, 2) * rng.normal(size=(ranks, 1, items)) + rng.normal(size=(ranks, most, items)) / 2
        if case % 3 == 0:
            made[rng.random((ranks, most)) < 0.15] = np.nan
            made[:, 0] = np.where(np.isnan(made[:, 0]), level[:, 0], made[:, 0])  # one seed that all share
        names = [8 * 2**position for position in range(ranks)]
        found, _ = walked(dict(zip(names, made, strict=True)), SeedPlan(first, most), Rule(1.0, 0.5))
        steps = [
            (names.index(step.from_rank), names.index(step.to_rank), str(step.decision.verdict))
            for step in found.comparisons
        ]
        assert steps == independent_rule.ladder(made, first, most, 1.0, 0.5), f"case {case}"


def test_an_independent_implementation_computes_the_same_bounds() -> None:
    for case in range(200):
        rng = np.random.default_rng(case)
        runs = rng.normal(size=(3, 6, 7)) + rng.normal(size=(3, 6, 1))
        if case % 2:
            runs[rng.random((3, 6)) < 0.2] = np.nan
            runs[:, :2] = np.nan_to_num(runs[:, :2])
        found = decide(runs[0], runs[1], list(runs), Rule(1.0, 0.5), Look(SeedPlan(3, 8), 6))
        other = independent_rule.interval(
            runs[0], runs[1], runs.mean(axis=-1), independent_rule.share_of(6, 3, 8), 6, 1.0, 0.5
        )
        assert (found.gain, found.low, found.high) == pytest.approx(
            (other["gain"], other["low"], other["high"]), rel=1e-9, abs=1e-12
        )


@pytest.mark.parametrize("plan", [(2, 2), (2, 8), (3, 5), (3, 8), (4, 12), (3, 24), (2, 64)], ids=str)
def test_all_looks_of_a_plan_together_keep_the_error_rates_and_use_most_of_them(plan: tuple[int, int]) -> None:
    looks = SeedPlan(*plan)
    draws = np.random.default_rng(7).normal(size=(40_000, looks.most))
    crossed = {rate: np.zeros(len(draws), dtype=bool) for rate in (WRONG_CONTINUE, WRONG_STOP)}
    for seeds in range(looks.first, looks.most + 1):
        so_far = draws[:, :seeds]
        t = so_far.mean(axis=1) / so_far.std(axis=1, ddof=1) * np.sqrt(seeds)
        for rate, hits in crossed.items():
            hits |= t > stats.t.isf(rate * looks.share(seeds), seeds - 1)
    for rate, hits in crossed.items():
        # Three standard errors of the simulated share.
        assert 0.7 * rate <= hits.mean() <= rate + 3 * (rate / len(draws)) ** 0.5


def test_a_ladder_stops_where_its_gains_fall_below_the_margin() -> None:
    ladder = losses([0.09, 0.05, 0.0, 0.005], seeds=8)
    found, seeds = walked(ladder)
    assert [(c.from_rank, c.to_rank, str(c.decision.verdict)) for c in found.comparisons] == [
        (8, 32, "continue"),
        (32, 128, "stop"),
        (32, 64, "stop"),
    ]
    assert seeds.keys() == {8, 32, 64, 128}, "r = 16 is skipped: r = 8 → 32 gains two margins"
    answer = answered(ladder)
    assert (answer.verdict, answer.recommended_rank, answer.use_rank) == (StepVerdict.STOP, 32, 32)
    assert answer.sentence.startswith("Use r = 32. It costs at most ")
    assert "diminished at r = 32" in answer.sentence
    assert "r = 128 gains" in answer.sentence, "what the next rank but one gains in all"


def test_a_rank_whose_doubling_pays_is_found_between_the_ends_of_a_step_that_does_not() -> None:
    found = answered(losses([0.08, -0.06, 0.0], seeds=8, seed_sd=0.001))
    assert (found.verdict, found.recommended_rank) == (StepVerdict.STOP, 16)


def test_a_ladder_of_large_gains_continues_to_its_end() -> None:
    for gains in ([0.2, 0.2], [0.2, 0.2, 0.2]):
        found = answered(losses(gains, seeds=8))
        assert (found.verdict, found.recommended_rank) == (StepVerdict.CONTINUE, 8 * 2 ** len(gains))
    table = decide_ladder(losses([0.2, 0.2], seeds=8), RULE)
    assert (table.verdict, table.recommended_rank) == (StepVerdict.CONTINUE, 32)


def test_an_open_look_asks_for_one_more_seed_and_the_last_one_is_inconclusive_with_a_rank_to_use() -> None:
    smaller, larger = np.ones((3, 1)), 1 - np.array([[0.01], [0.04], [0.02]])
    first = decide(smaller, larger, [smaller, larger], RULE, Look(PLAN, 3))
    assert first.verdict is StepVerdict.BUY
    noisy = answered(losses([0.02], seeds=8, seed_sd=0.03))
    assert (noisy.verdict, noisy.recommended_rank, noisy.use_rank) == (StepVerdict.INCONCLUSIVE, None, 8)
    assert noisy.regret is not None
    assert noisy.regret.rank == 16
    assert noisy.regret.bound == noisy.deciding.high
    assert "It would take about" in noisy.sentence


def test_a_hopeless_step_ends_before_its_last_look() -> None:
    found, seeds = walked(losses([0.02], seeds=8, seed_sd=0.2))
    assert found.verdict is StepVerdict.INCONCLUSIVE
    assert found.comparisons[0].decision.hopeless
    assert max(seeds.values()) < PLAN.most


def test_the_advised_number_of_seeds_is_one_that_decides() -> None:
    decided = advised = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        ladder = {8: rng.normal(0, 0.02, (64, 1)), 16: rng.normal(-0.02, 0.02, (64, 1))}
        short = {rank: values[:8] for rank, values in ladder.items()}
        decision = answered(short).deciding
        if decision.verdict is StepVerdict.INCONCLUSIVE and decision.settling_seeds is not None:
            advised += 1
            more = SeedPlan(3, decision.settling_seeds)
            decided += answered(ladder, more).verdict is not StepVerdict.INCONCLUSIVE
    assert advised >= 20
    assert decided >= 0.6 * advised


def test_where_items_alone_are_too_few_it_asks_for_items_and_for_more_than_there_are() -> None:
    found = answered(losses([0.02], seeds=8, seed_sd=0.0001, item_sd=0.3)).deciding
    assert found.settling_seeds is None
    assert found.would_settle is not None
    items = int(found.would_settle.split("about ")[1].split(" items")[0])
    assert items > 400


def test_a_lost_run_counts_against_the_rank_that_lost_it() -> None:
    ladder = losses([0.035], seeds=8)
    kept = answered(ladder)
    assert kept.verdict is StepVerdict.CONTINUE
    larger_lost = {8: ladder[8].copy(), 16: ladder[16].copy()}
    larger_lost[16][:2] = np.nan
    found = answered(larger_lost)
    assert found.deciding.lost_runs >= 1
    assert found.deciding.low < kept.deciding.low
    assert "lost" in found.sentence
    flat = losses([0.0], seeds=8)
    smaller_lost = {8: flat[8].copy(), 16: flat[16].copy()}
    smaller_lost[8][:2] = np.nan
    assert answered(flat).deciding.high < answered(smaller_lost).deciding.high


def test_a_first_look_whose_shared_seeds_were_all_lost_takes_further_seeds() -> None:
    ladder = losses([0.1], seeds=8)
    ladder[8][0] = ladder[16][1] = ladder[8][2] = np.nan
    assert answered(ladder).deciding.seeds >= 1
    ladder[8][:] = np.nan
    with pytest.raises(AnalysisError, match="share no seed"):
        walked(ladder)


def test_the_regret_bound_is_broken_no_more_often_than_its_rate() -> None:
    broken = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        gains = np.r_[0, np.cumsum([0.03, 0.015, 0.01, 0.002])]
        ladder = {8 * 2**k: -gain + rng.normal(0, 0.012, (8, 1)) for k, gain in enumerate(gains)}
        found, seeds = walked(ladder)
        answer = found.answer(PLAN, "nats")
        assert answer is not None
        assert answer.regret is not None
        level = {rank: gains[int(np.log2(rank / 8))] for rank in seeds}
        broken += max(level.values()) - level[answer.use_rank] > answer.regret.bound
    assert broken <= 300 * 0.05


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
    by_gain = [order[decide(ladder[8], ladder[16] - gain, run, RULE).verdict] for gain in np.linspace(-0.05, 0.09, 60)]
    assert by_gain == sorted(by_gain)
    assert set(by_gain) == {0, 1, 2}
    by_margin = [
        order[decide(ladder[8], ladder[16] - 0.03, run, make_rule(margin)).verdict]
        for margin in np.linspace(0.005, 0.09, 60)
    ]
    assert by_margin == sorted(by_margin, reverse=True)


def test_a_step_of_two_doublings_is_held_to_two_margins() -> None:
    found = decide_ladder({8: np.full((3, 1), 1.0), 32: np.full((3, 1), 0.97)}, RULE)
    assert found.verdict is StepVerdict.STOP, "0.03 is more than a margin, and less than two"
    assert decide_ladder({8: np.full((3, 1), 1.0), 16: np.full((3, 1), 0.97)}, RULE).verdict is StepVerdict.CONTINUE


def test_a_failed_run_is_left_out_of_its_step_only() -> None:
    ladder = losses([0.05, 0.05], seeds=4)
    ladder[32][1] = np.nan
    found = decide_ladder(ladder, RULE)
    assert [step.decision.seeds for step in found.comparisons] == [4, 3]
    assert pooled_noise(ladder)[1] == 5


def test_a_walk_without_its_runs_asks_for_both_ranks_and_decides_nothing() -> None:
    wanted: list[Mapping[int, int]] = []

    def missing(seeds: Mapping[int, int]) -> None:
        wanted.append(seeds)

    found = walk([8, 16, 32, 64], PLAN, lambda _: RULE, missing)
    assert wanted == [{8: 3, 32: 3}]
    assert (found.pending, found.comparisons, found.answer(PLAN, "nats")) == (True, (), None)


def test_scores_without_items_are_decided_over_seeds_and_a_single_seed_is_not_decided() -> None:
    ladder = {rank: values.mean(axis=1) for rank, values in losses([0.2], seeds=8).items()}
    decision = decide_ladder(ladder, RULE).comparisons[0].decision
    assert (decision.verdict, decision.items, decision.item_part) == (StepVerdict.CONTINUE, None, None)
    one = decide_ladder({rank: values[:1] for rank, values in losses([0.2]).items()}, RULE)
    decision = one.comparisons[0].decision
    assert (decision.verdict, decision.low, decision.high) == (StepVerdict.INCONCLUSIVE, None, None)
    assert "more than one seed" in one.sentence


def test_identical_losses_stop_without_a_division_by_zero() -> None:
    same = np.ones((3, 50))
    found = decide_ladder({8: same, 16: same, 32: same}, RULE)
    assert (found.verdict, found.recommended_rank) == (StepVerdict.STOP, 8)


def test_a_published_gain_is_decided_by_the_normal_quantiles() -> None:
    found = decide_from_summary(1.0, 0.1, make_rule(0.5))
    assert found.verdict is StepVerdict.CONTINUE
    assert (found.low, found.high) == pytest.approx((1 - 1.833915 * 0.1, 1 + 2.128045 * 0.1))


@pytest.mark.parametrize(("gain", "verdict"), [(0.49, StepVerdict.STOP), (0.51, StepVerdict.CONTINUE)])
def test_where_either_answer_would_do_the_mean_is_held_against_the_margin(gain: float, verdict: StepVerdict) -> None:
    found = decide_from_summary(gain, 0.01, make_rule(0.5))
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
        make_rule(margin, zone)


def test_a_plan_says_what_is_needed_and_what_it_says_suffices() -> None:
    poor = plan(Noise(seed_sd=0.02, item_sd=0.05), PLAN, items=400, rule=RULE)
    assert not poor.settles
    assert poor.seeds_needed is not None
    assert plan(Noise(0.02, 0.05), SeedPlan(3, poor.seeds_needed), 400, RULE).settles
    assert not plan(Noise(0.02, 0.05), SeedPlan(3, poor.seeds_needed - 1), 400, RULE).settles
    few_items = plan(Noise(seed_sd=0.001, item_sd=0.5), PLAN, items=400, rule=RULE)
    assert few_items.seeds_needed is None
    assert few_items.items_needed is not None
    assert plan(Noise(0.001, 0.5), PLAN, few_items.items_needed, RULE).settles


@pytest.mark.parametrize("seeds", [(1, 8), (4, 3), (3, 65)])
def test_a_plan_of_seeds_that_the_rule_does_not_cover_is_refused(seeds: tuple[int, int]) -> None:
    with pytest.raises(AnalysisError, match="seeds"):
        SeedPlan(*seeds)


def test_without_a_second_seed_the_noise_is_unknown() -> None:
    larger, smaller = np.zeros((1, 4)), np.ones((1, 4))
    found = decide(smaller, larger, [smaller, larger], RULE)
    assert (found.verdict, found.se, found.low, found.df) == (StepVerdict.INCONCLUSIVE, None, None, 0)
