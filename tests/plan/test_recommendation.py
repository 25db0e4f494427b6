"""``plan --fit``: one recommended configuration with headroom, as a command, or what would make one fit."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from qlora_exp.cli import main
from qlora_exp.config.enums import Quantization
from qlora_exp.estimate.memory_fit import RELATIVE_ERROR

LLAMA = ("model=llama3_1_8b",)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main(["plan", "--json", *arguments]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def recommended(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], list[str]]:
    """Return the first configuration of ``plan --fit``, and its command's overrides."""
    first, *others = planned(capsys, *arguments)
    assert first["recommended"] is True
    assert not any(run["recommended"] or run["command"] for run in others)
    program, command, *overrides = shlex.split(first["command"])
    assert (program, command) == ("qlora-exp", "run")
    return first, overrides


def test_the_recommended_run_is_the_largest_that_fits_with_the_predictions_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, overrides = recommended(capsys, "--fit", "16GB", *LLAMA)
    settings, factor = first["settings"], 1 + RELATIVE_ERROR["cuda"]
    assert (settings["quantization"], settings["targets"], settings["r"]) == ("nf4", "all_linear", 16)
    assert first["memory"]["peak_bytes"] * factor <= 16e9
    [again] = planned(capsys, *overrides)
    assert again["memory"] == first["memory"]
    rows = settings["micro_batch_size"]
    larger = [text for text in overrides if "micro_batch_size" not in text]
    assert rows < settings["batch_size"]
    [twice] = planned(
        capsys, *larger, f"training.micro_batch_size={2 * rows}", "training.gradient_checkpointing=on",
        "--device", "cuda",
    )  # fmt: skip
    assert twice["memory"]["peak_bytes"] * factor > 16e9


def test_a_set_key_stays_and_an_axis_is_decided_towards_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    _, overrides = recommended(capsys, "--fit", "24GB", *LLAMA, "lora.r=8,32", "targets=attention", "seed=3")
    assert {"targets=attention", "seed=3"} < set(overrides)
    assert {"lora.r=8", "lora.r=32"} & set(overrides)
    assert not any("," in text for text in overrides)
    assert len({text.partition("=")[0] for text in overrides}) == len(overrides)


def test_sequences_are_as_long_as_the_tasks_rows_need(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [{"prompt": f"Row {number}:" + " berry" * 150, "completion": " red"} for number in range(60)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = ("model=embedded", "task=local", f"task.path={file}")
    first, overrides = recommended(capsys, "--fit", "8GB", *task)
    longest = first["rows"]["lengths"]["longest_tokens"]
    assert longest > 100
    assert longest <= first["settings"]["max_length"] < longest + 64
    [again] = planned(capsys, *overrides)
    assert again["memory"] == first["memory"]
    assert main(["plan", "--fit", "8GB", *task]) == 0
    assert f"holds the longest of the task's {first['rows']['rows']} rows" in capsys.readouterr().out


def test_a_micro_batch_in_tokens_stays_as_it_is_set(capsys: pytest.CaptureFixture[str]) -> None:
    _, overrides = recommended(capsys, "--fit", "24GB", *LLAMA, "training.micro_batch_tokens=4096")
    assert "training.micro_batch_tokens=4096" in overrides
    assert not any("micro_batch_size" in text for text in overrides)


@pytest.mark.long
def test_where_nothing_fits_nothing_is_recommended_and_each_advice_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert not any(run["recommended"] for run in planned(capsys, "--fit", "8GB", *LLAMA))
    assert main(["plan", "--fit", "8GB", *LLAMA]) == 0
    out = capsys.readouterr().out
    assert "no recommendation" in out
    assert "qlora-exp run" not in out
    models = re.findall(r"model=(\w+) \(", out.replace("\n", " "))
    assert models
    for model in models:
        recommended(capsys, "--fit", "8GB", f"model={model}")
    assert main(["plan", "--fit", "16GB", *LLAMA, "training.max_length=32768"]) == 2
    [length] = re.findall(r"training\.max_length=(\d+) \(", capsys.readouterr().err)
    recommended(capsys, "--fit", "16GB", *LLAMA, f"training.max_length={length}")


def test_the_answer_is_one_screen_within_a_hundred_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    for size, model in (("16GB", "llama3_1_8b"), ("8GB", "llama3_1_8b"), ("2GB", "embedded")):
        assert main(["plan", "--fit", size, f"model={model}"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 100
        assert len(lines) <= 50


def test_the_memory_of_two_cards_is_not_added_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--fit", "2x24GB", *LLAMA]) == 2
    assert "--fit 24GB" in capsys.readouterr().err


@pytest.mark.parametrize(
    "chosen",
    [
        *(f"quantization={mode.value}" for mode in Quantization),
        *("method=full", "method=full,lora", "method=layerwise method.layers=last:2", "method=bottleneck"),
        *("method=peft method.peft_type=loha", "method=peft method.peft_type=ia3"),
        *("training.qat.format=int4", "method=full training.qat.format=ternary", "quantization=int4_sym,nf4,fp32"),
    ],
)
def test_every_quantization_and_method_gets_a_recommendation_that_can_be_planned(
    capsys: pytest.CaptureFixture[str], chosen: str
) -> None:
    few = ("training.max_length=128", "training.micro_batch_size=4,8")
    _, overrides = recommended(capsys, "--fit", "16GB", *few, *chosen.split())
    assert planned(capsys, *overrides)[0]["fits"] is not False


def test_what_can_never_be_trained_is_answered_with_its_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--fit", "16GB", "method=full", "quantization=nf4"]) == 2
    assert "where: quantization" in capsys.readouterr().err
