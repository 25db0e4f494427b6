"""The difference of two shares of right answers on the same items."""

from __future__ import annotations

import math

Z_ONE_SIDED_95 = 1.6449
"""Quantile of the normal distribution for a one-sided 95 % bound."""
Z_TWO_SIDED_95 = 1.96
"""Quantile of the normal distribution for a two-sided 95 % interval."""


def paired_bounds(lost: int, won: int, items: int, z: float = Z_ONE_SIDED_95) -> tuple[float, float]:
    """Return bounds of (lost − won) / items, the difference of two paired shares: one-sided 95 % each, by default.

    Wald's method with half a pair added to each of the four cells (Agresti and Min 2005): without it, no change in 10
    items would count as proof. ``z``: quantile of the normal distribution.
    """
    n = items + 2
    difference = (lost - won) / n
    error = math.sqrt(lost + won + 1 - (lost - won) ** 2 / n) / n
    return difference - z * error, difference + z * error
