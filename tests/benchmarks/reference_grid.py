"""Every rank with every seed, for the replay of the rank decision (docs/replay.md): pilots first, then the grid.

    OMP_NUM_THREADS=1 python tests/benchmarks/reference_grid.py --output /tmp/reference_grid [--workers 2]

Ranks 1 … 256, eight grid seeds and eight disjoint replay seeds, fp32, alpha = 2r, all linear layers. A rank's learning
rate is chosen by the ladder's own code from pilots on the validation split, whose seed is in neither pool. Each stage
is a study of its own: killed and started again, it goes on. Seeds come one after the other, the pools in turn, so that
what is there after a while is a smaller grid. ``python -m qlora_exp.analysis.replay --collect`` makes the data file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_exp.paths import OutputPaths
from qlora_exp.records import read_record
from qlora_exp.study.ladder import LadderTrial, Point, choose
from qlora_exp.study.ladder_plan import RANK, RATE, SEED, SPLIT, ranks_of
from qlora_exp.study.ladder_runs import trials_of
from qlora_exp.study.types import LadderSpec, OneLadder

GRID_SEEDS, REPLAY_SEEDS, PILOT_SEED = range(1, 9), range(101, 109), 1000
CENTRE_AT_8 = 4e-3
"""Twice that of the default 80 steps × 32: 32 steps × 16 want larger ones."""
SPEC = LadderSpec(
    r_start=1,
    r_max=256,
    seeds=len(GRID_SEEDS),
    first_seed=GRID_SEEDS[0],
    pilot_seed=PILOT_SEED,
    margin=0.05,
    half_zone=None,
    lr_policy="search",
    lr_factors=(0.5, 1.0, 2.0),
    ladders=(OneLadder(axes={}, learning_rate=CENTRE_AT_8 * 8**0.5, rate_exponent=-0.5, alpha="2r"),),
)
SETTINGS: dict[str, Any] = {
    "seed": 1,
    "training": {"device": "cpu", "threads": 1, "batch_size": 16, "max_steps": 32},
    "evaluation": {"before": False, "generate": False, "forgetting": False, "baselines": False},
    # kind: generation leaves out the options' likelihoods, most of the scoring: only the loss is needed here.
    "task": {"kind": "generation", "goal": None, "max_test_items": 500},
}
PILOT_ITEMS, UNUSED_ITEMS = 250, 16
"""Validation items: of pilots, and of grid runs, which are scored on them as well and where nobody reads it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    root = given.output.resolve()
    one = SPEC.ladders[0]
    for stage in ("pilots", "pilots_beyond"):
        needs = [point for rank in ranks_of(SPEC) for point in choose(SPEC, one, pilots_in(root), rank)[1]]
        run_stage(root, stage, needs, PILOT_ITEMS, given.workers)
    chosen = {rank: choose(SPEC, one, pilots_in(root), rank)[0] for rank in ranks_of(SPEC)}
    rates = {rank: choice.learning_rate for rank, choice in chosen.items() if choice is not None}
    seeds = [seed for pair in zip(GRID_SEEDS, REPLAY_SEEDS, strict=True) for seed in pair]
    points = [{RANK: rank, SEED: seed, RATE: rate, SPLIT: "test"} for seed in seeds for rank, rate in rates.items()]
    run_stage(root, "grid", points, UNUSED_ITEMS, given.workers)


def pilots_in(root: Path) -> list[LadderTrial]:
    outputs = OutputPaths.of(str(root))
    records = [read_record(path) for path in sorted(root.glob("runs/*-pilots*/record.json"))]
    return trials_of(records, outputs)


def run_stage(root: Path, name: str, points: Sequence[Point], validation_items: int, workers: int) -> None:
    """A sweep over ``points``; it goes on where it was begun, then with the points of its file."""
    path = root / "sweeps" / f"reference_{name}.yaml"
    if not path.exists():
        if not points:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sweep_file(name, points, validation_items), encoding="utf-8")
    command = [sys.executable, "-m", "qlora_exp", "-m", f"sweeps=reference_{name}", f"workers.count={workers}"]
    subprocess.run([*command, f"output_root={root}", "tracking=off"], cwd=root, check=True, env=dict(os.environ))


def sweep_file(name: str, points: Sequence[Point], validation_items: int) -> str:
    """JSON is YAML."""
    values = {key: sorted({point[key] for point in points}) for key in (RANK, SEED, RATE, SPLIT)}
    params = {key: ",".join(map(str, values[key])) for key in (RANK, SEED, SPLIT)}
    params[RATE] = f"tag(log,interval({values[RATE][0] / 2:.4g},{values[RATE][-1] * 2:.4g}))"
    settings = {
        "defaults": [{"override /targets": "all_linear"}, {"override /quantization": "fp32"}],
        "sweep": {
            "name": name,
            "sampler": "random",
            "n_trials": len(points),
            "params": params,
            "enqueue": list(points),
        },
        **SETTINGS,
        "task": {**SETTINGS["task"], "max_validation_items": validation_items},
    }
    return f"# @package _global_\n# The reference grid's {name}\n{json.dumps(settings, indent=1)}\n"


if __name__ == "__main__":
    main()
