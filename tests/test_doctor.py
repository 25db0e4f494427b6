"""What doctor says of speed, neighbours on a GPU, and the disk that a sweep needs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora_exp import run
from qlora_exp.cli import main
from qlora_exp.doctor.machine_checks import _neighbours, against_datasheet, calibration, measure_flops_per_second
from qlora_exp.doctor.sweep_disk import RECORD_BYTES, sweep_disk, trial_bytes
from qlora_exp.estimate.calibration import rates_file
from qlora_exp.estimate.throughput import machine_of
from qlora_exp.orchestration.devices import Gpu, GpuUser
from qlora_exp.records.files import write_json
from qlora_exp.records.types import Device
from qlora_exp.system.environment import probe

CARD = "NVIDIA A100-SXM4-80GB"


@pytest.mark.parametrize(
    ("kind", "name", "rate", "ok", "words"),
    [
        ("cuda", CARD, 240e12, True, "240 TFLOP/s measured, 77% of the data sheet's 312"),
        ("cuda", CARD, 90e12, False, "29%"),
        ("cuda", CARD, 500e12, False, "160%"),
        ("cuda", "NVIDIA Unheard-of 1", 90e12, None, "unknown: no data sheet for NVIDIA Unheard-of 1"),
        ("cpu", "some CPU", 0.1e12, None, "unknown: no data sheet for CPUs"),
    ],
)
def test_a_rate_is_judged_by_the_cards_data_sheet(
    kind: str, name: str, rate: float, ok: bool | None, words: str
) -> None:
    device = Device(kind, name, 1, None, None, None, True)
    check = against_datasheet("matmul rate", "measured", device, rate, 0.5, too_slow="cool it", too_fast="report it")
    assert check.ok is ok
    assert words in check.detail
    assert check.fix == (None if ok is not False else "cool it" if rate < 312e12 else "report it")


def test_the_calibration_that_doctor_judges_is_the_one_that_plans_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "none for this device" in calibration().detail
    write_json(rates_file(), {machine_of(probe()): dict.fromkeys(("fp32", "fp16", "bf16"), 0.25e12)})
    assert "0.25 TFLOP/s of training in" in calibration().detail


def test_the_rate_of_this_machine_is_one_that_a_machine_can_have() -> None:
    assert 1e8 < measure_flops_per_second("cpu") < 1e14


def test_another_process_on_a_gpu_is_named() -> None:
    mine, desktop = GpuUser(os.getpid(), "me", 2 * 10**10), GpuUser(7, "Xorg", 10**8)
    other, unknown = GpuUser(9, "python", 3 * 10**9), GpuUser(11, None, None)
    assert _neighbours([Gpu(0, "GPU-a", CARD, (mine, desktop))]).ok
    busy = _neighbours([Gpu(0, "GPU-a", CARD), Gpu(1, "GPU-b", CARD, (other, unknown))])
    assert busy.ok is False
    assert "GPU 1 by process 9 python (3.0 GB), GPU 1 by process 11" in busy.detail


def test_a_trial_is_its_adapter_its_checkpoints_and_its_record() -> None:
    given = ["model=embedded", "targets=attention", "lora.r=8"]
    adapter = 8 * (192 + 192) * 4 * 4 * 4  # r (in + out), q k v o, 4 layers, fp32
    assert trial_bytes([*given, "training.save_every_steps=null"]) == adapter + RECORD_BYTES
    saving = trial_bytes([*given, "training.save_every_steps=10"])
    assert saving == trial_bytes([*given, "training.keep_best=true", "training.evaluate_every_steps=5"])
    assert saving > 10 * adapter + RECORD_BYTES  # three checkpoints, each an adapter and two states of its size
    ademamix = trial_bytes([*given, "training.save_every_steps=10", "training.optimizer=ademamix"])
    assert ademamix - saving == pytest.approx(3 * adapter, abs=1000)  # a third state in each


@pytest.mark.parametrize("optimizer", ["adamw_torch", "ademamix", "paged_adamw_8bit", "sgd"])
def test_no_trial_leaves_more_than_is_told(
    optimizer: str, tiny_models: dict[str, Path], colour_task: Path, tmp_path: Path
) -> None:
    """A run that its budget ends keeps its checkpoints."""
    output = tmp_path / "outputs"
    given = [
        *("model=local", f"model.path={tiny_models['llama']}", "task=local", f"task.path={colour_task}"),
        *("task.kind=classification", "lora.r=256", "targets=all_linear", "quantization=fp32", "tracking=off"),
        *("training.device=cpu", "training.batch_size=4", "training.max_length=64", "evaluation=quick"),
        *("training.save_every_steps=1", f"training.optimizer={optimizer}", f"output_root={output}"),
    ]
    record = run(*given, "training.max_steps=40", "budget.tokens=100")
    assert record.training is not None
    assert record.training.ended_by_budget == "tokens"
    [folder] = (output / "runs").iterdir()
    assert len(list(folder.glob("checkpoints/checkpoint-*"))) == 2
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert held <= trial_bytes(given) < 2 * held


def test_the_disk_of_a_family_that_is_not_downloaded_is_known() -> None:
    assert trial_bytes(["model=llama3_1_8b", "targets=attention", "lora.r=32"]) == 27_262_976 * 4 + RECORD_BYTES


def test_a_sweep_is_as_many_trials_of_its_largest_adapter(tmp_path: Path) -> None:
    root = str(tmp_path / "outputs")
    one = sweep_disk(["lora.r=64", "targets=all_linear"], root)
    grid = sweep_disk(["lora.r=4,64", "targets=attention,all_linear", "seed=1,2"], root)
    assert one.ok
    assert grid.ok
    assert one.detail.startswith("1 trial of ")
    assert grid.detail.startswith("8 trials of ")
    assert one.detail.split(" of ")[1].split(" at ")[0] == grid.detail.split(" of ")[1].split(" at ")[0]


def test_the_largest_of_every_axis_that_decides_the_size_is_looked_at() -> None:
    axes = [
        *("lora.dora=false,true", "lora.dtype=bfloat16,float32", "training.optimizer=sgd,ademamix,adamw_torch"),
        *("training.save_every_steps=null,10", "targets.modules=[q_proj],[q_proj,v_proj]", "seed=1,2"),
    ]
    largest = trial_bytes(
        [
            *("lora.dora=true", "lora.dtype=float32", "training.optimizer=ademamix", "training.save_every_steps=10"),
            "targets.modules=[q_proj,v_proj]",
        ]
    )
    assert f"96 trials of {largest / 1e6:.3g} MB at most" in sweep_disk(axes, None).detail


def test_the_disk_is_that_of_the_output_root_that_is_given(tmp_path: Path) -> None:
    assert str(tmp_path) in sweep_disk(["lora.r=4,8", f"output_root={tmp_path / 'outputs'}"], None).detail


def test_a_sweep_that_does_not_fit_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: _Usage(10**6))
    words = ["doctor", "lora.r=4,8", "--no-self-test", "--output-root", str(tmp_path / "outputs")]
    capsys.readouterr()
    assert main(words) == 1
    assert "PROBLEM sweep's disk" in capsys.readouterr().out
    assert main(["doctor", "lora.rank=4", "--no-self-test"]) == 2
    assert "lora.r" in capsys.readouterr().err


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free
