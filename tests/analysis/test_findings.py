"""The answers of docs/findings.md: a planted effect is found, an absent one isn't, few runs decide nothing."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_exp.config.compose import compose

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS, DOCS = ROOT / "tests" / "benchmarks", ROOT / "docs"
SEEDS = 4


@pytest.fixture(scope="module")
def findings() -> Iterator[Any]:
    """The script as a module; ``plan``, ``answers`` and ``page`` are its parts."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        module = importlib.import_module("findings")
        vars(module)["plan"] = importlib.import_module("findings_runs")
        vars(module)["answers"] = importlib.import_module("findings_answers").answers
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


def model_of(findings: Any) -> Any:
    small = {"quantization_seeds": SEEDS, "curve_seeds": SEEDS, "rate_seeds": SEEDS, "items": 60}
    return replace(findings.MODELS[0], **small)


def made_up(
    findings: Any,
    nf4_cost: float = 0.0,
    rank_cost: float = 0.0,
    exponents: tuple[float, float] = (0.0, -0.5),
    noise: float = 0.001,
    random_seed: int = 0,
    beyond: int = 2,
) -> list[Any]:
    """Runs of the whole plan with known effects.

    ``nf4_cost``: share of the loss. ``rank_cost``: share of the loss for each halving below r = 64. ``exponents``: of
    the best rate under a fixed alpha and under alpha = 2r. ``noise``: of one run, as a share of the loss.
    ``beyond``: how often rates beyond the grids are run.
    """
    model, draw = model_of(findings), np.random.default_rng(random_seed)
    items, of_seed = draw.gamma(2.0, 1.0, model.items), draw.normal(0, 0.02, SEEDS + 1)
    runs: list[Any] = []
    for _ in range(1 + beyond):
        for point in findings.planned(model, runs):
            if point in {run.point for run in runs}:
                continue
            fixed, at_2r = exponents
            exponent = fixed if point.alpha == findings.plan.FIXED_ALPHA else at_2r
            doublings = math.log2(point.rank / findings.plan.CENTRE_RANK)
            off = math.log2(point.learning_rate / model.centre) - exponent * doublings
            cost = nf4_cost * (point.quantization == "nf4") + rank_cost * math.log2(64 / point.rank)
            factor = (1 + 0.03 * off**2 + cost) * (1 + of_seed[point.seed] + draw.normal(0, noise))
            losses = items * factor * (1 + draw.normal(0, 0.005, model.items))
            curve = {step: 3.0 * factor / step for step in (1, 5, 10, 40)}
            figures = (40, 16, 58368 * point.rank // 4, 1521, 4.0, "2026-12-01", "torch 2.13.0")
            runs.append(findings.Run(point, "COMPLETED", *figures, curve, losses.tolist()))
    return runs


def verdicts(findings: Any, runs: Sequence[Any]) -> dict[str, str]:
    found = findings.answers(model_of(findings), runs)
    return {
        "quantization": found.quantization.verdict,
        **{f"curves {each.policy}": each.verdict for each in found.curves},
        **{f"rates {each.policy}": each.verdict for each in found.rates},
    }


def test_without_an_effect_all_claims_hold(findings: Any) -> None:
    assert set(verdicts(findings, made_up(findings)).values()) == {"holds"}


def test_planted_effects_are_found_one_by_one(findings: Any) -> None:
    costly = verdicts(findings, made_up(findings, nf4_cost=0.03))
    assert [name for name, verdict in costly.items() if verdict == "does not hold"] == ["quantization"]
    ranks = verdicts(findings, made_up(findings, rank_cost=0.01))
    assert [name for name, verdict in ranks.items() if verdict == "does not hold"] == ["curves fixed", "curves 2r"]
    moving = verdicts(findings, made_up(findings, exponents=(-0.6, 0.3)))
    assert {name for name, verdict in moving.items() if verdict == "does not hold"} >= {"rates fixed", "rates 2r"}


def test_a_positive_difference_means_worse(findings: Any) -> None:
    found = findings.answers(model_of(findings), made_up(findings, nf4_cost=0.03, rank_cost=0.01))
    assert found.quantization.difference.value == pytest.approx(0.03, abs=0.005)
    for answer in found.curves:
        smallest = answer.curves[0]
        assert smallest.test_difference.value == pytest.approx(0.04, abs=0.005)
        assert smallest.curve_difference.value == pytest.approx(0.04, abs=0.005)


def test_noise_decides_nothing(findings: Any) -> None:
    for number in range(4):
        found = verdicts(findings, made_up(findings, noise=0.5, random_seed=number))
        assert set(found.values()) == {"not decided"}


def test_the_intervals_contain_the_planted_exponents(findings: Any) -> None:
    inside = []
    for number in range(12):
        runs = made_up(findings, exponents=(0.1, -0.7), noise=0.01, random_seed=number)
        for answer, truth in zip(findings.answers(model_of(findings), runs).rates, (0.1, -0.7), strict=True):
            inside.append(answer.exponent.low < truth < answer.exponent.high)
            assert answer.exponent.value == pytest.approx(truth, abs=0.15)
    assert sum(inside) >= 20, "of 24 intervals at 95 %"


def test_a_best_rate_at_the_edge_of_the_grid_is_run_beyond(findings: Any) -> None:
    model, runs = model_of(findings), made_up(findings, exponents=(-1.3, -0.5), beyond=0)
    beyond = set(findings.planned(model, runs)) - set(findings.planned(model))
    assert {point.rank for point in beyond} == {32, 64}, "4 and 16 have it one step off the centre"
    assert {point.seed for point in beyond} == set(range(1, SEEDS + 1))
    assert all(point.alpha == findings.plan.FIXED_ALPHA for point in beyond)


def test_a_run_that_diverged_is_counted_and_its_rate_isnt_the_best(findings: Any) -> None:
    runs = made_up(findings)
    lost = [replace(run, losses=None) if run.point.seed == 1 else run for run in runs]
    found = findings.answers(model_of(findings), lost)
    assert (found.quantization.seeds, found.quantization.lost) == (SEEDS - 1, 1)
    first = runs[[run.point.quantization for run in runs].index("fp32")].point
    one = [replace(run, losses=None) if run.point == first else run for run in runs]
    rates = next(each for each in findings.answers(model_of(findings), one).rates if each.policy == "fixed")
    best = next(each for each in rates.ranks if each.rank == first.rank)
    assert best.losses[best.rates.index(pytest.approx(first.learning_rate, rel=1e-3))] == math.inf
    assert best.best.value != pytest.approx(first.learning_rate, rel=1e-3)


def test_the_data_file_keeps_what_the_answers_need(findings: Any, tmp_path: Path) -> None:
    runs = made_up(findings)
    findings.save(runs, tmp_path / "runs.csv")
    kept = findings.load(tmp_path / "runs.csv")
    assert [run.point for run in kept] == [run.point for run in runs]
    assert all(a.losses == pytest.approx(b.losses, abs=6e-4) for a, b in zip(kept, runs, strict=True))
    assert verdicts(findings, kept) == verdicts(findings, runs)


def test_the_page_is_that_of_its_data_file(findings: Any) -> None:
    assert findings.whole_page(DOCS / "findings.csv") == (DOCS / "findings.md").read_text(encoding="utf-8")


def test_the_planned_settings_are_valid(findings: Any) -> None:
    for model in findings.MODELS[:2]:
        for point in findings.planned(model)[:2]:
            config = compose([*findings.model_overrides(model), *findings.point_overrides(model, point)])
            assert (config.lora.r, config.lora.alpha) == (point.rank, point.alpha)
            assert config.quantization.mode.value == point.quantization
            assert config.evaluation.split.value == "test"


def made_up_methods(methods: Any, ratio: float, forgets_more: float, noise: float = 0.01) -> list[Any]:
    """Runs of both methods. ``ratio``: of the best rates. ``forgets_more``: nats per byte of full tuning."""
    draw, runs = np.random.default_rng(2), []
    best = {"lora": methods.CENTRES["lora"], "full": methods.CENTRES["lora"] / ratio}
    for _ in range(4):
        for point in methods.points(runs):
            if point in {run.point for run in runs}:
                continue
            off = math.log2(point.learning_rate / best[point.method])
            losses = (1 + 0.1 * off**2 + draw.normal(0, noise)) * np.ones(methods.ITEMS)
            forgetting = 0.3 + (forgets_more if point.method == "full" else 0.0) + draw.normal(0, noise)
            runs.append(methods.MethodRun(point, "completed", 10, 1.0, "2026-12-01", list(losses), forgetting))
    return runs


@pytest.mark.parametrize(
    ("ratio", "forgets_more", "verdicts"),
    [(10.0, 0.2, ("holds", "holds")), (2.0, -0.2, ("does not hold", "does not hold"))],
)
def test_planted_differences_of_methods_are_found(
    findings: Any, ratio: float, forgets_more: float, verdicts: tuple[str, str]
) -> None:
    methods = importlib.import_module("findings_methods")
    found = methods.method_answers(made_up_methods(methods, ratio, forgets_more), draws=500)
    assert abs(math.log2(found.ratio.value / ratio)) < 0.2
    assert found.ratio_verdict == verdicts[0]
    assert found.forgetting_verdict == verdicts[1]
    assert [len(runs) for runs in found.best.values()] == [methods.SEEDS] * 2


def test_the_methods_data_file_keeps_what_the_answers_need(findings: Any, tmp_path: Path) -> None:
    methods = importlib.import_module("findings_methods")
    runs = methods.load_methods(DOCS / "findings_methods.csv")
    methods.save_methods(runs, tmp_path / "again.csv")
    assert methods.load_methods(tmp_path / "again.csv") == runs
    compose([*methods.SETTINGS, "method=full", "training.learning_rate=4e-4"])
