"""Whether a predicted peak fits into a memory limit: of a plan; and of a run, corrected by peaks of similar runs.

Similar runs share the base model, the quantization, the device, and whether rows are padded.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_exp.config.schema import Config
from qlora_exp.errors import ConfigError
from qlora_exp.records.fit_types import Fit, SkippedTrial
from qlora_exp.records.types import KILLED_FOR_MEMORY, Device, Plan, RunRecord, Status

if TYPE_CHECKING:
    from qlora_exp.estimate.peak import Peak

RELATIVE_ERROR = {"cpu": 0.22, "cuda": 0.5}
"""Device → the largest relative error of a predicted peak.

On a CPU: over the configurations in docs/plan_accuracy.md that weren't used for fitting, in either of two processes,
without the one with experts in 16 bit. On CUDA nothing has been compared, and the figure is a guess.
"""
BORDERLINE_NOTES = {
    "cpu": f"predictions were off by up to {100 * RELATIVE_ERROR['cpu']:.0f} %",
    "cuda": f"the error of predictions on GPUs is not measured yet: {100 * RELATIVE_ERROR['cuda']:.0f} % is a guess",
}
"""Device → what is known about the error of a predicted peak."""
MEASURED_PEAKS = (Status.COMPLETED, Status.PRUNED)
OTHER_PROCESSES_SHARE = 0.5
"""Share of the limit. Predictions err by less than a factor of two."""
NEIGHBOUR_SHARE = 0.05
"""Share of a run's limit. A display or an idle process may use this much of a GPU, and the prediction's error is
larger."""
CPU_PROCESS_BYTES = 720_000_000
"""What a training process on a CPU holds after its imports (``memory.resident_after_imports_bytes``). Measured in
fresh ``qlora-exp run`` of the embedded base in fp32 and nf4: 712 and 721 MB, 671 MB without MLflow. It includes library
pages that several processes share."""


@dataclass(frozen=True)
class FitResult:
    """``fits`` is ``None`` if no memory limit is known. ``borderline``: the limit lies within the prediction's
    error."""

    fits: bool | None
    borderline: bool
    reason: str


def planned_fit(
    peak: Peak,
    exact_bytes: int,
    device_kind: str,
    fit_bytes: int | None,
    budget_bytes: int | None,
    device_bytes: int | None,
) -> FitResult:
    """Compare a plan's peak with the limit: ``fit_bytes`` (``--fit SIZE``), else ``budget.memory_bytes``, else the
    device's memory.

    ``exact_bytes``: the part of the peak that is exact. On a CPU, ``budget.memory_bytes`` limits only what training
    adds; the other limits include what the process holds after its imports.
    """
    from qlora_exp.formatting import bytes_text  # loads Rich

    on_cpu, peak_bytes, base_bytes = device_kind == "cpu", peak.needed_bytes, peak.base.total_bytes
    limit = next((size for size in (fit_bytes, budget_bytes, device_bytes) if size is not None), None)
    needs = f"needs {bytes_text(peak_bytes)}"
    if limit is None:
        return FitResult(None, False, f"{needs}; no card is named (plan.device=CARD, --fit SIZE)")
    process = CPU_PROCESS_BYTES if on_cpu and (fit_bytes is not None or budget_bytes is None) else 0
    if process:
        needs = f"needs {bytes_text(process + peak_bytes)} ({bytes_text(process)} after imports)"
    elif on_cpu:
        needs = f"{needs} beyond the process after imports,"
    message, available = f"{needs} of {bytes_text(limit)}", limit - process
    if base_bytes > available:
        base = f", the base alone {bytes_text(base_bytes)}" if available > 0 else ""
        return FitResult(False, False, f"{message}{base}")
    factor = 1.0 + RELATIVE_ERROR[device_kind]
    if exact_bytes <= available and available / factor < peak_bytes <= available * factor:
        return FitResult(peak_bytes <= available, True, f"borderline: {message}; {BORDERLINE_NOTES[device_kind]}")
    return FitResult(peak_bytes <= available, False, message)


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run is predicted to need. Bytes as in ``records.types.Fit``; other fields as in ``SkippedTrial``."""

    peak_bytes: int
    context_bytes: int
    train_seconds: float | None
    train_flops: float | None
    exact_bytes: int = 0
    """The part of ``peak_bytes`` that is exact: base, adapters, optimizer."""


@dataclass(frozen=True)
class MemoryCorrection:
    """What ended runs with one correction key say about the next one."""

    key: str
    ratio: float
    """Measured / predicted peak."""
    count: int
    """The number of measured peaks behind ``ratio``."""
    ran_out_bytes: int | None
    """The smallest predicted peak that ran out of memory, among those larger than every peak that fitted."""


