"""The typed schema of a configuration. Its defaults are in conf/ only."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from qlora_exp.config.enums import (
    AdapterInit,
    Checkpointing,
    ComputeDtype,
    DeviceChoice,
    Engine,
    Enum,
    EvaluationSplit,
    Format,
    InvalidRows,
    Isolation,
    Kernels,
    Learn,
    LrPolicy,
    Method,
    PaddingFree,
    Pruner,
    Quantization,
    Sampler,
    SleepFault,
    SpecialTokens,
    TaskKind,
    TaskSource,
    Variant,
)
from qlora_exp.config.shipping import DistillationConfig, QatConfig, ShipConfig


@dataclass
class ModelConfig:
    family: str
    variant: Variant
    checkpoints: dict[str, str]
    """Hub id or ``embedded:NAME`` by variant; empty for ``model=local``. Those of ``model=hub`` follow from its ids."""
    id: str | None
    """A Hub id, e.g. ``Qwen/Qwen2.5-0.5B``; only for ``model=hub``."""
    instruct_id: str | None
    """The Hub id of the pair's instruct model; ``None``: ``id`` is the only model, of either variant."""
    path: str | None
    """A directory (safetensors) or a GGUF file on disk; only for ``model=local``."""
    instruct_path: str | None
    """That of the pair's instruct model; ``None``: ``path`` is the only model, of either variant."""
    layers: Any
    """Decoder layers that are kept: ``first:2``, ``last:2`` or a list; ``None``: all. A pruned model is a student for
    distillation."""
    adapter: str | None
    """The folder of an adapter that is merged into the weights before training."""
    revision: str | None
    chat_template: str | None
    """A .jinja file that replaces the tokenizer's own template."""
    template_tokens_trained: dict[str, bool]
    """By variant: has the model seen the chat template's special tokens?"""
    attention: str
    """transformers' ``attn_implementation``: sdpa, eager, flash_attention_2 …; auto: sdpa if the architecture has
    it."""

    @property
    def checkpoint(self) -> str | None:
        """The variant's Hub id or ``embedded:NAME``; ``None`` for a model on disk."""
        return self.checkpoints.get(self.variant.value)

    @property
    def variant_path(self) -> str | None:
        """The variant's directory or GGUF file; ``None`` for a model of the Hub or of the package."""
        return self.instruct_path if self.variant is Variant.instruct and self.instruct_path else self.path


@dataclass
class QuantizationConfig:
    mode: Quantization
    compute_dtype: ComputeDtype
    double_quantization: bool
    int8_threshold: float
    group: int
    """Inputs of a row that share a scale, in the modes ``int2_asym`` to ``int8_sym``."""


MAPPING_KEYS = ("lora.rank_pattern", "lora.alpha_pattern", "method.options")
"""Settings whose value is a mapping, in one piece."""


def default_alpha_policy(alpha: Any) -> str:
    """Return ``lora.alpha_policy`` where nothing sets it."""
    return "2r" if alpha is None else "fixed"


@dataclass
class LoraConfig:
    r: int
    alpha_policy: str | None
    """``2r``, ``r`` or ``fixed`` (at lora.alpha). Null: ``fixed`` if lora.alpha is set, else ``2r``."""
    alpha: float | None
    dropout: float
    dtype: ComputeDtype
    rslora: bool
    dora: bool
    init: AdapterInit
    loraplus_lr_ratio: float | None
    """LoRA+ (Hayou et al. 2024): the learning rate of B over ``training.learning_rate``, which A has."""
    rank_pattern: Any
    """A mapping of the last parts of a module's name to its rank; the first that fits counts. ``r`` is the rank of
    other modules. With ``alpha_policy`` 2r or r, alpha follows each module's rank."""
    alpha_pattern: Any
    """A mapping of the last parts of a module's name to its alpha; the first that fits counts, before
    ``alpha_policy``."""
    modules_to_save: list[str] | None
    """Last parts of names of the embeddings or the output head: they are trained whole, and saved with the adapter."""
    target_parameters: list[str] | None
    """Last parts of names of experts' three-dimensional parameters, which get adapters next to ``targets``."""

    def __post_init__(self) -> None:
        if self.alpha_policy is None:
            self.alpha_policy = default_alpha_policy(self.alpha)


