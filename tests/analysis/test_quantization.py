from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import made_up

from qlora_exp.analysis.configurations import Measure, configurations
from qlora_exp.analysis.contrasts import GroupScores, Side, difference, interval
from qlora_exp.analysis.margin import Margin, MarginUnit, parse_margin
from qlora_exp.analysis.quantization import LevelComparison, compare_quantizations, compare_targets
from qlora_exp.analysis.quantization_words import quantization_recommendation, targets_recommendation
from qlora_exp.analysis.recommendation import ComparisonVerdict, comparison_verdict, seeds_to_settle, study_margin
from qlora_exp.analysis.report_content import StudyInfo
from qlora_exp.analysis.searches import search_recommendation
from qlora_exp.records.types import RunRecord

LOSS = Measure("loss_per_item", False)
NOISE = {1: -0.001, 2: 0.0, 3: 0.001}
MARGIN = Margin(0.01, MarginUnit.SHARE_OF_LOSS)


def side(number: int, mode: str, loss: float, noise: float = 1.0, **settings: object) -> list[RunRecord]:
    """Three seeds, whose levels differ by far more than their differences do."""
    return [
        made_up.run(number + s, seed=s, mode=mode, loss=loss + s / 10 + noise * d, **settings)  # type: ignore[arg-type]
        for s, d in NOISE.items()
    ]


def compared(*records: RunRecord, margin: Margin | None = MARGIN) -> LevelComparison:
    found = compare_quantizations(configurations(records, LOSS), LOSS, margin=margin)
    assert found is not None
    return found


def test_one_sentence_says_what_a_quantization_costs_and_saves() -> None:
    found = compared(*side(0, "fp16", 1.8, noise=0.0), *side(10, "nf4", 1.806))
    (contrast,) = found.contrasts
    assert (contrast.level, contrast.reference) == ("nf4", "fp16")
    assert contrast.difference.value == pytest.approx(-0.006)
    answer = quantization_recommendation(found)
    # sd 0.001, three seeds: 4.303 × 0.001 / √3 = 0.0025 of 2.0 nats per item.
    assert (
        "nf4 costs 0.3 % of the loss (95 % CI 0.18 to 0.42 %, 3 seeds) against fp16 and saves 75 %" in answer.evidence
    )
    assert "of the memory of the weights" in answer.evidence
    assert answer.verdict == "nf4 is equivalent to fp16 within 1 % of the loss"
    assert answer.use == "nf4"
    assert answer.regret_bound == pytest.approx(0.006 + 4.303 * 0.001 / 3**0.5, rel=1e-3)
    assert answer.cost == "It may cost at most 0.42 % of the loss against fp16 (95 %)."
    assert answer.settle is None


def test_the_cheaper_one_is_used_only_where_it_is_shown_to_cost_less_than_the_margin() -> None:
    pair = (*side(0, "fp16", 1.8, noise=0.0), *side(10, "nf4", 1.83))
    worse = compared(*pair)
    assert [c.verdict for c in worse.contrasts] == [ComparisonVerdict.WORSE]
    assert (worse.use, worse.regret_bound) == ("fp16", 0.0)
    assert compared(*pair, margin=parse_margin("2%")).use == "nf4"
    assert compared(*pair, margin=parse_margin("1% of the tuning gain")).use == "nf4"  # 0.01 × 7 of 2.0 nats
    # Without a margin: the one that may cost less.
    assert compared(*side(0, "fp16", 1.8), *side(10, "nf4", 1.79, noise=30.0), margin=None).use == "nf4"


def test_of_several_that_cost_less_than_the_margin_the_smallest_is_used_and_the_bound_holds_against_all() -> None:
    found = compared(
        *side(0, "fp16", 1.8, noise=0.0),
        *side(10, "int8", 1.801),
        *side(20, "nf4", 1.802),
        *side(30, "fp4", 2.5, memory=5e6),
    )
    assert [c.level for c in found.contrasts] == ["int8", "nf4", "fp4"]
    assert found.use == "nf4"
    assert found.regret_against in ("fp16", "int8")
    assert found.regret_bound is not None
    # Three bounds together: each at 5 % / 3, which is more than the end of one 95 % interval.
    assert found.regret_bound > 0.002 + 4.303 * 0.001 / 3**0.5


