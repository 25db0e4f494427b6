"""The trials of a rank ladder, with what the ladder uses of their runs on disk."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qlora_exp.analysis.item_groups import group_means, item_groups
from qlora_exp.errors import RecordError
from qlora_exp.paths import OutputPaths
from qlora_exp.rank_doubling.settings import SPLIT, TRAINING_STEPS
from qlora_exp.records.files import read_curve, read_record, training_losses
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.study.proposer import TrialPoint
from qlora_exp.study.space import point_overrides


@dataclass(frozen=True)
class LadderTrial:
    """One trial of the study, with what the ladder uses of its run."""

    params: TrialPoint
    ended: bool
    record: RunRecord | None = None
    """``None`` until the trial has ended, and if its run left no record."""
    losses: Mapping[str, float] | None = None
    """Item, or group of items → nats on the test split, sorted; ``None`` if the run left none."""
    curve: Mapping[int, float] = field(default_factory=dict)
    """Step → training loss, for the logged steps."""
    validation: Mapping[str, float] | None = None
    """Item, or group of items → nats of the answer on the validation split, of a study that screens configurations."""
    skipped: bool = False
    """The trial was not started because it was predicted not to fit into memory."""

    @property
    def completed(self) -> bool:
        return self.record is not None and self.record.status is Status.COMPLETED

    @property
    def cause(self) -> str | None:
        """Why the trial left no result, e.g. ``diverged (DivergedError: loss is NaN)``; ``None``: it completed, or has
        not ended."""
        if self.completed or not self.ended:
            return None
        if self.skipped:
            return "predicted not to fit into memory"
        if self.record is None:
            return "left no record"
        status = self.record.status.value.lower().replace("_", " ")
        failure = self.record.failure
        return (
            status if failure is None else f"{status} ({failure.kind}: {next(iter(failure.message.splitlines()), '')})"
        )


def ladder_trials(records: Sequence[RunRecord], outputs: OutputPaths) -> list[LadderTrial]:
    """Return the ended trials of a study from its runs' records: enough to compute the answer again without the
    database."""
    ended = [record for record in records if record.status not in (Status.RUNNING, Status.INTERRUPTED)]
    return [ended_trial(record.trial.params, record.run_id, outputs) for record in ended if record.trial is not None]


def ended_trial(params: TrialPoint, run_id: str | None, outputs: OutputPaths) -> LadderTrial:
    """Return the ended trial with what its run left on disk."""
    record, losses, curve, validation = None, None, {}, None
    if run_id is not None:
        paths = outputs.run(run_id)
        with contextlib.suppress(RecordError):
            record = read_record(paths.record)
        if record is not None and params.get(SPLIT) == "test":
            losses = _item_losses(paths.items("after", "test"), "loss_sum_nats")
            curve = training_losses(read_curve(paths.curve))
        elif record is not None and TRAINING_STEPS in params:
            validation = _item_losses(paths.items("after", "validation"), "completion_nats")
            if validation is None and record.synthetic and record.scores.after is not None:
                validation = {"all items": record.scores.after.loss_per_item or math.nan}
    return LadderTrial(params, ended=True, record=record, losses=losses, curve=curve, validation=validation)


def trial_key(point: TrialPoint) -> frozenset[str]:
    """Return what identifies a trial's parameters in any order."""
    return frozenset(point_overrides(point))


def _item_losses(file: Path, column: str) -> dict[str, float] | None:
    """Return item → nats, or group of items → mean nats, sorted; ``None`` if the file is missing or can't be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file, columns=["item_id", column])
    except (OSError, pa.ArrowException):
        return None
    losses = dict(zip(table["item_id"].to_pylist(), table[column].to_pylist(), strict=True))
    return dict(sorted(group_means(losses, item_groups(file)).items()))