@dataclass(frozen=True)
class MemoryLimit:
    """The memory that a run must fit into.

    ``limit_bytes``: ``budget.memory_bytes``; ``None``: the device's memory divided by ``hosts``, the trial hosts that
    share it. ``corrections``: those from similar runs. ``force``: start runs that are predicted not to fit.
    """

    limit_bytes: int | None
    hosts: int
    corrections: tuple[MemoryCorrection, ...]
    allow_borderline: bool
    """Whether a run may start if its peak exceeds the limit by less than the prediction's error."""
    halvings: int
    """How often a trial's micro-batch may be halved to make it fit."""
    force: bool = False


class PredictedOutOfMemory(ConfigError):
    """The run is predicted to need more memory than its limit."""

    def __init__(self, what: str, where: str, hint: str, skipped: SkippedTrial) -> None:
        super().__init__(what, where, hint)
        self.skipped = skipped


def correction_key(config: Mapping[str, Any], device: Device, padding_free: bool) -> str:
    """Return the key that similar runs share, from a recorded configuration, its device and whether its batches have no
    padding: predictions with and without padding err differently."""
    model, rows = config["model"], "without padding" if padding_free else None
    chosen = (model.get("id"), model.get("instruct_id"), model.get("path"), model.get("instruct_path"))
    parts = (model["family"], model["variant"], *chosen, config["quantization"]["mode"], rows)
    return " ".join(str(part) for part in (*parts, device.kind, device.name) if part is not None)


def memory_limit_bytes(rule: MemoryLimit, device: Device) -> int | None:
    """Return the limit for training, on a CPU without what the process holds after its imports; ``None``: it is
    unknown."""
    if rule.limit_bytes is not None or device.memory_bytes is None:
        return rule.limit_bytes
    share = device.memory_bytes // rule.hosts
    return max(share - CPU_PROCESS_BYTES, 1) if device.kind == "cpu" else share


