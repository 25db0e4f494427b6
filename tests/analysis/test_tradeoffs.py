from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import made_up

from qlora_exp.analysis.configurations import Configuration, Measure, configurations, measure_of
from qlora_exp.analysis.quantization import compare_targets
from qlora_exp.analysis.tradeoffs import (
    ParetoStatus,
    equal_parameters_hint,
    front,
    targets_at_equal_parameters,
)
from qlora_exp.records.types import RunRecord

LOSS = Measure("loss_per_item", False)


def of(*records: RunRecord) -> list[Configuration]:
    return configurations(records, LOSS)


def standings(*records: RunRecord) -> dict[float, ParetoStatus]:
    found = front(of(*records), LOSS)
    return {
        round(c.quality.mean, 3): standing
        for c, standing in zip(found.configurations, found.statuses, strict=True)
        if c.quality is not None
    }


def test_the_front_is_what_no_other_configuration_beats_by_brute_force() -> None:
    draw = np.random.default_rng(3)
    records = [
        made_up.run(
            number, loss=float(a), memory=float(b * 1e7), speed=float(c * 1e3), r=1, learning_rate=1e-5 * (number + 1),
            mode=("nf4", "fp16")[number % 2],
        )
        for number, (a, b, c) in enumerate(draw.uniform(1, 2, (120, 3)).round(1))
    ]  # fmt: skip
    found = front(of(*records), LOSS)
    points = [(c.quality.mean, c.memory_bytes, -c.tokens_per_second) for c in found.configurations]  # type: ignore
    for point, standing in zip(points, found.statuses, strict=True):
        beaten = any(all(x <= y for x, y in zip(other, point, strict=True)) and other != point for other in points)
        assert (standing is ParetoStatus.FRONT) == (not beaten)


def test_a_configuration_within_the_seeds_noise_of_the_front_is_not_called_dominated() -> None:
    noisy = [
        made_up.run(number, loss=level + shift, seed=seed, mode=mode, memory=memory)
        for number, (level, shift, seed, mode, memory) in enumerate(
            (level, shift, seed, mode, memory)
            for level, mode, memory in ((1.5, "fp16", 1e7), (1.52, "nf4", 2e7), (2.5, "int8", 3e7))
            for seed, shift in ((1, -0.05), (2, 0.05), (3, 0.0))
        )
    ]
    assert standings(*noisy) == {1.5: ParetoStatus.FRONT, 1.52: ParetoStatus.NEAR, 2.5: ParetoStatus.DOMINATED}


def test_no_front_is_drawn_with_a_single_quantization() -> None:
    found = front(of(made_up.run(0, r=8), made_up.run(1, r=16)), LOSS)
    assert found.statuses == ()
    assert "only nf4 was" in str(found.why_none)


def test_targets_are_compared_at_equal_rank_and_at_equally_many_parameters() -> None:
    records = [
        made_up.run(0, targets="all_linear", r=8, loss=1.5),
        made_up.run(1, targets="attention", r=8, loss=1.7),
        made_up.run(2, targets="attention", r=22, loss=1.6),
    ]
    at_rank = compare_targets(of(*records), LOSS)
    assert at_rank is not None
    (at_parameters,) = targets_at_equal_parameters(of(*records), LOSS)
    assert at_rank.contrasts[0].difference.value == pytest.approx(-0.2)
    assert at_parameters.gain.mean == pytest.approx(-0.1)
    assert at_parameters.parameters_ratio == pytest.approx(1.0, abs=0.1)


def test_the_score_that_every_run_has_is_the_one_compared() -> None:
    with_loss = made_up.run(0)
    assert with_loss.scores.test is not None
    assert measure_of([with_loss]) == LOSS
    # A loss per item counts the end tokens, and a template has its own.
    assert measure_of([with_loss, made_up.run(3, written="chat")]) == Measure("bits_per_byte", False)
    nan = made_up.run(1, loss=float("nan"))
    assert measure_of([with_loss, nan]) == Measure("accuracy", True)


def test_seeds_of_one_configuration_share_its_interval() -> None:
    (found,) = of(*(made_up.run(s, seed=s, loss=loss) for s, loss in ((1, 1.0), (2, 1.2), (3, 1.4))))
    assert found.quality is not None
    assert found.quality.low is not None
    assert found.quality.mean == pytest.approx(1.2)
    assert found.quality.low == pytest.approx(1.2 - 4.302653 * 0.2 / 3**0.5)


def test_the_ranks_that_would_make_target_sets_equally_large_are_said() -> None:
    # 14,000, 9,000 and 5,000 parameters per unit of rank.
    found = of(*(made_up.run(n, targets=name, r=9) for n, name in enumerate(("all_linear", "mlp", "attention"))))
    told = equal_parameters_hint(found)
    assert told is not None
    assert "mlp at r = 14, attention at r = 25 would have as many as all_linear at r = 9" in told
    assert equal_parameters_hint(found[:1]) is None