def test_runs_are_compared_only_at_equal_everything_else_and_a_seed_counts_once() -> None:
    def shifted(number: int, r: int) -> list[RunRecord]:
        # What a seed does, it does at every rank: two ranks tell no more of it than one.
        return [*side(number, "fp16", 1.0 + 1 / r, noise=0.0, r=r), *side(number + 10, "nf4", 1.02 + 1 / r, r=r)]

    one, two = compared(*shifted(0, 8)), compared(*shifted(0, 8), *shifted(100, 16), made_up.run(50, mode="nf4", r=64))
    (alone,), (both,) = one.contrasts, two.contrasts
    assert (alone.difference.over, both.difference.over) == ("3 seeds", "3 seeds")
    assert both.difference.se == pytest.approx(alone.difference.se)
    assert len(both.pairs) == 2
    # Without two shared seeds, each seed is a row, with the mean of its pairs.
    apart = compared(
        *(made_up.run(n, seed=n, r=2 ** (n + 1), mode=mode, loss=1.0 + n + d)
          for n in (1, 2, 3) for mode, d in (("fp16", 0.0), ("nf4", 0.02 + 0.001 * n)))
    )  # fmt: skip
    assert apart.contrasts[0].difference.over == "3 seeds"
    many_of_one_seed = compared(
        *(made_up.run(n, seed=1, r=2 ** (n + 1), mode=mode, loss=1.0 + n + d)
          for n in (1, 2, 3, 4, 5) for mode, d in (("fp16", 0.0), ("nf4", 0.02 + 0.001 * n)))
    )  # fmt: skip
    difference = many_of_one_seed.contrasts[0].difference
    assert (difference.seeds, difference.low) == (1, None), "five pairs of one seed don't show the noise of seeds"


def test_each_side_uses_its_own_learning_rate_where_they_share_none() -> None:
    found = compared(
        *side(0, "fp16", 1.8, learning_rate=0.001),
        *side(10, "nf4", 1.9, learning_rate=0.002),
        *side(20, "nf4", 1.82, learning_rate=0.0005),
    )
    (contrast,) = found.contrasts
    assert contrast.own_rates
    assert contrast.difference.value == pytest.approx(-0.02)
    shared = compared(*side(0, "fp16", 1.8), *side(10, "nf4", 1.9), *side(20, "nf4", 1.7, learning_rate=0.0005))
    assert not shared.contrasts[0].own_rates
    assert shared.contrasts[0].difference.value == pytest.approx(-0.1)


def test_one_seed_settles_nothing_and_its_cost_is_unknown() -> None:
    answer = quantization_recommendation(compared(made_up.run(0, mode="fp16", loss=1.0), made_up.run(1, loss=1.5)))
    assert answer.verdict == "nf4 against fp16: not settled"
    assert (answer.use, answer.regret_bound) == ("fp16", None)
    assert "is unknown: with one seed" in answer.cost
    assert "3 seeds of each would tell more about nf4" in str(answer.settle)


def test_what_would_settle_it_is_a_command_with_the_seeds_that_are_missing() -> None:
    def trials(mode: str, loss: float) -> list[RunRecord]:
        return [
            run.replace(trial=replace(run.trial, params={"quantization": mode, "seed": run.seed}))
            for run in side(10 * len(mode), mode, loss, noise=3.0 if mode == "nf4" else 0.0)
            if run.trial is not None
        ]

    found = compared(*trials("fp16", 1.8), *trials("nf4", 1.805), margin=None)
    (contrast,) = found.contrasts
    needed = contrast.seeds_to_settle
    assert needed is not None
    assert needed > 3
    with_more = contrast.difference.half_width_with(needed)
    assert with_more is not None
    assert with_more < 0.005
    study = StudyInfo("made-up", overrides=("training.max_steps=20", "seed=1", "data.note='a b'"))
    command = quantization_recommendation(found, [study]).settle_command
    assert command is not None
    seeds = ",".join(map(str, range(4, needed + 1)))
    assert shlex.split(command) == [
        *("python", "-m", "qlora_exp", "-m", "training.max_steps=20", "data.note='a b'"),
        *("quantization=fp16,nf4" if "fp16,nf4" in command else "quantization=nf4,fp16", f"seed={seeds}"),
        f"sweep.name=made-up_seeds_4_to_{needed}",
    ]
    assert quantization_recommendation(found).settle_command is None  # the trials' other settings are unknown