def next_smaller_micro_batch(micro_batch_size: int, batch_size: int) -> int:
    """Return the largest divisor of the batch size that is at most half the micro-batch, e.g. 1 for 5 of 5, and 3 for 9
    of 9."""
    rows = max(micro_batch_size // 2, 1)
    while batch_size % rows:
        rows -= 1
    return rows


@dataclass(frozen=True)
class SmallerMicroBatch:
    """The next smaller micro-batch. ``key``: ``micro_batch_size`` (rows) or ``micro_batch_tokens``, a key of
    ``training``."""

    key: str
    before: int
    after: int

    @property
    def unit(self) -> str:
        return self.key.removeprefix("micro_batch_").replace("size", "rows")


def smaller_micro_batch(training: Mapping[str, Any], plan: Plan | None) -> SmallerMicroBatch | None:
    """Return about half the micro-batch of a run, with the same batch; ``None`` if it is the smallest.

    ``training``: the section of its configuration. ``plan``: what it ran with; a run without training has none.
    """
    if plan is not None and plan.micro_batch_tokens is not None:
        before, smallest = plan.micro_batch_tokens, plan.longest_row_tokens or 1
        before = min(before, plan.batch_size * smallest)  # a larger one is as large as the batch
        after = max(before // 2, smallest)
        return SmallerMicroBatch("micro_batch_tokens", before, after) if after < before else None
    rows = plan.micro_batch_size if plan is not None else int(training["micro_batch_size"] or training["batch_size"])
    if rows <= 1:
        return None
    return SmallerMicroBatch("micro_batch_size", rows, next_smaller_micro_batch(rows, training["batch_size"]))


def with_micro_batch(config: Config, values: Mapping[str, Any]) -> Config:
    """Return ``config`` with these values of ``training.micro_batch_size`` and ``training.micro_batch_tokens``."""
    return replace(config, training=replace(config.training, **values))


def fit_into(limit_bytes: int, need: MemoryEstimate, rule: MemoryLimit, key: str, device_kind: str) -> tuple[Fit, bool]:
    """Return the prediction with its limit, and whether the run may start.

    A run may not start in three cases, unless the rule forces it:

    * its corrected peak exceeds the limit; with ``allow_borderline``, if it exceeds it by more than the prediction's
      error;
    * its exact part alone exceeds the limit;
    * its predicted peak is at least that of a similar run that ran out of memory. Its corrected peak is then scaled up
      from that run's.
    """
    correction = next(
        (candidate for candidate in rule.corrections if candidate.key == key), MemoryCorrection(key, 1.0, 0, None)
    )
    corrected = correction.ratio * need.peak_bytes + need.context_bytes
    ran_out = correction.ran_out_bytes is not None and need.peak_bytes >= correction.ran_out_bytes
    if correction.ran_out_bytes and ran_out:
        corrected = max(corrected, limit_bytes * need.peak_bytes / correction.ran_out_bytes)
    fit = Fit(
        need.peak_bytes,
        need.context_bytes,
        round(corrected),
        limit_bytes,
        RELATIVE_ERROR[device_kind],
        correction.count,
    )
    tolerance = fit.error if rule.allow_borderline else 0.0
    may_start = not ran_out and fit.excess <= tolerance and need.exact_bytes + need.context_bytes <= limit_bytes
    return fit, may_start or rule.force


def corrections(records: Iterable[RunRecord], limit_bytes: int | None) -> tuple[MemoryCorrection, ...]:
    """Return one correction per key of the ended runs.

    ``ratio`` is the median of measured over predicted peaks. A run that ran out of memory needed more than its limit.
    Its ratio is a lower bound, so it counts only if it lies above the median of the measured ones. If such a run had
    less than ``limit_bytes`` (``None``: the card's memory), it is ignored.
    """
    by_key: dict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        if predicted_peak_of(record) is not None:
            # Records of versions without the field are of padded runs.
            padding_free = record.plan is not None and bool(record.plan.padding_free)
            by_key[correction_key(record.config, record.environment.device, padding_free)].append(record)
    return tuple(_correction(key, similar, limit_bytes) for key, similar in by_key.items())


def predicted_peak_of(record: RunRecord) -> int | None:
    """Return the predicted peak of the run as it ran in the end: its micro-batch may have been halved."""
    planned = record.plan.predicted_peak_train_bytes if record.plan is not None else None
    return planned or (record.fit.peak_bytes if record.fit is not None else None)


def measured_peak_of(record: RunRecord) -> int | None:
    """Return the measured peak that :func:`predicted_peak_of` predicts; ``None`` if it is unknown."""
    return record.memory.train_working_set_bytes if record.status in MEASURED_PEAKS else None


def _correction(key: str, records: Sequence[RunRecord], limit_bytes: int | None) -> MemoryCorrection:
    fitted = [
        (predicted_peak_of(record) or 0, measured_peak_of(record))
        for record in records
        if record.status in MEASURED_PEAKS
    ]
    ratios = [measured / predicted for predicted, measured in fitted if measured and predicted]
    failures = [
        record for record in records if record.status is Status.OUT_OF_MEMORY and _is_informative(record, limit_bytes)
    ]
    median = statistics.median(ratios) if ratios else 1.0
    lower_bounds = [ratio for record in failures if (ratio := _min_ratio(record)) is not None and ratio > median]
    max_fitted = max((predicted for predicted, _ in fitted), default=0)
    ran_out = [predicted for record in failures if (predicted := predicted_peak_of(record)) and predicted > max_fitted]
    ratio = statistics.median([*ratios, *lower_bounds]) if ratios or lower_bounds else 1.0
    return MemoryCorrection(key, ratio, len(ratios), min(ran_out, default=None))


def _is_informative(record: RunRecord, limit_bytes: int | None) -> bool:
    """Return whether a run that ran out of memory tells what similar runs need.

    It doesn't if the kernel killed it although its corrected prediction was far below the limit: other processes may
    have used the memory. Nor does it if other processes are known to have used much of its share of a GPU.
    """
    fit, failure = record.fit, record.failure
    if fit is None:
        return True
    if _taken_by_others(record, fit) > NEIGHBOUR_SHARE * fit.limit_bytes:
        return False
    was_killed = failure is not None and failure.kind == KILLED_FOR_MEMORY
    if was_killed and fit.corrected_bytes < OTHER_PROCESSES_SHARE * fit.limit_bytes:
        return False
    return limit_bytes is None or fit.limit_bytes >= limit_bytes


def _taken_by_others(record: RunRecord, fit: Fit) -> int:
    """Return how many bytes of the run's limit other processes used when the GPU's memory ran out; 0 if unknown."""
    outside, total = record.memory.outside_allocator_bytes, record.environment.device.memory_bytes
    if outside is None or total is None:
        return 0
    neighbours = max(0, outside - fit.context_bytes)
    return max(0, fit.limit_bytes - (total - neighbours))


def _min_ratio(record: RunRecord) -> float | None:
    """Return the lower bound of measured / predicted peak of a run that ran out of memory."""
    predicted, fit = predicted_peak_of(record), record.fit
    return (fit.limit_bytes - fit.context_bytes) / predicted if fit is not None and predicted else None
