"""Objectives and constraints are paths into the record, checked when they are read."""

from __future__ import annotations

import pytest

from qlora_exp.errors import ConfigError
from qlora_exp.records.types import Device, Environment, Memory, RunRecord, Scores, ScoreTable, Speed, Status
from qlora_exp.study.objectives import objective_value, parse_constraint, parse_objective, violation_of

ENVIRONMENT = Environment(*("3.11", "Linux", {}, Device("cpu", None, 1, None, None, None, False)), *(None,) * 7)


def a_record(**changes: object) -> RunRecord:
    base = RunRecord(1, "r", "r", Status.COMPLETED, "2026-01-01", None, {"lora": {"r": 8}}, ENVIRONMENT)
    return base.replace(**changes)


def test_an_objective_is_read_and_its_value_found() -> None:
    objective = parse_objective("maximize scores.after.accuracy")
    assert objective.direction == "maximize"
    record = a_record(scores=ScoreTable(after=Scores("validation", 10, accuracy=0.5, other={"chrf": 3.0})))
    assert objective_value(record, objective.field) == 0.5
    assert objective_value(record, parse_objective("minimize scores.after.other.chrf").field) == 3.0
    assert objective_value(record, "config.lora.r") == 8.0


def test_what_is_unknown_or_not_finite_has_no_value() -> None:
    record = a_record(speed=Speed(train_seconds=float("nan")))
    assert objective_value(record, "scores.after.loss") is None
    assert objective_value(record, "speed.train_seconds") is None


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("minimize scores.after.los_per_item", "scores.after.loss_per_item"),
        ("lower scores.after.loss", "minimize FIELD"),
        ("minimize name", "no numeric field"),
        ("minimize", "no numeric field"),
        ("minimize scores.after.other.", "no numeric field"),
    ],
)
def test_an_objective_that_no_record_has_is_told_with_the_nearest(text: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_objective(text)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "violation"),
    [
        ("memory.peak_train_bytes <= 8e9", 1e9),
        ("memory.peak_train_bytes<=1e10", -1e9),
        ("memory.peak_train_bytes >= 1e10", 1e9),
        ("memory.peak_load_bytes <= 1", 0.0),
    ],
)
def test_a_constraint_is_broken_by_as_much_as_the_bound_is_passed_and_never_by_the_unknown(
    text: str, violation: float
) -> None:
    record = a_record(memory=Memory(peak_train_bytes=9_000_000_000))
    assert violation_of(record, parse_constraint(text)) == violation


@pytest.mark.parametrize(
    "text", ["memory.peak_train_bytes < 8e9", "memory.peak_train_bytes <= much", "memory.peak_trai_bytes <= 1"]
)
def test_a_constraint_that_cant_be_meant_is_told(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_constraint(text)


def test_model_state_is_the_sum_of_its_parts_and_unknown_with_any_of_them() -> None:
    field = parse_objective("minimize memory.model_state_bytes").field
    whole = Memory(100, 20, 3, gradient_bytes=4, optimizer_bytes=5)
    assert objective_value(a_record(memory=whole), field) == 132.0
    assert objective_value(a_record(memory=Memory(100, 20, 3, gradient_bytes=4)), field) is None
