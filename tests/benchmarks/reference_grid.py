"""Every rank with every seed, for the replay of the rank decision (docs/replay.md): pilots first, then the grid.

    OMP_NUM_THREADS=1 python tests/benchmarks/reference_grid.py --output /tmp/reference_grid [--workers 2]

Ranks 1 … 256, eight grid seeds and eight disjoint replay seeds, fp32, alpha = 2r, all linear layers. The learning rate
is chosen at r = 8 from pilots on the validation split, with two seeds that are in neither pool, and carried over to the
other ranks ∝ r^−½, as ``sweep.ladder.lr_policy=carry`` does. Each stage is a separate study: killed and started again,
it continues. Seeds come one after the other, the pools in turn, so that a part of the runs is a smaller grid.
``--collect docs/replay.npz`` writes what has been run to that file, the same number of seeds for both pools, and runs
nothing.
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

import numpy as np

from qlora_exp.analysis.error_rates.replay import ReferenceGrid, save
from qlora_exp.analysis.pilots import SHARE_OF_STEPS, comparison_loss, comparison_step, is_behind
from qlora_exp.paths import OutputPaths
from qlora_exp.rank_doubling.ladder_trials import LadderTrial, ladder_trials
from qlora_exp.rank_doubling.settings import RANK, RATE, SEED, SPLIT, round_rate
from qlora_exp.records.files import read_curve, read_record, training_losses
from qlora_exp.records.types import RunRecord
from qlora_exp.study.proposer import TrialPoint

GRID_SEEDS, REPLAY_SEEDS, PILOT_SEEDS = range(1, 9), range(101, 109), (1000, 1001)
PILOT_RANK = 8
CENTRE_AT_8 = 4e-3
"""Twice that of the default 80 steps × 32: 32 steps × 16 want larger ones."""
FACTORS = (0.5, 1.0, 2.0)
RANKS = tuple(2**step for step in range(9))
SETTINGS: dict[str, Any] = {
    "seed": 1,
    "training": {"device": "cpu", "threads": 1, "batch_size": 16, "max_steps": 32},
    "evaluation": {"before": False, "generate": False, "forgetting": False, "baselines": False},
    # kind: generation leaves out the options' likelihoods, most of the scoring: only the loss is needed here.
    "task": {"kind": "generation", "goal": None, "max_test_items": 500},
}
PILOT_ITEMS, UNUSED_ITEMS = 250, 16
"""Validation items: of pilots, and of grid runs, which are scored on them as well and where nobody reads it."""
VERSIONS = ("torch", "transformers", "peft", "trl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--collect", type=Path, help="write the replay's data file and run nothing")
    given = parser.parse_args()
    root = given.output.resolve()
    if given.collect is not None:
        save(collected(root), given.collect)
        return
    for stage in ("pilots", "pilots_beyond"):
        needs = [
            {RANK: PILOT_RANK, SEED: seed, RATE: rate, SPLIT: "validation"}
            for rate in pilot_rates(root)
            for seed in PILOT_SEEDS
            if rate not in pilot_losses(root)
        ]
        run_stage(root, stage, needs, PILOT_ITEMS, given.workers)
    rates = learning_rates(root)
    seeds = [seed for pair in zip(GRID_SEEDS, REPLAY_SEEDS, strict=True) for seed in pair]
    points = [{RANK: rank, SEED: seed, RATE: rate, SPLIT: "test"} for seed in seeds for rank, rate in rates.items()]
    run_stage(root, "grid", points, UNUSED_ITEMS, given.workers)


def pilot_losses(root: Path) -> dict[float, float]:
    """Return learning rate → mean validation loss, nats per item, over the pilot seeds."""
    by_rate: dict[float, list[float]] = {}
    for trial in trials_in(root, "*-pilots*"):
        after = trial.record.scores.after if trial.record else None
        assert after is not None
        assert after.loss_per_item is not None
        by_rate.setdefault(float(str(trial.params[RATE])), []).append(after.loss_per_item)
    return {rate: float(np.mean(losses)) for rate, losses in by_rate.items() if len(losses) == len(PILOT_SEEDS)}


def pilot_rates(root: Path) -> list[float]:
    """Return the pilots' learning rates: three, and one beyond the edge if the best of them is at the edge."""
    rates = [round_rate(CENTRE_AT_8 * factor) for factor in FACTORS]
    losses = pilot_losses(root)
    if all(rate in losses for rate in rates):
        best = min(rates, key=lambda rate: losses[rate])
        if best == rates[0]:
            rates = [round_rate(best**2 / rates[1]), *rates]
        elif best == rates[-1]:
            rates = [*rates, round_rate(best**2 / rates[-2])]
    return rates


def learning_rates(root: Path) -> dict[int, float]:
    losses = pilot_losses(root)
    best = min(losses, key=lambda rate: losses[rate])
    return {rank: round_rate(best * (rank / PILOT_RANK) ** -0.5) for rank in RANKS}


def trials_in(root: Path, pattern: str) -> list[LadderTrial]:
    records = [read_record(path) for path in sorted(root.glob(f"runs/{pattern}/record.json"))]
    return [trial for trial in ladder_trials(records, OutputPaths.of(str(root))) if trial.completed]


