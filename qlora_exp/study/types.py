"""Input and output of a study, as plain frozen types without Optuna, so that any module may use them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from qlora_exp.records.fit_types import SkippedTrial
from qlora_exp.records.types import Failure, Process, Status

Value = str | int | float | bool | None


class AxisKind(StrEnum):
    """What values an axis has."""

    CHOICE = "choice"
    INT = "int"
    FLOAT = "float"


@dataclass(frozen=True)
class Axis:
    """One dimension of the search.

    ``choice``: one of ``values``. ``int`` and ``float``: from ``low`` to ``high``, both included, in steps of ``step``
    if given, on a log scale if ``log``.
    """

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
    """The settings of one rank ladder, at one point of the other axes."""

    axes: dict[str, Any]
    """The other axes' values."""
    learning_rate: float
    """The central learning rate at r_start."""
    rate_exponent: float
    """The central learning rate is proportional to r to this power."""
    alpha: str
    """The alpha policy, as text."""


@dataclass(frozen=True)
class LadderSpec:
    """``sweep.ladder`` of a study, resolved; fixed before the first trial."""

    r_start: int
    r_max: int
    seeds: int
    first_seed: int
    pilot_seed: int
    """The pilots' first seed."""
    margin: float | str | None
    """As the user wrote it; a number is nats per test item. ``None`` only if a single rank is run and nothing is
    decided."""
    half_zone: float | None
    lr_policy: str
    lr_factors: tuple[float, ...]
    ladders: tuple[LadderSettings, ...]
    max_seeds: int = 8
    """Maximum number of seeds per rank. Studies of versions without this field have the rule's maximum."""
    stop_pilots: bool = False
    """Stop pilots whose training loss is clearly behind; versions without this field ran all of them to their end."""
    pilot_seeds: int = 1
    """Seeds per pilot, from ``pilot_seed`` upwards. Versions without this field used one."""
    edition: int = 1
    """Which trials a ladder may have. 1: of versions without this field; at most 8 seeds per rank, and ``search`` chose
    the rate of each rank without the other ranks'. 2: at most 64, and ``search`` compares with the carried rate."""
    raised_from: tuple[int, ...] = ()
    """Earlier values of ``max_seeds``, each raised after an answer."""
    screening_steps: int | None = None
    """Training steps of the first round of successive halving, which leaves one of ``ladders``; ``None``: all run."""


@dataclass(frozen=True)
class StudySpec:
    """Everything that a worker needs to continue a study; stored as studies/NAME/study.json."""

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
    """URL; without password in the file, where ``sweep.storage`` of the command is used instead."""
    output_root: str
    max_failures: float | None
    max_attempts: int
    out_of_memory_retries: int
    synthetic: bool = False
    space: dict[str, str] = field(default_factory=dict)
    """Axis → text, for people and for MLflow."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Those of ``overrides`` that affect a trial's result, key → value: with the trial's axes, they are its
    configuration."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that all trials share, key → value, secrets redacted: a study can only be continued with the same
    ones."""
    interpolated: dict[str, str] = field(default_factory=dict)
    """Those of ``settings`` that were written as interpolations, key → text. ``settings`` has their values, unless they
    depend on a trial's axes."""
    ladder: LadderSpec | None = None
    """Set only with the sampler ``ladder``."""
    id: str | None = None
    """The study's identity, wherever it is stored; the name is for people. ``None``: of a version without
    identities."""


@dataclass(frozen=True)
class Owner:
    """Who runs a trial: a worker's process, and which of its slots."""

    process: Process
    worker: str
    slot: int


@dataclass(frozen=True)
class Claim:
    """A trial that this worker, and no other, may run now."""

    number: int
    trial_id: int
    params: dict[str, Any]
    overrides: tuple[str, ...]
    """The axes as overrides, in addition to the spec's."""
    attempt: int
    run_id: str | None
    """The run of an earlier attempt, to be continued; ``None`` for a new trial."""
    out_of_memory_retries: int = 0
    """How often the micro-batch has been halved so far."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: the record's status and the values of objectives and constraints.

    ``values``: one per objective, ``None`` if unknown. ``violations``: one per constraint, above 0 if violated.
    """

    status: Status
    values: tuple[float | None, ...]
    violations: tuple[float, ...]
    seconds: float | None
    failure: Failure | None = None
    skipped: SkippedTrial | None = None
    """The trial was not started because it was predicted not to fit. ``status`` is then PRUNED."""


@dataclass(frozen=True)
class TrialRow:
    """One trial, as a row for tables and reports."""

    number: int
    state: str
    """Optuna's: WAITING, RUNNING, COMPLETE, PRUNED, FAIL."""
    status: Status | None
    """The run's status, once the trial has ended."""
    values: tuple[float | None, ...]
    run_id: str | None
    seconds: float | None
    params: dict[str, Any]
    attempt: int
    feasible: bool | None
    failure: str | None = None
    out_of_memory_retries: int = 0
    """How often memory ran out and the micro-batch was halved."""
    skipped: SkippedTrial | None = None
    """Why the trial was not started: it was predicted not to fit."""


@dataclass(frozen=True)
class Counts:
    """Trials by state. ``to_ask``: don't exist yet. ``refused``: predicted not to fit; ``pruned`` doesn't count
    them."""

    total: int
    completed: int
    pruned: int
    failed: int
    running: int
    waiting: int
    to_ask: int
    skipped: int = 0

    @property
    def finished(self) -> int:
        return self.completed + self.pruned + self.failed + self.skipped

    @property
    def is_complete(self) -> bool:
        """Whether every trial has ended."""
        return self.running + self.waiting + self.to_ask == 0
