"""What a run's record says of its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_exp.records.types import Scores


@dataclass(frozen=True)
class TeacherRun:
    """The run, or the untuned model, from which a student learned."""

    run_id: str | None
    """``None``: an untuned model."""
    fingerprint: str
    """SHA-256 of its base and of what it trained."""
    parameters: int | None
    split: str | None
    """The split of its scores below; ``None``: it has none."""
    items: int | None
    loss_per_item: float | None
    loss: float | None
    accuracy: float | None
    model: str | None = None
    """Name of an untuned model."""
    quantization: str | None = None
    """How its base was quantized for the student; ``None``: as the run was trained."""

    @property
    def name(self) -> str:
        """Return its short name: the end of the run's id, or the model's."""
        name = self.run_id[-4:] if self.run_id is not None else (self.model or "?").rpartition("/")[2]
        return f"{name} in {self.quantization}" if self.quantization is not None else name

    def score(self, name: str) -> float | None:
        """Return its score ``name`` if it is one of those that are kept."""
        return getattr(self, name, None) if name in ("loss_per_item", "loss", "accuracy") else None


@dataclass(frozen=True)
class StudentAgreement:
    """How close a student is to its teacher after training."""

    items: int
    """Items of the scored split that both answered."""
    equal_answers: float | None
    """Share of these items with the same answer; ``None`` if the answers aren't kept."""
    kl_nats_per_token: float
    """KL(teacher || student) of the validation items' learned tokens, over the teacher's ``top_k`` likely tokens and
    one outcome for all others: a lower bound of the divergence over the whole vocabulary."""
    tokens: int
    """Learned tokens of the validation items."""


def teacher_run(
    run_id: str | None,
    fingerprint: str,
    parameters: int | None,
    scores: Scores | None,
    model: str | None = None,
    quantization: str | None = None,
) -> TeacherRun:
    """Return what a record keeps of a teacher with these scores."""
    own = {"run_id": run_id, "fingerprint": fingerprint, "parameters": parameters}
    names = ("split", "items", "loss_per_item", "loss", "accuracy")
    kept = {name: getattr(scores, name) if scores is not None else None for name in names}
    return TeacherRun(**own, **kept, model=model, quantization=quantization)  # type: ignore[arg-type]