@dataclass
class TargetsConfig:
    set: str
    """attention, attention_qv, mlp, all_linear."""
    modules: list[str] | None
    """A list of module-name endings; replaces ``set``."""


@dataclass
class MethodConfig:
    """What is trained of the base. Records of earlier versions lack it: they are LoRA's."""

    kind: Method
    layers: Any
    """Decoder layers that are tuned: ``last:2``, ``first:4``, a list of numbers, or null for all."""
    parameters: Any
    """``selective``: a list of norms, biases, embeddings, head, attention, mlp; or ``magnitude:0.01`` or
    ``gradient:0.01``, single entries of the target matrices."""
    size: int
    """``bottleneck``: the width of an adapter."""
    after: list[str]
    """``bottleneck``: the blocks behind which an adapter is put."""
    peft_type: str | None
    """``peft``: the kind of adapter, a row of config/peft_kinds.py."""
    options: Any
    """``peft``: a mapping of this kind's settings, by PEFT's names; null: PEFT's defaults."""

    def __post_init__(self) -> None:
        if isinstance(self.parameters, str):
            self.parameters = [self.parameters]


@dataclass
class ColumnsConfig:
    """Columns of the data. Those that are null, and have no template, are recognised (docs/data.md)."""

    prompt: str | None
    completion: str | None
    messages: str | None
    label: str | None
    group: str | None
    """The document or context of a row: rows of one group count as one observation (docs/statistics.md)."""
    tools: str | None
    """With a messages column: the tools that the assistant may call, for the chat template. Read if the file has it."""


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
    """hub: our split name → the data set's."""
    validation_fraction: float
    test_fraction: float
    split_seed: int
    columns: ColumnsConfig
    prompt: str | None
    """Template over the row's columns, e.g. ``"Definition: {definition}\\nCategory:"``; null: the prompt column; empty:
    no prompt, the whole text is learned (continued pretraining)."""
    completion: str | None
    separator: str | None
    """plain format: the text between prompt and completion; null: depends on the texts (docs/measures.md)."""
    special_tokens: SpecialTokens
    system: str | None
    labels: list[str] | None
    """classification: the options, in order; null: the distinct completions of the training split."""
    format: Format
    learn: Learn
    """Of a conversation: the last answer, or all of the assistant's. Scores always use the last one."""
    ignore_fields: list[str]
    """Fields of messages to ignore; any other field that the chat template doesn't use is an error."""
    date: str
    """The date for chat templates that ask for today's date, e.g. ``2026-01-01``."""
    answer_after: str | None
    """Exact match compares what follows the last such mark, e.g. ``####`` (GSM8K); null: whole answers."""
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
    """A budget in processed (unpadded) tokens, instead of max_steps, which must be null then. Training ends after the
    step that reaches it."""
    epochs: float | None
    """Passes over the training rows, also fractions, instead of max_steps or max_tokens. Its steps follow from the rows
    of the training split and batch_size: ``plan.max_steps`` of the record."""
    batch_size: int
    micro_batch_size: int | None
    micro_batch_tokens: Any
    """A number, auto (the largest that is predicted to fit) or null. OmegaConf can't merge a union of types."""
    learning_rate: float
    scheduler: str
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    optimizer: str
    max_length: int
    padding_free: PaddingFree
    """Whether batches are the real tokens of their rows, without padding."""
    gradient_checkpointing: Checkpointing
    kernels: Kernels
    """Of norms and gated MLPs, for training and for all scores."""
    logging_steps: int
    evaluate_every_steps: int | None
    """Validation loss during training; null: never."""
    save_every_steps: int | None
    early_stopping_patience: int | None
    keep_best: bool
    resume: bool
    qat: QatConfig
    device: DeviceChoice
    threads: int | None
    """CPU threads of torch; null: as many as cores."""
    engine: Engine
    sleep_seconds: float
    """engine=sleep: how long a trial takes."""
    sleep_fault: SleepFault
    """engine=sleep: what fails half-way; out_of_memory only while the micro-batch is the full batch."""


