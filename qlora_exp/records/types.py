"""The record of a run: frozen dataclasses, with units in the names of fields.

``record.json`` is the source of truth; tracking and tables are views of it. ``None`` means unknown or not measured.
Fields are only added; a new name or a change of meaning raises ``SCHEMA_VERSION``, and ``records.upgrade`` reads the
earlier version.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from qlora_exp.records.fit_types import Fit
from qlora_exp.records.shipped import Shipped
from qlora_exp.records.teacher_run import StudentAgreement, TeacherRun

SCHEMA_VERSION = 2


class Status(StrEnum):
    """How a run ended. RUNNING is written at the start: a killed run keeps it."""

    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    PRUNED = "PRUNED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    DIVERGED = "DIVERGED"
    FAILED = "FAILED"
    INTERRUPTED = "INTERRUPTED"

    @property
    def ended(self) -> bool:
        return self is not Status.RUNNING


@dataclass(frozen=True)
class Device:
    """The device of a run. ``kind`` is ``cuda`` or ``cpu``; for a CPU, ``memory_bytes`` is the machine's memory."""

    kind: str
    name: str | None
    count: int
    memory_bytes: int | None
    compute_capability: str | None
    driver: str | None
    bf16: bool


@dataclass(frozen=True)
class Environment:
    """The machine and the software of a run."""

    python: str
    platform: str
    packages: dict[str, str]
    device: Device
    cpu_cores: int | None
    memory_bytes: int | None
    torch_threads: int | None
    omp_num_threads: str | None
    omp_wait_policy: str | None
    git_commit: str | None
    git_dirty: bool | None
    glibc_tunables: str | None = None
    """GLIBC_TUNABLES at the process's start; ``None``: not set."""
    cuda_visible_devices: str | None = None
    """CUDA_VISIBLE_DEVICES: the GPU that the process was limited to; ``None``: not set."""


@dataclass(frozen=True)
class Process:
    """The process that owns a RUNNING record.

    ``start_ticks`` and ``boot_id`` distinguish a reused pid from the same process. ``host`` (a name) and
    ``pid_namespace`` (of a container) show whether another process can see it.
    """

    pid: int
    start_ticks: int | None
    boot_id: str | None
    host: str | None = None
    pid_namespace: str | None = None


