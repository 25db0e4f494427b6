"""The straight line of one run, and the one place where an exception becomes a status."""

from __future__ import annotations

import itertools
import json
import math
import shlex
import statistics
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from qlora_exp import measurement, models, plan
from qlora_exp.checkpoints import newest_valid, step_of
from qlora_exp.config import Config, EvaluationSplit
from qlora_exp.data import Splits, check_positions, load_data, load_rows
from qlora_exp.endings import Diverged, Observer, Report, Silent, never_stop, status_of
from qlora_exp.errors import DataError, ModelError, QloraExpError
from qlora_exp.evaluation import Evaluation, answer_goal
from qlora_exp.metrics import hub_metric
from qlora_exp.paths import OutputPaths, RunPaths
from qlora_exp.records import (
    Environment,
    Failure,
    Memory,
    Plan,
    RunRecord,
    ScoreTable,
    Speed,
    Status,
    from_dict,
    write_json,
)
from qlora_exp.redaction import redact_text
from qlora_exp.train import Trained, Watch, train
from qlora_exp.untouched import Untouched, baselines_of, limited, score, untouched_scores, write_items

T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """What can be known and checked before a weight is read."""

    plan: Plan
    modules: tuple[str, ...]
    tokenizer: Any
    splits: Splits


@dataclass
class Progress:
    """What is known so far; whatever ends the run, its record holds it."""

    record: RunRecord
    paths: RunPaths
    meter: measurement.Meter
    earlier_seconds: float
    """What the parts of a resumed run took before."""
    phase: str = "prepare"
    weights: models.WeightBytes | None = None
    resident_bytes: int | None = None
    watch: Watch | None = None
    trained: Trained | None = None
    untouched: Untouched | None = None
    started: float = field(default_factory=time.perf_counter)

    def enter(self, phase: str, observer: Observer) -> None:
        """A phase begins: what is known is written, so that even a killed run's record has it."""
        self.phase = phase
        write_json(self.paths.record, self.known(), durable=False)
        observer.phase(phase)

    def watching(self, watch: Watch) -> None:
        self.watch = watch

    def known(self) -> RunRecord:
        """The record with every figure that has been measured by now."""
        trained = self.trained or (self.watch.so_far() if self.watch else None)
        return self.record.replace(
            memory=_memory(self, trained),
            speed=_speed(self, trained),
            training=trained.training if trained else None,
        )


class Bases(Protocol):
    """Where a run's base comes from, and what else a host that makes many runs need not make twice."""

    def lend(self, config: Config, device_kind: str) -> models.Base:
        """The base that ``config`` asks for, as :func:`models.load_base` loads it."""

    def model(self, base: models.Base) -> Any:
        """A model to evaluate or to train; what is done to it does the base no harm, or nobody needs the base again."""

    def kept(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        """``make()``, or what it gave the last time with the same key."""


def run(
    config: Config,
    prepared: Prepared,
    record: RunRecord,
    paths: RunPaths,
    observer: Observer | None = None,
    report: Report = never_stop,
    bases: Bases | None = None,
) -> tuple[RunRecord, QloraExpError | None]:
    """Run ``config`` to its end. Returns its record — completed, or with the failure that ended it — and the error
    where wrong input showed itself only now (a weight file torn inside, say): the caller tells it."""
    progress = Progress(
        record.replace(plan=prepared.plan, data=prepared.splits.record),
        paths,
        measurement.Meter(prepared.plan.device, host_reused=_host_is_reused()),
        earlier_seconds=record.speed.total_seconds or 0.0,
    )
    try:
        _straight_line(config, prepared, progress, observer or Silent(), report, bases or models.ColdBases())
        return progress.known().replace(status=Status.COMPLETED), None
    except (Exception, KeyboardInterrupt) as error:
        return _failed(progress, error), error if isinstance(error, QloraExpError) else None


def prepare(config: Config, environment: Environment, bases: Bases | None = None) -> Prepared:
    """Check rows, target modules and plan, in the order of their cost. Raises :class:`QloraExpError`."""
    if environment.device.kind == "cpu" and (problem := plan.int8_dora(config)):
        raise problem  # with training.device=auto the machine decides, which is known only here
    bases = bases or models.ColdBases()
    task = (repr(config.task), _state_of_files(config.task.path))
    rows = bases.kept("rows", task, lambda: load_rows(config.task))
    model = models.model_key(config.model)
    architecture = bases.kept("architecture", model, lambda: models.describe(config.model))
    modules = models.resolve_targets(architecture, config.targets)
    tokenizer = models.load_tokenizer(config.model)
    length = config.training.max_length
    splits = bases.kept("splits", (task, model, length), lambda: load_data(config, tokenizer, length, rows))
    check_positions(splits, architecture.positions)
    _check_scores_can_be_had(config, splits)
    planned = plan.make_plan(config, environment, architecture, modules, splits.format)
    if config.training.max_tokens is not None:
        planned = replace(planned, max_steps=_steps_for_tokens(config, splits))
    return Prepared(planned, modules, tokenizer, splits)


def _state_of_files(path: str | None) -> Hashable:
    """Sizes and times of change of a local task's files: rows read before are those there now while they are equal."""
    if path is None:
        return None
    place = Path(path).expanduser()
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists())