def run_stage(root: Path, name: str, points: Sequence[TrialPoint], validation_items: int, workers: int) -> None:
    """A sweep over ``points``; it goes on where it was begun, then with the points of its file."""
    path = root / "sweeps" / f"reference_{name}.yaml"
    if not path.exists():
        if not points:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sweep_file(name, points, validation_items), encoding="utf-8")
    command = [sys.executable, "-m", "qlora_exp", "-m", f"sweeps=reference_{name}", f"workers.count={workers}"]
    subprocess.run([*command, f"output_root={root}", "tracking=off"], cwd=root, check=True, env=dict(os.environ))


def sweep_file(name: str, points: Sequence[TrialPoint], validation_items: int) -> str:
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


# The data file.


def collected(root: Path) -> ReferenceGrid:
    """Both pools with as many seeds as are whole in each: a seed at which a rank is missing is left out."""
    ranks, trials = RANKS, trials_in(root, "*-grid-*")
    by_run = {(trial.params[RANK], trial.params[SEED]): trial for trial in trials if trial.losses}
    whole = [[seed for seed in pool if all((r, seed) in by_run for r in ranks)] for pool in (GRID_SEEDS, REPLAY_SEEDS)]
    kept = [seeds[: min(map(len, whole))] for seeds in whole]
    if not kept[0]:
        sys.exit(f"no seed has been run at every rank yet in {root}")
    items = list(by_run[ranks[0], kept[0][0]].losses or ())
    assert all(list(trial.losses or ()) == items for trial in by_run.values()), "runs of different items"
    pools = [[[list((by_run[r, seed].losses or {}).values()) for seed in seeds] for r in ranks] for seeds in kept]
    whole_pilots, stopped_pilots = pilots_of_a_ladder(root)
    return ReferenceGrid(
        tuple(ranks),
        *(np.array(pool) for pool in pools),
        np.array([run_flops(by_run[r, kept[0][0]].record, len(items)) for r in ranks]),
        # A ladder from any of the ranks runs its pilots there.
        np.array(
            [
                whole_pilots * run_flops(by_run[r, kept[0][0]].record, PILOT_ITEMS)
                + stopped_pilots * SHARE_OF_STEPS * run_flops(by_run[r, kept[0][0]].record, 0)
                for r in ranks
            ]
        ),
        provenance(root, trials, kept),
    )


def pilots_of_a_ladder(root: Path) -> tuple[int, int]:
    """Return how many of the pilots a ladder runs to their end, and how many it stops at the step of comparison.

    All pilots were run to their end here. In a ladder a pilot that is behind at the comparison stops, and its rate is
    not run with the next pilot seed.
    """
    losses: dict[int, dict[float, float]] = {}
    for trial in trials_in(root, "*-pilots*"):
        assert trial.record is not None
        curve = training_losses(read_curve(OutputPaths.of(str(root)).run(trial.record.run_id).curve))
        step = comparison_step(int(SETTINGS["training"]["max_steps"]), None)
        loss = comparison_loss(curve, step)
        assert loss is not None
        losses.setdefault(int(str(trial.params[SEED])), {})[float(str(trial.params[RATE]))] = loss
    whole = stopped = 0
    left = set(pilot_losses(root))
    for seed in PILOT_SEEDS:
        of_seed = {rate: loss for rate, loss in losses[seed].items() if rate in left}
        behind = {rate for rate, loss in of_seed.items() if is_behind(loss, list(of_seed.values()))}
        whole, stopped, left = whole + len(of_seed) - len(behind), stopped + len(behind), left - behind
        if len(left) == 1:
            break
    return whole, stopped


def run_flops(record: RunRecord | None, items: int) -> float:
    """Training, and a forward pass over ``items`` of the mean length of the training examples."""
    assert record is not None
    plan, tokens = record.plan, record.speed.train_tokens
    assert plan is not None
    assert tokens is not None
    scored = items * tokens / (plan.max_steps * plan.batch_size)
    trained = 4.0 * plan.total_parameters + 6.0 * plan.trainable_parameters
    return trained * tokens + 2.0 * (plan.total_parameters + plan.trainable_parameters) * scored


def provenance(root: Path, trials: Sequence[LadderTrial], kept: Sequence[Sequence[int]]) -> dict[str, Any]:
    records = [trial.record for trial in trials if trial.record is not None]
    first = records[0]
    assert first.plan is not None
    fingerprints = {record.data.fingerprint for record in records if record.data}
    assert len(fingerprints) == 1, "runs of different data"
    return {
        "model": "The embedded base model on the embedded task",
        "model_fingerprint": first.model_fingerprint,
        "data_fingerprint": fingerprints.pop(),
        "quantization": "fp32",
        "targets": "all linear layers",
        "device": "one CPU thread a run",
        "steps": first.plan.max_steps,
        "batch_size": first.plan.batch_size,
        "grid_seeds": list(kept[0]),
        "replay_seeds": list(kept[1]),
        "pilot_seeds": list(PILOT_SEEDS),
        "pilot_rank": PILOT_RANK,
        "pilot_items": PILOT_ITEMS,
        "learning_rates": {str(rank): rate for rank, rate in learning_rates(root).items()},
        "pilots_of_a_ladder": list(pilots_of_a_ladder(root)),
        "pilot_losses": {str(rate): loss for rate, loss in sorted(pilot_losses(root).items())},
        "measured": str(first.started_at)[:10],
        "versions": {name: first.environment.packages[name] for name in VERSIONS},
        "settings": SETTINGS,
    }


if __name__ == "__main__":
    main()
