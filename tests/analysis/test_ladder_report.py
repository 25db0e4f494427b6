"""The report's ladder section against the ladder.json of a real, short ladder on the embedded pair."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from qlora_exp.analysis.report_content import formatted_value
from qlora_exp.cli import main
from qlora_exp.paths import OutputPaths

SHORT = [
    *("sweep.ladder.r_start=2", "sweep.ladder.r_max=4", "sweep.ladder.seeds=2", "sweep.ladder.max_seeds=3"),
    *("sweep.ladder.margin=0.5", "sweep.ladder.lr_policy=fixed", "sweep.name=short", "tracking=off"),
    *("training.max_steps=4", "training.batch_size=4", "training.device=cpu", "quantization=fp32"),
    *("evaluation.max_items=16", "evaluation.before=false", "evaluation.baselines=false", "budget.usd_per_hour=2"),
]


@pytest.mark.slow
def test_the_report_agrees_with_the_ladder_figure_by_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "rank_doubling", *SHORT]) == 0
    capsys.readouterr()
    assert main(["report", "short"]) == 0
    study = OutputPaths.of("outputs").study("short")
    [ladder] = json.loads(study.ladder.read_text())["ladders"]
    printed = capsys.readouterr().out
    assert printed.startswith("Use base, ")
    assert f"r = {ladder['use_rank']}, fp32" in printed.splitlines()[0]

    text = (study.folder / "report.md").read_text()
    section = re.search(r"^## Rank doubling\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    assert ladder["sentence"] in section[1]
    assert all(f"* {warning}" in section[1] for warning in ladder["warnings"])
    loss = float(re.search(r"at the first rank, ([\d.]+) nats per item", section[1])[1])  # type: ignore[index]
    rows = re.findall(r"^\| (\d+) → (\d+) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \| ", section[1], re.MULTILINE)
    assert rows == [
        (
            *(str(step["from_rank"]), str(step["to_rank"])),
            step["decision"],
            *(formatted_value(step[figure] / loss, "share") for figure in ("gain", "low", "high")),
        )
        for step in ladder["comparisons"]
    ]
    assert f"{ladder['spent']['runs']} runs" in section[1]
    assert f"${ladder['spent']['cost_usd']:.2f}" in section[1]
    assert f"{ladder['margin']:.3g} nats per item" in section[1]
    assert re.search(r" USD | cost", ladder["sentence"]) or not ladder["saves"]
    assert sum(ladder["seeds"].values()) == len((study.folder / "runs.csv").read_text().splitlines()) - 1

    commands = re.findall(r"^\$ qlora-exp run (.*)$", text, re.MULTILINE)
    assert len(commands) == 1, "the command that runs what to use stands in the report once"
    assert f"lora.r={ladder['use_rank']}" in commands[0]
    capsys.readouterr()
    assert main(["run", *shlex.split(commands[0])]) == 0
