"""The pipeline of one run: load, score the base model, train, score. The one place where exceptions become statuses."""

from __future__ import annotations

import itertools
import json
import math
import shlex
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qlora_exp.architecture.targets import rank_warning
from qlora_exp.config.checks_method import TUNES_WEIGHTS
from qlora_exp.config.enums import EvaluationSplit, Method, ShippedModel
from qlora_exp.config.peft_kinds import in_peft_format, start_warning
from qlora_exp.config.schema import Config
from qlora_exp.errors import ModelError, QloraExpError
from qlora_exp.estimate.budget import affordable_steps, budget_stop_message
from qlora_exp.estimate.estimator import weights_by_pass, with_first_predictions
from qlora_exp.estimate.workload import train_flops_per_token
from qlora_exp.evaluation.base_scores import baselines_of, score_base_model, score_splits, write_items
from qlora_exp.evaluation.few_shot import few_shot_scores
from qlora_exp.evaluation.goal import answer_goal
from qlora_exp.evaluation.item_texts import ItemTexts, needs_samples
from qlora_exp.evaluation.scoring import Evaluation, limit_items
from qlora_exp.evaluation.shared_scores import Wait
from qlora_exp.models.base_cache import NoCache
from qlora_exp.models.base_models import BaseModels
from qlora_exp.models.kernels import with_kernels
from qlora_exp.models.tuning import attach, end_training, load_tuned, save_tuned
from qlora_exp.models.weight_bytes import weight_bytes
from qlora_exp.paths import OutputPaths, RunPaths
from qlora_exp.records.files import write_json
from qlora_exp.records.redaction import redact_text
from qlora_exp.records.schema import from_dict
from qlora_exp.records.types import Failure, Plan, RunRecord, ScoreTable, Status
from qlora_exp.runs.ask_teacher import find_teacher
from qlora_exp.runs.prepare import Prepared, plan_for_model
from qlora_exp.runs.record_figures import RunFigures
from qlora_exp.runs.ship import ship_of, shipped_model
from qlora_exp.runs.teacher_answers import agreement_of, consult
from qlora_exp.system.device_errors import is_cuda_error
from qlora_exp.training import meter as measurement
from qlora_exp.training.checkpoints import newest_valid, step_of
from qlora_exp.training.outcome import Diverged, NullObserver, Observer, PruneCheck, no_pruning, status_of
from qlora_exp.training.reporters import Reporter, reporting
from qlora_exp.training.trainer import Trained, train


def run_pipeline(
    config: Config,
    prepared: Prepared,
    record: RunRecord,
    paths: RunPaths,
    observer: Observer | None = None,
    report: PruneCheck = no_pruning,
    bases: BaseModels | None = None,
) -> tuple[RunRecord, QloraExpError | None]:
    """Run ``config`` and return its record, completed or with the failure that ended it.

    The second value is the error if wrong input showed only now (e.g. a damaged weight file); the caller raises it.
    """
    progress = RunFigures(
        record.replace(plan=with_first_predictions(prepared.plan, record.plan), data=prepared.splits.record),
        paths,
        measurement.Meter(prepared.plan.device, process_reused=_host_is_reused()),
        earlier_seconds=record.speed.total_seconds or 0.0,
        useful_flops_per_token=_useful_flops_per_token(config, prepared),
    )
    try:
        observer = observer or NullObserver()
        with reporting(config, paths, observer) as reporters:
            try:
                _run_pipeline(config, prepared, progress, observer, report, bases or NoCache(), reporters)
            finally:
                for reporter in reporters:
                    reporter.finish(progress.record)
        return progress.known().replace(status=Status.COMPLETED), None
    except (Exception, KeyboardInterrupt) as error:
        return _failed_record(progress, error), error if isinstance(error, QloraExpError) else None


