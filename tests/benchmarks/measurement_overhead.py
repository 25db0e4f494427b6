"""What metering costs a step: our trainer against a plain SFTTrainer, in turn, in one process.

    OMP_NUM_THREADS=1 python tests/benchmarks/measurement_overhead.py [--rounds 5] [--steps 40]

Prints the median step time of each, and the ratio round by round: the goal is at most 1.01.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from transformers import TrainerCallback
from trl import SFTTrainer

from qlora_exp import environment, models
from qlora_exp.app import quiet_libraries
from qlora_exp.callbacks import Curve, Interruption, StepMeter
from qlora_exp.compose import compose
from qlora_exp.data import to_training_dataset
from qlora_exp.endings import Silent
from qlora_exp.one_run import prepare
from qlora_exp.train import _MeteredTrainer, arguments

WARM_UP = 5


class Clock(TrainerCallback):  # type: ignore[misc]
    """Wall time from one step's beginning to the next one's, so that nothing between steps is missed."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.began, self.began[1:], strict=False)][WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    quiet_libraries()
    config = compose([f"training.max_steps={given.steps}", "training.device=cpu", "targets=all_linear"])
    ready = prepare(config, environment.probe(config.training.device))
    base = models.load_base(config, "cpu")
    dataset = to_training_dataset(ready.splits.train)
    ratios, times = [], {"plain": [], "metered": []}
    for _ in range(given.rounds):
        seconds = {}
        for kind in ("plain", "metered"):
            model = models.attach_adapters(models.shell(base), config, ready.modules)
            clock, meter = Clock(), StepMeter()
            with tempfile.TemporaryDirectory() as folder:
                curve = Curve(Path(folder) / "curve.jsonl", meter, Silent())
                watchers = [clock, *([meter, curve, Interruption()] if kind == "metered" else [])]
                trainer = (_MeteredTrainer if kind == "metered" else SFTTrainer)(
                    model=model,
                    args=copy.deepcopy(arguments(ready.plan, config, Path(folder))),
                    train_dataset=dataset,
                    processing_class=ready.tokenizer,
                    callbacks=watchers,
                )
                trainer.meter = meter
                models.recast_adapters(model, config.lora)
                trainer.train()
            seconds[kind] = median(clock.seconds())
            times[kind].append(seconds[kind])
        ratios.append(seconds["metered"] / seconds["plain"])
        print(f"plain {seconds['plain']:.4f} s  metered {seconds['metered']:.4f} s  ratio {ratios[-1]:.4f}", flush=True)
    print(f"| median step, plain | metered | ratio (median, min, max of {given.rounds} rounds) |\n|---|---|---|")
    spread = f"{median(ratios):.4f} ({min(ratios):.4f}, {max(ratios):.4f})"
    print(f"| {median(times['plain']):.4f} s | {median(times['metered']):.4f} s | {spread} |")


if __name__ == "__main__":
    main()
