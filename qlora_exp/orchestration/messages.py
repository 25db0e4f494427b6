"""Messages between a worker and its trial process: one JSON object per line, over pipes."""

from __future__ import annotations

import json
from dataclasses import dataclass

from qlora_exp.errors import RecordError
from qlora_exp.estimate.memory_fit import MemoryLimit
from qlora_exp.records.fit_types import SkippedTrial
from qlora_exp.records.schema import from_dict, to_dict
from qlora_exp.records.types import Trial

PRELOADED = {"training": ("qlora_exp.runs.pipeline",), "tracking": ("qlora_exp.tracking.run",)}
"""Modules that a trial process imports before it is ready, by the name that its worker gives."""


@dataclass(frozen=True)
class RunTrial:
    """To the trial process: run this trial."""

    overrides: tuple[str, ...]
    output_root: str
    run_id: str
    resume: bool
    """The run has a record already: continue it."""
    trial: Trial
    micro_batch: dict[str, int]
    """Keys of ``training`` and their values, which replace the configuration's after memory ran out."""
    per_item: bool
    """Whether a :class:`PruneRequest` must contain the loss of each item."""
    memory: MemoryLimit | None = None
    """What a new run must fit into; ``None``: as its configuration says."""
    pilot: bool = False
    """Whether the run is a ladder's pilot that may be stopped: a :class:`PruneRequest` then has its training loss."""


@dataclass(frozen=True)
class PruneReply:
    """To the trial process: whether to stop the run, because the study prunes it."""

    stop: bool


@dataclass(frozen=True)
class EndProcess:
    """To the trial process: finish logging to MLflow and exit."""


@dataclass(frozen=True)
class Ready:
    """From the trial process: all imports are done."""


@dataclass(frozen=True)
class PhaseChanged:
    """From the trial process: the run's next phase."""

    name: str


@dataclass(frozen=True)
class Step:
    """From the trial process: a training step. ``metrics`` as in curve.jsonl."""

    step: int
    total: int
    metrics: dict[str, float | None]


@dataclass(frozen=True)
class Progress:
    """From the trial process: ``done`` of ``total`` ``unit`` (e.g. "items scored") in the current phase. It is a sign
    of life, too: scoring can take longer than ``workers.hang_seconds``."""

    done: int
    total: int
    unit: str


@dataclass(frozen=True)
class Note:
    """From the trial process: a note on the run."""

    text: str


@dataclass(frozen=True)
class PruneRequest:
    """From the trial process: the validation loss at a step; it waits for the :class:`PruneReply`. ``items``: nats per
    item."""

    step: int
    value: float | None
    items: tuple[float, ...] | None


@dataclass(frozen=True)
class TrialEnded:
    """From the trial process: the run's record is written and says how it ended."""


@dataclass(frozen=True)
class UserError:
    """From the trial process: wrong input; there may be no record."""

    kind: str
    what: str
    where: str | None
    hint: str | None


@dataclass(frozen=True)
class TrialRefused:
    """From the trial process: the run was not started, because it is predicted not to fit."""

    what: str
    skipped: SkippedTrial


@dataclass(frozen=True)
class DiskFull:
    """From the trial process: not even the record could be written."""

    error: str


Command = RunTrial | PruneReply | EndProcess
Message = (
    Ready | PhaseChanged | Step | Progress | Note | PruneRequest | TrialEnded | UserError | TrialRefused | DiskFull
)
_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        RunTrial,
        PruneReply,
        EndProcess,
        Ready,
        PhaseChanged,
        Step,
        Progress,
        Note,
        PruneRequest,
        TrialEnded,
        UserError,
        TrialRefused,
        DiskFull,
    )
}


def encode_message(message: Command | Message) -> bytes:
    """Return the message as one line, with its newline. Numbers that aren't finite become null."""
    return json.dumps({"message": type(message).__name__, **to_dict(message)}).encode() + b"\n"


def decode(line: bytes) -> Command | Message:
    """Return the message in a line.

    Raises:
        RecordError: the line is not a message.
    """
    try:
        raw = json.loads(line)
        kind = _KINDS[raw.pop("message")]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise RecordError(f"not a message: {line[:200]!r}", "between worker and trial process") from None
    message: Command | Message = from_dict(kind, raw, kind.__name__)
    return message
