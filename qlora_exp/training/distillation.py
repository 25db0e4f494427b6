"""The loss of distillation: a teacher's probabilities of each learned token next to the row's own answer.

A teacher's distribution is kept as its ``k`` most likely tokens; all others are one more outcome, with what is left of
the probability. The student's is taken over the same outcomes, so the divergence is a lower bound of the one over the
whole vocabulary, and equal to it if the vocabulary has no more than ``k`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_exp.config.enums import Divergence
from qlora_exp.config.shipping import DistillationConfig

ITEM = "item"
"""Column of a training row: its place among the items."""
TEACHER_TOKENS, TEACHER_LOG_PROBS = "teacher_tokens", "teacher_log_probs"
"""Keys of a batch, one row for each learned token: the teacher's likely tokens and their log-probabilities."""
SMALLEST_REST = 1e-9


@dataclass(frozen=True)
class TeacherTargets:
    """What the teacher says of the learned tokens of all items: ``tokens`` and ``log_probs`` (learned tokens, k), and
    where an item's begin (``starts``, items + 1)."""

    starts: Tensor
    tokens: Tensor
    log_probs: Tensor

    def of(self, items: Sequence[int]) -> dict[str, Tensor]:
        """Return the targets of these items, one after the other, as keys of a batch."""
        rows = torch.cat([torch.arange(int(self.starts[item]), int(self.starts[item + 1])) for item in items])
        return {TEACHER_TOKENS: self.tokens[rows].long(), TEACHER_LOG_PROBS: self.log_probs[rows].float()}


def top_log_probs(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the ``k`` most likely tokens and their log-probabilities, (rows, k) each, of softened logits (rows,
    vocabulary)."""
    log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
    values, tokens = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1)
    return tokens, values


def divergences(logits: Tensor, tokens: Tensor, teacher: Tensor, settings: DistillationConfig) -> Tensor:
    """Return the divergence of each row in nats, times the temperature's square (Hinton et al. 2015).

    Args:
        logits: the student's, (rows, vocabulary).
        tokens: the teacher's likely tokens, (rows, k), and ``teacher``, their log-probabilities, softened already.
    """
    student = torch.log_softmax(logits.float() / settings.temperature, dim=-1).gather(-1, tokens)
    p, q = teacher, student
    if tokens.shape[-1] < logits.shape[-1]:
        p, q = (torch.cat([kept, _rest(kept)], dim=-1) for kept in (teacher, student))
    if settings.divergence is Divergence.forward:
        found = _kl(p, q)
    elif settings.divergence is Divergence.reverse:
        found = _kl(q, p)
    else:
        mixture = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
        found = (_kl(p, mixture) + _kl(q, mixture)) / 2
    return found * settings.temperature**2


def _rest(log_probs: Tensor) -> Tensor:
    """Return the log-probability of all tokens that aren't kept, (rows, 1)."""
    return torch.log((1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=SMALLEST_REST))


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


@dataclass(frozen=True)
class DistilledTokens:
    """The teacher's targets of one micro-batch, for the loss."""

    settings: DistillationConfig
    tokens: Tensor
    log_probs: Tensor

    @staticmethod
    def of(settings: DistillationConfig | None, inputs: dict[str, Any]) -> DistilledTokens | None:
        """Return those of a batch; ``None`` if it has none (validation)."""
        if settings is None or TEACHER_TOKENS not in inputs:
            return None
        return DistilledTokens(settings, inputs[TEACHER_TOKENS], inputs[TEACHER_LOG_PROBS])

    def mixed(self, log_probs: Tensor, logits: Tensor) -> Tensor:
        """Return, for each token, gold weight × its log-probability − (1 − gold weight) × divergence."""
        gold = self.settings.gold_weight
        far = divergences(logits, self.tokens, self.log_probs, self.settings)
        return gold * log_probs - (1 - gold) * far.to(log_probs.dtype)
