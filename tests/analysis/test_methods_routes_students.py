"""Sections on methods, ways to a small model, and students: what they compare, and what they don't claim."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent))

import made_up

from qlora_exp.analysis.configurations import Measure, configurations
from qlora_exp.analysis.distilled import compare_students, ratio_of_means, student_sentence, students_section
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


TEACHER = TeacherRun("t-1234", "f", 100, "test", 1000, 1.0, None, None)


def student(seed: int, gold_weight: float, loss: float, **settings: Any) -> RunRecord:
    learned = {"teacher": "t-1234", "gold_weight": gold_weight, "divergence": "forward", "temperature": 1.0}
    return run(seed, loss, distillation=learned | settings).replace(teacher=TEACHER)


def students(alone: float = 2.0, taught: float = 1.5) -> list[RunRecord]:
    records = []
    for seed in (1, 2, 3):
        records += [student(seed, 1.0, alone + 0.01 * seed), student(seed, 0.0, taught + 0.01 * seed**2)]
    return records


def test_the_share_of_the_gap_has_an_interval_only_if_there_is_a_gap() -> None:
    records = students()
    found = compare_students(configurations(records, LOSS), LOSS)
    assert found is not None
    share = found.results[1].share
    assert share is not None
    assert share.value == pytest.approx(0.46, abs=0.02)
    assert share.low is not None
    assert share.high is not None
    assert share.low < share.value < share.high
    assert share.over == "3 seeds"
    assert "of the gap to the teacher" in student_sentence(found)
    assert "teacher 1234" in str(students_section(found))
    assert "the teacher's scores of single items aren't kept" in str(students_section(found))
    other = [r.replace(teacher=replace(TEACHER, items=7)) for r in records]
    assert compare_students(configurations(other, LOSS), LOSS) is None  # the teacher was scored on other items
    gained, gap = np.array([[0.5], [0.6], [0.4]]), np.array([[0.3], [-0.4], [0.2]])
    assert ratio_of_means(gained, gap)[1:] == (None, None)
    assert ratio_of_means(gained[:1], gap[:1])[1:] == (None, None)


def test_a_teacher_that_is_worse_than_the_student_leaves_no_gap_to_close() -> None:
    found = compare_students(configurations(students(alone=0.8, taught=0.5), LOSS), LOSS)
    assert found is not None
    assert found.results[1].share is None
    assert "of the gap" not in student_sentence(found)
    assert "there is no gap to close" in str(students_section(found))


def test_a_student_is_called_better_only_if_all_bounds_hold_together() -> None:
    noise = {1: 0.010, 2: -0.010, 3: 0.0}
    records = [student(seed, 1.0, 2.0) for seed in noise]
    records += [student(seed, 0.0, 1.97 + noise[seed]) for seed in noise]
    alone = compare_students(configurations(records, LOSS), LOSS)
    assert alone is not None
    assert " is better than one that learns the rows' answers alone by " in student_sentence(alone)
    for temperature in (2.0, 3.0, 4.0, 5.0):
        records += [student(seed, 0.0, 2.0 + noise[seed], temperature=temperature) for seed in noise]
    among_five = compare_students(configurations(records, LOSS), LOSS)
    assert among_five is not None
    assert len(among_five.results) == 6
    assert student_sentence(among_five).startswith("No student is shown to be better")
    one_seed = compare_students(configurations([r for r in records if r.seed == 1], LOSS), LOSS)
    assert one_seed is not None
    assert student_sentence(one_seed).startswith("No student is shown to be better")


def test_students_that_differ_in_top_k_alone_are_two() -> None:
    records = [student(seed, 1.0, 2.0, top_k=64) for seed in (1, 2)]
    records += [student(seed, 0.0, loss, top_k=k) for seed in (1, 2) for k, loss in ((8, 1.6), (64, 1.5))]
    found = compare_students(configurations(records, LOSS), LOSS)
    assert found is not None
    assert [r.learns for r in found.results[1:]] == [
        "the teacher's probabilities, top 8",
        "the teacher's probabilities, top 64",
    ]


def test_the_items_variation_is_in_the_interval_of_the_share() -> None:
    drawn = np.random.default_rng(7)
    names = [f"item-{n}" for n in range(300)]
    hardness = drawn.normal(2.0, 0.5, 300)
    losses: dict[str, np.ndarray[Any, Any]] = {"t-1234": hardness - 1 + drawn.normal(0, 1.0, 300)}
    records = students()
    for record in records:
        gain = 0.5 if record.config["distillation"]["gold_weight"] == 0 else 0.0
        losses[record.run_id] = hardness - gain + drawn.normal(0, 1.0, 300)
    found = compare_students(
        configurations(records, LOSS),
        LOSS,
        lambda record, moment, score: dict(zip(names, losses[record.run_id].tolist(), strict=True)),
    )
    assert found is not None
    share = found.results[1].share
    assert share is not None
    assert share.over == "3 seeds and 300 items"
    taught, alone = ([r for r in records if r.config["distillation"]["gold_weight"] == w] for w in (0.0, 1.0))
    gained = np.array([losses[b.run_id] - losses[a.run_id] for a, b in zip(taught, alone, strict=True)])
    gap = np.array([losses[b.run_id] - losses["t-1234"] for b in alone])
    assert (share.value, share.low, share.high) == pytest.approx(ratio_of_means(gained, gap))
    assert "over 3 seeds and 300 items" in str(students_section(found))


def test_without_items_the_interval_is_fiellers_own() -> None:
    a, b = np.array([[0.5], [0.7], [0.45], [0.52]]), np.array([[1.1], [1.2], [0.9], [0.97]])
    ratio, low, high = ratio_of_means(a, b)
    n, t2 = len(a), float(stats.t.ppf(0.975, len(a) - 1)) ** 2
    aa, ab, _, bb = np.cov(a[:, 0], b[:, 0]).ravel() / n
    middle, square = a.mean() * b.mean() - t2 * ab, b.mean() ** 2 - t2 * bb
    half = np.sqrt(middle**2 - square * (a.mean() ** 2 - t2 * aa))
    assert ratio == pytest.approx(a.mean() / b.mean())
    assert (low, high) == pytest.approx(((middle - half) / square, (middle + half) / square), abs=1e-6)


def test_the_interval_covers_the_share_over_new_seeds_and_items() -> None:
    drawn = np.random.default_rng(5)
    both = seeds_alone = 0
    for _ in range(300):
        seeds, items = 3, 80
        gap_of_item, gain_of_item = 1.0 + drawn.normal(0, 1.5, items), 0.5 + drawn.normal(0, 1.0, items)
        seed = drawn.normal(0, 0.03, (2, seeds, 1))
        gap = gap_of_item + seed[0] + drawn.normal(0, 0.5, (seeds, items))
        gained = gain_of_item + seed[1] + drawn.normal(0, 0.5, (seeds, items))
        for counts in (True, False):
            rows = (gained, gap) if counts else (gained.mean(1, keepdims=True), gap.mean(1, keepdims=True))
            _, low, high = ratio_of_means(*rows)
            inside = low is not None and high is not None and low <= 0.5 <= high
            both, seeds_alone = both + (inside and counts), seeds_alone + (inside and not counts)
    assert both / 300 >= 0.92
    assert seeds_alone / 300 < 0.85