@dataclass(frozen=True)
class Plan:
    """What a run will do, computed before weights are read."""

    config_fingerprint: str
    """SHA-256 over every setting that can change a result (not names, paths or tracking)."""
    base_fingerprint: str
    """SHA-256 over the settings that the base model's scores depend on: model, quantization, task, evaluation."""
    architecture: str
    total_parameters: int
    trainable_parameters: int
    full_parameters_of_adapted_modules: int
    """Parameters of the adapted weight matrices: what full fine-tuning of these would update."""
    target_modules: tuple[str, ...]
    """Distinct last parts of the adapted modules' names, e.g. ``q_proj``."""
    adapted_modules: int
    alpha: float | None
    """``None``: the method isn't LoRA."""
    scale: float | None
    """The factor of B·A: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    device: str
    weight_dtype: str
    compute_dtype: str
    """Dtype of unquantized weights and computations, and of quantized layers' inputs and outputs."""
    adapter_dtype: str
    max_steps: int
    batch_size: int
    micro_batch_size: int
    """Sequences per forward pass; with ``micro_batch_tokens``, the batch size, of which each step's rows are cut."""
    gradient_accumulation_steps: int
    """Micro-batches per step; 1 with ``micro_batch_tokens``, whose number varies from step to step."""
    gradient_checkpointing: bool
    format: str
    """``chat`` or ``plain``."""
    padding_free: bool | None = None
    """Whether training's batches have no padding. ``None`` in records of earlier versions, which padded."""
    padded_because: str | None = None
    """Why rows are padded; ``None`` if they aren't."""
    length_multiple: int = 1
    """Training batches are padded to a multiple of this length; without padding, the longest row is."""
    logits_multiple: int = 1
    """The number of tokens with logits per training batch is rounded up to a multiple of this."""
    micro_batch_tokens: int | None = None
    """The largest micro-batch in tokens with padding, as configured or as ``auto`` chose it; ``None``: micro-batches
    are chosen in rows."""
    longest_row_tokens: int | None = None
    """The longest training row in tokens, rounded up to ``length_multiple``: the smallest ``micro_batch_tokens``."""
    kernels: str = "none"
    """Kernels of norms and gated MLPs, in training and scoring: ``liger``, or ``none`` for transformers' own."""
    inputs_rounded_in: tuple[str, ...] | None = None
    """Phases in which quantized layers' inputs are rounded to 8 bits, too (int8 only): ``training``, ``evaluation``.
    ``None`` in records of earlier versions."""
    unpacked_from: str | None = None
    """The method by which the base's checkpoint is quantized, whose weights were unpacked; ``None``: it isn't."""
    predicted_peak_train_bytes: int | None = None
    """Prediction of ``memory.train_working_set_bytes``."""
    predicted_context_bytes: int | None = None
    """Additional memory on a GPU: CUDA's context and the allocator's fragmentation; 0 on a CPU."""
    predicted_activation_bytes: int | None = None
    predicted_logits_bytes: int | None = None
    predicted_train_tokens: int | None = None
    """Predicted number of tokens that training processes, without padding."""
    predicted_padded_tokens: int | None = None
    """The same with padding, if there is any."""
    predicted_loss_tokens: int | None = None
    """Tokens of ``predicted_train_tokens`` that carry a loss; only these get logits. ``None`` in records of earlier
    versions, whose ``train_flops_per_token`` counts the head for every token and no padding."""
    train_flops_per_token: float | None = None
    """FLOPs to train one unpadded token, including its share of the padding and of the head."""
    predicted_train_seconds: float | None = None
    """Prediction of ``speed.train_seconds``; ``None`` if this machine's speed is unknown."""
    predicted_train_seconds_low: float | None = None
    predicted_train_seconds_high: float | None = None
    predicted_train_seconds_basis: str | None = None
    predicted_train_usd: float | None = None
    usd_per_hour: float | None = None
    """Price per hour of the machine, used for ``predicted_train_usd`` and ``speed.cost_usd``. ``None`` if neither
    ``budget.usd_per_hour`` nor conf/prices.yaml has it, and in records of versions that read only the first."""
    usd_per_hour_from: str | None = None
    """Source of the price: ``budget.usd_per_hour``, or e.g. ``conf/prices.yaml: cpu`` with the device's name there."""
    predicted_other_seconds: float | None = None
    """Predicted seconds for loading and scoring. ``None`` if no similar run has ended, and in records of earlier
    versions."""


@dataclass(frozen=True)
class Data:
    """The data that the run was trained and scored on, after validation of every row."""

    task: str
    fingerprint: str
    train_items: int
    validation_items: int
    test_items: int
    dropped_rows: int
    dropped_reasons: dict[str, int]
    labels: tuple[str, ...]
    mean_prompt_tokens: float | None
    mean_completion_tokens: float | None
    template_tokens: int | None
    """Tokens that the chat template adds to a prompt; 0 for the plain format."""
    template_tokens_trained: bool | None
    """Whether the base model was trained with the template's special tokens (LoRA leaves embeddings frozen)."""
    truncated_items: int
    rows_fingerprint: str | None = None
    """SHA-256 over the rows alone, independent of tokenizer and format; ``None`` in records of earlier versions."""
    answer_prefix: str | None = None
    """Text that the chat template puts between its generation prompt and an answer, e.g. an empty think block;
    ``None``: nothing. It is part of the prompt: neither trained nor scored. Rows with reasoning may lack it."""
    answer_prefix_variables: dict[str, Any] | None = None
    """Template variables that make the generation prompt equal to this run's prompt, e.g. ``enable_thinking: false``.
    ``None``: the template's defaults do, or no known variable does."""
    chat_date: str | None = None
    """The date in the chat template (``task.date``); ``None``: the template has none."""
    layout: str | None = None
    """The layout that was recognised by the file's columns, e.g. ``Alpaca rows``; ``None``: the task's settings say how
    rows are read."""
    layout_settings: dict[str, str] | None = None
    """The settings that the layout filled in, e.g. ``{"task.columns.prompt": "question"}``."""
    label_end_tokens: int | None = None
    """End tokens that each label's likelihood includes; 0 unless one label's tokens are the beginning of another's.
    ``None``: no labels, or a record of a version that refused such labels."""


