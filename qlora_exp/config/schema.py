"""The typed schema of a configuration, and the checks that need more than one key. Defaults live in conf/ alone."""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf


class Enum(enum.Enum):
    """A setting's choices, written by name wherever a text names them: ``name='${quantization.mode}-r${lora.r}'``."""

    def __str__(self) -> str:
        return str(self.name)


class Variant(Enum):
    base = "base"
    instruct = "instruct"


class Quantization(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    int8 = "int8"
    nf4 = "nf4"
    fp4 = "fp4"


class ComputeDtype(Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class AdapterInit(Enum):
    kaiming = "kaiming"
    gaussian = "gaussian"
    pissa = "pissa"


class TaskSource(Enum):
    embedded = "embedded"
    local = "local"
    hub = "hub"


class TaskKind(Enum):
    classification = "classification"
    generation = "generation"


class Format(Enum):
    auto = "auto"
    chat = "chat"
    plain = "plain"


class Learn(Enum):
    """Which answers of a conversation are learned."""

    last = "last"
    all = "all"


class InvalidRows(Enum):
    error = "error"
    drop = "drop"


class SpecialTokens(Enum):
    """What the plain format makes of a special token that is written out in a row."""

    refuse = "refuse"
    text = "text"
    """It is read as ordinary text."""
    token = "token"
    """In a prompt it is the token itself."""


class Checkpointing(Enum):
    auto = "auto"
    on = "on"
    off = "off"


class EvaluationSplit(Enum):
    validation = "validation"
    test = "test"


class Engine(Enum):
    sft = "sft"
    """TRL's SFTTrainer."""
    sleep = "sleep"
    """Sleeps in place of training and scores by a formula; SYNTHETIC, for trying out orchestration."""


class SleepFault(Enum):
    none = "none"
    out_of_memory = "out_of_memory"
    diverge = "diverge"
    hang = "hang"
    crash = "crash"
    fail = "fail"


class Sampler(Enum):
    auto = "auto"
    grid = "grid"
    random = "random"
    tpe = "tpe"
    gp = "gp"
    nsga2 = "nsga2"
    qmc = "qmc"
    cmaes = "cmaes"
    ladder = "ladder"
    """Rank doubling: sweep.ladder says how."""


class LrPolicy(Enum):
    search = "search"
    """Pilots at every rank choose among lr_factors × the centre."""
    fixed = "fixed"
    """training.learning_rate at every rank."""
    transfer = "transfer"
    """Pilots at r_start only; other ranks take what was chosen there, scaled as the centre is."""


class Pruner(Enum):
    none = "none"
    median = "median"
    asha = "asha"
    hyperband = "hyperband"
    wilcoxon = "wilcoxon"


class Isolation(Enum):
    warm = "warm"
    """Trials of one host share a loaded base."""
    fresh = "fresh"
    """Each trial has a process of its own."""


class DeviceChoice(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass
class ModelConfig:
    family: str
    variant: Variant
    checkpoints: dict[str, str]
    """Hub id or ``embedded:NAME`` by variant; empty for ``model=local``."""
    path: str | None
    """A directory (safetensors) or a GGUF file on disk; only for ``model=local``."""
    revision: str | None
    chat_template: str | None
    """A .jinja file that takes the place of the tokenizer's own template."""
    template_tokens_trained: dict[str, bool]
    """By variant: has the model seen the chat template's special tokens?"""
    attention: str
    """transformers' ``attn_implementation``: sdpa, eager, flash_attention_2 …; auto: sdpa where there is one."""


@dataclass
class QuantizationConfig:
    mode: Quantization
    compute_dtype: ComputeDtype
    double_quantization: bool
    int8_threshold: float


@dataclass
class LoraConfig:
    r: int
    alpha_policy: str
    """``2r``, ``r`` or ``fixed`` (with lora.alpha)."""
    alpha: float | None
    dropout: float
    dtype: ComputeDtype
    rslora: bool
    dora: bool
    init: AdapterInit


@dataclass
class TargetsConfig:
    set: str
    """attention, attention_qv, mlp, all_linear."""
    modules: list[str] | None
    """An explicit list of module-name endings; takes the place of ``set``."""


@dataclass
class ColumnsConfig:
    prompt: str | None
    completion: str | None
    messages: str | None
    label: str | None
    tools: str | None
    """Beside a messages column: what the assistant may call, for the chat template. Read where the file has it."""


@dataclass
class TaskConfig:
    name: str
    source: TaskSource
    kind: TaskKind
    path: str | None
    """local: a JSONL/CSV/Parquet file (split by seed), or a folder with train/validation/test files."""
    hub_id: str | None
    hub_config: str | None
    hub_revision: str | None
    splits: dict[str, str]
    """hub: our split name to theirs."""
    validation_fraction: float
    test_fraction: float
    split_seed: int
    columns: ColumnsConfig
    prompt: str | None
    """Template over the row's columns, e.g. ``"Definition: {definition}\\nCategory:"``; null: the prompt column."""
    completion: str | None
    separator: str | None
    """plain format: what stands between prompt and completion; null: by the texts (docs/measures.md)."""
    special_tokens: SpecialTokens
    system: str | None
    labels: list[str] | None
    """classification: the options, in order; null: the distinct completions of the training split."""
    format: Format
    learn: Learn
    """Of a conversation: the last answer, or all of the assistant's. Scores are of the last one."""
    ignore_fields: list[str]
    """Fields of messages to leave out; any other field that the chat template doesn't write is refused."""
    date: str
    """The day that a chat template is given when it asks for the date, e.g. ``2026-01-01``."""
    invalid_rows: InvalidRows
    goal: str | None
    """A business objective, e.g. ``accuracy >= 0.6``."""
    max_train_items: int | None
    max_validation_items: int | None
    max_test_items: int | None


@dataclass
class TrainingConfig:
    max_steps: int | None
    max_tokens: int | None
    """A budget in processed (unpadded) tokens, in place of max_steps, which is null then; the first step that reaches
    it is the last."""
    batch_size: int
    micro_batch_size: int | None
    learning_rate: float
    scheduler: str
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    optimizer: str
    max_length: int
    gradient_checkpointing: Checkpointing
    logging_steps: int
    evaluate_every_steps: int | None
    """Validation loss during training; null: never."""
    save_every_steps: int | None
    early_stopping_patience: int | None
    keep_best: bool
    resume: bool
    device: DeviceChoice
    threads: int | None
    """CPU threads of torch; null: as many as cores."""
    engine: Engine
    sleep_seconds: float
    """engine=sleep: how long a trial takes."""
    sleep_fault: SleepFault
    """engine=sleep: what goes wrong half-way; out_of_memory only while the micro-batch is the whole batch."""


@dataclass
class EvaluationConfig:
    before: bool
    split: EvaluationSplit
    max_items: int | None
    batch_size: int
    generate: bool
    max_new_tokens: int | None
    """null: the longest label, or for free text the longest completion of any split, and a few more."""
    forgetting: bool
    forgetting_documents: int | None
    few_shots: int | None
    """Worked examples of the training split before each prompt, to score the untouched model with; null: it isn't."""
    few_shot_draws: int
    """How many sets of examples are drawn; the same ones for every model, format and run."""
    baselines: bool
    metrics: list[str]
    """Further metrics by Hub name (online), computed on generated answers."""
    cache: bool


@dataclass
class TrackingConfig:
    enabled: bool
    uri: str | None
    """null: SQLite at mlflow.db beside output_root."""
    experiment: str
    timeout_seconds: float


@dataclass
class BudgetConfig:
    """What a run may spend, or all trials of a sweep together; null: no limit."""

    seconds: float | None
    """Of a run, loading and the untouched model's scores included; of a sweep its runs' seconds, added up."""
    tokens: int | None
    """Processed (unpadded) training tokens, those of failed and repeated parts included."""
    usd: float | None
    kwh: float | None
    """By the card's own counter."""
    usd_per_hour: float | None
    """Price of this machine; null: that of conf/prices.yaml, by which costs are told but not limited."""
    memory_bytes: int | None
    """Of a run, at its peak: on a GPU what it takes of the card, on a CPU what training adds to the process as it is
    after imports. A run that is predicted to need more is refused, and a trial not started. null: the card's memory, or
    on a CPU the machine's or its control group's limit; then by more than the prediction's error."""
    force: bool
    """Start runs that are predicted not to fit, as ``--force`` does."""


@dataclass
class ExportConfig:
    """``qlora-exp export``: conf/export.yaml, no part of a run's configuration."""

    formats: list[str]
    """adapter, merged, or a GGUF block type."""
    dtype: ComputeDtype
    """Of the merged model: bfloat16 or float16."""
    check_items: int
    tolerance: float
    """Accuracy that an exported file may lose against the run's own, as a share of items."""
    context_tokens: int
    generated_tokens: int
    usd_per_hour: float | None
    """null: the record's cost."""
    phone_file_bytes: int
    phone_memory_bytes: int
    phone_usd: float


@dataclass
class LadderConfig:
    """Rank doubling (``sweep.sampler=ladder``): r_start, 2·r_start … until returns have diminished, or r_max."""

    r_start: int
    r_max: int
    seeds: int
    """Seeds a rank at the first look, from ``seed`` upwards."""
    most_seeds: int
    """Seeds a rank in all, at most 8, that the one purchase of a doubling may make of them; as many as ``seeds``: none
    is bought."""
    pilot_seed: int
    """Of the runs that choose learning rates; it plays no part in any decision."""
    margin: float | None
    """The least gain of a doubling that is worth paying for, in nats per test item; to be said. Where r_max is r_start
    nothing is doubled: each point of the other axes gets its learning rate and its seeds, and no margin is needed."""
    half_zone: float | None
    """Gains within margin ± half_zone may be called either way; null: margin / 2."""
    lr_policy: LrPolicy
    lr_factors: list[float]
    """Of the centre: training.learning_rate at r_start, ∝ r^−½ for alpha = 2r and r, constant for the others."""
    seed_sd: float | None
    """Expected standard deviation over seeds of one seed's mean difference of two ranks, nats per item; null: not
    known."""
    item_sd: float | None
    """Expected standard deviation over items of the difference of two ranks, nats; null: not known."""


@dataclass
class SweepConfig:
    """A study: its space, its search and its end. Plain runs don't look at it."""

    name: str | None
    """null: made from the overrides, so that the same command goes on with the same study."""
    question: str | None
    params: dict[str, str]
    """Axis → values in the override grammar, e.g. ``lora.r: choice(4,8,16)``."""
    conditions: dict[str, str]
    """Axis → when it is searched, e.g. ``lora.alpha: lora.alpha_policy == fixed``; otherwise conf/'s value stands."""
    objectives: list[str]
    """``minimize FIELD`` or ``maximize FIELD``, FIELD a path into the record."""
    constraints: list[str]
    """``FIELD <= NUMBER``; a trial that breaks one is infeasible to the sampler."""
    sampler: Sampler
    sampler_options: dict[str, Any]
    ladder: LadderConfig
    pruner: Pruner
    pruner_options: dict[str, Any]
    n_trials: int | None
    """A total, whatever is killed and started again; null: every point of a grid, whatever a ladder asks for."""
    seed: int
    enqueue: list[dict[str, Any]]
    """Configurations to try first: axis → value."""
    warm_start: list[str]
    """Earlier studies (names) whose trials the sampler learns from."""
    storage: str | None
    """Optuna storage URL; null: SQLite at optuna.db under output_root."""
    max_failures: float | None
    """At least 1: a number of trials; below 1: a share of n_trials. Reached: no further trial starts."""
    max_attempts: int
    """How often a trial whose process died, hung or was lost is started, the first time included."""
    out_of_memory_retries: int
    """Retries with half the micro-batch and double accumulation."""
    join: bool
    """Share a study that another orchestrator is working on."""


@dataclass
class WorkersConfig:
    """Who runs a study's trials."""

    count: int | None
    """Trials at once in one worker; null: one per GPU, or one."""
    jobs: int
    """Workers: launcher jobs (more than one on Slurm, Ray or joblib)."""
    job: int | None
    """Which launcher job this is; set by the sweeper."""
    isolation: Isolation
    heartbeat_seconds: float
    lease_seconds: float
    """A trial without a heartbeat for so long is taken over (at once where its process is seen to be dead)."""
    hang_seconds: float
    """A host that tells nothing for so long is dumped, ended and replaced."""


@dataclass
class Config:
    """One run; with ``-m`` or ``sweep`` the runs of a study."""

    model: ModelConfig
    quantization: QuantizationConfig
    lora: LoraConfig
    targets: TargetsConfig
    task: TaskConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    tracking: TrackingConfig
    budget: BudgetConfig
    sweep: SweepConfig | None
    workers: WorkersConfig | None
    seed: int
    name: str | None
    output_root: str


SCHEMA_NODE = "qlora_exp_schema"


def register() -> None:
    """Make the schema known to Hydra; conf/config.yaml merges into it, so that every key and type is checked."""
    ConfigStore.instance().store(name=SCHEMA_NODE, node=Config)


def typed(config: DictConfig) -> Config:
    """The composed configuration as plain dataclasses, interpolations resolved. Paths are made absolute, so that a
    record and a fingerprint name the same file whichever folder a command is called in."""
    built = OmegaConf.to_object(config)
    assert isinstance(built, Config)
    built.task.path = absolute_path(built.task.path)
    built.model.path = absolute_path(built.model.path)
    built.model.chat_template = absolute_path(built.model.chat_template)
    built.tracking.uri = absolute_store(built.tracking.uri)
    return built


def absolute_path(path: str | None) -> str | None:
    """Links stay as they are: a file of the Hub's cache is one, and its target has no ending."""
    return os.path.abspath(os.path.expanduser(path)) if path else path


def absolute_store(uri: str | None) -> str | None:
    """A SQLite address whose file is relative to the current folder, as the same file's from every folder."""
    scheme, found, name = (uri or "").partition("sqlite:///")
    relative = found and not scheme and name and not name.startswith(("/", ":", "file:"))
    return f"sqlite:///{absolute_path(name)}" if relative else uri


def to_plain(config: Config) -> dict[str, Any]:
    """The configuration as JSON types: enums by name, as they are written on the command line."""
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
