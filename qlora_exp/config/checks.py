"""What must hold in a configuration: bounds of single numbers, and what fits together. All problems are found at once,
before anything is loaded."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Iterator
from typing import Any

from qlora_exp.config.allowed_values import (
    ALPHA_POLICIES,
    ATTENTIONS,
    AUTO_TOKENS,
    MASKED_ATTENTIONS,
    MAX_RANK,
    MAX_THREADS,
    MAX_WORKERS,
    OPTIMIZERS,
    REPORTERS,
    SCHEDULERS,
    UNSUPPORTED_OPTIMIZERS,
    UNSUPPORTED_SCHEDULERS,
    above_zero,
    at_least,
    config_error,
    one_of,
    within,
)
from qlora_exp.config.checks_lora import lora_problems, model_problems, quantization_problems, targets_problems
from qlora_exp.config.checks_method import method_problems
from qlora_exp.config.checks_ship import ship_problems
from qlora_exp.config.checks_task import goal_problems, task_problems
from qlora_exp.config.enums import PaddingFree
from qlora_exp.config.schema import BudgetConfig, Config, EvaluationConfig, TrainingConfig, WorkersConfig
from qlora_exp.errors import ConfigError, nearest

MINIMUM = {
    0: (
        *("quantization.int8_threshold", "task.split_seed", "training.weight_decay", "training.max_grad_norm"),
        *("training.sleep_seconds", "budget.usd_per_hour", "sweep.max_failures", "sweep.out_of_memory_retries"),
    ),
    1: (
        *("task.max_train_items", "task.max_validation_items", "task.max_test_items"),
        *("training.max_steps", "training.max_tokens", "training.batch_size", "training.micro_batch_size"),
        *("training.logging_steps", "training.evaluate_every_steps", "training.save_every_steps"),
        *("training.early_stopping_patience", "sweep.n_trials", "sweep.max_attempts"),
        *("evaluation.batch_size", "evaluation.max_new_tokens", "evaluation.max_items"),
        *("evaluation.forgetting_documents", "evaluation.few_shots", "evaluation.few_shot_draws"),
    ),
    2: ("training.max_length",),
}
"""The smallest number that is allowed → the keys for which it holds."""
ABOVE_ZERO = (
    *("lora.alpha", "training.learning_rate", "training.epochs"),
    *("tracking.timeout_seconds", "notify.timeout_seconds"),
    *("budget.seconds", "budget.tokens", "budget.usd", "budget.kwh", "budget.memory_bytes"),
    *("workers.heartbeat_seconds", "workers.lease_seconds", "workers.hang_seconds"),
)
BETWEEN = {
    "seed": (0, 2**32 - 1),  # numpy and transformers take 32 bits
    "lora.r": (1, MAX_RANK),
    "training.warmup_ratio": (0, 1),
    "training.threads": (1, MAX_THREADS),
    "workers.count": (1, MAX_WORKERS),
    "workers.jobs": (1, MAX_WORKERS),
}
"""Key → the smallest and the largest number it may have."""
BELOW_ONE = ("lora.dropout", "task.validation_fraction", "task.test_fraction")
"""Shares from 0 to less than 1."""
CHOICES = {
    "model.attention": ATTENTIONS,
    "lora.alpha_policy": ALPHA_POLICIES,
    "training.scheduler": SCHEDULERS,
    "training.optimizer": OPTIMIZERS,
}


def check(config: Config) -> list[ConfigError]:
    """Return every problem, in the order of the configuration's groups, without raising; an empty list if there is
    none."""
    parts = (
        _single_values(config),
        model_problems(config.model),
        quantization_problems(config.quantization),
        method_problems(config),
        ship_problems(config),
        lora_problems(config),
        targets_problems(config.targets),
        task_problems(config.task),
        goal_problems(config),
        _training(config.training),
        _padding(config),
        _evaluation(config.evaluation),
        _budget(config.budget, config.training.batch_size),
        _workers(config.workers),
        _names(config),
    )
    groups = [field.name for field in dataclasses.fields(config)]
    problems = [problem for part in parts for problem in part]
    return sorted(problems, key=lambda problem: groups.index(re.split(r"\W", str(problem.where), maxsplit=1)[0]))


def _single_values(config: Config) -> Iterator[ConfigError]:
    for minimum, keys in MINIMUM.items():
        for key in keys:
            yield from at_least(key, _value(config, key), minimum)
    for key in ABOVE_ZERO:
        yield from above_zero(key, _value(config, key))
    for key, (low, high) in BETWEEN.items():
        yield from within(key, _value(config, key), low, high)
    for key in BELOW_ONE:
        yield from within(key, _value(config, key), 0, 1, open_end=True)
    for key, valid in CHOICES.items():
        yield from one_of(key, _value(config, key), valid)


def _value(config: Config, key: str) -> Any:
    """Return the value at ``key``; ``None`` in a group that the configuration lacks (``sweep``, ``workers``)."""
    group = key.partition(".")[0]
    return None if getattr(config, group) is None else operator.attrgetter(key)(config)


def _training(training: TrainingConfig) -> Iterator[ConfigError]:
    lengths = {key: getattr(training, key) for key in ("max_steps", "max_tokens", "epochs")}
    if all(value is None for value in lengths.values()):
        hint = "training.max_steps=200; or training.epochs=3 or training.max_tokens=100000 instead"
        yield config_error("the length of the training is not set", "training.max_steps", None, hint)
    if training.max_steps is not None and training.max_tokens is not None:
        what = f"training.max_steps={training.max_steps} is set, too: only one of them may end the training"
        hint = "training.max_steps=null, or training.max_tokens=null"
        yield config_error(what, "training.max_tokens", training.max_tokens, hint)
    other = next((key for key in ("max_steps", "max_tokens") if lengths[key] is not None), None)
    if training.epochs is not None and other is not None:
        what = f"training.{other}={lengths[other]} is set, too: only one of them may end the training"
        yield config_error(what, "training.epochs", training.epochs, f"training.{other}=null, or training.epochs=null")
    micro_batch, batch = training.micro_batch_size, training.batch_size
    if micro_batch is not None and micro_batch >= 1 and batch >= 1 and batch % micro_batch:
        divisors = ", ".join(str(size) for size in range(1, batch + 1) if batch % size == 0)
        what = f"training.batch_size={batch} is not a multiple of training.micro_batch_size={micro_batch}"
        yield config_error(what, "training.micro_batch_size", micro_batch, f"a divisor of {batch}: {divisors}")
    tokens = training.micro_batch_tokens
    if tokens is not None and tokens != AUTO_TOKENS and not (type(tokens) is int and tokens >= 1):
        hint = f"training.micro_batch_tokens={AUTO_TOKENS}, a number of tokens (4096), or null"
        yield config_error("a micro-batch can't have this many tokens", "training.micro_batch_tokens", tokens, hint)
    if tokens is not None and micro_batch is not None:
        what = f"training.micro_batch_size={micro_batch} is set, too: a micro-batch is chosen in rows or in tokens"
        hint = "training.micro_batch_size=null, or training.micro_batch_tokens=null"
        yield config_error(what, "training.micro_batch_tokens", tokens, hint)
    if reason := UNSUPPORTED_SCHEDULERS.get(training.scheduler):
        what = f"the scheduler {training.scheduler} can't be set up here: {reason}"
        yield config_error(what, "training.scheduler", training.scheduler, "training.scheduler=cosine")
    if training.optimizer in OPTIMIZERS and UNSUPPORTED_OPTIMIZERS.search(training.optimizer):
        what = f"{training.optimizer} needs a package, a machine or arguments that qlora-exp doesn't provide"
        hint = "training.optimizer=adamw_torch, or adamw_8bit"
        yield config_error(what, "training.optimizer", training.optimizer, hint)
    for key in ("early_stopping_patience", "keep_best"):
        if getattr(training, key) and training.evaluate_every_steps is None:
            what = f"training.{key} needs validation losses during training"
            yield config_error(what, f"training.{key}", getattr(training, key), "training.evaluate_every_steps=20")
    evaluates, saves = training.evaluate_every_steps, training.save_every_steps
    if training.keep_best and evaluates is not None and saves not in (None, evaluates):
        what = f"training.keep_best saves at every evaluation, every {evaluates} steps"
        hint = f"training.save_every_steps=null, or {evaluates} for both"
        yield config_error(what, "training.save_every_steps", saves, hint)


def _padding(config: Config) -> Iterator[ConfigError]:
    attention = config.model.attention
    if config.training.padding_free is PaddingFree.on and attention in MASKED_ATTENTIONS:
        what = f"model.attention={attention} needs padded rows: it would mask all pairs of a batch's tokens"
        yield config_error(what, "training.padding_free", "on", "training.padding_free=auto, or model.attention=auto")


def _evaluation(evaluation: EvaluationConfig) -> Iterator[ConfigError]:
    if evaluation.metrics and not evaluation.generate:
        what = "these metrics are computed on generated answers, but nothing is generated"
        hint = "evaluation.generate=true, or evaluation.metrics=[]"
        yield config_error(what, "evaluation.metrics", evaluation.metrics, hint)


def _budget(budget: BudgetConfig, batch: int) -> Iterator[ConfigError]:
    if budget.usd is not None and not budget.usd_per_hour:
        what = "a limit in dollars needs the hourly price of this machine"
        yield config_error(what, "budget.usd", budget.usd, "budget.usd_per_hour=2.5")
    if budget.tokens is not None and 0 < budget.tokens < batch:
        what = f"the budget is too small for one training step: training.batch_size={batch} rows of at least one token"
        yield config_error(what, "budget.tokens", budget.tokens, "more tokens, or a smaller training.batch_size")


def _workers(workers: WorkersConfig | None) -> Iterator[ConfigError]:
    if workers is not None and not workers.lease_seconds > workers.heartbeat_seconds:
        what = "a trial's lease ends before its next heartbeat"
        hint = f"more than workers.heartbeat_seconds={workers.heartbeat_seconds:g}"
        yield config_error(what, "workers.lease_seconds", workers.lease_seconds, hint)


def _names(config: Config) -> Iterator[ConfigError]:
    if not config.tracking.experiment.strip():
        yield config_error("the experiment needs a name", "tracking.experiment", "''", "tracking.experiment=qlora-exp")
    webhook = config.notify.webhook if config.notify is not None else None
    if webhook is not None and not webhook.lower().startswith(("http://", "https://")):
        what = "a webhook is an http or https URL"
        yield ConfigError(what, "notify.webhook", "notify.webhook=https://…; or a command: notify.command='…'")
    for name in config.tracking.also:
        if name not in REPORTERS:
            what = "MLflow is on by itself" if name == "mlflow" else f"runs can't also be logged to {name!r}"
            hint = "leave it out; tracking=off turns MLflow off" if name == "mlflow" else nearest(name, REPORTERS)
            yield config_error(what, "tracking.also", config.tracking.also, hint)
    if not config.output_root.strip():
        yield config_error("no output folder is set", "output_root", "''", "output_root=outputs")
