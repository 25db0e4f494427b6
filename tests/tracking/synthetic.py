"""Made-up records for the tests of tracking: the figures mean nothing, only their shape is that of a real run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.numpy import save_file

from qlora_exp.config.schema import register, to_plain, typed
from qlora_exp.paths import CONF, OutputPaths, RunPaths
from qlora_exp.records.files import write_json, write_text
from qlora_exp.records.types import (
    SCHEMA_VERSION,
    Baselines,
    Data,
    Device,
    Environment,
    Failure,
    Goal,
    Memory,
    Plan,
    RunRecord,
    Scores,
    ScoreTable,
    Speed,
    Status,
    Training,
)
from qlora_exp.system.environment import process_identity


def config(*overrides: str) -> dict[str, Any]:
    register()
    with initialize_config_dir(str(CONF), version_base=None):
        return to_plain(typed(compose("config", overrides=list(overrides))))


def running(run_id: str = "made-up-1", *overrides: str, seed: int = 1) -> RunRecord:
    """As written when a run begins."""
    device = Device("cpu", "Made-up CPU", 1, 8 * 2**30, None, None, False)
    environment = Environment(
        *("3.11", "Linux", {"qlora-exp": "0.1.0", "torch": "2.13.0"}, device, 2, 8 * 2**30, 1, "1", "PASSIVE"),
        git_commit="0123456789abcdef0123456789abcdef01234567",
        git_dirty=True,
    )
    plain = config(*overrides, f"seed={seed}")
    return RunRecord(
        schema_version=SCHEMA_VERSION,
        run_id=run_id,
        name=f"{plain['model']['variant']} {plain['quantization']['mode']} r{plain['lora']['r']}",
        status=Status.RUNNING,
        started_at="2026-01-02T03:04:05+00:00",
        ended_at=None,
        config=plain,
        environment=environment,
        process=process_identity(),
        seed=seed,
        plan=_plan(plain),
    )


def completed(run_id: str = "made-up-1", *overrides: str, seed: int = 1, after: float = 0.55) -> RunRecord:
    record = running(run_id, *overrides, seed=seed)
    rank = record.config["lora"]["r"]
    return record.replace(
        status=Status.COMPLETED,
        ended_at="2026-01-02T03:05:35+00:00",
        data=Data("embedded", "sha256:" + "ab" * 32, 8000, 500, 1000, 0, {}, ("act", "plant"), 20.5, 2.0, 0, None, 0),
        memory=Memory(
            base_weight_bytes=9_600_000,
            adapter_bytes=4 * 12_288 * rank,
            optimizer_bytes=8 * 12_288 * rank,
            peak_train_bytes=210_000_000 + 90_000 * rank,
            peak_evaluation_bytes=90_000_000,
            source="resident",
        ),
        speed=Speed(
            load_seconds=0.4,
            train_seconds=31.0,
            evaluation_seconds=6.0,
            train_tokens_per_second=2400.0 - rank,
            step_seconds_p50=0.15,
        ),
        training=Training(steps=80, first_loss=2.6, final_loss=0.9, epochs=0.3),
        scores=ScoreTable(before=_scores(0.2, 4.1), after=_scores(after, 2.4 - after)),
        baselines=Baselines("validation", "act", 0.154, 0.04, 0.62, 0.55, 1.0),
        goal=Goal("accuracy >= 0.5", "validation", after, after - 0.04, after + 0.04, "not shown"),
    )


def failed(run_id: str, status: Status = Status.FAILED, message: str = "made-up failure") -> RunRecord:
    return running(run_id).replace(
        status=status,
        ended_at="2026-01-02T03:04:35+00:00",
        failure=Failure("RuntimeError", message, phase="train", step=7, hint="nothing: it is made up"),
    )


def write_run(output: OutputPaths, record: RunRecord, steps: int = 16, adapter: bool = True) -> RunPaths:
    """The run folder as a run leaves it."""
    paths = output.run(record.run_id)
    paths.folder.mkdir(parents=True, exist_ok=True)
    write_json(paths.record, record)
    write_text(paths.config, OmegaConf.to_yaml(OmegaConf.create(record.config)))
    write_text(paths.curve, "".join(json.dumps(point) + "\n" for point in curve(steps)))
    if adapter:
        write_adapter(paths.adapter)
    return paths


def curve(steps: int = 16) -> list[dict[str, Any]]:
    return [
        {
            "step": 5 * number,
            "loss": 2.6 * 0.93**number,
            "learning_rate": 2e-4 * (1 - number / (steps + 1)),
            "gradient_norm": 1.0 / number,
            "tokens": 3000 * number,
            "seconds": 0.8 * number,
        }
        for number in range(1, steps + 1)
    ]


def write_adapter(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"lora_A": np.zeros((8, 4), dtype=np.float32)}, folder / "adapter_model.safetensors")
    write_text(folder / "adapter_config.json", json.dumps({"r": 8, "peft_type": "LORA"}))
    (folder / "training_args.bin").write_bytes(b"a pickle that must never be shown")
    (folder / "optimizer.pt").write_bytes(b"another")


def _plan(plain: dict[str, Any]) -> Plan:
    rank = plain["lora"]["r"]
    return Plan(
        config_fingerprint="c" * 64,
        base_fingerprint="b" * 64,
        architecture="llama",
        total_parameters=2_400_000,
        trainable_parameters=12_288 * rank,
        full_parameters_of_adapted_modules=1_200_000,
        target_modules=("k_proj", "o_proj", "q_proj", "v_proj"),
        adapted_modules=16,
        alpha=2.0 * rank,
        scale=2.0,
        device="cpu",
        weight_dtype=plain["quantization"]["mode"],
        compute_dtype="float32",
        adapter_dtype="float32",
        max_steps=80,
        batch_size=32,
        micro_batch_size=32,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        format="plain",
    )


def _scores(accuracy: float, loss_per_item: float) -> Scores:
    return Scores(
        split="validation",
        items=500,
        loss=loss_per_item / 2.4,
        loss_per_item=loss_per_item,
        perplexity=2.0,
        token_accuracy=accuracy + 0.1,
        accuracy=accuracy,
        accuracy_calibrated=accuracy + 0.02,
        macro_f1=accuracy - 0.05,
        exact_match=accuracy - 0.01,
        invalid_answer_rate=0.02,
    )
