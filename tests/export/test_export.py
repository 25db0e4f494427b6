"""``qlora-exp export``: what it writes, what it says of it, and what it refuses before anything expensive."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_exp.analysis.paired_shares import paired_bounds
from qlora_exp.cli import main
from qlora_exp.export.card import export_card
from qlora_exp.export.export import load_settings
from qlora_exp.export.export_config import ExportConfig
from qlora_exp.export.llama_cpp import measure_runtime
from qlora_exp.export.phone import answer_phone
from qlora_exp.export.results import Artefact, Export, Runtime, TaskCheck
from qlora_exp.export.task_check import compare_answers
from qlora_exp.records.files import read_record, write_json
from qlora_exp.records.types import Status
from qlora_exp.system.cards import read_prices

RUN = [
    *("training.device=cpu", "training.max_steps=30", "training.batch_size=8", "training.max_length=64"),
    *("training.learning_rate=0.01", "evaluation=quick", "evaluation.generate=true", "evaluation.max_items=12"),
    *("quantization=nf4", "targets=all_linear", "tracking=off", "budget.usd_per_hour=0.5"),
]


@pytest.fixture(scope="module")
def outputs(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished nf4 run of a tiny Llama."""
    from tests.conftest import write_colour_task

    folder = tmp_path_factory.mktemp("export")
    task = write_colour_task(folder / "colours.jsonl")
    model = shutil.copytree(tiny_models["llama"], folder / "base")
    given = ["model=local", f"model.path={model}", "task=local", "task.kind=classification", f"task.path={task}"]
    assert main(["run", *RUN, *given, f"output_root={folder / 'outputs'}"]) == 0
    return folder / "outputs"


@pytest.fixture(scope="module")
def exported(outputs: Path) -> Path:
    folder = outputs.parent / "exported"
    assert main(["export", "last", "--output-root", str(outputs), "--to", str(folder)]) == 0
    return folder


def run_folder(outputs: Path) -> Path:
    return next((outputs / "runs").iterdir())


