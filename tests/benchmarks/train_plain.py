"""One trial as it is written today: load, quantize, adapt, SFTTrainer, evaluate, save; called once per trial.

python tests/benchmarks/train_plain.py --r 8 --learning-rate 1e-3 --seed 1 --steps 80 --batch 32 --items 64 --output DIR

--speed prints a line when the first step has ended, and at the end the real tokens and the seconds from the end of step
5 to the end of the last one.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

EMBEDDED = Path(__file__).resolve().parents[2] / "qlora_exp" / "embedded"


def rows(split: str, limit: int | None = None) -> Dataset:
    lines = (EMBEDDED / "task" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:limit]
    items = [json.loads(line) for line in lines]
    return Dataset.from_list(
        [{"prompt": f"Definition: {i['definition']}\nCategory:", "completion": f" {i['category']}"} for i in items]
    )


class Speed(TrainerCallback):  # type: ignore[misc]
    """Real tokens and moments of the ends of steps; TRL counts the tokens."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append((time.perf_counter(), float(self.trainer._total_train_tokens)))
        if len(self.ends) == 1:
            print("first step", flush=True)

    def measured(self) -> dict[str, float]:
        (began, before), (ended, after) = self.ends[4], self.ends[-1]
        return {"tokens": after - before, "seconds": ended - began}


def train(given: argparse.Namespace) -> float:
    """Train and evaluate one trial; return its validation loss."""
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            EMBEDDED / "base", quantization_config=quantized, dtype=torch.float32, device_map="cpu"
        ),
        args=SFTConfig(
            output_dir=given.output,
            max_steps=given.steps,
            per_device_train_batch_size=given.batch,
            learning_rate=given.learning_rate,
            seed=given.seed,
            use_cpu=True,
            bf16=False,
            logging_steps=5,
            logging_first_step=True,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=rows("train"),
        eval_dataset=rows("validation", given.items),
        processing_class=AutoTokenizer.from_pretrained(EMBEDDED / "base"),
        peft_config=LoraConfig(
            r=given.r, lora_alpha=2 * given.r, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
        ),
    )
    speed = Speed()
    if given.speed:
        speed.trainer = trainer
        trainer.add_callback(speed)
    trainer.train()
    if given.speed:
        print(json.dumps(speed.measured()), flush=True)
    scores = trainer.evaluate()
    print(json.dumps(scores))
    trainer.save_model(given.output)
    return float(scores["eval_loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("r", "seed", "steps", "batch", "items"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--speed", action="store_true")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
