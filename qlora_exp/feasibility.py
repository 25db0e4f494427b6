"""What a study's ended trials say of the memory that its next ones need, and what came of predicting it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qlora_exp.errors import RecordError
from qlora_exp.paths import OutputPaths
from qlora_exp.plan.feasibility import Kin, kin_of
from qlora_exp.records import RunRecord, read_record
from qlora_exp.study.types import TrialRow

MOST_REFUSALS_IN_A_ROW = 100
"""A space of which one trial in a hundred fits is worth narrowing by hand."""


class Experience:
    """The records of a study's ended trials, each read once. They are the only place where experience is kept: every
    worker, and whoever resumes the study, derives the same corrections from them."""

    def __init__(self, outputs: OutputPaths) -> None:
        self._outputs = outputs
        self._records: dict[str, RunRecord | None] = {}

    def kin(self, trials: Iterable[TrialRow], bound_bytes: int | None) -> tuple[Kin, ...]:
        """As :func:`~qlora_exp.plan.feasibility.kin_of` has it."""
        return kin_of((record for _, record in self.records(trials)), bound_bytes)

    def records(self, trials: Iterable[TrialRow]) -> Iterator[tuple[TrialRow, RunRecord]]:
        """Ended trials with what their runs left; those without a run, or whose record can't be read, are left out."""
        for trial in trials:
            if trial.run_id is not None and trial.status is not None:
                if trial.run_id not in self._records:
                    self._records[trial.run_id] = self._read(trial.run_id)
                record = self._records[trial.run_id]
                if record is not None:
                    yield trial, record

    def _read(self, run_id: str) -> RunRecord | None:
        try:
            return read_record(self._outputs.run(run_id).record)
        except RecordError:
            return None
