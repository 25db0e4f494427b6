"""docs/walkthrough.md is run from its top to its end, on runs with the reference grid's measured losses."""

from __future__ import annotations

import doctest
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parent / "analysis"))

import made_up

from qlora_exp.analysis.error_rates.replay import DATA, load
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import write_json

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "walkthrough.md"
RANKS, SEEDS = (8, 16, 32, 64), 4
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def write_runs(root: Path) -> None:
    """Records made up but for rank, seed and losses, and their per-item files."""
    grid = load(ROOT / DATA)
    points = [(rank, seed) for rank in RANKS for seed in range(SEEDS)]
    for number, (rank, seed) in enumerate(points):
        losses = grid.grid[grid.ranks.index(rank), seed]
        record = made_up.run(number, r=rank, seed=seed + 1, loss=float(losses.mean()))
        paths = OutputPaths.of(str(root)).run(record.run_id)
        write_json(paths.record, record)
        items = [f"test.jsonl:{item + 1}" for item in range(len(losses))]
        pq.write_table(pa.table({"item_id": items, "loss_sum_nats": losses}), paths.items("after", "test"))


def shell_commands() -> Iterator[list[str]]:
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if line.startswith("$ ") and "sweep" not in line:
            yield shlex.split(line.removeprefix("$ "))


def test_the_walkthrough_gives_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_runs(tmp_path / "outputs")
    monkeypatch.chdir(tmp_path)
    found = doctest.testfile(str(DOCUMENT), module_relative=False, optionflags=FLAGS, encoding="utf-8")
    assert found.attempted > 10
    assert found.failed == 0
    doors = {"qlora-exp": ["-m", "qlora_exp.cli"], "python": []}
    for program, *words in shell_commands():
        ended = subprocess.run([sys.executable, *doors[program], *words], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "ladder.html").exists()
    assert (tmp_path / "rank" / "report.html").exists()
