"""What is known of a run, as frozen types with units in their names. ``record.json`` is the truth; all else is a view.

``None`` means unknown or not measured. There are no sentinels. A field is only ever added; a change of meaning raises
``SCHEMA_VERSION``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

SCHEMA_VERSION = 1


class Status(StrEnum):
    """How a run ended. RUNNING is written at the start, so that a killed run can be told from one never begun."""

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
    """``kind`` is ``cuda`` or ``cpu``; memory is the card's, or the machine's for a CPU."""

    kind: str
    name: str | None
    count: int
    memory_bytes: int | None
    compute_capability: str | None
    driver: str | None
    bf16: bool


@dataclass(frozen=True)
class Environment:
    """The machine and the software that a run was made with."""

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
    """What the C library's heap was told when the process started; ``None``: nothing."""
    cuda_visible_devices: str | None = None
    """The variable of this name: the GPU that the process was limited to. ``None``: it wasn't set."""


@dataclass(frozen=True)
class Process:
    """Which process owns a RUNNING record: ``start_ticks`` and ``boot_id`` tell a reused pid from the same process,
    ``host`` (a name) and ``pid_namespace`` (a container's own numbering) whether it can be seen from here at all."""

    pid: int
    start_ticks: int | None
    boot_id: str | None
    host: str | None = None
    pid_namespace: str | None = None


@dataclass(frozen=True)
class Plan:
    """What a run will do, by arithmetic, before a weight is read."""

    config_fingerprint: str
    """SHA-256 over every setting that can change a result (not names, places or tracking)."""
    base_fingerprint: str
    """SHA-256 over what the untouched base's scores depend on: model, quantization, task, evaluation."""
    architecture: str
    total_parameters: int
    trainable_parameters: int
    full_parameters_of_adapted_modules: int
    """Parameters of the adapted weight matrices: what training them without LoRA would update."""
    target_modules: tuple[str, ...]
    """Distinct last parts of the adapted modules' names, e.g. ``q_proj``."""
    adapted_modules: int
    alpha: float
    scale: float
    """alpha / r, or alpha / sqrt(r) with rsLoRA: what B·A is multiplied by."""
    device: str
    weight_dtype: str
    compute_dtype: str
    """What the unquantized rest is stored and computed in, and what quantized layers take and give."""
    adapter_dtype: str
    max_steps: int
    batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    format: str
    """``chat`` or ``plain``."""
    length_multiple: int = 1
    """What the length of a training batch is padded to a multiple of."""
    logits_multiple: int = 1
    """What the number of a training batch's tokens that get logits is rounded up to a multiple of."""
    inputs_rounded_in: tuple[str, ...] | None = None
    """Where the quantized layers' inputs are rounded to 8 bits too, out of ``training`` and ``evaluation``: only with
    int8. ``None`` in records of versions that didn't say."""
    predicted_peak_train_bytes: int | None = None
    """What ``memory.train_working_set_bytes`` was predicted to be."""
    predicted_context_bytes: int | None = None
    """What a card must hold besides: CUDA's context and the allocator's fragments; 0 on a CPU."""
    predicted_activation_bytes: int | None = None
    predicted_logits_bytes: int | None = None
    predicted_train_tokens: int | None = None
    """Processed tokens that training was expected to take."""
    predicted_padded_tokens: int | None = None
    """The same with the padding that a batch's shorter rows get."""
    predicted_loss_tokens: int | None = None
    """Of ``predicted_train_tokens`` those that carry a loss, which alone get logits. ``None`` in records of versions
    whose ``train_flops_per_token`` counted the head for every token, and no padding."""
    train_flops_per_token: float | None = None
    """Floating-point operations to train one unpadded token, with its share of the padding and of the head."""
    predicted_train_seconds: float | None = None
    """What ``speed.train_seconds`` was predicted to be; ``None`` where this machine's rate is not known."""
    predicted_train_seconds_low: float | None = None
    predicted_train_seconds_high: float | None = None
    predicted_train_seconds_basis: str | None = None
    predicted_train_usd: float | None = None
    usd_per_hour: float | None = None
    """What an hour of the machine is taken to cost, for this and ``speed.cost_usd``; ``None`` where neither
    ``budget.usd_per_hour`` nor conf/prices.yaml says it, and in records of versions that only asked the first."""
    usd_per_hour_from: str | None = None
    """Who says so: ``budget.usd_per_hour``, or ``conf/prices.yaml: cpu``, with the device that was looked up there."""
    predicted_other_seconds: float | None = None
    """What the run was expected to take beside its training, to load and to score; ``None`` where none like it has
    ended, and in records of versions that didn't say."""


