"""``training.engine=sleep``: a run that sleeps instead of training and takes its scores from a formula.

Use it to try out sweeps or clusters. Its records are marked SYNTHETIC: they say nothing about any model. It imports no
ML library.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import random
import signal
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from qlora_exp.analysis.pilots import comparison_loss, comparison_step
from qlora_exp.architecture.run_plan import effective_alpha
from qlora_exp.config.enums import EvaluationSplit, Quantization, SleepFault
from qlora_exp.config.schema import Config, to_plain
from qlora_exp.estimate.budget import RECORD_SECONDS, budget_stop_message, exhausted, spent_before
from qlora_exp.estimate.memory_fit import MemoryEstimate, MemoryLimit, PredictedOutOfMemory, correction_key, fit_into
from qlora_exp.paths import RunPaths
from qlora_exp.records.files import training_losses, write_json
from qlora_exp.records.fit_types import Fit, SkippedTrial
from qlora_exp.records.redaction import redact_text
from qlora_exp.records.types import (
    Environment,
    Failure,
    Memory,
    PilotLoss,
    RunRecord,
    Scores,
    ScoreTable,
    Speed,
    Spent,
    Status,
    Training,
)
from qlora_exp.training.outcome import Diverged, NullObserver, Observer, PruneCheck, Pruned, no_pruning, status_of

STEPS = 20
TOKENS_PER_ROW = 10
SYNTHETIC_ITEMS = 1000
REPORTED_ITEMS = 50
PENALTY = {Quantization.int8: 0.01, Quantization.nf4: 0.02, Quantization.fp4: 0.04}
BYTES = {Quantization.fp32: 4.0, Quantization.int8: 1.0, Quantization.nf4: 0.5, Quantization.fp4: 0.5}
PARAMETERS, ADAPTER_PARAMETERS_PER_RANK = 1_000_000, 1_000
"""Of the simulated model."""


def mark_synthetic(record: RunRecord) -> RunRecord:
    """Mark a record as synthetic in its name, its warnings and the field ``synthetic``."""
    warning = "SYNTHETIC: training.engine=sleep trains nothing, and its scores come from a formula"
    return record.replace(name=f"SYNTHETIC {record.name}", synthetic=True, warnings=(*record.warnings, warning))


def sleep_run(
    config: Config,
    record: RunRecord,
    paths: RunPaths,
    observer: Observer | None = None,
    report: PruneCheck = no_pruning,
) -> RunRecord:
    """Sleep ``training.sleep_seconds`` in twenty steps, and return the record with its status, also after a failure."""
    started = time.perf_counter()
    earlier = record.speed.total_seconds or 0.0
    training = _SimulatedTraining(config, record, paths, observer or NullObserver(), report)
    status, failure = Status.COMPLETED, None
    try:
        training.through()
    except (Exception, KeyboardInterrupt) as error:
        status, failure = status_of(error), _failure(error, training.step)
    seconds = time.perf_counter() - started
    return record.replace(
        status=status,
        failure=failure,
        warnings=(
            *record.warnings,
            *([budget_stop_message(training.ended_by, training.step, STEPS)] if training.ended_by else []),
        ),
        spent=training.spent(),
        speed=_speed(config, training.step, seconds, earlier),
        memory=_memory(config),
        training=Training(
            steps=training.step,
            first_loss=loss_at(config, 1),
            final_loss=training.loss,
            epochs=None,
            ended_by_budget=training.ended_by,
            pilot_loss=training.pilot_loss,
        ),
        scores=_score_table(config, paths) if status is Status.COMPLETED else record.scores,
    )


def synthetic_fit(config: Config, environment: Environment, rule: MemoryLimit) -> Fit | None:
    """As :func:`qlora_exp.estimate.preflight.memory_fit`, for the simulated bytes of a sleeping run.

    Raises:
        PredictedOutOfMemory: the bytes are above the limit.
    """
    device = environment.device
    bound = rule.limit_bytes
    if bound is None:  # the machine's memory doesn't limit a simulated model
        return None
    need = MemoryEstimate(_memory(config).peak_train_bytes or 0, 0, config.training.sleep_seconds, None)
    key = correction_key(to_plain(config), device, padding_free=False)
    fit, may_start = fit_into(bound, need, rule, key, device.kind)
    if may_start:
        return fit
    what = f"the run is predicted to need {fit.corrected_bytes} of {fit.limit_bytes} bytes"
    skipped = SkippedTrial(fit, need.train_seconds, need.train_flops)
    raise PredictedOutOfMemory(what, f"budget.memory_bytes = {bound}", "a smaller lora.r, or quantization=nf4", skipped)


@dataclasses.dataclass
class _SimulatedTraining:
    """A simulated training."""

    config: Config
    record: RunRecord
    paths: RunPaths
    observer: Observer
    report: PruneCheck
    step: int = 0
    loss: float | None = None
    ended_by: str | None = None
    pilot_loss: PilotLoss | None = None
    started: float = dataclasses.field(default_factory=time.perf_counter)
    written: float = 0.0

    def spent(self) -> Spent:
        earlier = spent_before(self.record)
        tokens = self.step * self.config.training.batch_size * TOKENS_PER_ROW
        return Spent(earlier.seconds + time.perf_counter() - self.started, earlier.tokens + tokens, None)

    def through(self) -> None:
        training = self.config.training
        self.observer.phase("train")
        points = []
        for step in range(1, STEPS + 1):
            time.sleep(training.sleep_seconds / STEPS)
            if step == STEPS // 2:
                _simulate_fault(self.config, step)
            self.step, self.loss = step, loss_at(self.config, step)
            points.append({"step": step, "loss": self.loss})
            self.observer.step(step, STEPS, {"loss": self.loss})
            self._compare_pilot(points)
            every = training.evaluate_every_steps
            if every is not None and step % every == 0 and not self.report.pilot:
                self.observer.step(step, STEPS, {"validation_loss": self.loss})
                if self.report.ask(
                    step, self.loss, _item_losses_with_mean(self.loss) if self.report.per_item else None
                ):
                    raise Pruned(step)
            name = self._exhausted()
            if name is not None and step < STEPS:
                self.ended_by = name
                break
        self.paths.curve.write_text("".join(json.dumps(point) + "\n" for point in points), encoding="utf-8")

    def _compare_pilot(self, points: Sequence[dict[str, float]]) -> None:
        """As :class:`qlora_exp.training.callbacks.PilotCallback`, with a loss logged at every step."""
        at = comparison_step(STEPS, None)
        if not self.report.pilot or not at <= self.step < STEPS:
            return
        if self.pilot_loss is None:
            loss = comparison_loss(training_losses(points), at)
            self.pilot_loss = PilotLoss(at, loss) if loss is not None else None
        if self.pilot_loss is not None and self.report.ask(at, self.pilot_loss.loss, None):
            raise Pruned(self.step, self.pilot_loss)

    def _exhausted(self) -> str | None:
        spent = self.spent()
        if spent.seconds - self.written > RECORD_SECONDS:
            self.written = spent.seconds
            write_json(self.paths.record, self.record.replace(spent=spent), durable=False)
        return exhausted(self.config.budget, spent)


def final_loss(config: Config) -> float:
    """Return the final loss: a quadratic bowl in log2 r, log10 of the learning rate and log2 of alpha / r.

    Quantized bases add a small penalty, and the seed fixes noise of ±0.01.
    """
    r, alpha = config.lora.r, effective_alpha(config.lora)
    digest = hashlib.sha256(f"{config.seed}/{r}/{config.quantization.mode.value}".encode()).digest()
    noise = int.from_bytes(digest[:4], "big") / 2**32 - 0.5
    return (
        1.0
        + 0.02 * (math.log2(r) - 4.0) ** 2
        + 0.2 * (math.log10(config.training.learning_rate) + 3.0) ** 2
        + 0.02 * (math.log2(alpha / r) - 1.0) ** 2
        + PENALTY.get(config.quantization.mode, 0.0)
        + 0.02 * noise
    )


def loss_at(config: Config, step: int) -> float:
    """Return the validation loss at ``step``, which falls towards the final loss."""
    return final_loss(config) * (1.0 + 2.0 * math.exp(-5.0 * step / STEPS))


def _item_losses_with_mean(loss: float) -> list[float]:
    """Return losses of single items with mean ``loss``; the same items are the hard ones in every run."""
    return [loss * 2.0 * (item + 1) / (REPORTED_ITEMS + 1) for item in range(REPORTED_ITEMS)]


def _scores(config: Config) -> Scores:
    loss = final_loss(config)
    return Scores(split="validation", items=SYNTHETIC_ITEMS, loss=loss, loss_per_item=loss, accuracy=1.0 / (1.0 + loss))


def _score_table(config: Config, paths: RunPaths) -> ScoreTable:
    if config.evaluation.split is not EvaluationSplit.test:
        return ScoreTable(after=_scores(config))
    losses = item_losses(config)
    _write_items(losses, paths)
    mean = math.fsum(losses) / len(losses)
    test = Scores(split="test", items=len(losses), loss=mean, loss_per_item=mean)
    return ScoreTable(after=_scores(config), test=test)


def item_losses(config: Config) -> list[float]:
    """Return nats of each test item: the run's loss times the item's difficulty, plus noise (SD 0.05)."""
    noise = random.Random(f"{config.seed}/{config.lora.r}/{config.quantization.mode.value}")
    difficulty = random.Random("items")
    loss = final_loss(config)
    return [loss * (0.5 + difficulty.random()) + noise.gauss(0.0, 0.05) for _ in range(SYNTHETIC_ITEMS)]


def _write_items(losses: Sequence[float], paths: RunPaths) -> None:
    """Write the test split's losses, no other column. pyarrow is imported only here, because that is slow."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"item_id": [f"item-{number:04}" for number in range(len(losses))], "loss_sum_nats": list(losses)}
    pq.write_table(pa.table(columns), paths.items("after", "test"))


