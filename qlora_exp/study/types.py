"""What a study is and what goes in and out of it, as plain frozen types: no optuna, so that anyone may hold them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from qlora_exp.records.types import Failure, Process, SkippedTrial, Status

Value = str | int | float | bool | None


class AxisKind(StrEnum):
    CHOICE = "choice"
    INT = "int"
    FLOAT = "float"


@dataclass(frozen=True)
class Axis:
    """One dimension of the search. ``choice``: ``values``; ``int`` and ``float``: ``low`` to ``high``, both included,
    in steps of ``step`` where given, on a log scale where ``log``."""

    key: str
    """The override's key: ``lora.r``, or a group such as ``quantization``."""
    kind: AxisKind
    text: str
    """As the user wrote it."""
    values: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False
    condition: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class LadderSettings:
    """Rank doubling at one point of the other axes."""

    axes: dict[str, Any]
    """The other axes' values."""
    learning_rate: float
    """The centre at r_start."""
    rate_exponent: float
    """The centre is ∝ r to this power."""
    alpha: str
    """The alpha policy, in words."""


@dataclass(frozen=True)
class LadderSpec:
    """``sweep.ladder`` of a study, resolved; fixed before its first trial."""

    r_start: int
    r_max: int
    seeds: int
    first_seed: int
    pilot_seed: int
    margin: float | None
    """Nats per test item; ``None`` only where a single rank is run, and nothing is decided."""
    half_zone: float | None
    lr_policy: str
    lr_factors: tuple[float, ...]
    ladders: tuple[LadderSettings, ...]
    most_seeds: int = 8
    """A rank, in all; studies of versions that didn't say have the rule's own."""


@dataclass(frozen=True)
class StudySpec:
    """Everything that a worker needs to go on with a study; kept as studies/NAME/study.json."""

    name: str
    question: str | None
    created_at: str
    overrides: tuple[str, ...]
    """The fixed overrides of every trial, ``sweeps=NAME`` included."""
    axes: tuple[Axis, ...]
    objectives: tuple[str, ...]
    constraints: tuple[str, ...]
    sampler: str
    """Resolved: never ``auto``."""
    sampler_options: dict[str, Any]
    pruner: str
    pruner_options: dict[str, Any]
    n_trials: int
    seed: int
    enqueue: tuple[dict[str, Any], ...]
    warm_start: tuple[str, ...]
    storage: str
    """URL; redacted of passwords in the file (``sweep.storage`` of the command is used then)."""
    output_root: str
    max_failures: float | None
    max_attempts: int
    out_of_memory_retries: int
    synthetic: bool = False
    space: dict[str, str] = field(default_factory=dict)
    """Axis → text, for people and for the tracking view."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Those of ``overrides`` that make a trial what it is, key → value: with a trial's axes, its configuration."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What all trials have alike, key → value, secrets redacted: a study goes on with the same alone."""
    interpolated: dict[str, str] = field(default_factory=dict)
    """Those of ``settings`` that were written as interpolations, key → text; ``settings`` has their values, unless a
    trial's axes change them."""
    ladder: LadderSpec | None = None
    """Only with the sampler ``ladder``."""
    id: str | None = None
    """Which study this is, wherever it is kept; its name is for people. ``None``: of a version that gave none."""


@dataclass(frozen=True)
class Owner:
    """Who runs a trial: a worker's process, and which of its slots."""

    process: Process
    worker: str
    slot: int


@dataclass(frozen=True)
class Claim:
    """A trial that this worker may run now, and nobody else."""

    number: int
    trial_id: int
    params: dict[str, Any]
    overrides: tuple[str, ...]
    """The axes as overrides, to be added to the spec's."""
    attempt: int
    run_id: str | None
    """The run of an earlier attempt, to be gone on with; ``None`` for a new trial."""
    out_of_memory_retries: int = 0
    """How often the micro-batch has been halved so far."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended, for telling: the record's status and the objectives' and constraints' values.

    ``values``: one per objective, ``None`` where unknown; ``violations``: one per constraint, above 0 where broken.
    """

    status: Status
    values: tuple[float | None, ...]
    violations: tuple[float, ...]
    seconds: float | None
    failure: Failure | None = None
    refusal: SkippedTrial | None = None
    """The trial was not started: it was predicted not to fit. ``status`` is then PRUNED."""


@dataclass(frozen=True)
class TrialRow:
    """One trial as tables and reports see it."""

    number: int
    state: str
    """Optuna's: WAITING, RUNNING, COMPLETE, PRUNED, FAIL."""
    status: Status | None
    """Ours, once the trial has ended."""
    values: tuple[float | None, ...]
    run_id: str | None
    seconds: float | None
    params: dict[str, Any]
    attempt: int
    feasible: bool | None
    failure: str | None = None
    out_of_memory_retries: int = 0
    """How often memory ran out and the micro-batch was halved."""
    refusal: SkippedTrial | None = None
    """Why it was not started: it was predicted not to fit."""


@dataclass(frozen=True)
class Counts:
    """Trials by state; ``to_ask`` are those that don't exist yet, ``refused`` those predicted not to fit, which
    ``pruned`` leaves out."""

    total: int
    completed: int
    pruned: int
    failed: int
    running: int
    waiting: int
    to_ask: int
    refused: int = 0

    @property
    def finished(self) -> int:
        return self.completed + self.pruned + self.failed + self.refused
