"""The rule's commands, and the report's sections one at a time: a table, and a figure that needs no network."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import made_up
from made_up_grid import made_up_grid

from qlora_exp.analysis.error_rates import replay, replay_page
from qlora_exp.cli import main
from qlora_exp.records.files import write_json

SECTIONS = ("rank", "tradeoffs", "equal", "instruct_base", "instruct-base", "memory", "speed")
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


def write_runs(outputs: Path) -> None:
    kinds = [(v, m, r, s) for v in ("base", "instruct") for m in ("nf4", "fp16") for r in (8, 16) for s in (1, 2)]
    for number, (variant, mode, rank, seed) in enumerate(kinds):
        record = made_up.run(number, variant=variant, mode=mode, r=rank, seed=seed, loss=1.5 + 0.01 * number)
        write_json(outputs / "runs" / record.run_id / "record.json", record)


@pytest.mark.parametrize("section", SECTIONS)
def test_one_section_of_the_report_is_printed_and_written_only_to_a_folder_that_is_named(
    section: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs, folder = tmp_path / "outputs", tmp_path / "one"
    write_runs(outputs)
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", "--only", section, "--output-root", str(outputs)]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out
    assert printed.count("\n## ") == 1
    assert main(["report", "--only", section, "--output-root", str(outputs), "--output", str(folder)]) == 0
    assert (folder / "report.md").read_text(encoding="utf-8").splitlines()[:-1] == printed.splitlines()[:-2]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script src=" not in page
    assert page.count("<h2>") == 2  # this one, and every run
    assert ("\n|---" in printed) == (section != "rank")
    assert ("data-figure=" in page) == (section != "speed")


def test_a_section_that_these_runs_do_not_have_is_refused_with_those_that_they_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = made_up.run(0)
    write_json(tmp_path / "runs" / record.run_id / "record.json", record)
    assert main(["report", "--only", "instruct_base", "--output-root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "no section 'instruct-base'" in error
    assert "tradeoffs" in error


def test_the_replay_is_shown_by_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (replay, replay_page):
        monkeypatch.setattr(module, "HALVES", 1)
    provenance = dict.fromkeys(("model", "quantization", "targets", "device", "measured"), "made up")
    provenance |= {name: [] for name in ("grid_seeds", "replay_seeds", "pilot_seeds")}
    provenance |= dict.fromkeys(("steps", "batch_size", "pilot_rank", "pilot_items"), 1)
    grid = made_up_grid()
    rates = {str(rank): 1e-3 for rank in grid.ranks}
    grid.provenance.update(
        provenance
        | {
            "learning_rates": rates,
            "pilot_losses": {"0.001": 2.5},
            "pilots_of_a_ladder": [1, 0],
            "versions": {"torch": "0"},
        }
    )
    replay.save(grid, tmp_path / "grid.npz")
    data, figure = str(tmp_path / "grid.npz"), tmp_path / "figure.html"
    replay.main(["--data", data, "--draws", "1", "--figure", str(figure), "--output", str(tmp_path / "page.md")])
    printed = capsys.readouterr().out
    check(printed, figure)
    assert (tmp_path / "page.md").read_text(encoding="utf-8").strip() == printed.strip()
