"""What a training step costs the processor beyond SFTTrainer's arithmetic: this trainer and plain SFTTrainer, in turns.

    OMP_NUM_THREADS=1 python tests/benchmarks/step_overhead.py [--rounds 4] [--steps 24]

All train the embedded base (nf4, r = 8) in one process on the same rows, with the same settings and padding: the
longest row alone, which is mostly the host's work, and 16 rows of the embedded task. Plain SFTTrainer computes the
logits of all tokens on a CPU; *few logits* is SFTTrainer with those of tokens with a loss alone, as it does on a GPU.
Prints processor milliseconds a step (least and median of all steps but a training's first five), the ratio to *few
logits*, and how often a step reads the device or visits a module. On a GPU the host's work adds to the time only where
the GPU waits for it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch
import trl.trainer.utils
from transformers import PrinterCallback, TrainerCallback
from trl import SFTTrainer

from qlora_exp.config.compose import compose
from qlora_exp.data.load import to_training_dataset
from qlora_exp.models.adapters import attach_adapters, recast_adapters
from qlora_exp.models.base import clone_sharing_weights, load_base
from qlora_exp.runs.prepare import prepare
from qlora_exp.runs.process import silence_libraries
from qlora_exp.system import environment
from qlora_exp.training.callbacks import StepMeter
from qlora_exp.training.trainer import _MeteredTrainer, trainer_arguments
from tests.test_light_trainer import METHODS, Waits

WARM_UP = 5
KINDS = ("SFTTrainer", "SFTTrainer, few logits", "qlora-exp")


class Clock(TrainerCallback):  # type: ignore[misc]
    """Processor seconds of this thread from one step's end to the next one's."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.thread_time()
        if self._last is not None and state.global_step > WARM_UP:
            self.seconds.append(now - self._last)
        self._last = now


def train(kind: str, ready: Any, base: Any, config: Any, rows: list[Any], counting: Any = None) -> list[float]:
    """Return the processor seconds of the training's steps."""
    model, clock, meter = attach_adapters(clone_sharing_weights(base), config, ready.modules), Clock(), StepMeter()
    with tempfile.TemporaryDirectory() as folder:
        ours = kind == "qlora-exp"
        trainer = (_MeteredTrainer if ours else SFTTrainer)(
            model=model,
            args=trainer_arguments(ready.plan, config, Path(folder)),
            train_dataset=to_training_dataset(rows),
            processing_class=ready.tokenizer,
            callbacks=[meter, clock] if ours else [clock],
        )
        trainer.remove_callback(PrinterCallback)
        recast_adapters(model, config.lora)
        trainer.meter = meter
        if counting is not None:
            counting(trainer)
        check = trl.trainer.utils._use_triton
        if "few logits" in kind:
            trl.trainer.utils._use_triton = lambda device: True
        try:
            trainer.train()
        finally:
            trl.trainer.utils._use_triton = check
    return clock.seconds


def count(kind: str, ready: Any, base: Any, config: Any, rows: list[Any]) -> tuple[float, float]:
    """Return how often a step reads the device and visits a module, logging included."""
    waits, visits = Waits(), Counter[str]()
    read, walk, counted = torch.Tensor.tolist, torch.nn.Module.named_modules, False

    def tolist(tensor: torch.Tensor) -> Any:
        waits.counts["tolist"] += counted
        return read(tensor)

    def named_modules(*arguments: Any, **named: Any) -> Any:
        visits["modules"] += counted
        return walk(*arguments, **named)

    def counting(trainer: Any) -> None:
        def wrapped(method: Any) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                nonlocal counted
                counted = True
                with waits:
                    result = method(*arguments, **named)
                counted = False
                return result

            return call

        for name in (*METHODS, "floating_point_ops"):
            setattr(trainer, name, wrapped(getattr(trainer, name)))

    torch.Tensor.tolist, torch.nn.Module.named_modules = tolist, named_modules
    try:
        train(kind, ready, base, config, rows, counting)
    finally:
        torch.Tensor.tolist, torch.nn.Module.named_modules = read, walk
    steps = config.training.max_steps
    return sum(waits.counts.values()) / steps, visits["modules"] / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=24)
    given = parser.parse_args()
    silence_libraries()
    base = None
    print("| rows × tokens | trainer | ms a step: least | median | reads a step | module visits a step |")
    print("|---|---|---|---|---|---|")
    for size, label in ((1, "1 × 64"), (16, "16 of the task")):
        options = [f"training.max_steps={given.steps}", f"training.batch_size={size}", "quantization=nf4", "lora.r=8"]
        config = compose([*options, "training.device=cpu", "training.threads=1"])
        ready = prepare(config, environment.probe(config.training.device))
        base = base or load_base(config, "cpu")
        train_rows = ready.splits.train
        rows = train_rows[: size * given.steps]
        if size == 1:
            longest = max(train_rows, key=lambda item: len(item.ids))
            rows = [longest] * given.steps
            label = f"1 × {len(longest.ids)}"
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for number in range(given.rounds):
            for kind in KINDS if number % 2 == 0 else KINDS[::-1]:
                seconds[kind] += train(kind, ready, base, config, rows)
        for kind in KINDS:
            reads, visits = count(kind, ready, base, config, rows)
            least, middle = 1000 * min(seconds[kind]), 1000 * median(seconds[kind])
            print(f"| {label} | {kind} | {least:.1f} | {middle:.1f} | {reads:.1f} | {visits:.0f} |")
        ratios = [reduce(seconds[KINDS[2]]) / reduce(seconds[KINDS[1]]) for reduce in (min, median)]
        print(f"| {label} | ratio | {ratios[0]:.3f} | {ratios[1]:.3f} | | |")


if __name__ == "__main__":
    main()
