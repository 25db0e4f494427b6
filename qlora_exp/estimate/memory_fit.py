"""Whether a run fits into memory: its predicted peak, corrected by the measured peaks of its kin, against a bound.

Kin are runs of the same base model in the same quantization on the same device.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_exp.errors import ConfigError
from qlora_exp.records.types import KILLED_FOR_MEMORY, Device, Fit, RunRecord, SkippedTrial, Status

ERROR = {"cpu": 0.22, "cuda": 0.5}
"""Device → the largest error of a predicted peak, as a share: on a CPU of the configurations not fitted to in
docs/plan_accuracy.md, of either of two processes, but for the one with experts in 16 bit; on CUDA nothing has been
compared, and the figure is a guess."""
MEASURED_PEAKS = (Status.COMPLETED, Status.PRUNED)
OTHERS_SHARE = 0.5
"""Of the bound: predictions err by less than a factor of two."""
CPU_PROCESS_BYTES = 590_000_000
"""What a process that trains on a CPU holds after its imports (``memory.resident_after_imports_bytes``): 586 and
587 MB in four fresh ``qlora-exp run`` of the embedded base in fp32 and nf4. Libraries' pages are of it, which several
processes share."""


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run is predicted to need. Bytes as in ``records.types.Fit``; the rest as in ``SkippedTrial``."""

    peak_bytes: int
    context_bytes: int
    train_seconds: float | None
    train_flops: float | None
    exact_bytes: int = 0
    """Of ``peak_bytes`` what is known exactly: base, adapters, optimizer."""


@dataclass(frozen=True)
class MemoryCorrection:
    """What the ended runs of one kin say of the next one."""

    key: str
    ratio: float
    """Measured / predicted peak."""
    count: int
    """Measured peaks behind it."""
    ran_out_bytes: int | None
    """The least predicted peak that ran out of memory, above all that are known to have fitted."""


@dataclass(frozen=True)
class MemoryLimit:
    """What a run must fit into. ``bound_bytes``: ``budget.memory_bytes``; ``None``: the device's memory divided by
    ``hosts``, the trial hosts that share it. ``force``: it runs though it is predicted not to fit."""

    bound_bytes: int | None
    hosts: int
    kin: tuple[MemoryCorrection, ...]
    allow_borderline: bool
    """Whether what is predicted within the prediction's error of the bound may run."""
    halvings: int
    """How often a trial's micro-batch may be halved so that it fits."""
    force: bool = False


class PredictedOutOfMemory(ConfigError):
    """The run is predicted to need more memory than it may take."""

    def __init__(self, what: str, where: str, hint: str, refusal: SkippedTrial) -> None:
        super().__init__(what, where, hint)
        self.refusal = refusal


def correction_key(config: Mapping[str, Any], device: Device) -> str:
    """The kin of a run by its recorded configuration."""
    model = config["model"]
    parts = (model["family"], model["variant"], model.get("path"), config["quantization"]["mode"])
    return " ".join(str(part) for part in (*parts, device.kind, device.name) if part is not None)


def memory_limit_bytes(rule: MemoryLimit, device: Device) -> int | None:
    """What training may need; on a CPU beyond what its process holds after its imports. ``None``: it isn't known."""
    if rule.bound_bytes is not None or device.memory_bytes is None:
        return rule.bound_bytes
    share = device.memory_bytes // rule.hosts
    return max(share - CPU_PROCESS_BYTES, 1) if device.kind == "cpu" else share


