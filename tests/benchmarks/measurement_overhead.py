"""What metering costs a step: our trainer beside a plain SFTTrainer, a step of one and a step of the other in turn.

    OMP_NUM_THREADS=1 python tests/benchmarks/measurement_overhead.py [--rounds 5] [--steps 60]

Each has a thread of its own and one works at a time, on the same batches, so that a busy machine slows both alike.
Prints the processor seconds of a step (those of its thread) and the wall seconds, and the ratio of the sums round by
round: the goal is at most 1.01.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import threading
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
from qlora_exp.train import _MeteredTrainer, arguments, logits_where_there_is_a_label

WARM_UP = 5


class Turns:
    """Whose step it is: two trainings hand it to each other."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names, self.turn, self.changed = names, 0, threading.Condition()
        self.left: set[str] = set()

    def wait(self, name: str) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.names[self.turn] == name or self.left - {name})

    def pass_on(self) -> None:
        with self.changed:
            self.turn = 1 - self.turn
            self.changed.notify_all()

    def leave(self, name: str) -> None:
        with self.changed:
            self.left.add(name)
            self.changed.notify_all()


class Plain(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with our saving in the head, which is no metering."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with logits_where_there_is_a_label():
            return super().compute_loss(*args, **kwargs)


class Clock(TrainerCallback):  # type: ignore[misc]
    """From one step's beginning to the next one's, the wait for the other training left out."""

    def __init__(self, name: str, turns: Turns) -> None:
        self.name, self.turns = name, turns
        self.processor: list[float] = []
        self.wall: list[float] = []
        self._began: tuple[float, float] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._began is not None:
            self.processor.append(time.thread_time() - self._began[0])
            self.wall.append(time.perf_counter() - self._began[1])
            self.turns.pass_on()
        self.turns.wait(self.name)
        self._began = (time.thread_time(), time.perf_counter())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.turns.leave(self.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    quiet_libraries()
    config = compose([f"training.max_steps={given.steps}", "training.device=cpu", "targets=all_linear"])
    ready = prepare(config, environment.probe(config.training.device))
    base = models.load_base(config, "cpu")
    dataset = to_training_dataset(ready.splits.train)
    rows = []
    for number in range(given.rounds):
        names = ("plain", "metered") if number % 2 else ("metered", "plain")
        turns = Turns(names)
        clocks = {name: Clock(name, turns) for name in names}
        with tempfile.TemporaryDirectory() as folder:
            trainers = {}
            for name, clock in clocks.items():
                model, meter = models.attach_adapters(models.shell(base), config, ready.modules), StepMeter()
                curve = Curve(Path(folder) / "curve.jsonl", meter, Silent())
                watchers = [clock, *([meter, curve, Interruption()] if name == "metered" else [])]
                trainers[name] = (_MeteredTrainer if name == "metered" else Plain)(
                    model=model,
                    args=copy.deepcopy(arguments(ready.plan, config, Path(folder) / name)),
                    train_dataset=dataset,
                    processing_class=ready.tokenizer,
                    callbacks=watchers,
                )
                trainers[name].meter = meter
                models.recast_adapters(model, config.lora)
            beside = threading.Thread(target=trainers["plain"].train)
            beside.start()
            trainers["metered"].train()  # in the main thread: it alone can take signals
            beside.join()
        sums = {name: (sum(clock.processor[WARM_UP:]), sum(clock.wall[WARM_UP:])) for name, clock in clocks.items()}
        steps = len(clocks["plain"].wall[WARM_UP:])
        rows.append((*(sums["plain"][i] / steps for i in (0, 1)), *(sums["metered"][i] / steps for i in (0, 1))))
        processor, wall = rows[-1][2] / rows[-1][0], rows[-1][3] / rows[-1][1]
        print(f"round {number + 1}: processor {processor:.4f}, wall {wall:.4f}", flush=True)
    print(f"| seconds a step (medians of {given.rounds} rounds) | plain | metered | ratio (median, min, max) |")
    print("|---|---|---|---|")
    for label, plain, metered in (("processor", 0, 2), ("wall", 1, 3)):
        ratios = [row[metered] / row[plain] for row in rows]
        middle = [median(row[column] for row in rows) for column in (plain, metered)]
        spread = f"{median(ratios):.4f} ({min(ratios):.4f}, {max(ratios):.4f})"
        print(f"| {label} | {middle[0]:.4f} | {middle[1]:.4f} | {spread} |")


if __name__ == "__main__":
    main()
