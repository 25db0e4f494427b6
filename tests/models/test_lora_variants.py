"""LoRA+, ranks by module, and OLoRA where PEFT's can't compute."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from qlora_exp.architecture.shapes import WeightShape
from qlora_exp.architecture.tuned_weights import trained_modules
from qlora_exp.cli import main
from qlora_exp.config.compose import compose
from qlora_exp.config.schema import Config
from qlora_exp.estimate.weights_and_optimizer import adapter_bytes
from qlora_exp.models.base_cache import BaseCache
from qlora_exp.models.inspect import describe
from qlora_exp.paths import OutputPaths
from qlora_exp.records.types import Status
from qlora_exp.runs.execute import execute
from tests.conftest import save_tiny_model

ONE_STEP = [
    *("tracking=off", "training.device=cpu", "training.max_steps=1", "training.batch_size=4", "seed=1"),
    *("training.learning_rate=1e-3", "training.scheduler=constant", "training.warmup_ratio=0"),
    *("task.max_train_items=16", "evaluation=quick", "evaluation.max_items=4", "evaluation.baselines=false"),
    *("lora.rank_pattern={q_proj: 2}", "targets=attention"),
    *("evaluation.before=false", "quantization=nf4", "training.weight_decay=0"),
]


@pytest.mark.parametrize(("ratio", "expected"), [("null", 1e-3), ("8", 8e-3)])
def test_the_first_step_of_b_is_the_learning_rate_times_the_ratio_and_modules_have_their_ranks(
    tmp_path: Path, ratio: str, expected: float
) -> None:
    """Adam's first step moves each value by the learning rate, in the direction of its gradient."""
    config = compose([*ONE_STEP, f"lora.loraplus_lr_ratio={ratio}", f"output_root={tmp_path}"])
    record = execute(config, bases=BaseCache())
    assert record.status is Status.COMPLETED, record.failure
    saved = load_file(OutputPaths.of(tmp_path).run(record.run_id).adapter / "adapter_model.safetensors")
    largest = max(float(value.abs().max()) for name, value in saved.items() if "lora_B" in name)
    assert largest == pytest.approx(expected, rel=1e-3)
    ranks = {name.split(".")[-3]: value.shape[0] for name, value in saved.items() if "lora_A" in name}
    assert ranks == {"q_proj": 2, "k_proj": 8, "v_proj": 8, "o_proj": 8}
    assert record.plan is not None
    assert record.plan.trainable_parameters == sum(value.numel() for value in saved.values())
    assert record.memory.adapter_bytes == 4 * record.plan.trainable_parameters
    planned = adapter_bytes(adapted_layers(config), config.lora, config.training.optimizer)
    assert (planned.optimizer_bytes, planned.file_bytes) == (record.memory.optimizer_bytes, record.memory.saved_bytes)


def adapted_layers(config: Config) -> list[WeightShape]:
    architecture = describe(config.model)
    names = trained_modules(architecture, config)
    return [shape for shape in architecture.weights if shape.name in names]


def test_olora_on_transposed_layers_is_refused_by_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny_model("gpt2", tmp_path / "gpt2")
    given = ["plan", "model=local", f"model.path={folder}", "quantization=fp32", "lora.init=olora"]
    assert main([*given, "training.device=cpu"]) == 2
    assert "lora.init=pissa" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (["lora.rank_pattern={w_proj: 4}"], "no target module is called w_proj"),
        (["lora.rank_pattern={q_proj: 0}"], "1 to 65536"),
        (["lora.rank_pattern={q_proj: 4}", "lora.rslora=true"], "lora.rank_pattern=null"),
        (["lora.rank_pattern={q_proj: 4}", "lora.alpha=16"], "lora.alpha_policy=2r"),
        (["lora.rank_pattern={q_proj: 4}", "method=full", "quantization=fp32"], "no LoRA adapters"),
    ],
)
def test_ranks_that_fit_no_module_or_setting_are_refused_by_the_plan(
    given: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "quantization=nf4", "training.device=cpu", "targets=attention", *given]) == 2
    assert hint in " ".join(capsys.readouterr().err.split())
