"""``qlora-exp plan``: the figures of runs, sweeps and the reverse question, without torch for known families."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_exp.cli import main
from qlora_exp.config.compose import compose
from qlora_exp.config.schema import to_plain
from qlora_exp.estimate import device as plan_device
from qlora_exp.estimate.candidates import search_space
from qlora_exp.estimate.device import device_by_name, size_bytes
from qlora_exp.records.files import write_json
from qlora_exp.records.schema import to_dict
from qlora_exp.records.types import SCHEMA_VERSION, Plan, RunRecord, Speed, Status
from qlora_exp.system.environment import probe_without_torch
from qlora_exp.system.gpus import Card

PARTS = ("base_weight_bytes", "quantization_state_bytes", "adapter_bytes", "gradient_bytes", "optimizer_bytes")
TINY = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256}


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main(["plan", "--json", *arguments]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    return capsys.readouterr().err


def test_a_plans_settings_have_every_key_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("training.micro_batch_tokens=2048", "training.padding_free=off", "training.kernels=none")
    [run] = planned(capsys, "model=llama3_1_8b", *given)
    assert to_plain(compose(["model=llama3_1_8b", *given]).training) == {
        key: None if key == "micro_batch_size" else run["settings"][key]
        for key in run["settings"]
        if key not in ("model", "variant", "quantization", "r", "targets")
    }
    assert run["settings"]["micro_batch_size"] == run["settings"]["batch_size"]


def test_an_8b_model_has_the_known_figures(capsys: pytest.CaptureFixture[str]) -> None:
    [run] = planned(capsys, "model=llama3_1_8b", "quantization=nf4", "lora.r=32", "plan.device=rtx4090")
    assert run["total_parameters"] == 8_030_261_248
    assert run["trainable_parameters"] == 27_262_976
    memory = run["memory"]
    assert memory["base_weight_bytes"] + memory["quantization_state_bytes"] == pytest.approx(5.70e9, rel=1e-3)
    assert memory["adapter_bytes"] == memory["gradient_bytes"] == 4 * 27_262_976
    assert memory["peak_bytes"] == sum(memory[part] for part in PARTS) + memory["activation_bytes"]
    assert run["overrides"] == {}
    assert run["fits"] is True
    assert {"seconds", "usd", "reason"} <= run.keys()


@pytest.mark.parametrize(("device", "nf4", "int8"), [("cuda", 5.70e9, 9.08e9), ("cpu", 7.80e9, 11.18e9)])
def test_on_a_cpu_the_unquantized_rest_takes_32_bit(
    device: str, nf4: float, int8: float, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = planned(capsys, "model=llama3_1_8b", "quantization=nf4,int8", f"plan.device={device}")
    held = [run["memory"]["base_weight_bytes"] + run["memory"]["quantization_state_bytes"] for run in runs]
    assert held == pytest.approx([nf4, int8], rel=2e-3)


def test_the_size_of_weights_is_as_published(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--sizes", "--json", "model=llama3_1_8b", "lora.r=32", "targets=attention"]) == 0
    sizes = json.loads(capsys.readouterr().out)
    totals = {size["quantization"]: size["total_bytes"] for size in sizes["modes"]}
    assert totals["fp32"] == pytest.approx(32e9, rel=0.01)
    assert totals["bf16"] == totals["fp16"] == pytest.approx(16e9, rel=0.01)
    assert totals["int8"] == pytest.approx(9e9, rel=0.02)
    assert totals["nf4"] == pytest.approx(5.6e9, rel=0.02)
    body = (
        6_979_321_856  # weights of the linear layers without the head: 4 bits more, and 16 and 8 for each group of 64
    )
    assert totals["int8_sym"] - totals["int4_sym"] == body // 2
    assert totals["int4_asym"] - totals["int4_sym"] == body // 64
    assert sizes["trainable_parameters"] == pytest.approx(27.3e6, rel=0.01)
    assert sizes["adapter_bytes"] == pytest.approx(109e6, rel=0.01)


def test_a_thousand_configurations_of_a_known_family_are_planned_without_torch() -> None:
    axes = (
        *("quantization=fp32,bf16,fp16,int8,nf4", "targets=attention,attention_qv,mlp,all_linear"),
        *("lora.r=1,2,4,8,16", "training.max_length=128,256,512,1024,2048", "training.batch_size=4,16"),
    )
    program = (
        "import sys; from qlora_exp.cli import main; code = main(sys.argv[1:]); heavy = {'torch', 'transformers', "
        "'mlflow', 'optuna'} & set(sys.modules); print(sorted(heavy), file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "plan", "--json", "model=llama3_1_8b", *axes]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    runs = json.loads(done.stdout)
    assert len(runs) == 1000
    assert len({json.dumps(run["overrides"]) for run in runs}) == 1000


@pytest.mark.parametrize(
    "fixed",
    [
        ("model=llama3_1_8b", "quantization.double_quantization=false"),
        ("sweeps=rank_by_quantization",),
        ("lora.alpha_policy=fixed", "lora.alpha=16"),
    ],
)
def test_varied_configurations_are_those_that_hydra_composes(fixed: tuple[str, ...]) -> None:
    common = [*fixed, "model.variant=instruct"]
    axes = ("quantization=fp16,int8", "targets=mlp,attention", "lora.r=2,4", "task.columns.label=category,kind")
    asked = search_space([*common, *axes])
    assert len(asked.points) == 16
    for point in asked.points:
        assert point.config == compose([*common, *(f"{key}={value}" for key, value in point.params.items())])


def test_a_model_among_the_axes_brings_its_own_training(capsys: pytest.CaptureFixture[str]) -> None:
    asked = search_space(["model=qwen3_0_6b,embedded,smollm2_135m", "lora.r=8"])
    for point in asked.points:
        assert point.config == compose([f"model={point.params['model']}", "lora.r=8"])
    totals = [run["total_parameters"] for run in planned(capsys, "model=qwen3_0_6b,smollm2_135m")]
    assert totals == [596_049_920, 134_515_008]


def test_a_sweep_is_planned_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    runs = planned(capsys, "rank_by_quantization")
    assert [(run["settings"]["quantization"], run["settings"]["r"]) for run in runs] == [
        (mode, rank) for rank in (4, 8, 16, 32) for mode in ("fp16", "int8", "nf4")
    ]


def test_a_search_is_planned_at_the_ends_of_its_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "lora_search"]) == 0
    assert "20 trials" in capsys.readouterr().out
    asked = search_space(["training.learning_rate=tag(log,interval(1e-4,1e-2))", "sweep.n_trials=7"])
    assert [point.params["training.learning_rate"] for point in asked.points] == [1e-4, 1e-2]
    assert asked.trials == 7


def test_a_ladder_is_planned_at_each_of_its_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert [run["settings"]["r"] for run in planned(capsys, "rank_doubling")] == [8, 16, 32, 64]


def test_points_that_cannot_be_run_are_rows_with_their_reason(capsys: pytest.CaptureFixture[str]) -> None:
    axes = ("model=llama3_1_8b", "quantization=bf16,nf4", "lora.init=kaiming,pissa", "plan.device=h200")
    runs = planned(capsys, *axes)
    assert [run["fits"] for run in runs] == [True, True, True, False]
    assert "PiSSA" in runs[-1]["reason"]
    assert runs[-1]["memory"] is None


def test_what_fits_comes_best_first_and_what_is_set_is_not_searched(capsys: pytest.CaptureFixture[str]) -> None:
    runs = planned(capsys, "--fit", "16GB", "model=llama3_1_8b", "lora.r=8,64", "training.max_length=512")
    assert runs
    assert all(run["fits"] and run["memory"]["peak_bytes"] <= 16e9 for run in runs)
    bits = {"fp32": 32, "bf16": 16, "int8": 8, "nf4": 4}
    listed = [run for run in runs if not run["recommended"]]  # the recommended one comes before them
    order = [(bits[run["settings"]["quantization"]], run["settings"]["r"]) for run in listed]
    assert order == sorted(order, reverse=True)
    assert {rank for _, rank in order} == {8, 64}
    assert {run["settings"]["max_length"] for run in runs} == {512}
    smaller = planned(capsys, "--fit", "8GB", "model=llama3_1_8b", "lora.r=8,64", "training.max_length=512")
    assert 0 < len(smaller) < len(listed)
    assert main(["plan", "--fit", "16GB", "model=llama3_1_8b"]) == 0
    assert "best first: larger precision" in capsys.readouterr().out


def test_a_configuration_file_alone_can_be_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY | {"num_attention_heads": 4}))
    [run] = planned(capsys, "model=local", f"model.path={file}", "lora.r=4", "targets=all_linear")
    [same] = planned(capsys, "model=local", f"model.path={tmp_path}", "lora.r=4", "targets=all_linear")
    layer = 2 * (4 * (64 + 64) * 4 + 3 * (64 + 96) * 4)
    assert run["trainable_parameters"] == same["trainable_parameters"] == layer
    assert run["total_parameters"] == 2 * 256 * 64 + 64 + 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64)


def test_an_architecture_without_a_table_is_planned_and_nothing_else_is_said(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY | {"model_type": "olmo2", "num_attention_heads": 4}))
    command = [sys.executable, "-m", "qlora_exp.cli", "plan", "--json", "model=local", f"model.path={file}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    [run] = json.loads(done.stdout)
    assert run["trainable_parameters"] == 2 * 4 * run["settings"]["r"] * (64 + 64)
    assert run["memory"]["peak_bytes"] > 0


def test_what_experts_change_is_told_where_it_matters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    routed = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
    file.write_text(json.dumps(TINY | routed | {"model_type": "glm4_moe", "num_attention_heads": 4, "head_dim": 16}))

    model = ("model=local", f"model.path={file}")
    [run] = planned(capsys, *model, "targets=all_linear", "quantization=nf4")
    assert "belong to experts, and bitsandbytes doesn't quantize" in run["notes"][0]
    assert run["notes"][1].startswith("down_proj, gate_proj, up_proj get no adapters")
    [run] = planned(capsys, *model, "targets=attention", "quantization=fp32")
    assert run["notes"] == []


@pytest.mark.parametrize(
    ("arguments", "totals"),
    [
        (("plan.device=rtx490",), "rtx4090"),
        (("--device", "a100"), "a100_40gb"),
        (("--fit", "24XB"), "GiB"),
        (("--fit", "24"), "no unit"),
        (("--fit", "much"), "a number above 0 with a unit"),
        (("--fit", "rtx4091"), "rtx4090"),
        (("--fit", "0GB"), "must be above 0"),
        (("--fit", "0"), "must be above 0"),
        (("--device", "cpu", "plan.device=cuda"), "not for both cpu and cuda"),
        (("budget.memory_bytes=1000",), "no quantization of this base fits"),
        (("demo", "budget.memory_bytes=1000"), "no quantization of this base fits"),
        (("--fit", "1GB", "model=llama3_1_8b"), "the base alone"),
        (("modle=embedded",), "did you mean model"),
        (("rank_doublings",), "rank_doubling"),
        (("quantization=nf5",), "nf4"),
        (("targets.modules=[q_prj]",), "q_proj"),
        (("lora.init=pissa",), "PiSSA"),
        (("model=local", "model.path=nowhere/config.json"), "no such"),
        (("rank_doubling", "sweep.ladder.margin=0.1,0.2"), "sweep.ladder.margin can't be an axis"),
        (("workers.count=1,2",), "workers.count can't be an axis"),
        (("lora.r=range(1,400)", "seed=range(1,400)"), "too many"),
    ],
)
def test_bad_input_is_one_clear_message(
    arguments: tuple[str, ...], totals: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, *arguments)
    assert totals in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("config", "totals"),
    [
        ("{", "can't be read"),
        ("{}", "names no model_type"),
        ('{"model_type": "lama"}', "llama"),
        (
            '{"model_type": "llama"}',
            "hidden_size, num_hidden_layers, vocab_size, num_attention_heads and intermediate_size",
        ),
        (json.dumps(TINY | {"num_attention_heads": 7}), "config.json"),
        (json.dumps(TINY | {"quantization_config": {"quant_method": "gptq"}}), "quantized already"),
    ],
)
def test_a_bad_configuration_file_is_told(
    config: str, totals: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(config)
    assert totals in refused(capsys, "model=local", f"model.path={tmp_path}/config.json")


def test_the_page_escapes_names_and_holds_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    assert main(["plan", "--html", str(page), "name='<script>','b'", "lora.r=1,2"]) == 0
    text = page.read_text()
    assert text.count("<tr>") == 1 + 4
    assert "<script>" not in text
    assert "can't be written" in refused(capsys, "--html", str(tmp_path / "none" / "plan.html"))


def test_a_memory_budget_is_what_a_plan_must_fit_into(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("model=llama3_1_8b", "quantization=nf4", "budget.memory_bytes=6000000000")
    for device in ((), ("plan.device=rtx4090",)):
        [run] = planned(capsys, *given, *device)
        assert run["fits"] is False
        assert " of 6 GB" in run["reason"]
    assert "takes 7.8 GB by itself" in refused(capsys, *given, "plan.device=cpu")
    [asked] = planned(capsys, *given, "plan.device=rtx4090", "lora.r=8", "budget.memory_bytes=20000000000")
    assert asked["fits"] is True


def test_sizes_are_read_in_both_kinds_of_units() -> None:
    assert size_bytes("24GB") == 24 * 10**9
    assert size_bytes("1.5 GiB") == 3 * 2**29
    assert size_bytes("rtx4090") == 24_564 * 2**20


def test_time_and_money_are_known_once_the_machine_is_calibrated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = ("model=llama3_1_8b", "lora.r=8,16", "plan.device=rtx4090", "budget.usd_per_hour=0.5")
    assert {run["seconds"] for run in planned(capsys, *asked)} == {None}
    rates = tmp_path / "qlora-exp" / "rates-2.json"
    rates.parent.mkdir()
    rates.write_text(json.dumps({"cuda, NVIDIA GeForce RTX 4090, 2.13.0": {"nf4": 1e14}}))
    for run in planned(capsys, *asked):
        low, high = run["seconds_interval"]
        assert 0 < low < run["seconds"] < high
        assert run["usd"] == pytest.approx(run["seconds"] / 3600 * 0.5)
    assert main(["plan", *asked]) == 0
    assert "training: " in capsys.readouterr().out
    assert {run["seconds"] for run in planned(capsys, *asked, "plan.device=t4")} == {None}
    assert main(["plan", *asked, "plan.device=t4"]) == 0
    assert "qlora-exp calibrate" in capsys.readouterr().out


def test_time_and_money_of_a_search_are_those_of_so_many_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlora_exp.estimate.planner import Planner
    from qlora_exp.estimate.tables import cost_summary
    from qlora_exp.estimate.throughput import Interval

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rates = tmp_path / "qlora-exp" / "rates-2.json"
    rates.parent.mkdir()
    rates.write_text(json.dumps({"cuda, NVIDIA GeForce RTX 4090, 2.13.0": {"nf4": 1e14}}))
    [point] = search_space(["model=llama3_1_8b"]).points
    one = Planner(device_by_name("rtx4090")).plan(point)
    assert one.seconds is not None
    searched = cost_summary([one], searched=2)
    alone = cost_summary([one, one])
    assert alone is not None
    totals, unseen = alone.split("; ")
    assert searched == f"{totals}, for 2 trials of a search between these; {unseen}"
    seconds, usd = Interval(3600.0, 5400.0, 9000.0, "a guess"), Interval(8.0, 12.0, 20.0, "a guess")
    totals = cost_summary([replace(one, seconds=seconds, usd=usd)])
    assert totals is not None
    assert totals.startswith("training: 1.5 h (1–2.5), 12 usd (8–20)")
    assert cost_summary([replace(one, fits=False)]) is None
    page = tmp_path / "plan.html"
    assert main(["plan", "model=llama3_1_8b", "plan.device=rtx4090", "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "1 configuration: 1 fit" in text
    assert "training: " in text


def test_finished_runs_here_tell_the_seconds_before_a_calibration_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = replace(probe_without_torch(), torch_threads=1)
    plan = Plan(
        "", "", "llama", 1, 1, 1, (), 1, 1.0, 1.0, "cpu", "nf4", "float32", "float32", 1, 1, 1, 1, False, "plain",
        train_flops_per_token=1e7, predicted_loss_tokens=1, padding_free=True,
    )  # fmt: skip
    record = RunRecord(
        SCHEMA_VERSION, "a-run", "a-run", Status.COMPLETED, "2026-01-01T00:00:00Z", None,
        to_plain(compose(["model=embedded", "quantization=nf4"])), here, plan=plan,
        speed=Speed(train_tokens=60_000, train_seconds=60.0, load_seconds=5.0, evaluation_seconds=35.0),
    )  # fmt: skip
    write_json(tmp_path / "outputs" / "runs" / "a-run" / "record.json", to_dict(record))
    asked = ("model=embedded", "quantization=nf4", "training.threads=1")
    assert planned(capsys, *asked, f"output_root={tmp_path / 'none'}")[0]["seconds"] is None
    asked += (f"output_root={tmp_path / 'outputs'}", "budget.usd_per_hour=1")
    [found] = planned(capsys, *asked)
    assert found["seconds"] > 0
    assert found["other_seconds"] == pytest.approx(40.0)
    assert found["other_seconds_interval"] == pytest.approx([20.0, 80.0])
    assert found["usd"] == pytest.approx((found["seconds"] + 40.0) / 3600.0)
    assert main(["plan", *asked]) == 0
    totals = capsys.readouterr().out
    assert "loading and scoring: 40 s (20–80)" in totals
    assert "load, score" in totals
    [found] = planned(capsys, *asked, "evaluation=quick")
    assert found["other_seconds"] is None
    assert main(["plan", *asked, "evaluation=quick"]) == 0
    assert "without loading and scoring" in capsys.readouterr().out


@pytest.mark.parametrize("other", [["--fit", "24GB"], ["--html", "page.html"]])
def test_sizes_refuse_an_option_that_they_would_not_heed(
    other: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--sizes", *other, "model=llama3_1_8b"]) == 2
    assert f"--sizes {other[0]}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_ladders_configurations_are_planned_as_scored_on_both_splits() -> None:
    configs = [point.config for point in search_space(["sweeps=demo"]).points]
    assert {config.evaluation.split.value for config in configs if config is not None} == {"test"}
    [single] = search_space(["model=embedded"]).points
    assert single.config is not None
    assert single.config.evaluation.split.value == "validation"


@pytest.mark.parametrize(
    ("driver", "memory_mib", "named", "bf16"),
    [
        ("NVIDIA H200", 143_771, "h200", True),
        ("NVIDIA A100-SXM4-80GB", 81_920, "a100_80gb", True),
        ("NVIDIA A100-SXM4-40GB", 40_960, "a100_40gb", True),
        ("Tesla T4", 15_360, "t4", False),
        ("NVIDIA GeForce RTX 4060 Ti", 8_188, "cuda", True),  # the table's has 16 GB
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 9_728, "cuda", True),
    ],
)
def test_a_local_model_is_planned_for_the_gpu_that_a_run_takes(
    monkeypatch: pytest.MonkeyPatch, driver: str, memory_mib: int, named: str, bf16: bool
) -> None:
    small, large = Card(0, "GPU-0", driver, 10, 2**30), Card(1, "GPU-1", driver, 20, memory_mib * 2**20)
    monkeypatch.setattr(plan_device, "cards", lambda: (small, large))
    monkeypatch.setattr(plan_device, "version", lambda package: "2.13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def planned_for(*overrides: str) -> plan_device.PlanDevice:
        plan_device.gpu_here.cache_clear()
        return plan_device.device_of(compose(list(overrides)))

    try:
        found = planned_for("model=embedded")
        assert (found.name, found.kind, found.bf16) == (named, "cuda", bf16)
        assert (found.memory_bytes, found.card) == (memory_mib * 2**20, driver)
        assert planned_for("model=local", "model.path=here") == found
        assert planned_for("model=embedded", "training.device=cpu").kind == "cpu"
        assert planned_for("model=smollm2_135m") == plan_device.CUDA
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0")
        assert planned_for("model=embedded").memory_bytes == 2**30
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert planned_for("model=embedded").kind == "cpu"
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        monkeypatch.setattr(plan_device, "version", lambda package: "2.13.0+cpu")
        assert planned_for("model=embedded").kind == "cpu"
    finally:
        plan_device.gpu_here.cache_clear()
