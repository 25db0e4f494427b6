"""Prepares a run: everything that can be checked before weights are read."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

from qlora_exp.architecture import run_plan
from qlora_exp.architecture.padding import needs_padding
from qlora_exp.architecture.shapes import Architecture
from qlora_exp.architecture.targets import rank_of, rank_warning
from qlora_exp.architecture.tuned_weights import trained_modules
from qlora_exp.config.checks_lora import int8_dora, scaled_16_bit_adapters
from qlora_exp.config.checks_method import scaled_16_bit_weights
from qlora_exp.config.checks_task import GENERATED_METRICS, parse_goal
from qlora_exp.config.enums import AdapterInit, EvaluationSplit, Method, PaddingFree
from qlora_exp.config.schema import Config
from qlora_exp.data.items import Splits, check_positions, check_vocabulary
from qlora_exp.data.load import load_data
from qlora_exp.data.sources import state_of_files
from qlora_exp.data.splits import load_rows
from qlora_exp.errors import ConfigError, DataError
from qlora_exp.estimate.estimator import RunEstimate, estimator_of_run, with_predictions
from qlora_exp.estimate.memory_fit import MemoryLimit, memory_limit_bytes
from qlora_exp.estimate.tokens import lengths_of, row_lengths
from qlora_exp.evaluation.generation import check_answers
from qlora_exp.evaluation.metrics import hub_metric
from qlora_exp.models.activation_start import check_start_rows
from qlora_exp.models.attention import measured_padding_reason
from qlora_exp.models.base_cache import NoCache, model_key
from qlora_exp.models.base_models import BaseModels
from qlora_exp.models.gguf_tensors import one_reader
from qlora_exp.models.inspect import describe
from qlora_exp.models.kernels import kernels_of_run
from qlora_exp.models.tokenizers import load_tokenizer
from qlora_exp.paths import OutputPaths
from qlora_exp.records.find import EndedRuns
from qlora_exp.records.types import Environment, Plan
from qlora_exp.runs.ask_teacher import find_teacher
from qlora_exp.runs.ship import check_format


@dataclass(frozen=True)
class Prepared:
    """A checked run: its plan and estimate, full names of its target modules, tokenizer, data and architecture."""

    plan: Plan
    estimate: RunEstimate
    modules: tuple[str, ...]
    tokenizer: Any
    splits: Splits
    architecture: Architecture


def prepare(
    config: Config, environment: Environment, bases: BaseModels | None = None, memory: MemoryLimit | None = None
) -> Prepared:
    """Check rows, target modules and plan, the cheapest checks first. Raises :class:`QloraExpError`.

    ``memory``: the limit for ``gradient_checkpointing=auto``; ``None``: the budget's, or the device's memory.
    """
    with one_reader(config.model.variant_path):
        return _prepare(config, environment, bases or NoCache(), memory)


def _prepare(config: Config, environment: Environment, bases: BaseModels, memory: MemoryLimit | None) -> Prepared:
    if environment.device.kind == "cpu" and (problem := int8_dora(config)):
        raise problem  # with training.device=auto the device is known only here
    if environment.device.kind == "cpu" and (problem := scaled_16_bit_weights(config)):
        raise problem
    device = environment.device
    computed_in = run_plan.compute_dtype(config.quantization, device.kind, device.bf16)
    if device.kind == "cuda" and (problem := scaled_16_bit_adapters(config, computed_in)):
        raise problem  # a card without bfloat16 computes quantized weights in float16
    if environment.device.kind == "cpu" and config.model.attention == "flex_attention":
        what = "FlexAttention can't be trained on a CPU: torch has no backward pass for it there"
        raise ConfigError(what, "model.attention = flex_attention", "model.attention=auto, or a GPU")
    task_key = (repr(config.task), state_of_files(config.task.path) if config.task.path else None)
    rows = bases.memoize("rows", task_key, lambda: load_rows(config.task))
    model_id = model_key(config.model)
    architecture = bases.memoize("architecture", model_id, lambda: describe(config.model))
    kernels = kernels_of_run(config.training.kernels, architecture.model_type, device.kind)
    modules = trained_modules(architecture, config)
    if config.method.kind is Method.lora:
        rank_warning(architecture, modules, config.lora)
    tokenizer = load_tokenizer(config.model)
    length = config.training.max_length
    splits = bases.memoize("splits", (task_key, model_id, length), lambda: load_data(config, tokenizer, length, rows))
    if config.method.kind is Method.lora and config.lora.init is AdapterInit.eva:
        check_start_rows(splits.train, max(rank_of(config.lora, name) for name in modules), config.seed)
    find_teacher(config, splits.format, tokenizer)
    check_format(architecture, config)
    check_vocabulary(splits, tokenizer, architecture.vocabulary_size)
    check_positions(splits, architecture.positions)
    if config.evaluation.generate and not splits.whole_texts:
        answers_key = (task_key, model_id, length, config.evaluation.max_new_tokens)
        bases.memoize("answers that can be right", answers_key, lambda: check_answers(splits, tokenizer, config))
    _check_evaluation(config, splits)
    ended = bases.memoize("ended runs", config.output_root, lambda: EndedRuns(OutputPaths.of(config.output_root)))
    memory = memory or MemoryLimit(config.budget.memory_bytes, 1, (), allow_borderline=True, halvings=0)
    memory_bytes = memory_limit_bytes(memory, device)
    estimator = estimator_of_run(environment, architecture, modules, splits, ended.records(), bases.warm, memory_bytes)
    estimate = estimator.estimate(config)
    planned = run_plan.make_plan(
        config, environment, architecture, modules, splits.format, estimate.checkpointing, estimate.padded_because
    )
    if config.training.epochs is not None:
        planned = replace(planned, max_steps=estimate.workload.steps)
    if config.training.max_tokens is not None:
        planned = replace(planned, max_steps=_steps_for_tokens(estimate, splits))
    planned = replace(with_predictions(planned, estimate), kernels=kernels)
    return Prepared(planned, estimate, modules, tokenizer, splits, architecture)


def plan_for_model(prepared: Prepared, model: Any, config: Config) -> Plan:
    """Return the plan for the loaded ``model``, a base: with padding, if its logits differ without.

    Raises:
        ConfigError: the logits differ, and ``training.padding_free=on``.
    """
    plan, training = prepared.plan, config.training
    longest = lengths_of(prepared.splits, training.max_length).longest_read_tokens(training)
    reason = measured_padding_reason(model, longest) if plan.padding_free else None
    if reason is None:
        return plan
    if training.padding_free is PaddingFree.on:
        raise needs_padding(plan.architecture, reason)
    padded = replace(config, training=replace(training, padding_free=PaddingFree.off))
    estimate = prepared.estimate.estimator.estimate(padded)
    plan = replace(plan, padding_free=False, padded_because=reason, gradient_checkpointing=estimate.checkpointing)
    return with_predictions(plan, estimate)


def _check_evaluation(config: Config, splits: Splits) -> None:
    """Check what evaluation needs before a training has cost time: metrics, test items, few-shot examples."""
    if splits.whole_texts:
        _check_whole_texts(config)
    for name in config.evaluation.metrics:
        hub_metric(name)
    if config.evaluation.split is EvaluationSplit.test and not splits.test:
        raise DataError("there are no test items", "evaluation.split = test", "task.test_fraction=0.1, or a test file")
    shots = config.evaluation.few_shots
    if shots is not None and shots > len(splits.train):
        what = f"{shots} worked examples can't be drawn from {len(splits.train)} training items"
        raise DataError(what, f"evaluation.few_shots={shots}", f"at most {len(splits.train)}")


def _check_whole_texts(config: Config) -> None:
    """Raise :class:`DataError` if a setting needs a prompt and an answer, and the rows are whole texts."""
    generated = config.task.goal is not None and parse_goal(config.task.goal)[0] in GENERATED_METRICS
    settings = (
        (generated, f"task.goal={config.task.goal}", "'task.goal=\"loss <= 2.5\"'"),
        (bool(config.evaluation.metrics), "evaluation.metrics", "evaluation.metrics=[]"),
        (config.evaluation.few_shots is not None, "evaluation.few_shots", "evaluation.few_shots=null"),
    )
    for is_set, key, hint in settings:
        if is_set:
            what = "whole texts have no prompt, so nothing is generated: they are scored by loss and bits per byte"
            raise DataError(what, key, f"{hint}; or name a prompt: task.columns.prompt=COLUMN")


SHORT_ROWS_SIGMAS = 4.0
"""Standard errors by which sampled rows may be shorter than the mean row. The number of steps allows for that, so that
the token limit, not the last step, ends the training."""


def _steps_for_tokens(estimate: RunEstimate, splits: Splits) -> int:
    """Return enough steps for ``training.max_tokens``; TokenBudget stops at the exact step."""
    lengths = row_lengths(splits)
    mean = statistics.fmean(lengths)
    workload = estimate.workload
    rows = workload.tokens / mean
    factor = 1 + SHORT_ROWS_SIGMAS * statistics.pstdev(lengths) / mean / math.sqrt(max(rows, 1.0))
    return 1 + math.ceil(factor * rows / workload.step_rows)
