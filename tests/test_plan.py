"""The arithmetic of a plan, its fingerprints, and the checks between keys."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from qlora_exp.architecture import run_plan
from qlora_exp.architecture.shapes import Architecture, WeightShape
from qlora_exp.config.allowed_values import OPTIMIZERS, QUANTIZED, SCHEDULERS
from qlora_exp.config.checks import check
from qlora_exp.config.checks_task import parse_goal
from qlora_exp.config.compose import compose
from qlora_exp.config.enums import Quantization
from qlora_exp.config.schema import Config
from qlora_exp.errors import ConfigError
from qlora_exp.records.types import Plan
from qlora_exp.system.environment import probe

LAYER = tuple(
    WeightShape(f"layers.{layer}.{name}", "linear", size_in, size_out, size_in * size_out, role)
    for layer in range(32)
    for name, size_in, size_out, role in (
        ("self_attn.q_proj", 4096, 4096, "attention"),
        ("self_attn.k_proj", 4096, 1024, "attention"),
        ("self_attn.v_proj", 4096, 1024, "attention"),
        ("self_attn.o_proj", 4096, 4096, "attention"),
        ("mlp.up_proj", 4096, 14336, "mlp"),
    )
)
LLAMA_8B = Architecture("llama", 8_030_261_248, LAYER, "lm_head", 32, 4096, 128256)


def planned(*overrides: str, kind: str = "cpu", bf16: bool = False) -> Plan:
    config = compose(["model=llama3_1_8b", "training=default", *overrides])
    environment = probe()
    device = replace(environment.device, kind=kind, bf16=bf16)
    modules = [shape.name for shape in LAYER if shape.role == "attention"]
    return run_plan.make_plan(
        config,
        replace(environment, device=device),
        LLAMA_8B,
        modules,
        "plain",
        checkpointing=False,
        padded_because=None,
    )


def test_attention_of_an_8b_model_at_rank_8_is_the_known_number() -> None:
    made = planned("lora.r=8")
    # 32 layers of q, o: 8·(4096+4096) each; k, v: 8·(4096+1024) each
    assert made.trainable_parameters == 32 * 8 * (2 * 8192 + 2 * 5120) == 6_815_744
    assert made.full_parameters_of_adapted_modules == 32 * 4096 * (2 * 4096 + 2 * 1024)
    assert made.target_modules == ("k_proj", "o_proj", "q_proj", "v_proj")
    assert made.adapted_modules == 128
    assert planned("lora.r=16").trainable_parameters == 2 * made.trainable_parameters
    assert planned("lora.dora=true").trainable_parameters == made.trainable_parameters + 32 * (2 * 4096 + 2 * 1024)


def test_scale_under_each_policy() -> None:
    assert (planned("lora.r=8").alpha, planned("lora.r=8").scale) == (16, 2)
    assert (planned("lora.r=64").alpha, planned("lora.r=64").scale) == (128, 2)
    fixed = ("lora.alpha_policy=fixed", "lora.alpha=16")
    assert [planned(f"lora.r={r}", *fixed).scale for r in (8, 16, 32)] == [2, 1, 0.5]
    assert planned("lora.r=64", "lora.rslora=true", *fixed).scale == 2


@pytest.mark.parametrize(
    ("mode", "kind", "bf16", "dtypes"),
    [
        ("fp32", "cuda", True, ("float32", "float32")),
        ("bf16", "cpu", False, ("bfloat16", "bfloat16")),
        ("fp16", "cuda", True, ("float16", "float16")),
        ("nf4", "cpu", True, ("nf4", "float32")),
        ("nf4", "cuda", True, ("nf4", "bfloat16")),
        ("int8", "cuda", False, ("int8", "float16")),
    ],
)
def test_dtypes_are_those_of_mode_and_device(mode: str, kind: str, bf16: bool, dtypes: tuple[str, str]) -> None:
    made = planned(f"quantization={mode}", kind=kind, bf16=bf16)
    assert (made.weight_dtype, made.compute_dtype) == dtypes
    assert made.adapter_dtype == "float32"


def test_only_int8_rounds_inputs_and_on_a_cpu_only_in_evaluation() -> None:
    rounded = {
        (mode, kind): planned(f"quantization={mode}", kind=kind).inputs_rounded_in
        for mode in ("fp32", "nf4", "int8")
        for kind in ("cpu", "cuda")
    }
    assert rounded.pop(("int8", "cpu")) == ("evaluation",)
    assert rounded.pop(("int8", "cuda")) == ("training", "evaluation")
    assert set(rounded.values()) == {()}


def test_steps_and_accumulation() -> None:
    made = planned("training.batch_size=32", "training.micro_batch_size=4", "training.max_steps=70")
    assert (made.batch_size, made.micro_batch_size, made.gradient_accumulation_steps) == (32, 4, 8)
    assert made.max_steps == 70
    assert planned("training.max_steps=null", "training.max_tokens=1000", "training.batch_size=16").max_steps == 63


def fingerprints(*overrides: str) -> tuple[str, str]:
    config = compose(list(overrides))
    return run_plan.config_fingerprint(config), run_plan.base_fingerprint(config, "plain")


def test_fingerprints_change_with_what_changes_a_result_and_with_nothing_else() -> None:
    run, base = fingerprints()
    for idle in ("name=other", "output_root=/tmp/x", "tracking=off", "budget.usd_per_hour=3"):
        assert fingerprints(idle) == (run, base), idle
    for tuning in ("lora.r=16", "seed=2", "training.learning_rate=1e-5", "targets=mlp", "training.max_steps=7"):
        assert fingerprints(tuning)[0] != run, tuning
        assert fingerprints(tuning)[1] == base, tuning
    for both in ("quantization=fp16", "model.variant=instruct", "evaluation.max_items=5", "training.max_length=64"):
        assert fingerprints(both)[0] != run, both
        assert fingerprints(both)[1] != base, both
    assert run_plan.base_fingerprint(compose([]), "chat") != base
    # auto was sdpa once, and is still
    assert run_plan.base_fingerprint(compose(["model.attention=sdpa"]), "plain") == base
    assert run_plan.base_fingerprint(compose(["model.attention=eager"]), "plain") != base


def test_the_lists_of_names_are_transformers_own() -> None:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    assert set(OPTIMIZERS) == {name.value for name in OptimizerNames}
    assert set(SCHEDULERS) == {name.value for name in SchedulerType}


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"])
def test_8_bit_and_paged_optimizers_step_on_a_cpu(optimizer: str) -> None:
    """bitsandbytes has kernels for CPUs (and un-paged state there), so these names need no GPU."""
    import torch
    from transformers import Trainer, TrainingArguments

    model = torch.nn.Linear(128, 64)
    arguments = TrainingArguments(output_dir="unused", optim=optimizer, use_cpu=True, learning_rate=1e-3)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    stepper = kind(model.parameters(), **settings)
    before = model.weight.detach().clone()
    model(torch.ones(2, 128)).sum().backward()
    stepper.step()
    moved = (model.weight - before).abs()
    assert 5e-4 < moved.max() < 2e-3
    assert not check(compose([f"training.optimizer={optimizer}"]))


def test_all_problems_are_found_together() -> None:
    config = compose([])
    config.lora.r = 0
    config.lora.dropout = 1.0
    config.training.learning_rate = float("nan")
    config.training.max_steps = None
    config.training.scheduler = "cosin"
    config.targets.set = "atention"
    config.seed = -1
    config.budget.usd_per_hour = -2.0
    config.evaluation.max_new_tokens = 0
    problems = check(config)
    keys = [str(problem.where).split(" = ")[0] for problem in problems]
    assert keys == [
        "lora.r",
        "lora.dropout",
        "targets.set",
        "training.learning_rate",
        "training.scheduler",
        "training.max_steps",
        "evaluation.max_new_tokens",
        "budget.usd_per_hour",
        "seed",
    ]
    assert all(problem.hint for problem in problems)
    assert not check(compose([]))


def checked(change: object, *overrides: str) -> list[str]:
    config = compose(list(overrides))
    assert callable(change)
    change(config)
    return [f"{problem.where}: {problem.what}; {problem.hint}" for problem in check(config)]


def test_checkpoints_and_variants_must_be_known() -> None:
    def without_instruct(config: Config) -> None:
        del config.model.checkpoints["instruct"]

    assert "instruct" in checked(without_instruct, "model=qwen3_0_6b", "model.variant=instruct")[0]

    def with_a_url(config: Config) -> None:
        config.model.checkpoints["base"] = "https://huggingface.co/x"

    assert "model.checkpoints.base" in checked(with_a_url)[0]


def test_pissa_dtypes_and_needy_names_are_refused() -> None:
    from qlora_exp.config.enums import AdapterInit, ComputeDtype

    def pissa(config: Config) -> None:
        config.lora.init = AdapterInit.pissa

    for mode in Quantization:
        found = checked(pissa, f"quantization={mode.value}")
        assert bool(found) == (mode in QUANTIZED)

    def compute_in_fp16(config: Config) -> None:
        config.quantization.compute_dtype = ComputeDtype.float16

    assert not checked(compute_in_fp16, "quantization=nf4")
    assert "quantization=fp16" in checked(compute_in_fp16, "quantization=bf16")[0]

    def needy(config: Config) -> None:
        config.training.optimizer, config.training.scheduler = "galore_adamw", "reduce_lr_on_plateau"

    assert len(checked(needy)) == 2


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("accuracy >= 0.6", ("accuracy", ">=", 0.6)),
        ("loss<1.5", ("loss", "<", 1.5)),
        (" perplexity <= 1e1 ", ("perplexity", "<=", 10.0)),
        ("macro_f1 > .5", ("macro_f1", ">", 0.5)),
    ],
)
def test_goals_are_read(text: str, parsed: tuple[str, str, float]) -> None:
    assert parse_goal(text) == parsed


@pytest.mark.parametrize(
    "text",
    ["accuracy", "accuracy >= ", ">= 0.5", "accuracy == 0.5", "acuracy >= 0.5", "items >= 3", "accuracy >= 0.6 !"],
)
def test_other_goals_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_goal(text)
    assert caught.value.hint


def test_planning_loads_no_ml_library() -> None:
    heavy = "{'torch', 'transformers', 'peft', 'trl'}"
    code = f"import sys, qlora_exp.architecture.run_plan; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
