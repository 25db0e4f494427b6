"""Override texts become axes, conditions and grids, and values become overrides again."""

from __future__ import annotations

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from qlora_exp.errors import ConfigError, Problems
from qlora_exp.study.distributions import distribution
from qlora_exp.study.space import grid, is_grid, parse_axes, point_overrides


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,2", CategoricalDistribution([1, 2])),
        ("choice(1,2)", CategoricalDistribution([1, 2])),
        ("choice(true, false)", CategoricalDistribution([True, False])),
        ("choice('hello', 'two words')", CategoricalDistribution(["hello", "two words"])),
        ("a,null,0.5", CategoricalDistribution(["a", None, 0.5])),
        ("sort(3,1,2)", CategoricalDistribution([1, 2, 3])),
        ("float(1,2)", CategoricalDistribution([1.0, 2.0])),
        ("5", CategoricalDistribution([5])),
        ("range(1,3)", IntDistribution(1, 3)),
        ("range(0,10,step=2)", IntDistribution(0, 10, step=2)),
        ("range(0.5, 5.5, step=1)", FloatDistribution(0.5, 5.5, step=1)),
        ("range(0,1,0.3)", FloatDistribution(0, 0.9, step=0.3)),
        ("interval(1, 5)", FloatDistribution(1, 5)),
        ("int(interval(1, 5))", IntDistribution(1, 5)),
        ("tag(log, interval(1, 5))", FloatDistribution(1, 5, log=True)),
        ("tag(log, int(interval(1, 64)))", IntDistribution(1, 64, log=True)),
        ("int(tag(log, interval(1, 64)))", IntDistribution(1, 64, log=True)),
    ],
)
def test_a_text_means_what_hydra_and_its_optuna_sweeper_mean_by_it(text: str, expected: BaseDistribution) -> None:
    (axis,) = parse_axes({"key": text}, {})
    assert distribution(axis) == expected


def test_a_shuffled_list_keeps_its_values_and_is_shuffled_the_same_way_each_time() -> None:
    first, again = (parse_axes({"key": "shuffle(range(1,30))"}, {})[0] for _ in range(2))
    assert first == again
    assert first.values != tuple(range(1, 30))
    assert sorted(first.values) == list(range(1, 30))


def test_lists_are_values_and_come_back_as_lists() -> None:
    (axis,) = parse_axes({"targets.modules": "[q_proj],[k_proj,v_proj]"}, {})
    assert axis.values == (["q_proj"], ["k_proj", "v_proj"])
    assert distribution(axis) == CategoricalDistribution(["[q_proj]", "[k_proj,v_proj]"])


