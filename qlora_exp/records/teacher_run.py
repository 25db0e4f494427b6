"""What a run's record says of its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_exp.records.types import Scores


@dataclass(frozen=True)
class TeacherRun:
    """The run from whose probabilities a student learned."""

    run_id: str
    fingerprint: str
    """SHA-256 of its base and of what it trained."""
    parameters: int | None
    split: str | None
    """The split of its scores below; ``None``: it has none."""
    items: int | None
    loss_per_item: float | None
    loss: float | None
    accuracy: float | None

    def score(self, name: str) -> float | None:
        """Return its score ``name`` if it is one of those that are kept."""
        return getattr(self, name, None) if name in ("loss_per_item", "loss", "accuracy") else None


def teacher_run(run_id: str, fingerprint: str, parameters: int | None, scores: Scores | None) -> TeacherRun:
    """Return what a record keeps of a teacher with these scores."""
    if scores is None:
        return TeacherRun(run_id, fingerprint, parameters, None, None, None, None, None)
    kept = (scores.split, scores.items, scores.loss_per_item, scores.loss, scores.accuracy)
    return TeacherRun(run_id, fingerprint, parameters, *kept)