def _check_scores_can_be_had(config: Config, splits: Splits) -> None:
    """What evaluation needs, asked before a training is paid for."""
    for name in config.evaluation.metrics:
        hub_metric(name)
    if config.evaluation.split is EvaluationSplit.test and not splits.test:
        raise DataError("there are no test items", "evaluation.split = test", "task.test_fraction=0.1, or a test file")


SHORT_ROWS_SIGMAS = 4.0
"""How many standard errors the rows that are drawn may be shorter than the mean row: the token budget, not the last
step, ends a training."""


def _steps_for_tokens(config: Config, splits: Splits) -> int:
    """Steps that a token budget buys at the mean row length; TokenBudget stops at the exact step."""
    assert config.training.max_tokens is not None
    lengths = [len(item.prompt_ids) + len(item.completion_ids) + len(item.end_ids) for item in splits.train]
    mean = statistics.fmean(lengths)
    rows = config.training.max_tokens / mean
    longest = 1 + SHORT_ROWS_SIGMAS * statistics.pstdev(lengths) / mean / math.sqrt(max(rows, 1.0))
    return 1 + math.ceil(longest * rows / config.training.batch_size)


def _straight_line(
    config: Config, prepared: Prepared, progress: Progress, observer: Observer, report: Report, bases: Bases
) -> None:
    planned, tokenizer, splits = prepared.plan, prepared.tokenizer, prepared.splits
    paths, meter = progress.paths, progress.meter
    cache = OutputPaths.of(config.output_root).cache
    progress.resident_bytes = measurement.resident_bytes()

    progress.enter("load", observer)
    with meter.phase("load"):
        base = bases.lend(config, planned.device)
    _check_same_model(progress.record, base.fingerprint)
    progress.record = progress.record.replace(model_fingerprint=base.fingerprint)

    progress.enter("evaluate untouched", observer)
    with meter.phase("untouched"):
        untouched = untouched_scores(bases.model(base), tokenizer, splits, config, planned, base.fingerprint, cache)
    baselines = baselines_of(splits, config, cache)
    untouched.write_items(paths)
    progress.untouched = untouched
    before = ScoreTable(before=untouched.scores, test_before=untouched.test_scores)
    progress.record = progress.record.replace(scores=before, baselines=baselines)

    progress.enter("train", observer)
    progress.trained = _trained_before(paths)
    if progress.trained is not None:  # the run was interrupted after its training
        model = models.load_adapter(base, paths.adapter)
        progress.weights = models.weight_bytes(model)
    else:
        model = models.attach_adapters(bases.model(base), config, prepared.modules)
        progress.weights = models.weight_bytes(model)
        model.train()
        validation = limited(splits.validation, config)
        with meter.phase("train"):
            progress.trained = train(
                planned, model, tokenizer, splits.train, validation, config, paths, report, observer, progress.watching
            )
        models.save_adapter(model, paths.adapter)
        write_json(paths.trained, progress.trained)

    progress.enter("evaluate", observer)
    with meter.phase("evaluate"):
        after, test, forgotten = score(model, tokenizer, splits, config, untouched)
    _check_finite(after, progress.trained)
    write_items(after.items, paths.items("after", "validation"))
    if test is not None:
        write_items(test.items, paths.items("after", "test"))
    table = replace(
        before,
        after=after.scores,
        test=test.scores if test else None,
        forgetting=forgotten.text,
        forgetting_chat=forgotten.chat,
    )
    progress.record = progress.record.replace(scores=table, goal=_goal(config, after, test))


def _check_finite(after: Evaluation, trained: Trained) -> None:
    """The last step can spoil an adapter after the last loss of the training: its weights may still be finite, and an
    argmax over NaN would look like an accuracy."""
    if after.scores.loss is not None and not math.isfinite(after.scores.loss):
        raise Diverged("the tuned model's loss", trained.training.steps)


def _trained_before(paths: RunPaths) -> Trained | None:
    """What an interrupted run had trained to its end; the file is written after the adapter."""
    try:
        return from_dict(Trained, json.loads(paths.trained.read_text(encoding="utf-8")), str(paths.trained))
    except (OSError, ValueError, QloraExpError):
        return None