def test_a_glob_takes_the_matching_files_of_its_group() -> None:
    files = {"quantization": ["fp32", "fp4", "nf4"]}
    (axis,) = parse_axes({"quantization": "glob(fp*)"}, {}, files.__getitem__)
    assert axis.values == ("fp32", "fp4")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("choice(1,", "read"),
        ("interval(5,1)", "larger"),
        ("tag(log, interval(0,1))", "above 0"),
        ("tag(log, choice(1,2))", "interval"),
        ("tag(lg, interval(1,2))", "no tag 'lg'"),
        ("range(5,1)", "empty"),
        ("range(1,5,0)", "step"),
        ("glob(*)", "group"),
    ],
)
def test_a_text_that_cant_be_meant_is_told_with_its_place(text: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        parse_axes({"lora.r": text}, {})
    assert caught.value.where == f"sweep.params.lora.r: {text}"
    assert caught.value.hint


def test_all_bad_texts_are_told_at_once() -> None:
    with pytest.raises(Problems) as caught:
        parse_axes({"lora.r": "range(5,1)", "seed": "interval(2,1)", "task": "a,b"}, {"lora.q": "task == a"})
    assert len(caught.value.errors) == 3


def test_a_grid_has_every_point_once_and_its_last_axis_varies_fastest() -> None:
    axes = parse_axes({"lora.r": "8,16", "quantization": "nf4,int8", "seed": "1"}, {})
    assert is_grid(axes)
    assert [tuple(point.values()) for point in grid(axes)] == [
        (8, "nf4", 1),
        (8, "int8", 1),
        (16, "nf4", 1),
        (16, "int8", 1),
    ]


def test_a_grid_over_a_range_stops_before_its_end_as_in_hydra() -> None:
    assert grid(parse_axes({"lora.r": "range(1,4)"}, {})) == [{"lora.r": 1}, {"lora.r": 2}, {"lora.r": 3}]


def test_an_interval_makes_no_grid() -> None:
    axes = parse_axes({"lora.r": "8,16", "lora.dropout": "interval(0,0.1)"}, {})
    assert not is_grid(axes)
    with pytest.raises(ConfigError, match="interval"):
        grid(axes)


def test_an_axis_whose_condition_doesnt_hold_is_left_out_and_doubles_nothing() -> None:
    axes = parse_axes(
        {"lora.alpha": "16,32", "lora.alpha_policy": "2r,fixed", "lora.r": "4,16"},
        {"lora.alpha": "lora.alpha_policy == fixed and lora.r > 8"},
    )
    assert grid(axes) == [
        {"lora.alpha_policy": "2r", "lora.r": 4},
        {"lora.alpha_policy": "2r", "lora.r": 16},
        {"lora.alpha_policy": "fixed", "lora.r": 4},
        {"lora.alpha": 16, "lora.alpha_policy": "fixed", "lora.r": 16},
        {"lora.alpha": 32, "lora.alpha_policy": "fixed", "lora.r": 16},
    ]


@pytest.mark.parametrize(
    ("condition", "searched_with"),
    [
        ("a in [1,3]", [1, 3]),
        ("a != 2", [1, 3]),
        ("a<=2", [1, 2]),
        ("a >= 2 and a < 3", [2]),
        ("a == 1", [1]),
    ],
)
def test_a_condition_compares_as_it_reads(condition: str, searched_with: list[int]) -> None:
    axes = parse_axes({"a": "1,2,3", "b": "9"}, {"b": condition})
    assert [point["a"] for point in grid(axes) if "b" in point] == searched_with


@pytest.mark.parametrize(
    ("condition", "word"),
    [
        ("lora.alpha_polic == fixed", "did you mean lora.alpha_policy"),
        ("lora.alpha_policy == fixe", "never holds"),
        ("lora.alpha_policy > 3", "numbers"),
        ("lora.alpha_policy = fixed", "parsed"),
        ("lora.alpha_policy == fixed or lora.r > 8", "parsed"),
        ("__import__('os')", "parsed"),
        ("lora.r in 8", "can't be used with"),
        ("", None),
    ],
)
def test_a_condition_that_cant_be_meant_is_told(condition: str, word: str | None) -> None:
    params = {"lora.alpha_policy": "2r,fixed", "lora.r": "4,16", "lora.alpha": "16,32"}
    if word is None:
        assert parse_axes(params, {"lora.alpha": condition})
        return
    with pytest.raises(ConfigError) as caught:
        parse_axes(params, {"lora.alpha": condition})
    assert word in str(caught.value)


def test_a_narrowed_axis_may_switch_off_what_depends_on_it() -> None:
    axes = parse_axes({"lora.r": "4", "lora.alpha": "16,32"}, {"lora.alpha": "lora.r > 8"}, narrowed=["lora.r"])
    assert grid(axes) == [{"lora.r": 4}]


def test_conditions_that_wait_for_each_other_are_told() -> None:
    with pytest.raises(ConfigError, match="depend on each other"):
        parse_axes({"a": "1,2", "b": "1,2"}, {"a": "b == 1", "b": "a == 1"})


@pytest.mark.parametrize("value", ["a b", "8", "it's", "null", "", "a,b", "x=y", 8, 1e-05, True, None, ["q", "8"]])
def test_an_override_is_read_back_as_the_value_it_was_made_from(value: Any) -> None:
    (text,) = point_overrides({"key": value})
    assert OverridesParser.create().parse_override(text).value() == value