@dataclass
class EvaluationConfig:
    before: bool
    split: EvaluationSplit
    max_items: int | None
    batch_size: int
    generate: bool
    max_new_tokens: int | None
    """null: the longest label, or for free text the longest completion of any split, plus a few tokens."""
    forgetting: bool
    forgetting_documents: int | None
    few_shots: int | None
    """Worked examples of the training split before each prompt, when the base model is scored; null: no few-shot
    scores."""
    few_shot_draws: int
    """How many sets of examples are drawn; the same sets for every model, format and run."""
    baselines: bool
    metrics: list[str]
    """More metrics by their Hub name (online), computed on generated answers."""
    keep_texts: bool
    """False: neither prompts nor answers are written, to no file and not to MLflow; only whether they are right."""
    cache: bool


@dataclass
class TrackingConfig:
    enabled: bool
    uri: str | None
    """null: SQLite, mlflow.db next to output_root."""
    experiment: str
    timeout_seconds: float
    also: list[str] = field(default_factory=list)
    """Where else a training's curve and scores go: tensorboard, wandb, trackio. (Records of earlier versions lack it.)
    """


@dataclass
class NotifyConfig:
    """What gets a JSON object when a run or a sweep has ended; null: nothing does. Trials of a sweep don't notify."""

    command: str | None
    """A shell command, which gets the object on standard input."""
    webhook: str | None
    """An http or https URL, which gets the object by POST. It may hold a secret: records leave it out."""
    timeout_seconds: float


@dataclass
class BudgetConfig:
    """The limits of a run, or of all trials of a sweep together; null: no limit."""

    seconds: float | None
    """Of a run: including loading and the base model's scores. Of a sweep: the seconds of its runs, added up."""
    tokens: int | None
    """Processed (unpadded) training tokens, including failed and repeated parts."""
    usd: float | None
    kwh: float | None
    """As the GPU's energy counter measures it."""
    usd_per_hour: float | None
    """Price of this machine; null: the price of conf/prices.yaml, which is used for cost estimates, but not for
    limits."""
    memory_bytes: int | None
    """A run's peak memory: on a GPU what it takes of the card, on a CPU what training adds to the process after its
    imports. A run or trial that is predicted to need more doesn't start.

    null: the card's memory; on a CPU the machine's or its control group's limit. Then a run doesn't start if its peak
    exceeds this by more than the prediction's error.
    """
    force: bool
    """Start runs that are predicted not to fit, as ``--force`` does."""


@dataclass
class LadderConfig:
    """Rank doubling (``sweep.sampler=ladder``): r_start, 2·r_start … until the gain is below the margin, or r_max."""

    r_start: int
    r_max: int
    seeds: int
    """Seeds per rank at the first look, from ``seed`` upwards."""
    max_seeds: int
    """Maximum seeds per rank, at most 64. Seeds are added one at a time; equal to ``seeds``: none is added."""
    pilot_seed: int
    pilot_seeds: int
    """Pilot runs that choose learning rates have the seeds pilot_seed, pilot_seed + 1 …; decisions don't use them."""
    margin: Any
    """The smallest gain of a doubling that is worth its cost: ``0.25%`` (of the loss at r_start), ``0.1 nats_per_item``
    (or 0.1), ``0.002 nats_per_token``, ``1% of the tuning gain``. Not needed if r_max is r_start: no doubling."""
    half_zone: float | None
    """Gains within margin ± half_zone may be decided either way, in the margin's unit; null: margin / 2."""
    lr_policy: LrPolicy
    lr_factors: list[float]
    """Factors of training.learning_rate (r_start) or the carried rate: ∝ r^−½ for alpha = 2r and r, else constant."""
    stop_pilots: bool
    """Stop pilots whose training loss is clearly behind another one's of their rank and seed (docs/statistics.md)."""
    screening_steps: int | None
    """Steps of the first round of successive halving, which leaves one point to get a ladder; null: all get one."""
    seed_sd: float | None
    """Expected standard deviation over seeds of two ranks' mean difference, in the margin's unit; null: unknown."""
    item_sd: float | None
    """Expected standard deviation over items of two ranks' difference, in the margin's unit; null: unknown."""


