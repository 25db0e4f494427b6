"""A reference grid with known gains."""

from __future__ import annotations

import numpy as np

from qlora_exp.analysis.error_rates.replay import ReferenceGrid

RANKS, SEEDS, ITEMS = (1, 2, 4, 8, 16), 8, 200
GAINS = (0.5, 0.3, 0.01, 0.01)


def made_up_grid(
    gains: tuple[float, ...] = GAINS, seed_sd: float = 0.01, item_sd: float = 0.1, seed: int = 0
) -> ReferenceGrid:
    """Known gains; ``seed_sd`` and ``item_sd`` are of a difference of two ranks."""
    rng = np.random.default_rng(seed)
    levels = 3 - np.cumsum([0.0, *gains])[:, None, None]
    by_item = rng.normal(0, 0.5, ITEMS) + rng.normal(0, item_sd / np.sqrt(2), (len(RANKS), 1, ITEMS))
    pools = []
    for _ in range(2):
        by_seed = rng.normal(0, seed_sd / np.sqrt(2), (len(RANKS), SEEDS, 1))
        pools.append(levels + by_item + by_seed + rng.normal(0, 0.01, (len(RANKS), SEEDS, ITEMS)))
    flops = np.array(RANKS, dtype=float) + 100
    return ReferenceGrid(RANKS, pools[0], pools[1], flops, 3 * flops, {"note": "made up"})
