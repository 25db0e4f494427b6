"""How tokens are drawn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; ``temperature=0`` takes the most likely one. ``top_k``, ``top_p``: ``None`` is no limit."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1