@dataclass
class SweepConfig:
    """A study: its search space, its sampler and when it ends. Single runs ignore it."""

    name: str | None
    """null: made from the overrides, so that the same command resumes the same study."""
    question: str | None
    params: dict[str, str]
    """Axis → values in the override grammar, e.g. ``lora.r: choice(4,8,16)``."""
    conditions: dict[str, str]
    """Axis → when it is searched, e.g. ``lora.alpha: lora.alpha_policy == fixed``; otherwise it has its value from
    conf/."""
    objectives: list[str]
    """``minimize FIELD`` or ``maximize FIELD``, FIELD a path into the record."""
    constraints: list[str]
    """``FIELD <= NUMBER``; a trial that violates one is infeasible to the sampler."""
    sampler: Sampler
    sampler_options: dict[str, Any]
    ladder: LadderConfig
    pruner: Pruner
    pruner_options: dict[str, Any]
    n_trials: int | None
    """Total number of trials; interrupted and restarted ones count once. null: every point of a grid, or all that a
    ladder needs."""
    seed: int
    enqueue: list[dict[str, Any]]
    """Configurations to try first: axis → value."""
    warm_start: list[str]
    """Earlier studies (names) whose trials the sampler learns from."""
    storage: str | None
    """Optuna storage URL; null: SQLite at optuna.db under output_root."""
    max_failures: float | None
    """1 or more: a number of trials; below 1: a share of n_trials. When it is reached, no more trials start."""
    max_attempts: int
    """How often a trial is started if its process dies, hangs or is lost, the first time included."""
    out_of_memory_retries: int
    """Retries with half the micro-batch and twice the gradient accumulation steps."""
    join: bool
    """Work on a study that another orchestrator is working on."""


@dataclass
class WorkersConfig:
    """The processes that run a study's trials."""

    count: int | None
    """Concurrent trials of one worker; null: one per GPU, or one."""
    jobs: int
    """Number of workers: launcher jobs (more than one on Slurm, Ray or joblib)."""
    job: int | None
    """The index of this launcher job; the sweeper sets it."""
    isolation: Isolation
    heartbeat_seconds: float
    lease_seconds: float
    """A trial without a heartbeat for this long is taken over; at once, if its process is known to be dead."""
    hang_seconds: float
    """A trial process that is silent for this long gets its stacks dumped, is killed and replaced."""


@dataclass
class Config:
    """The configuration of one run; with ``-m`` or ``sweep``, of the runs of a study."""

    model: ModelConfig
    quantization: QuantizationConfig
    method: MethodConfig
    lora: LoraConfig
    targets: TargetsConfig
    task: TaskConfig
    training: TrainingConfig
    distillation: DistillationConfig
    ship: ShipConfig
    evaluation: EvaluationConfig
    tracking: TrackingConfig
    notify: NotifyConfig | None
    """``None``: a configuration from a record, which leaves it out."""
    budget: BudgetConfig
    sweep: SweepConfig | None
    workers: WorkersConfig | None
    seed: int
    name: str | None
    output_root: str


SCHEMA_NODE = "qlora_exp_schema"


def register() -> None:
    """Register the schema with Hydra. conf/config.yaml merges into it, so every key and type is checked."""
    ConfigStore.instance().store(name=SCHEMA_NODE, node=Config)


def typed(config: DictConfig) -> Config:
    """Return the composed configuration as dataclasses, with interpolations resolved. Paths become absolute, so that
    records and fingerprints don't depend on the current folder."""
    built = OmegaConf.to_object(config)
    assert isinstance(built, Config)
    built.task.path = absolute_path(built.task.path)
    built.model.path = absolute_path(built.model.path)
    built.model.instruct_path = absolute_path(built.model.instruct_path)
    built.model.chat_template = absolute_path(built.model.chat_template)
    built.tracking.uri = absolute_store(built.tracking.uri)
    return built


def absolute_path(path: str | None) -> str | None:
    """Return an absolute path. Symbolic links aren't resolved: files of the Hub's cache are links, and their targets
    have no suffix."""
    return os.path.abspath(os.path.expanduser(path)) if path else path


def absolute_store(uri: str | None) -> str | None:
    """Return a SQLite address with an absolute path instead of one relative to the current folder; others unchanged."""
    scheme, separator, name = (uri or "").partition("sqlite:///")
    relative = separator and not scheme and name and not name.startswith(("/", ":", "file:"))
    return f"sqlite:///{absolute_path(name)}" if relative else uri


def to_plain(config: Config | TrainingConfig | QuantizationConfig) -> dict[str, Any]:
    """Return the configuration, or a part of it, as JSON types; enums by name, as on the command line."""
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