def _run_pipeline(
    config: Config,
    prepared: Prepared,
    progress: RunFigures,
    observer: Observer,
    report: PruneCheck,
    bases: BaseModels,
    reporters: Sequence[Reporter],
) -> None:
    planned, tokenizer, splits = prepared.plan, prepared.tokenizer, prepared.splits
    paths, meter = progress.paths, progress.meter
    cache = OutputPaths.of(config.output_root).cache
    progress.resident_bytes = measurement.resident_bytes()
    if not progress.earlier.seconds:
        for affordable in affordable_steps(config.budget, prepared.estimate):
            observer.note(affordable.message)

    consulted = None
    if (teacher := find_teacher(config, planned.format, tokenizer)) is not None:
        progress.enter("ask the teacher", observer)  # before the student is in memory
        asked = (config, splits, tokenizer, planned.device, cache, _wait("teacher", observer))
        consulted = consult(teacher, *asked, trains=_finished_training(paths) is None)
        progress.record = _with_warning(progress.record.replace(teacher=consulted.recorded), consulted.warning)

    progress.enter("load", observer)
    with meter.phase("load"):
        base = bases.get(config, planned.device)
        planned = plan_for_model(prepared, bases.model(base), config)
    _check_same_model(progress.record, base.fingerprint)
    progress.record = progress.record.replace(model_fingerprint=base.fingerprint)
    if planned is not prepared.plan:  # a resumed run keeps the predictions of its start
        progress.record = progress.record.replace(plan=with_first_predictions(planned, progress.record.plan))

    progress.enter("evaluate base", observer)
    with meter.phase("base"):
        model = with_kernels(bases.model(base), planned.kernels)
        wait = progress.wait = _wait("base scores", observer)
        base_scores = score_base_model(model, tokenizer, splits, config, planned, base.fingerprint, cache, wait)
        few_shot = few_shot_scores(model, tokenizer, splits, config, planned, base.fingerprint, cache, wait)
    progress.baseline_wait = _wait("baselines", observer)
    baselines = baselines_of(splits, config, cache, progress.baseline_wait)
    keep_texts = config.evaluation.keep_texts
    base_scores.write_items(paths, keep_texts)
    few_shot.write_items(paths, keep_texts)
    texts = ItemTexts.of(splits, config)
    _write_texts(texts, "base_generated", model, prepared, config, progress, observer)
    progress.base_scores = base_scores
    before = ScoreTable(before=base_scores.scores, test_before=base_scores.test_scores, few_shot=few_shot.draws)
    progress.record = _with_warning(progress.record.replace(scores=before, baselines=baselines), few_shot.warning())
    progress.record = _with_warning(progress.record, _few_rows_warning(planned, len(splits.train)))
    if config.method.kind is Method.lora:
        too_wide = rank_warning(prepared.architecture, prepared.modules, config.lora)
        progress.record = _with_warning(progress.record, too_wide)
    progress.record = _with_warning(progress.record, start_warning(config.method))

    progress.enter("train", observer)
    progress.trained = _finished_training(paths)
    if progress.trained is not None:  # the run was interrupted after its training
        model = with_kernels(load_tuned(base, config, paths.weights), planned.kernels)
        progress.weights = weight_bytes(model)
    else:
        model = attach(bases.model(base), config, prepared.modules, prepared.architecture, splits.train)
        model = with_kernels(model, planned.kernels)
        progress.weights = weight_bytes(model)
        model.train()
        validation = limit_items(splits.validation, config)
        with meter.phase("train"):
            progress.trained = train(
                planned,
                model,
                tokenizer,
                consulted.rows if consulted is not None else splits.train,
                validation,
                config,
                paths,
                report,
                observer,
                progress.watching,
                lambda: progress.exhausted(config.budget),
                reporters,
                consulted.targets if consulted is not None else None,
            )
        end_training(model, planned.compute_dtype)
        save_tuned(model, paths.adapter if in_peft_format(config.method) else paths.tuned)
        write_json(paths.trained, progress.trained)

    progress.record = _with_warning(progress.record, _budget_warning(progress.trained, planned))

    progress.enter("evaluate", observer)
    with meter.phase("evaluate"):
        after, test, forgotten = score_splits(model, tokenizer, splits, config, base_scores)
    _check_finite(after, progress.trained)
    if (ship := ship_of(config)) is not None:
        before = replace(before, trained=after.scores, trained_test=test.scores if test else None)
        progress.enter("evaluate what ships", observer)
        with meter.phase("ship"):
            shipping = (config, ship, planned, model, base, prepared.architecture, paths.weights)
            model, shipped = shipped_model(*shipping)
            if ship.model is not ShippedModel.trained:
                model = with_kernels(model, planned.kernels)
                after, test, forgotten = score_splits(model, tokenizer, splits, config, base_scores)
        progress.record = progress.record.replace(shipped=shipped)
    write_items(after.items, paths.items("after", "validation"), keep_texts)
    if test is not None:
        write_items(test.items, paths.items("after", "test"), keep_texts)
    table = replace(
        before,
        after=after.scores,
        test=test.scores if test else None,
        forgetting=forgotten.text,
        forgetting_chat=forgotten.chat,
    )
    progress.record = progress.record.replace(scores=table, goal=_goal(config, after, test))
    if consulted is not None:
        with progress.not_measured():
            answered = (test or after).items
            close = agreement_of(model, consulted, answered, splits, config)
        progress.record = progress.record.replace(agreement=close)
    _write_texts(texts, "generated", model, prepared, config, progress, observer)


def _write_texts(
    texts: ItemTexts,
    column: str,
    model: Any,
    prepared: Prepared,
    config: Config,
    progress: RunFigures,
    observer: Observer,
) -> None:
    """Write the items' prompts and, where a single run has no answers to show, a few of ``model``.

    None of it counts in the run's seconds, and nothing of it can fail the run.
    """
    if not config.evaluation.keep_texts:
        return
    wanted = column == "generated" or config.evaluation.before
    with progress.not_measured():
        try:
            if wanted and progress.record.trial is None and needs_samples(prepared.splits, config):
                texts.add_samples(column, model, prepared.tokenizer, prepared.splits, config)
            texts.write(progress.paths)
        except (RuntimeError, OSError) as error:  # torch's lack of memory, a full disk
            observer.note(f"the answers of a few items are not kept: {error}")


