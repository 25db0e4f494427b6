"""LoRA+ trains B at a multiple of A's learning rate; OLoRA is refused where PEFT's can't compute."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from qlora_exp.cli import main
from qlora_exp.config.compose import compose
from qlora_exp.models.base_cache import BaseCache
from qlora_exp.paths import OutputPaths
from qlora_exp.records.types import Status
from qlora_exp.runs.execute import execute
from tests.conftest import save_tiny_model

ONE_STEP = [
    *("tracking=off", "training.device=cpu", "training.max_steps=1", "training.batch_size=4", "seed=1"),
    *("training.learning_rate=1e-3", "training.scheduler=constant", "training.warmup_ratio=0"),
    *("task.max_train_items=16", "evaluation=quick", "evaluation.max_items=4", "evaluation.baselines=false"),
    *("evaluation.before=false", "quantization=nf4", "training.weight_decay=0"),
]


@pytest.mark.parametrize(("ratio", "expected"), [("null", 1e-3), ("8", 8e-3)])
def test_the_first_step_of_b_is_the_learning_rate_times_the_ratio(tmp_path: Path, ratio: str, expected: float) -> None:
    """Adam's first step moves each value by the learning rate, in the direction of its gradient."""
    config = compose([*ONE_STEP, f"lora.loraplus_lr_ratio={ratio}", f"output_root={tmp_path}"])
    record = execute(config, bases=BaseCache())
    assert record.status is Status.COMPLETED, record.failure
    saved = load_file(OutputPaths.of(tmp_path).run(record.run_id).adapter / "adapter_model.safetensors")
    largest = max(float(value.abs().max()) for name, value in saved.items() if "lora_B" in name)
    assert largest == pytest.approx(expected, rel=1e-3)


def test_olora_on_transposed_layers_is_refused_by_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny_model("gpt2", tmp_path / "gpt2")
    given = ["plan", "model=local", f"model.path={folder}", "quantization=fp32", "lora.init=olora"]
    assert main([*given, "training.device=cpu"]) == 2
    assert "lora.init=pissa" in capsys.readouterr().err
