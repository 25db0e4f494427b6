"""The replay: a known answer is found, a pool that contradicts the grid is seen, and the
committed page follows from the committed runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from made_up_grid import RANKS, SEEDS, made_up_grid

from qlora_exp.analysis.error_rates import replay_page
from qlora_exp.analysis.error_rates.replay import (
    DATA,
    PLAN,
    allowed_verdicts,
    decide_from_pool,
    load,
    main,
    noise_of,
    replay,
    save,
)
from qlora_exp.analysis.rank_rule import StepVerdict, make_rule
from qlora_exp.errors import AnalysisError

ROOT = Path(__file__).resolve().parents[2]


def test_a_clear_answer_is_found_by_every_ladder_at_a_fraction_of_the_grid() -> None:
    row = replay(made_up_grid(), margin=0.1, r_start=1, draws=20, seed=1)
    assert (row.grid.verdict, row.grid.recommended_rank) == (StepVerdict.STOP, 4)
    assert (row.decided, row.compatible, row.unjudged, row.exact, row.grids_agree) == (1, 1, 0, 1, 1)
    # Ranks 1, 4, 8 and 16 of five (r = 1 → 4 continues, 4 → 16 doesn't), three seeds of eight, and the pilots at r = 1.
    pilots = 3 * 101
    spent, whole = PLAN.first * (1 + 4 + 8 + 16 + 400) + pilots, SEEDS * (31 + 500) + pilots
    assert row.flops == pytest.approx((spent / whole, spent / whole))
    assert row.regret == pytest.approx((0.02, 0.02), abs=0.02)


def test_a_pool_that_contradicts_the_grid_is_counted_as_incompatible() -> None:
    reference = replace(made_up_grid(), pool=made_up_grid(gains=(0.01, 0.01, 0.01, 0.01)).pool)
    row = replay(reference, margin=0.1, r_start=1, draws=10, seed=1)
    assert (row.decided, row.compatible, row.exact) == (1, 0, 0)


def test_gains_at_the_margin_may_be_called_either_way() -> None:
    reference = made_up_grid(gains=(0.1, 0.1, 0.1, 0.1), item_sd=0.05)
    rule = make_rule(0.1)
    limits = [allowed_verdicts(comparison, rule) for comparison in reference.answer(rule).comparisons]
    assert limits == [frozenset({StepVerdict.CONTINUE, StepVerdict.STOP})] * 4
    assert replay(reference, margin=0.1, r_start=1, draws=10, seed=1).compatible == 1


def test_a_grid_that_is_itself_inconclusive_judges_nobody() -> None:
    clear = made_up_grid()
    noisy = made_up_grid(gains=(0.1, 0.1, 0.1, 0.1), seed_sd=1.0, seed=3).grid
    row = replay(replace(clear, grid=noisy), margin=0.1, r_start=1, draws=5, seed=1)
    assert row.grid.verdict is StepVerdict.INCONCLUSIVE
    assert (row.decided, row.unjudged, row.compatible) == (1, 1, None)


def test_noise_buys_seeds_and_no_more_than_there_are() -> None:
    noisy = made_up_grid(gains=(0.1, 0.1, 0.1, 0.1), seed_sd=0.15, seed=4)
    ladder = decide_from_pool(noisy.pool, RANKS, make_rule(0.1))
    assert PLAN.first < ladder.seeds[0] <= SEEDS
    assert all(comparison.decision.verdict is not StepVerdict.BUY for comparison in ladder.comparisons)


def test_a_ladder_that_starts_higher_is_held_against_the_grid_from_there() -> None:
    row = replay(made_up_grid(), margin=0.1, r_start=4, draws=5, seed=1)
    assert (row.grid.verdict, row.grid.recommended_rank, row.exact) == (StepVerdict.STOP, 4, 1)


def test_measured_noise_is_that_of_the_differences() -> None:
    together = np.concatenate([made_up_grid(seed_sd=0.2, item_sd=0.4, seed=n).pool[:2] for n in range(20)], axis=1)
    noise = noise_of(together)
    assert noise.seed_sd == pytest.approx(0.2, rel=0.2)
    one = made_up_grid(seed_sd=0.2, item_sd=0.4).pool[:2]
    assert noise_of(one).item_sd == pytest.approx(0.4, rel=0.2)


def test_a_reference_grid_is_kept_and_read_again(tmp_path: Path) -> None:
    reference = made_up_grid()
    save(reference, tmp_path / "grid.npz")
    again = load(tmp_path / "grid.npz")
    assert (again.ranks, again.provenance) == (reference.ranks, reference.provenance)
    np.testing.assert_allclose(again.pool, reference.pool, atol=1e-6)


def test_a_file_that_is_no_grid_is_said(tmp_path: Path) -> None:
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    for name in ("missing.npz", "broken.npz"):
        with pytest.raises(AnalysisError, match="no reference grid"):
            load(tmp_path / name)


def test_each_cell_of_the_page_has_its_heading() -> None:
    row = replay(made_up_grid(), margin=0.1, r_start=1, draws=2, seed=1)
    assert len(replay_page.cells(row)) == len(replay_page.HEADINGS)


@pytest.mark.long
def test_the_committed_page_follows_from_the_committed_runs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--data", str(ROOT / DATA)])
    page = (ROOT / "docs" / "replay.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == page.strip()
