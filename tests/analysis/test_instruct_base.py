from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import made_up

from qlora_exp.analysis.configurations import Measure, configurations
from qlora_exp.analysis.instruct_base import Difference, InstructBase, Losses, compare, verdict
from qlora_exp.records import RunRecord

CELLS = (("base", "plain"), ("base", "chat"), ("instruct", "plain"), ("instruct", "chat"))


def study(instruct_gain: float, cells: tuple[tuple[str, str], ...] = CELLS, seeds: int = 3) -> list[RunRecord]:
    draw = np.random.default_rng(1)
    return [
        made_up.run(
            10 * cell + seed,
            variant=variant,
            written=written,
            seed=seed,
            loss=1.5 - instruct_gain * (variant == "instruct") + float(draw.normal(0, 0.005)),
        )
        for cell, (variant, written) in enumerate(cells)
        for seed in range(1, seeds + 1)
    ]


def compared(records: list[RunRecord], losses: Losses | None = None, margin: float | None = None) -> InstructBase:
    found = compare(configurations(records, Measure("loss_per_item", False)), losses, margin)
    assert found is not None
    return found


def test_a_clear_gain_of_instruct_is_called_better_and_its_opposite_worse() -> None:
    assert ": better." in compared(study(0.5)).sentence
    assert ": worse." in compared(study(-0.5)).sentence


def test_all_four_cells_are_compared_and_none_hides_another() -> None:
    found = compared(study(0.5))
    assert [c.name for c in found.cells] == ["base, plain", "base, chat", "instruct, plain", "instruct, chat"]
    assert found.missing == ()
    assert "The chat template gains within each: base" in found.sentence


def test_equivalence_is_said_only_within_a_margin_that_was_given() -> None:
    assert ": not settled." in compared(study(0.0)).sentence
    assert ": equivalent within ±0.1." in compared(study(0.0), margin=0.1).sentence


def test_a_single_seed_never_settles_what_tuning_did() -> None:
    assert ": not settled." in compared(study(0.5, seeds=1)).sentence
    assert verdict(Difference(0.5, 0.4, 0.6, 1, "1000 items alone"), None) == "not settled"


def test_missing_cells_are_named_and_the_rest_is_compared() -> None:
    found = compared(study(0.5, (("base", "plain"), ("instruct", "chat"))))
    assert found.missing == ("base in the chat format", "instruct in the plain format")
    assert found.tuned is not None
    assert "chat template gains" not in found.sentence


def test_one_variant_alone_is_no_comparison() -> None:
    assert compare(configurations(study(0.0, CELLS[:2]), Measure("loss_per_item", False))) is None


def test_a_cell_is_chosen_on_validation_and_judged_on_test() -> None:
    lucky = made_up.run(90, variant="instruct", written="chat", learning_rate=0.1, loss=0.1, validation_loss=9.0)
    found = compared([*study(0.2), lucky])
    (cell,) = (c for c in found.cells if c.name == "instruct, chat")
    assert cell.tuned is not None
    assert cell.tuned > 0.2
    assert cell.searched == 2


def test_items_that_pair_give_an_interval_over_seeds_and_items() -> None:
    items = np.random.default_rng(0).normal(1.0, 0.5, 200)

    def losses(record: RunRecord, moment: str) -> Mapping[str, float]:
        shift = -0.1 * (record.config["model"]["variant"] == "instruct") + 0.001 * (record.seed or 0)
        return {str(i): float(value) + shift for i, value in enumerate(items)}

    found = compared(study(0.5), losses)
    assert found.tuned is not None
    assert found.tuned.over == "3 seeds and 200 items"
    assert abs(found.tuned.value - 0.1) < 1e-9