def _wait(what: str, observer: Observer) -> Wait:
    """Return a wait that the observer sees as a phase, so that no worker takes the silent trial for hung."""
    return Wait(lambda: observer.phase(f"wait for another run's {what}"), lambda: observer.phase("evaluate base"))


def _with_warning(record: RunRecord, warning: str | None) -> RunRecord:
    """Add ``warning`` to the record, once even if the run is resumed."""
    if warning is None or warning in record.warnings:
        return record
    return record.replace(warnings=(*record.warnings, warning))


def _few_rows_warning(planned: Plan, rows: int) -> str | None:
    if rows >= planned.batch_size:
        return None
    return f"a step has {rows} rows, not training.batch_size={planned.batch_size}: the training split has no more"


def _budget_warning(trained: Trained, planned: Plan) -> str | None:
    limit = trained.training.ended_by_budget
    return budget_stop_message(limit, trained.training.steps, planned.max_steps) if limit is not None else None


def _check_finite(after: Evaluation, trained: Trained) -> None:
    """Raise :class:`Diverged` if the tuned model's loss isn't finite.

    The last optimizer step comes after the last training loss. It can leave finite weights whose logits are NaN, and
    the argmax over NaN would look like an accuracy.
    """
    if after.scores.loss is not None and not math.isfinite(after.scores.loss):
        raise Diverged("the tuned model's loss", trained.training.steps)


def _finished_training(paths: RunPaths) -> Trained | None:
    """Return the result of an interrupted run's finished training; ``None`` if it hasn't finished.

    The file is written after the adapter, so that the adapter is complete if the file is.
    """
    try:
        return from_dict(Trained, json.loads(paths.trained.read_text(encoding="utf-8")), str(paths.trained))
    except (OSError, ValueError, QloraExpError):
        return None


def _check_same_model(record: RunRecord, fingerprint: str) -> None:
    """Raise :class:`ModelError` if a resumed run has other base weights than before."""
    if record.model_fingerprint not in (None, fingerprint):
        raise ModelError(
            "the model's files have changed since this run began", record.run_id, f"qlora-exp rerun {record.run_id}"
        )


def _useful_flops_per_token(config: Config, prepared: Prepared) -> float:
    """Return the plan's operations for one unpadded token, without those for padding and recomputation."""
    row = prepared.estimate.workload.row
    unpadded, trainable = replace(row, padded=row.tokens, attended=row.tokens), prepared.plan.trainable_parameters
    architecture = prepared.architecture
    passes = weights_by_pass(architecture, config, prepared.modules)
    adapters = 0 if config.method.kind in TUNES_WEIGHTS else trainable
    return train_flops_per_token(architecture, adapters, unpadded, recomputed=False, fused_head=False, weights=passes)


_runs_in_this_process = itertools.count()


def _host_is_reused() -> bool:
    """Return whether this process has made a run before. The allocator then holds memory already, and resident peaks
    mean little."""
    return next(_runs_in_this_process) > 0


def _goal(config: Config, after: Evaluation, test: Evaluation | None) -> Any:
    if config.task.goal is None:
        return None
    split = config.evaluation.split
    return answer_goal(config.task.goal, test if split is EvaluationSplit.test and test else after, split.value)


def _failed_record(progress: RunFigures, error: BaseException) -> RunRecord:
    status = status_of(error)
    if status is Status.OUT_OF_MEMORY:
        progress.outside_allocator_bytes = measurement.outside_allocator_bytes(progress.meter.device)
    message = redact_text(str(error) or type(error).__name__)
    trace = redact_text("".join(traceback.format_exception(error))[-8000:]) if status is Status.FAILED else None
    failure = Failure(
        kind=type(error).__name__,
        message=message[:4000],
        phase=progress.phase,
        step=getattr(error, "step", None) or (progress.watch.so_far().training.steps if progress.watch else None),
        hint=error.hint if isinstance(error, QloraExpError) else _hint(status, progress, error),
        traceback=None if isinstance(error, QloraExpError) else trace,
    )
    return progress.known().replace(status=status, failure=failure)


def _hint(status: Status, progress: RunFigures, error: BaseException) -> str | None:
    paths, plan = progress.paths, progress.record.plan
    unit = "tokens" if plan is not None and plan.micro_batch_tokens is not None else "size"
    newest = newest_valid(paths.checkpoints)
    start = f"continues at step {step_of(newest[0])}" if newest else "starts again: no step was saved"
    if paths.trained.exists():
        start = "continues with the evaluation"
    if status is Status.FAILED and is_cuda_error(error):
        return (
            "start it again in a new process: CUDA may be unusable in this one; with CUDA_LAUNCH_BLOCKING=1 in the "
            "environment the traceback shows the operation that failed"
        )
    return {
        Status.INTERRUPTED: f"qlora-exp run --resume {shlex.quote(str(paths.folder))} {start}",
        Status.OUT_OF_MEMORY: f"halve training.micro_batch_{unit} (accumulation keeps the batch), set "
        "training.gradient_checkpointing=on, or quantization=nf4",
        Status.DIVERGED: "lower training.learning_rate, or raise training.warmup_ratio",
    }.get(status)
