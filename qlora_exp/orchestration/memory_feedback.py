"""What a study's ended trials say of the memory that its next ones need, and what came of predicting it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qlora_exp.errors import RecordError
from qlora_exp.estimate.memory_fit import MemoryCorrection, corrections, measured_of
from qlora_exp.estimate.throughput import achieved_flops_per_second
from qlora_exp.formatting import bytes_text
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.types import Fit, RunRecord, SkippedTrial, Status
from qlora_exp.study.types import TrialRow

MAX_CONSECUTIVE_SKIPS = 100
"""A space of which one trial in a hundred fits is worth narrowing by hand."""


@dataclass(frozen=True)
class MemoryPredictionSummary:
    """What predicting its trials' memory came to in one study. Bytes and seconds."""

    bound_bytes: int
    """Of the last trial that was not started; where all were, of the last that was predicted."""
    refused: int
    """Trials that were not started."""
    seconds_saved: float | None
    """What their trainings were predicted to take, at the rate of the trainings that ended where any did; ``None``
    where that isn't known for all of them."""
    near_the_edge: int
    """Trials that were started though they might not fit: predicted within the prediction's error of the bound."""
    near_the_edge_out_of_memory: int
    out_of_memory: int
    """Trials that ran out of memory though they were predicted to fit."""
    beyond_the_bound: int
    """Trials that ended with a measured peak above the bound."""
    compared: int
    """Trials with a prediction, and an end that says whether it was right."""

    @property
    def wrong(self) -> int:
        return self.near_the_edge_out_of_memory + self.out_of_memory + self.beyond_the_bound

    @property
    def sentence(self) -> str:
        """All of it in words."""
        trials, were = ("trial", "was") if self.refused == 1 else ("trials", "were")
        told = f"{self.refused} {trials} predicted not to fit into {bytes_text(self.bound_bytes)} {were} not started"
        if self.seconds_saved is not None and self.seconds_saved >= 1:
            told += f" (about {self.seconds_saved:,.0f} s of training)"
        told += f"; predictions wrong: {self.wrong} of {self.compared}"
        if self.near_the_edge or self.wrong:
            told += f" (out of memory: {self.near_the_edge_out_of_memory} of {self.near_the_edge} tried near the bound,"
            told += f" {self.out_of_memory} of the others; peak above the bound: {self.beyond_the_bound})"
        return told


class MemoryFeedback:
    """The records of a study's ended trials, each read once. They are the only place where experience is kept: every
    worker, and whoever resumes the study, derives the same corrections from them."""

    def __init__(self, outputs: OutputPaths) -> None:
        self._outputs = outputs
        self._records: dict[str, RunRecord | None] = {}

    def kin(self, trials: Iterable[TrialRow], bound_bytes: int | None) -> tuple[MemoryCorrection, ...]:
        """As :func:`~qlora_exp.estimate.memory_fit.corrections` has it."""
        return corrections((record for _, record in self.records(trials)), bound_bytes)

    def records(self, trials: Iterable[TrialRow]) -> Iterator[tuple[TrialRow, RunRecord]]:
        """Ended trials with what their runs left; those without a run, or whose record can't be read, are left out."""
        for trial in trials:
            if trial.run_id is not None and trial.status is not None:
                if trial.run_id not in self._records:
                    self._records[trial.run_id] = self._read(trial.run_id)
                record = self._records[trial.run_id]
                if record is not None:
                    yield trial, record

    def predicted(self, trials: Sequence[TrialRow]) -> MemoryPredictionSummary | None:
        """``None`` where nothing was predicted: nothing limited the trials' memory."""
        pairs = list(self.records(trials))
        admitted = [(trial, record, record.fit) for trial, record in pairs if record.fit is not None]
        refusals = [trial.refusal for trial in trials if trial.refusal is not None]
        fits = [*(fit for _, _, fit in admitted), *(refusal.fit for refusal in refusals)]
        if not fits:
            return None
        edge = [(trial, record) for trial, record, fit in admitted if fit.near_the_edge]
        clear = [(trial, record) for trial, record, fit in admitted if not fit.near_the_edge]
        out = [ran_out_of_memory(trial, record) for trial, record, _ in admitted]
        measured = [exceeded_limit(record, fit) for _, record, fit in admitted]
        return MemoryPredictionSummary(
            bound_bytes=fits[-1].bound_bytes,
            refused=len(refusals),
            seconds_saved=_seconds_saved(refusals, [record for _, record in pairs]),
            near_the_edge=len(edge),
            near_the_edge_out_of_memory=sum(ran_out_of_memory(*one) for one in edge),
            out_of_memory=sum(ran_out_of_memory(*one) for one in clear),
            beyond_the_bound=sum(bool(above and not was) for above, was in zip(measured, out, strict=True)),
            compared=sum(was or above is not None for above, was in zip(measured, out, strict=True)),
        )

    def _read(self, run_id: str) -> RunRecord | None:
        try:
            return read_record(self._outputs.run(run_id).record)
        except RecordError:
            return None


def ran_out_of_memory(trial: TrialRow, record: RunRecord) -> bool:
    """Whether memory ran out at least once, also where the trial went on with a smaller micro-batch."""
    return record.status is Status.OUT_OF_MEMORY or trial.out_of_memory_retries > 0


def exceeded_limit(record: RunRecord, fit: Fit) -> bool | None:
    """Whether the measured peak was above the bound; ``None`` where none was measured."""
    measured = measured_of(record)
    return None if measured is None else measured + fit.context_bytes > fit.bound_bytes


def _seconds_saved(refusals: Sequence[SkippedTrial], records: Sequence[RunRecord]) -> float | None:
    rates = [rate for record in records if (rate := achieved_flops_per_second(record)) is not None]
    rate = statistics.harmonic_mean(rates) if rates else None
    seconds = [
        refusal.train_flops / rate if rate and refusal.train_flops else refusal.train_seconds for refusal in refusals
    ]
    known = [one for one in seconds if one is not None]
    return sum(known) if len(known) == len(seconds) else None
