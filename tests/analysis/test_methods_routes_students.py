"""Sections on methods, ways to a small model, and students: what they compare, and what they don't claim."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import made_up

from qlora_exp.analysis.configurations import Measure, configurations
from qlora_exp.analysis.distilled import compare_students, fieller, student_sentence, students_section
from qlora_exp.analysis.routes import compare_routes, route_sentence, routes_section
from qlora_exp.analysis.tuning_methods import compare_methods, method_sentence, methods_section
from qlora_exp.records.shipped import Shipped
from qlora_exp.records.teacher_run import TeacherRun
from qlora_exp.records.types import RunRecord

LOSS = Measure("loss_per_item", False)


numbers = itertools.count()


def run(seed: int, loss: float, rate: float = 1e-3, validation: float | None = None, **settings: Any) -> RunRecord:
    """A run whose config has ``settings`` (group → values), scored on test."""
    flat = {f"{group}.{key}": value for group, values in settings.items() for key, value in values.items()}
    mode = settings.get("quantization", {}).get("mode", "nf4")
    made = made_up.run(
        next(numbers), loss=loss, validation_loss=validation, seed=seed, learning_rate=rate, mode=mode, settings=flat
    )
    assert isinstance(made, RunRecord)
    return made


def test_each_method_takes_part_with_the_rate_that_is_best_on_validation() -> None:
    records = []
    for seed in (1, 2, 3):
        noise = 0.01 * seed
        records.append(run(seed, 2.0 + noise))
        records.append(run(seed, 1.5 + noise, rate=1e-4, validation=1.5, method={"kind": "full"}))
        records.append(run(seed, 1.4 + noise, rate=1e-2, validation=9.9, method={"kind": "full"}))
    found = compare_methods(configurations(records, LOSS), LOSS)
    assert found is not None
    assert [result.name for result in found.results] == ["lora", "full"]
    assert found.results[1].rate == 1e-4  # the other one is better on test, which doesn't choose
    assert found.results[1].at_edge == "smallest"
    assert found.results[1].quality is not None
    assert found.results[1].quality.value == pytest.approx(0.5)
    assert "full is better than LoRA" in method_sentence(found)
    text = str(methods_section(found))
    assert "smallest that was tried" in text


def test_a_method_within_noise_is_not_called_better() -> None:
    records = [run(seed, 2.0 + noise) for seed, noise in ((1, 0.1), (2, -0.1), (3, 0.0))]
    records += [run(seed, 1.99 + n, method={"kind": "full"}) for seed, n in ((1, -0.1), (2, 0.1), (3, 0.0))]
    found = compare_methods(configurations(records, LOSS), LOSS)
    assert found is not None
    assert method_sentence(found).startswith("No method is shown to be better than LoRA")


def test_ways_are_compared_with_the_model_that_is_not_rounded() -> None:
    records = []
    shipped = Shipped("merged", "int2_asym_g64", 2.28, 1000)
    for seed in (1, 2, 3):
        noise = 0.01 * seed
        records.append(run(seed, 2.0 + noise, quantization={"mode": "fp32"}))
        rounded = run(seed, 3.0 + noise, quantization={"mode": "fp32"}, ship={"model": "merged", "format": "int2"})
        records.append(rounded.replace(shipped=shipped))
        kept = run(seed, 2.2 + noise, quantization={"mode": "nf4"}, ship={"model": "trained"})
        records.append(kept.replace(shipped=replace(shipped, model="trained", format=None)))
    found = compare_routes(configurations(records, LOSS), LOSS)
    assert found is not None
    assert found.results[0].name == "LoRA on fp32, not rounded"
    assert {r.name: r.difference and round(r.difference.value, 3) for r in found.results[1:]} == {
        "LoRA on fp32, merged, int2_asym_g64": -1.0,
        "LoRA on nf4, as trained": -0.2,
    }
    sentence = route_sentence(found)
    assert sentence.startswith("LoRA on nf4, as trained comes closest")
    assert "Shown to be worse than the exact model: LoRA on fp32, merged" in sentence
    assert "not rounded" in str(routes_section(found))
    assert compare_routes(configurations(records[::3], LOSS), LOSS) is None  # nothing ships


def test_the_share_of_the_gap_has_an_interval_only_if_there_is_a_gap() -> None:
    teacher = TeacherRun("t-1234", "f", 100, "test", 1000, 1.0, None, None)
    records = []
    for seed in (1, 2, 3):
        for weight, loss in ((1.0, 2.0), (0.0, 1.5)):
            settings = {"teacher": "t-1234", "gold_weight": weight, "divergence": "forward", "temperature": 1.0}
            student = run(seed, loss + 0.01 * (seed if weight else seed**2), distillation=settings)
            records.append(student.replace(teacher=teacher))
    found = compare_students(configurations(records, LOSS), LOSS)
    assert found is not None
    share = found.results[1].share
    assert share is not None
    assert share[0] == pytest.approx(0.46, abs=0.02)
    assert share[1] is not None
    assert share[2] is not None
    assert share[1] < share[0] < share[2]
    assert "of the gap to the teacher" in student_sentence(found)
    assert "teacher 1234" in str(students_section(found))
    other = [r.replace(teacher=replace(teacher, items=7)) for r in records]
    assert compare_students(configurations(other, LOSS), LOSS) is None  # the teacher was scored on other items
    assert fieller([0.5, 0.6, 0.4], [0.3, -0.4, 0.2])[1:] == (None, None)


def test_fieller_covers_the_ratio() -> None:
    drawn = np.random.default_rng(5)
    inside = 0
    for _ in range(400):
        b = 1.0 + 0.2 * drawn.standard_normal(4)
        a = 0.5 * b + 0.1 * drawn.standard_normal(4)
        _, low, high = fieller(a, b)
        inside += low is not None and high is not None and low <= 0.5 <= high
    assert 0.92 <= inside / 400 <= 0.98
