"""``qlora-exp quantize``: what it measures of a finished run, and what it refuses before a weight is read."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from qlora_exp.cli import main
from qlora_exp.models.inspect import describe
from qlora_exp.models.merging import merged_model
from qlora_exp.paths import OutputPaths
from qlora_exp.ptq import memory_check, quantize_run
from qlora_exp.ptq.memory_check import predicted_bytes
from qlora_exp.ptq.ptq_config import load_ptq_config
from qlora_exp.ptq.quantize_run import _change
from qlora_exp.records.files import read_record, write_json
from qlora_exp.records.find import find_run
from qlora_exp.runs.entry_points import config_from_plain

RUN = [
    *("training.device=cpu", "training.max_steps=20", "training.batch_size=8", "training.max_length=64"),
    *("training.learning_rate=0.01", "evaluation=quick", "evaluation.max_items=12", "evaluation.before=false"),
    *("quantization=nf4", "targets=all_linear", "tracking=off"),
]


@pytest.fixture(scope="module")
def outputs(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of a tiny GPT-2, whose layers keep their weights transposed."""
    from tests.conftest import write_colour_task

    folder = tmp_path_factory.mktemp("quantize")
    task = write_colour_task(folder / "colours.jsonl")
    given = ["model=local", f"model.path={tiny_models['gpt2']}", "task=local", "task.kind=classification"]
    assert main(["run", *RUN, *given, f"task.path={task}", f"output_root={folder / 'outputs'}"]) == 0
    return folder / "outputs"


def quantized(outputs: Path, *arguments: str) -> dict[str, Any]:
    assert main(["quantize", "last", *arguments, "--output-root", str(outputs)]) == 0
    folder = next((outputs / "runs").iterdir())
    found: dict[str, Any] = json.loads((folder / "quantization.json").read_text(encoding="utf-8"))
    return found