@dataclass(frozen=True)
class Memory:
    """Bytes. Peaks are per phase; on a CPU, a peak is the resident peak *above* the phase's start."""

    base_weight_bytes: int | None = None
    quantization_state_bytes: int | None = None
    adapter_bytes: int | None = None
    gradient_bytes: int | None = None
    optimizer_bytes: int | None = None
    saved_bytes: int | None = None
    """The file with what the run trained."""
    resident_after_imports_bytes: int | None = None
    peak_load_bytes: int | None = None
    peak_train_bytes: int | None = None
    peak_evaluation_bytes: int | None = None
    peak_train_reserved_bytes: int | None = None
    train_working_set_bytes: int | None = None
    """Memory at the peak of training, base model included: what ``plan.predicted_peak_train_bytes`` predicts.

    CUDA: allocated bytes. CPU: base, quantization state and adapters, plus the phase's resident peak above its start
    without the growth of mapped files; ``None`` if the process had made a run before.
    """
    checkpoint_bytes: int | None = None
    outside_allocator_bytes: int | None = None
    """When the GPU's memory ran out: what was in use there outside this process's torch allocator, i.e. by CUDA's
    context, paged optimizer states and other processes. ``None`` if memory didn't run out, or on a CPU."""
    process_reused: bool = False
    """Whether the process had made a run before; CPU peaks are then unknown."""
    source: str | None = None
    """What the peaks measure: ``cuda_allocated`` or ``resident``."""

    @property
    def model_state_bytes(self) -> float | None:
        """Weights + quantization state + adapter + gradients + optimizer: what training needs besides activations.
        ``None`` if one of them is unknown."""
        parts = (
            *(self.base_weight_bytes, self.quantization_state_bytes, self.adapter_bytes),
            *(self.gradient_bytes, self.optimizer_bytes),
        )
        known = [part for part in parts if part is not None]
        return float(sum(known)) if len(known) == len(parts) else None


@dataclass(frozen=True)
class Speed:
    """Seconds by phase; tokens are unpadded; step times exclude the first ``excluded_steps`` (warm-up)."""

    load_seconds: float | None = None
    train_seconds: float | None = None
    evaluation_seconds: float | None = None
    base_evaluation_seconds: float | None = None
    """Seconds to score the base model before tuning, without ``waiting_seconds``."""
    base_scores_cached: bool = False
    """Whether the base model's scores came from the cache."""
    waiting_seconds: float | None = None
    """Seconds of waiting for other runs that computed the same base scores or baselines."""
    total_seconds: float | None = None
    steps: int | None = None
    excluded_steps: int | None = None
    train_tokens: int | None = None
    loss_tokens: int | None = None
    train_tokens_per_second: float | None = None
    step_seconds_p50: float | None = None
    step_seconds_p95: float | None = None
    model_flops_utilisation: float | None = None
    energy_joules: float | None = None
    cost_usd: float | None = None


@dataclass(frozen=True)
class Spent:
    """What a run has spent, including interrupted, killed and repeated parts (a killed part may lack its last second).

    ``tokens``: processed in training; ``joules``: from the GPU's energy counter.
    """

    seconds: float
    tokens: int
    joules: float | None


@dataclass(frozen=True)
class Scores:
    """One model's scores on one split. Definitions: docs/measures.md."""

    split: str
    items: int
    loss: float | None = None
    loss_per_item: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    token_accuracy: float | None = None
    accuracy: float | None = None
    accuracy_calibrated: float | None = None
    accuracy_normalized: float | None = None
    accuracy_pmi: float | None = None
    balanced_accuracy: float | None = None
    macro_f1: float | None = None
    exact_match: float | None = None
    invalid_answer_rate: float | None = None
    rouge_l: float | None = None
    token_f1: float | None = None
    other: dict[str, float] = field(default_factory=dict)
    """Metrics named in ``evaluation.metrics``."""
    max_new_tokens: int | None = None
    """Token limit of generated answers; ``None`` if nothing was generated."""


@dataclass(frozen=True)
class Forgetting:
    """Loss on general held-out text in nats per byte. ``difference`` is after − before, with a 95 % confidence interval
    over documents."""

    before_nats_per_byte: float
    after_nats_per_byte: float
    difference: float
    low: float | None
    high: float | None
    documents: int
    text: str
    tokens: int | None = None
    """Tokens scored; ``None`` in records of earlier versions."""


@dataclass(frozen=True)
class FewShot:
    """The base model's few-shot scores (worked examples before each prompt) with one draw of examples."""

    draw: int
    """Number of the draw, from 1."""
    requested: int
    """Requested examples; ``examples`` has fewer if the model's context is too short."""
    examples: tuple[str, ...]
    """Item ids of the training split, in order."""
    validation: Scores
    test: Scores | None = None
    """Only with ``evaluation.split=test``."""


