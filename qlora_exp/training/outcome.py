"""How a run is watched and how it may end early: the observer, the study's question, and which exception is which
status. Light: a run that trains nothing needs it too."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from qlora_exp.records.types import Status


@dataclass(frozen=True)
class PruneCheck:
    """Whom a training asks after each validation whether to stop."""

    ask: Callable[[int, float, Sequence[float] | None], bool]
    """``ask(step, validation_loss, items) -> stop?``; ``items``: nats per validation item, in their order."""
    per_item: bool = False
    """Whether ``items`` are wanted; ``None`` is given otherwise."""


no_pruning = PruneCheck(lambda step, loss, items: False)


class Observer(Protocol):
    """Who is told how a run goes: a progress bar, a log, a tracker. None of them may slow or stop it."""

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
    """A loss or gradient that is no longer finite."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"{what} is not finite at step {step}")
        self.step = step


class Pruned(Exception):
    """The study asked this run to stop."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped by the study at step {step}")
        self.step = step


class Interrupted(Exception):
    """The user asked to stop; the state was saved first. ``step``: where it can go on."""

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted at step {step}")
        self.step = step


def status_of(error: BaseException) -> Status:
    """The status of a run that ``error`` ended."""
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return Status.INTERRUPTED
    if isinstance(error, Pruned):
        return Status.PRUNED
    if isinstance(error, Diverged):
        return Status.DIVERGED
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _no_memory(error):
        return Status.OUT_OF_MEMORY
    return Status.FAILED


def _no_memory(error: BaseException) -> bool:
    told = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in told or "can't allocate memory" in told)


NO_SPACE = (
    *("No space left on device", "os error 28", "Disk quota exceeded", "os error 122"),
    *("PytorchStreamWriter failed writing", "database or disk is full"),
)
"""How Python, safetensors, torch and SQLite tell of a full disk."""


def disk_full(error: BaseException | str) -> bool:
    """Whether a full disk (or quota) is why something could not be written. ``str``: a recorded failure's message."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(sign in str(error) for sign in NO_SPACE)
