"""The straight line of one run, and the one place where an exception becomes a status."""

from __future__ import annotations

import itertools
import json
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_exp import measurement, models, plan
from qlora_exp.callbacks import Diverged, Interrupted, Observer, Pruned, Report, Silent, never_stop
from qlora_exp.config import Config, EvaluationSplit
from qlora_exp.data import Item, Splits, load_data, load_rows
from qlora_exp.errors import QloraExpError
from qlora_exp.evaluation import Evaluation
from qlora_exp.paths import OutputPaths, RunPaths
from qlora_exp.records import Environment, Failure, Memory, Plan, RunRecord, ScoreTable, Speed, Status
from qlora_exp.redaction import redact_text
from qlora_exp.train import Trained, train
from qlora_exp.untouched import Untouched, baselines_of, score, untouched_scores


@dataclass(frozen=True)
class Prepared:
    """What can be known and checked before a weight is read."""

    plan: Plan
    modules: tuple[str, ...]
    tokenizer: Any
    splits: Splits


@dataclass
class Progress:
    """What is known so far; whatever ends the run, the record holds it."""

    record: RunRecord
    phase: str = "plan"
    step: int | None = None


def run(
    config: Config,
    prepared: Prepared,
    record: RunRecord,
    paths: RunPaths,
    observer: Observer | None = None,
    report: Report = never_stop,
) -> RunRecord:
    """Run ``config`` to its end, and return its record: completed, or with the failure that ended it.

    Wrong input (:class:`QloraExpError`) is raised as it is: it is the caller's to tell, and no run of it exists.
    """
    progress = Progress(record)
    clock = time.perf_counter()
    try:
        finished = _straight_line(config, prepared, progress, paths, observer or Silent(), report)
        return finished.replace(
            status=Status.COMPLETED, speed=replace(finished.speed, total_seconds=time.perf_counter() - clock)
        )
    except QloraExpError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        return _failed(progress, error, time.perf_counter() - clock)


def prepare(config: Config, environment: Environment) -> Prepared:
    """Check rows, target modules and plan, in the order of their cost. Raises :class:`QloraExpError`."""
    load_rows(config.task)
    architecture = models.describe(config.model)
    modules = models.resolve_targets(architecture, config.targets)
    tokenizer = models.load_tokenizer(config.model)
    splits = load_data(config, tokenizer, config.training.max_length)
    planned = plan.make_plan(config, environment, architecture, modules, splits.format)
    if config.training.max_steps is None:
        planned = replace(planned, max_steps=_steps_for_tokens(config, splits))
    return Prepared(planned, modules, tokenizer, splits)


