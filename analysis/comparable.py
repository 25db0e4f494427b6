"""Which runs may be compared with each other, and what keeps the others apart."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_exp.errors import AnalysisError
from qlora_exp.records.types import Data, RunRecord, Scores, Status

TOLD = 4
"""Values of a difference that a message names."""


@dataclass(frozen=True)
class Protocol:
    """What has to be equal before two scores mean the same; ``None`` is unknown."""

    task: str
    split: str
    scored_items: int
    train_items: int
    labels: tuple[str, ...]
    max_steps: int
    """The steps planned, or made where a budget ended the training before."""
    max_tokens: int | None
    batch_size: int
    adapter_dtype: str
    data_version: int
    """1 for the rows that most runs were trained and scored on, 2 for the next. Where a record lacks
    ``rows_fingerprint`` all are told apart within one checkpoint and format alone: their fingerprint covers both."""


@dataclass(frozen=True)
class Group:
    """Finished runs that may be compared."""

    protocol: Protocol
    records: tuple[RunRecord, ...]


def answering_scores(record: RunRecord) -> Scores | None:
    """The tuned model's scores on the test split where it was scored there, else on the validation split."""
    return record.scores.test or record.scores.after


def base_model_scores(record: RunRecord) -> Scores | None:
    """The untouched base's scores on the same split."""
    return record.scores.test_before if record.scores.test is not None else record.scores.before


def refuse_synthetic(records: Sequence[RunRecord]) -> None:
    """
    Raises:
        AnalysisError: a run that trained nothing is among them.
    """
    made_up = [record.run_id for record in records if record.synthetic]
    if made_up:
        raise AnalysisError(
            f"{len(made_up)} of {len(records)} runs are SYNTHETIC: they trained nothing, and their scores come from a"
            " formula",
            f"run {made_up[0]}" + (f" and {len(made_up) - 1} more" if len(made_up) > 1 else ""),
            "sweep without training.engine=sleep",
        )


def is_pilot(record: RunRecord) -> bool:
    """Whether a ladder ran it to choose a learning rate: such a run is scored on validation and answers nothing."""
    return record.trial is not None and record.trial.params.get("evaluation.split") == "validation"


def finished_runs(records: Iterable[RunRecord]) -> list[RunRecord]:
    """Completed runs of which scores, plan and data are known."""
    return [
        record
        for record in records
        if record.status is Status.COMPLETED
        and answering_scores(record) is not None
        and record.plan is not None
        and record.data is not None
    ]


def groups_of(records: Sequence[RunRecord]) -> list[Group]:
    """Finished runs by protocol, the largest group first."""
    kept = finished_runs(records)
    versions = _data_versions(kept)
    found: dict[Protocol, list[RunRecord]] = defaultdict(list)
    for record in kept:
        found[_protocol(record, versions)].append(record)
    groups = [Group(protocol, tuple(group)) for protocol, group in found.items()]
    return sorted(groups, key=lambda group: -len(group.records))


def require_comparable(records: Sequence[RunRecord]) -> Group:
    """The one group that all finished runs are in.

    Raises:
        AnalysisError: SYNTHETIC runs, no finished run, or runs that differ in more than their configuration.
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
    """What keeps the groups apart, e.g. ``max_steps: 200 in 28 runs, 100 in 4``."""
    found = []
    for field in dataclasses.fields(Protocol):
        runs: Counter[Any] = Counter()
        for group in groups:
            runs[getattr(group.protocol, field.name)] += len(group.records)
        if len(runs) > 1:
            told = [f"{_plain(value)} in {count} runs" for value, count in runs.most_common(TOLD)]
            found.append(f"{field.name}: {', '.join(told)}" + (", …" if len(runs) > TOLD else ""))
    return found


def _protocol(record: RunRecord, versions: dict[str, int]) -> Protocol:
    scores, plan, data = answering_scores(record), record.plan, record.data
    assert scores is not None
    assert plan is not None
    assert data is not None
    training = record.config.get("training") or {}
    return Protocol(
        task=data.task,
        split=scores.split,
        scored_items=scores.items,
        train_items=data.train_items,
        labels=data.labels,
        max_steps=_steps(record, plan.max_steps),
        max_tokens=training.get("max_tokens"),
        batch_size=plan.batch_size,
        adapter_dtype=plan.adapter_dtype,
        data_version=versions[record.run_id],
    )


def _steps(record: RunRecord, planned: int) -> int:
    training = record.training
    return planned if training is None or training.ended_by_budget is None else training.steps


def _data_versions(records: Sequence[RunRecord]) -> dict[str, int]:
    """Run → version of its rows."""
    everywhere = all(record.data is None or record.data.rows_fingerprint is not None for record in records)
    read = {
        record.run_id: ("", record.data.rows_fingerprint or "") if everywhere else _rows(record, record.data)
        for record in records
        if record.data is not None
    }
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for read_as, fingerprint in read.values():
        counts[read_as][fingerprint] += 1
    versions = {
        (read_as, fingerprint): version
        for read_as, found in counts.items()
        for version, (fingerprint, _) in enumerate(found.most_common(), start=1)
    }
    return {run: versions[rows] for run, rows in read.items()}


def _rows(record: RunRecord, data: Data) -> tuple[str, str]:
    """What the fingerprint depends on besides the rows (which checkpoint's tokenizer reads them, in which format), and
    the fingerprint."""
    model = record.config.get("model") or {}
    written = record.plan.format if record.plan is not None else None
    return f"{model.get('family')} {model.get('path')} {model.get('variant')} {written}", data.fingerprint


def _plain(value: Any) -> str:
    return f"{len(value)} labels" if isinstance(value, tuple) else "unset" if value is None else str(value)
