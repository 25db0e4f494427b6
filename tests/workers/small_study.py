"""A study in memory with the contract of the real one: numbered trials, attempts, and what was told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_exp.config.enums import Isolation
from qlora_exp.config.schema import WorkersConfig
from qlora_exp.paths import OutputPaths, StudyPaths
from qlora_exp.records.types import Failure, RunRecord, Status
from qlora_exp.study.types import Claim, Counts, Outcome, Owner, StudySpec

SLEEP = ("training.engine=sleep", "tracking=off", "model=embedded")


def spec_of(output: Path, n_trials: int, *overrides: str, **changes: Any) -> StudySpec:
    spec = StudySpec(
        name="small",
        question=None,
        created_at="2026-11-21T00:00:00+00:00",
        overrides=(*SLEEP, *overrides),
        axes=(),
        objectives=("minimize scores.after.loss_per_item",),
        constraints=(),
        sampler="random",
        sampler_options={},
        pruner="none",
        pruner_options={},
        n_trials=n_trials,
        seed=1,
        enqueue=(),
        warm_start=(),
        storage="memory",
        output_root=str(output),
        max_failures=None,
        max_attempts=3,
        out_of_memory_retries=0,
        synthetic=True,
    )
    return replace(spec, **changes)


def workers_of(**changes: Any) -> WorkersConfig:
    config = WorkersConfig(
        count=1,
        jobs=1,
        job=None,
        isolation=Isolation.warm,
        heartbeat_seconds=0.2,
        lease_seconds=60.0,
        hang_seconds=60.0,
    )
    return replace(config, **changes)


def paths_of(output: Path) -> StudyPaths:
    paths = OutputPaths.of(output).study("small")
    paths.folder.mkdir(parents=True, exist_ok=True)
    return paths


def outcome_of(record: RunRecord, spec: StudySpec) -> Outcome:
    after = record.scores.after
    return Outcome(record.status, (after.loss_per_item if after else None,), (), record.speed.total_seconds)


class SmallStudy:
    """Trials are ``trials``, tuples of overrides; each is claimed, given back and told under one lock."""

    def __init__(self, spec: StudySpec, trials: Sequence[tuple[str, ...]]) -> None:
        self.spec = spec
        self._lock = threading.Lock()
        self.waiting = [
            Claim(number, number, dict(text.split("=", 1) for text in trial), trial, 1, None)
            for number, trial in enumerate(trials)
        ]
        self.running: dict[int, Claim] = {}
        self.told: dict[int, Outcome] = {}
        self.run_ids: dict[int, str] = {}
        self.requeued: list[tuple[int, str]] = []
        self.reports: list[tuple[int, int, float]] = []
        self.heartbeats = 0
        self.prune_at: int | None = None

    def claim(self, owner: Owner, lease_seconds: float, affordable: Callable[[], bool]) -> Claim | None:
        with self._lock:
            if not self.waiting:
                return None
            claim = self.waiting.pop(0)
            self.running[claim.number] = claim
            return claim

    def set_run(self, claim: Claim, run_id: str) -> None:
        self.run_ids[claim.number] = run_id

    def heartbeat(self, claim: Claim) -> bool:
        self.heartbeats += 1
        return self._owned_trial(claim)

    def report(self, claim: Claim, step: int, value: float, items: Sequence[float] | None = None) -> bool:
        self.reports.append((claim.number, step, value))
        return self.prune_at is not None and step >= self.prune_at

    def tell(self, claim: Claim, outcome: Outcome) -> None:
        if outcome.status is Status.INTERRUPTED:
            self._back(claim)
            return
        with self._lock:
            if self._owned_trial(claim):
                del self.running[claim.number]
                self.told[claim.number] = outcome

    def requeue(self, claim: Claim, why: str) -> bool:
        if not self._owned_trial(claim):
            return False
        self.requeued.append((claim.number, why))
        if claim.attempt >= self.spec.max_attempts:
            self.tell(claim, Outcome(Status.FAILED, (None,), (), None, Failure("AttemptsExhausted", why)))
            return False
        self._back(claim, attempt=claim.attempt + 1)
        return True

    def _owned_trial(self, claim: Claim) -> bool:
        return self.running.get(claim.number) == claim

    def requeue_with_half_micro_batch(self, claim: Claim) -> bool:
        self._back(claim, out_of_memory_retries=claim.out_of_memory_retries + 1)
        return True

    def _back(self, claim: Claim, **changes: Any) -> None:
        with self._lock:
            del self.running[claim.number]
            run_id = self.run_ids.get(claim.number)
            self.waiting.insert(0, replace(claim, run_id=run_id, **changes))

    def counts(self) -> Counts:
        with self._lock:
            ended = [outcome.status for outcome in self.told.values()]
            completed = ended.count(Status.COMPLETED)
            pruned = ended.count(Status.PRUNED)
            return Counts(
                total=self.spec.n_trials,
                completed=completed,
                pruned=pruned,
                failed=len(ended) - completed - pruned,
                running=len(self.running),
                waiting=len(self.waiting),
                to_ask=0,
            )

    def failures_reached(self) -> bool:
        failed = sum(outcome.status is Status.FAILED for outcome in self.told.values())
        return self.spec.max_failures is not None and failed >= self.spec.max_failures
