"""What a study's ended trials show about the memory that the next ones need, and how good the predictions were."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qlora_exp.errors import RecordError
from qlora_exp.estimate.memory_fit import MemoryCorrection, corrections, measured_peak_of
from qlora_exp.estimate.throughput import achieved_flops_per_second
from qlora_exp.formatting import bytes_text
from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_record
from qlora_exp.records.fit_types import Fit, SkippedTrial
from qlora_exp.records.types import RunRecord, Status
from qlora_exp.study.types import TrialRow

MAX_CONSECUTIVE_SKIPS = 100
"""If fewer than one trial in a hundred fits, the user should narrow the space."""


@dataclass(frozen=True)
class MemoryPredictionSummary:
    """How the memory predictions of one study turned out. Bytes and seconds."""

    limit_bytes: int
    """The limit of the last predicted trial: of the last skipped one, if any."""
    skipped: int
    """Trials that were not started."""
    seconds_saved: float | None
    """Predicted training time of the skipped trials, at the rate of the ended trainings if any; ``None`` if not known
    for all."""
    borderline: int
    """Borderline trials: started although the limit was within the prediction's error."""
    borderline_out_of_memory: int
    """Borderline trials that ran out of memory."""
    out_of_memory: int
    """Trials that ran out of memory although they were clearly predicted to fit."""
    above_limit: int
    """Trials that ended with a measured peak above the limit."""
    compared: int
    """Trials with a prediction, and an end that shows whether it was right."""

    @property
    def wrong(self) -> int:
        return self.borderline_out_of_memory + self.out_of_memory + self.above_limit

    @property
    def sentence(self) -> str:
        """The summary as one sentence."""
        trials, were = ("trial", "was") if self.skipped == 1 else ("trials", "were")
        sentence = (
            f"{self.skipped} {trials} predicted not to fit into {bytes_text(self.limit_bytes)} {were} not started"
        )
        if self.seconds_saved is not None and self.seconds_saved >= 1:
            sentence += f" (about {self.seconds_saved:,.0f} s of training)"
        sentence += f"; predictions wrong: {self.wrong} of {self.compared}"
        if self.borderline or self.wrong:
            borderline = f"{self.borderline_out_of_memory} of {self.borderline} borderline trials"
            others = f"{self.out_of_memory} of the others; peak above the limit: {self.above_limit}"
            sentence += f" (out of memory: {borderline}, {others})"
        return sentence


class MemoryFeedback:
    """The records of a study's ended trials, each read once.

    Corrections are stored nowhere else: every worker, and every later command, derives the same ones from the records.
    """

    def __init__(self, outputs: OutputPaths) -> None:
        self._outputs = outputs
        self._records: dict[str, RunRecord | None] = {}

    def corrections(self, trials: Iterable[TrialRow], limit_bytes: int | None) -> tuple[MemoryCorrection, ...]:
        """Return the memory corrections of the trials' records; see
        :func:`~qlora_exp.estimate.memory_fit.corrections`."""
        return corrections((record for _, record in self.records(trials)), limit_bytes)

    def records(self, trials: Iterable[TrialRow]) -> Iterator[tuple[TrialRow, RunRecord]]:
        """Yield ended trials with their records. Trials without a run or with an unreadable record are left out."""
        for trial in trials:
            if trial.run_id is not None and trial.status is not None:
                if trial.run_id not in self._records:
                    self._records[trial.run_id] = None
                    with contextlib.suppress(RecordError):
                        self._records[trial.run_id] = read_record(self._outputs.run(trial.run_id).record)
                record = self._records[trial.run_id]
                if record is not None:
                    yield trial, record

    def predicted(self, trials: Sequence[TrialRow]) -> MemoryPredictionSummary | None:
        """Return how the predictions turned out; ``None`` if nothing was predicted, since nothing limited the
        memory."""
        pairs = list(self.records(trials))
        admitted = [
            (record.fit, ran_out_of_memory(trial, record), exceeded_limit(record, record.fit))
            for trial, record in pairs
            if record.fit is not None
        ]
        refusals = [trial.skipped for trial in trials if trial.skipped is not None]
        fits = [*(fit for fit, _, _ in admitted), *(refusal.fit for refusal in refusals)]
        if not fits:
            return None
        return MemoryPredictionSummary(
            limit_bytes=fits[-1].limit_bytes,
            skipped=len(refusals),
            seconds_saved=_seconds_saved(refusals, [record for _, record in pairs]),
            borderline=sum(fit.borderline for fit, _, _ in admitted),
            borderline_out_of_memory=sum(ran_out and fit.borderline for fit, ran_out, _ in admitted),
            out_of_memory=sum(ran_out and not fit.borderline for fit, ran_out, _ in admitted),
            above_limit=sum(bool(exceeded) and not ran_out for _, ran_out, exceeded in admitted),
            compared=sum(ran_out or exceeded is not None for _, ran_out, exceeded in admitted),
        )


def ran_out_of_memory(trial: TrialRow, record: RunRecord) -> bool:
    """Return whether memory ran out at least once, even if the trial went on with a smaller micro-batch."""
    return record.status is Status.OUT_OF_MEMORY or trial.out_of_memory_retries > 0


def exceeded_limit(record: RunRecord, fit: Fit) -> bool | None:
    """Return whether the measured peak was above the limit; ``None`` if none was measured."""
    measured = measured_peak_of(record)
    return None if measured is None else measured + fit.context_bytes > fit.limit_bytes


def _seconds_saved(refusals: Sequence[SkippedTrial], records: Sequence[RunRecord]) -> float | None:
    """Return the predicted training time of the skipped trials; ``None`` if it isn't known for all of them."""
    rates = [rate for record in records if (rate := achieved_flops_per_second(record)) is not None]
    rate = statistics.harmonic_mean(rates) if rates else None
    seconds = [
        refusal.train_flops / rate if rate and refusal.train_flops else refusal.train_seconds for refusal in refusals
    ]
    known = [value for value in seconds if value is not None]
    return sum(known) if len(known) == len(seconds) else None