def next_smaller_micro_batch(micro_batch_size: int, batch_size: int) -> int:
    """The next smaller micro-batch, half or less, of which a number makes the batch: 1 of 5, 3 of 9."""
    rows = max(micro_batch_size // 2, 1)
    while batch_size % rows:
        rows -= 1
    return rows


def fit_into(bound_bytes: int, need: MemoryEstimate, rule: MemoryLimit, key: str, device_kind: str) -> tuple[Fit, bool]:
    """The prediction beside the bound, and whether the run may start.

    Refused is what is predicted above the bound, by more than the prediction's error where the rule tries the edge;
    what is known exactly not to fit; and whatever is predicted to need as much as one of its kin that ran out of
    memory, at least as much more than the bound as its prediction is more than that one's. Nothing is refused where
    the rule forces it.
    """
    kin = next((one for one in rule.kin if one.key == key), MemoryCorrection(key, 1.0, 0, None))
    corrected = kin.ratio * need.peak_bytes + need.context_bytes
    ran_out = kin.ran_out_bytes is not None and need.peak_bytes >= kin.ran_out_bytes
    if kin.ran_out_bytes and ran_out:
        corrected = max(corrected, bound_bytes * need.peak_bytes / kin.ran_out_bytes)
    fit = Fit(need.peak_bytes, need.context_bytes, round(corrected), bound_bytes, ERROR[device_kind], kin.count)
    tolerated = fit.error if rule.allow_borderline else 0.0
    may_start = not ran_out and fit.excess <= tolerated and need.exact_bytes + need.context_bytes <= bound_bytes
    return fit, may_start or rule.force


def corrections(records: Iterable[RunRecord], bound_bytes: int | None) -> tuple[MemoryCorrection, ...]:
    """What ended runs say, kin by kin.

    ``ratio`` is the median of measured over predicted peaks. A run that ran out of memory needed more than its bound:
    that ratio is counted too where it lies above the median of the measured ones; below, it says nothing. Runs that
    ran out of less than ``bound_bytes`` say nothing of what needs as much (``None``: the card's memory).
    """
    by_key: dict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        if predicted_of(record) is not None:
            by_key[correction_key(record.config, record.environment.device)].append(record)
    return tuple(_kin(key, kin, bound_bytes) for key, kin in by_key.items())


def predicted_of(record: RunRecord) -> int | None:
    """The predicted peak of the run as it was made in the end (a micro-batch may have been halved)."""
    planned = record.plan.predicted_peak_train_bytes if record.plan is not None else None
    return planned or (record.fit.peak_bytes if record.fit is not None else None)


def measured_of(record: RunRecord) -> int | None:
    """The peak that is comparable with :func:`predicted_of`; ``None`` where it isn't known."""
    return record.memory.train_working_set_bytes if record.status in MEASURED_PEAKS else None


def _kin(key: str, records: Sequence[RunRecord], bound_bytes: int | None) -> MemoryCorrection:
    fitted = [(predicted_of(record) or 0, measured_of(record)) for record in records if record.status in MEASURED_PEAKS]
    ratios = [measured / predicted for predicted, measured in fitted if measured and predicted]
    out = [record for record in records if record.status is Status.OUT_OF_MEMORY and _counts(record, bound_bytes)]
    middle = statistics.median(ratios) if ratios else 1.0
    raised = [ratio for record in out if (ratio := _at_least(record)) is not None and ratio > middle]
    most_fitted = max((predicted for predicted, _ in fitted), default=0)
    ran_out = [predicted for record in out if (predicted := predicted_of(record)) and predicted > most_fitted]
    ratio = statistics.median([*ratios, *raised]) if ratios or raised else 1.0
    return MemoryCorrection(key, ratio, len(ratios), min(ran_out, default=None))


def _counts(record: RunRecord, bound_bytes: int | None) -> bool:
    """Whether a run that ran out of memory says what its kin need: not where the kernel ended it, which may do so for
    what other processes took, and it was predicted to need little."""
    fit, failure = record.fit, record.failure
    if fit is None:
        return True
    was_killed = failure is not None and failure.kind == KILLED_FOR_MEMORY
    if was_killed and fit.corrected_bytes < OTHERS_SHARE * fit.bound_bytes:
        return False
    return bound_bytes is None or fit.bound_bytes >= bound_bytes


def _at_least(record: RunRecord) -> float | None:
    """Measured / predicted peak of a run that ran out of memory would have been more."""
    predicted, fit = predicted_of(record), record.fit
    return (fit.bound_bytes - fit.context_bytes) / predicted if fit is not None and predicted else None
