"""Margins with a unit: what a user may write, how large it is, and in which units it is shown."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import made_up

from qlora_exp.analysis.margin import (
    Levels,
    Margin,
    MarginUnit,
    margin_units,
    margin_words,
    parse_margin,
    task_slope,
)
from qlora_exp.errors import AnalysisError
from qlora_exp.records.types import RunRecord, Scores, ScoreTable

LEVELS = Levels(loss_per_item=2.0, tokens_per_item=40.0, tuning_gain_per_item=5.0)


@pytest.mark.parametrize(
    ("written", "shown", "nats_per_item"),
    [
        ("0.25%", "0.25%", 0.005),
        (" 0.25 % of the loss", "0.25%", 0.005),
        ("0.5 percent", "0.5%", 0.01),
        ("0.1 nats_per_item", "0.1 nats_per_item", 0.1),
        ("0.1 nats per item", "0.1 nats_per_item", 0.1),
        (".002 nats/token", "0.002 nats_per_token", 0.08),
        ("1% of the tuning gain", "1% of the tuning gain", 0.05),
        (0.1, "0.1 nats_per_item", 0.1),
        ("1e-3", "0.001 nats_per_item", 0.001),
    ],
)
def test_every_way_to_write_a_margin_has_its_size_and_is_shown_alike(
    written: object, shown: str, nats_per_item: float
) -> None:
    margin = parse_margin(written)
    assert str(margin) == shown
    assert margin.per_item(LEVELS) == pytest.approx(nats_per_item)
    assert parse_margin(str(margin)) == margin


@pytest.mark.parametrize(
    ("written", "what", "hint"),
    [
        ("0.1 nats_per_itme", "unknown unit 'nats_per_itme'", "did you mean nats_per_item"),
        ("0.5 points", "unknown unit 'points'", "% of the loss, nats_per_item, nats_per_token, % of the tuning gain"),
        ("0.25% 0.1 nats_per_item", "2 margins", "one number"),
        (["0.25%", "0.1"], "2 margins", "one number"),
        ("0,25%", "2 margins", "decimal point"),
        ("little", "'little' is not a margin", "0.25%"),
        (True, "True is not a margin", "0.25%"),
        ("about 0.1", "'about 0.1' is not a margin", "the number comes first"),
        ("0%", "invalid margin 0%", "above 0"),
        (-0.1, "invalid margin -0.1", "above 0"),
    ],
)
def test_what_is_no_margin_is_refused_with_the_valid_units(written: object, what: str, hint: str) -> None:
    with pytest.raises(AnalysisError) as error:
        parse_margin(written, where="sweep.ladder.margin")
    assert what in error.value.what
    assert hint in (error.value.hint or "")
    assert error.value.where == "sweep.ladder.margin"


@pytest.mark.parametrize("written", ["0.002 nats_per_token", "1% of the tuning gain"])
def test_a_margin_relative_to_something_unknown_has_no_size(written: str) -> None:
    with pytest.raises(AnalysisError, match="has no size"):
        parse_margin(written).per_item(Levels(loss_per_item=2.0))


def test_a_tuning_that_gained_nothing_gives_no_margin() -> None:
    with pytest.raises(AnalysisError, match="not above 0"):
        parse_margin("1% of the tuning gain").per_item(replace(LEVELS, tuning_gain_per_item=-0.1))


def test_a_number_without_a_unit_has_the_unit_that_its_reader_gives_it() -> None:
    assert parse_margin("0.5", MarginUnit.SCORE) == Margin(0.5, MarginUnit.SCORE)
    assert str(parse_margin("0.5", MarginUnit.SCORE)) == "0.5"


def run(loss: float | None, accuracy: float | None = None, exact_match: float | None = None) -> RunRecord:
    scores = Scores(split="test", items=100, loss_per_item=loss, accuracy=accuracy, exact_match=exact_match)
    return replace(made_up.run(), scores=ScoreTable(test=scores))


def test_a_margin_is_shown_in_the_tasks_own_metric() -> None:
    slope = task_slope([run(2.0 - 0.1 * step, 0.5 + 0.02 * step) for step in range(5)])
    assert slope is not None
    units = margin_units(0.1, LEVELS, slope)
    assert units.task is not None
    assert (units.task.metric, units.task.runs) == ("accuracy", 5)
    assert (units.task.value, units.task.r) == (pytest.approx(0.02), pytest.approx(1.0))
    assert (units.share_of_loss, units.nats_per_token) == (pytest.approx(0.05), pytest.approx(0.0025))
    assert margin_words("5%", units) == (
        "5% of the loss = 0.1 nats per item = 0.0025 nats per token, about 2 points of accuracy (r = 1 over 5 runs)"
    )
    assert units.as_object()["task"] == {"metric": "accuracy", "value": units.task.value, "r": 1.0, "runs": 5}


def test_the_tasks_metric_is_unknown_where_the_runs_cannot_show_it() -> None:
    few = [run(2.0 - 0.1 * step, 0.5 + 0.02 * step) for step in range(3)]
    assert task_slope([*few, run(None, 0.9), run(1.0)]) is None, "fewer than four runs with both"
    assert task_slope([run(2.0, 0.5 + 0.02 * step) for step in range(5)]) is None, "equal losses"
    narrow = task_slope([run(2.0 - 0.001 * step, 0.5 + 0.02 * step) for step in range(5)])
    assert margin_units(0.1, LEVELS, narrow).task is None, "the slope would be extrapolated"


def test_generated_answers_show_the_margin_in_exact_matches() -> None:
    slope = task_slope([run(2.0 - 0.1 * step, exact_match=0.3 + 0.01 * step) for step in range(4)])
    assert slope is not None
    assert slope.metric == "exact_match"


def test_an_unknown_margin_has_no_units() -> None:
    assert margin_words("0.25%", margin_units(None, None)) == "0.25%"
