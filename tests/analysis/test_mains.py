"""Each question as a command: it prints a table and saves a figure that needs no network."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import made_up
from made_up_grid import made_up_grid

from qlora_exp.analysis.error_rates import replay, replay_page
from qlora_exp.records.files import write_json

OF_RUNS = ("tradeoffs", "instruct_base", "memory")
OF_THE_RULE = {"rank": [], "power": [], "error_rates.calibration": ["--ladders", "2"]}


def check(printed: str, figure: Path) -> None:
    assert "\n|---" in printed
    page = figure.read_text(encoding="utf-8")
    assert "Plotly" in page
    assert "<script src=" not in page


@pytest.mark.parametrize("module", OF_THE_RULE)
def test_the_rule_is_shown_by_a_command(module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "figure.html"
    importlib.import_module(f"qlora_exp.analysis.{module}").main([*OF_THE_RULE[module], "--figure", str(figure)])
    check(capsys.readouterr().out, figure)


@pytest.mark.parametrize("module", OF_RUNS)
def test_a_question_about_runs_is_answered_by_a_command(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(12):
        variant, mode = ("base", "instruct")[number % 2], ("nf4", "fp16")[number // 2 % 2]
        record = made_up.run(number, variant=variant, mode=mode, seed=number // 4, loss=1.5 + 0.01 * number)
        write_json(tmp_path / "runs" / record.run_id / "record.json", record)
    figure = tmp_path / "figure.html"
    importlib.import_module(f"qlora_exp.analysis.{module}").main([str(tmp_path / "runs"), "--page", str(figure)])
    check(capsys.readouterr().out, figure)


def test_the_replay_is_shown_by_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (replay, replay_page):
        monkeypatch.setattr(module, "HALVES", 1)
    told = dict.fromkeys(("model", "quantization", "targets", "device", "measured"), "made up")
    told |= {name: [] for name in ("grid_seeds", "replay_seeds", "unresolved")}
    told |= dict.fromkeys(("steps", "batch_size", "pilot_seed", "pilot_items"), 1)
    grid = made_up_grid()
    rates = {str(rank): 1e-3 for rank in grid.ranks}
    grid.provenance.update(told | {"learning_rates": rates, "versions": {"torch": "0"}})
    replay.save(grid, tmp_path / "grid.npz")
    data, figure = str(tmp_path / "grid.npz"), tmp_path / "figure.html"
    replay.main(["--data", data, "--draws", "1", "--figure", str(figure), "--output", str(tmp_path / "page.md")])
    printed = capsys.readouterr().out
    check(printed, figure)
    assert (tmp_path / "page.md").read_text(encoding="utf-8").strip() == printed.strip()