@dataclass(frozen=True)
class Fit:
    """What a run was predicted to need of its device's memory, beside what it may take. Bytes."""

    peak_bytes: int
    """Of training, by arithmetic alone."""
    context_bytes: int
    """What the device must hold besides."""
    corrected_bytes: int
    """Both, the peak times what measured peaks of its kin were of theirs."""
    bound_bytes: int
    error: float
    """The prediction's, as a share: up to (1 + error) × the bound a trial is tried."""
    kin: int
    """Measured peaks that it was corrected by."""
    would_fit: str | None = None
    """Settings that are predicted to fit, where the run is predicted near the bound or above it."""

    @property
    def excess(self) -> float:
        """Beyond the bound, as a share of it."""
        return self.corrected_bytes / self.bound_bytes - 1.0

    @property
    def near_the_edge(self) -> bool:
        return abs(self.excess) <= self.error


@dataclass(frozen=True)
class SkippedTrial:
    """Why a trial was not started: it was predicted not to fit."""

    fit: Fit
    train_seconds: float | None
    """What its training was predicted to take; ``None`` where the machine's rate is not known."""
    train_flops: float | None
    """Floating-point operations of its training."""


@dataclass(frozen=True)
class Data:
    """What was trained and scored on, after validation of every row."""

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
    """Whether the base ever saw the template's special tokens (LoRA leaves embeddings frozen)."""
    truncated_items: int
    rows_fingerprint: str | None = None
    """SHA-256 over the rows alone, whichever tokenizer reads them in whichever format; ``None`` in records of versions
    that didn't have it."""
    answer_prefix: str | None = None
    """What the chat template writes by itself between its generation prompt and an answer, e.g. an empty think block.
    It is part of the prompt: neither trained nor scored. Rows whose answer has reasoning may lack it. ``None``:
    nothing."""
    answer_prefix_variables: dict[str, Any] | None = None
    """Template variables with which the generation prompt is the prompt of this run, e.g. ``enable_thinking: false``.
    ``None``: the template's own defaults do, or no known variable does."""
    chat_date: str | None = None
    """The day that the chat template was given (``task.date``); ``None``: it doesn't ask for the date."""
    label_end_tokens: int | None = None
    """Tokens of the end that each label's likelihood includes; 0 unless one label's tokens begin another's. ``None``:
    no labels, or a record of a version that refused such labels."""


@dataclass(frozen=True)
class Memory:
    """Bytes. Peaks are per phase, reset in between; on a CPU they are the resident peak *above* the phase's start."""

    base_weight_bytes: int | None = None
    quantization_state_bytes: int | None = None
    adapter_bytes: int | None = None
    gradient_bytes: int | None = None
    optimizer_bytes: int | None = None
    resident_after_imports_bytes: int | None = None
    peak_load_bytes: int | None = None
    peak_train_bytes: int | None = None
    peak_evaluation_bytes: int | None = None
    peak_train_reserved_bytes: int | None = None
    train_working_set_bytes: int | None = None
    """All that training needed at its peak, the base included: what ``plan.predicted_peak_train_bytes`` predicts. CUDA:
    allocated bytes; CPU: base, quantization state and adapters, and the phase's resident peak above its start less what
    mapped files grew by. ``None`` where the process had made a run before."""
    checkpoint_bytes: int | None = None
    host_reused: bool = False
    source: str | None = None
    """``cuda_allocated`` or ``resident``: what the peaks measure."""