def _steps_for_tokens(config: Config, splits: Splits) -> int:
    """Steps that a token budget buys at the mean row length; TokenBudget stops at the exact token."""
    assert config.training.max_tokens is not None
    rows = splits.train
    mean = sum(len(i.prompt_ids) + len(i.completion_ids) + len(i.end_ids) for i in rows) / len(rows)
    return max(1, -(-config.training.max_tokens // max(1, int(mean * config.training.batch_size))))


def _straight_line(
    config: Config,
    prepared: Prepared,
    progress: Progress,
    paths: RunPaths,
    observer: Observer,
    report: Report,
) -> RunRecord:
    def enter(phase: str) -> None:
        progress.phase = phase
        observer.phase(phase)

    environment = progress.record.environment
    planned, tokenizer, splits = prepared.plan, prepared.tokenizer, prepared.splits
    progress.record = progress.record.replace(plan=planned, data=splits.record)
    outputs = OutputPaths.of(config.output_root)
    meter = measurement.Meter(planned.device, host_reused=_host_is_reused())
    resident = measurement.resident_bytes()

    enter("load")
    with meter.phase("load"):
        base = models.load_base(config, planned.device)
    progress.record = progress.record.replace(model_fingerprint=base.fingerprint)

    enter("evaluate untouched")
    items = splits.validation
    with meter.phase("untouched"):
        untouched = untouched_scores(base.model, tokenizer, splits, config, planned, base.fingerprint, outputs.cache)
        baselines = baselines_of(splits, config, outputs.cache)
    untouched.write_items(paths.items("before", "validation"))
    progress.record = progress.record.replace(
        scores=ScoreTable(before=untouched.scores, test_before=untouched.test_scores), baselines=baselines
    )

    enter("train")
    model = models.attach_adapters(base.model, config, prepared.modules)
    weights = models.weight_bytes(model)
    progress.record = progress.record.replace(memory=_memory(meter, weights, resident, None))
    model.train()
    with meter.phase("train"):
        trained = train(planned, model, tokenizer, splits.train, items, config, paths, report, observer)
    progress.record = progress.record.replace(
        training=trained.training,
        memory=_memory(meter, weights, resident, trained),
        speed=_speed(meter, trained, planned, environment, untouched, config),
    )
    models.save_adapter(model, paths.adapter)

    enter("evaluate")
    with meter.phase("evaluate"):
        after, test, forgotten = score(model, tokenizer, splits, config, untouched)
    after.write(paths.items("after", "validation"))
    if test is not None:
        test.write(paths.items("after", "test"))
    answered = _goal(config, after, test)
    return progress.record.replace(
        scores=ScoreTable(
            before=untouched.scores,
            after=after.scores,
            test=test.scores if test else None,
            test_before=untouched.test_scores,
            forgetting=forgotten,
        ),
        goal=answered,
        memory=_memory(meter, weights, resident, trained),
        speed=_speed(meter, trained, planned, environment, untouched, config),
    )


_runs_in_this_process = itertools.count()


def _host_is_reused() -> bool:
    """Whether this process made a run before: the allocator then holds memory already, and a resident peak says
    little."""
    return next(_runs_in_this_process) > 0


def _goal(config: Config, after: Evaluation, test: Evaluation | None) -> Any:
    from qlora_exp.evaluation import answer_goal

    if config.task.goal is None:
        return None
    split = config.evaluation.split
    return answer_goal(config.task.goal, test if split is EvaluationSplit.test and test else after, split.value)


def _memory(
    meter: measurement.Meter, weights: models.WeightBytes, resident: int | None, trained: Trained | None
) -> Memory:
    return Memory(
        base_weight_bytes=weights.base_weight_bytes,
        quantization_state_bytes=weights.quantization_state_bytes,
        adapter_bytes=weights.adapter_bytes,
        gradient_bytes=trained.meter.gradient_bytes if trained else None,
        optimizer_bytes=trained.meter.optimizer_bytes if trained else None,
        resident_after_imports_bytes=resident,
        peak_load_bytes=meter.of("load").peak_bytes,
        peak_train_bytes=meter.of("train").peak_bytes,
        peak_evaluation_bytes=meter.of("evaluate").peak_bytes,
        peak_train_reserved_bytes=meter.of("train").reserved_bytes,
        checkpoint_bytes=trained.checkpoint_bytes if trained else None,
        host_reused=meter.host_reused,
        source=meter.source,
    )


def _speed(
    meter: measurement.Meter,
    trained: Trained,
    planned: Plan,
    environment: Environment,
    untouched: Untouched,
    config: Config,
) -> Speed:
    seconds, tokens = trained.meter.counted()
    rate = tokens / sum(seconds) if seconds and sum(seconds) > 0 else None
    ordered = sorted(seconds)
    flops = measurement.flops_per_token(planned.total_parameters, planned.trainable_parameters, recomputed=False)
    evaluation = meter.of("evaluate").seconds
    paid = sum(p.seconds or 0.0 for p in meter.phases.values())
    price = config.budget.usd_per_hour
    return Speed(
        load_seconds=meter.of("load").seconds,
        train_seconds=(meter.of("train").seconds or 0.0) + trained.earlier_seconds,
        evaluation_seconds=evaluation,
        untouched_evaluation_seconds=meter.of("untouched").seconds,
        untouched_cached=untouched.cached,
        steps=trained.training.steps,
        excluded_steps=len(trained.meter.step_seconds) - len(seconds),
        train_tokens=trained.meter.tokens,
        loss_tokens=trained.meter.loss_tokens,
        train_tokens_per_second=rate,
        step_seconds_p50=_quantile(ordered, 0.5),
        step_seconds_p95=_quantile(ordered, 0.95),
        model_flops_utilisation=measurement.model_flops_utilisation(environment.device.name, flops, rate)
        if rate is not None and planned.device == "cuda"
        else None,
        energy_joules=meter.of("train").energy_joules,
        cost_usd=paid / 3600.0 * price if price is not None else None,
    )


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    """Nearest-rank quantile of sorted values."""
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


def _failed(progress: Progress, error: BaseException, seconds: float) -> RunRecord:
    status = _status_of(error)
    message = redact_text(str(error) or type(error).__name__)
    trace = redact_text("".join(traceback.format_exception(error))[-8000:]) if status is Status.FAILED else None
    failure = Failure(
        kind=type(error).__name__,
        message=message[:4000],
        phase=progress.phase,
        step=getattr(error, "step", progress.step),
        hint=_hint(status, progress.record.run_id),
        traceback=trace,
    )
    speed = replace(progress.record.speed, total_seconds=seconds)
    return progress.record.replace(status=status, failure=failure, speed=speed)


def _status_of(error: BaseException) -> Status:
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return Status.INTERRUPTED
    if isinstance(error, Pruned):
        return Status.PRUNED
    if isinstance(error, Diverged):
        return Status.DIVERGED
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _no_memory(error):
        return Status.OUT_OF_MEMORY
    return Status.FAILED


def _no_memory(error: BaseException) -> bool:
    told = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in told or "can't allocate memory" in told)


def _hint(status: Status, run_id: str) -> str | None:
    return {
        Status.INTERRUPTED: f"qlora-exp run --resume {run_id} goes on from the last checkpoint",
        Status.OUT_OF_MEMORY: "halve training.micro_batch_size (accumulation keeps the batch), set "
        "training.gradient_checkpointing=on, or quantization=nf4",
        Status.DIVERGED: "lower training.learning_rate, or raise training.warmup_ratio",
    }.get(status)


def read_curve(path: Path) -> list[dict[str, float | None]]:
    """The training curve's points; a torn last line (a killed run) is left out."""
    points = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            points.append(json.loads(line))
        except ValueError:
            break
    return points


__all__ = ["Item", "prepare", "read_curve", "run"]