def _check_same_model(record: RunRecord, fingerprint: str) -> None:
    """A run that is resumed on other weights would be a mixture that its record doesn't tell of."""
    if record.model_fingerprint not in (None, fingerprint):
        raise ModelError(
            "the model's files have changed since this run began", record.run_id, f"qlora-exp rerun {record.run_id}"
        )


_runs_in_this_process = itertools.count()


def _host_is_reused() -> bool:
    """Whether this process made a run before: the allocator then holds memory already, and a resident peak says
    little."""
    return next(_runs_in_this_process) > 0


def _goal(config: Config, after: Evaluation, test: Evaluation | None) -> Any:
    if config.task.goal is None:
        return None
    split = config.evaluation.split
    return answer_goal(config.task.goal, test if split is EvaluationSplit.test and test else after, split.value)


def _memory(progress: Progress, trained: Trained | None) -> Memory:
    meter, weights = progress.meter, progress.weights
    return Memory(
        base_weight_bytes=weights.base_weight_bytes if weights else None,
        quantization_state_bytes=weights.quantization_state_bytes if weights else None,
        adapter_bytes=weights.adapter_bytes if weights else None,
        gradient_bytes=trained.gradient_bytes if trained else None,
        optimizer_bytes=trained.optimizer_bytes if trained else None,
        resident_after_imports_bytes=progress.resident_bytes,
        peak_load_bytes=meter.of("load").peak_bytes,
        peak_train_bytes=meter.of("train").peak_bytes,
        peak_evaluation_bytes=meter.of("evaluate").peak_bytes,
        peak_train_reserved_bytes=meter.of("train").reserved_bytes,
        checkpoint_bytes=trained.checkpoint_bytes if trained else None,
        host_reused=meter.host_reused,
        source=meter.source,
    )


def _speed(progress: Progress, trained: Trained | None) -> Speed:
    record, meter, untouched = progress.record, progress.meter, progress.untouched
    total = progress.earlier_seconds + time.perf_counter() - progress.started
    price = record.config.get("budget", {}).get("usd_per_hour")
    speed = Speed(
        load_seconds=meter.of("load").seconds,
        evaluation_seconds=meter.of("evaluate").seconds,
        untouched_evaluation_seconds=meter.of("untouched").seconds,
        untouched_cached=untouched.cached if untouched else False,
        total_seconds=total,
        cost_usd=total / 3600.0 * price if price is not None else None,
    )
    if trained is None:
        return speed
    counted = sum(trained.counted_seconds)
    rate = trained.counted_tokens / counted if counted > 0 else None
    ordered = sorted(trained.counted_seconds)
    return replace(
        speed,
        train_seconds=trained.seconds,
        steps=trained.training.steps,
        excluded_steps=trained.excluded_steps,
        train_tokens=trained.tokens,
        loss_tokens=trained.loss_tokens,
        train_tokens_per_second=rate,
        step_seconds_p50=_quantile(ordered, 0.5),
        step_seconds_p95=_quantile(ordered, 0.95),
        model_flops_utilisation=_utilisation(record, rate),
        energy_joules=meter.of("train").energy_joules,
    )


def _utilisation(record: RunRecord, tokens_per_second: float | None) -> float | None:
    if record.plan is None or tokens_per_second is None or record.plan.device != "cuda":
        return None
    plan = record.plan
    flops = measurement.flops_per_token(plan.total_parameters, plan.trainable_parameters, recomputed=False)
    return measurement.model_flops_utilisation(record.environment.device.name, flops, tokens_per_second)


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    """Nearest-rank quantile of sorted values."""
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


def _failed(progress: Progress, error: BaseException) -> RunRecord:
    status = status_of(error)
    message = redact_text(str(error) or type(error).__name__)
    trace = redact_text("".join(traceback.format_exception(error))[-8000:]) if status is Status.FAILED else None
    failure = Failure(
        kind=type(error).__name__,
        message=message[:4000],
        phase=progress.phase,
        step=getattr(error, "step", None) or (progress.watch.so_far().training.steps if progress.watch else None),
        hint=error.hint if isinstance(error, QloraExpError) else _hint(status, progress.paths),
        traceback=None if isinstance(error, QloraExpError) else trace,
    )
    return progress.known().replace(status=status, failure=failure)


def _hint(status: Status, paths: RunPaths) -> str | None:
    newest = newest_valid(paths.checkpoints)
    start = f"goes on at step {step_of(newest[0])}" if newest else "starts again: no step was saved"
    if paths.trained.exists():
        start = "goes on with the evaluation"
    return {
        Status.INTERRUPTED: f"qlora-exp run --resume {shlex.quote(str(paths.folder))} {start}",
        Status.OUT_OF_MEMORY: "halve training.micro_batch_size (accumulation keeps the batch), set "
        "training.gradient_checkpointing=on, or quantization=nf4",
        Status.DIVERGED: "lower training.learning_rate, or raise training.warmup_ratio",
    }.get(status)