def test_items_of_one_group_count_as_one() -> None:
    draw = np.random.default_rng(0)
    effects = draw.normal(0.05, 0.1, 20)
    noise = draw.normal(0, 0.001, (2, 3, 200))

    def items(run: RunRecord, moment: str, score: str) -> Mapping[str, float]:
        nf4 = run.config["quantization"]["mode"] == "nf4"
        values = noise[int(nf4), (run.seed or 0) - 1] + nf4 * np.repeat(effects, 10)
        return {str(n): float(value) for n, value in enumerate(values)}

    def groups(run: RunRecord, moment: str, score: str) -> Mapping[str, float]:
        values = list(items(run, moment, score).values())
        return GroupScores({f"g{n}": float(np.mean(values[10 * n : 10 * n + 10])) for n in range(20)})

    sides = Side(tuple(side(0, "nf4", 1.0)), "after"), Side(tuple(side(10, "fp16", 1.0)), "after")
    single, grouped = (difference(*sides, "loss_per_item", values) for values in (items, groups))
    assert single is not None
    assert grouped is not None
    assert grouped.over == "3 seeds and 20 groups of items"
    assert grouped.value == pytest.approx(single.value)
    assert single.se is not None
    assert grouped.se is not None
    assert grouped.se > 2.5 * single.se  # √10 without the seeds' noise


def test_wrong_verdicts_and_broken_bounds_are_as_rare_as_they_say() -> None:
    """3 and 6 seeds × 40 items: no effect, and an effect as large as the margin."""
    draw, count, margin = np.random.default_rng(3), 1500, 0.1
    false, equivalent, broken = [], [], []
    for number in range(count):
        seeds = 3 + 3 * (number % 2)
        effects = draw.normal(0, 0.05, (seeds, 1)) + draw.normal(0, 0.3, 40) + draw.normal(0, 0.1, (seeds, 40))
        none = interval(effects, "", trained=True)
        false.append(comparison_verdict(none, None) is not ComparisonVerdict.OPEN)
        at_margin = interval(effects + margin, "", trained=True)
        equivalent.append(comparison_verdict(at_margin, margin) is ComparisonVerdict.EQUIVALENT)
        upper = none.upper(0.025)
        broken.append(upper is not None and upper < 0)
    assert np.mean(false) < 0.065
    assert np.mean(equivalent) < 0.035
    assert np.mean(broken) < 0.035


def test_no_number_of_seeds_is_advised_where_items_decide() -> None:
    draw = np.random.default_rng(1)
    few_items = interval(0.01 + draw.normal(0, 0.3, 30) + draw.normal(0, 0.001, (3, 1)), "", trained=True)
    assert comparison_verdict(few_items, 0.02) is ComparisonVerdict.OPEN
    assert seeds_to_settle(few_items, 0.02) is None


def test_target_modules_are_compared_by_the_same_rule() -> None:
    records = [
        *side(0, "nf4", 1.8, targets="all_linear", noise=0.0),
        *side(10, "nf4", 1.805, targets="attention"),
    ]
    found = compare_targets(configurations(records, LOSS), LOSS, margin=MARGIN)
    assert found is not None
    answer = targets_recommendation(found)
    assert answer.use == "attention"
    assert "saves 64 % of the trainable parameters" in answer.evidence


def test_a_searchs_choice_comes_with_the_most_that_another_one_may_be_better() -> None:
    records = [
        made_up.run(10 * n + s, seed=s, learning_rate=rate, loss=loss + d, validation_loss=loss)
        for n, (rate, loss) in enumerate(((1e-3, 1.5), (2e-3, 1.505), (4e-3, 2.0)))
        for s, d in ((1, -0.01), (2, 0.01), (3, 0.0))
    ]
    answer = search_recommendation(configurations(records, LOSS), LOSS, MARGIN)
    assert answer is not None
    assert "lr 0.001" in str(answer.use)
    # Pooled sd 0.01 with six degrees of freedom: 0.005 behind, and t(0.025) × 0.01 × √(2/3) may be ahead.
    assert answer.regret_bound == pytest.approx(-0.005 + 2.447 * 0.01 * (2 / 3) ** 0.5, rel=1e-3)
    assert "lr 0.002" in str(answer.regret_against)
    assert answer.verdict == "equivalent"
    assert answer.settle is None
    single = search_recommendation(configurations(records[::3], LOSS), LOSS, MARGIN)
    assert single is not None
    assert (single.regret_bound, single.verdict) == (None, "not settled")


def test_the_margin_is_the_ladders_or_a_quarter_of_a_percent() -> None:
    assert str(study_margin([])) == "0.25%"
    assert str(study_margin([StudyInfo("a", ladders=[{"margin": 0.1}])])) == "0.1 nats_per_item"
    assert str(study_margin([StudyInfo("a", ladders=[{"margin": 0.1, "margin_text": "0.5%"}])])) == "0.5%"