@dataclass(frozen=True)
class Speed:
    """Seconds by phase; tokens are unpadded; step times exclude the first ``excluded_steps`` (warm-up)."""

    load_seconds: float | None = None
    train_seconds: float | None = None
    evaluation_seconds: float | None = None
    untouched_evaluation_seconds: float | None = None
    untouched_cached: bool = False
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
    """What a run has spent in all its parts, interrupted, killed and repeated ones included (of a killed one all but
    its last second or so). ``tokens``: processed in training; ``joules``: by the card's counter."""

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
    """What a generated answer was limited to; ``None`` where nothing was generated."""


@dataclass(frozen=True)
class Forgetting:
    """Loss on held-out text in nats per byte, after − before; the interval is over documents (95 %)."""

    before_nats_per_byte: float
    after_nats_per_byte: float
    difference: float
    low: float | None
    high: float | None
    documents: int
    text: str
    tokens: int | None = None
    """Tokens scored; ``None`` in records of versions that didn't count them."""


@dataclass(frozen=True)
class FewShot:
    """The untouched model's scores with worked examples before each prompt, one draw of them."""

    draw: int
    """From 1."""
    asked: int
    """Examples that were asked for; ``examples`` has fewer where the model's context holds no more."""
    examples: tuple[str, ...]
    """Item ids of the training split, in order."""
    validation: Scores
    test: Scores | None = None
    """Only with ``evaluation.split=test``."""


@dataclass(frozen=True)
class ScoreTable:
    before: Scores | None = None
    after: Scores | None = None
    test: Scores | None = None
    """Tuned model on the test split; only with ``evaluation.split=test``."""
    test_before: Scores | None = None
    forgetting: Forgetting | None = None
    forgetting_chat: Forgetting | None = None
    """On the answers of held-out chats; only for runs in the chat format."""
    few_shot: tuple[FewShot, ...] = ()
    """Only with ``evaluation.few_shots``."""


@dataclass(frozen=True)
class Baselines:
    """What a tuned model must clear: always the most frequent label, and TF-IDF (1-2-grams) + logistic regression."""

    split: str
    majority_label: str | None
    majority_accuracy: float | None
    majority_balanced_accuracy: float | None
    tfidf_accuracy: float | None
    tfidf_macro_f1: float | None
    tfidf_c: float | None


@dataclass(frozen=True)
class Goal:
    """``task.goal`` answered by a one-sided 95 % bound over items: ``yes``, ``no`` or ``not shown``."""

    text: str
    split: str
    value: float | None
    low: float | None
    high: float | None
    answer: str


@dataclass(frozen=True)
class Training:
    """What the trainer really did."""

    steps: int
    first_loss: float | None
    final_loss: float | None
    epochs: float | None
    resumed_from_step: int | None = None
    best_step: int | None = None
    stopped_early: bool = False
    micro_batch_size: int | None = None
    ended_by_budget: str | None = None
    """Which limit of ``budget`` ended the training before its last step, e.g. ``seconds``."""


KILLED_FOR_MEMORY = "OutOfMemory"
"""The ``kind`` of a failure whose process was ended, probably for want of memory: no exception's name."""


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
    """Which trial of which study a run is. ``params``: axis → value; ``attempt`` counts from 1; ``study_id``: the
    study's identity, ``None`` of a version that gave none."""

    study: str
    number: int
    attempt: int
    params: dict[str, Any]
    study_id: str | None = None


@dataclass(frozen=True)
class RunRecord:
    """All that is known of one run; complete even when the run failed (what was not reached is ``None``)."""

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
    """Only where something limits its memory: ``budget.memory_bytes``, or a card."""
    data: Data | None = None
    memory: Memory = field(default_factory=Memory)
    speed: Speed = field(default_factory=Speed)
    spent: Spent | None = None
    training: Training | None = None
    scores: ScoreTable = field(default_factory=ScoreTable)
    baselines: Baselines | None = None
    goal: Goal | None = None
    failure: Failure | None = None
    warnings: tuple[str, ...] = ()
    trial: Trial | None = None
    earlier_failures: tuple[Failure, ...] = ()
    """Of earlier attempts at the same trial."""
    synthetic: bool = False
    """No model was trained (``training.engine=sleep``); analysis and reports refuse it."""

    def replace(self, **changes: Any) -> RunRecord:
        return dataclasses.replace(self, **changes)