def test_every_format_has_its_errors_by_layer_its_size_and_its_change_of_the_score(
    outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = quantized(outputs, "--bits", "8,2", "--group", "channel,32", "--calibration", "minmax", "--rows", "4")
    assert [result["format"] for result in found["results"]] == [
        f"int{bits}_{kind}_{place}" for bits in (8, 2) for kind in ("sym", "asym") for place in ("channel", "g32")
    ]
    assert found["calibration_rows"] == 4
    fine, coarse = found["results"][3], found["results"][4]  # int8_asym_g32, int2_sym_channel
    assert abs(fine["loss_per_item"]["difference"]) < 0.1 * abs(coarse["loss_per_item"]["difference"])
    assert fine["loss_per_item"]["low"] < fine["loss_per_item"]["difference"] < fine["loss_per_item"]["high"]
    # The error by layer, computed from the merged model once more.
    run = find_run("last", OutputPaths.of(outputs))
    model, _ = merged_model(config_from_plain(read_record(run.record).config), run.adapter)
    layer = coarse["layers"][0]
    module = model.get_submodule(layer["name"])
    assert isinstance(module, Conv1D)
    weight = module.weight.detach().T
    assert list(weight.shape) == [layer["rows"], layer["columns"]]
    largest = weight.abs().amax(1, keepdim=True)  # 2 bits, symmetric: −1, 0 and 1 times the largest of a row
    back = torch.where(weight.abs() > largest / 2, weight.sign() * largest, 0)
    assert layer["weight_error"] == pytest.approx(float((weight - back).norm() / weight.norm()), rel=1e-2)
    assert layer["stored_bytes"] == math.ceil((2 * weight.numel() + 16 * len(weight)) / 8)
    assert 0 < layer["output_error"] < 1.5
    assert layer["zero_point_low"] is None
    assert fine["model_bytes"] < found["merged_bytes"]
    printed = capsys.readouterr().out
    assert "worst layers of int2_asym_g32" in printed
    assert max(map(len, printed.splitlines()[2:-1])) <= 100


def test_an_explained_layer_shows_weights_their_codes_and_what_comes_back(
    outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--bits", "8", "--asymmetric", "--group", "32", "--explain", "h.0.attn.c_proj", "--index", "3"]
    assert main(["quantize", "last", *arguments, "--output-root", str(outputs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("transformer.h.0.attn.c_proj: 64 × 64 weights")
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == ["weight"])
    rows = [list(map(float, line.split())) for line in lines[start + 1 :]]
    assert len(rows) == 10
    scale = float(next(line for line in lines if "scale =" in line).split()[-2])
    zero_point = int(next(line for line in lines if "zero point =" in line).split()[-1])
    for weight, _, code, back, error in rows:
        assert back == pytest.approx((code - zero_point) * scale, rel=1e-3, abs=1e-6)
        assert error == pytest.approx(back - weight, rel=0.1, abs=1e-4)


def test_without_its_data_a_run_is_quantized_and_not_scored(
    outputs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    moved = shutil.copytree(outputs, tmp_path / "outputs")
    for file in moved.glob("runs/*/items_after_*"):
        file.unlink()
    found = quantized(moved, "--bits", "4", "--group", "channel")
    assert "per-item results" in found["why_not_scored"]
    assert found["results"][0]["loss_per_item"] is None
    assert found["results"][0]["layers"][0]["weight_error"] > 0
    assert "not scored" in capsys.readouterr().out


def test_groups_of_items_count_the_same_in_a_change_and_in_its_interval() -> None:
    groups = ["a"] * 9 + ["b", "c"]
    before = pa.table({"item_id": [f"i{n}" for n in range(11)], "loss_sum_nats": [1.0] * 11, "group": groups})
    after = before.set_column(1, "loss_sum_nats", pa.array([2.0] * 9 + [1.0, 1.1]))
    change = _change(before, after, "loss_sum_nats")
    assert change is not None
    assert change.difference == pytest.approx(1.1 / 3)
    assert change.after - change.before == pytest.approx(change.difference)
    assert change.low < change.difference < change.high


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bits", "9"], "2 to 8"),
        (["--bits", "four"], "bits"),
        (["--group", "100"], "--group 64"),
        (["--group", "chanel"], "channel"),
        (["--calibration", "mean"], "minmax"),
        (["--calibration", "activations", "--rows", "0"], "--rows 64"),
        (["--items", "-1"], "0 or more"),
        (["--explain", "h.0.attn"], "h.0.attn.c_attn"),
        (["--explain", "h.0.attn.c_proj", "--index", "99999"], "0 to"),
    ],
)
def test_what_cannot_be_quantized_is_refused_with_what_would_do(
    arguments: list[str], words: str, outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "last", *arguments, "--output-root", str(outputs)]) == 2
    assert words in capsys.readouterr().err


def test_a_run_that_is_not_complete_is_refused(
    outputs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    moved = shutil.copytree(outputs, tmp_path / "outputs")
    record = next(moved.glob("runs/*/record.json"))
    raw = json.loads(record.read_text(encoding="utf-8"))
    write_json(record, raw | {"status": "INTERRUPTED"})
    assert main(["quantize", "last", "--output-root", str(moved)]) == 2
    assert "training is not complete" in capsys.readouterr().err


def test_memory_is_checked_before_a_weight_is_read(
    outputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = describe(
        config_from_plain(read_record(find_run("last", OutputPaths.of(outputs)).record).config).model
    )
    settings = load_ptq_config({"rows": 0})
    one, several = predicted_bytes(architecture, settings, 1), predicted_bytes(architecture, settings, 4)
    matrices = sum(shape.in_features * shape.out_features for shape in architecture.weights if shape.quantizable)
    assert several - one == 4 * matrices
    assert one > 4 * architecture.total_parameters
    monkeypatch.setattr(memory_check, "total_bytes", lambda: one)
    monkeypatch.setattr(quantize_run, "merged_tuned", None)  # a weight that was read would fail
    assert main(["quantize", "last", "--rows", "0", "--output-root", str(outputs)]) == 2
    refused = capsys.readouterr().err
    assert "needs" in refused
    assert "one format at a time" in refused
    monkeypatch.undo()
    monkeypatch.setattr(memory_check, "available_bytes", lambda: one - 1)
    quantized(outputs, "--bits", "4", "--symmetric", "--group", "channel", "--rows", "0")
    assert "of memory are free" in capsys.readouterr().err


def test_the_report_lists_what_quantize_found(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = quantized(outputs, "--bits", "8,2", "--asymmetric", "--group", "32", "--rows", "2")
    capsys.readouterr()
    assert main(["report", "--only", "post-training", "--output-root", str(outputs)]) == 0
    printed = capsys.readouterr().out
    assert "Post-training quantization" in printed
    assert f"{found['items']} {found['split']}" in printed
    for result in found["results"]:
        (row,) = [line for line in printed.splitlines() if result["format"] in line and line.startswith("|")]
        worst = max(result["layers"], key=lambda layer: layer["output_error"])
        assert worst["name"] in row
