"""Which runs may be compared with each other, and which settings separate the others."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_exp.errors import AnalysisError
from qlora_exp.records.types import Forgetting, RunRecord, Scores, Status

MAX_VALUES_NAMED = 4
"""How many values of a setting a message names."""


@dataclass(frozen=True)
class Protocol:
    """Settings that must be equal before two scores are comparable; ``None`` is unknown."""

    task: str
    split: str
    scored_items: int
    train_items: int
    labels: tuple[str, ...]
    max_steps: int
    """Planned steps, or the steps made if a budget ended the training early."""
    max_tokens: int | None
    batch_size: int
    adapter_dtype: str
    data_version: int
    """1 for the rows that most runs were trained and scored on, 2 for the next. If a record lacks ``rows_fingerprint``,
    versions are counted within each checkpoint and format, because the older ``fingerprint`` covers both."""


@dataclass(frozen=True)
class Group:
    """Finished runs of one protocol."""

    protocol: Protocol
    records: tuple[RunRecord, ...]


def answering_scores(record: RunRecord) -> Scores | None:
    """Return the tuned model's scores on the test split, or on the validation split if it wasn't scored on test."""
    return record.scores.test or record.scores.after


def base_model_scores(record: RunRecord) -> Scores | None:
    """Return the base model's scores before training, on the same split."""
    return record.scores.test_before if record.scores.test is not None else record.scores.before


def finite_score(scores: Scores | Forgetting | None, name: str) -> float | None:
    """Return the score, e.g. ``accuracy``; ``None`` if it is unknown or not finite."""
    value = getattr(scores, name) if scores is not None else None
    return value if value is not None and math.isfinite(value) else None


def cell_of(run: RunRecord) -> tuple[str, str]:
    """Return (variant, format), e.g. ``("instruct", "chat")``."""
    variant = str((run.config.get("model") or {}).get("variant"))
    return variant, run.plan.format if run.plan is not None else "plain"


def is_pilot(record: RunRecord) -> bool:
    """Return whether a ladder ran it only to choose a learning rate; such a run is scored on validation."""
    return record.trial is not None and record.trial.params.get("evaluation.split") == "validation"


def finished_runs(records: Iterable[RunRecord]) -> list[RunRecord]:
    """Return the completed runs whose scores, plan and data are known."""
    return [
        record
        for record in records
        if record.status is Status.COMPLETED and None not in (answering_scores(record), record.plan, record.data)
    ]


def groups_of(records: Sequence[RunRecord]) -> list[Group]:
    """Group the finished runs by protocol, the largest group first."""
    finished = finished_runs(records)
    versions = _data_versions(finished)
    by_protocol: dict[Protocol, list[RunRecord]] = defaultdict(list)
    for record in finished:
        scores, plan, data, training = answering_scores(record), record.plan, record.data, record.training
        assert scores is not None
        assert plan is not None
        assert data is not None
        protocol = Protocol(
            task=data.task,
            split=scores.split,
            scored_items=scores.items,
            train_items=data.train_items,
            labels=data.labels,
            max_steps=plan.max_steps if training is None or training.ended_by_budget is None else training.steps,
            max_tokens=(record.config.get("training") or {}).get("max_tokens"),
            batch_size=plan.batch_size,
            adapter_dtype=plan.adapter_dtype,
            data_version=versions[record.run_id],
        )
        by_protocol[protocol].append(record)
    groups = [Group(protocol, tuple(group)) for protocol, group in by_protocol.items()]
    return sorted(groups, key=lambda group: -len(group.records))


def split_budgeted(groups: Sequence[Group]) -> tuple[list[Group], list[RunRecord]]:
    """Return the groups to compare within, and the runs that repeat the first group with a token budget.

    Those runs differ from the first group only in their training's end: ``training.max_tokens`` instead of steps.
    """
    if not groups or groups[0].protocol.max_tokens is not None:
        return list(groups), []
    repeats = [
        group
        for group in groups[1:]
        if group.protocol.max_tokens is not None
        and replace(group.protocol, max_tokens=None, max_steps=groups[0].protocol.max_steps) == groups[0].protocol
    ]
    return [g for g in groups if g not in repeats], [record for g in repeats for record in g.records]


def refuse_synthetic(records: Sequence[RunRecord]) -> None:
    """Check that no run is SYNTHETIC.

    Raises:
        AnalysisError: a run trained nothing (``training.engine=sleep``).
    """
    synthetic = [record.run_id for record in records if record.synthetic]
    if synthetic:
        raise AnalysisError(
            f"{len(synthetic)} of {len(records)} runs are SYNTHETIC: they trained nothing, and their scores come from a"
            " formula",
            f"run {synthetic[0]}" + (f" and {len(synthetic) - 1} more" if len(synthetic) > 1 else ""),
            "sweep without training.engine=sleep",
        )


def require_comparable(records: Sequence[RunRecord]) -> Group:
    """Return the one group that contains all finished runs.

    Raises:
        AnalysisError: SYNTHETIC runs, no finished run, or runs with different protocols.
    """
    refuse_synthetic(records)
    groups = groups_of(records)
    if not groups:
        raise AnalysisError("there is no finished run to analyse", f"{len(records)} runs", "qlora-exp ls runs")
    if len(groups) > 1:
        raise AnalysisError(
            f"these runs aren't comparable: {'; '.join(setting_differences(groups))}",
            f"{sum(len(group.records) for group in groups)} finished runs",
            "compare runs of one protocol, or read the report, which shows them apart",
        )
    return groups[0]


def setting_differences(groups: Sequence[Group]) -> list[str]:
    """Return what differs between the groups, e.g. ``max_steps: 200 in 28 runs, 100 in 4 runs``."""

    def text(value: Any) -> str:
        return f"{len(value)} labels" if isinstance(value, tuple) else "unset" if value is None else str(value)

    differences = []
    for field in dataclasses.fields(Protocol):
        runs: Counter[Any] = Counter()
        for group in groups:
            runs[getattr(group.protocol, field.name)] += len(group.records)
        if len(runs) > 1:
            values = [f"{text(value)} in {count} runs" for value, count in runs.most_common(MAX_VALUES_NAMED)]
            differences.append(f"{field.name}: {', '.join(values)}" + (", …" if len(runs) > MAX_VALUES_NAMED else ""))
    return differences


def _data_versions(records: Sequence[RunRecord]) -> dict[str, int]:
    """Return run id → version of its rows, the most common version of a checkpoint and format first."""
    by_rows = all(record.data is not None and record.data.rows_fingerprint is not None for record in records)
    rows: dict[str, tuple[str, str | None]] = {}
    counts: dict[str, Counter[str | None]] = defaultdict(Counter)
    for record in records:
        assert record.data is not None
        if by_rows:
            rows[record.run_id] = ("", record.data.rows_fingerprint)
        else:
            # This fingerprint depends on the rows, and on the checkpoint and format that they were read for.
            model = record.config.get("model") or {}
            prompt_format = record.plan.format if record.plan is not None else None
            chosen = (model.get(key) for key in ("family", "id", "instruct_id", "path", "instruct_path", "variant"))
            read_for = f"{' '.join(str(value) for value in chosen if value is not None)} {prompt_format}"
            rows[record.run_id] = (read_for, record.data.fingerprint)
        read_for, fingerprint = rows[record.run_id]
        counts[read_for][fingerprint] += 1
    version = {
        (read_for, fingerprint): number
        for read_for, counted in counts.items()
        for number, (fingerprint, _) in enumerate(counted.most_common(), start=1)
    }
    return {run_id: version[key] for run_id, key in rows.items()}
