"""A base that is lent to one trial after the other gives what a fresh process gives, and stays as it was."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_exp.config.compose import compose
from qlora_exp.models.base_cache import BaseCache
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.runs.execute import execute

QUICK = [
    *("model=embedded", "tracking=off", "training.device=cpu", "training.max_steps=3", "training.batch_size=4"),
    *("training.logging_steps=1", "task.max_train_items=64", "evaluation.max_items=8", "evaluation.forgetting=false"),
    *("evaluation.baselines=false", "evaluation.cache=false"),
]
A = ["lora.r=4", "targets=attention"]
B = ["lora.r=8", "targets=all_linear", "lora.dropout=0.1", "training.gradient_checkpointing=on", "seed=2"]
C = ["lora.r=2", "targets=mlp", "lora.rslora=true", "training.evaluate_every_steps=2", "training.max_length=128"]
DORA = ["lora.r=4", "targets=attention", "lora.dora=true"]
PISSA = ["lora.r=4", "targets=attention", "lora.init=pissa"]


def overrides(output: Path, mode: str, trial: list[str]) -> list[str]:
    return [*QUICK, f"quantization={mode}", f"output_root={output}", *trial]


def result(record: RunRecord, output: Path) -> dict[str, Any]:
    """Everything that two equal runs must have in common, to the last bit."""
    assert record.status is Status.COMPLETED, record.failure
    paths = OutputPaths.of(output).run(record.run_id)
    points = [json.loads(line) for line in paths.curve.read_text(encoding="utf-8").splitlines()]
    return {
        "adapter": hashlib.sha256((paths.adapter / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "curve": [{key: value for key, value in point.items() if key != "seconds"} for point in points],
        "scores": record.scores,
    }


def in_fresh_process(output: Path, mode: str, trial: list[str]) -> dict[str, Any]:
    program = "import sys; from qlora_exp import run; print(run(*sys.argv[1:]).run_id)"
    done = subprocess.run(
        [sys.executable, "-c", program, *overrides(output, mode, trial)], capture_output=True, text=True, check=True
    )
    return result(read_record(OutputPaths.of(output).run(done.stdout.split()[-1]).record), output)


def run(output: Path, mode: str, trial: list[str], bases: BaseCache | None = None) -> dict[str, Any]:
    return result(execute(compose(overrides(output, mode, trial)), bases=bases), output)


def state(model: torch.nn.Module) -> dict[str, Any]:
    """Hooks, flags and attributes of every module, and bytes and flags of every tensor."""
    found: dict[str, Any] = {"use_cache": model.config.use_cache, "config": str(model.config)}
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str)}
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        found[f"module {name}"] = (type(module).__name__, sorted(vars(module)), plain, hooks, module.training)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest = hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        found[f"tensor {name}"] = (digest, tensor.requires_grad, tensor.grad is None, str(tensor.dtype))
    return found


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("fp32", marks=pytest.mark.long),
        "nf4",
        *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("fp16", "int8")),
    ],
)
def test_warm_trials_equal_fresh_ones_and_leave_the_base_as_it_was(tmp_path: Path, mode: str) -> None:
    bases = BaseCache()
    base = bases.get(compose(overrides(tmp_path, mode, A)), "cpu")
    before = state(base.model)
    fresh = {"A": in_fresh_process(tmp_path, mode, A)}
    fresh |= {name: run(tmp_path, mode, trial) for name, trial in {"B": B, "C": C}.items()}
    for name in "ABACA":
        assert run(tmp_path, mode, {"A": A, "B": B, "C": C}[name], bases) == fresh[name], name
    assert bases.get(compose(overrides(tmp_path, mode, A)), "cpu") is base
    assert state(base.model) == before


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fp32", "fp16", "nf4", "int8"])
def test_every_warm_trial_equals_one_in_a_fresh_process(tmp_path: Path, mode: str) -> None:
    bases = BaseCache()
    trials = {"A": A, "B": B, "C": C}
    fresh = {name: in_fresh_process(tmp_path, mode, trial) for name, trial in trials.items()}
    for name in "ABACA":
        assert run(tmp_path, mode, trials[name], bases) == fresh[name], name


@pytest.mark.parametrize("trial", [PISSA, DORA], ids=["pissa", "dora"])
def test_other_kinds_of_adapters_leave_a_lent_base_as_it_was(tmp_path: Path, trial: list[str]) -> None:
    bases = BaseCache()
    base = bases.get(compose(overrides(tmp_path, "fp32", trial)), "cpu")
    before = state(base.model)
    assert run(tmp_path, "fp32", trial, bases) == run(tmp_path, "fp32", trial)
    assert state(base.model) == before


def test_another_base_takes_the_place_of_the_kept_one(tmp_path: Path) -> None:
    bases = BaseCache()
    first = bases.get(compose(overrides(tmp_path, "fp32", A)), "cpu")
    again = bases.get(compose(overrides(tmp_path, "fp32", [*A, "lora.r=16", "seed=3"])), "cpu")
    other = bases.get(compose(overrides(tmp_path, "fp32", [*A, "model.variant=instruct"])), "cpu")
    assert again is first
    assert other is not first
    assert other.fingerprint != first.fingerprint


def test_a_task_file_that_changed_is_read_again(tmp_path: Path, colour_task: Path) -> None:
    bases = BaseCache()
    task = ["task=local", "task.kind=classification", f"task.path={colour_task}"]

    def items() -> int:
        record = execute(compose(overrides(tmp_path, "fp32", [*A, *task, "training.max_steps=1"])), bases=bases)
        assert record.data is not None
        return record.data.train_items + record.data.validation_items + record.data.test_items

    first = items()
    assert items() == first
    rows = colour_task.read_text(encoding="utf-8").splitlines()
    colour_task.write_text("\n".join(rows[:-10]) + "\n", encoding="utf-8")
    assert items() < first
