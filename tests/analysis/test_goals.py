from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import made_up

from qlora_exp.analysis.configurations import Configuration, Measure, configurations
from qlora_exp.analysis.contrasts import GroupScores
from qlora_exp.analysis.goals import goal_answer, goal_recommendation
from qlora_exp.records.types import RunRecord

LOSS = Measure("loss_per_item", False)


def of(*records: RunRecord) -> list[Configuration]:
    return configurations(records, LOSS)


def test_the_cheapest_that_meets_the_goal_is_that_of_least_memory_among_those_shown() -> None:
    goal = "accuracy >= 0.5"
    records = [
        made_up.run(0, mode="fp16", accuracy=0.7, goal=goal),
        made_up.run(1, mode="int8", accuracy=0.7, goal=goal),
        made_up.run(2, mode="nf4", accuracy=0.51, goal=goal),
    ]
    found = goal_answer(of(*records))
    assert found is not None
    assert found.shown == 2
    assert found.cheapest is not None
    assert "int8" in found.cheapest.label


def test_a_goal_that_a_single_seed_meets_is_said_to_be_shown_over_items_alone() -> None:
    goal = "accuracy >= 0.5"
    once = goal_answer(of(made_up.run(0, accuracy=0.6, goal=goal)))
    twice = goal_answer(of(*(made_up.run(s, seed=s, accuracy=0.6, goal=goal) for s in (1, 2))))
    assert once is not None
    assert twice is not None
    assert (once.shown, twice.shown) == (1, 1)
    assert "items alone: no configuration has a second seed" in once.sentence
    assert "seeds and items" in twice.sentence


def test_few_seeds_that_vary_as_the_items_do_widen_a_goals_bound_beyond_the_normal_one() -> None:
    # The items' standard error is 0.0158 and the seeds' nearly so: 1.645 of both is 0.037, Student's t with 8 df 0.041.
    goal = "accuracy >= 0.5"
    runs = [made_up.run(s, seed=s, accuracy=0.539 + d, goal=goal) for s, d in ((1, -0.027), (2, 0.0), (3, 0.027))]
    found = goal_answer(of(*runs))
    assert found is not None
    assert found.shown == 0


def test_seeds_that_disagree_do_not_show_that_a_goal_is_met() -> None:
    goal = "accuracy >= 0.5"
    steady = [made_up.run(s, seed=s, accuracy=0.6, goal=goal) for s in (1, 2, 3)]
    wild = [made_up.run(s, seed=s, accuracy=0.6 + d, goal=goal) for s, d in ((1, -0.2), (2, 0.2), (3, 0.0))]
    assert [found.shown for records in (steady, wild) if (found := goal_answer(of(*records)))] == [1, 0]


def test_the_goals_answer_is_an_interval_at_one_configuration_and_whether_it_is_beyond_noise() -> None:
    def answer(accuracy: float) -> tuple[str, float | None]:
        found = goal_answer(
            of(*(made_up.run(s, seed=s, accuracy=accuracy + d, goal="accuracy >= 0.5") for s, d in SEEDS))
        )
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        assert found.low < accuracy < found.high
        recommended = goal_recommendation(found)
        assert f"95 % CI {found.low:.3g} to {found.high:.3g}" in recommended.evidence
        assert (recommended.settle is not None) == (found.verdict == "not settled")
        return found.verdict, recommended.regret_bound

    assert answer(0.6) == ("met", 0.0)
    verdict, shortfall = answer(0.51)
    assert verdict == "not settled"
    assert shortfall is not None
    assert 0 < shortfall < 0.05
    assert answer(0.4)[0] == "not met"


SEEDS = ((1, -0.01), (2, 0.01), (3, 0.0))


def test_the_configuration_that_validation_chose_pays_for_no_comparison() -> None:
    goal = "accuracy >= 0.5"
    many = of(*(made_up.run(n, accuracy=0.55, goal=goal, learning_rate=1e-4 * (n + 1)) for n in range(20)))
    alone, among = goal_answer(many, many[3]), goal_answer(many)
    assert alone is not None
    assert among is not None
    assert alone.chosen is many[3]
    assert alone.low is not None
    assert among.low is not None
    assert among.low < alone.low
    assert "95 % CI of the 20 compared configurations together" in among.sentence
    # A configuration of other runs isn't answered for.
    other = of(made_up.run(99, accuracy=0.9))
    assert goal_answer(many, other[0]) == among


def test_items_of_one_document_widen_the_goals_interval() -> None:
    runs = of(made_up.run(0, accuracy=0.55, goal="accuracy >= 0.5"))
    documents = GroupScores({str(n): float(n % 2) for n in range(20)})
    alone, grouped = goal_answer(runs), goal_answer(runs, items=lambda run, moment, score: documents)
    assert alone is not None
    assert grouped is not None
    assert (alone.verdict, grouped.verdict) == ("met", "not settled")