def _memory(config: Config) -> Memory:
    base = int(PARAMETERS * BYTES.get(config.quantization.mode, 2.0))
    adapter = 4 * ADAPTER_PARAMETERS_PER_RANK * config.lora.r
    return Memory(
        base_weight_bytes=base,
        quantization_state_bytes=0,
        adapter_bytes=adapter,
        gradient_bytes=adapter,
        optimizer_bytes=2 * adapter,
        peak_train_bytes=base + 4 * adapter,
        train_working_set_bytes=base + 4 * adapter,
    )


def _speed(config: Config, steps: int, seconds: float, earlier_seconds: float) -> Speed:
    tokens_per_second = 1e4 / (1.0 + math.log2(config.lora.r) / 10.0 + PENALTY.get(config.quantization.mode, 0.0))
    return Speed(
        train_seconds=seconds,
        evaluation_seconds=0.0,
        total_seconds=earlier_seconds + seconds,
        steps=steps,
        train_tokens_per_second=tokens_per_second,
    )


def _simulate_fault(config: Config, step: int) -> None:
    """Simulate ``training.sleep_fault``. ``out_of_memory`` fails only while the micro-batch is the whole batch."""
    training = config.training
    match training.sleep_fault:
        case SleepFault.out_of_memory if (training.micro_batch_size or training.batch_size) >= training.batch_size:
            raise MemoryError("training.sleep_fault=out_of_memory")
        case SleepFault.diverge:
            raise Diverged("the loss", step)
        case SleepFault.hang:
            _hang()
        case SleepFault.crash:
            os.kill(os.getpid(), signal.SIGKILL)
        case SleepFault.fail:
            raise RuntimeError("training.sleep_fault=fail")


def _hang() -> NoReturn:
    while True:
        time.sleep(3600.0)


def _failure(error: BaseException, step: int) -> Failure:
    failed = status_of(error) is Status.FAILED
    return Failure(
        kind=type(error).__name__,
        message=redact_text(str(error) or type(error).__name__)[:4000],
        phase="train",
        step=getattr(error, "step", None) or step,
        traceback=redact_text("".join(traceback.format_exception(error))[-8000:]) if failed else None,
    )
