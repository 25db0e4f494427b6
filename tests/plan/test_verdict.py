"""Whether a plan fits: against what it is held, and how surely."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from qlora_exp.cli import main
from qlora_exp.estimate.candidates import search_space
from qlora_exp.estimate.device import device_by_name
from qlora_exp.estimate.memory_fit import CPU_PROCESS_BYTES, RELATIVE_ERROR
from qlora_exp.estimate.planner import Planner
from qlora_exp.formatting import bytes_text
from qlora_exp.system import heap

ONE = ("lora.r=8", "quantization=fp32", "targets=attention", "training.max_length=64", "training.micro_batch_size=4")


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main(["plan", "--json", *arguments]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(("device", "model"), [("cpu", "embedded"), ("cuda", "llama3_2_1b")])
def test_what_lies_within_the_predictions_error_of_its_bound_is_marked(
    device: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = (f"model={model}", *ONE, f"plan.device={device}")
    peak = planned(capsys, *asked)[0]["memory"]["peak_bytes"]
    factor = 1 + RELATIVE_ERROR[device]
    for bound, fits, near in (
        (1.01 * factor * peak, True, False),
        (0.99 * factor * peak, True, True),
        (peak, True, True),
        (0.99 * peak, False, True),
        (0.99 * peak / factor, False, False),
    ):
        limit = f"budget.memory_bytes={round(bound)}"
        [run] = planned(capsys, *asked, limit)
        assert (run["fits"], run["borderline"]) == (fits, near)
        assert run["reason"].startswith("borderline: needs ") == near
        assert main(["plan", *asked, limit]) == 0
        shown = capsys.readouterr().out
        assert f"   {'yes' if fits else 'no'}{'?' if near else ' '}  " in shown
        assert ("yes?, no?" in shown) == near


def test_what_is_known_exactly_not_to_fit_is_not_near_the_edge(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("model=llama3_1_8b", "quantization=bf16", "training.micro_batch_size=1", "training.max_length=64")
    [run] = planned(capsys, *asked, "budget.memory_bytes=16000000000")
    assert run["memory"]["peak_bytes"] < (1 + RELATIVE_ERROR["cuda"]) * 16e9
    assert (run["fits"], run["borderline"]) == (False, False)
    assert "the base alone 16.1 GB" in run["reason"]


def test_on_a_cpu_what_a_process_holds_after_imports_counts_against_the_whole_and_not_against_the_budget(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ("model=embedded", *ONE)
    peak = planned(capsys, "--fit", "24GB", *asked)[0]["memory"]["peak_bytes"]
    whole = (peak + CPU_PROCESS_BYTES) / 1e6
    assert planned(capsys, "--fit", f"{whole + 1:.0f}MB", *asked)[0]["fits"] is True
    assert main(["plan", "--fit", f"{whole - 1:.0f}MB", *asked]) == 2
    assert "after imports" in capsys.readouterr().err
    assert main(["plan", "--fit", "300MB", "model=embedded"]) == 2
    assert "nothing fits" in capsys.readouterr().err
    [budgeted] = planned(capsys, *asked, "task.max_train_items=40", "budget.memory_bytes=300000000")
    assert budgeted["fits"] is True
    assert "beyond the process after imports" in budgeted["reason"]
    assert main(["plan", *asked]) == 0
    assert "what the process holds after its imports" in capsys.readouterr().out


def test_a_machine_must_hold_the_process_too() -> None:
    [point] = search_space(["model=embedded", *ONE]).points
    here = device_by_name("cpu")
    run = Planner(here).plan(point)
    assert run.memory is not None
    whole = run.memory.peak_bytes + CPU_PROCESS_BYTES
    verdicts = [Planner(replace(here, memory_bytes=size)).plan(point).fits for size in (whole - 1, whole)]
    assert verdicts == [False, True]
    on_a_card = Planner(replace(device_by_name("cuda"), memory_bytes=whole)).plan(point)
    assert "after imports" not in on_a_card.reason


def test_validate_holds_a_budget_against_the_process_that_will_train(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(heap.MALLOC_VARIABLE, raising=False)  # as it has no word of its own on the heap
    asked = ("model=embedded", "quantization=fp32", "task.max_train_items=40")
    [run] = planned(capsys, *asked)
    assert main(["validate", *asked, "budget.memory_bytes=20000000"]) == 2
    assert f"predicted to need {bytes_text(run['memory']['peak_bytes'])} of 20 MB" in capsys.readouterr().err
