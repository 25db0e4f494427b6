"""What metering costs a step: one training whose steps are metered and plain SFTTrainer's, turn about (A B B A).

    OMP_NUM_THREADS=1 python tests/benchmarks/measurement_overhead.py [--rounds 5] [--steps 120]

One model and one row throughout: two trainings beside each other differ by up to 13 % in where their tensors lie, and
rows differ in length. Prints the processor seconds of a step (its thread's) and the wall seconds, the ratio of the
medians round by round, and, since two steps of one kind differ by more than metering takes, the seconds that are spent
inside our own code as a share of the step: the goal is at most 1 %.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from transformers import TrainerCallback
from trl import SFTTrainer

from qlora_exp.config.compose import compose
from qlora_exp.data.load import to_training_dataset
from qlora_exp.models.adapters import attach_adapters, recast_adapters
from qlora_exp.models.base import clone_sharing_weights, load_base
from qlora_exp.runs.prepare import prepare
from qlora_exp.runs.process import silence_libraries
from qlora_exp.system import environment
from qlora_exp.training.callbacks import GracefulInterrupt, LossCurve, StepMeter
from qlora_exp.training.outcome import NullObserver
from qlora_exp.training.trainer import _MeteredTrainer, trainer_arguments

WARM_UP = 5
KINDS = ("plain", "metered")
EVENTS = ("on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_log")


class Turns(TrainerCallback):  # type: ignore[misc]
    """Whether this step is metered, and the seconds of each: from its beginning to the next one's."""

    def __init__(self, first: str) -> None:
        self.first = KINDS.index(first)
        self.kind = first
        self.seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
        self.own_seconds = 0.0
        """Inside our own code, in the metered steps; what it calls of SFTTrainer's is taken off."""
        self._began: tuple[float, float] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = (time.thread_time(), time.perf_counter())
        if self._began is not None and state.global_step > WARM_UP:
            self.seconds[self.kind].append((now[0] - self._began[0], now[1] - self._began[1]))
        self.kind = KINDS[(self.first + (state.global_step % 4 in (1, 2))) % 2]
        self._began = (time.thread_time(), time.perf_counter())


def _passed_on(event: str) -> Callable[..., Any]:
    def call(self: Watcher, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.turns.kind == "plain":
            return None
        began = time.perf_counter()
        answer = getattr(self.inner, event)(args, state, control, **kwargs)
        self.turns.own_seconds += time.perf_counter() - began
        return answer

    return call


class Watcher(TrainerCallback):  # type: ignore[misc]
    """One of our callbacks, on the metered steps alone."""

    def __init__(self, inner: TrainerCallback, turns: Turns) -> None:
        self.inner, self.turns = inner, turns


for name in EVENTS:
    setattr(Watcher, name, _passed_on(name))


class Alternating(_MeteredTrainer):
    turns: Turns

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._one_of("training_step", *args, **kwargs)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        return self._one_of("_get_grad_norm", *args, **kwargs)

    def _one_of(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if self.turns.kind == "plain":
            return getattr(SFTTrainer, method)(self, *args, **kwargs)
        before, began = PLAIN_SECONDS[method], time.perf_counter()
        answer = getattr(_MeteredTrainer, method)(self, *args, **kwargs)
        self.turns.own_seconds += time.perf_counter() - began - (PLAIN_SECONDS[method] - before)
        return answer


PLAIN_SECONDS = {"training_step": 0.0, "_get_grad_norm": 0.0}


def _timed(method: str) -> None:
    """SFTTrainer's own method, its seconds counted."""
    inner = getattr(SFTTrainer, method)

    def call(self: SFTTrainer, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        answer = inner(self, *args, **kwargs)
        PLAIN_SECONDS[method] += time.perf_counter() - began
        return answer

    setattr(SFTTrainer, method, call)


for name in PLAIN_SECONDS:
    _timed(name)


def one_round(ready: Any, base: Any, config: Any, turns: Turns) -> None:
    row = ready.splits.train[0]
    model, meter = attach_adapters(clone_sharing_weights(base), config, ready.modules), StepMeter()
    with tempfile.TemporaryDirectory() as folder:
        watchers = [meter, LossCurve(Path(folder) / "curve.jsonl", meter, NullObserver()), GracefulInterrupt()]
        trainer = Alternating(
            model=model,
            args=trainer_arguments(ready.plan, config, Path(folder)),
            train_dataset=to_training_dataset([row] * ready.plan.micro_batch_size),
            processing_class=ready.tokenizer,
            callbacks=[turns, *(Watcher(watcher, turns) for watcher in watchers)],
        )
        trainer.meter, trainer.turns = meter, turns
        recast_adapters(model, config.lora)
        trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120)
    given = parser.parse_args()
    silence_libraries()
    config = compose([f"training.max_steps={given.steps}", "training.device=cpu", "targets=all_linear"])
    ready = prepare(config, environment.probe(config.training.device))
    base = load_base(config, "cpu")
    rounds, own = [], []
    for number in range(given.rounds):
        turns = Turns(KINDS[number % 2])
        one_round(ready, base, config, turns)
        rounds.append({kind: tuple(map(median, zip(*turns.seconds[kind], strict=True))) for kind in KINDS})
        own.append(turns.own_seconds / len(turns.seconds["metered"]) / rounds[-1]["metered"][1])
    print(f"| seconds a step (medians of {given.rounds} rounds) | plain | metered | ratio (median, min, max) |")
    print("|---|---|---|---|")
    for i, label in enumerate(("processor", "wall")):
        ratios = [figures["metered"][i] / figures["plain"][i] for figures in rounds]
        middle = [median(figures[kind][i] for figures in rounds) for kind in KINDS]
        spread = f"{median(ratios):.4f} ({min(ratios):.4f}, {max(ratios):.4f})"
        print(f"| {label} | {middle[0]:.4f} | {middle[1]:.4f} | {spread} |")
    print(f"inside our own code: {median(own):.3%} of a metered step ({min(own):.3%}, {max(own):.3%})")


if __name__ == "__main__":
    main()