@dataclass(frozen=True)
class ScoreTable:
    """Scores of the base model (``before``, ``test_before``) and of the tuned model (``after``, ``test``)."""

    before: Scores | None = None
    after: Scores | None = None
    test: Scores | None = None
    """Tuned model on the test split; only with ``evaluation.split=test``."""
    test_before: Scores | None = None
    forgetting: Forgetting | None = None
    forgetting_chat: Forgetting | None = None
    """On the answers of held-out chats; only for runs in the chat format."""
    trained: Scores | None = None
    """The trained model, if another one ships, of which ``after`` and ``test`` are then."""
    trained_test: Scores | None = None
    few_shot: tuple[FewShot, ...] = ()
    """Only with ``evaluation.few_shots``."""


@dataclass(frozen=True)
class Baselines:
    """Scores to beat: always the most frequent label, and logistic regression over TF-IDF of words and word pairs."""

    split: str
    majority_label: str | None
    majority_accuracy: float | None
    majority_balanced_accuracy: float | None
    tfidf_accuracy: float | None
    tfidf_macro_f1: float | None
    tfidf_c: float | None


@dataclass(frozen=True)
class Goal:
    """Whether ``task.goal`` is met (``answer``: ``yes``, ``no`` or ``not shown``), by one-sided 95 % bounds over items.

    ``low`` and ``high`` are these bounds.
    """

    text: str
    split: str
    value: float | None
    low: float | None
    high: float | None
    answer: str


@dataclass(frozen=True)
class PilotLoss:
    """By what a ladder compares its pilots while they train (:mod:`qlora_exp.analysis.pilots`)."""

    step: int
    loss: float
    """Mean training loss of the last steps up to ``step``, in nats per token."""


@dataclass(frozen=True)
class Training:
    """What the trainer did."""

    steps: int
    first_loss: float | None
    final_loss: float | None
    epochs: float | None
    resumed_from_step: int | None = None
    best_step: int | None = None
    stopped_early: bool = False
    micro_batch_size: int | None = None
    ended_by_budget: str | None = None
    """The limit of ``budget`` that ended the training before its last step, e.g. ``seconds``."""
    pilot_loss: PilotLoss | None = None
    """Only of a ladder's pilots that may be stopped early; ``None`` before the step at which they are compared."""


KILLED_FOR_MEMORY = "OutOfMemory"
"""``Failure.kind`` of a run whose process was killed, probably for lack of memory; not an exception's name."""


@dataclass(frozen=True)
class Failure:
    """Why a run did not complete. ``kind`` is the exception's class name."""

    kind: str
    message: str
    phase: str | None = None
    step: int | None = None
    hint: str | None = None
    traceback: str | None = None


@dataclass(frozen=True)
class Trial:
    """The trial that a run belongs to.

    ``params``: axis → value; ``attempt`` counts from 1; ``study_id``: the study's identity, ``None`` in records of
    earlier versions.
    """

    study: str
    number: int
    attempt: int
    params: dict[str, Any]
    study_id: str | None = None


@dataclass(frozen=True)
class RunRecord:
    """The record of one run, written also if it fails (what it didn't reach is ``None``)."""

    schema_version: int
    run_id: str
    name: str
    status: Status
    started_at: str
    ended_at: str | None
    config: dict[str, Any]
    environment: Environment
    process: Process | None = None
    seed: int | None = None
    model_fingerprint: str | None = None
    plan: Plan | None = None
    fit: Fit | None = None
    """Only if there is a memory limit: ``budget.memory_bytes``, or a GPU's memory."""
    data: Data | None = None
    memory: Memory = field(default_factory=Memory)
    speed: Speed = field(default_factory=Speed)
    spent: Spent | None = None
    training: Training | None = None
    scores: ScoreTable = field(default_factory=ScoreTable)
    shipped: Shipped | None = None
    teacher: TeacherRun | None = None
    agreement: StudentAgreement | None = None
    """With the teacher, after training."""
    baselines: Baselines | None = None
    goal: Goal | None = None
    failure: Failure | None = None
    warnings: tuple[str, ...] = ()
    trial: Trial | None = None
    earlier_failures: tuple[Failure, ...] = ()
    """Failures of earlier attempts at the same trial, or before a resume."""
    synthetic: bool = False
    """Whether no model was trained (``training.engine=sleep``); analysis and reports refuse such records."""

    def replace(self, **changes: Any) -> RunRecord:
        return dataclasses.replace(self, **changes)
