"""How a run reports progress and how it ends early: observer, pruning check, and the status of each exception.

Imports no ML library: runs without training use it, too.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from qlora_exp.analysis.pilots import MAX_BEHIND
from qlora_exp.records.types import PilotLoss, Status
from qlora_exp.system.device_errors import is_out_of_memory


@dataclass(frozen=True)
class PruneCheck:
    """Called after each validation, or with a ladder's pilot after the step at which pilots are compared; returns True
    if the pruner stops the trial."""

    ask: Callable[[int, float, Sequence[float] | None], bool]
    """``ask(step, validation_loss, items) -> stop?``; ``items``: nats per validation item, in order, or ``None``."""
    per_item: bool = False
    """Whether the pruner uses ``items``; if not, they are ``None``."""
    pilot: bool = False
    """The run is a ladder's pilot: instead of validation losses, ``ask`` gets the training loss at the step at which
    pilots are compared, once then and again whenever a later loss is logged."""


no_pruning = PruneCheck(lambda step, loss, items: False)


class Observer(Protocol):
    """Gets a run's progress: a progress bar, a log, a tracker. It must not slow or stop the run."""

    def phase(self, name: str) -> None: ...

    def step(self, step: int, total: int, metrics: dict[str, float]) -> None: ...

    def note(self, text: str) -> None: ...


class NullObserver:
    """An observer that does nothing."""

    def phase(self, name: str) -> None:
        return

    def step(self, step: int, total: int, metrics: dict[str, float]) -> None:
        return

    def note(self, text: str) -> None:
        return


class Diverged(Exception):
    """A loss, gradient or weight is no longer finite."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"{what} is not finite at step {step}")
        self.step = step


class Pruned(Exception):
    """The pruner stopped this run."""

    def __init__(self, step: int, pilot_loss: PilotLoss | None = None) -> None:
        """``pilot_loss``: of a ladder's pilot, because of which it was stopped."""
        why = ""
        if pilot_loss is not None:
            why = f": its training loss up to step {pilot_loss.step}, {pilot_loss.loss:.4g} nats per token, is more "
            why += f"than {MAX_BEHIND:.0%} above another pilot's of this rank (sweep.ladder.stop_pilots)"
        super().__init__(f"stopped by the pruner at step {step}{why}")
        self.step = step


class Interrupted(Exception):
    """The user stopped the run, after a checkpoint at ``step``."""

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted at step {step}")
        self.step = step


def status_of(error: BaseException) -> Status:
    """Return the status of a run that ``error`` ended."""
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return Status.INTERRUPTED
    if isinstance(error, Pruned):
        return Status.PRUNED
    if isinstance(error, Diverged):
        return Status.DIVERGED
    return Status.OUT_OF_MEMORY if is_out_of_memory(error) else Status.FAILED


DISK_FULL_MESSAGES = (
    *("No space left on device", "os error 28", "Disk quota exceeded", "os error 122"),
    *("PytorchStreamWriter failed writing", "database or disk is full"),
)
"""Messages of Python, safetensors, torch and SQLite about a full disk."""


def is_disk_full(error: BaseException | str) -> bool:
    """Return whether a full disk or quota caused ``error`` (an exception, or the message of a recorded failure)."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(sign in str(error) for sign in DISK_FULL_MESSAGES)
