"""Checks between the keys of a configuration. All problems are found at once, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_exp.config.bounds import above_zero, at_least, config_error, within
from qlora_exp.config.checks_lora import lora_problems, model_problems, quantization_problems, targets_problems
from qlora_exp.config.checks_task import goal_problems, task_problems
from qlora_exp.config.checks_training import training_problems
from qlora_exp.config.schema import Config, EvaluationConfig, SweepConfig, WorkersConfig
from qlora_exp.errors import ConfigError


def check(config: Config) -> list[ConfigError]:
    """Return every problem between keys, without raising; an empty list if there is none."""
    parts = (
        model_problems(config.model),
        quantization_problems(config.quantization),
        lora_problems(config),
        targets_problems(config.targets),
        task_problems(config.task),
        goal_problems(config),
        training_problems(config.training),
        evaluation_problems(config.evaluation),
        _other_problems(config),
        _sweep(config.sweep),
        _workers(config.workers),
    )
    return [problem for part in parts for problem in part]


def evaluation_problems(evaluation: EvaluationConfig) -> Iterator[ConfigError]:
    for key in ("batch_size", "max_new_tokens", "max_items", "forgetting_documents", "few_shots", "few_shot_draws"):
        yield from at_least(f"evaluation.{key}", getattr(evaluation, key), 1)
    if evaluation.metrics and not evaluation.generate:
        what = "these metrics are computed on generated answers, but nothing is generated"
        yield config_error(
            what, "evaluation.metrics", evaluation.metrics, "evaluation.generate=true, or evaluation.metrics=[]"
        )


def _other_problems(config: Config) -> Iterator[ConfigError]:
    yield from within("seed", config.seed, 0, 2**32 - 1)  # numpy and transformers take 32 bits
    yield from above_zero("tracking.timeout_seconds", config.tracking.timeout_seconds)
    yield from _budget(config)
    if not config.tracking.experiment.strip():
        yield config_error("the experiment needs a name", "tracking.experiment", "''", "tracking.experiment=qlora-exp")
    if not config.output_root.strip():
        yield config_error("no output folder is set", "output_root", "''", "output_root=outputs")


def _budget(config: Config) -> Iterator[ConfigError]:
    budget, batch = config.budget, config.training.batch_size
    yield from at_least("budget.usd_per_hour", budget.usd_per_hour, 0)
    for key in ("seconds", "tokens", "usd", "kwh", "memory_bytes"):
        yield from above_zero(f"budget.{key}", getattr(budget, key))
    if budget.usd is not None and not budget.usd_per_hour:
        what = "a limit in dollars needs the hourly price of this machine"
        yield config_error(what, "budget.usd", budget.usd, "budget.usd_per_hour=2.5")
    if budget.tokens is not None and 0 < budget.tokens < batch:
        what = f"the budget is too small for one training step: training.batch_size={batch} rows of at least one token"
        yield config_error(what, "budget.tokens", budget.tokens, "more tokens, or a smaller training.batch_size")


def _sweep(sweep: SweepConfig | None) -> Iterator[ConfigError]:
    if sweep is not None:
        yield from at_least("sweep.n_trials", sweep.n_trials, 1)
        yield from at_least("sweep.max_failures", sweep.max_failures, 0)
        yield from at_least("sweep.max_attempts", sweep.max_attempts, 1)
        yield from at_least("sweep.out_of_memory_retries", sweep.out_of_memory_retries, 0)


MAX_WORKERS = 1024
"""Each worker is a process with a connection to the study's database."""


def _workers(workers: WorkersConfig | None) -> Iterator[ConfigError]:
    if workers is None:
        return
    for key in ("count", "jobs"):
        if (number := getattr(workers, key)) is not None:
            yield from within(f"workers.{key}", number, 1, MAX_WORKERS)
    for key in ("heartbeat_seconds", "lease_seconds", "hang_seconds"):
        yield from above_zero(f"workers.{key}", getattr(workers, key))
    if not workers.lease_seconds > workers.heartbeat_seconds:
        what = "a trial's lease ends before its next heartbeat"
        hint = f"more than workers.heartbeat_seconds={workers.heartbeat_seconds:g}"
        yield config_error(what, "workers.lease_seconds", workers.lease_seconds, hint)
