from __future__ import annotations

from pathlib import Path

from studies import a_spec, completed, myself, opened

GRID = {"lora.r": "4,8,16,32", "seed": "1,2,3,4"}


def told(tmp_path: Path, trials: int, value: dict[int, float] | None = None) -> dict[str, dict[str, float]]:
    study = opened(a_spec(tmp_path, params=GRID, sampler="grid", n_trials=trials))
    while claim := study.claim(myself(), 600.0):
        r = claim.params["lora.r"]
        study.tell(claim, completed(value[r] if value else 1.0 / r))
    return study.importances()


def test_the_axis_that_explains_the_objective_has_the_largest_share(tmp_path: Path) -> None:
    shares = told(tmp_path, 16)["scores.after.loss"]
    assert next(iter(shares)) == "lora.r"
    assert shares["lora.r"] > 0.9


def test_what_no_share_can_be_told_of_is_left_out(tmp_path: Path) -> None:
    assert told(tmp_path / "few", 3) == {}
    assert told(tmp_path / "flat", 16, dict.fromkeys((4, 8, 16, 32), 1.0)) == {}