def told(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    return found


def artefact(folder: Path, name: str) -> dict[str, Any]:
    return next(one for one in told(folder)["artefacts"] if one["format"] == name)


def test_the_folder_holds_every_format_with_a_card_and_no_pickle(exported: Path, outputs: Path) -> None:
    names = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    assert {"export.json", "model-q8_0.gguf", "model-q4_0.gguf", "README.md", "adapter/README.md"} <= names
    assert {"merged/README.md", "merged/model.safetensors", "merged/config.json", "merged/tokenizer.json"} <= names
    for folder, library in (("adapter", "peft"), ("merged", "transformers")):
        assert f"library_name: {library}\n" in (exported / folder / "README.md").read_text(encoding="utf-8")
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    own = run_folder(outputs) / "adapter" / "adapter_model.safetensors"
    assert (exported / "adapter" / "adapter_model.safetensors").read_bytes() == own.read_bytes()
    for one in told(exported)["artefacts"]:
        place = exported / one["path"]
        files = [place] if place.is_file() else [file for file in place.iterdir() if file.name != "README.md"]
        assert sum(file.stat().st_size for file in files) == one["size_bytes"]
    assert not [path for path in exported.parent.iterdir() if path.name.startswith(".exported")]


def test_the_merged_weights_are_the_unquantized_base_plus_the_scaled_adapter(exported: Path, outputs: Path) -> None:
    merged, base = (load_file(place / "model.safetensors") for place in (exported / "merged", outputs.parent / "base"))
    adapter = load_file(exported / "adapter" / "adapter_model.safetensors")
    plan = read_record(run_folder(outputs) / "record.json").plan
    assert plan is not None
    for module in ("self_attn.q_proj", "mlp.down_proj"):
        a, b = (adapter[f"base_model.model.model.layers.1.{module}.lora_{side}.weight"] for side in "AB")
        wanted = base[f"model.layers.1.{module}.weight"] + plan.scale * b @ a
        assert b.abs().max() > 0
        assert torch.equal(merged[f"model.layers.1.{module}.weight"], wanted.to(torch.bfloat16))


def test_the_merged_folder_loads_without_us_and_answers_as_it_is_said_to(exported: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported / "merged")
    tokenizer = AutoTokenizer.from_pretrained(exported / "merged")
    assert model.dtype is torch.bfloat16
    ids = tokenizer("Item 3: the lemon has the colour", return_tensors="pt")
    assert torch.isfinite(model(**ids).logits).all()
    check = artefact(exported, "merged")["check"]
    assert (check["engine"], check["metric"], check["items"]) == ("transformers", "accuracy", 12)
    lost = (check["lost_items"] - check["won_items"]) / check["items"]
    assert check["run"] - check["exported"] == pytest.approx(lost)


def test_without_llama_cpp_nothing_is_made_up(outputs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("qlora_exp.export.llama_cpp.why_not", lambda: "llama.cpp isn't installed")
    folder = tmp_path / "export"
    words = ["export", "last", "--output-root", str(outputs), "--to", str(folder), "--formats", "q4_0"]
    assert main(words) == 0
    made = artefact(folder, "q4_0")
    measured = ("peak_resident_bytes", "generated_tokens_per_second", "prompt_tokens_per_second", "load_seconds")
    assert [made["runtime"][name] for name in measured] == [None] * 4
    assert made["runtime"]["why"] == made["check"]["why"] == "llama.cpp isn't installed"
    assert told(folder)["phone"]["answer"] == "not shown"
    assert not (folder / "merged").exists()
    assert "llama.cpp isn't installed" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python isn't installed")
def test_llama_cpp_answers_as_the_merged_model_does(exported: Path) -> None:
    merged, small = artefact(exported, "merged")["check"], artefact(exported, "q8_0")["check"]
    assert small["engine"] == "llama.cpp"
    assert small["same_tokens"] == 1.0
    assert small["exported_loss_per_item"] == pytest.approx(merged["exported_loss_per_item"], rel=0.03)
    assert abs(small["exported"] - merged["exported"]) <= 1 / 12
    runtime = artefact(exported, "q8_0")["runtime"]
    assert runtime["threads"] == 1
    assert runtime["resident_before_bytes"] < runtime["peak_resident_bytes"]
    assert runtime["generated_tokens_per_second"] > 0


def test_the_card_says_what_was_merged_into_what(exported: Path, outputs: Path) -> None:
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert "quantized to nf4" in card
    assert "unquantized" in card
    for one in told(exported)["artefacts"]:
        assert f"`{one['path']}`" in card
    assert told(exported)["phone"]["question"][1:] in card
    assert "* file size:" not in card
    assert "## Settings" in card


def test_the_cost_is_the_records_or_the_price_that_is_said(exported: Path, outputs: Path, tmp_path: Path) -> None:
    speed = read_record(run_folder(outputs) / "record.json").speed
    assert told(exported)["cost_usd"] == pytest.approx(speed.cost_usd)
    words = ["export", "last", "--output-root", str(outputs), "--to", str(tmp_path / "e"), "--formats", "adapter"]
    assert main([*words, "--usd-per-hour", "7200"]) == 0
    made = told(tmp_path / "e")
    assert made["cost_usd"] == pytest.approx(2 * (speed.total_seconds or 0))
    assert (told(exported)["usd_per_hour_from"], made["usd_per_hour_from"]) == ("budget.usd_per_hour", "--usd-per-hour")


def test_a_record_from_before_the_price_table_is_priced_by_it_and_the_answer_says_so(
    outputs: Path, tmp_path: Path
) -> None:
    old = copy_of(outputs, tmp_path)
    record = read_record(old / "record.json")
    assert record.plan is not None
    plan = replace(record.plan, usd_per_hour=None, usd_per_hour_from=None)
    config = record.config | {"budget": record.config["budget"] | {"usd_per_hour": None}}
    write_json(
        old / "record.json", record.replace(plan=plan, config=config, speed=replace(record.speed, cost_usd=None))
    )
    assert main(["export", str(old), "--to", str(tmp_path / "e"), "--formats", "adapter"]) == 0
    made = told(tmp_path / "e")
    assert made["cost_usd"] == pytest.approx(read_prices()["cpu"] * (record.speed.total_seconds or 0) / 3600)
    [cost] = [criterion for criterion in made["phone"]["criteria"] if criterion["name"] == "training cost"]
    assert cost["answer"] == "yes"
    assert "by conf/prices.yaml: cpu" in cost["detail"]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["export", *words]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "do:" in error
    return error


def copy_of(outputs: Path, target: Path) -> Path:
    """The run's folder, to be spoilt."""
    return shutil.copytree(run_folder(outputs), target / "runs" / run_folder(outputs).name)


def test_what_cannot_be_exported_is_told_in_one_message(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = ("--output-root", str(outputs))
    assert "there is no run 'nonesuch'" in refused(capsys, "nonesuch", *root)
    wrong = refused(capsys, "last", *root, "--formats", "adapter,q8")
    assert "there is no format 'q8'" in wrong
    assert "did you mean q8_0" in wrong
    assert "nothing to export" in refused(capsys, "last", *root, "--formats", "")
    assert "16 bits" in refused(capsys, "last", *root, "--dtype", "float32")
    full = tmp_path / "full"
    full.mkdir()
    (full / "a").touch()
    assert "isn't empty" in refused(capsys, "last", *root, "--to", str(full))
    assert "a file of this name" in refused(capsys, "last", *root, "--to", str(full / "a"))

    spoilt = copy_of(outputs, tmp_path)
    record = read_record(spoilt / "record.json")
    write_json(spoilt / "record.json", record.replace(status=Status.FAILED))
    assert "the run is FAILED" in refused(capsys, str(spoilt))
    write_json(spoilt / "record.json", record.replace(model_fingerprint="sha256:0"))
    assert "have changed since the run" in refused(capsys, str(spoilt))
    model = record.config | {"model": record.config["model"] | {"path": str(tmp_path / "gone")}}
    write_json(spoilt / "record.json", record.replace(config=model))
    assert "no such model directory" in refused(capsys, str(spoilt))
    write_json(spoilt / "record.json", record)
    (spoilt / "adapter" / "adapter_model.safetensors").unlink()
    assert "the run has no adapter" in refused(capsys, str(spoilt))


def test_an_adapter_that_is_torn_or_not_finite_leaves_nothing_behind(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = copy_of(outputs, tmp_path)
    file = spoilt / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: value * float("nan") for name, value in weights.items()}, file)
    target = ("--to", str(tmp_path / "export"))
    assert "can't be merged" in refused(capsys, str(spoilt), *target)
    file.write_bytes(file.read_bytes()[:500])
    assert "the adapter can't be read" in refused(capsys, str(spoilt), *target)
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_a_full_disk_is_told_before_or_while_writing_and_leaves_nothing(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this container may not mount a tmpfs")
    try:
        words = ("last", "--output-root", str(outputs), "--to", str(disk / "export"))
        assert "are free" in refused(capsys, *words)
        spoilt = copy_of(outputs, tmp_path)
        record = read_record(spoilt / "record.json")
        write_json(spoilt / "record.json", record.replace(plan=None))  # its size can't be told beforehand
        error = refused(capsys, str(spoilt), "--to", str(disk / "export"), "--formats", "merged", "--check-items", "0")
        assert "can't be written" in error
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("needs", "runs"),
    [
        ("pass", True),
        ("socket.create_connection(('127.0.0.1', 9))", False),
        ("socket.getaddrinfo('a.test', 80)", False),
    ],
)
def test_a_llama_cpp_that_needs_a_network_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs: str, runs: bool
) -> None:
    (tmp_path / "llama_cpp.py").write_text(f"{ANY_LLAMA_CPP}        {needs}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    measured = measure_runtime(tmp_path / "model.gguf", 8, 2)
    assert (measured.generated_tokens_per_second is not None) == runs, measured.why
    assert runs or "needs a network" in str(measured.why)


ANY_LLAMA_CPP = """
import ctypes, socket
import numpy as np
__version__ = "of the test's own"
logits = np.zeros(4, np.float32)
llama_get_logits_ith = lambda context, place: logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
class Llama:
    ctx = None
    n_vocab = lambda self: 4
    reset = lambda self: None
    eval = lambda self, ids: None
    def __init__(self, path, **settings):
"""


def answers(*right: bool) -> pa.Table:
    return pa.table({"correct": list(right), "exact": [None] * len(right)})


def test_a_check_is_answered_by_its_bounds_not_by_its_figure() -> None:
    assert compare_answers(answers(*[True] * 400), answers(*[True] * 400), 0.03).answer == "yes"
    assert compare_answers(answers(*[True] * 10), answers(*[True] * 10), 0.03).answer == "not shown"
    assert compare_answers(answers(*[True] * 400), answers(*[False] * 40, *[True] * 360), 0.03).answer == "no"
    mixed = compare_answers(
        answers(*[True] * 50, *[False] * 50), answers(*[False] * 10, *[True] * 50, *[False] * 40), 0.03
    )
    assert (mixed.lost_items, mixed.won_items, mixed.run, mixed.exported) == (10, 10, 0.5, 0.5)
    assert mixed.answer == "not shown"
    assert compare_answers(pa.table({"correct": [None], "exact": [None]}), answers(True), 0.03).why is not None


def test_the_bounds_hold_at_their_level() -> None:
    """400 items of which 8 % are lost and 5 % won: the true difference lies above the upper bound in about 5 %."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand((4000, 400), generator=generator)
    lost, won = (draws < 0.08).sum(dim=1), ((draws >= 0.08) & (draws < 0.13)).sum(dim=1)
    bounds = [paired_bounds(int(a), int(b), 400) for a, b in zip(lost, won, strict=True)]
    assert 0.03 < sum(high < 0.03 for _, high in bounds) / len(bounds) < 0.07
    assert 0.03 < sum(low > 0.03 for low, _ in bounds) / len(bounds) < 0.07


def settings(**changes: Any) -> ExportConfig:
    return load_settings(changes)


def file_of(size: int, memory: int | None, answer: str = "yes", same_tokens: float | None = 1.0) -> Artefact:
    rate = None if memory is None else 20.0
    runtime = Runtime("llama.cpp", "a CPU", 1, 512, 1.0, memory, 10, rate, rate, None if memory else "not installed")
    check = TaskCheck(0.03, answer, "llama.cpp", "accuracy", "validation", 400, 0.6, 0.6, 4, 4, -0.01, 0.01)
    check = replace(check, same_tokens=same_tokens)
    return Artefact("q4_0", f"model-{size}.gguf", size, check, runtime)


@pytest.mark.parametrize(
    ("files", "cost", "wanted"),
    [
        ([file_of(10**9, 2 * 10**9)], 0.8, "yes"),
        ([file_of(10**9, 2 * 10**9)], 1.2, "no"),
        ([file_of(10**9, 2 * 10**9)], None, "not shown"),
        ([file_of(10**9, None)], 0.8, "not shown"),
        ([file_of(3 * 10**9, None)], 0.8, "no"),
        ([file_of(10**9, 4 * 10**9)], 0.8, "no"),
        ([file_of(10**9, 2 * 10**9, "no")], 0.8, "no"),
        ([file_of(10**9, 2 * 10**9, "not shown")], 0.8, "not shown"),
        ([file_of(10**9, 2 * 10**9, "yes", 0.9975)], 0.8, "not shown"),
        ([file_of(10**9, 2 * 10**9, "yes", None)], 0.8, "not shown"),
        ([file_of(10**9, 2 * 10**9, "no", 0.5)], 0.8, "no"),
        ([file_of(3 * 10**9, 4 * 10**9), file_of(10**9, 2 * 10**9)], 0.8, "yes"),
        ([], 0.8, "not shown"),
    ],
)
def test_the_phone_case_is_as_good_as_the_worst_criterion_of_the_best_file(
    files: list[Artefact], cost: float | None, wanted: str
) -> None:
    answer = answer_phone(files, cost, 3600.0, settings())
    assert answer.answer == wanted
    assert all(criterion.detail for criterion in answer.criteria)
    assert answer_phone(files, cost, 3600.0, settings(phone_file_bytes=1)).answer == ("no" if files else "not shown")


def test_a_file_that_cuts_text_otherwise_says_of_how_many_prompts(outputs: Path) -> None:
    file = file_of(10**9, 2 * 10**9, "yes", 0.975)
    answer = answer_phone([file], 0.8, 3600.0, settings())
    same = "splits only 390 of 400 prompts (97.5 %) as the run's does"
    [task] = [criterion for criterion in answer.criteria if criterion.name == "answers the task"]
    assert same in task.detail
    made = Export(1, "run", "", "base", "", "nf4", "bfloat16", 3600.0, 0.8, None, None, (file,), answer)
    card = export_card(read_record(run_folder(outputs) / "record.json"), made)
    assert f"{file.path}: llama.cpp's own tokenizer {same}" in card
