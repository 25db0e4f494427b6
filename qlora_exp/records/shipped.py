"""What a run's record says of the model that ships."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shipped:
    """The model that ships, which was scored (``ship``, or ``training.qat``)."""

    model: str
    """``trained``, ``merged`` or ``merged_into_dequantized``."""
    format: str | None
    """E.g. ``int4_asym_g64``; ``None``: 16 bits, or the trained model's own quantization."""
    bits_per_weight: float | None
    """Of the rounded layers, with scales and zero points."""
    bytes: int
    """Packed layers, and all other weights in 16 bits; of the trained model its base and a 16-bit adapter."""
