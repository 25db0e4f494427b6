"""One training of plain TRL, as its documentation has QLoRA: python plain_trl.py MODEL ROWS RESULT KIND STEPS CELL

KIND: ``documented`` (gradient checkpointing, no other setting), ``tuned`` (fused AdamW, checkpointing as the cell,
batches of similar lengths, Liger's kernels where installed), ``bf16`` (tuned, on an unquantized base). Imports nothing
of this project, so that none of its settings are in effect.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

LEFT_OUT = 5


class Clock(TrainerCallback):
    """The time of each step's end, after the GPU has done it."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())


def rows_of(file: Path, tokenizer: Any, length: int) -> Dataset:
    made = []
    for line in file.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        prompt = tokenizer(item["prompt"])["input_ids"]
        completion = [*tokenizer(item["completion"])["input_ids"], tokenizer.eos_token_id]
        ids = [*prompt, *completion][:length]
        made.append({"input_ids": ids, "labels": ([-100] * len(prompt) + completion)[:length]})
    return Dataset.from_list(made)


def settings(kind: str, cell: dict[str, Any], steps: int, folder: str, cuda: bool) -> SFTConfig:
    known = inspect.signature(SFTConfig).parameters
    chosen: dict[str, Any] = {"gradient_checkpointing": True, "optim": cell["optimizer"]}
    if kind != "documented":
        chosen["gradient_checkpointing"] = cell["checkpointing"] == "on"
        chosen["optim"] = "adamw_torch_fused"
        if "train_sampling_strategy" in known:
            chosen["train_sampling_strategy"] = "group_by_length"
        chosen["use_liger_kernel"] = cuda and importlib.util.find_spec("liger_kernel") is not None
    return SFTConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=cell["rows"],
        gradient_accumulation_steps=cell["accumulation"],
        bf16=True,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        max_length=cell["length"],
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=100,
        **chosen,
    )


def main(model_folder: str, rows: str, result: str, kind: str, steps: str, cell_json: str) -> None:
    cell, cuda = json.loads(cell_json), torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dataset = rows_of(Path(rows), tokenizer, cell["length"])
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        model_folder,
        quantization_config=quantized if cell["mode"] == "nf4" and kind != "bf16" else None,
        dtype=torch.bfloat16,
        device_map={"": 0 if cuda else "cpu"},
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = settings(kind, cell, int(steps), folder, cuda)
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=cell["r"], lora_alpha=2 * cell["r"], target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[clock],
        )
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    left_out = LEFT_OUT if len(clock.stamps) > 2 * LEFT_OUT else 1
    seconds = (clock.stamps[-1] - clock.stamps[left_out - 1]) / (len(clock.stamps) - left_out)
    tokens = cell["rows"] * cell["accumulation"] * sum(map(len, dataset["input_ids"])) / len(dataset)
    found = {
        "tokens_per_second": tokens / seconds,
        "seconds_per_step": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "liger": bool(arguments.use_liger_kernel),
        "optimizer": str(arguments.optim),
        "checkpointing": bool(arguments.gradient_checkpointing),
    }
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
