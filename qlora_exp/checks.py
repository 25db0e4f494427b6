"""What must hold between the keys of a configuration: every problem found at once, before anything is loaded."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
import typing
from collections.abc import Callable, Iterator

from qlora_exp.config import (
    AdapterInit,
    ComputeDtype,
    Config,
    DeviceChoice,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    Quantization,
    QuantizationConfig,
    SweepConfig,
    TargetsConfig,
    TaskConfig,
    TaskKind,
    TaskSource,
    TrainingConfig,
    WorkersConfig,
)
from qlora_exp.errors import ConfigError, nearest
from qlora_exp.records import Scores

TARGET_SETS = ("attention", "attention_qv", "mlp", "all_linear")
ALPHA_POLICIES = ("2r", "r", "fixed")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
QUANTIZED = (Quantization.int8, Quantization.nf4, Quantization.fp4)
NATIVE_DTYPES = {Quantization.fp32: "float32", Quantization.bf16: "bfloat16", Quantization.fp16: "float16"}
FOUR_BIT = (Quantization.nf4, Quantization.fp4)

# Kept here because importing transformers takes seconds; a test holds that both equal transformers' own enums.
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
)  # fmt: skip
OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor", "adamw_anyprecision",
    "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad", "adamw_bnb_8bit", "adamw_8bit",
    "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit",
    "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo", "adalomo", "grokadamw",
    "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd", "apollo_adamw", "apollo_adamw_layerwise",
    "stable_adamw",
)  # fmt: skip
SCHEDULERS_NEEDING_MORE = {
    "reduce_lr_on_plateau": "it needs a metric at every evaluation",
    "greedy": "it needs a metric at every step",
    "cosine_with_min_lr": "it needs a minimum learning rate",
    "cosine_warmup_with_min_lr": "it needs a minimum learning rate",
    "warmup_stable_decay": "it needs a number of decay steps",
}
OPTIMIZERS_NEEDING_MORE = re.compile(
    r"galore|lomo|apollo|anyprecision|_xla|_npu|_torch_4bit|_torch_8bit|grok|free|stable"
)
"""Names of transformers that need another package, another machine or a list of weight matrices of their own."""

LARGEST_RANK = 65_536
"""Above the width of every model there is, beyond which no rank adds anything."""

GOAL = re.compile(r"\s*([A-Za-z_]\w*)\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


OF_LABELS = (
    "accuracy", "accuracy_calibrated", "accuracy_normalized", "balanced_accuracy", "macro_f1", "invalid_answer_rate",
)  # fmt: skip
OF_FREE_TEXT = ("rouge_l", "token_f1")
OF_GENERATED = ("exact_match", "invalid_answer_rate", *OF_FREE_TEXT)
SHARES = (*OF_LABELS, *OF_FREE_TEXT, "exact_match", "token_accuracy")


@functools.cache
def goal_metrics() -> tuple[str, ...]:
    """Names that ``task.goal`` can speak of: the numbers of :class:`~qlora_exp.records.Scores`."""
    hints = typing.get_type_hints(Scores)
    return tuple(field.name for field in dataclasses.fields(Scores) if hints[field.name] == (float | None))


def _goal(text: str) -> str:
    """As it is written in a shell: Hydra wants quotes around spaces and signs, too."""
    return f"'task.goal=\"{text}\"'"


def goal_of(text: str) -> tuple[str, str, float]:
    """``"accuracy >= 0.6"`` as ``("accuracy", ">=", 0.6)``. Raises :class:`ConfigError` for anything else."""
    where = f"task.goal = {text}"
    found = GOAL.fullmatch(text)
    if not found:
        raise ConfigError("the goal can't be read", where, f"write METRIC >= NUMBER, e.g. {_goal('accuracy >= 0.6')}")
    metric, sign, threshold = found[1], found[2], float(found[3])
    if metric not in goal_metrics():
        raise ConfigError(f"there is no metric called {metric}", where, nearest(metric, goal_metrics()))
    if metric in SHARES and not 0 <= threshold <= 1:
        what = f"{metric} is a share, between 0 and 1"
        likely = threshold / 100 if 1 < threshold <= 100 else 0.5
        raise ConfigError(what, where, f"e.g. {_goal(f'{metric} {sign} {likely:g}')}")
    return metric, sign, threshold


def check(config: Config) -> list[ConfigError]:
    """Every problem between keys, none raised. An empty list: the configuration can be meant."""
    parts = (
        _model(config.model),
        _quantization(config.quantization),
        _lora(config),
        _targets(config.targets),
        _task(config.task),
        _goal_can_be_answered(config),
        _training(config.training),
        _evaluation(config.evaluation),
        _rest(config),
        _sweep(config.sweep),
        _workers(config.workers),
    )
    return [problem for part in parts for problem in part]


def _error(what: str, key: str, value: object, hint: str) -> ConfigError:
    return ConfigError(what, f"{key} = {'null' if value is None else value}", hint)


def _at_least(key: str, value: float | None, least: float) -> Iterator[ConfigError]:
    """A number that may be null but not below ``least``, and never NaN or infinite."""
    if value is not None and not (math.isfinite(value) and value >= least):
        yield _error(f"{key} must be at least {least:g}", key, value, f"try {key}={least:g} or more")


def _above_zero(key: str, value: float | None) -> Iterator[ConfigError]:
    if value is not None and not (math.isfinite(value) and value > 0):
        yield _error(f"{key} must be above 0", key, value, f"give {key} a positive number")


def _within(key: str, value: float, low: float, high: float, open_end: bool = False) -> Iterator[ConfigError]:
    inside = low <= value < high if open_end else low <= value <= high
    if not inside:
        upto = f"below {high:g}" if open_end else f"{high:.10g}"
        yield _error(f"{key} must lie between {low:g} and {upto}", key, value, f"e.g. {key}={low:g}")


def _one_of(key: str, value: str, valid: tuple[str, ...]) -> Iterator[ConfigError]:
    if value not in valid:
        yield _error(f"{key} has no choice called {value}", key, value, nearest(value, valid))


def _model(model: ModelConfig) -> Iterator[ConfigError]:
    yield from _one_of("model.attention", model.attention, ATTENTIONS)
    yield from _revision(model)
    if model.family == "local":
        if not model.path:
            yield _error("a local model needs a path", "model.path", model.path, "model.path=DIRECTORY_OR_FILE.gguf")
        return
    if model.path:
        hint = f"model=local model.path={model.path}"
        yield _error("model.path is only for model=local", "model.path", model.path, hint)
    variant = model.variant.value
    if variant not in model.checkpoints:
        known = ", ".join(sorted(model.checkpoints)) or "none"
        hint = f"known: {known}; add model.checkpoints.{variant}=OWNER/NAME"
        yield _error(f"{model.family} has no {variant} checkpoint", "model.variant", variant, hint)
    for name, checkpoint in model.checkpoints.items():
        key = f"model.checkpoints.{name}"
        if name not in ("base", "instruct"):
            yield _error(f"there is no variant called {name}", key, checkpoint, nearest(name, ("base", "instruct")))
        if not re.fullmatch(r"embedded:[\w-]+|[\w.-]+/[\w.-]+", checkpoint):
            yield _error("a checkpoint is a Hub id or embedded:NAME", key, checkpoint, "e.g. Qwen/Qwen3-0.6B")


def _revision(model: ModelConfig) -> Iterator[ConfigError]:
    checkpoint = model.checkpoints.get(model.variant.value, "")
    if model.revision is not None and (model.family == "local" or checkpoint.startswith("embedded:")):
        what = "only a model of the Hub has revisions: this one is read from disk"
        yield _error(what, "model.revision", model.revision, "model.revision=null")


def _quantization(quantization: QuantizationConfig) -> Iterator[ConfigError]:
    mode, choice = quantization.mode, quantization.compute_dtype
    native = NATIVE_DTYPES.get(mode)
    if native and choice is not ComputeDtype.auto and choice.value != native:
        other = next(name.value for name, dtype in NATIVE_DTYPES.items() if dtype == choice.value)
        hint = f"quantization.compute_dtype=auto, or quantization={other}"
        yield _error(
            f"{mode.value} weights are computed with in {native}", "quantization.compute_dtype", choice.value, hint
        )
    yield from _at_least("quantization.int8_threshold", quantization.int8_threshold, 0)


def int8_dora(config: Config) -> ConfigError | None:
    """The problem of a configuration that would train DoRA over int8 on a CPU; ``None`` for every other."""
    if not (config.lora.dora and config.quantization.mode is Quantization.int8):
        return None
    what = "DoRA can't be trained over int8 on a CPU: peft 0.21 loses the weights' scales when it unpacks them there"
    return _error(what, "lora.dora", config.lora.dora, "quantization=nf4, or lora.dora=false, or a GPU")


def _lora(config: Config) -> Iterator[ConfigError]:
    lora, mode = config.lora, config.quantization.mode
    if config.training.device is DeviceChoice.cpu and (problem := int8_dora(config)):
        yield problem
    yield from _within("lora.r", lora.r, 1, LARGEST_RANK)
    yield from _within("lora.dropout", lora.dropout, 0, 1, open_end=True)
    yield from _alpha(lora)
    if lora.init is AdapterInit.pissa and mode in QUANTIZED:
        what = f"PiSSA takes its start from the base's own weights, which {mode.value} has rounded away"
        yield _error(what, "lora.init", lora.init.value, "quantization=bf16 (or fp16, fp32), or lora.init=kaiming")


def _alpha(lora: LoraConfig) -> Iterator[ConfigError]:
    yield from _one_of("lora.alpha_policy", lora.alpha_policy, ALPHA_POLICIES)
    yield from _above_zero("lora.alpha", lora.alpha)
    if lora.alpha_policy == "fixed" and lora.alpha is None:
        what = "lora.alpha_policy=fixed needs to be told which alpha"
        yield _error(what, "lora.alpha", None, f"lora.alpha={2 * lora.r}")
    implied = {"2r": 2 * lora.r, "r": lora.r}.get(lora.alpha_policy)
    if implied is not None and lora.alpha is not None and lora.alpha != implied:
        what = f"lora.alpha contradicts lora.alpha_policy={lora.alpha_policy}, which makes it {implied}"
        yield _error(what, "lora.alpha", lora.alpha, "lora.alpha_policy=fixed, or leave lora.alpha out")


def _targets(targets: TargetsConfig) -> Iterator[ConfigError]:
    if targets.modules is None:
        yield from _one_of("targets.set", targets.set, TARGET_SETS)
    elif not targets.modules:
        yield _error("the list of target modules is empty", "targets.modules", "[]", "targets.modules=[q_proj,v_proj]")
    for name in targets.modules or ():
        if not re.fullmatch(r"\w+(\.\w+)*", name):
            hint = "a module's name or its last parts, e.g. self_attn.q_proj"
            yield _error(f"{name!r} can't be a module's name", "targets.modules", name, hint)


def _task(task: TaskConfig) -> Iterator[ConfigError]:
    if task.source is TaskSource.local and not task.path:
        yield _error("a local task needs a file", "task.path", task.path, "task.path=FILE.jsonl")
    if task.source is TaskSource.hub and not task.hub_id:
        yield _error("a Hub task needs a data set's id", "task.hub_id", task.hub_id, "task.hub_id=OWNER/NAME")
    if task.source is TaskSource.hub and "train" not in task.splits:
        yield _error("the task has no training split", "task.splits", task.splits, "task.splits.train=train")
    for name in task.splits:
        yield from _one_of("task.splits", name, ("train", "validation", "test"))
    yield from _within("task.validation_fraction", task.validation_fraction, 0, 1, open_end=True)
    yield from _within("task.test_fraction", task.test_fraction, 0, 1, open_end=True)
    if not task.validation_fraction + task.test_fraction < 1:
        what = "validation and test together leave nothing to train on"
        total = f"{task.validation_fraction} + {task.test_fraction}"
        yield _error(what, "task.validation_fraction + task.test_fraction", total, "their sum must be below 1")
    for split in ("train", "validation", "test"):
        yield from _at_least(f"task.max_{split}_items", getattr(task, f"max_{split}_items"), 1)
    yield from _at_least("task.split_seed", task.split_seed, 0)
    if task.labels is not None and (len(task.labels) < 2 or len(set(task.labels)) < len(task.labels)):
        yield _error("labels must be two or more, all different", "task.labels", task.labels, "task.labels=[yes,no]")
    if task.labels is not None and task.kind is not TaskKind.classification:
        yield _error("labels are for classification", "task.kind", task.kind.value, "task.kind=classification")


def _goal_can_be_answered(config: Config) -> Iterator[ConfigError]:
    task, text = config.task, config.task.goal
    if text is None:
        return
    try:
        metric, _, _ = goal_of(text)
    except ConfigError as problem:
        yield problem
        return
    other = {TaskKind.classification: OF_FREE_TEXT, TaskKind.generation: OF_LABELS}[task.kind]
    if metric in other:
        what = f"{metric} isn't measured for task.kind={task.kind.value}"
        yield _error(what, "task.goal", text, f"task.goal=null, or another metric, e.g. {_goal('exact_match >= 0.5')}")
    elif metric in OF_GENERATED and not config.evaluation.generate:
        yield _error(f"{metric} needs generated answers", "task.goal", text, "evaluation.generate=true")


def _training(training: TrainingConfig) -> Iterator[ConfigError]:
    yield from _budget(training)
    yield from _batches(training)
    yield from _above_zero("training.learning_rate", training.learning_rate)
    yield from _within("training.warmup_ratio", training.warmup_ratio, 0, 1)
    yield from _at_least("training.weight_decay", training.weight_decay, 0)
    yield from _at_least("training.max_grad_norm", training.max_grad_norm, 0)
    yield from _at_least("training.max_length", training.max_length, 2)
    for key in ("logging_steps", "evaluate_every_steps", "save_every_steps", "early_stopping_patience", "threads"):
        yield from _at_least(f"training.{key}", getattr(training, key), 1)
    yield from _one_of("training.scheduler", training.scheduler, SCHEDULERS)
    yield from _one_of("training.optimizer", training.optimizer, OPTIMIZERS)
    if reason := SCHEDULERS_NEEDING_MORE.get(training.scheduler):
        what = f"the scheduler {training.scheduler} can't be set up here: {reason}"
        yield _error(what, "training.scheduler", training.scheduler, "training.scheduler=cosine")
    if training.optimizer in OPTIMIZERS and OPTIMIZERS_NEEDING_MORE.search(training.optimizer):
        what = f"{training.optimizer} needs a package, a machine or arguments that qlora-exp doesn't provide"
        yield _error(what, "training.optimizer", training.optimizer, "training.optimizer=adamw_torch, or adamw_8bit")
    for key in ("early_stopping_patience", "keep_best"):
        if getattr(training, key) and training.evaluate_every_steps is None:
            what = f"training.{key} needs validation losses during training"
            yield _error(what, f"training.{key}", getattr(training, key), "training.evaluate_every_steps=20")
    evaluates, saves = training.evaluate_every_steps, training.save_every_steps
    if training.keep_best and evaluates is not None and saves not in (None, evaluates):
        what = f"training.keep_best saves at every evaluation, every {evaluates} steps"
        hint = f"training.save_every_steps=null, or {evaluates} for both"
        yield _error(what, "training.save_every_steps", saves, hint)


def _budget(training: TrainingConfig) -> Iterator[ConfigError]:
    if training.max_steps is None and training.max_tokens is None:
        yield _error(
            "the training has no end",
            "training.max_steps",
            None,
            "training.max_steps=200, or training.max_tokens=100000",
        )
    yield from _at_least("training.max_steps", training.max_steps, 1)
    yield from _at_least("training.max_tokens", training.max_tokens, 1)


def _batches(training: TrainingConfig) -> Iterator[ConfigError]:
    yield from _at_least("training.batch_size", training.batch_size, 1)
    yield from _at_least("training.micro_batch_size", training.micro_batch_size, 1)
    micro, batch = training.micro_batch_size, training.batch_size
    if micro is not None and micro >= 1 and batch >= 1 and batch % micro:
        divisors = ", ".join(str(size) for size in range(1, batch + 1) if batch % size == 0)
        what = f"training.batch_size={batch} can't be made of micro-batches of {micro}"
        yield _error(what, "training.micro_batch_size", micro, f"a divisor of {batch}: {divisors}")


def _evaluation(evaluation: EvaluationConfig) -> Iterator[ConfigError]:
    for key in ("batch_size", "max_new_tokens", "max_items", "forgetting_documents"):
        yield from _at_least(f"evaluation.{key}", getattr(evaluation, key), 1)
    if evaluation.metrics and not evaluation.generate:
        what = "further metrics are computed on generated answers, and nothing is generated"
        yield _error(
            what, "evaluation.metrics", evaluation.metrics, "evaluation.generate=true, or evaluation.metrics=[]"
        )


def _rest(config: Config) -> Iterator[ConfigError]:
    yield from _within("seed", config.seed, 0, 2**32 - 1)  # numpy and transformers take 32 bits
    yield from _above_zero("tracking.timeout_seconds", config.tracking.timeout_seconds)
    yield from _at_least("budget.usd_per_hour", config.budget.usd_per_hour, 0)
    if not config.tracking.experiment.strip():
        yield _error("the experiment needs a name", "tracking.experiment", "''", "tracking.experiment=qlora-exp")
    if not config.output_root.strip():
        yield _error("there is no output folder", "output_root", "''", "output_root=outputs")


def _sweep(sweep: SweepConfig | None) -> Iterator[ConfigError]:
    if sweep is not None:
        yield from _at_least("sweep.n_trials", sweep.n_trials, 1)
        yield from _at_least("sweep.max_failures", sweep.max_failures, 0)
        yield from _at_least("sweep.max_attempts", sweep.max_attempts, 1)
        yield from _at_least("sweep.out_of_memory_retries", sweep.out_of_memory_retries, 0)


def _workers(workers: WorkersConfig | None) -> Iterator[ConfigError]:
    if workers is None:
        return
    yield from _at_least("workers.count", workers.count, 1)
    yield from _at_least("workers.jobs", workers.jobs, 1)
    for key in ("heartbeat_seconds", "lease_seconds", "hang_seconds"):
        yield from _above_zero(f"workers.{key}", getattr(workers, key))
    if not workers.lease_seconds > workers.heartbeat_seconds:
        what = "a trial's lease ends before its next heartbeat"
        hint = f"more than workers.heartbeat_seconds={workers.heartbeat_seconds:g}"
        yield _error(what, "workers.lease_seconds", workers.lease_seconds, hint)
