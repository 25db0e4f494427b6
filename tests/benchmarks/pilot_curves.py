"""Pilots with many learning rates, to measure the rule that stops pilots early (docs/statistics.md).

    OMP_NUM_THREADS=1 python tests/benchmarks/pilot_curves.py --output /tmp/pilot_curves [--workers 2]

Each pilot is a run of 40 steps × 16 rows on the embedded pair, to its end: five learning rates at each rank, for two
variants and two seeds. The study continues if it was killed. ``--collect
docs/pilot_curves.csv`` writes what has been run so far to that file and runs nothing.
``python -m qlora_exp.analysis.error_rates.stopped_pilots`` reads it.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_curve
from qlora_exp.records.find import read_runs
from qlora_exp.records.types import Status

RANKS, SEEDS, VARIANTS = (8, 16, 32, 64), (1000, 1001), ("base", "instruct")
CENTRE_AT_8 = 4e-3
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
STEPS = 40
SETTINGS = {
    "training": {"device": "cpu", "threads": 1, "batch_size": 16, "max_steps": STEPS},
    "evaluation": {"before": False, "generate": False, "forgetting": False, "baselines": False},
    # kind: generation leaves out the options' likelihoods, most of the scoring: only the loss is needed here.
    "task": {"kind": "generation", "goal": None, "max_validation_items": 250},
}
COLUMNS = ("variant", "rank", "seed", "learning_rate", "status", "validation_loss", "steps", "tokens", "curve")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--collect", type=Path, help="write the data file and run nothing")
    given = parser.parse_args()
    root = given.output.resolve()
    if given.collect is not None:
        with given.collect.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(sorted(rows(root)))
        return
    path = root / "sweeps" / "pilot_curves.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(sweep_file(), encoding="utf-8")
    command = [sys.executable, "-m", "qlora_exp", "-m", "sweeps=pilot_curves", f"workers.count={given.workers}"]
    subprocess.run([*command, f"output_root={root}", "tracking=off"], cwd=root, check=True)


def points() -> list[dict[str, object]]:
    return [
        {
            "model.variant": variant,
            "lora.r": rank,
            "seed": seed,
            "training.learning_rate": float(f"{CENTRE_AT_8 * (rank / 8) ** -0.5 * factor:.4g}"),
        }
        for seed in SEEDS
        for variant in VARIANTS
        for rank in RANKS
        for factor in FACTORS
    ]


def sweep_file() -> str:
    """JSON is YAML."""
    params = {"model.variant": ",".join(VARIANTS), "lora.r": ",".join(map(str, RANKS))}
    params |= {"seed": ",".join(map(str, SEEDS)), "training.learning_rate": "tag(log,interval(1e-5,1))"}
    sweep = {"name": "pilot_curves", "sampler": "random", "params": params, "enqueue": points()}
    settings = {
        "defaults": [{"override /targets": "all_linear"}, {"override /quantization": "fp32"}],
        "sweep": {**sweep, "n_trials": len(points()), "max_failures": None},
        **SETTINGS,
    }
    return f"# @package _global_\n# Pilots with many learning rates\n{json.dumps(settings, indent=1)}\n"


def rows(root: Path) -> Iterator[tuple[object, ...]]:
    """Yield one row a run that has ended. ``curve``: step:loss pairs; ``tokens``: unpadded tokens of all steps."""
    outputs = OutputPaths.of(str(root))
    for record in read_runs(outputs)[0]:
        if record.trial is None or record.status not in (Status.COMPLETED, Status.DIVERGED):
            continue
        params, after = record.trial.params, record.scores.after
        loss = f"{after.loss_per_item:.5f}" if after and after.loss_per_item is not None else ""
        curve = [point for point in read_curve(outputs.run(record.run_id).curve) if point.get("loss") is not None]
        yield (
            *(params["model.variant"], params["lora.r"], params["seed"], params["training.learning_rate"]),
            *(record.status.value, loss, record.plan.max_steps if record.plan else ""),
            record.speed.train_tokens or "",
            " ".join(f"{point['step']}:{point['loss']:.4f}" for point in curve),
        )


if __name__ == "__main__":
    main()
