"""Trainer callbacks: step meter, loss curve, token limit, budget, pruning, and graceful interrupt."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from qlora_exp.analysis.pilots import comparison_loss, comparison_step
from qlora_exp.config.shipping import QatConfig
from qlora_exp.models.fake_quantization import FakeQuantization, strength_at
from qlora_exp.records.files import read_curve, training_losses, write_text
from qlora_exp.records.types import PilotLoss
from qlora_exp.system import signals
from qlora_exp.training.meter import tensor_bytes
from qlora_exp.training.outcome import Observer, PruneCheck, Pruned

EXCLUDED_STEPS = 5
CURVE_NAMES = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "gradient_norm",
    "eval_loss": "validation_loss",
}
"""The trainer's metric names, and their names in curve.jsonl."""
ITEM_NATS = "eval_item_nats"
"""Metric with nats of each validation item, in order; in addition to ``eval_loss`` if ``PruneCheck.per_item``."""
MAX_SCALER_SKIPS = 10
"""Consecutive non-finite gradients that are allowed under a loss scaler (fp16)."""


class NoInputGradients(TrainerCallback):  # type: ignore[misc]
    """Lets the backward pass end at the first trained layer.

    With gradient checkpointing transformers gives the embeddings' output a gradient, which only reentrant checkpointing
    needs. Layers before the first trained one would then be kept, recomputed, and passed backward for nothing.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        hooks = model.get_input_embeddings()._forward_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "__name__", "") == "make_inputs_require_grads"]:
            del hooks[key]


class QatCallback(TrainerCallback):  # type: ignore[misc]
    """Sets the strength of fake quantization before each step, and to its full at the end."""

    def __init__(self, fake: FakeQuantization, qat: QatConfig) -> None:
        self.fake, self.qat = fake, qat

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.fake.strength = strength_at(state.global_step, state.max_steps, self.qat)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.fake.strength = 1.0


class StepMeter(TrainerCallback):  # type: ignore[misc]
    """Measures seconds and tokens of each optimizer step, and bytes of gradients and optimizer state."""

    def __init__(self) -> None:
        self.step_seconds: list[float] = []
        self.step_tokens: list[int] = []
        self.tokens = 0
        self.loss_tokens = 0
        self.gradient_bytes: int | None = None
        self.optimizer_bytes: int | None = None
        self.paged_bytes = 0
        """Optimizer state that bitsandbytes keeps in CUDA's managed memory, outside of torch's allocator."""
        self._pending_tokens = 0
        self._started = 0.0
        self.earlier_seconds = 0.0
        self.earlier_tokens = 0
        self.began = time.perf_counter()

    def seconds(self) -> float:
        """Return seconds of this training so far, including those before a resume."""
        return self.earlier_seconds + time.perf_counter() - self.began

    def count(self, tokens: int, loss_tokens: int) -> None:
        """Count a micro-batch's unpadded tokens, and its tokens that carry a loss. The trainer calls it."""
        self._pending_tokens += tokens
        self.tokens += tokens
        self.loss_tokens += loss_tokens

    def start_step(self) -> None:
        """Start the next step's time. It begins before the step's batches are collated and copied to the device, and
        after logging, saving and evaluation. The trainer calls it."""
        self._started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start_step()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pending_tokens = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.gradient_bytes is None:
            parameters = kwargs["model"].parameters()
            self.gradient_bytes = tensor_bytes(p.grad for p in parameters if p.grad is not None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_seconds.append(time.perf_counter() - self._started)
        self.step_tokens.append(self._pending_tokens)
        if self.optimizer_bytes is None and kwargs.get("optimizer") is not None:
            import torch

            slots = kwargs["optimizer"].state.values()
            states = [value for slot in slots for value in slot.values() if torch.is_tensor(value)]
            self.optimizer_bytes = tensor_bytes(states)
            self.paged_bytes = tensor_bytes(state for state in states if getattr(state, "is_paged", False))

    def counted(self) -> tuple[list[float], int]:
        """Return seconds of the counted steps, and their tokens.

        The first :data:`EXCLUDED_STEPS` steps are warm-up; a short training excludes only its first step.
        """
        first = EXCLUDED_STEPS if len(self.step_seconds) > 2 * EXCLUDED_STEPS else min(1, len(self.step_seconds) - 1)
        first = max(first, 0)
        return self.step_seconds[first:], sum(self.step_tokens[first:])


class LossCurve(TrainerCallback):  # type: ignore[misc]
    """Appends each logged point to curve.jsonl, and reports it to the observer."""

    def __init__(self, path: Path, meter: StepMeter, observer: Observer, resumed_step: int = 0) -> None:
        """``resumed_step``: the checkpoint's step. Later points are deleted: the training repeats these steps."""
        self.path, self.meter, self.observer = path, meter, observer
        points = [point for point in read_curve(path) if point["step"] <= resumed_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(point) + "\n" for point in points))
        losses = [point["loss"] for point in points if point.get("loss") is not None]
        self.first_loss: float | None = losses[0] if losses else None
        self.final_loss: float | None = losses[-1] if losses else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the last step's loss, also if it isn't a multiple of ``training.logging_steps``."""
        if state.global_step >= state.max_steps or control.should_training_stop:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        numbers = {ours: float(logs[theirs]) for theirs, ours in CURVE_NAMES.items() if theirs in logs}
        if not ("loss" in numbers or "validation_loss" in numbers):
            return
        if "loss" in numbers:
            self.first_loss = numbers["loss"] if self.first_loss is None else self.first_loss
            self.final_loss = numbers["loss"]
        totals = {"tokens": self.meter.tokens, "seconds": round(self.meter.seconds(), 3)}
        finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": state.global_step, **totals, **finite}) + "\n")
        self.observer.step(state.global_step, state.max_steps, {**totals, **numbers})


class TokenBudget(TrainerCallback):  # type: ignore[misc]
    """Stops at the first step that has processed ``max_tokens`` unpadded tokens."""

    def __init__(self, max_tokens: int | None, meter: StepMeter) -> None:
        self.max_tokens, self.meter = max_tokens, meter
        self.spent = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.max_tokens is not None and self.meter.tokens >= self.max_tokens:
            self.spent = True
            control.should_training_stop = True


class Budget(TrainerCallback):  # type: ignore[misc]
    """Stops after the step in which a limit of ``budget`` is spent, and saves a checkpoint."""

    def __init__(self, exhausted: Callable[[], str | None]) -> None:
        self.exhausted = exhausted
        self.ended_by: str | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name = self.exhausted()
        if name is not None and state.global_step < state.max_steps:
            self.ended_by = name
            control.should_save = control.should_training_stop = True


class PruningCallback(TrainerCallback):  # type: ignore[misc]
    """Reports each validation loss to the study, and raises :class:`Pruned` if the pruner stops the trial."""

    def __init__(self, report: PruneCheck) -> None:
        self.report = report

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics = kwargs.get("metrics") or {}
        loss = metrics.get("eval_loss")
        if loss is not None and self.report.ask(state.global_step, float(loss), metrics.get(ITEM_NATS)):
            raise Pruned(state.global_step)


class PilotCallback(TrainerCallback):  # type: ignore[misc]
    """Reports a pilot's training loss at the step at which pilots are compared; raises :class:`Pruned` if it is behind.

    It asks again at each later logged step: another pilot, that runs at the same time, may reach that step later.
    """

    def __init__(self, report: PruneCheck, curve: Path, steps_per_epoch: int) -> None:
        """``curve``: curve.jsonl, so that a resumed run has the losses of its earlier parts."""
        self.report, self.curve, self.steps_per_epoch = report, curve, steps_per_epoch
        self.loss: PilotLoss | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(state)  # a training that is resumed after the comparison may log no loss before its end

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        step = comparison_step(state.max_steps, self.steps_per_epoch)
        if "loss" not in (logs or {}) or not step <= state.global_step < state.max_steps:
            return
        self._measure(state)
        if self.loss is not None and self.report.ask(step, self.loss.loss, None):
            raise Pruned(state.global_step, self.loss)

    def _measure(self, state: Any) -> None:
        step = comparison_step(state.max_steps, self.steps_per_epoch)
        if self.loss is None and step <= state.global_step and step < state.max_steps:
            loss = comparison_loss(training_losses(read_curve(self.curve)), step)
            self.loss = PilotLoss(step, loss) if loss is not None else None


class GracefulInterrupt(TrainerCallback):  # type: ignore[misc]
    """After Ctrl-C, TERM or HUP: finishes the step, saves a checkpoint, stops. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._handling = signals.handle_signals(self._ask)

    def __enter__(self) -> GracefulInterrupt:
        self._handling.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handling.__exit__(None, None, None)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if signals.meaning_of(number) is signals.Meaning.SAME:
            return
        if self.asked:
            raise signals.SignalInterrupt
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = True
            control.should_training_stop = True
