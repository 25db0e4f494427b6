"""Checks of training length, batches, schedule and optimizer."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_exp.config.allowed_values import (
    MAX_THREADS,
    OPTIMIZERS,
    SCHEDULERS,
    UNSUPPORTED_OPTIMIZERS,
    UNSUPPORTED_SCHEDULERS,
)
from qlora_exp.config.bounds import above_zero, at_least, config_error, one_of, within
from qlora_exp.config.schema import TrainingConfig
from qlora_exp.errors import ConfigError


def training_problems(training: TrainingConfig) -> Iterator[ConfigError]:
    yield from _budget(training)
    yield from _batches(training)
    yield from above_zero("training.learning_rate", training.learning_rate)
    yield from within("training.warmup_ratio", training.warmup_ratio, 0, 1)
    yield from at_least("training.weight_decay", training.weight_decay, 0)
    yield from at_least("training.max_grad_norm", training.max_grad_norm, 0)
    yield from at_least("training.max_length", training.max_length, 2)
    for key in ("logging_steps", "evaluate_every_steps", "save_every_steps", "early_stopping_patience"):
        yield from at_least(f"training.{key}", getattr(training, key), 1)
    if training.threads is not None:
        yield from within("training.threads", training.threads, 1, MAX_THREADS)
    yield from at_least("training.sleep_seconds", training.sleep_seconds, 0)
    yield from one_of("training.scheduler", training.scheduler, SCHEDULERS)
    yield from one_of("training.optimizer", training.optimizer, OPTIMIZERS)
    if reason := UNSUPPORTED_SCHEDULERS.get(training.scheduler):
        what = f"the scheduler {training.scheduler} can't be set up here: {reason}"
        yield config_error(what, "training.scheduler", training.scheduler, "training.scheduler=cosine")
    if training.optimizer in OPTIMIZERS and UNSUPPORTED_OPTIMIZERS.search(training.optimizer):
        what = f"{training.optimizer} needs a package, a machine or arguments that qlora-exp doesn't provide"
        yield config_error(
            what, "training.optimizer", training.optimizer, "training.optimizer=adamw_torch, or adamw_8bit"
        )
    for key in ("early_stopping_patience", "keep_best"):
        if getattr(training, key) and training.evaluate_every_steps is None:
            what = f"training.{key} needs validation losses during training"
            yield config_error(what, f"training.{key}", getattr(training, key), "training.evaluate_every_steps=20")
    evaluates, saves = training.evaluate_every_steps, training.save_every_steps
    if training.keep_best and evaluates is not None and saves not in (None, evaluates):
        what = f"training.keep_best saves at every evaluation, every {evaluates} steps"
        hint = f"training.save_every_steps=null, or {evaluates} for both"
        yield config_error(what, "training.save_every_steps", saves, hint)


def _budget(training: TrainingConfig) -> Iterator[ConfigError]:
    if training.max_steps is None and training.max_tokens is None:
        yield config_error(
            "the length of the training is not set",
            "training.max_steps",
            None,
            "training.max_steps=200, or training.max_tokens=100000 instead",
        )
    if training.max_steps is not None and training.max_tokens is not None:
        what = f"training.max_steps={training.max_steps} is set, too: only one of them may end the training"
        hint = "training.max_steps=null, or training.max_tokens=null"
        yield config_error(what, "training.max_tokens", training.max_tokens, hint)
    yield from at_least("training.max_steps", training.max_steps, 1)
    yield from at_least("training.max_tokens", training.max_tokens, 1)


def _batches(training: TrainingConfig) -> Iterator[ConfigError]:
    yield from at_least("training.batch_size", training.batch_size, 1)
    yield from at_least("training.micro_batch_size", training.micro_batch_size, 1)
    micro_batch, batch = training.micro_batch_size, training.batch_size
    if micro_batch is not None and micro_batch >= 1 and batch >= 1 and batch % micro_batch:
        divisors = ", ".join(str(size) for size in range(1, batch + 1) if batch % size == 0)
        what = f"training.batch_size={batch} is not a multiple of training.micro_batch_size={micro_batch}"
        yield config_error(what, "training.micro_batch_size", micro_batch, f"a divisor of {batch}: {divisors}")
